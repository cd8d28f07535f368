// Package mtu computes the overhead of encapsulations. No other package knows this overhead.
package mtu

import "github.com/lariat-net/lariat/pkg/metadata"

// VXLANOverIPv4 and VXLANOverIPv6 are the octets that VXLAN adds before the inner IP packet (RFC
// 7348 §5): inner Ethernet 14, VXLAN 8, UDP 8, and the outer IPv4 (20) or IPv6 (40) header.
// The outer Ethernet header does not count against the underlay's MTU.
const (
	VXLANOverIPv4 = 14 + 8 + 8 + 20
	VXLANOverIPv6 = 14 + 8 + 8 + 40
)

// These are the octets of ESP in tunnel mode (RFC 4303 §2) without the outer IP header and padding.
// SPI and sequence number have 8 octets.
// The integrity check value has 16 octets with every suite that Lariat offers.
// UDP encapsulation (RFC 3948) adds a header of 8 octets.
const (
	espHeader  = 8
	espICV     = 16
	espTrailer = 2 // pad length and next header, encrypted and padded with the packet
	udpHeader  = 8
)

// ESP returns the size in octets of the largest inner packet for a given size of underlay packets.
// The initialisation vector has iv octets. The cipher encrypts blocks of block octets.
// block is 4 when the cipher has no blocks (RFC 4303 §2.4).
// The outer packet is IPv4 or IPv6, with or without UDP.
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

// ipsec returns the size of the largest inner packet for every suite that two hosts may negotiate.
// The fallback suite, AES-CBC, has the largest overhead.
// The result includes UDP, because only IKE detects NAT.
func ipsec(underlay int, v6 bool) int { return ESP(underlay, 16, 16, v6, true) }

// Default is the assumed MTU of an underlay with an unknown MTU.
const Default = 1500

// MinIPv6 is the smallest MTU on which IPv6 works (RFC 8200 §5).
const MinIPv6 = 1280

// Container returns the MTU in octets of containers' interfaces and the network's device on host h.
// This is the network's MTU when it is set, or else the underlay's MTU minus the overhead.
func Container(n metadata.Network, h metadata.Host) int {
	if n.MTU != 0 {
		return n.MTU
	}
	return Underlay(h) - Overhead(n, h)
}

// Underlay returns the MTU in octets of the interface that carries the host's tunnels.
func Underlay(h metadata.Host) int {
	if len(h.Underlay) == 0 || h.Underlay[0].MTU == 0 {
		return Default
	}
	return h.Underlay[0].MTU
}

// Overhead returns the octets that the network's encapsulation adds to a packet.
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
