package vxlan_test

import (
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/vxlan"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func load(t testing.TB, path string) *metadata.Snapshot {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var s metadata.Snapshot
	if err := json.Unmarshal(data, &s); err != nil {
		t.Fatal(err)
	}
	return &s
}

// TestF26_PlanGolden checks the plan of each small cluster against its golden file.
func TestF26_PlanGolden(t *testing.T) {
	files, _ := filepath.Glob("testdata/*.json")
	for _, f := range files {
		t.Run(strings.TrimSuffix(filepath.Base(f), ".json"), func(t *testing.T) {
			snap := load(t, f)
			got := vxlan.Plan(snap, snap.Self).String()
			golden := strings.TrimSuffix(f, ".json") + ".plan"
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("plan differs from %s (make update/golden rewrites it):\n%s", golden, got)
			}
		})
	}
}

// TestF135_PlanIsPure checks that the plan does not depend on the order of the metadata.
func TestF135_PlanIsPure(t *testing.T) {
	snap := load(t, "testdata/two-networks.json")
	want := vxlan.Plan(snap, snap.Self).String()
	for range 20 {
		shuffle(snap.Blocks)
		shuffle(snap.HostRoutes)
		if got := vxlan.Plan(snap, snap.Self).String(); got != want {
			t.Fatalf("the plan depends on the order of blocks and endpoints:\n%s", got)
		}
	}
}

func shuffle[T any](s []T) { rand.Shuffle(len(s), func(i, j int) { s[i], s[j] = s[j], s[i] }) }

func TestPlanOfUnknownHostSaysSo(t *testing.T) {
	s := vxlan.Plan(load(t, "testdata/three.json"), "nobody")
	if len(s.Links) != 0 || len(s.Problems) != 1 || !strings.Contains(s.Problems[0], "nobody") {
		t.Fatalf("want an empty state with one problem that names the host, got:\n%s", s)
	}
}

// TestF27_MovedBlockChangesOneRoute checks that a moved block replaces one route.
// Nothing is removed before the replacement.
func TestF27_MovedBlockChangesOneRoute(t *testing.T) {
	snap := load(t, "testdata/three.json")
	before := vxlan.Plan(snap, "a")
	for i := range snap.Blocks {
		if snap.Blocks[i].CIDR == netip.MustParsePrefix("10.42.0.192/26") {
			snap.Blocks[i].Host = "c"
		}
	}
	d := delta.Between(vxlan.Plan(snap, "a"), before)
	if len(d.Routes.Set) != 1 || d.Routes.Set[0].Key.Dst.String() != "10.42.0.192/26" || len(d.Routes.Remove) != 0 ||
		d.Len() != 1 {
		t.Fatalf("want one route replaced, got:\n%s", d)
	}
}

// TestF28_HostAddressChange checks that a peer's new underlay address changes its nexthop in place.
// No route changes.
func TestF28_HostAddressChange(t *testing.T) {
	d := delta.Between(vxlan.Plan(load(t, "testdata/moved-peer.json"), "a"),
		vxlan.Plan(load(t, "testdata/three.json"), "a"))
	if len(d.Routes.Set)+len(d.Routes.Remove) != 0 {
		t.Errorf("routes are touched:\n%s", d)
	}
	if len(d.FDB.Set) != 1 || d.FDB.Set[0].Key.Dst.String() != "192.0.2.9" || len(d.FDB.Remove) != 1 ||
		len(d.Nexthops.Set) != 1 || !d.Nexthops.Set[0].Replaces {
		t.Errorf("want one forwarding entry added, one removed, and the nexthop replaced, got:\n%s", d)
	}
}

// TestF25_DeterministicMAC checks that device names and MACs derive from the metadata alone.
// The size of the subnet does not matter. No two hosts share a MAC.
func TestF25_DeterministicMAC(t *testing.T) {
	snap := cluster(300)
	seen := map[delta.MAC]string{}
	for _, h := range snap.Hosts {
		first, again := vxlan.Plan(snap, h.Name), vxlan.Plan(snap, h.Name)
		mac := first.Links["vtep1042"].MAC
		if mac != again.Links["vtep1042"].MAC {
			t.Fatalf("host %s: MAC changes between two plans", h.Name)
		}
		if other := seen[mac]; other != "" {
			t.Fatalf("hosts %s and %s share the MAC %s", h.Name, other, mac)
		}
		seen[mac] = h.Name
	}
	for f := range vxlan.Plan(snap, "h0").FDB {
		if seen[f.MAC] == "" {
			t.Fatalf("forwarding entry for the MAC %s, which no host has", f.MAC)
		}
	}
}

func TestNexthopIDsAreUniqueAndOurs(t *testing.T) {
	s := vxlan.Plan(cluster(20000), "h0")
	if len(s.Nexthops) != 19999 {
		t.Fatalf("want a nexthop for each of 19999 peers, got %d: two fell together", len(s.Nexthops))
	}
	for id := range s.Nexthops {
		if id>>24 != delta.Protocol {
			t.Fatalf("nexthop id %#x is outside of our range", id)
		}
	}
}

// cluster returns a snapshot of n hosts with one block each.
func cluster(n int) *metadata.Snapshot {
	s := &metadata.Snapshot{Networks: []metadata.Network{{Name: "overlay",
		Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, Encapsulation: metadata.EncapVXLAN, VNI: 1042}}}
	for i := range n {
		u := netip.AddrFrom4([4]byte{172, byte(16 + i>>16), byte(i >> 8), byte(i)})
		b := u.As4()
		base := netip.AddrFrom4([4]byte{10, byte(i >> 10), byte(i >> 2), byte(i << 6)})
		name := fmt.Sprintf("h%d", i)
		s.Hosts = append(s.Hosts, metadata.Host{Name: name, MAC: metadata.MAC{0x0e, 0, b[0], b[1], b[2], b[3]},
			Underlay: []metadata.Underlay{{Address: netip.PrefixFrom(u, 12), Device: "eth0", MTU: 1500}}})
		s.Blocks = append(s.Blocks, metadata.Block{Network: "overlay", CIDR: netip.PrefixFrom(base, 26), Host: name,
			Gateway: base.Next()})
	}
	return s
}

func BenchmarkPlan(b *testing.B) {
	for _, n := range []int{1000, 10000} {
		snap := cluster(n)
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			for b.Loop() {
				vxlan.Plan(snap, "h0")
			}
		})
	}
}
