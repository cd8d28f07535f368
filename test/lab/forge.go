package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// This file is for attackers: it builds packets that no honest program sends. All builders return whole IP
// packets, headers included, unless they say otherwise.

// IP is a packet of a protocol; hops is its TTL or hop limit.
func IP(proto byte, src, dst netip.Addr, hops byte, body []byte) []byte {
	if src.Is6() {
		p := make([]byte, 40, 40+len(body))
		p[0], p[6], p[7] = 0x60, proto, hops
		binary.BigEndian.PutUint16(p[4:], uint16(len(body)))
		copy(p[8:], src.AsSlice())
		copy(p[24:], dst.AsSlice())
		return append(p, body...)
	}
	p := make([]byte, 20, 20+len(body))
	p[0], p[8], p[9] = 0x45, hops, proto
	binary.BigEndian.PutUint16(p[2:], uint16(20+len(body)))
	copy(p[12:], src.AsSlice())
	copy(p[16:], dst.AsSlice())
	binary.BigEndian.PutUint16(p[10:], sum(p))
	return append(p, body...)
}

// UDP is a datagram.
func UDP(src, dst netip.AddrPort, payload []byte) []byte {
	b := make([]byte, 8, 8+len(payload))
	binary.BigEndian.PutUint16(b, src.Port())
	binary.BigEndian.PutUint16(b[2:], dst.Port())
	binary.BigEndian.PutUint16(b[4:], uint16(8+len(payload)))
	b = append(b, payload...)
	binary.BigEndian.PutUint16(b[6:], transportSum(unix.IPPROTO_UDP, src.Addr(), dst.Addr(), b))
	return IP(unix.IPPROTO_UDP, src.Addr(), dst.Addr(), 64, b)
}

// SYN opens a TCP connection.
func SYN(src, dst netip.AddrPort) []byte {
	b := make([]byte, 20)
	binary.BigEndian.PutUint16(b, src.Port())
	binary.BigEndian.PutUint16(b[2:], dst.Port())
	b[12], b[13] = 5<<4, 2
	binary.BigEndian.PutUint16(b[14:], 1024)
	binary.BigEndian.PutUint16(b[16:], transportSum(unix.IPPROTO_TCP, src.Addr(), dst.Addr(), b))
	return IP(unix.IPPROTO_TCP, src.Addr(), dst.Addr(), 64, b)
}

// ICMP is a message of the family of its addresses; rest is all that follows the checksum.
func ICMP(kind, code byte, src, dst netip.Addr, hops byte, rest []byte) []byte {
	b := append([]byte{kind, code, 0, 0}, rest...)
	if src.Is6() {
		binary.BigEndian.PutUint16(b[2:], transportSum(unix.IPPROTO_ICMPV6, src, dst, b))
		return IP(unix.IPPROTO_ICMPV6, src, dst, hops, b)
	}
	binary.BigEndian.PutUint16(b[2:], sum(b))
	return IP(unix.IPPROTO_ICMP, src, dst, hops, b)
}

// RouterAdvertisement makes its sender a default router for half an hour, and lets hosts make themselves
// addresses of a prefix.
func RouterAdvertisement(src, dst netip.Addr, mac net.HardwareAddr, prefix netip.Prefix) []byte {
	// hop limit, flags, lifetime, reachable and retransmission timers
	b := []byte{64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0}
	b = append(append(b, 1, 1), mac...) // source link-layer address
	b = append(b, 3, 4, byte(prefix.Bits()), 0xc0, 0, 0, 0x0e, 0x10, 0, 0, 0x0e, 0x10, 0, 0, 0, 0)
	b = append(b, prefix.Masked().Addr().AsSlice()...)
	return ICMP(134, 0, src, dst, 255, b)
}

// NeighbourSolicitation asks for target's MAC and tells the sender's.
func NeighbourSolicitation(src, target netip.Addr, mac net.HardwareAddr) []byte {
	b := append(make([]byte, 4), target.AsSlice()...)
	return ICMP(135, 0, src, target, 255, append(append(b, 1, 1), mac...))
}

// NeighbourAdvertisement tells the sender's MAC unasked.
func NeighbourAdvertisement(src, dst netip.Addr, mac net.HardwareAddr) []byte {
	b := append([]byte{0x20, 0, 0, 0}, src.AsSlice()...)
	return ICMP(136, 0, src, dst, 255, append(append(b, 2, 1), mac...))
}

// TooBig is a router's complaint to the source of a packet that it does not fit into the MTU of the way to
// its destination.
func TooBig(router netip.Addr, mtu int, packet []byte) []byte {
	quote := packet[:min(len(packet), 512)]
	if packet[0]>>4 == 6 {
		return ICMP(2, 0, router, netip.AddrFrom16([16]byte(packet[8:24])), 64,
			append(binary.BigEndian.AppendUint32(nil, uint32(mtu)), quote...))
	}
	return ICMP(3, 4, router, netip.AddrFrom4([4]byte(packet[12:16])), 64,
		append(binary.BigEndian.AppendUint16([]byte{0, 0}, uint16(mtu)), quote...))
}

// Hops gives a packet another TTL or hop limit.
func Hops(packet []byte, hops byte) []byte {
	if packet[0]>>4 == 6 {
		packet[7] = hops
		return packet
	}
	packet[8], packet[10], packet[11] = hops, 0, 0
	binary.BigEndian.PutUint16(packet[10:], sum(packet[:20]))
	return packet
}

var fragmentID atomic.Uint32

// Fragments cuts a packet in two; the first has so many octets (a multiple of 8) of what follows the IP header.
func Fragments(packet []byte, first int) [][]byte {
	id := fragmentID.Add(1)
	if packet[0]>>4 == 6 {
		src, dst, body := netip.AddrFrom16([16]byte(packet[8:24])), netip.AddrFrom16([16]byte(packet[24:40])), packet[40:]
		head := func(at int, more byte) []byte {
			h := binary.BigEndian.AppendUint16([]byte{packet[6], 0}, uint16(at)|uint16(more))
			return binary.BigEndian.AppendUint32(h, id)
		}
		return [][]byte{
			IP(unix.IPPROTO_FRAGMENT, src, dst, packet[7], append(head(0, 1), body[:first]...)),
			IP(unix.IPPROTO_FRAGMENT, src, dst, packet[7], append(head(first, 0), body[first:]...)),
		}
	}
	src, dst, body := netip.AddrFrom4([4]byte(packet[12:16])), netip.AddrFrom4([4]byte(packet[16:20])), packet[20:]
	cut := func(at int, more uint16, part []byte) []byte {
		p := IP(packet[9], src, dst, packet[8], part)
		binary.BigEndian.PutUint16(p[4:], uint16(id))
		binary.BigEndian.PutUint16(p[6:], uint16(at/8)|more<<13)
		p[10], p[11] = 0, 0
		binary.BigEndian.PutUint16(p[10:], sum(p[:20]))
		return p
	}
	return [][]byte{cut(0, 1, body[:first]), cut(first, 0, body[first:])}
}

// Ethernet is a frame around an IP packet.
func Ethernet(dst, src net.HardwareAddr, packet []byte) []byte {
	f := append(append(make([]byte, 0, 14+len(packet)), dst...), src...)
	kind := uint16(unix.ETH_P_IP)
	if packet[0]>>4 == 6 {
		kind = unix.ETH_P_IPV6
	}
	return append(binary.BigEndian.AppendUint16(f, kind), packet...)
}

// ARPRequest is a frame that asks for target and tells the sender's address.
func ARPRequest(mac net.HardwareAddr, sender, target netip.Addr) []byte {
	f := append(append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, mac...), 0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1)
	f = append(append(f, mac...), sender.AsSlice()...)
	return append(append(f, 0, 0, 0, 0, 0, 0), target.AsSlice()...)
}

// VXLAN is the payload of a tunnel's datagram: the header and an inner frame.
func VXLAN(vni uint32, frame []byte) []byte {
	return append([]byte{0x08, 0, 0, 0, byte(vni >> 16), byte(vni >> 8), byte(vni), 0}, frame...)
}

// Inner is the packet inside of a VXLAN datagram, whatever its port; false when this is none.
func (p Packet) Inner() (vni uint32, inner Packet, ok bool) {
	if p.Proto != unix.IPPROTO_UDP || len(p.Payload) < 8+8+14 || p.Payload[8] != 8 {
		return 0, Packet{}, false
	}
	inner = parse(p.Payload[16:])
	return binary.BigEndian.Uint32(p.Payload[12:]) >> 8, inner, inner.Src.IsValid()
}

// SendFrames puts frames on a device of the namespace as they are, which takes CAP_NET_RAW.
func (n Netns) SendFrames(dev string, frames ...[]byte) error {
	return n.Do(func() error {
		i, err := net.InterfaceByName(dev)
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for _, f := range frames {
			if err := unix.Sendto(fd, f, 0, &unix.SockaddrLinklayer{Ifindex: i.Index}); err != nil {
				return fmt.Errorf("send a frame of %d octets on %s of %s: %w", len(f), dev, n.Name, err)
			}
		}
		return nil
	})
}

// DoBare is Do without any capability: f can do what a container's process can do that was given none.
func (n Netns) DoBare(f func() error) error {
	return n.Do(func() error { // on a thread that ends with f
		if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
			return fmt.Errorf("drop ambient capabilities: %w", err)
		}
		head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		if err := unix.Capset(&head, &make([]unix.CapUserData, 2)[0]); err != nil {
			return fmt.Errorf("drop capabilities: %w", err)
		}
		return f()
	})
}

// SendUDP sends datagrams from a plain socket without capabilities. A from without address or port leaves it
// to the kernel.
func (n Netns) SendUDP(from, to netip.AddrPort, payloads ...[]byte) error {
	return n.DoBare(func() error {
		var local *net.UDPAddr
		if from.Port() != 0 || from.Addr().IsValid() {
			local = net.UDPAddrFromAddrPort(from)
		}
		conn, err := net.DialUDP("udp", local, net.UDPAddrFromAddrPort(to))
		if err != nil {
			return err
		}
		defer conn.Close()
		for _, p := range payloads {
			_, err := conn.Write(p)
			if errors.Is(err, unix.ECONNREFUSED) { // the answer to the one before
				_, err = conn.Write(p)
			}
			if err != nil && !errors.Is(err, unix.ECONNREFUSED) {
				return err
			}
		}
		return nil
	})
}

// sum is the Internet checksum (RFC 1071).
func sum(parts ...[]byte) uint16 {
	var s uint32
	for _, b := range parts {
		for ; len(b) > 1; b = b[2:] {
			s += uint32(b[0])<<8 | uint32(b[1])
		}
		if len(b) == 1 {
			s += uint32(b[0]) << 8
		}
	}
	for s>>16 != 0 {
		s = s>>16 + s&0xffff
	}
	return ^uint16(s)
}

// transportSum is the checksum of what stands behind the IP header, with the pseudo header.
func transportSum(proto byte, src, dst netip.Addr, body []byte) uint16 {
	n := uint32(len(body))
	s := sum(src.AsSlice(), dst.AsSlice(), []byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n), 0, 0, 0, proto},
		body)
	if s == 0 {
		s = 0xffff // 0 would mean none
	}
	return s
}
