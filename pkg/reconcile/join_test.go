package reconcile

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/lariat-net/lariat/pkg/metadata"
)

// TestBlocksForAll: of four blocks a subnet three hosts get one each, in whatever order they come, and nobody claims the last ones
// for a host that may never run a container. The subnets of a network are counted apart.
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
				b := metadata.Block{Network: "overlay", CIDR: netip.PrefixFrom(a, n.BlockSize(subnet)), Host: fmt.Sprint("h", i%max(1, tc.hosts-1))}
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
