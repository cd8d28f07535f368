// Package ipsec plans the encrypted networks of a host: for each network a device that holds the host's own
// address, for each other host that takes part one XFRM interface and one route per block, the tunnels that
// IKE has to keep, and the rules which make that no packet of a container ever travels in clear.
//
// A packet to 10.42.7.9 takes the route of its block to the XFRM interface of its host. The interface has a
// number, the if_id, and a packet leaves by it only as ESP under a policy of the same number; without such a
// policy, or a key for it, it is dropped. Selectors are the network's subnets on both sides, so blocks come
// and go without a word to the other host.
//
// Same input, same output. No clock, no kernel, no logging, no secrets.
package ipsec

import (
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"
	"strings"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/mtu"
	"github.com/lariat-net/lariat/pkg/underlay"
)

// ClearOut is the nftables chain that keeps clear packets of the overlay off the wire. pkg/guard keeps those
// of others out.
const ClearOut = "clear-out"

// Owned reports whether an if_id is of the range from which Lariat takes them, 0x4c000000 to 0x4cffffff (0x4c
// is 76, as with its routes). SAs and policies under such an if_id are Lariat's.
func Owned(ifID uint32) bool { return ifID>>24 == delta.Protocol }

// Device is the XFRM interface of an if_id.
func Device(ifID uint32) string { return fmt.Sprintf("%s%06x", delta.TunnelPrefix, ifID&0xffffff) }

// GatewayDevice is the device that carries a host's own addresses on a network. It is an XFRM interface whose
// if_id has neither policies nor keys: what is sent to it goes nowhere.
func GatewayDevice(network string) string { return Device(gatewayID(network)) }

// Alias is the ifalias of a network's device: of the tunnel to a peer, or, with no peer, of the home device.
func Alias(network, peer string) string {
	if peer == "" {
		return delta.AliasPrefix + "ipsec:" + network
	}
	return delta.AliasPrefix + "ipsec:" + network + ":" + peer
}

// Plan returns what the kernel of host self needs for all of its encrypted networks, but for the SAs and
// policies, which are IKE's. A host or entry that cannot be planned is left out and told in Problems; the
// rest stands. It plans from what is sane of the snapshot.
func Plan(snap *metadata.Snapshot, self string) *delta.State {
	s, snap := delta.NewState(), snap.Sane()
	me, _ := snap.Host(self)
	var all []metadata.Network
	for _, n := range snap.Networks {
		if n.Encapsulation == metadata.EncapIPsec {
			all = append(all, n)
			underlay.Enclose(s, me, n)
		}
	}
	if len(all) == 0 {
		return s
	}
	// Of every network, those too that cannot be planned, and on a host that nothing can be planned for: there
	// may be containers.
	block(s, all)
	if l, ok := layOut(snap, self, s); ok {
		prefixes := underlay.Prefixes(snap)
		for _, n := range l.networks {
			l.network(s, snap, n, prefixes[n.Name])
		}
	}
	return s
}

// layout is what the kernel's part and IKE's part of the plan have in common.
type layout struct {
	me       metadata.Host
	networks []metadata.Network
	peers    []underlay.Peer
	ids      map[[2]string]uint32 // network and peer to if_id
}

// layOut is not ok when there is nothing to plan.
func layOut(snap *metadata.Snapshot, self string, s *delta.State) (*layout, bool) {
	l := &layout{ids: map[[2]string]uint32{}}
	taken := map[uint32]string{}
	var found []metadata.Network
	for _, n := range snap.Networks {
		if n.Encapsulation == metadata.EncapIPsec {
			found = append(found, n)
		}
	}
	slices.SortFunc(found, func(a, b metadata.Network) int { return strings.Compare(a.Name, b.Name) })
	for _, n := range found {
		id := gatewayID(n.Name)
		if other, used := taken[id]; used {
			s.Problemf("network %s hashes to the same interface as network %s and is left out; give it another name", n.Name,
				other)
			continue
		}
		taken[id] = n.Name
		l.networks = append(l.networks, n)
	}
	if len(l.networks) == 0 {
		return nil, false
	}
	var ok bool
	if l.me, ok = snap.Host(self); !ok {
		s.Problemf("host %s is not in the metadata; is lariat-metadata running on it under that name?", self)
		return nil, false
	}
	if !l.me.UnderlayAddr().IsValid() {
		s.Problemf("host %s has no underlay address; give lariat-metadata --underlay ADDRESS/LENGTH", self)
		return nil, false
	}
	l.peers = underlay.Peers(snap, l.me, s)
	slices.SortFunc(l.peers, func(a, b underlay.Peer) int { return strings.Compare(a.Name, b.Name) })
	for _, n := range l.networks {
		for _, p := range l.peers {
			// Two that fall together are told apart by the order of their names. The number means something on this host alone.
			id := hashID(n.Name, p.Name)
			for taken[id] != "" {
				id = delta.Protocol<<24 | (id+1)&0xffffff
			}
			taken[id] = n.Name
			l.ids[[2]string{n.Name, p.Name}] = id
		}
	}
	return l, true
}

func gatewayID(network string) uint32 { return hashID(network, "") }

func hashID(network, peer string) uint32 {
	h := fnv.New64a()
	h.Write([]byte(network))
	h.Write([]byte{0})
	h.Write([]byte(peer))
	sum := h.Sum64()
	return delta.Protocol<<24 | uint32(sum^sum>>24^sum>>48)&0xffffff // FNV is folded, not cut, to fewer bits
}

func (l *layout) network(s *delta.State, snap *metadata.Snapshot, n metadata.Network,
	prefixes map[string][]netip.Prefix) {
	link := func(id uint32, peer string) string {
		dev := Device(id)
		s.Links[dev] = delta.Link{Kind: delta.KindXFRM, IfID: id, Group: delta.OverlayLinkGroup, MTU: mtu.Container(n, l.me),
			Alias: Alias(n.Name, peer), NoIPv6: !n.HasIPv6()}
		return dev
	}
	home := link(gatewayID(n.Name), "")
	s.Sysctls["net/ipv4/ip_forward"] = "1"
	if n.HasIPv6() {
		s.Sysctls["net/ipv6/conf/all/forwarding"] = "1"
	}
	var src4, src6 netip.Addr
	for _, g := range snap.Gateways(n.Name, l.me.Name) {
		s.Addrs[delta.Addr{Dev: home, Prefix: netip.PrefixFrom(g, g.BitLen())}] = struct{}{}
		if g.Is4() {
			src4 = g
		} else {
			src6 = g
		}
	}
	underlay.Own(s, l.me, prefixes[l.me.Name])
	for _, p := range l.peers {
		dev := link(l.ids[[2]string{n.Name, p.Name}], p.Name)
		for _, prefix := range prefixes[p.Name] {
			src := src4
			if prefix.Addr().Is6() {
				src = src6
			}
			s.Routes[delta.To(prefix)] = delta.Route{Dev: dev, Src: src}
		}
	}
}

// block keeps the overlay's addresses inside: a packet to one leaves this host by a container's port or by a
// tunnel, or it is dropped. The rules know no peers, so they stand, unchanged, whatever happens to those.
func block(s *delta.State, networks []metadata.Network) {
	var subnets []netip.Prefix
	for _, n := range networks {
		subnets = append(subnets, n.Subnets...)
	}
	slices.SortFunc(subnets, netip.Prefix.Compare)
	out := delta.Chain{Type: "filter", Hook: "postrouting", Priority: -300}
	// What costs is ESP on the wire: there every packet comes alone, while those of a stream pass the
	// containers' ports and the tunnels' interfaces by the dozen. So the address is first, which lets ESP go
	// after one comparison for each rule, and there is no rule more than needed (make bench/guest).
	for _, p := range subnets {
		// A packet passes here twice: on its way into the tunnel's interface, and on its way to the wire with the
		// transformation ahead of it.
		out.Rules = append(out.Rules,
			delta.Rule{delta.InPrefix{Field: "daddr", Prefix: p}, delta.OifGroup{Group: delta.OverlayLinkGroup, Not: true},
				delta.NotRouteIPsec{}, delta.Oif{Name: "lo", Not: true}, delta.Verdict("drop")})
	}
	s.Chains[ClearOut] = out
}
