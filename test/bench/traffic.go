package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// trafficRole in the environment makes this program an end of a request-response exchange: "echo ADDRESS" or
// "ask ADDRESS SECONDS". It stands in for netperf's TCP_RR, which is not free software everywhere.
const trafficRole = "LARIAT_BENCH_TRAFFIC"

const rrPort = 7007

// reach says whether anything answers at an address: a refused connection is an answer.
func reach(address string) error {
	conn, err := net.DialTimeout("tcp", net.JoinHostPort(address, strconv.Itoa(rrPort)), 200*time.Millisecond)
	if err == nil {
		return conn.Close()
	}
	if errors.Is(err, unix.ECONNREFUSED) {
		return nil
	}
	return err
}

// exchange is what the asking end prints.
type exchange struct {
	Count   int     `json:"count"`
	Seconds float64 `json:"seconds"`
	P50us   float64 `json:"p50us"`
}

func traffic() {
	f := strings.Fields(os.Getenv(trafficRole))
	var err error
	switch {
	case len(f) == 2 && f[0] == "echo":
		err = echo(f[1])
	case len(f) == 3 && f[0] == "ask":
		err = ask(f[1], f[2])
	default:
		err = fmt.Errorf("%s=%q", trafficRole, f)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench traffic:", err)
		os.Exit(1)
	}
}

// tcp opens a blocking socket: a read that waits in the kernel shows the path, not Go's poller.
func tcp(address string) (int, *unix.SockaddrInet4, error) {
	a, err := netip.ParseAddr(address)
	if err != nil {
		return 0, nil, err
	}
	runtime.LockOSThread()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	return fd, &unix.SockaddrInet4{Port: rrPort, Addr: a.As4()}, err
}

func echo(address string) error {
	fd, sa, err := tcp(address)
	if err != nil {
		return err
	}
	if err := errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), unix.Bind(fd, sa),
		unix.Listen(fd, 8)); err != nil {
		return err
	}
	fmt.Println("ready")
	buf := make([]byte, 4096)
	for {
		conn, _, err := unix.Accept(fd)
		if err != nil {
			return err
		}
		if err := unix.SetsockoptInt(conn, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
			return err
		}
		for {
			n, err := unix.Read(conn, buf)
			if err != nil || n == 0 {
				break
			}
			if _, err := unix.Write(conn, buf[:n]); err != nil {
				break
			}
		}
		unix.Close(conn)
	}
}

func ask(address, seconds string) error {
	limit, err := strconv.ParseFloat(seconds, 64)
	if err != nil {
		return err
	}
	fd, sa, err := tcp(address)
	if err != nil {
		return err
	}
	if err := errors.Join(unix.Connect(fd, sa), unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY,
		1)); err != nil {
		return err
	}
	buf := make([]byte, 64)
	var took []float64
	start := time.Now()
	for last := start; last.Sub(start).Seconds() < limit; {
		if _, err := unix.Write(fd, buf); err != nil {
			return err
		}
		for n := 0; n < len(buf); {
			m, err := unix.Read(fd, buf[n:])
			if err != nil || m == 0 {
				return fmt.Errorf("read: %d octets, %w", m, errors.Join(err))
			}
			n += m
		}
		now := time.Now()
		took = append(took, float64(now.Sub(last))/1000)
		last = now
	}
	e := exchange{Count: len(took), Seconds: time.Since(start).Seconds()}
	slices.Sort(took)
	e.P50us = quantile(took, 0.5)
	return json.NewEncoder(os.Stdout).Encode(e)
}

// iperf is what we read of iperf3's report.
type iperf struct {
	Error string `json:"error"`
	End   struct {
		Received struct {
			BitsPerSecond float64 `json:"bits_per_second"`
		} `json:"sum_received"`
		Sum struct {
			Seconds float64 `json:"seconds"`
			Packets float64 `json:"packets"`
			Lost    float64 `json:"lost_packets"`
		} `json:"sum"`
	} `json:"end"`
}

// runIperf is one run of iperf3 against a server that listens at the address.
func runIperf(ns *namespace, address string, seconds float64, args ...string) (*iperf, error) {
	var out []byte
	err := ns.Do(func() (err error) {
		// iperf3 takes no fraction of a second; a run below one is bounded by what it sends.
		limit := []string{"-t", strconv.Itoa(int(seconds + 0.5))}
		if seconds < 0.5 {
			limit = []string{"-n", "1M"}
		}
		cmd := exec.Command("iperf3", slices.Concat([]string{"-c", address, "-J"}, limit, args)...)
		out, err = cmd.Output()
		return err
	})
	var r iperf
	if jerr := json.Unmarshal(out, &r); jerr == nil && r.Error != "" {
		return nil, fmt.Errorf("iperf3: %s", r.Error)
	}
	if err != nil {
		return nil, fmt.Errorf("iperf3: %w", err)
	}
	return &r, nil
}
