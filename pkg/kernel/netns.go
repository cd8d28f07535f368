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

// Netns is the Kernel of one real network namespace. It keeps its sockets open, and may be used from any
// goroutine, whatever namespace that is in; calls that need the sockets take turns.
type Netns struct {
	// Log is told of what is out of the ordinary, such as a device that had to be made again. nil: slog.Default().
	Log *slog.Logger

	mu sync.Mutex // guards what follows
	rt *socket
	nf *nftables // nil until something needs nftables

	// unknown are the kinds of devices that the kernel did not know when it was asked. What it does not know it
	// has none of, and a list of all devices instead can be long.
	unknown map[string]bool

	ns *os.File // the namespace itself
	id nsID
}

type nsID struct{ dev, ino uint64 }

const ownNamespace = "/proc/thread-self/ns/net"

// New opens the network namespace of the calling goroutine. A goroutine that is in another namespace than its
// process must be locked to its thread, as ever.
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

// do calls f on a thread that is in the namespace: the caller's own if it is there already, and otherwise one
// that ends with the call, for a thread that came from elsewhere must not go back into Go's pool.
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

// handle is a netlink socket of the common library in the namespace, for work on single objects.
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

// index is the interface index of a device; unix.ENODEV is wrapped when there is none.
func (n *Netns) index(dev string) (uint32, error) {
	req, err := unix.NewIfreq(dev)
	if err == nil {
		// An ioctl is an eighth of a netlink request, and a netlink socket takes it as well as any other.
		err = unix.IoctlIfreq(n.rt.fd, unix.SIOCGIFINDEX, req)
	}
	if err != nil {
		return 0, fmt.Errorf("device %s: %w", dev, err)
	}
	return req.Uint32(), nil
}

// name is the device of an interface index, empty when there is none (any more).
func (n *Netns) name(index uint32) string { return deviceName(n.rt.fd, index) }

func deviceName(fd int, index uint32) string {
	req, _ := unix.NewIfreq("")
	req.SetUint32(index)
	if unix.IoctlIfreq(fd, unix.SIOCGIFNAME, req) != nil {
		return ""
	}
	return req.Name()
}
