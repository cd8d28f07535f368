// Package guard plans the nftables rules that keep containers, networks and the underlay apart.
// docs/security.md says what each rule promises.
//
//	prerouting  guard      from-port: what a container may send at all
//	                       tunnel packets to this host: not tracked, so that no NAT can divert them
//	                       overlay addresses: only from ports and tunnels
//	forward     isolation  what crosses from one network to another
//	output      untracked  this host's own tunnel packets
//
// Every packet that comes for this host or passes it goes through guard once, so what there is most of leaves
// it first: VXLAN packets on the wire, then those that such a packet brought, then those of containers. The
// rules name networks, and sets name hosts: a peer that comes or goes changes no rule.
//
// Pure: no kernel, no clock.
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
	Chain       = "guard"        // prerouting, in front of connection tracking
	FromPort    = "from-port"    // guard jumps there with what a container sent
	ToHost      = "to-host"      // from-port jumps there with what is for a tunnel or the store
	Isolation   = "isolation"    // forward
	FromOutside = "from-outside" // isolation jumps there with what comes from the underlay
	Untracked   = "untracked"    // output, in front of connection tracking
)

// Sets of ports: of tunnels, IKE and the probe, by UDP; of the store, by TCP.
const (
	TunnelPorts = "tunnel-ports"
	StorePorts  = "store-ports"
)

// VTEPSet is the set of the addresses from which VXLAN packets are taken.
func VTEPSet(v6 bool) string { return "vteps" + family(v6) }

// HostSet is the set of all addresses at which listed hosts have tunnels' ends: of the underlay, and their
// own on the overlay.
func HostSet(v6 bool) string { return "hosts" + family(v6) }

// priority is nftables' "raw": in front of connection tracking (-200).
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

// plan is what the rules are made of.
type plan struct {
	s        *delta.State
	snap     *metadata.Snapshot
	me       metadata.Host
	local    netip.Addr         // end of this host's tunnels; invalid when it has none
	networks []metadata.Network // encapsulated ones, by name
	vxlan    []metadata.Network // those of them that are VXLAN's
	size     int                // bytes of the largest tunnel packet of any network
	loose    bool               // the kernel cannot be trusted to check IPv4 sources by itself
}

// Plan returns the rules of a host. They stand as long as there is any encapsulated network, also on a host
// that nothing else can be planned for: it may have containers. A port has the kernel's strict reverse-path
// check for IPv4, which makes a rule for that family's sources unnecessary, unless loose says that something
// on the host overrides it.
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

// hosts are the sets of tunnels' ends, and of the ports there.
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

// fromPort is what a container must not send: to the store and to the ends of tunnels; with an address that is
// not its own; with one of the link alone (nothing needs it: a port's neighbours are known on both ends); to
// this host's loopback addresses (which a port with route_localnet would let in). Whatever else guard forbids,
// a port's packet cannot be.
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
			// whatever a VXLAN device brings for an encrypted network, or from one, came in clear
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
			for _, f := range p.me.On(subnet) { // somebody asked for both
				from := from
				if f.Prefix.Bits() > subnet.Bits() {
					from.Prefix = f.Prefix
				}
				add(from, delta.Iif{Name: f.Device}, accept)
			}
			if n.DirectRouting { // from where the source's own block is routed to: a host on this link
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

// tooBig drops lies: whoever says that a tunnel's path takes less than its network needs. Where it is true,
// the network's MTU is wrong; lariat doctor measures it.
func (p *plan) tooBig() []delta.Rule {
	if !p.local.IsValid() {
		return nil
	}
	below := uint16(min(p.size, math.MaxUint16))
	return []delta.Rule{{delta.TooBig{From: p.local, To: HostSet(p.local.Is6()), Below: below}, drop}}
}

// tunnels takes VXLAN packets without tracking: from listed hosts, and at the underlay address alone, because
// the kernel's socket listens on every address. No container's packet is one of them, whatever source it
// claims.
func (p *plan) tunnels(add func(...delta.Statement)) {
	v6 := p.local.Is6()
	for _, port := range p.vxlanPorts() {
		add(port, delta.IifGroup{Group: delta.OverlayLinkGroup, Not: true}, p.toHere(),
			delta.InSet{Field: "saddr", Set: VTEPSet(v6), V6: v6}, delta.Notrack{}, accept)
	}
}

// wire drops what has one of our VNIs all the same (another overlay on the same port is not ours to filter),
// and takes IKE, ESP and the probe without tracking. Without connection tracking, fragments are put together
// behind this hook, and a first one may end before the VNI: strangers' are dropped.
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

// vxlanPorts match the UDP ports of VXLAN networks, each once.
func (p *plan) vxlanPorts() (out []delta.Statement) {
	for _, n := range p.vxlan {
		if m := delta.UDPDport(n.UDPPort()); !slices.Contains(out, delta.Statement(m)) {
			out = append(out, m)
		}
	}
	return out
}

// exempt are the destinations that see a network's containers by their own addresses. They answer to those.
func exempt(n metadata.Network) []netip.Prefix {
	if !n.HostNAT {
		return []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)}
	}
	return n.HostNATExempt
}

// isolation drops what goes from one network to another that does not allow it, and what comes from the
// underlay to a network whose containers are seen there, unless it was asked for. Replies pass, and what was
// sent to a published port. The set is the second match, so a packet within a network costs one comparison
// for each network.
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
				continue // guard lets pass what is allowed and no more
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

// denied are the subnets of one family whose containers must not reach a network's.
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

// ofFamily are the prefixes of a subnet's family, without those that others cover.
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

// untracked is the way out of what guard does not track on its way in.
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
		add(port) // its source port is a hash of the packet inside
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
