// Package underlay sees the cluster's hosts as one of them does: by which address each can be reached, and
// what lies behind it.
//
// Every encapsulation plans from this. Pure: no kernel, no clock.
package underlay

import (
	"net/netip"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// Peer is another host that can be reached.
type Peer struct {
	metadata.Host
	Addr   netip.Addr // of the family of the viewer's own underlay address
	OnLink bool       // on the link of the viewer's underlay
}

// Peers are the other hosts as me sees them, in the snapshot's order. One that cannot be reached, or claims
// an address that a senior one has, is left out and told in the state's Problems. me must have an underlay
// address, and keeps it.
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

// address is a host's first underlay address of the family of local; the zero Addr when it has none.
func address(h metadata.Host, local netip.Addr) netip.Addr {
	for _, u := range h.Underlay {
		if a := u.Address.Addr(); a.Is4() == local.Is4() {
			return a
		}
	}
	return netip.Addr{}
}

// Enclose keeps a network's packets on the overlay: what goes to an address of it that no block holds is refused,
// and does not follow the default route, from containers under their own addresses. The routes have the last
// metric, so that another program's route to the same prefix is neither replaced nor overruled. Lariat's own, to
// the blocks, are more specific. A link of the host's own that has some of the addresses keeps them all.
func Enclose(s *delta.State, me metadata.Host, n metadata.Network) {
	for _, p := range n.Subnets {
		if len(me.On(p)) > 0 {
			continue
		}
		s.Routes[delta.RouteKey{Dst: p, Metric: delta.LastMetric}] = delta.Route{Type: "unreachable"}
	}
}

// Own ends what goes to an address of an own block that no container has, unless a link of the host has it.
func Own(s *delta.State, me metadata.Host, prefixes []netip.Prefix) {
	for _, p := range prefixes {
		if !p.IsSingleIP() && len(me.On(p)) == 0 {
			s.Routes[delta.To(p)] = delta.Route{Type: "blackhole"}
		}
	}
}

// Prefixes is network to host to prefixes: the host's blocks, and the endpoints that none of its blocks cover.
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
