// Package vxlan plans the VXLAN part of a host: for each network one device, and for each other host that
// takes part one neighbour, one forwarding entry, one nexthop, and a route for each of its blocks.
//
// A packet to 10.42.7.9 takes the route of its block to the nexthop of its host, the neighbour entry turns
// the nexthop into a MAC, and the forwarding entry turns the MAC into the host's real address. State grows
// with hosts and blocks, never with containers. Device names, MACs and nexthop ids are derived, so hosts that
// know the same facts agree without talking.
//
// Same input, same output. No clock, no kernel, no logging.
package vxlan

import (
	"fmt"
	"hash/fnv"
	"net/netip"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/mtu"
	"github.com/lariat-net/lariat/pkg/underlay"
)

// Device is the name of a network's vxlan device, as Rancher named it.
func Device(vni uint32) string { return fmt.Sprintf("%s%d", delta.VTEPPrefix, vni) }

// Alias is the ifalias of a network's device.
func Alias(network string) string { return delta.AliasPrefix + "vxlan:" + network }

// LinkLocal is the IPv6 link-local address that follows from a MAC (modified EUI-64, RFC 4291 appendix A). It is the
// nexthop of IPv6 routes: they accept no other kind of on-link gateway.
func LinkLocal(m metadata.MAC) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3],
		14: m[4], 15: m[5]})
}

// Plan returns what host self needs for all of its VXLAN networks. A host or entry that cannot be planned is
// left out and told in Problems; the rest stands. It plans from what is sane of the snapshot. A self that the
// snapshot does not list gives an empty state with that problem.
func Plan(snap *metadata.Snapshot, self string) *delta.State {
	s, snap := delta.NewState(), snap.Sane()
	me, ok := snap.Host(self)
	var networks []metadata.Network
	for _, n := range snap.Networks {
		if n.Encapsulation == metadata.EncapVXLAN {
			networks = append(networks, n)
		}
	}
	if len(networks) > 0 {
		// most of them are this planner's
		s.Routes = make(map[delta.RouteKey]delta.Route, len(snap.Blocks)+len(snap.HostRoutes))
	}
	for _, n := range networks {
		underlay.Enclose(s, me, n)
	}
	if !ok {
		s.Problemf("host %s is not in the metadata; is lariat-metadata running on it under that name?", self)
		return s
	}
	if len(networks) == 0 {
		return s
	}
	local := me.UnderlayAddr()
	if !local.IsValid() {
		s.Problemf("host %s has no underlay address; give lariat-metadata --underlay ADDRESS/LENGTH", self)
		return s
	}
	peers := findPeers(snap, me, s)
	prefixes := underlay.Prefixes(snap)
	ids := nexthopIDs{taken: make(map[uint32]struct{}, len(peers))}
	for _, n := range networks {
		planNetwork(s, snap, n, me, peers, prefixes[n.Name], &ids)
	}
	return s
}

// peer is another host as self sees it.
type peer struct {
	name   string
	addr   netip.Addr // of self's underlay family
	mac    metadata.MAC
	ll     netip.Addr
	onLink bool // on the link of self's underlay
}

func findPeers(snap *metadata.Snapshot, me metadata.Host, s *delta.State) []peer {
	found := underlay.Peers(snap, me, s)
	peers := make([]peer, 0, len(found))
	taken := make(map[metadata.MAC]metadata.Host, len(found))
	for _, p := range found {
		if other, ok := taken[p.MAC]; !ok || metadata.Senior(p.Host, other) < 0 {
			taken[p.MAC] = p.Host
		}
	}
	taken[me.MAC] = me
	for _, p := range found {
		switch {
		case p.MAC.IsZero():
			s.Problemf("host %s has no overlay MAC and is left out; restart its lariat-metadata", p.Name)
			continue
		case taken[p.MAC].Name != p.Name:
			s.Problemf("host %s has the overlay MAC %s of host %s and is left out; restart its lariat-metadata", p.Name, p.MAC,
				taken[p.MAC].Name)
			continue
		}
		peers = append(peers, peer{name: p.Name, addr: p.Addr, mac: p.MAC, ll: LinkLocal(p.MAC), onLink: p.OnLink})
	}
	return peers
}

func planNetwork(s *delta.State, snap *metadata.Snapshot, n metadata.Network, me metadata.Host, peers []peer,
	prefixes map[string][]netip.Prefix, ids *nexthopIDs) {
	dev := Device(n.VNI)
	v6 := n.HasIPv6() || me.UnderlayAddr().Is6()
	s.Links[dev] = delta.Link{Kind: delta.KindVXLAN, VNI: n.VNI, Port: n.UDPPort(), Local: me.UnderlayAddr(),
		MAC: me.MAC, MTU: mtu.Container(n, me), Alias: Alias(n.Name), NoIPv6: !v6}
	s.Sysctls["net/ipv4/ip_forward"] = "1"
	if v6 {
		s.Sysctls["net/ipv6/conf/all/forwarding"] = "1"
		s.Addrs[delta.Addr{Dev: dev, Prefix: netip.PrefixFrom(LinkLocal(me.MAC), 64)}] = struct{}{}
	}
	var src4, src6 netip.Addr
	for _, g := range snap.Gateways(n.Name, me.Name) {
		s.Addrs[delta.Addr{Dev: dev, Prefix: netip.PrefixFrom(g, g.BitLen())}] = struct{}{}
		if g.Is4() {
			src4 = g
		} else {
			src6 = g
		}
	}
	underlay.Own(s, me, prefixes[me.Name])
	for _, p := range peers {
		own := prefixes[p.name]
		if len(own) == 0 {
			continue
		}
		direct := n.DirectRouting && p.onLink
		if !direct {
			s.FDB[delta.FDB{Dev: dev, MAC: p.mac, Dst: p.addr}] = struct{}{}
		}
		var nh [2]uint32 // of IPv4 and of IPv6 gateways
		for _, prefix := range own {
			src, family := src4, 0
			if prefix.Addr().Is6() {
				src, family = src6, 1
			}
			// Over an IPv6 underlay both families go by the one link-local nexthop.
			if p.addr.Is6() {
				family = 1
			}
			if nh[family] == 0 {
				nh[family] = planNexthop(s, n.Name, dev, me, p, ids, direct, family == 1)
			}
			s.Routes[delta.To(prefix)] = delta.Route{NH: nh[family], Src: src}
		}
	}
}

// planNexthop makes the way to one peer for routes of one family. Routes share it by its id: ten thousand routes with a
// gateway each on one device are quadratic in the kernel (fib_info is hashed by device), with nexthop objects they
// are not; and a peer that changes its address changes this one object.
func planNexthop(s *delta.State, network, dev string, me metadata.Host, p peer, ids *nexthopIDs, direct,
	v6 bool) uint32 {
	id := ids.next(network, p.name, v6)
	if direct && p.addr.Is6() == v6 {
		s.Nexthops[id] = delta.Nexthop{Via: p.addr, Dev: me.Underlay[0].Device}
		return id
	}
	if direct { // the other family has no gateway on the underlay that we know of: it takes the tunnel
		s.FDB[delta.FDB{Dev: dev, MAC: p.mac, Dst: p.addr}] = struct{}{}
	}
	via := p.addr
	if v6 {
		via = p.ll
	}
	s.Neighs[delta.Neigh{Dev: dev, Addr: via}] = p.mac
	s.Nexthops[id] = delta.Nexthop{Via: via, Dev: dev, Onlink: true}
	return id
}

// nexthopIDs hands out ids in the range 0x4c000000 to 0x4cffffff (0x4c is 76), from a hash of whom they lead
// to. Two that fall together are told apart by the order of the hosts' names, which all passes see alike.
type nexthopIDs struct{ taken map[uint32]struct{} }

func (n *nexthopIDs) next(network, host string, v6 bool) uint32 {
	h := fnv.New32a()
	h.Write([]byte(network))
	h.Write([]byte{0, map[bool]byte{false: 4, true: 6}[v6]})
	h.Write([]byte(host))
	for i := h.Sum32(); ; i++ {
		id := delta.Protocol<<24 | i&0xffffff
		if _, used := n.taken[id]; !used {
			n.taken[id] = struct{}{}
			return id
		}
	}
}
