package delta

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// Endpoint is one container's connection to its host: a routed veth pair.
//
//	container netns                         host netns
//	IfName: Addrs (/32, /128) ── veth ── HostName: HostMAC, fe80::1/64
//	default via Gateway, on-link             route to each address of Addrs
//
// There is no bridge, so there is no shared link on which anything could be spoofed.
type Endpoint struct {
	Network     string
	ContainerID string
	IfName      string // inside of the container
	HostName    string // of the host's end, from HostName
	Alias       string // of the host's end, from Alias
	HostMAC     MAC
	MAC         MAC // of IfName
	MTU         int
	Addrs       []netip.Addr
	Gateways    []netip.Addr    // one for each family of Addrs: on-link, with a permanent neighbour HostMAC
	Sources     []netip.Addr    // the host's own addresses, one for each family: from which it speaks to the container
	Routes      []EndpointRoute // inside of the container
}

// EndpointRoute is a route inside of a container, by the gateway of its family unless Via says otherwise.
type EndpointRoute struct {
	Dst      netip.Prefix
	Via      netip.Addr // must be one of the gateways
	MTU      int        // 0: the device's
	AdvMSS   int        // 0: the kernel's choice
	Priority int
	Table    int // 0: main
}

// VethPrefix begins the name of the host's end of every port.
const VethPrefix = "lrt"

// EndpointAlias is what the ifalias of a port's host end says. State can be rebuilt from it without any file.
type EndpointAlias struct{ Network, ContainerID, IfName, Name string }

// String is the ifalias: lariat:port:<network>:<container id>:<ifname>[:<name for people>]. The kernel takes
// 255 octets; the name is cut to fit.
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

// ParseEndpointAlias reads what String wrote. Names may hold colons, so they come last.
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

// GatewayAddress6 is the IPv6 address on the host's end of every port that has IPv6: the container's gateway.
var GatewayAddress6 = netip.MustParsePrefix("fe80::1/64")

// VethInfo is the host's end of a port: as the kernel holds it, or as it should be.
type VethInfo struct {
	Name  string
	Index int // of the kernel's; 0 of a wanted one
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

// Veth is the host's end of the port.
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

// Faults returns what a port lacks of what it should be, in the words that State has for such things. A port
// that is being removed is in a link group of its own, and has none.
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
	// These keep containers from using others' addresses, and from giving their host routes (CVE-2020-10749).
	setting(p.RPFilter != want.RPFilter, "net/ipv4/conf/DEVICE/rp_filter", "1")
	setting(p.AcceptRA != want.AcceptRA, "net/ipv6/conf/DEVICE/accept_ra", "0")
	setting(p.NoIPv6 && !want.NoIPv6, "net/ipv6/conf/DEVICE/disable_ipv6", "0")
	setting(!p.NoIPv6 && want.NoIPv6, "net/ipv6/conf/DEVICE/disable_ipv6", "1")
	// Without these no packet comes through, or not the large ones.
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

// EndpointFault is a port whose host end is not what it should be.
type EndpointFault struct {
	Want  VethInfo
	Lacks []string // as VethInfo.Faults says it
}
