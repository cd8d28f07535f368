// Package lab builds small clusters out of network namespaces, for the tests, the bench and the demo: hosts
// joined by a switch, each with its real lariat-metadata and lariat-network-manager, and containers that are
// connected by real CNI calls.
//
//	           switch (a bridge in the lab's own namespace)
//	          /            |             \
//	host a eth0        host b eth0        host c eth0       192.0.2.1, .2, .3
//	  |  |               |  |               |  |
//	 c1  c2             c1  c2             c1  c2           one namespace each
//
// Everything lives in a user, network and mount namespace of its own, so it needs no privileges, no traffic
// leaves it, and nothing is left when its first process ends.
package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

const marker = "LARIAT_LAB"

// Enter runs the program again inside of new namespaces, and returns only there. Call it first in main or TestMain.
func Enter() {
	if os.Getenv(marker) == "" && os.Getenv("LARIAT_GUEST") == "" { // a guest is a machine of its own
		os.Exit(reexec())
	}
	if err := furnish(); err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		os.Exit(1)
	}
}

func reexec() int {
	self, err := os.Executable()
	if err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		return 1
	}
	cmd := exec.Command(self, os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), marker+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	runtime.LockOSThread() // the death signal is the thread's, not the process's
	err = cmd.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && exit.ExitCode() >= 0:
		return exit.ExitCode()
	case errors.As(err, &exit):
		return 1
	case err != nil:
		fmt.Fprintf(os.Stderr, "lab: a user, network and mount namespace is needed: %v\n"+
			"  as root or not, the kernel must allow it: see sysctl user.max_user_namespaces, "+
			"kernel.unprivileged_userns_clone,\n"+
			"  kernel.apparmor_restrict_unprivileged_userns; in a container, its seccomp profile\n", err)
		return 1
	}
	return 0
}

// furnish makes /run private, so that neither named namespaces nor sockets show outside, and sets the
// loopback device up.
func furnish() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("lab", "/run", "tmpfs", 0, "mode=0755"); err != nil {
		return fmt.Errorf("mount a tmpfs on /run: %w", err)
	}
	if err := os.MkdirAll("/run/netns", 0o755); err != nil {
		return err
	}
	// /run/netns of ip(8) must be a shared mount of its own, or it remounts.
	if err := unix.Mount("/run/netns", "/run/netns", "", unix.MS_BIND, ""); err != nil {
		return err
	}
	return loopbackUp()
}

// Bin is the folder of the built executables: LARIAT_BIN, or bin/ of the source tree above the working directory.
func Bin() (string, error) {
	if dir := os.Getenv("LARIAT_BIN"); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			bin := filepath.Join(dir, "bin")
			if _, err := os.Stat(filepath.Join(bin, "lariat-vxlan")); err != nil {
				return "", fmt.Errorf("%s holds no executables: run make build first", bin)
			}
			return bin, nil
		}
	}
	return "", errors.New("not inside of the source tree, and LARIAT_BIN is not set")
}
