package kernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/delta"
)

// LinkReaper removes host ends for callers that need not wait for the kernel's cleanup.
//
// A removed link, its routes and its addresses vanish after a third of a millisecond.
// The kernel announces this removal (RTM_DELLINK). The request returns 16 ms later.
// Until then the kernel waits for RCU to release the device (netdev_run_todo).
// A process in that wait cannot be killed.
// Therefore a short-lived process leaves the removal to a long-lived process.
// The kernel holds no lock during that wait, so a few workers can wait in parallel.
// When all workers wait, LinkReaper merges further requests into one request for a group of links.
type LinkReaper struct {
	kick  chan struct{}
	names int // a socket for lookups of names, open until the process ends

	mu      sync.Mutex
	queue   []uint32
	waiting map[uint32][]chan error
}

// workers limits how many requests wait in the kernel at the same time.
// Four requests of 16 ms each remove 250 links per second singly, and any number in groups.
const workers = 4

// NewLinkReaper returns a LinkReaper for the calling goroutine's network namespace.
// It works until the context ends.
func NewLinkReaper(ctx context.Context) (*LinkReaper, error) {
	events, err := subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK)
	if err != nil {
		return nil, fmt.Errorf("watch links: %w", err)
	}
	names, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, errors.Join(os.NewSyscallError("socket", err), events.Close())
	}
	r := &LinkReaper{names: names, kick: make(chan struct{}, 1), waiting: map[uint32][]chan error{}}
	for range workers {
		n, err := New()
		if err != nil {
			return nil, errors.Join(err, events.Close())
		}
		go r.work(ctx, n)
	}
	context.AfterFunc(ctx, func() { events.Close() })
	// When an announcement is lost, the caller of Remove waits until the request returns.
	go receive(events, r.announced, func() {})
	return r, nil
}

// Remove returns when the kernel has announced the removal of the host end.
// It returns at once when there is no such host end.
// The error is that of DelEndpoints or of the context.
//
// The index identifies the link, because the kernel does not reuse an index.
// A request of a killed caller may wait until after the next ADD of the same container.
// The host end of that ADD has the same name.
func (r *LinkReaper) Remove(ctx context.Context, hostName string, index uint32) error {
	if !strings.HasPrefix(hostName, delta.VethPrefix) || index == 0 {
		return fmt.Errorf("remove %s, index %d: it is no container's port", hostName, index)
	}
	if deviceName(r.names, index) != hostName {
		return nil
	}
	done := make(chan error, 1)
	r.mu.Lock()
	r.queue = append(r.queue, index)
	r.waiting[index] = append(r.waiting[index], done)
	r.mu.Unlock()
	select {
	case r.kick <- struct{}{}:
	default:
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("remove %s: %w", hostName, ctx.Err())
	}
}

func (r *LinkReaper) work(ctx context.Context, n *Netns) {
	defer n.Close()
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.kick:
		}
		r.mu.Lock()
		links := r.queue
		r.queue = nil
		r.mu.Unlock()
		if len(links) == 0 {
			continue
		}
		n.mu.Lock()
		err := n.removeGroup(links)
		n.mu.Unlock()
		// The remaining callers requested a link that did not exist or could not be removed.
		for _, index := range links {
			r.gone(index, err)
		}
	}
}

func (r *LinkReaper) gone(index uint32, err error) {
	r.mu.Lock()
	waiting := r.waiting[index]
	delete(r.waiting, index)
	r.mu.Unlock()
	for _, w := range waiting {
		w <- err
	}
}

func (r *LinkReaper) announced(typ uint16, body []byte) {
	if typ == unix.RTM_DELLINK {
		r.gone(parseLink(body).index, nil)
	}
}
