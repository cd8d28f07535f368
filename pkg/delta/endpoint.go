package delta

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// An Endpoint is one container's connection to its host: a routed veth pair.
//
//	container netns                         host netns
//	IfName: Addrs (/32, /128) ── veth ── HostName: HostMAC, fe80::1/64
//	default via Gateway, on-link             route to each address of Addrs
//
// There is no bridge, so there is no shared link on which a container could spoof another one.
type Endpoint struct {
	Network     string
	ContainerID string
	IfName      string // in the container
	HostName    string // of the host end, from HostName
	Alias       string // of the host end, from Alias
	HostMAC     MAC
	MAC         MAC // of IfName
	MTU         int
	Addrs       []netip.Addr
	Gateways    []netip.Addr    // one for each family of Addrs: on-link, with a permanent neighbour HostMAC
	Sources     []netip.Addr    // the host's source addresses towards the container, one for each family
	Routes      []EndpointRoute // in the container
}

// An EndpointRoute is a route in a container. Without Via it uses the gateway of its family.
type EndpointRoute struct {
	Dst      netip.Prefix
	Via      netip.Addr // must be one of the gateways
	MTU      int        // 0: the device's
	AdvMSS   int        // 0: the kernel's choice
	Priority int
	Table    int // 0: main
}

// VethPrefix begins the name of every host end.
const VethPrefix = "lrt"

// EndpointAlias keeps the content of a host end's ifalias.
// Lariat can rebuild its state from ifaliases without any file.
type EndpointAlias struct{ Network, ContainerID, IfName, Name string }

// String returns the ifalias: lariat:port:<network>:<container id>:<ifname>[:<name for people>].
// The kernel takes 255 bytes, so String cuts the name to fit.
func (a EndpointAlias) String() string {
	s := fmt.Sprintf("%sport:%s:%s:%s", AliasPrefix, a.Network, a.ContainerID, a.IfName)
	if a.Name != "" {
		s += ":" + a.Name
	}
	if len(s) > 255 {
		s = s[:255]
	}
	return s
}

// ParseEndpointAlias parses the output of EndpointAlias.String.
// A name comes last, because it may hold colons.
func ParseEndpointAlias(s string) (EndpointAlias, bool) {
	rest, ok := strings.CutPrefix(s, AliasPrefix+"port:")
	f := strings.SplitN(rest, ":", 4)
	if !ok || len(f) < 3 {
		return EndpointAlias{}, false
	}
	a := EndpointAlias{Network: f[0], ContainerID: f[1], IfName: f[2]}
	if len(f) == 4 {
		a.Name = f[3]
	}
	return a, true
}

// GatewayAddress6 is the IPv6 address on the host end of every endpoint that has IPv6.
// It is the container's gateway.
var GatewayAddress6 = netip.MustParsePrefix("fe80::1/64")

// VethInfo describes the host end of an endpoint, either observed or desired.
type VethInfo struct {
	Name  string
	Index int // the kernel's interface index; 0 in a desired VethInfo
	Alias EndpointAlias

	Up     bool
	Group  uint32
	MAC    MAC
	MTU    int
	Routes map[netip.Prefix]Route // to the container's addresses

	Gateway6   bool // has GatewayAddress6
	RPFilter   int  // net.ipv4.conf.DEVICE.rp_filter
	Forwarding bool // net.ipv4.conf.DEVICE.forwarding
	AcceptRA   int  // net.ipv6.conf.DEVICE.accept_ra
	NoIPv6     bool // net.ipv6.conf.DEVICE.disable_ipv6, or a kernel without IPv6
}

// Veth returns the desired host end of the endpoint.
func (p Endpoint) Veth() VethInfo {
	h := VethInfo{Name: p.HostName, Alias: EndpointAlias{Network: p.Network, ContainerID: p.ContainerID, IfName: p.IfName},
		Up: true, Group: OverlayLinkGroup, MAC: p.HostMAC, MTU: p.MTU, Routes: map[netip.Prefix]Route{},
		RPFilter: 1, Forwarding: true, NoIPv6: true}
	for _, a := range p.Addrs {
		r := Route{Dev: p.HostName}
		for _, src := range p.Sources {
			if src.BitLen() == a.BitLen() {
				r.Src = src
			}
		}
		h.Routes[netip.PrefixFrom(a, a.BitLen())] = r
		if a.Is6() {
			h.NoIPv6, h.Gateway6 = false, true
		}
	}
	return h
}

// Faults returns the desired properties that a host end lacks, in the notation of State.String.
// It returns nothing for a host end in a link group of its own: a DEL is removing that host end.
func (p VethInfo) Faults(want VethInfo) (out []string) {
	if p.Group>>24 == Protocol {
		return nil
	}
	wrong := func(is bool, format string, a ...any) {
		if is {
			out = append(out, fmt.Sprintf(format, a...))
		}
	}
	setting := func(is bool, key, value string) {
		wrong(is, "%s", SysctlString(strings.Replace(key, "DEVICE", want.Name, 1), value))
	}
	// These settings keep a container from using foreign addresses.
	// They also keep a container from giving routes to its host (CVE-2020-10749).
	setting(p.RPFilter != want.RPFilter, "net/ipv4/conf/DEVICE/rp_filter", "1")
	setting(p.AcceptRA != want.AcceptRA, "net/ipv6/conf/DEVICE/accept_ra", "0")
	setting(p.NoIPv6 && !want.NoIPv6, "net/ipv6/conf/DEVICE/disable_ipv6", "0")
	setting(!p.NoIPv6 && want.NoIPv6, "net/ipv6/conf/DEVICE/disable_ipv6", "1")
	// Without these properties no packets pass, or large packets do not pass.
	setting(p.Forwarding != want.Forwarding, "net/ipv4/conf/DEVICE/forwarding", "1")
	wrong(p.Up != want.Up, "link  %s up", want.Name)
	wrong(p.Group != want.Group, "link  %s group %d", want.Name, want.Group)
	wrong(p.MAC != want.MAC, "link  %s address %s", want.Name, want.MAC)
	wrong(want.MTU != 0 && p.MTU != want.MTU, "link  %s mtu %d", want.Name, want.MTU)
	wrong(!p.Gateway6 && want.Gateway6, "addr  %s dev %s", GatewayAddress6, want.Name)
	for _, dst := range slices.SortedFunc(maps.Keys(want.Routes), netip.Prefix.Compare) {
		r, ok := p.Routes[dst]
		wrong(!ok || r != want.Routes[dst], "%s", RouteString(To(dst), want.Routes[dst]))
	}
	return out
}

// An EndpointFault is an endpoint whose host end differs from the desired host end.
type EndpointFault struct {
	Want  VethInfo
	Lacks []string // the result of VethInfo.Faults
}
