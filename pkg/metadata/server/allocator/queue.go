package allocator

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/allocate"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// maxBatch bounds how many requests share one write, and so how long each of them waits for the others.
const maxBatch = 512

type requestKind int

const (
	requestAttach requestKind = iota
	requestRelease
	requestGC
	requestClaimFirst
	requestReleaseEmpty
)

// request is one request in the queue.
type request struct {
	ctx      context.Context
	kind     requestKind
	id       metadata.AttachmentID
	attach   Attachment
	sequence uint64                         // requestRelease: entries with later numbers stay; 0: none stays
	valid    map[metadata.AttachmentID]bool // requestGC: attachments that stay
	before   time.Time                      // requestReleaseEmpty: blocks stay that were in use since

	tries int
	taken []uint64 // requestAttach: sequence numbers that it used
	done  chan struct{}

	entries  []allocate.Entry // requestAttach: all entries of the attachment
	released []allocate.Entry
	err      error
}

// do queues a request and waits for its end. When the context ends first, the request may or may not have been done;
// the same request again tells.
func (a *Allocator) do(r *request) error {
	r.done = make(chan struct{})
	a.mu.Lock()
	a.queue = append(a.queue, r)
	if !a.running {
		a.running = true
		go a.run()
	}
	a.mu.Unlock()
	select {
	case <-r.done:
		return r.err
	case <-r.ctx.Done():
		return fmt.Errorf("%w: network %s in %s: %w", store.ErrUnavailable, a.network, a.store.Where(),
			context.Cause(r.ctx))
	}
}

// run processes the queue until it is empty.
func (a *Allocator) run() {
	for {
		a.mu.Lock()
		requests := a.queue[:min(len(a.queue), maxBatch)]
		a.queue = a.queue[len(requests):]
		if len(requests) == 0 {
			a.running = false
			a.mu.Unlock()
			return
		}
		a.mu.Unlock()
		again := a.process(requests)
		a.mu.Lock()
		a.queue = append(again, a.queue...)
		a.mu.Unlock()
	}
}

func (r *request) finish(err error) {
	r.err = err
	close(r.done)
}

// process plans requests, writes the plan, and answers. It returns the requests that must be planned again.
func (a *Allocator) process(requests []*request) (again []*request) {
	requests = slices.DeleteFunc(requests, func(r *request) bool {
		if r.ctx.Err() != nil {
			r.finish(r.ctx.Err())
			return true
		}
		return false
	})
	if len(requests) == 0 {
		return nil
	}
	ctx, cancel := context.WithDeadline(context.Background(), latestDeadline(requests))
	defer cancel()
	b, err := a.newBatch(ctx)
	if err != nil {
		for _, r := range requests {
			r.finish(err)
		}
		return nil
	}
	for _, r := range requests {
		b.add(ctx, r)
	}
	if len(b.results) == 0 {
		return nil
	}
	return b.commit(ctx)
}

// latestDeadline returns the deadline of the request that has the longest time left. It bounds the store's work. The
// other requests are answered at their own deadlines.
func latestDeadline(requests []*request) (latest time.Time) {
	for _, r := range requests {
		if d, ok := r.ctx.Deadline(); ok && d.After(latest) {
			latest = d
		}
	}
	return latest
}
