package server

import (
	"context"
	"encoding/json"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// listed returns the containers of the model by id.
func listed(t testing.TB, n *node) map[string]metadata.Container {
	t.Helper()
	snap, err := n.Client.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]metadata.Container{}
	for _, c := range snap.Containers {
		out[c.ID] = c
	}
	return out
}

// TestPodReturnsWithItsUID: a pod comes back with its UID while its old attachment is still held.
// Each container has an object of its own, which ends with its attachment, and nothing is kept for
// the UID: also when the host booted in between.
func TestPodReturnsWithItsUID(t *testing.T) {
	ctx := t.Context()
	st := openStore(t, t.TempDir())
	defer st.Close()
	cfg := hostConfig("a", "192.0.2.1/24")
	n := startNode(t, st, cfg)
	define(t, n, "lan", overlay("10.42.0.0/16"))
	pod := func(id string) metadata.AttachRequest {
		r := req(id)
		r.UUID, r.Name = "u", "default/web"
		return r
	}
	mac, _ := metadata.ParseMAC("02:42:00:00:00:09")
	first := pod("a1")
	first.MAC = mac
	held := map[string]netip.Addr{"a1": attach(t, n, "lan", first).Addresses[0].Address}
	n.stop()
	cfg.BootID = "boot-2-a"
	n = startNode(t, st, cfg)
	b1 := attach(t, n, "lan", pod("b1"))
	if held["b1"] = b1.Addresses[0].Address; held["b1"] == held["a1"] || b1.PreAssigned || !b1.MAC.IsZero() {
		t.Errorf("b1: %+v", b1)
	}
	all := listed(t, n)
	for _, id := range []string{"a1", "b1"} {
		c := all[id]
		if len(all) != 2 || c.Name != "default/web" || c.PreAssigned || c.Written || len(c.Interfaces) != 1 ||
			!slices.Equal(c.Addresses, []netip.Addr{held[id]}) {
			t.Errorf("%s: %+v", id, c)
		}
	}
	for _, id := range []string{"b1", "a1"} {
		if err := n.Client.Release(ctx, "lan", aid(id), 0); err != nil {
			t.Fatal(err)
		}
	}
	if all := listed(t, n); len(all) != 0 {
		t.Errorf("left behind: %+v", all)
	}
	// Somebody else may have the address now, and the pod starts all the same.
	attach(t, n, "lan", req("other", held["a1"].String()))
	attach(t, n, "lan", pod("c1"))
}

// TestAssignmentIsNotTakenFromARunningContainer: what a scheduler wrote for a UUID stays with the
// container that holds it, until that ends.
func TestAssignmentIsNotTakenFromARunningContainer(t *testing.T) {
	ctx := t.Context()
	n, _ := one(t, overlay("10.42.0.0/16"))
	define(t, n, "wan", overlay("10.43.0.0/16"))
	assigned := metadata.Container{UUID: "u", Network: "lan", Addresses: []netip.Addr{addr("10.42.3.9")}}
	if err := n.Client.Put(ctx, "containers", "a/u", assigned); err != nil {
		t.Fatal(err)
	}
	pod := func(id string) metadata.AttachRequest {
		r := req(id)
		r.UUID = "u"
		return r
	}
	attach(t, n, "lan", pod("a1"))
	_, err := n.Client.Attach(ctx, "lan", pod("b1"))
	wantCode(t, err, metadata.CodeHeld, "a1/eth0")
	attach(t, n, "wan", pod("b1"))
	if c := listed(t, n)["a1"]; !c.PreAssigned || len(c.Interfaces) != 1 {
		t.Errorf("%+v", c)
	}
	for _, network := range []string{"lan", "wan"} {
		for _, id := range []string{"a1", "b1"} {
			if err := n.Client.Release(ctx, network, aid(id), 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	if a := attach(t, n, "lan", pod("c1")); a.Addresses[0].Address != addr("10.42.3.9") || !a.PreAssigned {
		t.Errorf("%+v", a)
	}
	if all := listed(t, n); len(all) != 1 || !all["c1"].Written {
		t.Errorf("%+v", all)
	}
}

// TestContainersOfEarlierVersions: what their ADDs left is removed, by the host whose it is or by
// hand, and what somebody assigned stays.
func TestContainersOfEarlierVersions(t *testing.T) {
	ctx := t.Context()
	st := openStore(t, t.TempDir())
	defer st.Close()
	n := startNode(t, st, hostConfig("a", "192.0.2.1/24"))
	define(t, n, "lan", overlay("10.42.0.0/16"))
	live := attach(t, n, "lan", req("live")).Addresses[0].Address
	n.stop()
	iface := func(a netip.Addr) []metadata.ContainerInterface {
		return []metadata.ContainerInterface{{Network: "lan", IfName: "eth0", Addresses: []netip.Addr{a}}}
	}
	made, pinned := time.Date(2024, 5, 1, 0, 0, 0, 0, time.UTC), []netip.Addr{addr("10.42.3.9")}
	for _, c := range []metadata.Container{
		{ID: "ended", Host: "a", UUID: "u1", Addresses: pinned, PreAssigned: true, Created: made},
		{ID: "elsewhere", Host: "b", UUID: "u2", Addresses: pinned, PreAssigned: true, Created: made},
		{ID: "live", Host: "a", UUID: "u3", Addresses: pinned, PreAssigned: true, Created: made, Interfaces: iface(live)},
		{ID: "killed", Host: "a", UUID: "u4", Created: made, Interfaces: iface(addr("10.42.0.50"))},
		{ID: "assigned", Host: "a", UUID: "u5", Addresses: []netip.Addr{addr("10.42.3.10")}, PreAssigned: true},
		{ID: "new", Host: "a", UUID: "u6", Addresses: []netip.Addr{addr("10.42.3.11")}, Created: made},
	} {
		data, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		ch := store.Change{Key: entry.ContainerPrefix + metadata.ContainerKey(c), Value: data, Revision: store.Any}
		if _, err := store.One(ctx, st, ch); err != nil {
			t.Fatal(err)
		}
	}
	n = startNode(t, st, hostConfig("a", "192.0.2.1/24"))
	problems, err := n.Client.Problems(ctx)
	named := func(p metadata.Problem) bool { return p.Key == "containers/b/elsewhere" }
	if err != nil || !slices.ContainsFunc(problems, named) {
		t.Errorf("%v %v", problems, err)
	}
	if err := n.Client.RemoveEntry(ctx, "containers/b/elsewhere"); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		changed := n.containers.watch()
		entries, _, err := store.List(ctx, st, entry.ContainerPrefix, 0)
		if err != nil {
			t.Fatal(err)
		}
		have := map[string]metadata.Container{}
		for _, e := range entries {
			var c metadata.Container
			if err := json.Unmarshal(e.Value, &c); err != nil {
				t.Fatal(err)
			}
			have[c.ID] = c
		}
		if l := have["live"]; len(have) == 3 && !l.PreAssigned && slices.Equal(l.Addresses, []netip.Addr{live}) {
			break
		}
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatalf("not cleaned up: %+v", have)
		}
	}
	for uuid, want := range map[string]string{"u5": "10.42.3.10", "u6": "10.42.3.11"} {
		r := req("next-" + uuid)
		r.UUID = uuid
		if a := attach(t, n, "lan", r); a.Addresses[0].Address != addr(want) {
			t.Errorf("%s: %+v", uuid, a)
		}
	}
}
