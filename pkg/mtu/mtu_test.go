package mtu_test

import (
	"net/netip"
	"testing"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/mtu"
)

func TestF8_MTU(t *testing.T) {
	host := func(address string, n int) metadata.Host {
		return metadata.Host{Underlay: []metadata.Underlay{{Address: netip.MustParsePrefix(address), MTU: n}}}
	}
	v4, v6 := "192.0.2.1/24", "2001:db8::1/64"
	for _, tc := range []struct {
		name      string
		encap     string
		set       int // the network's MTU
		h         metadata.Host
		container int
		overhead  int
	}{
		{"vxlan over IPv4", metadata.EncapVXLAN, 0, host(v4, 1500), 1450, 50},
		{"vxlan over IPv6", metadata.EncapVXLAN, 0, host(v6, 1500), 1430, 70},
		{"jumbo frames", metadata.EncapVXLAN, 0, host(v4, 9000), 8950, 50},
		{"a narrow underlay", metadata.EncapVXLAN, 0, host(v4, 1400), 1350, 50},
		{"an underlay that does not tell", metadata.EncapVXLAN, 0, host(v4, 0), 1450, 50},
		{"a host without an underlay", metadata.EncapVXLAN, 0, metadata.Host{}, 1450, 50},
		{"a network that says it", metadata.EncapVXLAN, 1400, host(v4, 1500), 1400, 50},
		{"a network that says more than fits: it is the operator's word", metadata.EncapVXLAN, 9000, host(v4, 1500), 9000,
			50},
		{"a flat network", metadata.EncapNone, 0, host(v4, 1500), 1500, 0},
		{"a flat network over IPv6", metadata.EncapNone, 0, host(v6, 9000), 9000, 0},
	} {
		n := metadata.Network{Encapsulation: tc.encap, MTU: tc.set}
		if got := mtu.Container(n, tc.h); got != tc.container {
			t.Errorf("%s: %d, want %d", tc.name, got, tc.container)
		}
		if got := mtu.Overhead(n, tc.h); got != tc.overhead {
			t.Errorf("%s: overhead %d, want %d", tc.name, got, tc.overhead)
		}
	}
	two := host(v4, 1500)
	two.Underlay = append(two.Underlay, host(v6, 1280).Underlay...)
	if mtu.Underlay(two) != 1500 {
		t.Error("the first underlay address carries the tunnels, so its MTU counts")
	}
}
