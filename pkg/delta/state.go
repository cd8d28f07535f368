// Package delta describes the desired and the observed state of a host's kernel, and their
// difference.
//
// A State is a plain value. Planners build the desired state from metadata. Package kernel observes
// the other state. Between returns the difference.
//
// Every object prints as an operator would type it, and the output is sorted.
// Therefore the golden files of the tests, "lariat plan" and bug reports share one notation.
//
// The package has no side effects and reads no clock.
package delta

import (
	"fmt"
	"net/netip"

	"github.com/lariat-net/lariat/pkg/metadata"
)

// Protocol is the routing protocol number that marks Lariat's routes and nexthops (rtm_protocol,
// nh_protocol). The kernel and the administrator use the numbers up to 4.
// iproute2's rt_protos does not assign 76.
const Protocol = 76

// AliasPrefix begins the ifalias of every link that Lariat owns.
const AliasPrefix = "lariat:"

// Table is the name of the nftables table, of family inet, that Lariat owns.
const Table = "lariat"

// MAC is a 48-bit Ethernet address.
type MAC [6]byte

// String returns the usual form, such as 0e:00:c0:00:02:01.
func (m MAC) String() string { return string(m.appendTo(nil)) }

func (m MAC) appendTo(b []byte) []byte {
	const hex = "0123456789abcdef"
	for i, c := range m {
		if i > 0 {
			b = append(b, ':')
		}
		b = append(b, hex[c>>4], hex[c&15])
	}
	return b
}

// TunnelPrefix begins the name of each of Lariat's XFRM interfaces.
const TunnelPrefix = "lrx"

// VTEPPrefix begins the name of each of Lariat's VXLAN devices.
const VTEPPrefix = "vtep"

// OverlayLinkGroup is the link group (IFLA_GROUP) of host ends and XFRM interfaces.
// Between these devices the packets of containers are not encrypted.
// nftables rules match the group, because a match of names costs more.
// The default group of every device is 0.
const OverlayLinkGroup = 76

// Kinds of links.
const (
	KindVXLAN = "vxlan"
	KindXFRM  = "xfrm"
)

// A Link is a device that Lariat creates. Package attach creates the veths of containers.
type Link struct {
	Kind  string
	VNI   uint32     // vxlan only
	Port  uint16     // vxlan only: the UDP port
	Local netip.Addr // vxlan only: the source of the outer packets
	MAC   MAC        // vxlan only
	IfID  uint32     // xfrm only: selects the policies of its packets
	Group uint32     // xfrm only: the link group
	MTU   int
	Alias string // begins with AliasPrefix

	// NoIPv6 disables IPv6 on the device (disable_ipv6) when no network uses IPv6 there.
	NoIPv6 bool

	// AcceptRA is the device's accept_ra.
	// Desired devices have 0: a peer must not give routes to this host.
	AcceptRA int

	// Down is set on an observed device that is not administratively up. Desired devices are up.
	Down bool

	// Other is empty on desired devices. On an observed device it names properties that Lariat's
	// devices never have, such as "learning" or "dev eth0". The words are those of ip.
	// Such a property cannot be changed in place, so the device must be re-created.
	Other string
}

// Remake reports whether old must be removed and re-created to become l.
// The kernel removes all objects on old with it.
func (l Link) Remake(old Link) bool {
	return l.Kind != old.Kind || l.VNI != old.VNI || l.Port != old.Port || l.Local != old.Local || l.IfID != old.IfID ||
		l.Other != old.Other
}

// An Addr is an address on a device.
type Addr struct {
	Dev    string
	Prefix netip.Prefix
}

// Neigh is a permanent neighbour entry's key; its value is the MAC.
type Neigh struct {
	Dev  string
	Addr netip.Addr
}

// An FDB is a permanent forwarding entry of a vxlan device.
// The kernel keeps one destination for a unicast MAC, so a plan names a MAC once on each device.
// An entry whose destination changes replaces the earlier entry.
type FDB struct {
	Dev string
	MAC MAC
	Dst netip.Addr
}

// A Nexthop is a nexthop object of protocol Protocol, keyed by its id.
type Nexthop struct {
	Via    netip.Addr
	Dev    string
	Onlink bool
}

// A RouteKey identifies a route within one table of the kernel.
// Among routes to one prefix the kernel takes the route with the smallest metric.
type RouteKey struct {
	Dst    netip.Prefix
	Metric uint32 // 0: none; the kernel reports 1024 for such an IPv6 route
}

// To returns the key of a route without a metric.
func To(dst netip.Prefix) RouteKey { return RouteKey{Dst: dst} }

// LastMetric is the metric of routes that yield to every other route to the same prefix, even to a
// foreign route.
const LastMetric = Protocol << 24

// A Route is a route of protocol Protocol in the main table.
type Route struct {
	Type   string     // "" (unicast), blackhole or unreachable; an observed route may have other types
	NH     uint32     // id of a nexthop object; 0: by Via and Dev
	Via    netip.Addr // invalid: on-link
	Dev    string
	Onlink bool
	Src    netip.Addr // preferred source; invalid: the kernel's choice
	MTU    int        // 0: the device's
}

// A Sysctl is a value under /proc/sys. The key uses slashes.
type Sysctl struct{ Key, Value string }

// A Set is an nftables set of the table Table. Interval sets hold prefixes.
// Other sets hold single addresses (as full-length prefixes).
type Set struct {
	V6       bool
	Interval bool
	Elements []netip.Prefix // sorted, without overlaps

	// Ports is not nil in a set of ports. The ports are sorted, and Elements is empty.
	// Such a set is re-created when its ports change.
	Ports []uint16

	// Other is empty on desired sets.
	// On an observed set it names a property that Lariat's sets never have. Such a set is re-created.
	Other string
}

// A Chain is a chain of the table Table. A base chain has the policy accept.
// Rules jump to a chain without Type and Hook.
type Chain struct {
	Type     string // filter or nat
	Hook     string // prerouting, input, forward, output, postrouting
	Priority int
	Rules    []Rule
}

// A Rule is a list of statements.
// The kinds of statements are few on purpose: each kind has one text and one meaning.
type Rule []Statement

// A Statement is one match or verdict of a rule. Every Statement is comparable.
type Statement interface {
	fmt.Stringer // as nft would list it
	statement()
}

// State keeps Lariat's objects in the kernel, either desired or observed.
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

	// Problems name the entries that could not be planned and were left out.
	// Each Problem is a sentence that names the entry and the remedy.
	// Problems are for people: Between ignores them.
	Problems []string
}

// NewState returns an empty state with all maps allocated.
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

// Len returns the number of objects.
func (s *State) Len() int {
	return len(s.Links) + len(s.Addrs) + len(s.Neighs) + len(s.FDB) + len(s.Nexthops) + len(s.Routes) + len(s.Sysctls) +
		len(s.Sets) + len(s.Chains)
}
