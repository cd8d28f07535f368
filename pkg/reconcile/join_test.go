package reconcile

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
)

// TestBlocksForAll: of four blocks a subnet three hosts get one each, in whatever order they come,
// and nobody claims the last ones for a host that may never run a container. The subnets of a
// network are counted apart.
func TestBlocksForAll(t *testing.T) {
	v4, v6 := netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("fd42::/48")
	n := metadata.Network{Name: "overlay", Subnets: []netip.Prefix{v4, v6}, BlockSizeV4: 18, BlockSizeV6: 50}
	for _, tc := range []struct {
		name      string
		hosts     int
		v4, v6    int // blocks claimed, one a host, the rest by the first
		want      bool
		neighbour string // whose blocks these are, when not the network's
	}{
		{"nobody has one", 3, 0, 0, true, ""},
		{"two have", 3, 2, 2, true, ""},
		{"one has three", 2, 3, 0, true, ""},
		{"one has all", 2, 4, 0, false, ""},
		{"one has all of the other family", 2, 0, 4, false, ""},
		{"more hosts than blocks", 5, 0, 0, false, ""},
		{"another network's do not count", 3, 4, 4, true, "other"},
	} {
		s := &metadata.Snapshot{Networks: []metadata.Network{n}}
		for i := range tc.hosts {
			s.Hosts = append(s.Hosts, metadata.Host{Name: fmt.Sprint("h", i)})
		}
		claim := func(count int, subnet netip.Prefix) {
			a := subnet.Addr()
			for i := range count {
				b := metadata.Block{Network: "overlay", CIDR: netip.PrefixFrom(a, n.BlockSize(subnet)),
					Host: fmt.Sprint("h", i%max(1, tc.hosts-1))}
				if tc.neighbour != "" {
					b.Network = tc.neighbour
				}
				s.Blocks = append(s.Blocks, b)
				a = metadata.LastAddr(b.CIDR).Next()
			}
		}
		claim(tc.v4, v4)
		claim(tc.v6, v6)
		if got := blocksForAll(s, n); got != tc.want {
			t.Errorf("%s: %t, want %t", tc.name, got, tc.want)
		}
	}
}

// TestTurns: the first claims of many hosts are spread over a time that grows with their number,
// and each host's turn comes once. A host that comes to a cluster alone waits for nothing.
func TestTurns(t *testing.T) {
	start := time.Unix(1e9, 0)
	const hosts, slices = 1000, 10
	spread := hosts * eachFor
	var due [slices]int
	for range hosts {
		var t1 turns
		wait := t1.wait(start, "overlay", hosts)
		if wait < 0 || wait >= spread {
			t.Fatalf("%s, want less than %s", wait, spread)
		}
		due[wait*slices/spread]++
		if got := t1.wait(start.Add(wait/2), "overlay", hosts/2); got != wait-wait/2 {
			t.Fatalf("after half of %s another %s", wait, got)
		}
		if got := t1.wait(start.Add(wait), "overlay", hosts/2); got > 0 {
			t.Fatalf("its turn has come, and it waits for %s", got)
		}
	}
	for i, n := range due {
		if n < hosts/slices/2 || n > hosts/slices*2 {
			t.Errorf("%d of %d hosts come in part %d of %d", n, hosts, i, slices)
		}
	}
	var few turns
	if wait := few.wait(start, "overlay", atOnce); wait > 0 {
		t.Errorf("%d hosts wait for %s", atOnce, wait)
	}
}

// TestWithout: hosts that are away claim nothing, and another network's blocks do not count.
func TestWithout(t *testing.T) {
	s := &metadata.Snapshot{
		Hosts:  []metadata.Host{{Name: "a", Live: true}, {Name: "b", Live: true}, {Name: "c"}, {Name: "d", Live: true}},
		Blocks: []metadata.Block{{Network: "overlay", Host: "a"}, {Network: "other", Host: "b"}},
	}
	if got := without(s, metadata.Network{Name: "overlay"}); got != 2 {
		t.Errorf("%d hosts have no block yet, want 2", got)
	}
}
