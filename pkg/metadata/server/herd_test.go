package server

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// counting counts the writes of claims.
type counting struct {
	*store.Etcd
	claims atomic.Int64
}

func (c *counting) Write(ctx context.Context, changes ...store.Change) []store.Result {
	for _, ch := range changes {
		if strings.HasPrefix(ch.Key, entry.BlockPrefix) {
			c.claims.Add(1)
		}
	}
	return c.Etcd.Write(ctx, changes...)
}

// TestManyHostsClaimAtOnce: on a new network each host claims a block with hardly more than one try.
func TestManyHostsClaimAtOnce(t *testing.T) {
	st := &counting{Etcd: openStore(t, t.TempDir())}
	t.Cleanup(func() { st.Close() })
	const hosts = 40
	var nodes []*Server
	for i := range hosts {
		cfg := hostConfig(fmt.Sprintf("host%02d", i), fmt.Sprintf("192.0.2.%d/24", i+1))
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		s, err := New(ctx, cfg, st)
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		nodes = append(nodes, s)
	}
	n := overlay("10.0.0.0/16")
	n.Name = "lan"
	if _, err := nodes[0].PutNetwork(t.Context(), *n, false, false); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for _, s := range nodes {
		wg.Go(func() {
			if err := s.Join(t.Context(), "lan"); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	t.Logf("%d hosts, %d tries", hosts, st.claims.Load())
	if got := st.claims.Load(); got < hosts || got > 2*hosts {
		t.Errorf("%d hosts needed %d tries, want hardly more than one each", hosts, got)
	}
}

// told is what a watch tells of what happened since a mark, and how many revisions that took.
func told(t *testing.T, st store.Store, n *node, from int64) (events []metadata.Event, revisions int64) {
	t.Helper()
	index, ok := n.view.since(from)
	if !ok {
		t.Fatal("the view's events are gone")
	}
	to := mark(t, st, n)
	lines, _, _, _ := n.view.next(index)
	for _, l := range lines {
		var ev metadata.Event
		must(t, json.Unmarshal(l.line, &ev))
		if ev.Type != metadata.EventBookmark {
			events = append(events, ev)
		}
	}
	return events, to - from - 1
}

// TestAStartIsToldOnce: all hosts hear of each change, so a host that starts makes one, and one
// that starts again within its lease none.
func TestAStartIsToldOnce(t *testing.T) {
	st := openStore(t, t.TempDir())
	t.Cleanup(func() { st.Close() })
	a := startNode(t, st, hostConfig("a", "192.0.2.1/24"))
	before := mark(t, st, a)
	first := startNode(t, st, hostConfig("b", "192.0.2.2/24"))
	events, revisions := told(t, st, a, before)
	if len(events) != 1 || events[0].Key != "b" || !strings.Contains(string(events[0].Object), `"live":true`) {
		t.Errorf("a new host was told by %d events, want one that says it is live: %+v", len(events), events)
	}
	// Its entry and its lease; the reservation of its MAC is nobody else's business.
	if revisions > 2 {
		t.Errorf("a new host cost %d transactions, want 2", revisions)
	}
	before = mark(t, st, a)
	second := startNode(t, st, hostConfig("b", "192.0.2.2/24")) // killed and started: the old lease is there
	if events, revisions = told(t, st, a, before); len(events) != 0 || revisions > 1 {
		t.Errorf("a restart within the lease cost %d transactions, want 1, and was told: %+v", revisions, events)
	}
	first.stop() // its lease holds nothing any more
	before = mark(t, st, a)
	if h, _ := a.view.host("b"); !h.Live {
		t.Error("b is not live")
	}
	second.stop()
	if events, _ = told(t, st, a, before); len(events) != 1 || strings.Contains(string(events[0].Object), `"live":true`) {
		t.Errorf("the end of a host was told by %+v", events)
	}
}
