package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
)

// Ping sends ICMP echo requests of size octets of payload from the namespace until one is answered or the
// context ends, and returns the round trip of that one.
func (n Netns) Ping(ctx context.Context, to netip.Addr, size int) (rtt time.Duration, err error) {
	err = n.Do(func() error {
		rtt, err = ping(ctx, to, size)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("ping %s from %s: %w", to, n.Name, err)
	}
	return rtt, nil
}

func ping(ctx context.Context, to netip.Addr, size int) (time.Duration, error) {
	network, local, echo, reply, proto := "ip4:icmp", "0.0.0.0", icmp.Type(ipv4.ICMPTypeEcho),
		icmp.Type(ipv4.ICMPTypeEchoReply), 1
	if to.Is6() {
		network, local, echo, reply, proto = "ip6:ipv6-icmp", "::", ipv6.ICMPTypeEchoRequest, ipv6.ICMPTypeEchoReply, 58
	}
	conn, err := icmp.ListenPacket(network, local)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	id, last := os.Getpid()&0xffff, errors.New("no answer")
	buf := make([]byte, 65536)
	for seq := 0; ctx.Err() == nil; seq++ {
		msg, err := (&icmp.Message{Type: echo, Body: &icmp.Echo{ID: id, Seq: seq, Data: make([]byte, size)}}).Marshal(nil)
		if err != nil {
			return 0, err
		}
		start := time.Now()
		wait := start.Add(250 * time.Millisecond)
		conn.SetReadDeadline(wait)
		if _, err := conn.WriteTo(msg, &net.IPAddr{IP: to.AsSlice()}); err != nil {
			last = err // no route yet, say
			timer := time.NewTimer(20 * time.Millisecond)
			select {
			case <-ctx.Done():
			case <-timer.C:
			}
			continue
		}
		for {
			k, from, err := conn.ReadFrom(buf)
			if err != nil {
				break
			}
			m, err := icmp.ParseMessage(proto, buf[:k])
			if err != nil {
				continue
			}
			if e, ok := m.Body.(*icmp.Echo); ok && m.Type == reply && e.ID == id && e.Seq == seq &&
				from.String() == to.String() {
				return time.Since(start), nil
			}
		}
	}
	return 0, fmt.Errorf("%w: %w", last, ctx.Err())
}

// Transfer sends octets over TCP from the namespace to another one and returns how long it took.
func (n Netns) Transfer(ctx context.Context, to Netns, addr netip.Addr, octets int64) (time.Duration, error) {
	var l net.Listener
	err := to.Do(func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(addr, 0).String())
		return err
	})
	if err != nil {
		return 0, err
	}
	defer l.Close()
	received := make(chan error, 1)
	go func() {
		conn, err := l.Accept()
		if err == nil {
			var got int64
			got, err = io.Copy(io.Discard, conn)
			conn.Close()
			if err == nil && got != octets {
				err = fmt.Errorf("%d of %d octets arrived", got, octets)
			}
		}
		received <- err
	}()
	var took time.Duration
	err = n.Do(func() error {
		start := time.Now()
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", l.Addr().String())
		if err != nil {
			return err
		}
		if _, err := io.CopyN(conn, zeros{}, octets); err != nil {
			conn.Close()
			return err
		}
		conn.Close()
		err = <-received
		took = time.Since(start)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("transfer from %s to %s: %w", n.Name, addr, err)
	}
	return took, nil
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
