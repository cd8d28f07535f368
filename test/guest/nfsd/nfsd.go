// Package nfsd is the kernel's own NFS server in a guest, for tests of what mounts from it. The server is the guest's; its clients are, too.
package nfsd

import (
	"fmt"
	"os/exec"
	"sync"
	"testing"
)

// The server's addresses, and its export.
const (
	Server = "192.168.9.1" // its address
	Other  = "192.168.9.2" // another one, which clients take for another server
	Export = "/srv/export" // what it exports, for writing by root
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
