// Package delta says what a host's kernel should hold, what it holds, and what is left to do about it.
//
// A State is a plain value: planners build one from metadata, the kernel package observes another, and Between
// is the difference. Everything prints as an operator would have typed it, sorted, so that the golden files of the
// tests, "lariat plan", and bug reports are one and the same text.
//
// The package touches nothing and knows no clock.
package delta

import (
	"fmt"
	"net/netip"

	"github.com/lariat-net/lariat/pkg/metadata"
)

// Protocol is the routing protocol number that marks Lariat's routes and nexthops (rtm_protocol,
// nh_protocol). Numbers up to 4 are the kernel's and the administrator's; 76 is unassigned in iproute2's
// rt_protos.
const Protocol = 76

// AliasPrefix begins the ifalias of every link that Lariat owns.
const AliasPrefix = "lariat:"

// Table is the name of the nftables table, of family inet, that Lariat owns.
const Table = "lariat"

// MAC is the model's type.
type MAC = metadata.MAC

// TunnelPrefix begins the name of every XFRM interface of Lariat's, as VethPrefix that of every container's host end.
const TunnelPrefix = "lrx"

// VTEPPrefix begins the name of every VXLAN device of Lariat's.
const VTEPPrefix = "vtep"

// OverlayLinkGroup is the link group (IFLA_GROUP) of the devices between which the packets of containers are
// in clear: the host's ends of ports, and XFRM interfaces. nftables rules ask for it, which costs less than
// to compare names. 0 is everyone's default.
const OverlayLinkGroup = 76

// Kinds of links.
const (
	KindVXLAN = "vxlan"
	KindXFRM  = "xfrm"
)

// Link is a device that Lariat makes. Containers' veths are pkg/attach's.
type Link struct {
	Kind  string
	VNI   uint32     // of vxlan, as are
	Port  uint16     // the UDP port,
	Local netip.Addr // the source of the outer packets, and
	MAC   MAC
	IfID  uint32 // of xfrm: which policies its packets fall under,
	Group uint32 // and its link group
	MTU   int
	Alias string // begins with AliasPrefix

	// NoIPv6 keeps IPv6 off the device (disable_ipv6), where no network has any on it.
	NoIPv6 bool

	// AcceptRA is the device's accept_ra. Desired devices have 0: whoever is behind them may not give this host routes.
	AcceptRA int

	// Down is set on an observed device that is not administratively up. Desired devices are up.
	Down bool

	// Other is empty on desired devices. On an observed one it names, as ip does, what a device of ours never has and
	// what cannot be changed without making it again, such as "learning" or "dev eth0".
	Other string
}

// Remake says whether a device l can only be had by removing old and making it again. Everything on old goes with it.
func (l Link) Remake(old Link) bool {
	return l.Kind != old.Kind || l.VNI != old.VNI || l.Port != old.Port || l.Local != old.Local || l.IfID != old.IfID ||
		l.Other != old.Other
}

// Addr is an address on a device.
type Addr struct {
	Dev    string
	Prefix netip.Prefix
}

// Neigh is a permanent neighbour entry's key; its value is the MAC.
type Neigh struct {
	Dev  string
	Addr netip.Addr
}

// FDB is a permanent forwarding entry of a vxlan device. The kernel keeps one destination for a unicast MAC,
// so a plan names a MAC once on each device, and an entry whose destination changes replaces the one before
// it.
type FDB struct {
	Dev string
	MAC MAC
	Dst netip.Addr
}

// Nexthop is a nexthop object of protocol Protocol, keyed by its id.
type Nexthop struct {
	Via    netip.Addr
	Dev    string
	Onlink bool
}

// RouteKey is what the kernel tells a table's routes apart by. Of routes to one prefix the smallest metric is taken.
type RouteKey struct {
	Dst    netip.Prefix
	Metric uint32 // 0: none, which for IPv6 the kernel calls 1024
}

// To is the key of a route without a metric.
func To(dst netip.Prefix) RouteKey { return RouteKey{Dst: dst} }

// LastMetric is of routes that every other one of the same prefix comes before, whoever made it.
const LastMetric = Protocol << 24

// Route is a route of protocol Protocol in the main table.
type Route struct {
	Type   string     // "" (unicast), blackhole or unreachable; an observed one may have other words of ip's
	NH     uint32     // id of a nexthop object; 0: by Via and Dev
	Via    netip.Addr // invalid: on-link
	Dev    string
	Onlink bool
	Src    netip.Addr // preferred source; invalid: the kernel's choice
	MTU    int        // 0: the device's
}

// Sysctl is a value under /proc/sys; the key uses slashes.
type Sysctl struct{ Key, Value string }

// Set is an nftables set of the table Table. Interval sets hold prefixes, others single addresses (as
// full-length prefixes).
type Set struct {
	V6       bool
	Interval bool
	Elements []netip.Prefix // sorted, without overlaps

	// Ports, when not nil, are what a set of ports holds, sorted; it has no Elements then. Such a set is made
	// anew to be changed.
	Ports []uint16

	// Other is empty on desired sets. On an observed one it says what it is that ours never are; such a set is made again.
	Other string
}

// Chain is a chain of the table Table: a base chain, whose policy is accept, or, without Type and Hook, one
// that rules jump to.
type Chain struct {
	Type     string // filter or nat
	Hook     string // prerouting, input, forward, output, postrouting
	Priority int
	Rules    []Rule
}

// Rule is a row of statements. The kinds of statements are few on purpose: each has one text and one meaning.
type Rule []Statement

// Statement is one match or verdict of a rule. Every one is comparable.
type Statement interface {
	fmt.Stringer // as nft would list it
	statement()
}

// State is what the kernel should hold, or holds, of what Lariat owns.
type State struct {
	Links    map[string]Link
	Addrs    map[Addr]struct{}
	Neighs   map[Neigh]MAC
	FDB      map[FDB]struct{}
	Nexthops map[uint32]Nexthop
	Routes   map[RouteKey]Route
	Sysctls  map[string]string
	Sets     map[string]Set
	Chains   map[string]Chain

	// Problems are entries that could not be planned and were left out, each a sentence that names the entry and
	// the remedy. They are for people: they make no difference between two states.
	Problems []string
}

// NewState returns an empty state with all of its maps made.
func NewState() *State {
	return &State{
		Links:    map[string]Link{},
		Addrs:    map[Addr]struct{}{},
		Neighs:   map[Neigh]MAC{},
		FDB:      map[FDB]struct{}{},
		Nexthops: map[uint32]Nexthop{},
		Routes:   map[RouteKey]Route{},
		Sysctls:  map[string]string{},
		Sets:     map[string]Set{},
		Chains:   map[string]Chain{},
	}
}

// Len is the number of objects.
func (s *State) Len() int {
	return len(s.Links) + len(s.Addrs) + len(s.Neighs) + len(s.FDB) + len(s.Nexthops) + len(s.Routes) + len(s.Sysctls) +
		len(s.Sets) + len(s.Chains)
}
