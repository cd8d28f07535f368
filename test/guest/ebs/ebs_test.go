// Package ebs_test runs the EBS driver as kubelet and its controller do: the real SDK against an emulator of EC2 and IMDSv2, which makes attached volumes real NVMe
// drives of this machine.
package ebs_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/ebs"
	"github.com/lariat-net/lariat/pkg/volume/flex"
	"github.com/lariat-net/lariat/pkg/volume/mounts"
	"github.com/lariat-net/lariat/test/fakeaws"
	"github.com/lariat-net/lariat/test/guest"
)

// killVariable names the step at which a driver, or its child, is killed. Only this test's binary knows it.
const killVariable = "LARIAT_TEST_KILL"

// TestMain lets this binary be the driver and the driver's children, too.
func TestMain(m *testing.M) {
	child := os.Args[0] == "lariat-volume-child"
	if step := os.Getenv(killVariable); step != "" && (child || os.Args[0] == "ebs") {
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
	if os.Args[0] == "ebs" {
		flex.Main(flex.Program{Name: "ebs", LogFile: logFile, Driver: func(log *slog.Logger) (volume.Driver, error) {
			c, err := ebs.FromEnvironment(os.Getenv)
			if err != nil {
				return nil, err
			}
			return ebs.New(c, log)
		}})
	}
	guest.Main(m, guest.Options{Bin: true, Memory: 1024})
}

const (
	logFile = "/tmp/ebs.log"
	state   = "/var/lib/lariat/volumes/ebs"
	self    = "i-00000000000000001"
	other   = "i-00000000000000002"
)

// lab is a cloud of two instances, both of which are this machine, and the driver in its first.
type lab struct {
	*testing.T
	*fakeaws.Cloud
	drives *fakeaws.Nvmet
	env    []string
	driver *ebs.Driver // in this process; see do
}

// newLab has a cloud whose answers lag behind as many times.
func newLab(t *testing.T, lag int) *lab {
	t.Helper()
	l := &lab{T: t, drives: fakeaws.NewNvmet(t, t.TempDir())}
	l.Cloud = fakeaws.New(t, fakeaws.Options{Lag: lag, Devices: l.drives})
	l.AddInstance(fakeaws.Instance{ID: self, Nitro: true, Zone: "eu-test-1a"})
	l.AddInstance(fakeaws.Instance{ID: other, Nitro: true, Zone: "eu-test-1a", PrivateDNSName: "node-2.internal"})
	l.env = append(l.Env(self), flex.TimeoutVariable+"=60s")
	t.Cleanup(func() {
		if who := drivers(); len(who) > 0 {
			t.Errorf("processes: %v", who)
		}
		if left, _ := filepath.Glob("/run/lariat/volumes/ebs/*"); len(left) > 0 {
			t.Errorf("locks left over: %v", left)
		}
		if t.Failed() {
			log, _ := os.ReadFile(logFile)
			t.Logf("the driver's log:\n%s", log)
		}
		os.Remove(logFile)
		os.RemoveAll(state)
	})
	return l
}

// drivers are the processes of drivers.
func drivers() (found []string) {
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range all {
		data, _ := os.ReadFile(f)
		argv := strings.Split(string(data), "\x00")
		if base := filepath.Base(argv[0]); base == "lariat-volume-child" || base == "ebs" || base == "blkid" || strings.HasPrefix(base, "mkfs") || base == "e2fsck" {
			found = append(found, strings.Join(argv, " "))
		}
	}
	return found
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

// call is the driver's process, with both streams in one as kubelet has it; one line of JSON is due.
func (l *lab) call(env []string, args ...string) (r flex.Reply, killed bool) {
	l.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = "ebs"
	cmd.Env = append(append(os.Environ(), l.env...), env...)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signaled() {
		return r, true
	}
	if r, err = flex.ParseReply(out); err != nil || bytes.Count(out, []byte("\n")) != 1 {
		l.Fatalf("%v: %v\n%s", args, err, out)
	}
	if code := cmd.ProcessState.ExitCode(); (code == 0) != (r.Status == flex.Success) {
		l.Fatalf("%v: %s with exit status %d", args, r.Status, code)
	}
	return r, false
}

// ok is a call that must succeed.
func (l *lab) ok(args ...string) flex.Reply {
	l.Helper()
	r, killed := l.call(nil, args...)
	if killed || r.Status != flex.Success {
		l.Fatalf("%v: %s: %s", args, r.Status, r.Message)
	}
	return r
}

// fails is a call that must fail with words.
func (l *lab) fails(words string, args ...string) {
	l.Helper()
	l.failsWith(nil, words, args...)
}

func (l *lab) failsWith(env []string, words string, args ...string) {
	l.Helper()
	r, killed := l.call(env, args...)
	if killed || r.Status != flex.Failure || !strings.Contains(r.Message, words) {
		l.Errorf("%v:\ngot  %s: %s\nwant words %s", args, r.Status, r.Message, words)
	}
}

// inProcess is for tests of many calls: do has no process for each.
func (l *lab) inProcess() {
	l.Helper()
	for _, e := range l.env {
		name, value, _ := strings.Cut(e, "=")
		l.Setenv(name, value)
	}
	var err error
	l.driver, err = ebs.New(ebs.Config{}, slog.New(slog.DiscardHandler))
	must(l.T, err)
}

// do is a call that must fail with words, or succeed if there are none.
func (l *lab) do(t *testing.T, words string, args ...string) {
	t.Helper()
	c, err := flex.Parse(args)
	if err == nil {
		_, err = flex.Do(t.Context(), l.driver, c)
	}
	if words == "" && err != nil || words != "" && (err == nil || !strings.Contains(err.Error(), words)) {
		t.Errorf("%v:\ngot  %v\nwant words %s", args, err, words)
	}
}

// place is a folder for a mount; what a test leaves there is detached.
func (l *lab) place(name string) string {
	dir := filepath.Join("/tmp/kubelet", strings.ReplaceAll(l.Name(), "/", "_"), name)
	l.Cleanup(func() {
		for unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) == nil {
		}
	})
	return dir
}

// at are the mounts at a folder.
func (l *lab) at(dir string) []mounts.Entry {
	l.Helper()
	table, err := mounts.Read()
	must(l.T, err)
	return table.At(dir)
}

func (l *lab) nothingAt(dir string) {
	l.Helper()
	if m := l.at(dir); len(m) > 0 {
		l.Errorf("mounted at %s: %+v", dir, m)
	}
}

// volume is the only one in the cloud.
func (l *lab) volume() fakeaws.Volume {
	l.Helper()
	all := l.Volumes()
	if len(all) != 1 {
		l.Fatalf("%d volumes: %+v", len(all), all)
	}
	return all[0]
}

// noRecords: nothing is left in the journal.
func (l *lab) noRecords() {
	l.Helper()
	if left, _ := filepath.Glob(state + "/*/*"); len(left) > 0 {
		l.Errorf("left over: %v", left)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func eventually(t *testing.T, within time.Duration, done func() bool, say func() string) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for end := time.After(within); !done(); {
		select {
		case <-end:
			t.Fatal(say())
		case <-tick.C:
		}
	}
}

// sh runs a line.
func (l *lab) sh(line string) string {
	l.Helper()
	out, err := exec.Command("sh", "-c", line).CombinedOutput()
	if err != nil {
		l.Fatalf("%s: %v %s", line, err, out)
	}
	return strings.TrimSpace(string(out))
}

// F106, F157: the whole life of a volume as kubelet and its controller play it: create, attach, wait, one mkfs, mount for the node and for a pod, detach and attach again under
// another device name, expand, delete.
func TestF157Life(t *testing.T) {
	l := newLab(t, 1)
	global, pod := l.place("global"), l.place("pod")
	j := options("kubernetes.io/pvOrVolumeName", "data", "size", "1", "onRemove", "purge", "tags", "team=blue")
	r := l.ok("create", j)
	if v := l.volume(); r.Options["created"] != "true" || v.Size != 1 || v.Type != "gp3" || v.Zone != "eu-test-1a" || v.Tags["lariat:volume"] != "data" || v.Tags["Name"] != "data" || v.Tags["team"] != "blue" {
		t.Errorf("created: %+v %+v", r, v)
	}
	device := l.ok("attach", j, self).Device
	if !strings.HasPrefix(device, "/dev/xvd") || !*l.ok("isattached", j, self).Attached || *l.ok("isattached", j, "node-2.internal").Attached {
		t.Errorf("attached as %s", device)
	}
	real := l.ok("waitforattach", device, j).Device
	if !strings.HasPrefix(real, "/dev/nvme") {
		t.Errorf("the device is %s", real)
	}
	l.ok("mountdevice", global, real, j)
	l.ok("mount", pod, j)
	l.ok("mount", pod, j)
	if g, p := l.at(global), l.at(pod); len(g) != 1 || len(p) != 1 || g[0].FSType != "ext4" || g[0].Device != p[0].Device || !strings.Contains(p[0].Options, "nosuid,nodev") {
		t.Fatalf("mounted: %+v %+v", g, p)
	}
	must(t, os.WriteFile(pod+"/f", []byte("data"), 0o644))
	uuid := l.sh("blkid -s UUID -o value " + real)
	l.fails("is mounted at", "detach", "data", self)
	l.fails("is attached to instance "+self, "delete", j)
	l.ok("unmount", pod)
	l.nothingAt(pod)
	l.ok("unmountdevice", global)
	l.ok("detach", "data", self)
	if v := l.volume(); v.State != "available" {
		t.Errorf("after the detachment: %+v", v)
	}
	l.noRecords()

	// Another volume takes its name in /dev.
	l.ok("attach", options("name", "decoy", "size", "2", "onRemove", "purge"), self)
	decoy := l.ok("waitforattach", "", options("name", "decoy")).Device
	l.ok("attach", j, self)
	again := l.ok("waitforattach", real, j).Device
	if decoy != real || again == real {
		t.Errorf("the names are not shuffled: %s was the volume's, now %s is, and %s the other's", real, again, decoy)
	}
	l.ok("mountdevice", global, real, j) // the old name; it does not count
	if data, err := os.ReadFile(global + "/f"); err != nil || string(data) != "data" || l.sh("blkid -s UUID -o value "+again) != uuid {
		t.Errorf("the data: %q %v", data, err)
	}

	grown := l.ok("expandfs", j, again, global, fmt.Sprint(2<<30), fmt.Sprint(1<<30))
	var st unix.Statfs_t
	must(t, unix.Statfs(global, &st))
	if size := int64(st.Blocks) * st.Bsize; grown.VolumeNewSize != 2<<30 || size < 19<<26 {
		t.Errorf("expanded: %+v, the file system has %d", grown, size)
	}
	l.ok("expandfs", j, again, global, fmt.Sprint(2<<30), fmt.Sprint(1<<30))
	l.fails("once in six hours; it can be tried again at 20", "expandvolume", j, global, fmt.Sprint(3<<30), fmt.Sprint(2<<30))
	l.ok("unmountdevice", global)
	l.ok("detach", "data", self)
	l.ok("detach", "decoy", self)
	if r := l.ok("delete", options("name", "decoy")); !strings.Contains(r.Message, "is kept, as onRemove=retain says") {
		t.Errorf("delete: %+v", r)
	}
	l.ok("delete", options("name", "decoy", "onRemove", "purge"))
	if r := l.ok("delete", j); !strings.Contains(r.Message, "deleted vol-") || len(l.Volumes()) != 0 {
		t.Errorf("delete: %+v %+v", r, l.Volumes())
	}
	l.ok("delete", j)
	l.noRecords()
	if n := l.Calls("CreateVolume"); n != 2 {
		t.Errorf("CreateVolume was called %d times", n)
	}
}
