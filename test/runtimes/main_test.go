package runtimes

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// stage in the environment says how deep inside of its namespaces this process is.
const stage = "LARIAT_RUNTIMES_STAGE"

// workDir in the environment is where the tests keep everything.
const workDir = "LARIAT_RUNTIMES_DIR"

// TestMain runs the tests in namespaces of their own: network and mounts, so that the machine is not touched,
// and process ids, so that nothing a runtime left behind (shims, conmons, containers) outlives the test.
// Without root the tests run here, and skip.
func TestMain(m *testing.M) {
	switch {
	case os.Getenv(stage) == "tests", os.Geteuid() != 0:
		os.Exit(m.Run())
	case os.Getenv(stage) == "init":
		code, err := initProcess()
		if err != nil {
			fmt.Fprintln(os.Stderr, "test/runtimes:", err)
			code = 1
		}
		os.Exit(code)
	}
	for _, codename := range strings.Fields(os.Getenv(debianVariable)) { // out here, where there is a network
		if err := prepareDebian(context.Background(), codename); err != nil {
			fmt.Fprintf(os.Stderr, "test/runtimes: Debian %s: %v\n", codename, err)
			os.Exit(1)
		}
	}
	// Short, because a unix socket's path holds 107 octets at most. Made and removed out here, where no mount of
	// a container that a failed test left running is in the way.
	dir, err := os.MkdirTemp("", "lrt")
	if err != nil {
		fmt.Fprintln(os.Stderr, "test/runtimes:", err)
		os.Exit(1)
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), stage+"=init", workDir+"="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID,
		Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // Pdeathsig follows the thread
	before := controlGroups()
	err = cmd.Run()
	removeGroups(before)
	os.RemoveAll(dir)
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		if required("root") {
			fmt.Fprintln(os.Stderr, "test/runtimes: namespaces:", err)
			os.Exit(1)
		}
		fmt.Println("SKIP test/runtimes: root may make no namespaces here:", err)
		os.Exit(0)
	}
	os.Exit(cmd.ProcessState.ExitCode())
}

// controlGroups are those that runtimes make by fixed names and do not remove: a mount namespace does not hide them.
func controlGroups() map[string]bool {
	found := map[string]bool{}
	for _, pattern := range []string{"/sys/fs/cgroup/%s", "/sys/fs/cgroup/*/%s"} { // version 2, version 1
		for _, name := range []string{"k8s.io", "libpod_parent", "lariat-docker", "lariat-debian"} {
			paths, _ := filepath.Glob(fmt.Sprintf(pattern, name))
			for _, p := range paths {
				found[p] = true
			}
		}
	}
	return found
}

// removeGroups removes those that were not there before. Their processes ended with the process namespace.
func removeGroups(before map[string]bool) {
	for top := range controlGroups() {
		if before[top] {
			continue
		}
		var dirs []string
		filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
		for _, d := range slices.Backward(dirs) {
			if err := unix.Rmdir(d); err != nil {
				fmt.Fprintln(os.Stderr, "test/runtimes: control group left:", d, err)
			}
		}
	}
}

// initProcess is process 1 of the namespace: it prepares the mount table, starts the tests, and reaps what
// loses its parent.
func initProcess() (int, error) {
	mounts := []struct{ target, kind string }{
		{"/proc", "proc"},
		// Runtimes keep sockets, locks and namespaces in fixed places; these are the test's own.
		{"/run", "tmpfs"},
		{"/var/lib/cni", "tmpfs"},
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return 0, fmt.Errorf("make mounts private: %w", err)
	}
	// What is below a new /proc or /run stays reachable to nobody; the cgroup mounts below /sys are untouched.
	for _, m := range mounts {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return 0, err
		}
		if err := unix.Mount("lariat-test", m.target, m.kind, 0, ""); err != nil {
			return 0, fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	os.Setenv(stage, "tests") // not appended: of two entries the first would count
	tests, err := os.StartProcess("/proc/self/exe", os.Args, &os.ProcAttr{
		Env: os.Environ(), Files: []*os.File{os.Stdin, os.Stdout, os.Stderr}})
	if err != nil {
		return 0, err
	}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, fmt.Errorf("wait: %w", err)
		case pid == tests.Pid && status.Exited():
			return status.ExitStatus(), nil
		case pid == tests.Pid && status.Signaled():
			return 0, fmt.Errorf("the tests ended by %v", status.Signal())
		}
	}
}

// required says whether the environment variable REQUIRE names a need, whose absence is a failure then.
func required(name string) bool {
	list := "," + os.Getenv("REQUIRE") + ","
	return strings.Contains(list, ","+name+",") || list == ",all,"
}

// need skips the test, naming what is missing, or fails it when REQUIRE holds one of the names.
func need(t *testing.T, names ...string) {
	t.Helper()
	var missing []string
	fatal := false
	for _, n := range names {
		ok := false
		if n == "root" {
			ok = os.Geteuid() == 0
		} else {
			_, err := exec.LookPath(n)
			ok = err == nil
		}
		if !ok {
			missing = append(missing, n)
			fatal = fatal || required(n)
		}
	}
	switch msg := "needs " + strings.Join(missing, ", "); {
	case len(missing) == 0:
	case fatal:
		t.Fatal(msg + ", and REQUIRE says that it must be here")
	default:
		t.Skip(msg)
	}
}
