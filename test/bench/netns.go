package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"strconv"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/test/lab"
)

// namespace is a network namespace held by a bind mount, as a runtime would hand it to a plugin.
type namespace struct{ lab.Netns }

func newNamespace(name string) (*namespace, error) {
	ns, err := lab.NewNetns(name)
	if err != nil {
		return nil, fmt.Errorf("namespace %s: %w", name, err)
	}
	return &namespace{ns}, nil
}

// namespaces makes n of them, in parallel as far as the kernel lets it.
func namespaces(prefix string, n int) ([]*namespace, error) {
	out, errs := make([]*namespace, n), make([]error, n)
	var wg sync.WaitGroup
	slots := make(chan struct{}, 8)
	for i := range n {
		wg.Add(1)
		slots <- struct{}{}
		go func() {
			defer func() { <-slots; wg.Done() }()
			out[i], errs[i] = newNamespace(prefix + strconv.Itoa(i))
		}()
	}
	wg.Wait()
	return out, errors.Join(errs...)
}

// enter moves this thread, which must be locked, into the namespace.
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
				if err := netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: all}); err != nil &&
					!errors.Is(err, unix.EEXIST) {
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
