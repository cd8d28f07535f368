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

// LinkReaper removes ports for callers who need not wait for the kernel's house-keeping.
//
// A link is out of everyone's sight, its routes and addresses gone, after a third of a millisecond, and the
// kernel says so (RTM_DELLINK). The request that asked for it returns 16 ms later, when RCU has let go of the
// device (netdev_run_todo), and what is in that wait cannot be killed. So a short-lived process lets a
// long-lived one do it. Nobody holds a lock during that wait, so a few workers take turns; requests that find
// them all waiting are made into one, for a group of links.
type LinkReaper struct {
	kick  chan struct{}
	names int // a socket to ask for names by; it lives as long as the process

	mu      sync.Mutex
	queue   []uint32
	waiting map[uint32][]chan error
}

// workers is how many requests may wait in the kernel at once: four at 16 ms each remove 250 ports a second
// one by one, and any number in groups.
const workers = 4

// NewLinkReaper works in the calling goroutine's network namespace until the context ends.
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
	// Those whose announcement is lost wait for the request to return.
	go receive(events, r.announced, func() {})
	return r, nil
}

// Remove returns when the kernel has announced that the port's host end is gone, or was not there. Its error
// is DelEndpoints', or the context's.
//
// The link is named by its index, which the kernel does not use again: a request whose caller was killed may
// wait its turn until after the next ADD of the same container, and that one's port has the same name.
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
		// Whoever still waits now asked for a link that was not there, or could not be removed.
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
