package echo

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"
)

// serve starts a responder on loopback and returns its address.
func serve(t *testing.T, s Server, addr string) netip.AddrPort {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	conn, err := s.Listen(ctx, addr)
	if err != nil {
		t.Skipf("no loopback here: %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- s.ServeConn(ctx, conn) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the end of its context is no error: %v", err)
		}
	})
	return conn.LocalAddr().(*net.UDPAddr).AddrPort()
}

func TestAskAndAnswer(t *testing.T) {
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
		t.Run(addr, func(t *testing.T) {
			t.Parallel()
			peer := serve(t, Server{Now: func() time.Time { return time.Now().Add(time.Hour) }}, addr)
			p := Prober{Peer: peer}
			for _, size := range []int{0, MinSize, 1472, 9000} {
				a, err := p.Ask(t.Context(), size, true)
				if err != nil {
					t.Fatal(err)
				}
				if a.Received != max(size, MinSize) {
					t.Errorf("asked with %d, %d arrived", size, a.Received)
				}
				if off := (a.Skew - time.Hour).Abs(); off > a.RTT/2+time.Millisecond {
					t.Errorf("skew %s is wrong by %s, the round trip took %s", a.Skew, off, a.RTT)
				}
			}
		})
	}
}

func TestNoAmplifier(t *testing.T) {
	peer := serve(t, Server{}, "127.0.0.1:0")
	c, err := net.Dial("udp", peer.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	packet := func(size int, kind, flags, ver byte, head string) []byte {
		b := make([]byte, size)
		copy(b, head)
		b[4], b[5], b[6] = ver, kind, flags
		return b
	}
	// What must not be answered, and at the end one that is, so that silence is known without waiting for it.
	for _, b := range [][]byte{
		packet(MinSize-1, question, 0, version, magic), packet(MinSize, answer, 0, version, magic),
		packet(MinSize, question, 0, 2, magic), packet(MinSize, question, 0, version, "NOPE"),
	} {
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	last := packet(MinSize, question, sameSize, version, magic)
	last[8] = 77
	c.Write(last)
	buf := make([]byte, MaxSize)
	c.SetReadDeadline(time.Now().Add(5 * time.Second))
	if n, err := c.Read(buf); err != nil || n != MinSize || buf[8] != 77 {
		t.Fatalf("the first answer is to another question: %d octets, %v", n, err)
	}
	for _, tc := range []struct {
		size  int
		flags byte
		want  int
	}{{1000, 0, MinSize}, {1000, sameSize, 1000}, {MinSize, sameSize, MinSize}, {MinSize, 0xff, MinSize}} {
		c.Write(packet(tc.size, question, tc.flags, version, magic))
		if n, err := c.Read(buf); err != nil || n != tc.want {
			t.Errorf("%d octets with flags %d: answer of %d, want %d (%v)", tc.size, tc.flags, n, tc.want, err)
		}
	}
}

func TestRateAndStrangers(t *testing.T) {
	now := time.Unix(1000, 0)
	b := bucket{rate: 10}
	count := func() (n int) {
		for range 100 {
			if b.take(now) {
				n++
			}
		}
		return n
	}
	for _, step := range []struct {
		by   time.Duration
		want int
	}{{0, 10}, {0, 0}, {300 * time.Millisecond, 3}, {time.Hour, 10}, {-2 * time.Hour, 10}, {0, 0}} {
		now = now.Add(step.by)
		if got := count(); got != step.want {
			t.Errorf("after %s: %d answers, want %d", step.by, got, step.want)
		}
	}

	peer := serve(t, Server{Allow: func(a netip.Addr) bool { return a == netip.MustParseAddr("192.0.2.1") }},
		"127.0.0.1:0")
	_, err := Prober{Peer: peer, Tries: 2, Timeout: 20 * time.Millisecond}.Ask(t.Context(), 0, false)
	if !errors.Is(err, ErrSilent) {
		t.Errorf("a stranger was answered: %v", err)
	}
}

func TestNobodyListens(t *testing.T) {
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Skip(err)
	}
	peer := c.LocalAddr().(*net.UDPAddr).AddrPort()
	c.Close()
	if _, err := (Prober{Peer: peer}).Ask(t.Context(), 0, false); !errors.Is(err, ErrRefused) {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := (Prober{Peer: peer}).Ask(ctx, 0, false); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func TestPathMTUOfLoopback(t *testing.T) {
	peer := serve(t, Server{}, "127.0.0.1:0")
	if got, err := (Prober{Peer: peer}).PathMTU(t.Context(), 9000); err != nil || got != 9000 {
		t.Errorf("%d, %v", got, err)
	}
}

func FuzzServer(f *testing.F) {
	// Whatever arrives, an answer is never longer, and a proper question is still answered afterwards.
	ctx, cancel := context.WithCancel(context.Background())
	s := Server{Rate: 1 << 30}
	conn, err := s.Listen(ctx, "127.0.0.1:0")
	if err != nil {
		f.Skip(err)
	}
	go s.ServeConn(ctx, conn)
	f.Cleanup(cancel)
	f.Add([]byte("LRTE\x01\x01\x01\x00"))
	f.Add(append([]byte("LRTE\x01\x01\x01\x00"), make([]byte, 100)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 60000 {
			return
		}
		c, err := net.Dial("udp", conn.LocalAddr().String())
		if err != nil {
			t.Skip(err)
		}
		defer c.Close()
		c.Write(b)
		last := make([]byte, MinSize)
		copy(last, magic)
		last[4], last[5], last[8] = version, question, 99
		c.Write(last)
		buf := make([]byte, MaxSize)
		for {
			c.SetReadDeadline(time.Now().Add(5 * time.Second))
			n, err := c.Read(buf)
			if err != nil {
				t.Fatal(err)
			}
			if n == MinSize && buf[8] == 99 {
				return
			}
			if n > len(b) {
				t.Fatalf("%d octets were answered with %d", len(b), n)
			}
		}
	})
}

// FuzzAnswer: an answer has the question's nonce, and says nothing that cannot be.
func FuzzAnswer(f *testing.F) {
	req := make([]byte, 100)
	copy(req, magic)
	req[4], req[5] = version, question
	copy(req[8:16], "noncenon")
	good := append([]byte{}, req[:MinSize]...)
	good[5], good[27] = answer, 100
	f.Add(good)
	f.Add(append(append([]byte{}, good...), make([]byte, 68)...))
	f.Add(good[:MinSize-1])
	f.Add([]byte("LRTE\x01\x02\x00\x00another!\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, ok := parse(b, req, time.Unix(1000, 0), time.Millisecond)
		if !ok {
			return
		}
		if string(b[8:16]) != "noncenon" || b[5] != answer || a.Received < 0 || a.Received > len(req) || len(b) > len(req) {
			t.Errorf("%x: %+v", b, a)
		}
	})
}
