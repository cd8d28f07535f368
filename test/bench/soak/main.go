// Command soak lets a small cluster live for a while as a large one does for months, and then asks
// what is left of it: three hosts and a visitor in namespaces, the store on the first, containers that
// come and go by CNI calls, helpers that are killed, a store that is away for seconds. Every container
// is pinged as long as it lives.
//
//	make bench/soak T=25m
//
// It exits with 1 when a packet was lost, an operation failed that had no reason to, something was
// left over, or a process has grown. docs/design/soak.md says what counts. The operations follow from
// -seed; what meets what depends on the machine.
package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/lariat-net/lariat/test/lab"
)

// leave in the environment makes the program leave one attachment lying: what it is there for must then show.
const leave = "LARIAT_SOAK_LEAVE"

type options struct {
	duration time.Duration
	seed     uint64
	rate     float64
	settle   time.Duration
	log      string
}

func main() {
	if where := os.Getenv(asKeys); where != "" {
		if err := printKeys(context.Background(), where); err != nil {
			fmt.Fprintln(os.Stderr, "soak:", err)
			os.Exit(1)
		}
		return
	}
	var o options
	flag.DurationVar(&o.duration, "t", 30*time.Second, "how long operations go on")
	flag.Uint64Var(&o.seed, "seed", uint64(time.Now().UnixNano()%1e9), "of the operations")
	flag.Float64Var(&o.rate, "rate", 5, "operations a second")
	flag.DurationVar(&o.settle, "settle", 3*time.Minute,
		"how long it may take at the end until nothing is left over; the manager's own timers are a minute each")
	flag.StringVar(&o.log, "log", "", "write what the helpers say to this `file`")
	flag.Parse()
	lab.Enter()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	faults, err := run(ctx, o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
	}
	if err != nil || faults > 0 {
		os.Exit(1)
	}
}

// run returns the number of faults that were found.
func run(ctx context.Context, o options) (faults int, err error) {
	_ = os.Setenv("PATH", os.Getenv("PATH")+":/usr/local/sbin:/usr/sbin:/sbin") // an ordinary user's may lack them
	peers := os.Getenv("LARIAT_PEERS")
	if peers == "" {
		bin, err := lab.Bin()
		if err != nil {
			return 0, err
		}
		peers = filepath.Join(bin, "peers")
	}
	if _, err := os.Stat(filepath.Join(peers, "portmap")); err != nil {
		return 0, fmt.Errorf("ports are published by the reference plugin portmap; run make peers: %w", err)
	}
	log := &logs{}
	if o.log != "" {
		if log.file, err = os.Create(o.log); err != nil {
			return 0, err
		}
		defer log.file.Close()
	}
	r := newReport()
	r.printf("soak: seed %d, %s, %g operations a second", o.seed, o.duration, o.rate)
	c, err := lab.New(lab.Options{Hosts: 4, Log: log})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, c.Down()) }()
	s := newSoak(c, r, o)
	defer s.traffic.close()
	if err := s.up(ctx); err != nil {
		return 0, err
	}
	before, err := s.look(ctx)
	if err != nil {
		return 0, err
	}
	r.printf("soak: up and warm after %s; operations begin", r.age())
	s.operate(ctx)
	r.printf("soak: operations ended; everything is taken down")
	if err := s.down(ctx); err != nil {
		return 0, err
	}
	if os.Getenv(leave) != "" {
		c, err := s.add(ctx, c.Hosts[0], networks[1], false)
		if err != nil {
			return 0, err
		}
		s.silence(c)
	}
	after, left := s.settled(ctx, before)
	s.conclude(before, after, left)
	r.printf("  %d lines of level ERROR in the helpers' logs", log.count())
	return r.print(), ctx.Err()
}

// logs counts what the helpers complain about.
type logs struct {
	mu     sync.Mutex
	errors int
	file   *os.File
}

// Write implements io.Writer.
func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for in := bufio.NewScanner(bytes.NewReader(p)); in.Scan(); {
		if bytes.Contains(in.Bytes(), []byte("ERROR")) {
			l.errors++
		}
	}
	if l.file != nil {
		_, _ = l.file.Write(p)
	}
	return len(p), nil
}

func (l *logs) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.errors
}
