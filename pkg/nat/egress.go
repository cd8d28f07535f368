// Package nat plans host NAT: containers' packets to the underlay leave with the host's address.
//
// Each network and family has a fixed number of nftables rules over sets of prefixes.
// Therefore the plan does not grow with containers.
// A container's start or stop changes nothing.
// The package is pure: it uses no kernel and no clock.
package nat

import (
	"net/netip"
	"slices"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// Chain is the chain of the rules: postrouting, with nft's priority for source NAT.
const Chain = "egress"

// FirstPort and LastPort limit the source ports of masqueraded packets.
// Linux gives the same ports to clients (ip_local_port_range).
// Otherwise a container could choose the port of a service of its host.
// The container would then receive packets of peers to that service (CVE-2021-3773).
const (
	FirstPort = 32768
	LastPort  = 60999
)

// portProtocols lists the protocols with ports that NAT can choose, by IANA's numbers: TCP, UDP,
// SCTP, DCCP.
var portProtocols = []delta.L4Proto{6, 17, 132, 33}

// Plan returns the rules of every network with host NAT.
// Packets to Lariat's networks and to exempted prefixes keep their source.
// Packets to link-local and multicast addresses keep their source, too.
func Plan(snap *metadata.Snapshot) *delta.State {
	s := delta.NewState()
	var inside []netip.Prefix
	for _, n := range snap.Networks {
		if n.Encapsulation != metadata.EncapNone {
			inside = append(inside, n.Subnets...)
		}
	}
	chain := delta.Chain{Type: "nat", Hook: "postrouting", Priority: 100}
	for _, n := range snap.Networks {
		if !n.HostNAT || n.Encapsulation == metadata.EncapNone {
			continue
		}
		for _, subnet := range n.Subnets {
			v6 := subnet.Addr().Is6()
			suffix := "4-" + n.Name
			keep := []netip.Prefix{netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("224.0.0.0/4")}
			if v6 {
				suffix = "6-" + n.Name
				keep = []netip.Prefix{netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("ff00::/8")}
			}
			for _, p := range slices.Concat(inside, n.HostNATExempt) {
				if p.Addr().Is6() == v6 {
					keep = append(keep, p.Masked())
				}
			}
			s.Sets["nat"+suffix] = delta.Set{V6: v6, Interval: true, Elements: []netip.Prefix{subnet}}
			s.Sets["keep"+suffix] = delta.Set{V6: v6, Interval: true, Elements: delta.Disjoint(keep)}
			from := delta.InSet{Field: "saddr", Set: "nat" + suffix, V6: v6}
			to := delta.InSet{Field: "daddr", Set: "keep" + suffix, V6: v6, Not: true}
			for _, proto := range portProtocols {
				chain.Rules = append(chain.Rules, delta.Rule{from, to, proto, delta.Masquerade{First: FirstPort, Last: LastPort}})
			}
			chain.Rules = append(chain.Rules, delta.Rule{from, to, delta.Masquerade{}})
		}
	}
	if len(chain.Rules) > 0 {
		s.Chains[Chain] = chain
	}
	return s
}
