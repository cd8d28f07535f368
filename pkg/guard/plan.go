// Package guard plans the nftables rules that keep containers, networks and the underlay apart. docs/security.md says what each
// rule promises.
//
//	prerouting  guard      from-port: what a container may send at all
//	                       tunnel packets to this host: not tracked, so that no NAT can divert them
//	                       overlay addresses: only from ports and tunnels
//	forward     isolation  what crosses from one network to another
//	output      untracked  this host's own tunnel packets
//
// Every packet that comes for this host or passes it goes through guard once, so its order is that of the traffic: packets of
// containers first, packets from a tunnel next, then those on the wire. The rules name networks, and sets name hosts: a peer that
// comes or goes changes no rule.
//
// Pure: no kernel, no clock.
package guard

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// The chains.
const (
	Chain     = "guard"     // prerouting, in front of connection tracking
	FromPort  = "from-port" // guard jumps there with what a container sent
	Isolation = "isolation" // forward
	Untracked = "untracked" // output, in front of connection tracking
)

// HostSet is the set of all addresses at which listed hosts have tunnels' ends: of the underlay, and their own on the overlay.
func HostSet(v6 bool) string { return "hosts" + family(v6) }

// priority is nftables' "raw": in front of connection tracking (-200).
const priority = -300

// IANA's protocol numbers.
const (
	protoTCP = 6
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
	local    netip.Addr         // end of this host's tunnels; invalid when it has none
	networks []metadata.Network // encapsulated ones, by name
	vxlan    []uint16           // UDP ports
	ipsec    bool
}

// Plan returns the rules of a host. They stand as long as there is any encapsulated network, also on a host that nothing else
// can be planned for: it may have containers.
func Plan(snap *metadata.Snapshot, self string) *delta.State {
	p := plan{s: delta.NewState(), snap: snap}
	if me, ok := snap.Host(self); ok {
		p.local = me.UnderlayAddr()
	}
	for _, n := range snap.Networks {
		switch n.Encapsulation {
		case metadata.EncapNone:
			continue
		case metadata.EncapVXLAN:
			p.vxlan = append(p.vxlan, n.UDPPort())
		case metadata.EncapIPsec:
			p.ipsec = true
		}
		p.networks = append(p.networks, n)
	}
	if len(p.networks) == 0 {
		return p.s
	}
	slices.SortFunc(p.networks, func(a, b metadata.Network) int { return strings.Compare(a.Name, b.Name) })
	slices.Sort(p.vxlan)
	p.vxlan = slices.Compact(p.vxlan)
	p.hosts()
	p.fromPort()
	p.guard()
	p.isolation()
	p.untracked()
	return p.s
}

// hosts are the sets of tunnels' ends.
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
	for _, b := range p.snap.Blocks {
		add(b.Gateway)
	}
	for i, list := range all {
		p.s.Sets[HostSet(i == 1)] = delta.Set{V6: i == 1, Elements: delta.Disjoint(list)}
	}
}

// fromPort is what a container must not send: with an address that is not its own, with one of the link alone (nothing needs it: a
// port's neighbours are known on both ends), to this host's loopback addresses (which a port with route_localnet would let in), and to
// the ends of tunnels.
func (p *plan) fromPort() {
	c := delta.Chain{Rules: []delta.Rule{
		{delta.NoReverse{}, drop},
		{delta.InPrefix{Field: "saddr", Prefix: netip.MustParsePrefix("fe80::/10")}, drop},
		{delta.InPrefix{Field: "daddr", Prefix: netip.MustParsePrefix("127.0.0.0/8")}, drop},
		{delta.L4Proto(protoTCP), accept},
	}}
	toHosts := func(match delta.Statement) {
		for _, v6 := range []bool{false, true} {
			c.Rules = append(c.Rules, delta.Rule{match, delta.InSet{Field: "daddr", Set: HostSet(v6), V6: v6}, drop})
		}
		c.Rules = append(c.Rules, delta.Rule{match, delta.ToLocal{}, drop})
	}
	for _, port := range p.tunnelPorts() {
		toHosts(delta.UDPDport(port))
	}
	if p.ipsec {
		toHosts(delta.L4Proto(protoESP))
	}
	p.s.Chains[FromPort] = c
}

// tunnelPorts are the UDP ports at which hosts take packets of tunnels, and of the probe of their paths.
func (p *plan) tunnelPorts() []uint16 {
	ports := append(slices.Clone(p.vxlan), metadata.ProbePort)
	if p.ipsec {
		ports = append(ports, ikePort, nattPort)
	}
	return ports
}

func (p *plan) guard() {
	c := delta.Chain{Type: "filter", Hook: "prerouting", Priority: priority}
	add := func(r ...delta.Statement) { c.Rules = append(c.Rules, r) }
	add(delta.IifPrefix(delta.PortPrefix), delta.Jump(FromPort))
	if len(p.vxlan) > 0 {
		for _, n := range p.networks {
			if n.Encapsulation != metadata.EncapIPsec {
				continue
			}
			for _, subnet := range n.Subnets { // whatever a VXLAN device brings for an encrypted network, or from one, came in clear
				add(delta.InPrefix{Field: "saddr", Prefix: subnet}, delta.IifPrefix(delta.VTEPPrefix), drop)
				add(delta.InPrefix{Field: "daddr", Prefix: subnet}, delta.IifPrefix(delta.VTEPPrefix), drop)
			}
		}
		add(delta.IifPrefix(delta.VTEPPrefix), accept)
	}
	if p.local.IsValid() {
		to := delta.InPrefix{Field: "daddr", Prefix: netip.PrefixFrom(p.local, p.local.BitLen())}
		for _, port := range p.tunnelPorts() {
			add(to, delta.UDPDport(port), delta.Notrack{}, accept)
		}
		if p.ipsec {
			add(to, delta.L4Proto(protoESP), delta.Notrack{}, accept)
		}
	}
	outside := []delta.Statement{delta.IifGroup{Group: delta.InsideGroup, Not: true}, delta.Iif{Name: "lo", Not: true}}
	for _, n := range p.networks {
		for _, subnet := range n.Subnets {
			from, to := delta.InPrefix{Field: "saddr", Prefix: subnet}, delta.InPrefix{Field: "daddr", Prefix: subnet}
			if n.DirectRouting { // from where the source's own block is routed to: a host on this link
				add(from, to, delta.Reverse{}, accept)
			}
			add(slices.Concat([]delta.Statement{from}, outside, []delta.Statement{drop})...)
		}
	}
	for _, n := range p.networks {
		for _, subnet := range n.Subnets {
			to := delta.InPrefix{Field: "daddr", Prefix: subnet}
			for _, source := range slices.Concat(n.AllowedPrefixes(), exempt(n)) {
				switch {
				case source.Addr().Is6() != subnet.Addr().Is6():
				case source.Bits() == 0:
					add(to, accept)
				default:
					add(delta.InPrefix{Field: "saddr", Prefix: source}, to, accept)
				}
			}
			add(slices.Concat([]delta.Statement{to}, outside, []delta.Statement{drop})...)
		}
	}
	p.s.Chains[Chain] = c
}

// exempt are the destinations that see a network's containers by their own addresses. They answer to those, and isolation lets
// nothing but answers pass.
func exempt(n metadata.Network) []netip.Prefix {
	if !n.HostNAT {
		return nil
	}
	return n.HostNATExempt
}

// isolation drops what goes from one network to another that does not allow it. Replies pass, and what was sent to a published port.
// The set is the second match, so a packet within a network costs one comparison for each network.
func (p *plan) isolation() {
	c := delta.Chain{Type: "filter", Hook: "forward", Priority: -10}
	var inside []netip.Prefix
	for _, n := range p.networks {
		inside = append(inside, n.Subnets...)
	}
	for _, n := range p.networks {
		for _, subnet := range n.Subnets {
			var denied []netip.Prefix
			for _, out := range exempt(n) {
				if out.Addr().Is6() == subnet.Addr().Is6() {
					denied = append(denied, delta.Without(out.Masked(), slices.Concat(inside, n.AllowedPrefixes()))...)
				}
			}
			for _, other := range p.networks {
				if other.Name == n.Name || n.Allows(other.Name) {
					continue
				}
				for _, s := range other.Subnets {
					if s.Addr().Is6() == subnet.Addr().Is6() {
						denied = append(denied, s)
					}
				}
			}
			if len(denied) == 0 {
				continue
			}
			v6 := subnet.Addr().Is6()
			set := "deny" + family(v6) + "-" + n.Name
			p.s.Sets[set] = delta.Set{V6: v6, Interval: true, Elements: delta.Disjoint(denied)}
			to, from := delta.InPrefix{Field: "daddr", Prefix: subnet}, delta.InSet{Field: "saddr", Set: set, V6: v6}
			c.Rules = append(c.Rules, delta.Rule{to, from, delta.CtReply{}, accept}, delta.Rule{to, from, delta.CtDNAT{}, accept}, delta.Rule{to, from, drop})
		}
	}
	if len(c.Rules) > 0 {
		p.s.Chains[Isolation] = c
	}
}

// untracked is the way out of what guard does not track on its way in.
func (p *plan) untracked() {
	if !p.local.IsValid() {
		return
	}
	c := delta.Chain{Type: "filter", Hook: "output", Priority: priority}
	from := delta.InPrefix{Field: "saddr", Prefix: netip.PrefixFrom(p.local, p.local.BitLen())}
	add := func(match delta.Statement) { c.Rules = append(c.Rules, delta.Rule{from, match, delta.Notrack{}}) }
	for _, port := range p.vxlan {
		add(delta.UDPDport(port)) // its source port is a hash of the packet inside
	}
	add(delta.UDPSport(metadata.ProbePort))
	if p.ipsec {
		add(delta.UDPSport(ikePort))
		add(delta.UDPSport(nattPort))
		add(delta.L4Proto(protoESP))
	}
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
