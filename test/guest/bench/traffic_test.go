package bench_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// wait is how long anything may take that should take no time.
const wait = 20 * time.Second

const port = 7007

func address(i int) *unix.SockaddrInet4 {
	return &unix.SockaddrInet4{Port: port, Addr: netip.MustParseAddr(container(i)).As4()}
}

// socket blocks in the kernel, and not in the poller of Go's, which would be measured too; but never for ever.
func socket() (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	return fd, limits(fd)
}

func limits(fd int) error {
	limit := unix.NsecToTimeval(int64(wait))
	return errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit),
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1))
}

func (p *path) listen(b *testing.B) {
	b.Helper()
	p.containers[1].Do(b, func() {
		var err error
		p.listener, err = socket()
		must(b, err)
		must(b, errors.Join(unix.Bind(p.listener, address(1)), unix.Listen(p.listener, 8)))
	})
	b.Cleanup(func() { unix.Close(p.listener) })
}

// connect is a connection from the first container to the second: both of its ends.
func (p *path) connect(b *testing.B) (from, to int) {
	b.Helper()
	p.containers[0].Do(b, func() {
		var err error
		from, err = socket()
		must(b, err)
		must(b, unix.Connect(from, address(1)))
	})
	to, _, err := unix.Accept(p.listener)
	must(b, err)
	must(b, limits(to))
	return from, to
}

// stream is one connection that sends all the time: what arrived a second, and how long the processors were
// busy for an octet of it. The start does not count.
func (p *path) stream(b *testing.B, seconds float64) (mbit, nanosPerOctet, octets float64) {
	b.Helper()
	from, to := p.connect(b)
	defer unix.Close(from)
	var received atomic.Int64
	// The two ends take turns, half a megabyte each: only what has just been read belongs to a moment.
	type reading struct {
		at     time.Time
		octets int64
	}
	var wanted atomic.Bool
	readings := make(chan reading, 1)
	ended := make(chan error, 1)
	go func() {
		defer unix.Close(to)
		for buf := make([]byte, 256<<10); ; {
			n, err := unix.Read(to, buf)
			if n <= 0 || err != nil {
				ended <- err
				return
			}
			octets := received.Add(int64(n))
			if wanted.CompareAndSwap(true, false) {
				readings <- reading{time.Now(), octets}
			}
		}
	}()
	buf := make([]byte, 128<<10)
	send := func(seconds float64) (reading, time.Duration) {
		for start := time.Now(); time.Since(start).Seconds() < seconds; {
			if _, err := unix.Write(from, buf); err != nil {
				b.Fatalf("%s: %v", p.name, err)
			}
		}
		wanted.Store(true)
		for {
			select {
			case r := <-readings:
				return r, busyTime(b)
			default:
			}
			if _, err := unix.Write(from, buf); err != nil {
				b.Fatalf("%s: %v", p.name, err)
			}
		}
	}
	before, earlier := send(min(0.3, seconds/3))
	after, busy := send(seconds)
	took, used, arrived := after.at.Sub(before.at), busy-earlier, after.octets-before.octets
	must(b, unix.Shutdown(from, unix.SHUT_WR))
	if err := <-ended; err != nil {
		b.Fatalf("%s: %v", p.name, err)
	}
	if arrived == 0 {
		b.Fatalf("%s: nothing arrived", p.name)
	}
	return float64(arrived) * 8 / 1e6 / took.Seconds(), float64(used.Nanoseconds()) / float64(arrived),
		float64(received.Load())
}

// exchanges sends 64 octets and waits for them to come back, again and again: how often that is done in a second.
func (p *path) exchanges(b *testing.B, seconds float64) float64 {
	b.Helper()
	from, to := p.connect(b)
	defer unix.Close(from)
	ended := make(chan error, 1)
	go func() {
		defer unix.Close(to)
		for buf := make([]byte, 64); ; {
			if err := readFull(to, buf); err != nil {
				ended <- nil // the other end is gone
				return
			}
			if _, err := unix.Write(to, buf); err != nil {
				ended <- err
				return
			}
		}
	}()
	buf := make([]byte, 64)
	n := 0
	start := time.Now()
	for ; time.Since(start).Seconds() < seconds; n++ {
		if _, err := unix.Write(from, buf); err != nil {
			b.Fatalf("%s: %v", p.name, err)
		}
		if err := readFull(from, buf); err != nil {
			b.Fatalf("%s: %v", p.name, err)
		}
	}
	took := time.Since(start)
	must(b, unix.Shutdown(from, unix.SHUT_WR))
	if err := <-ended; err != nil {
		b.Fatalf("%s: %v", p.name, err)
	}
	return float64(n) / took.Seconds()
}

func readFull(fd int, buf []byte) error {
	for n := 0; n < len(buf); {
		m, err := unix.Read(fd, buf[n:])
		if err != nil {
			return err
		}
		if m == 0 {
			return fmt.Errorf("ended after %d octets", n)
		}
		n += m
	}
	return nil
}

// busyTime is how long the processors of the machine have been doing something, whatever it was: /proc/stat
// counts hundredths of a second.
func busyTime(b *testing.B) (busy time.Duration) {
	b.Helper()
	data, err := os.ReadFile("/proc/stat")
	must(b, err)
	line, _, _ := strings.Cut(string(data), "\n")
	for i, word := range strings.Fields(line) {
		// its name; idle; idle and waiting for a disk; a guest's, which is counted as a user's
		if i == 0 || i == 4 || i == 5 || i > 8 {
			continue
		}
		n, err := strconv.ParseInt(word, 10, 64)
		must(b, err)
		busy += time.Duration(n) * 10 * time.Millisecond
	}
	return busy
}
