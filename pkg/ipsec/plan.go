// Package ipsec plans the encrypted networks of a host.
// Each network has one device with the host's own address.
// Each peer has one XFRM interface, and one route per block.
// Package ipsec also plans the tunnels of IKE.
// Its rules ensure that no packet of a container leaves unencrypted.
//
// A packet to 10.42.7.9 takes the route of its block to the XFRM interface of its host.
// The interface has a number, the if_id.
// A packet leaves by the interface only as ESP under a policy of the same number.
// Without such a policy or its key, the kernel drops the packet.
// Selectors are the network's subnets on both sides.
// Therefore hosts claim and release blocks without a change of the tunnels.
//
// The package is pure: it uses no clock, no kernel, no log and no secrets.
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

// ClearOut is the nftables chain that drops outgoing unencrypted packets of the overlay.
// Package guard drops incoming unencrypted packets.
const ClearOut = "clear-out"

// Owned reports whether an if_id is in Lariat's range, 0x4c000000 to 0x4cffffff.
// 0x4c is 76, as for Lariat's routes. SAs and policies with such an if_id are Lariat's.
func Owned(ifID uint32) bool { return ifID>>24 == delta.Protocol }

// Device returns the name of the XFRM interface of an if_id.
func Device(ifID uint32) string { return fmt.Sprintf("%s%06x", delta.TunnelPrefix, ifID&0xffffff) }

// GatewayDevice returns the name of the device with a host's own addresses on a network.
// The device is an XFRM interface whose if_id has no policies and no keys.
// Therefore the kernel drops packets that leave by it.
func GatewayDevice(network string) string { return Device(gatewayID(network)) }

// Alias returns the ifalias of the tunnel to a peer, or of the gateway device without a peer.
func Alias(network, peer string) string {
	if peer == "" {
		return delta.AliasPrefix + "ipsec:" + network
	}
	return delta.AliasPrefix + "ipsec:" + network + ":" + peer
}

// Plan returns the desired state of host self for all encrypted networks.
// The state holds no SAs and policies, because the IKE daemon creates them.
// Plan leaves out a host or entry that cannot be planned, and names it in Problems.
// It plans from the sane entries of the snapshot.
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
	// Block for every network, even when the network or this host cannot be planned.
	// There may be containers.
	block(s, all)
	if l, ok := layOut(snap, self, s); ok {
		prefixes := underlay.Prefixes(snap)
		for _, n := range l.networks {
			l.network(s, snap, n, prefixes[n.Name])
		}
	}
	return s
}

// layout keeps the common input of the kernel's part and IKE's part of the plan.
type layout struct {
	me       metadata.Host
	networks []metadata.Network
	peers    []underlay.Peer
	ids      map[[2]string]uint32 // network and peer to if_id
}

// layOut returns the layout of host self. It returns false when there is nothing to plan.
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
			// The order of the names resolves collisions. Only this host uses the number.
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

// block plans the rules that keep packets to the overlay's addresses on the overlay.
// Such a packet leaves this host by a host end or by a tunnel. Otherwise the rules drop it.
// The rules name no peers, so a change of a peer changes no rule.
func block(s *delta.State, networks []metadata.Network) {
	var subnets []netip.Prefix
	for _, n := range networks {
		subnets = append(subnets, n.Subnets...)
	}
	slices.SortFunc(subnets, netip.Prefix.Compare)
	out := delta.Chain{Type: "filter", Hook: "postrouting", Priority: -300}
	// ESP on the wire costs most, because each ESP packet passes alone.
	// Packets of a stream pass host ends and tunnel interfaces in batches of a dozen.
	// Therefore the address is the first match: ESP needs one comparison for each rule.
	// For the same reason there are no further rules (make bench/guest).
	for _, p := range subnets {
		// A packet passes this chain twice.
		// The first time is before the tunnel interface.
		// The second time is on the way to the wire, before the transformation.
		out.Rules = append(out.Rules,
			delta.Rule{delta.InPrefix{Field: "daddr", Prefix: p}, delta.OifGroup{Group: delta.OverlayLinkGroup, Not: true},
				delta.NotRouteIPsec{}, delta.Oif{Name: "lo", Not: true}, delta.Verdict("drop")})
	}
	s.Chains[ClearOut] = out
}
