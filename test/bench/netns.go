package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// child in the environment says that this process already is inside of its own namespaces.
const child = "LARIAT_BENCH_CHILD"

// errTold marks a failure that the inner process has already told.
var errTold = errors.New("the inner process failed")

// inNamespaces runs this same program again in a network and mount namespace of its own, and, unless we are root, in a user
// namespace that makes us root there. What the bench makes cannot outlive it, and cannot touch the host.
func inNamespaces(ctx context.Context, env ...string) error {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", os.Args[1:]...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(append(os.Environ(), child+"=1"), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: syscall.SIGTERM}
	if os.Geteuid() != 0 {
		cmd.Env = append(cmd.Env, rootless+"=1")
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	// Pdeathsig follows the thread that forks, so that thread must last.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Run(); err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return fmt.Errorf("%w: %w", errTold, err)
		}
		return fmt.Errorf("start in own namespaces: %w (does this kernel allow user namespaces?)", err)
	}
	return nil
}

// privateMounts makes the mount table ours alone and covers /run, where iptables keeps its lock.
func privateMounts() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("bench", "/run", "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("cover /run: %w", err)
	}
	return nil
}

// namespace is a network namespace held by a bind mount, as a runtime would hand it to a plugin.
type namespace struct {
	Name, Path string
}

// newNamespace makes one with its loopback up.
func newNamespace(dir, name string) (*namespace, error) {
	ns := &namespace{Name: name, Path: filepath.Join(dir, name)}
	f, err := os.Create(ns.Path)
	if err != nil {
		return nil, err
	}
	f.Close()
	errc := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine and does not come back elsewhere
		errc <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			if err := unix.Mount("/proc/thread-self/ns/net", ns.Path, "", unix.MS_BIND, ""); err != nil {
				return err
			}
			return linkUp("lo")
		}()
	}()
	if err := <-errc; err != nil {
		return nil, fmt.Errorf("namespace %s: %w", name, err)
	}
	return ns, nil
}

// namespaces makes n of them, in parallel as far as the kernel lets it.
func namespaces(dir, prefix string, n int) ([]*namespace, error) {
	out, errs := make([]*namespace, n), make([]error, n)
	var wg sync.WaitGroup
	slots := make(chan struct{}, 8)
	for i := range n {
		wg.Add(1)
		slots <- struct{}{}
		go func() {
			defer func() { <-slots; wg.Done() }()
			out[i], errs[i] = newNamespace(dir, prefix+strconv.Itoa(i))
		}()
	}
	wg.Wait()
	return out, errors.Join(errs...)
}

// Remove lets go of the namespace; the kernel frees it with its last process.
func (n *namespace) Remove() error {
	return errors.Join(unix.Unmount(n.Path, unix.MNT_DETACH), os.Remove(n.Path))
}

// Do runs fn on a thread that is in the namespace. Processes that fn starts are in it too.
func (n *namespace) Do(fn func() error) error {
	errc := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked, see newNamespace
		if err := n.enter(); err != nil {
			errc <- err
			return
		}
		errc <- fn()
	}()
	return <-errc
}

func (n *namespace) enter() error {
	f, err := os.Open(n.Path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter namespace %s: %w", n.Name, err)
	}
	return nil
}

// crew is a set of threads that stay in one namespace, so that entering it costs the measured work nothing.
type crew struct {
	jobs chan func()
	wg   sync.WaitGroup
}

func newCrew(ns *namespace, size int) (*crew, error) {
	c := &crew{jobs: make(chan func())}
	errs := make(chan error, size)
	for range size {
		c.wg.Add(1)
		go func() {
			defer c.wg.Done()
			runtime.LockOSThread()
			err := ns.enter()
			errs <- err
			if err != nil {
				return
			}
			for job := range c.jobs {
				job()
			}
		}()
	}
	var all []error
	for range size {
		all = append(all, <-errs)
	}
	return c, errors.Join(all...)
}

// Run does one job and waits for it.
func (c *crew) Run(job func()) {
	done := make(chan struct{})
	c.jobs <- func() { defer close(done); job() }
	<-done
}

// RunAll does all jobs, as many at once as the crew has threads.
func (c *crew) RunAll(jobs []func()) {
	var wg sync.WaitGroup
	for _, job := range jobs {
		wg.Add(1)
		c.jobs <- func() { defer wg.Done(); job() }
	}
	wg.Wait()
}

func (c *crew) Close() {
	close(c.jobs)
	c.wg.Wait()
}

func linkUp(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("link %s: %w", name, err)
	}
	return netlink.LinkSetUp(l)
}

// wire joins two namespaces by a veth pair, each end with its address, and lets both forward.
func wire(a, b *namespace, devA, devB, addrA, addrB string) error {
	fb, err := os.Open(b.Path)
	if err != nil {
		return err
	}
	defer fb.Close()
	err = a.Do(func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: devA, MTU: 1500}, PeerName: devB,
			PeerNamespace: netlink.NsFd(int(fb.Fd()))})
	})
	if err != nil {
		return fmt.Errorf("veth %s %s: %w", devA, devB, err)
	}
	for _, end := range []struct {
		ns        *namespace
		dev, addr string
	}{{a, devA, addrA}, {b, devB, addrB}} {
		err := end.ns.Do(func() error {
			l, err := netlink.LinkByName(end.dev)
			if err != nil {
				return err
			}
			ip, err := netlink.ParseAddr(end.addr)
			if err != nil {
				return err
			}
			if err := netlink.AddrAdd(l, ip); err != nil {
				return err
			}
			if err := netlink.LinkSetUp(l); err != nil {
				return err
			}
			if ip.IP.To4() != nil { // a default route, as every real host has one
				_, all, _ := net.ParseCIDR("0.0.0.0/0")
				if err := netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: all}); err != nil && !errors.Is(err, unix.EEXIST) {
					return err
				}
			}
			for _, key := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} {
				if err := os.WriteFile("/proc/sys/"+key, []byte("1"), 0); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("wire %s in %s: %w", end.dev, end.ns.Name, err)
		}
	}
	return nil
}
