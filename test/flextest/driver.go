// Package flextest lets the binary of a guest test also be a volume driver. The test can then call
// the driver as kubelet does, and kill it at each of its failpoints.
package flextest

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/flex"
	"github.com/lariat-net/lariat/pkg/volume/mounts"
	"github.com/lariat-net/lariat/test/guest"
)

// Driver is a driver that the test's binary can be.
type Driver struct {
	Name     string // argv[0]
	New      func(log *slog.Logger) (volume.Driver, error)
	Env      []string // in addition to this process's own
	Programs []string // prefixes of the names of programs that the driver runs
	Secret   string   // a secret that no answer may show
}

// killVariable names the failpoint at which a driver, or its child, is killed. Only binaries of
// tests read it.
const killVariable = "LARIAT_TEST_KILL"

// KillAt returns the environment for a call that is killed at a failpoint.
func KillAt(step string) []string { return []string{killVariable + "=" + step} }

const child = "lariat-volume-child"

// Main is TestMain of a package that calls a driver. In the processes of the driver and its
// children, Main does their work and does not return.
func (d Driver) Main(m *testing.M, o guest.Options) {
	self := os.Args[0]
	if step := os.Getenv(killVariable); step != "" && (self == child || self == d.Name) {
		volume.OnFailpoint = func(name string) {
			if name != step {
				return
			}
			who := os.Getpid()
			if self == child {
				who = os.Getppid() // the driver dies, and this process with it
			}
			syscall.Kill(who, syscall.SIGKILL)
			select {}
		}
	}
	if self == child {
		mounts.RunChild()
	}
	if self == d.Name {
		flex.Main(flex.Program{Name: d.Name, LogFile: d.LogFile(), Driver: d.New})
	}
	guest.Main(m, o)
}

// LogFile returns the path of the driver's log file.
func (d Driver) LogFile() string { return "/tmp/" + d.Name + ".log" }

// StateDir returns the directory of the driver's journal.
func (d Driver) StateDir() string { return filepath.Join(volume.DefaultStateDir, d.Name) }

// Command returns a call of the driver.
func (d Driver) Command(env []string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = d.Name
	cmd.Env = slices.Concat(os.Environ(), []string{flex.TimeoutVariable + "=60s"}, d.Env, env)
	return cmd
}

// Call calls the driver as kubelet does, with both streams in one. It expects one line of JSON,
// unless the driver was killed.
func (d Driver) Call(t *testing.T, env []string, args ...string) (r flex.Reply, killed bool) {
	t.Helper()
	cmd := d.Command(env, args...)
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
	if d.Secret != "" && strings.Contains(string(out), d.Secret) {
		t.Errorf("%v: the secret is in the answer: %s", args, out)
	}
	return r, false
}

// Play makes a call that must end without a kill.
func (d Driver) Play(t *testing.T, env []string, args ...string) flex.Reply {
	t.Helper()
	r, killed := d.Call(t, env, args...)
	if killed {
		t.Fatalf("%v was killed", args)
	}
	return r
}

// OK makes a call that must succeed.
func (d Driver) OK(t *testing.T, args ...string) flex.Reply {
	t.Helper()
	r := d.Play(t, nil, args...)
	if r.Status != flex.Success {
		t.Fatalf("%v: %s: %s", args, r.Status, r.Message)
	}
	return r
}

// Fails makes a call that must fail with words in its message.
func (d Driver) Fails(t *testing.T, env []string, words string, args ...string) {
	t.Helper()
	r := d.Play(t, env, args...)
	if r.Status != flex.Failure || !strings.Contains(r.Message, words) {
		t.Errorf("%v:\ngot  %s: %s\nwant words %s", args, r.Status, r.Message, words)
	}
}

// Place returns a directory for a mount, which does not exist yet. The end of the test detaches all
// mounts there.
func (d Driver) Place(t *testing.T, name string) string {
	t.Helper()
	dir := filepath.Join("/tmp/pods", strings.ReplaceAll(t.Name(), "/", "_"), "volumes", "lariat~"+d.Name, name)
	t.Cleanup(func() { Detach(dir) })
	return dir
}

// Killed waits until the processes of a killed driver have ended; the kernel ends them.
func (d Driver) Killed(t *testing.T) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for end := time.After(20 * time.Second); len(d.processes()) > 0; {
		select {
		case <-end:
			t.Fatal("orphans: ", d.processes())
		case <-tick.C:
		}
	}
}

// processes returns the processes of the driver, of its children and of its programs.
func (d Driver) processes() (found []string) {
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range all {
		data, _ := os.ReadFile(f)
		argv := strings.Split(string(data), "\x00")
		base := filepath.Base(argv[0])
		if base == child || base == d.Name ||
			slices.ContainsFunc(d.Programs, func(p string) bool { return strings.HasPrefix(base, p) }) {
			found = append(found, strings.Join(argv, " "))
		}
	}
	return found
}

// NoRecords fails the test if the journal has files, other than files of these names.
func (d Driver) NoRecords(t *testing.T, but ...string) {
	t.Helper()
	left, _ := filepath.Glob(d.StateDir() + "/*/*")
	if left = slices.DeleteFunc(left,
		func(p string) bool { return slices.Contains(but, filepath.Base(p)) }); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}

// NoProcesses fails the test if processes or locks are left.
func (d Driver) NoProcesses(t *testing.T) {
	t.Helper()
	if left, _ := filepath.Glob(filepath.Join(volume.DefaultRunDir, d.Name, "*")); len(left) > 0 {
		t.Errorf("locks left over: %v", left)
	}
	if who := d.processes(); len(who) > 0 {
		t.Errorf("processes: %v", who)
	}
}

// Detach detaches all mounts at a directory, even mounts in use.
func Detach(dir string) {
	for unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) == nil {
	}
}
