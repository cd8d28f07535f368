package server

import (
	"context"
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// clone is a copy of host b, started with its name on another machine.
func clone() Config {
	c := hostConfig("b", "192.0.2.9/24")
	c.BootID, c.LeaseTTL = "boot-1-clone", 3*time.Second
	return c
}

// TestCloneOfALiveHost: a machine with the name and the machine id of a host that lives does not get its name, and
// changes nothing of it. One that is dead, or was rebooted, is followed at once or as soon as its lease shows it.
func TestCloneOfALiveHost(t *testing.T) {
	dir := t.TempDir()
	st := openStore(t, dir)
	t.Cleanup(func() { st.Close() })
	a := startNode(t, st, hostConfig("a", "192.0.2.1/24"))
	cfg := hostConfig("b", "192.0.2.2/24")
	cfg.LeaseTTL = 3 * time.Second
	b := startNode(t, st, cfg)
	object := func() metadata.Host {
		t.Helper()
		h, ok := a.view.host("b")
		if !ok || !h.Live {
			t.Errorf("host b is there %t, live %t", ok, h.Live)
		}
		return h
	}
	before, _ := json.Marshal(object())

	s, err := New(t.Context(), clone(), st)
	if err == nil {
		s.Close()
		t.Fatal("the clone took the name of a host that lives")
	}
	for _, word := range []string{"host name b", "192.0.2.2", "192.0.2.9", "boot-1-b", "boot-1-clone", "/etc/machine-id"} {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("%q is not in: %v", word, err)
		}
	}
	if now, _ := json.Marshal(object()); string(now) != string(before) {
		t.Errorf("host b was %s, is %s", before, now)
	}
	b.stop()

	// A process that was killed: its lease is there for a while, and nobody renews it.
	killed, err := store.Dial(t.Context(),
		store.External{Endpoints: []string{"unix://" + filepath.Join(dir, "client.sock")}, Prefix: "/lariat/v1/",
			Log: testLog()})
	if err != nil {
		t.Fatal(err)
	}
	lease, err := killed.Hold(t.Context(), 6*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	data, _ := json.Marshal(hostLease{Host: "b", MachineID: "machine-b", BootID: "boot-1-b", Address: "192.0.2.2"})
	hold := func() {
		t.Helper()
		if _, err := store.One(t.Context(), killed, store.Change{Key: entry.LivePrefix + "b", Value: data,
			Revision: store.Any, Lease: lease}); err != nil {
			t.Fatal(err)
		}
	}
	hold()
	rebooted := cfg
	rebooted.BootID = "boot-2-b"
	startNode(t, st, rebooted).stop() // under the same address it is the same machine, and nobody waits
	hold()
	killed.Close()
	moved := clone()
	n := startNode(t, st, moved)
	if h, ok := n.view.host("b"); !ok || h.UnderlayAddr() != addr("192.0.2.9") {
		t.Errorf("after the death of b it is %+v", h)
	}
}

// TestNameTakenAway: a host that runs says so when another process wrote over its key, and has its name back when
// that is gone; one that was only removed is written anew.
func TestNameTakenAway(t *testing.T) {
	st := openStore(t, t.TempDir())
	t.Cleanup(func() { st.Close() })
	b := startNode(t, st, hostConfig("b", "192.0.2.2/24"))
	mine, err := st.Get(t.Context(), entry.LivePrefix+"b")
	if err != nil {
		t.Fatal(err)
	}
	problem := func(ok func(error) bool) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for !ok(b.unready(ctx)) {
			select {
			case <-ctx.Done():
				t.Fatalf("it says %v", b.unready(t.Context()))
			case <-tick.C:
			}
		}
	}
	write := func(ch store.Change) {
		t.Helper()
		ch.Revision = store.Any
		if _, err := store.One(t.Context(), st, ch); err != nil {
			t.Fatal(err)
		}
	}
	taken := func(err error) bool {
		return err != nil && strings.Contains(err.Error(), "192.0.2.9") && strings.Contains(err.Error(), "192.0.2.2")
	}
	other := hostLease{Host: "b", MachineID: "machine-b", BootID: "boot-1-clone", Address: "192.0.2.9"}
	theirs, _ := json.Marshal(other)
	object, _ := json.Marshal(metadata.Host{Name: "b", MachineID: "machine-b", BootID: "boot-1-clone",
		Underlay: clone().Underlay})
	write(store.Change{Key: entry.LivePrefix + "b", Value: theirs})
	write(store.Change{Key: entry.HostPrefix + "b", Value: object})
	problem(taken)
	write(store.Change{Key: entry.LivePrefix + "b"})
	problem(func(err error) bool { return err == nil })
	eventually(t, b, func(s *metadata.Snapshot) bool {
		h, _ := s.Host("b")
		return h.Live && h.BootID == "boot-1-b" && h.UnderlayAddr() == addr("192.0.2.2")
	})

	before := b.view.revision
	write(store.Change{Key: entry.LivePrefix + "b"})
	eventually(t, b, func(s *metadata.Snapshot) bool {
		h, _ := s.Host("b")
		return h.Live && s.Revision > before+1
	})
	if now, err := st.Get(t.Context(), entry.LivePrefix+"b"); err != nil || string(now.Value) != string(mine.Value) ||
		!now.Held {
		t.Errorf("the key is %s (held %t), was %s: %v", now.Value, now.Held, mine.Value, err)
	}
}
