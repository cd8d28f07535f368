// Package underlay describes the cluster's hosts from the view of one host.
// It finds the address and the prefixes of each peer.
//
// All encapsulations plan from this view. The package is pure: it uses no kernel and no clock.
package underlay

import (
	"net/netip"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// A Peer is another, reachable host.
type Peer struct {
	metadata.Host
	Addr   netip.Addr // of the family of the viewer's own underlay address
	OnLink bool       // on the link of the viewer's underlay
}

// Peers returns the other hosts from the view of me, in the snapshot's order.
// It leaves out unreachable hosts, and hosts that claim the address of a senior host.
// The state's Problems name these hosts. me must have an underlay address, and keeps it.
func Peers(snap *metadata.Snapshot, me metadata.Host, s *delta.State) []Peer {
	local := me.UnderlayAddr()
	link := me.Underlay[0].Address.Masked()
	peers := make([]Peer, 0, len(snap.Hosts))
	taken := make(map[netip.Addr]metadata.Host, len(snap.Hosts))
	for _, h := range snap.Hosts {
		addr := address(h, local)
		if other, ok := taken[addr]; !ok || metadata.Senior(h, other) < 0 {
			taken[addr] = h
		}
	}
	taken[local] = me
	for _, h := range snap.Hosts {
		if h.Name == me.Name {
			continue
		}
		addr := address(h, local)
		family := "IPv6"
		if local.Is4() {
			family = "IPv4"
		}
		switch {
		case !addr.IsValid():
			s.Problemf("host %s has no %s underlay address and cannot be reached from %s; give its lariat-metadata one "+
				"with --underlay", h.Name, family, me.Name)
			continue
		case taken[addr].Name != h.Name:
			s.Problemf("host %s has the underlay address %s of host %s and is left out; remove the one that is gone: "+
				"lariat host remove", h.Name, addr, taken[addr].Name)
			continue
		}
		peers = append(peers, Peer{Host: h, Addr: addr, OnLink: link.Contains(addr)})
	}
	return peers
}

// address returns a host's first underlay address of the family of local.
// It returns the zero Addr when there is none.
func address(h metadata.Host, local netip.Addr) netip.Addr {
	for _, u := range h.Underlay {
		if a := u.Address.Addr(); a.Is4() == local.Is4() {
			return a
		}
	}
	return netip.Addr{}
}

// Enclose plans unreachable routes that keep a network's packets on the overlay.
// The host refuses packets to an address of the network that no block holds.
// Otherwise such packets would follow the default route with containers' own source addresses.
// The routes have the last metric.
// Therefore they neither replace nor override a foreign route to the same prefix.
// Lariat's routes to the blocks are more specific.
// Enclose plans no route when a link of the host has some of the addresses.
func Enclose(s *delta.State, me metadata.Host, n metadata.Network) {
	for _, p := range n.Subnets {
		if len(me.On(p)) > 0 {
			continue
		}
		s.Routes[delta.RouteKey{Dst: p, Metric: delta.LastMetric}] = delta.Route{Type: "unreachable"}
	}
}

// Own plans a blackhole route for each of the host's blocks.
// It skips a block when a link of the host has addresses of the block.
// The route drops packets to addresses of the block that no container has.
func Own(s *delta.State, me metadata.Host, prefixes []netip.Prefix) {
	for _, p := range prefixes {
		if !p.IsSingleIP() && len(me.On(p)) == 0 {
			s.Routes[delta.To(p)] = delta.Route{Type: "blackhole"}
		}
	}
}

// Prefixes maps each network and each host to the host's prefixes.
// The prefixes are the host's blocks and its host routes.
func Prefixes(snap *metadata.Snapshot) map[string]map[string][]netip.Prefix {
	out := map[string]map[string][]netip.Prefix{}
	add := func(network, host string, p netip.Prefix) {
		hosts := out[network]
		if hosts == nil {
			hosts = make(map[string][]netip.Prefix, len(snap.Hosts))
			out[network] = hosts
		}
		hosts[host] = append(hosts[host], p)
	}
	for _, b := range snap.Blocks {
		add(b.Network, b.Host, b.CIDR)
	}
	for _, e := range snap.HostRoutes {
		add(e.Network, e.Host, netip.PrefixFrom(e.Address, e.Address.BitLen()))
	}
	return out
}
