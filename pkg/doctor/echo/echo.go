// Package echo asks another host "do you hear me, and what is your clock?" over UDP on the underlay, and
// answers others that ask.
//
// The network manager serves it, "lariat doctor" asks. From the answers follow what metadata cannot tell:
// whether UDP passes between two hosts at all, how large a packet may be (asked with don't-fragment set), and
// how far the clocks are apart.
//
// A packet is at least 32 octets, in network order:
//
//	 0  4  "LRTE"
//	 4  1  version, 1
//	 5  1  1 question, 2 answer
//	 6  1  flags of the question, repeated in the answer: 1 asks for an answer as long as the question
//	 7  1  0
//	 8  8  nonce of the question, repeated in the answer
//	16  8  answer: the answering host's clock, nanoseconds since 1970; question: 0
//	24  4  answer: octets of the question's UDP payload; question: 0
//	28  4  0
//	32  …  padding, 0
//
// It is of no use to an attacker as an amplifier: an answer is never longer than its question, answers are
// counted against a rate, a server may answer hosts of the cluster only, and an answer is not itself
// answered. It tells nothing but the time. A forged answer needs the nonce.
package echo

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/metadata"
)

// Port is the UDP port on which network managers answer.
const Port = metadata.ProbePort

// MinSize is the length of the smallest packet; MaxSize that of the largest question, which fits the largest IP packet.
const (
	MinSize = 32
	MaxSize = 65507
)

// Octets of headers in front of a packet: UDP's 8 and IP's.
const (
	OverheadIPv4 = 28
	OverheadIPv6 = 48
)

const (
	magic    = "LRTE"
	version  = 1
	question = 1
	answer   = 2
	sameSize = 1
)

// Answer is what a host said.
type Answer struct {
	RTT      time.Duration
	Received int           // octets that arrived there
	Skew     time.Duration // its clock less ours, as exact as half the round trip
}

// ErrSilent is wrapped when no answer came in time.
var ErrSilent = errors.New("no answer")

// ErrTooLarge is wrapped when this host's own kernel refuses to send a packet of the size.
var ErrTooLarge = errors.New("packet too large for the interface")

// ErrRefused is wrapped when the other host says that nobody listens there.
var ErrRefused = errors.New("nobody listens there")

// Server answers. Its zero value answers anyone, at most 500 times a second.
type Server struct {
	Allow func(netip.Addr) bool // whom to answer; nil: anyone
	Rate  int                   // answers a second; 0: 500
	Now   func() time.Time      // nil: time.Now
}

// Serve answers anyone's questions on a host's underlay address and the port Port until the context ends,
// which is no error. It gives up only when it cannot listen. A Server that knows the cluster's hosts can
// answer these alone.
func Serve(ctx context.Context, addr netip.Addr) error {
	return Server{}.Serve(ctx, netip.AddrPortFrom(addr, Port).String())
}

// Serve answers on addr ("192.0.2.1:4788") until the context ends.
func (s Server) Serve(ctx context.Context, addr string) error {
	conn, err := s.Listen(ctx, addr)
	if err != nil {
		return err
	}
	return s.ServeConn(ctx, conn)
}

// Listen opens the socket, so that a caller knows that it is open before it goes on. Answers leave it with
// don't-fragment set.
func (s Server) Listen(ctx context.Context, addr string) (*net.UDPConn, error) {
	lc := net.ListenConfig{Control: dontFragment}
	c, err := lc.ListenPacket(ctx, "udp", addr)
	if err != nil {
		return nil, fmt.Errorf("doctor's responder: listen on %s: %w", addr, err)
	}
	return c.(*net.UDPConn), nil
}

// ServeConn answers on a socket from Listen and closes it.
func (s Server) ServeConn(ctx context.Context, conn *net.UDPConn) error {
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })()
	now := s.Now
	if now == nil {
		now = time.Now
	}
	bucket := bucket{rate: s.Rate}
	if bucket.rate == 0 {
		bucket.rate = 500
	}
	buf := make([]byte, MaxSize+1)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(buf)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("doctor's responder on %s: %w", conn.LocalAddr(), err)
			}
			continue // an ICMP error about an earlier answer
		}
		at := now()
		p := buf[:n]
		if n < MinSize || n > MaxSize || string(p[:4]) != magic || p[4] != version || p[5] != question {
			continue
		}
		if s.Allow != nil && !s.Allow(from.Addr().Unmap()) || !bucket.take(at) {
			continue
		}
		p[5] = answer
		binary.BigEndian.PutUint64(p[16:], uint64(at.UnixNano()))
		binary.BigEndian.PutUint32(p[24:], uint32(n))
		if p[6]&sameSize == 0 {
			p = p[:MinSize]
		}
		_, _ = conn.WriteToUDPAddrPort(p, from) // an answer that cannot be sent is a lost one: who asked asks again
	}
}

// bucket lets rate answers through in each second. Questions come one after the other, so it needs no lock.
type bucket struct {
	rate  int
	left  float64
	since time.Time
}

func (b *bucket) take(now time.Time) bool {
	switch passed := now.Sub(b.since).Seconds(); {
	case b.since.IsZero() || passed >= 1 || passed < 0: // also when the clock was set back
		b.left = float64(b.rate)
	default:
		b.left = min(b.left+passed*float64(b.rate), float64(b.rate))
	}
	b.since = now
	if b.left < 1 {
		return false
	}
	b.left--
	return true
}

// Prober asks one host.
type Prober struct {
	Local   netip.Addr     // to ask from; zero: the kernel's choice
	Peer    netip.AddrPort // whom to ask
	Tries   int            // 0: 3; a single lost packet is no finding
	Timeout time.Duration  // of each try; 0: 400 ms
}

// Ask sends a question of so many octets of UDP payload, with don't-fragment set. With back it wants an answer as long.
func (p Prober) Ask(ctx context.Context, size int, back bool) (Answer, error) {
	size = max(size, MinSize)
	if size > MaxSize {
		return Answer{}, fmt.Errorf("ask %s: %d octets: %w", p.Peer, size, ErrTooLarge)
	}
	tries, timeout := p.Tries, p.Timeout
	if tries == 0 {
		tries = 3
	}
	if timeout == 0 {
		timeout = 400 * time.Millisecond
	}
	d := net.Dialer{Control: dontFragment}
	if p.Local.IsValid() {
		d.LocalAddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(p.Local, 0))
	}
	conn, err := d.DialContext(ctx, "udp", p.Peer.String())
	if err != nil {
		return Answer{}, fmt.Errorf("ask %s: %w", p.Peer, err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	req := make([]byte, size)
	copy(req, magic)
	req[4], req[5] = version, question
	if back {
		req[6] = sameSize
	}
	got := make([]byte, MaxSize)
	for range tries {
		if _, err := rand.Read(req[8:16]); err != nil {
			return Answer{}, fmt.Errorf("ask %s: %w", p.Peer, err)
		}
		sent := time.Now()
		if _, err := conn.Write(req); errors.Is(err, unix.EMSGSIZE) {
			return Answer{}, fmt.Errorf("ask %s with %d octets: %w", p.Peer, size, ErrTooLarge)
		} else if errors.Is(err, unix.ECONNREFUSED) { // about the try before
			return Answer{}, fmt.Errorf("ask %s: %w", p.Peer, ErrRefused)
		} else if err != nil {
			return Answer{}, fmt.Errorf("ask %s: %w", p.Peer, err)
		}
		if err := conn.SetReadDeadline(sent.Add(timeout)); err != nil {
			return Answer{}, fmt.Errorf("ask %s: %w", p.Peer, err)
		}
		for {
			if ctx.Err() != nil {
				return Answer{}, fmt.Errorf("ask %s: %w", p.Peer, ctx.Err())
			}
			n, err := conn.Read(got)
			rtt := time.Since(sent)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if errors.Is(err, unix.ECONNREFUSED) {
				return Answer{}, fmt.Errorf("ask %s: %w", p.Peer, ErrRefused)
			}
			if err != nil {
				continue // an ICMP error from the way; the deadline ends this
			}
			if a, ok := parse(got[:n], req, sent, rtt); ok {
				return a, nil
			}
		}
	}
	if ctx.Err() != nil {
		return Answer{}, fmt.Errorf("ask %s: %w", p.Peer, ctx.Err())
	}
	return Answer{}, fmt.Errorf("ask %s with %d octets: %w after %d tries", p.Peer, size, ErrSilent, tries)
}

// parse reads an answer to req. ok is false when it is none: the nonce is what a forger does not know. Who
// answers may say anything else, so that is bounded by what can be.
func parse(got, req []byte, sent time.Time, rtt time.Duration) (a Answer, ok bool) {
	if len(got) < MinSize || string(got[:4]) != magic || got[4] != version || got[5] != answer ||
		string(got[8:16]) != string(req[8:16]) {
		return Answer{}, false
	}
	received := binary.BigEndian.Uint32(got[24:])
	if received > uint32(len(req)) || len(got) > len(req) {
		return Answer{}, false
	}
	there := time.Unix(0, int64(binary.BigEndian.Uint64(got[16:])))
	return Answer{RTT: rtt, Received: int(received), Skew: there.Sub(sent.Round(0).Add(rtt / 2))}, true
}

// Overhead is what IP and UDP put in front of a question to a.
func Overhead(a netip.Addr) int {
	if a.Unmap().Is4() {
		return OverheadIPv4
	}
	return OverheadIPv6
}

// PathMTU finds the size of the largest IP packet that reaches the peer and comes back, at most most octets.
// It asks once when that size passes; otherwise it halves the doubt until it knows exactly.
func (p Prober) PathMTU(ctx context.Context, most int) (int, error) {
	over := Overhead(p.Peer.Addr())
	pass := func(mtu int) (bool, error) {
		_, err := p.Ask(ctx, mtu-over, true)
		switch {
		case err == nil:
			return true, nil
		case errors.Is(err, ErrSilent), errors.Is(err, ErrTooLarge):
			return false, nil
		}
		return false, err
	}
	if ok, err := pass(most); ok || err != nil {
		return most, err
	}
	good, bad := MinSize+over, most
	if ok, err := pass(good); err != nil || !ok {
		return 0, errors.Join(err, fmt.Errorf("path to %s: %w", p.Peer.Addr(), ErrSilent))
	}
	for bad-good > 1 {
		mid := (good + bad) / 2
		ok, err := pass(mid)
		if err != nil {
			return good, err
		}
		if ok {
			good = mid
		} else {
			bad = mid
		}
	}
	return good, nil
}

// dontFragment sets the DF bit and ignores what the kernel has learned of the path, both for IPv4 and IPv6: a
// probe must see for itself.
func dontFragment(network, _ string, c syscall.RawConn) error {
	var err error
	cerr := c.Control(func(fd uintptr) {
		if network == "udp4" {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE)
			return
		}
		err = errors.Join(unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE),
			unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_DONTFRAG, 1))
		// A dual-stack socket carries IPv4 as well; where it does not, this fails and does not matter.
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE)
	})
	return errors.Join(cerr, err)
}
