package delta

import (
	"fmt"
	"net/netip"
	"strings"
)

// Port is one container's connection to its host: a routed veth pair.
//
//	container netns                         host netns
//	IfName: Addrs (/32, /128) ── veth ── HostName: HostMAC, fe80::1/64
//	default via Gateway, on-link             route to each address of Addrs
//
// There is no bridge, so there is no shared link on which anything could be spoofed.
type Port struct {
	Network     string
	ContainerID string
	IfName      string // inside of the container
	HostName    string // of the host's end, from HostName
	Alias       string // of the host's end, from Alias
	HostMAC     MAC
	MAC         MAC // of IfName
	MTU         int
	Addrs       []netip.Addr
	Gateways    []netip.Addr // one for each family of Addrs: on-link, with a permanent neighbour HostMAC
	Routes      []PortRoute  // inside of the container
}

// PortRoute is a route inside of a container, by the gateway of its family unless Via says otherwise.
type PortRoute struct {
	Dst      netip.Prefix
	Via      netip.Addr // must be one of the gateways
	MTU      int        // 0: the device's
	AdvMSS   int        // 0: the kernel's choice
	Priority int
	Table    int // 0: main
}

// PortPrefix begins the name of the host's end of every port.
const PortPrefix = "lrt"

// PortAlias is what the ifalias of a port's host end says. State can be rebuilt from it without any file.
type PortAlias struct{ Network, ContainerID, IfName, Name string }

// String is the ifalias: lariat:port:<network>:<container id>:<ifname>[:<name for people>]. The kernel takes 255 octets; the name is cut to fit.
func (a PortAlias) String() string {
	s := fmt.Sprintf("%sport:%s:%s:%s", AliasPrefix, a.Network, a.ContainerID, a.IfName)
	if a.Name != "" {
		s += ":" + a.Name
	}
	if len(s) > 255 {
		s = s[:255]
	}
	return s
}

// ParsePortAlias reads what String wrote. Names may hold colons, so they come last.
func ParsePortAlias(s string) (PortAlias, bool) {
	rest, ok := strings.CutPrefix(s, AliasPrefix+"port:")
	f := strings.SplitN(rest, ":", 4)
	if !ok || len(f) < 3 {
		return PortAlias{}, false
	}
	a := PortAlias{Network: f[0], ContainerID: f[1], IfName: f[2]}
	if len(f) == 4 {
		a.Name = f[3]
	}
	return a, true
}

// HostPort is the host's end of a port as the kernel holds it.
type HostPort struct {
	Name    string
	Index   int
	Alias   PortAlias
	Routes  []netip.Prefix // to the container's addresses
	HasPeer bool           // the other end is in some namespace that still exists (always so on Linux; kept for the fake)

	RPFilter int  // net.ipv4.conf.DEVICE.rp_filter
	AcceptRA int  // net.ipv6.conf.DEVICE.accept_ra
	NoIPv6   bool // net.ipv6.conf.DEVICE.disable_ipv6, or a kernel without IPv6
}

// Faults are the settings that keep a container from using others' addresses and from giving its host routes (CVE-2020-10749), as far
// as they are not what they should be. v6 says whether the container may have IPv6.
func (p HostPort) Faults(v6 bool) (out []Sysctl) {
	if p.RPFilter != 1 {
		out = append(out, Sysctl{"net/ipv4/conf/" + p.Name + "/rp_filter", "1"})
	}
	if p.AcceptRA != 0 {
		out = append(out, Sysctl{"net/ipv6/conf/" + p.Name + "/accept_ra", "0"})
	}
	if !v6 && !p.NoIPv6 {
		out = append(out, Sysctl{"net/ipv6/conf/" + p.Name + "/disable_ipv6", "1"})
	}
	return out
}
