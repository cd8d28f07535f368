package server

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// cable is the way to a real store. While it is cut, no call gets an answer.
type cable struct {
	store.Store
	isCut atomic.Bool
	calls atomic.Int64 // while it was cut, without the breaker's own questions
}

func (c *cable) Where() string { return "https://192.0.2.1:2379" }

func (c *cable) pass(ctx context.Context, key string) error {
	if !c.isCut.Load() {
		return nil
	}
	if key != "version" {
		c.calls.Add(1)
	}
	<-ctx.Done()
	return fmt.Errorf("%w: %s in %s: %w", store.ErrUnavailable, key, c.Where(), ctx.Err())
}

func (c *cable) Get(ctx context.Context, key string) (store.Entry, error) {
	if err := c.pass(ctx, key); err != nil {
		return store.Entry{}, err
	}
	return c.Store.Get(ctx, key)
}

func (c *cable) Page(ctx context.Context, l *store.Listing) error {
	if err := c.pass(ctx, l.Prefix); err != nil {
		return err
	}
	return c.Store.Page(ctx, l)
}

func (c *cable) Write(ctx context.Context, changes ...store.Change) []store.Result {
	if err := c.pass(ctx, "write"); err != nil {
		results := make([]store.Result, len(changes))
		for i := range results {
			results[i].Err = err
		}
		return results
	}
	return c.Store.Write(ctx, changes...)
}

// Status asks an endpoint, as that of a store elsewhere does.
func (c *cable) Status(ctx context.Context) (store.Status, error) {
	if err := c.pass(ctx, "status"); err != nil {
		return store.Status{}, err
	}
	return c.Store.Status(ctx)
}

// journal is a log that tests read.
type journal struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.buf.Write(p)
}

// lines returns the lines that are no debug output.
func (j *journal) lines() []string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return strings.Split(strings.TrimSpace(j.buf.String()), "\n")
}

// joined is a host with a store elsewhere.
func joined(t *testing.T) (*node, *cable, *journal) {
	t.Helper()
	st := openStore(t, t.TempDir())
	t.Cleanup(func() { st.Close() })
	c, log := &cable{Store: st}, &journal{}
	cfg := hostConfig("a", "192.0.2.2/24")
	cfg.Timeout, cfg.Log = 3*time.Second, slog.New(slog.NewTextHandler(log, nil))
	n := startNode(t, c, cfg)
	if err := n.Client.Put(t.Context(), metadata.KindNetwork, "lan", overlay("10.42.0.0/16")); err != nil {
		t.Fatal(err)
	}
	attach(t, n, "lan", req("before"))
	return n, c, log
}

// until waits for the store to be lost or found again.
func (n *node) until(t *testing.T, lost bool) {
	t.Helper()
	for {
		err, changed := n.store.Lost()
		if (err != nil) == lost {
			return
		}
		select {
		case <-changed:
		case <-t.Context().Done():
			t.Fatal("the test ends")
		}
	}
}

// cut takes the store away, and returns when the service knows.
func (n *node) cut(t *testing.T, c *cable) {
	t.Helper()
	c.isCut.Store(true)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	n.store.Get(ctx, "x") //nolint:errcheck // it fails, and makes the service ask
	n.until(t, true)
}

// TestWhileTheStoreIsAway: one call waits in vain. The next ones fail at once, and none reaches the store. When
// it answers, everything goes on. The log has a line for each change.
func TestWhileTheStoreIsAway(t *testing.T) {
	n, c, log := joined(t)
	seen := make(chan *metadata.Snapshot, 100)
	watch, stop := context.WithCancel(t.Context())
	defer stop()
	go n.Client.Watch(watch, func(s *metadata.Snapshot) error { seen <- s; return nil },
		nil) //nolint:errcheck // it ends with the test
	before := len(log.lines())
	c.isCut.Store(true)
	_, err := n.Client.Attach(t.Context(), "lan", req("first"))
	if !metadata.IsCode(err, metadata.CodeUnavailable) || !strings.Contains(err.Error(), c.Where()) ||
		strings.Contains(err.Error(), "metadata service") {
		t.Errorf("the error blames the wrong one: %v", err)
	}
	n.until(t, true)
	reached := c.calls.Load()
	for i := range 20 {
		_, err := n.Client.Attach(t.Context(), "lan", req(fmt.Sprint("next", i)))
		if !metadata.IsCode(err, metadata.CodeUnavailable) || !strings.Contains(err.Error(), c.Where()) {
			t.Errorf("%v", err)
		}
		err = n.Client.Release(t.Context(), "lan", metadata.AttachmentID{ContainerID: "before", IfName: "eth0"}, 0)
		if !metadata.IsCode(err, metadata.CodeUnavailable) {
			t.Errorf("%v", err)
		}
	}
	if now := c.calls.Load(); now != reached {
		t.Errorf("%d calls went to a store that is known to be away", now-reached)
	}
	for s := range seen {
		if strings.Contains(s.Away, c.Where()) {
			break
		}
	}
	s, err := n.Client.Snapshot(t.Context())
	if err != nil || s.Away == "" || len(s.Containers) != 1 {
		t.Errorf("what is known is not told: %+v %v", s, err)
	}
	c.isCut.Store(false)
	n.until(t, false)
	attach(t, n, "lan", req("after"))
	for s := range seen {
		if s.Away == "" {
			break
		}
	}
	lines := log.lines()[before:]
	for want, times := range map[string]int{"store lost": 1, "store answers again": 1, "level=ERROR": 0} {
		if got := strings.Count(strings.Join(lines, "\n"), want); got != times {
			t.Errorf("%q is in the log %d times:\n%s", want, got, strings.Join(lines, "\n"))
		}
	}
}

// TestStatusAsksNoStore: the status of a network is answered from memory while the store is away, and what is
// wrong is no fault of this host.
func TestStatusAsksNoStore(t *testing.T) {
	n, c, _ := joined(t)
	n.cut(t, c)
	reached := c.calls.Load()
	for range 20 {
		st, err := n.Client.Status(t.Context(), "lan")
		if err != nil || st.Ready || st.Local || !strings.Contains(st.Reason, c.Where()) || len(st.Usage) != 1 ||
			st.Usage[0].Used != 1 {
			t.Fatalf("%+v %v", st, err)
		}
	}
	if now := c.calls.Load(); now != reached {
		t.Errorf("%d calls went to the store", now-reached)
	}
	if text := metricsText(n); !strings.Contains(text, "\nlariat_store_up 0\n") ||
		!strings.Contains(text, "\nlariat_ready 0\n") {
		t.Errorf("%s", text)
	}
	c.isCut.Store(false)
	n.until(t, false)
	if text := metricsText(n); !strings.Contains(text, "\nlariat_store_up 1\n") ||
		!strings.Contains(text, "\nlariat_ready 1\n") {
		t.Errorf("%s", text)
	}
}

// TestTheNameIsTakenAgain: after an outage that is longer than the lease, the host is live again as soon as the
// store answers.
func TestTheNameIsTakenAgain(t *testing.T) {
	n, c, _ := joined(t)
	n.cut(t, c)
	n.Server.mu.Lock()
	lease := n.lease
	n.Server.mu.Unlock()
	lease.Close()
	<-lease.Lost()
	if h, ok := n.view.host("a"); !ok || h.Live {
		n.await(t, false)
	}
	c.isCut.Store(false)
	n.await(t, true)
	if err := n.unready(t.Context()); err != nil {
		t.Error(err)
	}
}

// deaf fails the first writes of a store, as one does that is too busy to answer in time.
type deaf struct {
	store.Store
	left atomic.Int64
}

func (d *deaf) Write(ctx context.Context, changes ...store.Change) []store.Result {
	results := d.Store.Write(ctx, changes...)
	if d.left.Add(-1) >= 0 { // it was done, and its answer did not come
		for i := range results {
			results[i].Err = fmt.Errorf("%w: write in %s: %w", store.ErrUnavailable, "https://192.0.2.1:2379",
				context.DeadlineExceeded)
		}
	}
	return results
}

// TestAStartWaitsForABusyStore: a start goes on when the store answers again.
func TestAStartWaitsForABusyStore(t *testing.T) {
	st := openStore(t, t.TempDir())
	t.Cleanup(func() { st.Close() })
	d := &deaf{Store: st}
	d.left.Store(3)
	n := startNode(t, d, hostConfig("a", "192.0.2.1/24"))
	n.await(t, true)
	if left := d.left.Load(); left >= 0 {
		t.Errorf("%d writes were left to fail: nothing was tried", left)
	}
}

// await waits until the host is live, or is not.
func (n *node) await(t *testing.T, live bool) {
	t.Helper()
	for {
		n.view.mu.RLock()
		changed := n.view.changed
		n.view.mu.RUnlock()
		if h, _ := n.view.host("a"); h.Live == live {
			return
		}
		select {
		case <-changed:
		case <-t.Context().Done():
			t.Fatal("the test ends")
		}
	}
}
