// Package volumes_test runs the volume drivers as kubelet does, against the kernel's own NFS server.
package volumes_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/flex"
	"github.com/lariat-net/lariat/pkg/volume/mounts"
	"github.com/lariat-net/lariat/pkg/volume/nfs"
	"github.com/lariat-net/lariat/test/guest"
)

// killVariable names the step at which a driver, or its child, is killed. Only this test's binary knows it.
const killVariable = "LARIAT_TEST_KILL"

// TestMain lets this binary be the driver and the driver's children, too.
func TestMain(m *testing.M) {
	child := os.Args[0] == "lariat-volume-child"
	if step := os.Getenv(killVariable); step != "" && (child || os.Args[0] == "nfs") {
		volume.OnStep = func(name string) {
			if name != step {
				return
			}
			if child {
				// The driver dies, and with it this process.
				syscall.Kill(os.Getppid(), syscall.SIGKILL)
				select {}
			}
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	if child {
		mounts.RunChild()
	}
	if os.Args[0] == "nfs" {
		flex.Main(flex.Program{Name: "nfs", LogFile: logFile, Driver: func(log *slog.Logger) (volume.Driver, error) {
			c, err := nfs.FromEnvironment(os.Getenv)
			if err != nil {
				return nil, err
			}
			return nfs.New(c, log)
		}})
	}
	guest.Main(m, guest.Options{Bin: true})
}

const (
	server  = "192.168.9.1"
	other   = "192.168.9.2"
	export  = "/srv/export"
	logFile = "/tmp/nfs.log"
	state   = "/var/lib/lariat/volumes"
)

// start is the kernel's server, once for all tests.
var start = sync.OnceValue(func() error {
	for _, line := range []string{
		"modprobe -a nfsd nfs nfsv3 nfsv4",
		"ip addr add " + server + "/32 dev lo && ip addr add " + other + "/32 dev lo",
		"mkdir -p " + export + " && mount -t tmpfs tmpfs " + export,
		"mount -t nfsd nfsd /proc/fs/nfsd",
		"echo 10 > /proc/fs/nfsd/nfsv4gracetime; echo 10 > /proc/fs/nfsd/nfsv4leasetime",
		"echo '" + export + " *(rw,fsid=1,no_root_squash,insecure,no_subtree_check,async)' > /etc/exports",
		"pidof rpcbind || rpcbind",
		"exportfs -ra && rpc.mountd",
		"rpc.nfsd 4",
		"echo Y > /proc/fs/nfsd/v4_end_grace",
	} {
		if out, err := exec.Command("sh", "-c", line).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", line, err, out)
		}
	}
	return nil
})

func serve(t *testing.T) {
	t.Helper()
	if err := start(); err != nil {
		t.Fatal(err)
	}
}

// options of a volume as JSON.
func options(pairs ...string) string {
	m := map[string]string{}
	for i := 0; i < len(pairs); i += 2 {
		m[pairs[i]] = pairs[i+1]
	}
	data, _ := json.Marshal(m)
	return string(data)
}

// below are the options of a folder on the export.
func below(name string, pairs ...string) string {
	return options(append([]string{"name", name, "host", server, "exportBase", export}, pairs...)...)
}

// play calls the driver as kubelet does, with both streams in one, and expects one line of JSON.
func play(t *testing.T, env []string, args ...string) flex.Reply {
	t.Helper()
	r, killed := call(t, env, args...)
	if killed {
		t.Fatalf("%v was killed", args)
	}
	return r
}

func command(env []string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = "nfs"
	cmd.Env = append(append(os.Environ(), flex.TimeoutVariable+"=60s"), env...)
	return cmd
}

func call(t *testing.T, env []string, args ...string) (r flex.Reply, killed bool) {
	t.Helper()
	cmd := command(env, args...)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signaled() {
		return r, true
	}
	if r, err = flex.ParseReply(out); err != nil || bytes.Count(out, []byte("\n")) != 1 {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
	if code := cmd.ProcessState.ExitCode(); (code == 0) != (r.Status == flex.Success) {
		t.Fatalf("%v: %s with exit status %d", args, r.Status, code)
	}
	return r, false
}

// ok is play, and it must succeed.
func ok(t *testing.T, args ...string) flex.Reply {
	t.Helper()
	r := play(t, nil, args...)
	if r.Status != flex.Success {
		t.Fatalf("%v: %s: %s", args, r.Status, r.Message)
	}
	return r
}

// fails is play, and it must fail with words.
func fails(t *testing.T, env []string, words string, args ...string) {
	t.Helper()
	r := play(t, env, args...)
	if r.Status != flex.Failure || !strings.Contains(r.Message, words) {
		t.Errorf("%v:\ngot  %s: %s\nwant words %s", args, r.Status, r.Message, words)
	}
}

// at are the mounts at a folder.
func at(t *testing.T, dir string) []mounts.Entry {
	t.Helper()
	table, err := mounts.Read()
	if err != nil {
		t.Fatal(err)
	}
	return table.At(dir)
}

func nothingAt(t *testing.T, dir string) {
	t.Helper()
	if m := at(t, dir); len(m) > 0 {
		t.Errorf("mounted at %s: %+v", dir, m)
	}
}

// place is a folder for a mount; what a test leaves there is detached.
func place(t *testing.T) string {
	t.Helper()
	dir := filepath.Join("/tmp/pods", strings.ReplaceAll(t.Name(), "/", "_"), "volumes", "lariat~nfs", "data")
	t.Cleanup(func() {
		for unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) == nil {
		}
	})
	return dir
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// F105, F108: create, mount, use, unmount, delete, with every version of the protocol, in both verb shapes.
func TestF105Versions(t *testing.T) {
	serve(t)
	for _, vers := range []string{"3", "4.0", "4.1", "4.2"} {
		t.Run(vers, func(t *testing.T) {
			dir := place(t)
			name := "v" + strings.ReplaceAll(vers, ".", "-")
			mnt := "vers=" + vers
			if vers == "3" {
				mnt += ",nolock"
			}
			j := below(name, "mntOptions", mnt, "onRemove", "purge", "kubernetes.io/mounterArgs.FsGroup", "1234")
			r := ok(t, "create", j)
			if r.Options["created"] != "true" || r.Options["name"] != name {
				t.Errorf("create: %+v", r)
			}
			if again := ok(t, "create", j); again.Options["created"] != "true" {
				t.Errorf("create again: %+v", again)
			}
			ok(t, "mount", dir, j)
			ok(t, "mount", dir, "", j) // kubelet 1.5's and Rancher's; and once more
			stack := at(t, dir)
			if len(stack) != 1 || stack[0].Source != server+":"+export+"/"+name || !strings.Contains(stack[0].Super, "vers="+vers) || !strings.Contains(stack[0].Options, "nosuid,nodev") {
				t.Fatalf("mounted: %+v", stack)
			}
			must(t, os.WriteFile(dir+"/f", []byte("data"), 0o644))
			if data, err := os.ReadFile(export + "/" + name + "/f"); err != nil || string(data) != "data" {
				t.Errorf("on the server: %q %v", data, err)
			}
			if fi, err := os.Stat(export + "/" + name); err != nil || fi.Sys().(*syscall.Stat_t).Gid != 1234 || fi.Mode()&os.ModeSetgid == 0 {
				t.Errorf("fsGroup: %v %v", fi.Mode(), err)
			}
			fails(t, nil, "is mounted at "+dir, "delete", j)
			ok(t, "unmount", dir)
			nothingAt(t, dir)
			ok(t, "unmount", dir)
			if r := ok(t, "delete", j); r.Message != "purged 1 files, 4 octets" {
				t.Errorf("delete: %s", r.Message)
			}
			if exists(export+"/"+name) || exists(export+"/.lariat/"+name+".json") {
				t.Error("it is still on the server")
			}
			if r := ok(t, "delete", j); r.Message != "" {
				t.Errorf("delete again: %s", r.Message)
			}
		})
	}
	noLeftovers(t)
}

// noLeftovers: neither processes, nor records, nor folders in the making.
func noLeftovers(t *testing.T) {
	t.Helper()
	for _, pattern := range []string{state + "/nfs/*/*", export + "/.lariat/*", "/run/lariat/volumes/nfs/*"} {
		if left, _ := filepath.Glob(pattern); len(left) > 0 {
			t.Errorf("left over: %v", left)
		}
	}
	if who := drivers(); len(who) > 0 {
		t.Errorf("processes: %v", who)
	}
}

// drivers are the processes of drivers.
func drivers() (found []string) {
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range all {
		data, _ := os.ReadFile(f)
		argv := strings.Split(string(data), "\x00")
		if argv[0] == "lariat-volume-child" || strings.HasPrefix(filepath.Base(argv[0]), "mount.nfs") || argv[0] == "nfs" {
			found = append(found, strings.Join(argv, " "))
		}
	}
	return found
}

var _ = slices.Contains[[]string]
var _ = net.Listen
var _ = time.Now
