package kernel

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Netns is the Kernel of one real network namespace. A Netns keeps its sockets open.
// A goroutine in any namespace may use a Netns. Calls that need the sockets take turns.
type Netns struct {
	// Log receives unusual events, such as the re-creation of a device. nil: slog.Default().
	Log *slog.Logger

	mu sync.Mutex // guards the fields below
	rt *socket
	nf *nftables // nil until something needs nftables

	// unknown holds the kinds of devices that the kernel did not know at an earlier dump.
	// The kernel has no devices of an unknown kind.
	// A dump of an unknown kind would list all devices, and that list can be long.
	unknown map[string]bool

	ns *os.File // the namespace itself
	id nsID
}

type nsID struct{ dev, ino uint64 }

const ownNamespace = "/proc/thread-self/ns/net"

// New opens the network namespace of the calling goroutine.
// A goroutine in another namespace than its process must be locked to its thread.
func New() (*Netns, error) {
	f, err := os.Open(ownNamespace)
	if err != nil {
		return nil, fmt.Errorf("open own network namespace: %w", err)
	}
	return open(f)
}

// NewAt opens a network namespace by its path, such as /run/netns/blue or /proc/4711/ns/net.
func NewAt(path string) (*Netns, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	return open(f)
}

func open(f *os.File) (*Netns, error) {
	n := &Netns{ns: f}
	var st unix.Stat_t
	err := unix.Fstat(int(f.Fd()), &st)
	if err == nil {
		n.id = nsID{st.Dev, st.Ino}
		err = n.do(func() (err error) {
			n.rt, err = openSocket(unix.NETLINK_ROUTE)
			return err
		})
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("network namespace %s: %w", f.Name(), err)
	}
	return n, nil
}

// Close implements Kernel.
func (n *Netns) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	errs := []error{n.rt.close(), n.ns.Close()}
	if n.nf != nil {
		errs = append(errs, n.nf.close())
	}
	return errors.Join(errs...)
}

func (n *Netns) log() *slog.Logger {
	if n.Log != nil {
		return n.Log
	}
	return slog.Default()
}

// do calls f on a thread in the namespace. It uses the caller's thread when that thread is in the
// namespace. Otherwise it uses a new thread, which ends with the call.
// A thread that has changed its namespace must not return to Go's pool.
func (n *Netns) do(f func() error) error {
	runtime.LockOSThread()
	var st unix.Stat_t
	if err := unix.Stat(ownNamespace, &st); err == nil && (nsID{st.Dev, st.Ino}) == n.id {
		defer runtime.UnlockOSThread()
		return f()
	}
	runtime.UnlockOSThread()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlock
		if err := unix.Setns(int(n.ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter network namespace %s: %w", n.ns.Name(), err)
			return
		}
		done <- f()
	}()
	return <-done
}

// handle returns a netlink socket of the common library in the namespace, for single objects.
func (n *Netns) handle() (h *netlink.Handle, err error) {
	err = n.do(func() (err error) {
		h, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	return h, nil
}

// index returns the interface index of a device. The error wraps unix.ENODEV when there is none.
func (n *Netns) index(dev string) (uint32, error) {
	req, err := unix.NewIfreq(dev)
	if err == nil {
		// An ioctl costs an eighth of a netlink request, and every socket takes it.
		err = unix.IoctlIfreq(n.rt.fd, unix.SIOCGIFINDEX, req)
	}
	if err != nil {
		return 0, fmt.Errorf("device %s: %w", dev, err)
	}
	return req.Uint32(), nil
}

// name returns the device of an interface index, or an empty string when there is none.
func (n *Netns) name(index uint32) string { return deviceName(n.rt.fd, index) }

func deviceName(fd int, index uint32) string {
	req, _ := unix.NewIfreq("")
	req.SetUint32(index)
	if unix.IoctlIfreq(fd, unix.SIOCGIFNAME, req) != nil {
		return ""
	}
	return req.Name()
}
