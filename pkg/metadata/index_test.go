package metadata

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestAllGateways: one look at all blocks gives what a look for each host and network does.
func TestAllGateways(t *testing.T) {
	var s Snapshot
	r := rand.New(rand.NewPCG(1, 2))
	for i := range 300 {
		cidr := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(i), 0}), 24)
		if i%3 == 0 {
			cidr = netip.MustParsePrefix(fmt.Sprintf("fd42:0:0:%x::/64", i))
		}
		b := Block{Network: fmt.Sprint("net", r.IntN(5)), Host: fmt.Sprint("host", r.IntN(20)), CIDR: cidr}
		if i%4 != 0 {
			b.Gateway = cidr.Addr().Next()
		}
		s.Blocks = append(s.Blocks, b)
	}
	all := s.AllGateways()
	for n := range 6 {
		for h := range 21 {
			network, host := fmt.Sprint("net", n), fmt.Sprint("host", h)
			if got, want := all[host][network], s.Gateways(network, host); !slices.Equal(got, want) {
				t.Errorf("%s on %s: %v, want %v", host, network, got, want)
			}
		}
	}
}

// TestHostsApartFromNetworks: which of a host and a network that hold one address is kept does not
// depend on how they are looked up.
func TestHostsApartFromNetworks(t *testing.T) {
	at := func(s int) time.Time { return time.Unix(int64(1e9+s), 0) }
	network := func(name, subnet string, created int) Network {
		return Network{Name: name, Subnets: []netip.Prefix{netip.MustParsePrefix(subnet)}, Encapsulation: EncapVXLAN,
			Created: at(created)}
	}
	host := func(name string, joined int, addrs ...string) Host {
		h := Host{Name: name, Joined: at(joined)}
		for _, a := range addrs {
			h.Underlay = append(h.Underlay, Underlay{Address: netip.MustParsePrefix(a)})
		}
		return h
	}
	flat := network("flat", "192.168.0.0/16", 0)
	flat.Encapsulation = EncapNone
	hosts := []Host{host("a", 5, "192.0.2.1/24", "10.1.0.1/24", "10.2.0.1/24"), host("b", 5, "10.3.255.255/8"),
		host("c", 5, "192.168.0.1/24"),
		host("d", 5, "fd42::1/64"), host("e", 15, "10.1.7.7/24")}
	networks := []Network{network("old", "10.1.0.0/16", 1), network("new", "10.2.0.0/16", 9),
		network("six", "fd42::/48", 9), flat, network("far", "10.4.0.0/16", 9)}
	keptHosts, keptNetworks, problems := apart(hosts, networks)
	var got []string
	for _, h := range keptHosts {
		got = append(got, h.Name)
	}
	for _, n := range keptNetworks {
		got = append(got, n.Name)
	}
	for _, p := range problems {
		got = append(got, p.String())
	}
	want := []string{"b", "c", "d", "old", "flat", "far",
		"entry networks/new is left out: host a has the address 10.2.0.1 of it on its underlay",
		"entry networks/six is left out: host d has the address fd42::1 of it on its underlay",
		"entry hosts/a is left out: its underlay address 10.1.0.1 is one of network old, which was first",
		"entry hosts/e is left out: its underlay address 10.1.7.7 is one of network old, which was first"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}
