// Package mtu is the only place that knows what encapsulation costs.
package mtu

import "github.com/lariat-net/lariat/pkg/metadata"

// Octets that VXLAN adds in front of the inner IP packet (RFC 7348 §5): inner Ethernet 14, VXLAN 8, UDP 8,
// and the outer IPv4 (20) or IPv6 (40) header. The outer Ethernet header does not count against the
// underlay's MTU.
const (
	VXLANOverIPv4 = 14 + 8 + 8 + 20
	VXLANOverIPv6 = 14 + 8 + 8 + 40
)

// Octets of ESP in tunnel mode (RFC 4303 §2) apart from the outer IP header and padding: SPI and sequence
// number 8, and an integrity check value of 16 with every suite that Lariat offers. UDP encapsulation (RFC
// 3948) adds a header of 8.
const (
	espHeader  = 8
	espICV     = 16
	espTrailer = 2 // pad length and next header, which are encrypted and padded with the packet
	udpHeader  = 8
)

// ESP is the longest inner packet, in octets, that fits an underlay packet of so many: with an initialisation
// vector of iv octets, encryption in blocks of so many octets (4 when the cipher has none, RFC 4303 §2.4),
// over IPv4 or IPv6, with or without UDP.
func ESP(underlay, iv, block int, v6, udp bool) int {
	room := underlay - 20 - espHeader - iv - espICV
	if v6 {
		room -= 20
	}
	if udp {
		room -= udpHeader
	}
	return room/block*block - espTrailer
}

// ipsec is what fits whatever two hosts agree on: the fallback suite, AES-CBC, takes most, and NAT, which
// brings UDP, is found out only by IKE.
func ipsec(underlay int, v6 bool) int { return ESP(underlay, 16, 16, v6, true) }

// Default is assumed of an underlay that does not tell its MTU.
const Default = 1500

// MinIPv6 is the smallest MTU on which IPv6 works (RFC 8200 §5).
const MinIPv6 = 1280

// Container is the MTU, in octets, of containers' interfaces on host h and of the network's device there:
// what the network says, or the underlay's less the overhead.
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
	case n.Encapsulation == metadata.EncapIPsec:
		return Underlay(h) - ipsec(Underlay(h), h.UnderlayAddr().Is6())
	case n.Encapsulation != metadata.EncapVXLAN:
		return 0
	case h.UnderlayAddr().Is6():
		return VXLANOverIPv6
	}
	return VXLANOverIPv4
}
