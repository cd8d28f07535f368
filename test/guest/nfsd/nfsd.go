// Package nfsd is the kernel's own NFS server in a guest, for tests of what mounts from it. The server is the
// guest's; its clients are, too.
package nfsd

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
)

// The server's addresses, and its export.
const (
	Server = "192.168.9.1" // its address
	Other  = "192.168.9.2" // another one, which clients take for another server
	Export = "/srv/export" // what it exports, for writing by root
	Dead   = "192.168.9.7" // where packets for NFS are dropped; see Pair
)

// Serve starts the server, once for all tests of a package. NFS 2 is all that it does not speak.
func Serve(t testing.TB) {
	t.Helper()
	if err := start(); err != nil {
		t.Fatal(err)
	}
}

var start = sync.OnceValue(func() error {
	for _, line := range []string{
		"modprobe -a nfsd nfs nfsv3 nfsv4",
		"ip addr add " + Server + "/32 dev lo && ip addr add " + Other + "/32 dev lo",
		"mkdir -p " + Export + " && mount -t tmpfs tmpfs " + Export,
		"mount -t nfsd nfsd /proc/fs/nfsd",
		"echo 10 > /proc/fs/nfsd/nfsv4gracetime; echo 10 > /proc/fs/nfsd/nfsv4leasetime",
		"echo 1048576 > /proc/fs/nfsd/max_block_size", // a machine of little memory chooses less
		"echo '" + Export + " *(rw,fsid=1,no_root_squash,insecure,no_subtree_check,async)' > /etc/exports",
		"pidof rpcbind || rpcbind",
		"exportfs -ra && rpc.mountd", //nolint:misspell // it is the program's name
		"rpc.nfsd 4",
		"echo Y > /proc/fs/nfsd/v4_end_grace",
	} {
		if out, err := exec.Command("sh", "-c", line).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", line, err, out)
		}
	}
	return nil
})

// Name gives a name addresses, in this order, for as long as a test runs.
func Name(t testing.TB, name string, addrs ...string) {
	t.Helper()
	const hosts = "/etc/hosts"
	before, err := os.ReadFile(hosts)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(hosts, before, 0o644); err != nil {
			t.Error(err)
		}
	})
	text := strings.TrimSuffix(string(before), "\n") + "\n"
	for _, a := range addrs {
		text += a + " " + name + "\n"
	}
	if err := os.WriteFile(hosts, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// Pair gives a name two addresses: first one that is dead, then the server's.
func Pair(t testing.TB, name string) {
	t.Helper()
	sh := func(line string) {
		if out, err := exec.Command("sh", "-c", line).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v %s", line, err, out)
		}
	}
	sh("ip addr replace " + Dead + "/32 dev lo; iptables -A INPUT -d " + Dead + " -p tcp -j DROP")
	t.Cleanup(func() { sh("iptables -D INPUT -d " + Dead + " -p tcp -j DROP; ip addr del " + Dead + "/32 dev lo") })
	Name(t, name, Dead, Server)
}
