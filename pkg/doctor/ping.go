package doctor

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"
)

// errNoEcho is the error for an echo request without a reply.
var errNoEcho = errors.New("no reply")

// ping sends echo requests from one overlay address to another until one is answered. The kernel wraps them as it wraps
// containers' packets, so a reply proves the tunnel in both directions. It needs CAP_NET_RAW.
func ping(ctx context.Context, from, to netip.Addr, tries int, timeout time.Duration) error {
	network, request, reply := "ip4:icmp", byte(8), byte(0)
	if to.Is6() {
		network, request, reply = "ip6:ipv6-icmp", 128, 129
	}
	conn, err := net.ListenPacket(network, from.String())
	if err != nil {
		return fmt.Errorf("ping %s from %s: %w", to, from, err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	packet := make([]byte, 8+16)
	packet[0] = request
	if _, err := rand.Read(packet[4:]); err != nil { // identifier, sequence and payload distinguish our reply
		return err
	}
	if to.Is4() {
		binary.BigEndian.PutUint16(packet[2:], checksum(packet)) // the kernel adds the checksum of ICMPv6
	}
	buf := make([]byte, 1500)
	for range tries {
		if _, err := conn.WriteTo(packet, &net.IPAddr{IP: to.AsSlice()}); err != nil {
			return fmt.Errorf("ping %s from %s: %w", to, from, err)
		}
		if err := conn.SetReadDeadline(time.Now().Add(timeout)); err != nil {
			return fmt.Errorf("ping %s from %s: %w", to, from, err)
		}
		for ctx.Err() == nil {
			n, _, err := conn.ReadFrom(buf)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return fmt.Errorf("ping %s from %s: %w", to, from, err)
			}
			if answers(buf[:n], packet, reply) {
				return nil
			}
		}
	}
	return fmt.Errorf("ping %s from %s: %w", to, from, errors.Join(errNoEcho, ctx.Err()))
}

// answers reports whether an ICMP message of the type reply answers the request. The request's
// identifier, sequence and payload distinguish our reply from foreign ones.
func answers(message, request []byte, reply byte) bool {
	return len(message) == len(request) && len(message) >= 8 && message[0] == reply && message[1] == 0 &&
		string(message[4:]) == string(request[4:])
}

// checksum returns the Internet checksum (RFC 1071).
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
