// Package netnstest gives tests network namespaces of their own, also to an ordinary user.
//
//	func TestMain(m *testing.M) { netnstest.Main(m) }
//
//	func TestPing(t *testing.T) {
//		a, b := netnstest.New(t), netnstest.New(t)
//		netnstest.Veth(t, a, "192.0.2.1/24", b, "192.0.2.2/24")
//		a.Do(t, func() { … }) // runs in namespace a
//	}
//
// Namespaces are made by Go and go with the test; no program is needed, and nothing is mounted or named.
package netnstest

import (
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const inside = "LARIAT_TEST_USERNS"

// Main runs the tests of a package where they may make namespaces: in the process as it is if that has the
// right, and otherwise once more inside of a new user, network and mount namespace, as "unshare -Urnm" would.
// Where neither works the tests run all the same, and New skips with the reason. Under -short no namespaces
// are made, and New skips.
func Main(m *testing.M) {
	flag.Parse()
	if os.Getenv(inside) == "" && !testing.Short() && Possible() != nil {
		if code, err := again(); err == nil {
			os.Exit(code)
		}
	}
	os.Exit(m.Run())
}

func again() (int, error) {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	runtime.LockOSThread() // Pdeathsig counts from the thread that started it
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, os.Interrupt, syscall.SIGTERM, syscall.SIGQUIT)
	go func() {
		for s := range sig {
			_ = cmd.Process.Signal(s)
		}
	}()
	err := cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return 0, err
	}
	return cmd.ProcessState.ExitCode(), nil
}

// Possible says why this process cannot make network namespaces, if so.
func Possible() error {
	f, err := create()
	if err != nil {
		return err
	}
	return f.Close()
}

// create makes a namespace on a thread that ends with it.
func create() (f *os.File, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlock
		if err = unix.Unshare(unix.CLONE_NEWNET); err != nil {
			err = fmt.Errorf("create a network namespace: %w", err)
			return
		}
		f, err = os.Open("/proc/thread-self/ns/net")
	}()
	<-done
	return f, err
}

// NS is a network namespace. It lives until its test ends.
type NS struct{ f *os.File }

// New makes an empty namespace whose loopback device is up. Where that is forbidden the test is skipped with
// the reason.
func New(t testing.TB) *NS {
	t.Helper()
	if testing.Short() {
		t.Skip("-short: no namespaces are made")
	}
	f, err := create()
	if err != nil {
		// as package probe has it
		if r := strings.Split(os.Getenv("REQUIRE"), ","); slices.Contains(r, "netns") || slices.Contains(r, "all") {
			t.Fatalf("%v, and REQUIRE=%s", err, os.Getenv("REQUIRE"))
		}
		t.Skipf("%v; run as root, or allow user namespaces", err)
	}
	t.Cleanup(func() { f.Close() })
	ns := &NS{f: f}
	ns.Do(t, func() {
		lo, err := netlink.LinkByName("lo")
		if err == nil {
			err = netlink.LinkSetUp(lo)
		}
		if err != nil {
			t.Fatalf("set lo up: %v", err)
		}
	})
	return ns
}

// Path opens as the namespace in any process for as long as the test runs.
func (ns *NS) Path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.f.Fd()) }

// Close gives the namespace up before the test ends. The kernel takes it down when nothing else
// holds it.
func (ns *NS) Close(t testing.TB) {
	t.Helper()
	if err := ns.f.Close(); err != nil {
		t.Fatal(err)
	}
}

// Fd is the namespace as setns takes it.
func (ns *NS) Fd() int { return int(ns.f.Fd()) }

// Do calls f in the namespace, on the goroutine of the caller. Goroutines that f starts are in any namespace.
func (ns *NS) Do(t testing.TB, f func()) {
	t.Helper()
	runtime.LockOSThread()
	old, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatalf("open own network namespace: %v", err)
	}
	defer old.Close()
	if err := unix.Setns(ns.Fd(), unix.CLONE_NEWNET); err != nil {
		t.Fatalf("enter network namespace: %v", err)
	}
	defer func() {
		if unix.Setns(int(old.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread() // or else the thread ends with the test
		}
	}()
	f()
}

// Command runs a program in the namespace and returns what it printed. The test is skipped where the program
// is missing, and fails where it fails.
func (ns *NS) Command(t testing.TB, name string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		for _, dir := range []string{"/usr/sbin/", "/sbin/"} {
			if _, serr := os.Stat(dir + name); serr == nil {
				path, err = dir+name, nil
				break
			}
		}
	}
	if err != nil {
		t.Skipf("%s is not installed", name)
	}
	var out []byte
	ns.Do(t, func() { out, err = exec.Command(path, args...).CombinedOutput() })
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

var vethCount atomic.Int32

// Veth connects two namespaces by a veth pair whose ends are up, have the given addresses (192.0.2.1/24;
// empty for none), and are named veth0, veth1 and so on. It returns the names.
func Veth(t testing.TB, a *NS, addrA string, b *NS, addrB string) (nameA, nameB string) {
	t.Helper()
	last := vethCount.Add(2)
	nameA, nameB = fmt.Sprintf("veth%d", last-2), fmt.Sprintf("veth%d", last-1)
	a.Do(t, func() {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = nameA
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: nameB,
			PeerNamespace: netlink.NsFd(b.Fd())}); err != nil {
			t.Fatalf("create veth %s: %v", nameA, err)
		}
	})
	a.Up(t, nameA, addrA)
	b.Up(t, nameB, addrB)
	return nameA, nameB
}

// Up gives a device an address, unless it is empty, and sets it up. IPv6 addresses are usable at once.
func (ns *NS) Up(t testing.TB, dev, addr string) {
	t.Helper()
	ns.Do(t, func() {
		link, err := netlink.LinkByName(dev)
		if err == nil && addr != "" {
			var ip *netlink.Addr
			if ip, err = netlink.ParseAddr(addr); err == nil {
				if ip.IP.To4() == nil {
					ip.Flags = unix.IFA_F_NODAD
				}
				err = netlink.AddrAdd(link, ip)
			}
		}
		if err == nil {
			err = netlink.LinkSetUp(link)
		}
		if err != nil {
			t.Fatalf("set up %s with %s: %v", dev, addr, err)
		}
	})
}

// Listen is net.Listen inside of the namespace.
func (ns *NS) Listen(t testing.TB, network, address string) net.Listener {
	t.Helper()
	var l net.Listener
	ns.Do(t, func() {
		var err error
		if l, err = net.Listen(network, address); err != nil {
			t.Fatalf("listen on %s: %v", address, err)
		}
	})
	t.Cleanup(func() { l.Close() })
	return l
}
