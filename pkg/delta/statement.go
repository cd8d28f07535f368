package delta

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// IifPrefix matches packets that arrived on an interface whose name begins so: iifname "lrt*".
type IifPrefix string

// IifGroup matches packets that arrived on an interface of a link group: iifgroup 76.
type IifGroup struct {
	Group uint32
	Not   bool
}

// OifGroup matches those that leave by one: oifgroup 76.
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

// InPrefix matches an address of the packet against one prefix: ip saddr 10.42.0.0/16. It costs less than a set of one.
type InPrefix struct {
	Field  string // saddr or daddr
	Prefix netip.Prefix
}

// UDPDport matches the destination port of a UDP packet: udp dport 4789.
type UDPDport uint16

// VXLANVNI matches the VNI behind the UDP header (RFC 7348 §5): @th,96,24 0x412. It stands behind UDPDport, and has meaning
// only there.
type VXLANVNI uint32

// NoReverse matches a packet whose source has no route back by the interface on which it arrived.
type NoReverse struct{}

// NotRouteIPsec matches a packet that will not be transformed by IPsec before it leaves: rt ipsec missing.
type NotRouteIPsec struct{}

// Masquerade gives the packet the address of the leaving interface; it ends a rule of a nat chain.
type Masquerade struct{}

// Verdict is accept or drop, and ends a rule.
type Verdict string

// MarkComment is the rule's comment. It comes last.
type MarkComment string

// Unknown is what an observed rule holds and Lariat never writes. It is unequal to every desired statement, so the rule is
// replaced.
type Unknown string

func (IifPrefix) statement()     {}
func (IifGroup) statement()      {}
func (OifGroup) statement()      {}
func (InPrefix) statement()      {}
func (Iif) statement()           {}
func (Oif) statement()           {}
func (InSet) statement()         {}
func (UDPDport) statement()      {}
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

// String is the statement as nft lists it.
func (s IifPrefix) String() string { return `iifname "` + string(s) + `*"` }

// String is the statement as nft lists it.
func (s IifGroup) String() string {
	return "iifgroup " + not(s.Not) + strconv.FormatUint(uint64(s.Group), 10)
}

// String is the statement as nft lists it.
func (s OifGroup) String() string {
	return "oifgroup " + not(s.Not) + strconv.FormatUint(uint64(s.Group), 10)
}

// String is the statement as nft lists it.
func (s InPrefix) String() string {
	family := "ip "
	if s.Prefix.Addr().Is6() {
		family = "ip6 "
	}
	if s.Prefix.IsSingleIP() {
		return family + s.Field + " " + s.Prefix.Addr().String()
	}
	return family + s.Field + " " + s.Prefix.String()
}

// String is the statement as nft lists it.
func (s Iif) String() string { return "iifname " + not(s.Not) + `"` + s.Name + `"` }

// String is the statement as nft lists it.
func (s Oif) String() string { return "oifname " + not(s.Not) + `"` + s.Name + `"` }

// String is the statement as nft lists it.
func (s InSet) String() string {
	family := "ip "
	if s.V6 {
		family = "ip6 "
	}
	return family + s.Field + " " + not(s.Not) + "@" + s.Set
}

// String is the statement as nft lists it.
func (s UDPDport) String() string { return "udp dport " + strconv.Itoa(int(s)) }

// String is the statement as nft lists it: nft prints raw payload in hexadecimal.
func (s VXLANVNI) String() string { return "@th,96,24 0x" + strconv.FormatUint(uint64(s), 16) }

// String is the statement as nft lists it.
func (NoReverse) String() string { return "fib saddr . iif oif missing" }

// String is the statement as nft lists it.
func (NotRouteIPsec) String() string { return "rt ipsec missing" }

// String is the statement as nft lists it.
func (Masquerade) String() string { return "masquerade" }

// String is the statement as nft lists it.
func (s Verdict) String() string { return string(s) }

// String is the statement as nft lists it.
func (s MarkComment) String() string { return `comment "` + string(s) + `"` }

// String says what was found.
func (s Unknown) String() string { return "<" + string(s) + ">" }

// String is the rule as nft lists it.
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

// SameBase says whether two chains differ in nothing but their rules.
func (c Chain) SameBase(o Chain) bool {
	return c.Type == o.Type && c.Hook == o.Hook && c.Priority == o.Priority
}

// Equal compares two chains with their rules.
func (c Chain) Equal(o Chain) bool {
	return c.SameBase(o) && slices.EqualFunc(c.Rules, o.Rules, Rule.Equal)
}

// SameType says whether two sets differ in nothing but their elements.
func (s Set) SameType(o Set) bool {
	return s.V6 == o.V6 && s.Interval == o.Interval && s.Other == o.Other
}

// Equal compares two sets with their elements.
func (s Set) Equal(o Set) bool { return s.SameType(o) && slices.Equal(s.Elements, o.Elements) }
