// Package guard plans the nftables rules that separate containers, networks and the underlay.
// docs/security.md describes the promise of each rule.
//
//	prerouting  guard      from-port: the packets that a container may send
//	                       tunnel packets to this host: untracked, so that no NAT diverts them
//	                       overlay addresses: only from endpoints and tunnels
//	forward     isolation  packets from one network to another
//	output      untracked  this host's own tunnel packets
//
// Every packet to this host or through this host traverses guard once.
// Therefore the most frequent packets leave guard first.
// These are VXLAN packets on the wire, then their inner packets, then packets of containers.
// Rules name networks, and sets name hosts: a new or removed peer changes no rule.
//
// The package is pure: it uses no kernel and no clock.
package guard

import (
	"cmp"
	"math"
	"net/netip"
	"slices"
	"strings"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/mtu"
)

// The chains.
const (
	Chain       = "guard"        // prerouting, before connection tracking
	FromPort    = "from-port"    // guard jumps there for packets of containers
	ToHost      = "to-host"      // from-port jumps there for packets to tunnels or the store
	Isolation   = "isolation"    // forward
	FromOutside = "from-outside" // isolation jumps there for packets from the underlay
	Untracked   = "untracked"    // output, before connection tracking
)

// These are the sets of ports. TunnelPorts has the UDP ports of tunnels, IKE and the probe.
// StorePorts has the TCP ports of the store.
const (
	TunnelPorts = "tunnel-ports"
	StorePorts  = "store-ports"
)

// VTEPSet returns the name of the set of addresses from which this host accepts VXLAN packets.
func VTEPSet(v6 bool) string { return "vteps" + family(v6) }

// HostSet returns the name of the set of all addresses at which listed hosts have tunnel ends.
// The set holds the underlay addresses of hosts and their own overlay addresses.
func HostSet(v6 bool) string { return "hosts" + family(v6) }

// priority is nftables' "raw", which comes before connection tracking (-200).
const priority = -300

// IANA's protocol numbers.
const (
	protoTCP = 6
	protoUDP = 17
	protoESP = 50
)

// The UDP ports of IKE and of ESP in UDP (RFC 3947, RFC 3948).
const (
	ikePort  = 500
	nattPort = 4500
)

// plan keeps the input of the rules.
type plan struct {
	s        *delta.State
	snap     *metadata.Snapshot
	me       metadata.Host
	local    netip.Addr         // end of this host's tunnels; invalid when there is none
	networks []metadata.Network // encapsulated networks, by name
	vxlan    []metadata.Network // VXLAN networks
	size     int                // bytes of the largest tunnel packet of any network
	loose    bool               // the kernel may not check IPv4 sources
}

// Plan returns the rules of a host. A host has rules as long as there is an encapsulated network.
// Even a host without any other plan has rules, because it may have containers.
// The kernel checks the IPv4 sources of a host end with its strict reverse-path check.
// Therefore IPv4 sources need no rule, unless loose says that the host overrides that check.
func Plan(snap *metadata.Snapshot, self string, loose bool) *delta.State {
	snap = snap.Sane()
	p := plan{s: delta.NewState(), snap: snap, loose: loose}
	me, _ := snap.Host(self)
	p.me, p.local = me, me.UnderlayAddr()
	for _, n := range snap.Networks {
		switch n.Encapsulation {
		case metadata.EncapNone:
			continue
		case metadata.EncapVXLAN:
			p.vxlan = append(p.vxlan, n)
		}
		p.size = max(p.size, mtu.Container(n, me)+mtu.Overhead(n, me))
		p.networks = append(p.networks, n)
	}
	if len(p.networks) == 0 {
		return p.s
	}
	slices.SortFunc(p.networks, func(a, b metadata.Network) int { return strings.Compare(a.Name, b.Name) })
	slices.SortFunc(p.vxlan, func(a, b metadata.Network) int {
		return cmp.Or(cmp.Compare(a.UDPPort(), b.UDPPort()), cmp.Compare(a.VNI, b.VNI))
	})
	p.hosts()
	p.fromPort()
	p.guard()
	p.isolation()
	p.untracked()
	return p.s
}

// hosts plans the sets of tunnel ends and of their ports.
func (p *plan) hosts() {
	var all [2][]netip.Prefix
	add := func(a netip.Addr) {
		if a.IsValid() {
			all[index(a.Is6())] = append(all[index(a.Is6())], netip.PrefixFrom(a, a.BitLen()))
		}
	}
	for _, h := range p.snap.Hosts {
		for _, u := range h.Underlay {
			add(u.Address.Addr())
		}
	}
	if v6 := p.local.Is6(); p.local.IsValid() && len(p.vxlan) > 0 {
		p.s.Sets[VTEPSet(v6)] = delta.Set{V6: v6, Elements: delta.Disjoint(all[index(v6)])}
	}
	for _, b := range p.snap.Blocks {
		add(b.Gateway)
	}
	for i, list := range all {
		p.s.Sets[HostSet(i == 1)] = delta.Set{V6: i == 1, Elements: delta.Disjoint(list)}
	}
	ports := []uint16{metadata.ProbePort, ikePort, nattPort}
	for _, n := range p.vxlan {
		ports = append(ports, n.UDPPort())
	}
	slices.Sort(ports)
	p.s.Sets[TunnelPorts] = delta.Set{Ports: slices.Compact(ports)}
	p.s.Sets[StorePorts] = delta.Set{Ports: metadata.StorePorts}
}

// fromPort plans the chain that drops forbidden packets of containers.
// A container must not send to the store or to tunnel ends.
// It must not use a foreign source address.
// It must not use a link-local source address.
// No packet needs such a source, because both ends of an endpoint have permanent neighbours.
// It must not send to this host's loopback addresses, which route_localnet would admit.
// The other packets that guard drops cannot come from an endpoint.
func (p *plan) fromPort() {
	c := delta.Chain{Rules: []delta.Rule{
		{delta.DportIn{Proto: protoUDP, Set: TunnelPorts}, delta.Jump(ToHost)},
		{delta.DportIn{Proto: protoTCP, Set: StorePorts}, delta.Jump(ToHost)},
		{delta.NoReverse{V6: !p.loose}, drop},
		{delta.InPrefix{Field: "saddr", Prefix: netip.MustParsePrefix("fe80::/10")}, drop},
		{delta.InPrefix{Field: "daddr", Prefix: netip.MustParsePrefix("127.0.0.0/8")}, drop},
		{delta.L4Proto(protoESP), delta.Jump(ToHost)},
	}}
	c.Rules = append(c.Rules, p.tooBig()...)
	c.Rules = append(c.Rules, delta.Rule{accept})
	p.s.Chains[FromPort] = c
	p.s.Chains[ToHost] = delta.Chain{Rules: []delta.Rule{
		{delta.InSet{Field: "daddr", Set: HostSet(false)}, drop},
		{delta.InSet{Field: "daddr", Set: HostSet(true), V6: true}, drop},
		{delta.ToLocal{}, drop},
	}}
}

func (p *plan) guard() {
	c := delta.Chain{Type: "filter", Hook: "prerouting", Priority: priority}
	add := func(r ...delta.Statement) { c.Rules = append(c.Rules, r) }
	if p.local.IsValid() {
		p.tunnels(add)
	}
	if len(p.vxlan) > 0 {
		for _, n := range p.networks {
			if n.Encapsulation != metadata.EncapIPsec {
				continue
			}
			// A packet of an encrypted network from a VXLAN device arrived unencrypted.
			for _, subnet := range n.Subnets {
				add(delta.InPrefix{Field: "saddr", Prefix: subnet}, delta.IifPrefix(delta.VTEPPrefix), drop)
				add(delta.InPrefix{Field: "daddr", Prefix: subnet}, delta.IifPrefix(delta.VTEPPrefix), drop)
			}
		}
		add(delta.IifPrefix(delta.VTEPPrefix), accept)
	}
	add(delta.IifPrefix(delta.VethPrefix), delta.Jump(FromPort))
	c.Rules = append(c.Rules, p.tooBig()...)
	if p.local.IsValid() {
		p.wire(add)
	}
	outside := []delta.Statement{delta.IifGroup{Group: delta.OverlayLinkGroup, Not: true},
		delta.Iif{Name: "lo", Not: true}}
	for _, n := range p.networks {
		for _, subnet := range n.Subnets {
			from, to := delta.InPrefix{Field: "saddr", Prefix: subnet}, delta.InPrefix{Field: "daddr", Prefix: subnet}
			for _, f := range p.me.On(subnet) { // the configuration requests both
				from := from
				if f.Prefix.Bits() > subnet.Bits() {
					from.Prefix = f.Prefix
				}
				add(from, delta.Iif{Name: f.Device}, accept)
			}
			if n.DirectRouting { // the route to the source's block leads to a host on this link
				add(from, to, delta.Reverse{}, accept)
			}
			add(slices.Concat([]delta.Statement{from}, outside, []delta.Statement{drop})...)
		}
	}
	for _, n := range p.networks {
		for _, subnet := range n.Subnets {
			to := delta.InPrefix{Field: "daddr", Prefix: subnet}
			sources := ofFamily(slices.Concat(n.AllowedPrefixes(), exempt(n)), subnet)
			for _, source := range sources {
				add(slices.Concat(within("saddr", source), delta.Rule{to, accept})...)
			}
			if !all(sources) {
				add(slices.Concat([]delta.Statement{to}, outside, []delta.Statement{drop})...)
			}
		}
	}
	p.s.Chains[Chain] = c
}

// tooBig drops false ICMP errors that claim too small an MTU for a tunnel's path.
// When such an error is true, the network's MTU is wrong. lariat doctor measures the path.
func (p *plan) tooBig() []delta.Rule {
	if !p.local.IsValid() {
		return nil
	}
	below := uint16(min(p.size, math.MaxUint16))
	return []delta.Rule{{delta.TooBig{From: p.local, To: HostSet(p.local.Is6()), Below: below}, drop}}
}

// tunnels accepts VXLAN packets of listed hosts without tracking.
// It accepts them at the underlay address alone: the kernel's socket listens on every address.
// It never accepts a packet from an endpoint, with any source address.
func (p *plan) tunnels(add func(...delta.Statement)) {
	v6 := p.local.Is6()
	for _, port := range p.vxlanPorts() {
		add(port, delta.IifGroup{Group: delta.OverlayLinkGroup, Not: true}, p.toHere(),
			delta.InSet{Field: "saddr", Set: VTEPSet(v6), V6: v6}, delta.Notrack{}, accept)
	}
}

// wire drops the other VXLAN packets with one of Lariat's VNIs.
// It does not filter foreign overlays on the same port.
// It accepts IKE, ESP and the probe without tracking.
// Without connection tracking, the kernel reassembles fragments after this hook.
// A first fragment may end before the VNI, so wire drops the fragments of unlisted hosts.
func (p *plan) wire(add func(...delta.Statement)) {
	for _, port := range p.vxlanPorts() {
		add(port, delta.Fragment{V6: p.local.Is6()}, delta.ToLocal{}, drop)
	}
	for _, n := range p.vxlan {
		add(delta.UDPDport(n.UDPPort()), delta.VXLANVNI(n.VNI), delta.ToLocal{}, drop)
	}
	add(p.toHere(), delta.DportIn{Proto: protoUDP, Set: TunnelPorts}, delta.Notrack{}, accept)
	add(p.toHere(), delta.L4Proto(protoESP), delta.Notrack{}, accept)
}

// toHere matches packets to the end of this host's tunnels.
func (p *plan) toHere() delta.InPrefix {
	return delta.InPrefix{Field: "daddr", Prefix: netip.PrefixFrom(p.local, p.local.BitLen())}
}

// vxlanPorts returns matches of the UDP ports of VXLAN networks, without duplicates.
func (p *plan) vxlanPorts() (out []delta.Statement) {
	for _, n := range p.vxlan {
		if m := delta.UDPDport(n.UDPPort()); !slices.Contains(out, delta.Statement(m)) {
			out = append(out, m)
		}
	}
	return out
}

// exempt returns the destinations that see the own addresses of a network's containers.
// These destinations send their replies to the containers' addresses.
func exempt(n metadata.Network) []netip.Prefix {
	if !n.HostNAT {
		return []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)}
	}
	return n.HostNATExempt
}

// isolation drops packets from one network to another network that does not allow them.
// Some networks' containers are visible on the underlay.
// isolation drops packets from the underlay to such a network unless the network allows the source.
// Replies and packets to published ports pass.
// The set is the second match, so a packet within a network costs one comparison for each network.
func (p *plan) isolation() {
	c := delta.Chain{Type: "filter", Hook: "forward", Priority: -10}
	var outside []delta.Rule
	answers := false
	for _, n := range p.networks {
		for _, subnet := range n.Subnets {
			v6 := subnet.Addr().Is6()
			to := delta.InPrefix{Field: "daddr", Prefix: subnet}
			if denied := p.denied(n, v6); len(denied) > 0 {
				set := "deny" + family(v6) + "-" + n.Name
				p.s.Sets[set] = delta.Set{V6: v6, Interval: true, Elements: delta.Disjoint(denied)}
				from := delta.InSet{Field: "saddr", Set: set, V6: v6}
				c.Rules = append(c.Rules, delta.Rule{to, from, delta.CtReply{}, accept},
					delta.Rule{to, from, delta.CtDNAT{}, accept}, delta.Rule{to, from, drop})
			}
			sources := ofFamily(n.AllowedPrefixes(), subnet)
			if len(ofFamily(exempt(n), subnet)) == 0 || all(sources) {
				continue // guard accepts the allowed packets only
			}
			if n.DirectRouting {
				sources = append(sources, subnet)
			}
			c.Rules = append(c.Rules, delta.Rule{to, delta.IifGroup{Group: delta.OverlayLinkGroup, Not: true},
				delta.NotIifPrefix(delta.VTEPPrefix), delta.Jump(FromOutside)})
			for _, source := range sources {
				outside = append(outside, slices.Concat(within("saddr", source), delta.Rule{to, accept}))
			}
			answers = true
		}
	}
	if len(c.Rules) > 0 {
		p.s.Chains[Isolation] = c
	}
	if answers {
		p.s.Chains[FromOutside] = delta.Chain{Rules: append(outside, delta.Rule{delta.CtReply{}, accept},
			delta.Rule{delta.CtDNAT{}, accept}, delta.Rule{drop})}
	}
}

// denied returns the subnets of one family whose containers must not reach network n.
func (p *plan) denied(n metadata.Network, v6 bool) (out []netip.Prefix) {
	for _, other := range p.networks {
		if other.Name == n.Name || n.Allows(other.Name) {
			continue
		}
		for _, s := range other.Subnets {
			if s.Addr().Is6() == v6 {
				out = append(out, s)
			}
		}
	}
	return out
}

// ofFamily returns the prefixes of a subnet's family, without prefixes that another prefix covers.
func ofFamily(list []netip.Prefix, subnet netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(delta.Disjoint(list),
		func(p netip.Prefix) bool { return p.Addr().Is6() != subnet.Addr().Is6() })
}

// all reports whether prefixes without overlaps cover every address.
func all(list []netip.Prefix) bool { return len(list) == 1 && list[0].Bits() == 0 }

// within matches an address in a prefix. Every address is in a prefix of length 0.
func within(field string, p netip.Prefix) delta.Rule {
	if p.Bits() == 0 {
		return nil
	}
	return delta.Rule{delta.InPrefix{Field: field, Prefix: p}}
}

// untracked exempts outgoing tunnel packets from tracking. guard exempts the incoming ones.
func (p *plan) untracked() {
	if !p.local.IsValid() {
		return
	}
	c := delta.Chain{Type: "filter", Hook: "output", Priority: priority}
	from := delta.InPrefix{Field: "saddr", Prefix: netip.PrefixFrom(p.local, p.local.BitLen())}
	add := func(match delta.Statement) {
		c.Rules = append(c.Rules, delta.Rule{from, match, delta.Notrack{}, accept})
	}
	for _, port := range p.vxlanPorts() {
		add(port) // the source port is a hash of the inner packet
	}
	for _, port := range []uint16{metadata.ProbePort, ikePort, nattPort} {
		add(delta.UDPSport(port))
	}
	add(delta.L4Proto(protoESP))
	p.s.Chains[Untracked] = c
}

const (
	accept = delta.Verdict("accept")
	drop   = delta.Verdict("drop")
)

func family(v6 bool) string {
	if v6 {
		return "6"
	}
	return "4"
}

func index(v6 bool) int {
	if v6 {
		return 1
	}
	return 0
}
