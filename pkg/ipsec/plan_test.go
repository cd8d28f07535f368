package ipsec_test

import (
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/ipsec"
	"github.com/lariat-net/lariat/pkg/metadata"
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

func text(snap *metadata.Snapshot, o ipsec.Options) string {
	var b strings.Builder
	b.WriteString(ipsec.Plan(snap, snap.Self).String())
	for _, t := range ipsec.Tunnels(snap, snap.Self, o) {
		b.WriteString(t.String())
	}
	return b.String()
}

// TestF36_F38_PlanGolden checks the plan of each small cluster against its golden file.
// The plan has the kernel's part and IKE's part.
func TestF36_F38_PlanGolden(t *testing.T) {
	files, _ := filepath.Glob("testdata/*.json")
	for _, f := range files {
		name := strings.TrimSuffix(filepath.Base(f), ".json")
		t.Run(name, func(t *testing.T) {
			o := ipsec.Options{Keys: []string{"old1"}}
			switch name {
			case "rotation":
				o.Keys = []string{"new1", "old1"}
			case "with-vxlan":
				o = ipsec.Options{Auth: ipsec.AuthPubkey, Encap: true}
			case "one-block":
				o.NoGCM = true
			}
			got := text(load(t, f), o)
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

// TestPlanIsPure checks that the plan does not depend on the order of the metadata.
func TestPlanIsPure(t *testing.T) {
	snap := load(t, "testdata/three.json")
	want := text(snap, ipsec.Options{})
	for range 20 {
		shuffle(snap.Blocks)
		shuffle(snap.HostRoutes)
		shuffle(snap.Hosts)
		if got := text(snap, ipsec.Options{}); got != want {
			t.Fatalf("the plan depends on the order:\n%s", got)
		}
	}
}

func shuffle[T any](list []T) {
	rand.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
}

// cluster returns a snapshot of n hosts with one block each.
func cluster(n int) *metadata.Snapshot {
	s := &metadata.Snapshot{Self: "h0",
		Networks: []metadata.Network{{Name: "overlay", Encapsulation: metadata.EncapIPsec,
			Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}}}
	for i := range n {
		name := fmt.Sprint("h", i)
		s.Hosts = append(s.Hosts, metadata.Host{Name: name,
			Underlay: []metadata.Underlay{{Address: netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 16, byte(i >> 8), byte(i)}),
				12), Device: "eth0", MTU: 1500}}})
		s.Blocks = append(s.Blocks, metadata.Block{Network: "overlay", Host: name,
			CIDR: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 26)})
	}
	return s
}

// TestInterfacesOfMany checks that every peer has its own interface and its own if_id in Lariat's
// range. With ten thousand peers some hashes collide.
func TestInterfacesOfMany(t *testing.T) {
	snap := cluster(10_000)
	s := ipsec.Plan(snap, "h0")
	tunnels := ipsec.Tunnels(snap, "h0", ipsec.Options{})
	if len(s.Links) != 10_000 || len(tunnels) != 9_999 || len(s.Problems) > 0 {
		t.Fatalf("%d devices, %d tunnels, %v", len(s.Links), len(tunnels), s.Problems)
	}
	shifted := 0
	for _, x := range tunnels {
		id := x.Children[0].IfID
		l, ok := s.Links[ipsec.Device(id)]
		if !ok || l.IfID != id || !ipsec.Owned(id) || l.Alias != ipsec.Alias("overlay", x.Peer) {
			t.Fatalf("%s: if_id %#x, device %+v", x.Peer, id, l)
		}
		alone := cluster(0)
		alone.Hosts = []metadata.Host{snap.Hosts[0],
			{Name: x.Peer, Underlay: []metadata.Underlay{{Address: netip.MustParsePrefix("172.31.0.1/12")}}}}
		if ipsec.Tunnels(alone, "h0", ipsec.Options{})[0].Children[0].IfID != id {
			shifted++
		}
	}
	if shifted == 0 || shifted > 50 {
		t.Errorf("%d interfaces had to make way; by chance it would be about 3", shifted)
	}
}

// TestF37_F144_RulesKnowNoPeers checks that one host and many hosts have the same blocking rules.
// Therefore a change of a peer changes no rule.
func TestF37_F144_RulesKnowNoPeers(t *testing.T) {
	few, many := ipsec.Plan(cluster(1), "h0"), ipsec.Plan(cluster(50), "h0")
	for _, chain := range []string{ipsec.ClearOut} {
		if len(few.Chains[chain].Rules) == 0 || !few.Chains[chain].Equal(many.Chains[chain]) {
			t.Errorf("%s: %v and %v", chain, few.Chains[chain], many.Chains[chain])
		}
	}
	if d := delta.Between(many, few); d.Chains.Len()+d.Sets.Len() != 0 {
		t.Errorf("49 peers more change the rules:\n%s", d)
	}
}

// TestF43_KeyThatBothHave checks that a pair's first key is one that the peer has announced.
// All keys are accepted.
func TestF43_KeyThatBothHave(t *testing.T) {
	for _, tc := range []struct {
		mine, peers, want string
	}{
		{"old", "old", "old"},
		{"new old", "old", "old new"},
		{"new old", "new old", "new old"},
		{"new old", "old new", "new old"}, // each side sends its preferred key; both accept both
		{"new", "old", "new"},
		{"new old", "", "new old"}, // the peer has announced no keys yet
		{"c b a", "a b", "b a c"},
	} {
		snap := cluster(2)
		snap.Hosts[1].IKEKeys = strings.Fields(tc.peers)
		got := ipsec.Tunnels(snap, "h0", ipsec.Options{Keys: strings.Fields(tc.mine)})[0].Keys
		if !slices.Equal(got, strings.Fields(tc.want)) {
			t.Errorf("mine %s, peer's %s: %v, want %s", tc.mine, tc.peers, got, tc.want)
		}
	}
}

// TestF37_FailsClosed checks that blocking rules remain where there may be containers.
// The metadata does not list the host, or the host has no underlay address.
// Or a network hashes to the same interface as another network.
func TestF37_FailsClosed(t *testing.T) {
	blocked := func(what string, s *delta.State, subnets ...string) {
		t.Helper()
		for _, subnet := range subnets {
			p := netip.MustParsePrefix(subnet)
			if s.Routes[delta.RouteKey{Dst: p, Metric: delta.LastMetric}].Type != "unreachable" {
				t.Errorf("%s: no unreachable route for %s", what, subnet)
			}
			text := s.String()
			if !strings.Contains(text, "clear-out") || !strings.Contains(text, subnet) {
				t.Errorf("%s: rules for %s are missing:\n%s", what, subnet, text)
			}
		}
	}
	gone := cluster(3)
	gone.Hosts = gone.Hosts[1:]
	blocked("removed", ipsec.Plan(gone, "h0"), "10.0.0.0/8")
	bare := cluster(3)
	bare.Hosts[0].Underlay = nil
	blocked("without an underlay", ipsec.Plan(bare, "h0"), "10.0.0.0/8")
	twins := cluster(2)
	twins.Networks = []metadata.Network{{Name: "net4225", Encapsulation: metadata.EncapIPsec,
		Subnets: []netip.Prefix{netip.MustParsePrefix("10.50.0.0/16")}},
		{Name: "net3917", Encapsulation: metadata.EncapIPsec, Subnets: []netip.Prefix{netip.MustParsePrefix("10.60.0.0/16")}}}
	s := ipsec.Plan(twins, "h0")
	if len(s.Problems) != 1 {
		t.Errorf("the two do not hash to the same interface any more: %v", s.Problems)
	}
	blocked("same interface", s, "10.50.0.0/16", "10.60.0.0/16")
}
