package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/kernel"
)

// Netns is a named network namespace, as ip(8) would make it.
type Netns struct{ Name, Path string }

// NewNetns makes a namespace with its loopback device up.
func NewNetns(name string) (Netns, error) {
	n := Netns{Name: name, Path: filepath.Join("/run/netns", name)}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("new network namespace: %w", err)
			}
			if err := os.WriteFile(n.Path, nil, 0o444); err != nil {
				return err
			}
			if err := unix.Mount(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), n.Path, "", unix.MS_BIND,
				""); err != nil {
				return fmt.Errorf("mount namespace on %s: %w", n.Path, err)
			}
			return loopbackUp()
		}()
	}()
	return n, <-done
}

// Remove takes the name away; the namespace goes with its last process.
func (n Netns) Remove() error {
	if err := unix.Unmount(n.Path, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount %s: %w", n.Path, err)
	}
	return os.Remove(n.Path)
}

// Do runs f on a thread inside of the namespace. What f starts by os/exec runs there too; goroutines that it
// starts do not.
func (n Netns) Do(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine rather than going back
		h, err := netns.GetFromPath(n.Path)
		if err != nil {
			done <- fmt.Errorf("namespace %s: %w", n.Name, err)
			return
		}
		defer h.Close()
		if err := netns.Set(h); err != nil {
			done <- fmt.Errorf("enter namespace %s: %w", n.Name, err)
			return
		}
		done <- f()
	}()
	return <-done
}

func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// Switch is a bridge in the lab's own namespace.
type Switch struct{ Name string }

// NewSwitch makes one.
func NewSwitch(name string, mtu int) (*Switch, error) {
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name, MTU: mtu}}
	if err := netlink.LinkAdd(br); err != nil {
		return nil, fmt.Errorf("bridge %s: %w", name, err)
	}
	return &Switch{Name: name}, netlink.LinkSetUp(br)
}

// Remove takes the switch away with all of its cables.
func (s *Switch) Remove() error {
	br, err := netlink.LinkByName(s.Name)
	if err != nil {
		return err
	}
	links, err := kernel.RetryDump(netlink.LinkList)
	if err != nil {
		return err
	}
	var errs []error
	for _, l := range links {
		if l.Attrs().MasterIndex == br.Attrs().Index {
			if err := netlink.LinkDel(l); !errors.Is(err, unix.ENODEV) { // its namespace may be going
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(append(errs, netlink.LinkDel(br))...)
}

// Plug connects a namespace to the switch: an interface with the addresses, up.
func (s *Switch) Plug(n Netns, ifname string, mtu int, addrs ...netip.Prefix) error {
	ns, err := netns.GetFromPath(n.Path)
	if err != nil {
		return err
	}
	defer ns.Close()
	br, err := netlink.LinkByName(s.Name)
	if err != nil {
		return err
	}
	port := "sw-" + n.Name
	if len(port) > 15 {
		port = port[:15]
	}
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: port, MTU: mtu, MasterIndex: br.Attrs().Index},
		PeerName: ifname, PeerMTU: uint32(mtu), PeerNamespace: netlink.NsFd(ns)}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("cable %s to %s: %w", s.Name, n.Name, err)
	}
	if err := netlink.LinkSetUp(veth); err != nil {
		return err
	}
	h, err := netlink.NewHandleAt(ns)
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := h.LinkByName(ifname)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		addr, err := netlink.ParseAddr(a.String())
		if err != nil {
			return err
		}
		addr.Flags = unix.IFA_F_NODAD
		if err := h.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("address %s of %s: %w", a, n.Name, err)
		}
	}
	return h.LinkSetUp(link)
}
