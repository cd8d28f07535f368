// Package mtu is the only place that knows what encapsulation costs.
package mtu

import "github.com/lariat-net/lariat/pkg/metadata"

// Octets that VXLAN adds in front of the inner IP packet (RFC 7348 §5): inner Ethernet 14, VXLAN 8, UDP 8, and the outer
// IPv4 (20) or IPv6 (40) header. The outer Ethernet header does not count against the underlay's MTU.
const (
	VXLANOverIPv4 = 14 + 8 + 8 + 20
	VXLANOverIPv6 = 14 + 8 + 8 + 40
)

// Default is assumed of an underlay that does not tell its MTU.
const Default = 1500

// MinIPv6 is the smallest MTU on which IPv6 works (RFC 8200 §5).
const MinIPv6 = 1280

// Container is the MTU, in octets, of containers' interfaces on host h and of the network's device there: what the network
// says, or the underlay's less the overhead.
func Container(n metadata.Network, h metadata.Host) int {
	if n.MTU != 0 {
		return n.MTU
	}
	return Underlay(h) - Overhead(n, h)
}

// Underlay is the MTU, in octets, of the interface that carries the host's tunnels.
func Underlay(h metadata.Host) int {
	if len(h.Underlay) == 0 || h.Underlay[0].MTU == 0 {
		return Default
	}
	return h.Underlay[0].MTU
}

// Overhead is what the network's encapsulation adds to a packet, in octets.
func Overhead(n metadata.Network, h metadata.Host) int {
	switch {
	case n.Encapsulation != metadata.EncapVXLAN:
		return 0
	case h.UnderlayAddr().Is6():
		return VXLANOverIPv6
	}
	return VXLANOverIPv4
}
