package delta

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// IifPrefix matches packets that arrived on an interface with this prefix in its name:
// iifname "lrt*".
type IifPrefix string

// NotIifPrefix matches packets that arrived on an interface whose name lacks this prefix:
// iifname != "vtep*".
type NotIifPrefix string

// IifGroup matches packets that arrived on an interface of a link group: iifgroup 76.
type IifGroup struct {
	Group uint32
	Not   bool
}

// OifGroup matches packets that leave by an interface of a link group: oifgroup 76.
type OifGroup struct {
	Group uint32
	Not   bool
}

// Iif matches the name of the arriving interface: iifname "vtep1042".
type Iif struct {
	Name string
	Not  bool
}

// Oif matches the name of the leaving interface: oifname "vtep1042".
type Oif struct {
	Name string
	Not  bool
}

// InSet matches an address of the packet against a set of the same table: ip saddr @set.
type InSet struct {
	Field string // saddr or daddr
	Set   string
	V6    bool
	Not   bool
}

// InPrefix matches an address of the packet against one prefix: ip saddr 10.42.0.0/16.
// InPrefix costs less than a set with one element.
type InPrefix struct {
	Field  string // saddr or daddr
	Prefix netip.Prefix
}

// NotAddr matches an address of the packet that differs from Addr: ip daddr != 192.0.2.1.
type NotAddr struct {
	Field string // saddr or daddr
	Addr  netip.Addr
}

// L4Proto matches the protocol after the IP header, by its IANA number: meta l4proto tcp.
type L4Proto uint8

// DportIn matches the destination port of a TCP or UDP packet against a set of ports:
// udp dport @tunnel-ports.
type DportIn struct {
	Proto L4Proto
	Set   string
}

// UDPDport matches the destination port of a UDP packet: udp dport 4789.
type UDPDport uint16

// UDPSport matches the source port of a UDP packet: udp sport 500.
type UDPSport uint16

// Fragment matches a packet that is a fragment: ip frag-off & 16383 != 0, exthdr frag exists.
type Fragment struct{ V6 bool }

// VXLANVNI matches the VNI after the UDP header (RFC 7348 §5): @th,96,24 0x412.
// VXLANVNI has meaning only after UDPDport.
type VXLANVNI uint32

// TooBig matches an ICMP error about a packet that was too large for its path.
// The packet went from From to an address of the set To, and the path takes less than Below bytes.
// Errors about TCP do not match, because TCP checks them.
// nft lists the protocol, source and destination of that packet as raw payload (RFC 1191 §4,
// RFC 4443 §3.2).
type TooBig struct {
	From  netip.Addr
	To    string // set
	Below uint16
}

// NoReverse matches a packet whose source has no route back by the interface on which it arrived.
// With V6 it matches IPv6 packets only.
type NoReverse struct{ V6 bool }

// Reverse matches a packet whose source has a route back by the interface on which the packet
// arrived.
type Reverse struct{}

// ToLocal matches a packet to an address of this host: fib daddr type local.
type ToLocal struct{}

// CtReply matches packets of established connections, and errors about such connections:
// ct state established,related.
// A packet without connection tracking does not match.
type CtReply struct{}

// CtDNAT matches packets of connections whose destination was rewritten: ct status dnat.
// A published port rewrites destinations.
type CtDNAT struct{}

// Notrack exempts the packet from connection tracking, and so from NAT: notrack.
// It has an effect only before priority -200 of prerouting and output, where tracking begins.
type Notrack struct{}

// NotRouteIPsec matches a packet that IPsec will not transform before the packet leaves:
// rt ipsec missing.
type NotRouteIPsec struct{}

// Masquerade gives the packet the address of the leaving interface. It ends a rule of a nat chain.
// With First and Last the source port is between First and Last, inclusive, after the translation.
type Masquerade struct{ First, Last uint16 }

// A Verdict is accept, drop, or "jump CHAIN". It ends a rule.
type Verdict string

// Jump returns the verdict that continues in a chain without a hook.
// Evaluation continues after the rule when that chain has no verdict.
func Jump(chain string) Verdict { return Verdict("jump " + chain) }

// JumpTo returns the target chain of a jump. It returns an empty string for accept and drop.
func (s Verdict) JumpTo() string {
	chain, _ := strings.CutPrefix(string(s), "jump ")
	if chain == string(s) {
		return ""
	}
	return chain
}

// A MarkComment is the rule's comment. It comes last.
type MarkComment string

// An Unknown is a statement of an observed rule that Lariat never writes.
// It differs from every desired statement, so the rule is replaced.
type Unknown string

func (IifPrefix) statement()     {}
func (NotIifPrefix) statement()  {}
func (IifGroup) statement()      {}
func (OifGroup) statement()      {}
func (InPrefix) statement()      {}
func (Iif) statement()           {}
func (Oif) statement()           {}
func (InSet) statement()         {}
func (NotAddr) statement()       {}
func (L4Proto) statement()       {}
func (DportIn) statement()       {}
func (UDPDport) statement()      {}
func (UDPSport) statement()      {}
func (Fragment) statement()      {}
func (Reverse) statement()       {}
func (ToLocal) statement()       {}
func (CtReply) statement()       {}
func (CtDNAT) statement()        {}
func (Notrack) statement()       {}
func (TooBig) statement()        {}
func (VXLANVNI) statement()      {}
func (NoReverse) statement()     {}
func (NotRouteIPsec) statement() {}
func (Masquerade) statement()    {}
func (Verdict) statement()       {}
func (MarkComment) statement()   {}
func (Unknown) statement()       {}

func not(is bool) string {
	if is {
		return "!= "
	}
	return ""
}

// String returns the statement as nft lists it.
func (s IifPrefix) String() string { return `iifname "` + string(s) + `*"` }

// String returns the statement as nft lists it.
func (s NotIifPrefix) String() string { return `iifname != "` + string(s) + `*"` }

// String returns the statement as nft lists it.
func (s IifGroup) String() string {
	return "iifgroup " + not(s.Not) + strconv.FormatUint(uint64(s.Group), 10)
}

// String returns the statement as nft lists it.
func (s OifGroup) String() string {
	return "oifgroup " + not(s.Not) + strconv.FormatUint(uint64(s.Group), 10)
}

// String returns the statement as nft lists it.
func (s InPrefix) String() string {
	if s.Prefix.IsSingleIP() {
		return family(s.Prefix.Addr()) + s.Field + " " + s.Prefix.Addr().String()
	}
	return family(s.Prefix.Addr()) + s.Field + " " + s.Prefix.String()
}

// family returns nft's keyword before an address field.
func family(a netip.Addr) string {
	if a.Is6() {
		return "ip6 "
	}
	return "ip "
}

// String returns the statement as nft lists it.
func (s Iif) String() string { return "iifname " + not(s.Not) + `"` + s.Name + `"` }

// String returns the statement as nft lists it.
func (s Oif) String() string { return "oifname " + not(s.Not) + `"` + s.Name + `"` }

// String returns the statement as nft lists it.
func (s InSet) String() string {
	family := "ip "
	if s.V6 {
		family = "ip6 "
	}
	return family + s.Field + " " + not(s.Not) + "@" + s.Set
}

// String returns the statement as nft lists it.
func (s DportIn) String() string { return l4protos[s.Proto] + " dport @" + s.Set }

// String returns the statement as nft lists it.
func (s UDPDport) String() string { return "udp dport " + strconv.Itoa(int(s)) }

// String returns the statement as nft lists it.
func (s UDPSport) String() string { return "udp sport " + strconv.Itoa(int(s)) }

// String returns the statement as nft lists it.
func (s NotAddr) String() string { return family(s.Addr) + s.Field + " != " + s.Addr.String() }

// l4protos maps protocol numbers to the names in nft's listing.
var l4protos = map[L4Proto]string{6: "tcp", 17: "udp", 33: "dccp", 50: "esp", 132: "sctp"}

// String returns the statement as nft lists it.
func (s L4Proto) String() string {
	return "meta l4proto " + cmp.Or(l4protos[s], strconv.Itoa(int(s)))
}

// String returns the statement as nft lists it.
func (s Fragment) String() string {
	if s.V6 {
		return "exthdr frag exists"
	}
	return "ip frag-off & 16383 != 0"
}

// String returns the statement as nft lists it.
func (Reverse) String() string { return "fib saddr . iif oif exists" }

// String returns the statement as nft lists it.
func (ToLocal) String() string { return "fib daddr type local" }

// String returns the statement as nft lists it.
func (CtReply) String() string { return "ct state established,related" }

// String returns the statement as nft lists it.
func (CtDNAT) String() string { return "ct status dnat" }

// String returns the statement as nft lists it.
func (s TooBig) String() string {
	if s.From.Is6() {
		return fmt.Sprintf("icmpv6 mtu < %d @th,112,8 != 0x6 @th,128,128 0x%x @th,256,128 @%s", s.Below, s.From.AsSlice(),
			s.To)
	}
	return fmt.Sprintf("icmp code frag-needed icmp mtu < %d @th,136,8 != 0x6 @th,160,32 0x%x @th,192,32 @%s", s.Below,
		s.From.AsSlice(), s.To)
}

// String returns the statement as nft lists it.
func (Notrack) String() string { return "notrack" }

// String returns the statement as nft lists it: nft prints raw payload in hexadecimal.
func (s VXLANVNI) String() string { return "@th,96,24 0x" + strconv.FormatUint(uint64(s), 16) }

// String returns the statement as nft lists it.
func (s NoReverse) String() string {
	const both = "fib saddr . iif oif missing"
	if s.V6 {
		return "meta nfproto ipv6 " + both
	}
	return both
}

// String returns the statement as nft lists it.
func (NotRouteIPsec) String() string { return "rt ipsec missing" }

// String returns the statement as nft lists it.
func (s Masquerade) String() string {
	if s == (Masquerade{}) {
		return "masquerade"
	}
	return fmt.Sprintf("masquerade to :%d-%d", s.First, s.Last)
}

// String returns the statement as nft lists it.
func (s Verdict) String() string { return string(s) }

// String returns the statement as nft lists it.
func (s MarkComment) String() string { return `comment "` + string(s) + `"` }

// String returns the content in angle brackets.
func (s Unknown) String() string { return "<" + string(s) + ">" }

// String returns the rule as nft lists it.
func (r Rule) String() string {
	var b strings.Builder
	for i, s := range r {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(s.String())
	}
	return b.String()
}

// Equal compares two rules, statement by statement.
func (r Rule) Equal(o Rule) bool {
	return slices.Equal(r, o)
}

// SameBase reports whether two chains are equal apart from their rules.
func (c Chain) SameBase(o Chain) bool {
	return c.Type == o.Type && c.Hook == o.Hook && c.Priority == o.Priority
}

// Equal compares two chains with their rules.
func (c Chain) Equal(o Chain) bool {
	return c.SameBase(o) && slices.EqualFunc(c.Rules, o.Rules, Rule.Equal)
}

// SameType reports whether two sets are equal apart from their elements.
// Sets of different Ports have different types, because a set of ports is not changed in place.
func (s Set) SameType(o Set) bool {
	return s.V6 == o.V6 && s.Interval == o.Interval && s.Other == o.Other && (s.Ports == nil) == (o.Ports == nil) &&
		slices.Equal(s.Ports, o.Ports)
}

// Equal compares two sets with their elements.
func (s Set) Equal(o Set) bool { return s.SameType(o) && slices.Equal(s.Elements, o.Elements) }
