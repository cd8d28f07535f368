package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// phases run in this order.
var phases = []struct {
	name string
	run  func(*cluster) error
}{
	{"join", (*cluster).join},
	{"idle", (*cluster).idle},
	{"propagation", (*cluster).propagation},
	{"herd", (*cluster).herd},
	{"outage", (*cluster).outage},
	{"stop", (*cluster).stop},
	{"view", (*cluster).view},
}

func phaseNames() []string {
	var out []string
	for _, p := range phases[1:] {
		out = append(out, p.name)
	}
	return out
}

func (c *cluster) add(phase, what, unit string, value float64) {
	if !math.IsNaN(value) { // nobody came so far
		c.t.add(len(c.hosts), phase, what, unit, value)
	}
}

// define makes a network with a block for each of 16 000 hosts, and waits until all hosts that run know it.
func (c *cluster) define(name, subnet string) error {
	n := metadata.Network{Subnets: []netip.Prefix{netip.MustParsePrefix(subnet)}, Encapsulation: metadata.EncapVXLAN}
	if err := c.store.client.Put(c.ctx, metadata.KindNetwork, name, n); err != nil {
		return err
	}
	_, _, err := c.each(func(h *host) error {
		if h.p == nil {
			return nil
		}
		_, err := until(c.ctx, 30*time.Second, func(ctx context.Context) error {
			var n metadata.Network
			return h.client.Get(ctx, metadata.KindNetwork, name, &n)
		})
		return err
	})
	return err
}

// attach gives a new container of the host an address.
func (c *cluster) attach(ctx context.Context, h *host, network, id string) error {
	_, err := h.client.Attach(ctx, network, metadata.AttachRequest{ContainerID: h.name + id, IfName: "eth0"})
	return err
}

// join starts all hosts at once. Each claims its first block as soon as it is ready, as the network
// manager would.
func (c *cluster) join() error {
	if err := c.define("lan", "10.0.0.0/12"); err != nil {
		return err
	}
	before, err := c.etcd.Status(c.ctx)
	if err != nil {
		return err
	}
	var mu sync.Mutex
	refused, ready := 0, 0.0
	start := time.Now()
	failed, took, first := c.each(func(h *host) error {
		if err := c.start(h); err != nil {
			return err
		}
		mu.Lock()
		ready = max(ready, time.Since(start).Seconds())
		mu.Unlock()
		n, err := until(c.ctx, time.Minute, func(ctx context.Context) error { return h.client.Join(ctx, "lan") })
		mu.Lock()
		defer mu.Unlock()
		refused += n
		return err
	})
	if first != nil {
		return fmt.Errorf("%d failed: %w", failed, first)
	}
	after, err := c.etcd.Status(c.ctx)
	if err != nil {
		return err
	}
	used, err := c.load()
	c.add("join", "until all are ready", "s", ready)
	c.add("join", "until all have a block", "s", took)
	c.add("join", "hosts that failed", "", float64(failed))
	c.add("join", "calls of join refused", "", float64(refused))
	written := float64(after.Revision - before.Revision)
	c.add("join", "revisions of the store for each host", "", written/float64(len(c.hosts)))
	c.add("join", "processor time of each host", "ms", 1000*used.hosts/float64(len(c.hosts)))
	return err
}

// idle counts what a settled cluster costs.
func (c *cluster) idle() error {
	if err := c.wait(2 * time.Second); err != nil {
		return err
	}
	_, revision, err := c.counts()
	if err != nil {
		return err
	}
	before, err := c.load()
	if err != nil {
		return err
	}
	if err := c.wait(c.o.idle); err != nil {
		return err
	}
	after, err := c.load()
	if err != nil {
		return err
	}
	_, revision2, err := c.counts()
	c.add("idle", "of one processor, each host", "%",
		100*(after.hosts-before.hosts)/c.o.idle.Seconds()/float64(len(c.hosts)))
	c.add("idle", "of one processor, the store", "%", 100*(after.store-before.store)/c.o.idle.Seconds())
	c.add("idle", "resident memory of each host", "MiB", after.resident)
	c.add("idle", "revisions of the store", "", revision2-revision)
	return err
}

// wait lets time pass, for what can only be counted over time.
func (c *cluster) wait(d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-c.ctx.Done():
		return c.ctx.Err()
	}
}

// propagation writes an object at one host after another, and notes when each host's watch tells of it.
func (c *cluster) propagation() error {
	ctx, cancel := context.WithCancel(c.ctx)
	defer cancel()
	const probe = "probe"
	type sight struct {
		change int
		at     time.Time
	}
	seen := make(chan sight, len(c.hosts)*c.o.changes)
	opened := make(chan error, len(c.hosts))
	var wg sync.WaitGroup
	for _, h := range c.hosts {
		wg.Go(func() {
			req, err := http.NewRequestWithContext(ctx, "GET", "http://lariat/v1/watch", nil)
			if err != nil {
				opened <- err
				return
			}
			r, err := h.http.Do(req)
			if err != nil {
				opened <- err
				return
			}
			defer r.Body.Close()
			in := bufio.NewReaderSize(r.Body, 64<<10)
			_, err = in.ReadString('\n') // the snapshot
			opened <- err
			for err == nil {
				var line string
				if line, err = in.ReadString('\n'); err != nil {
					return
				}
				if _, rest, ok := strings.Cut(line, `"change":"`); ok {
					number, _, _ := strings.Cut(rest, `"`)
					if n, err := strconv.Atoi(number); err == nil {
						seen <- sight{n, time.Now()}
					}
				}
			}
		})
	}
	for range c.hosts {
		if err := <-opened; err != nil {
			return err
		}
	}
	before, err := c.load()
	if err != nil {
		return err
	}
	var samples []float64
	for i := range c.o.changes {
		h := c.hosts[i%len(c.hosts)]
		start := time.Now()
		// A write answers when its host knows of it.
		o := metadata.Host{Name: probe, Labels: map[string]string{"change": strconv.Itoa(i)}}
		if err := h.client.Put(ctx, metadata.KindHost, probe, o); err != nil {
			return err
		}
		for range c.hosts {
			select {
			case s := <-seen:
				samples = append(samples, float64(s.at.Sub(start))/float64(time.Millisecond))
			case <-time.After(30 * time.Second):
				return fmt.Errorf("change %d was not told by all hosts within 30 s", i)
			}
		}
	}
	after, err := c.load()
	if err != nil {
		return err
	}
	cancel()
	wg.Wait()
	slices.Sort(samples)
	c.add("propagation", "p50", "ms", quantile(samples, 0.5))
	c.add("propagation", "p99", "ms", quantile(samples, 0.99))
	each := 1000 * (after.hosts - before.hosts) / float64(c.o.changes*len(c.hosts))
	c.add("propagation", "processor time of each host for a change", "ms", each)
	c.add("propagation", "processor time of the store for a change", "ms",
		1000*(after.store-before.store)/float64(c.o.changes))
	return c.store.client.Do(c.ctx, "DELETE", "/v1/hosts/"+probe, nil, nil)
}

// herd lets all hosts allocate on a network that none of them has a block of.
func (c *cluster) herd() error {
	if err := c.define("herd", "10.16.0.0/16"); err != nil {
		return err
	}
	writes, revision, err := c.counts()
	if err != nil {
		return err
	}
	var mu sync.Mutex
	var samples []float64
	start := time.Now()
	refused := 0
	failed, took, first := c.each(func(h *host) error {
		n, err := until(c.ctx, time.Minute, func(ctx context.Context) error { return c.attach(ctx, h, "herd", "-herd") })
		mu.Lock()
		defer mu.Unlock()
		samples = append(samples, 1000*time.Since(start).Seconds())
		refused += n
		return err
	})
	if first != nil {
		return fmt.Errorf("%d failed: %w", failed, first)
	}
	writes2, revision2, err := c.counts()
	slices.Sort(samples)
	n := float64(len(c.hosts))
	c.add("herd", "until all have an address", "s", took)
	c.add("herd", "p50", "ms", quantile(samples, 0.5))
	c.add("herd", "calls refused", "", float64(refused))
	c.add("herd", "transactions", "", writes2-writes)
	c.add("herd", "revisions of the store for each host", "", (revision2-revision)/n)
	return err
}

// recovered measures from a moment on when each host allocates again, and returns the seconds until
// the median and the last.
func (c *cluster) recovered(id string, since time.Time) (p50, last float64, err error) {
	var mu sync.Mutex
	var samples []float64
	_, _, err = c.each(func(h *host) error {
		_, err := until(c.ctx, 5*time.Minute, func(ctx context.Context) error { return c.attach(ctx, h, "lan", id) })
		mu.Lock()
		defer mu.Unlock()
		samples = append(samples, time.Since(since).Seconds())
		return err
	})
	slices.Sort(samples)
	return quantile(samples, 0.5), quantile(samples, 1), err
}

// outage takes the store away.
func (c *cluster) outage() error {
	c.store.p.Kill()
	if err := c.wait(c.o.outage); err != nil {
		return err
	}
	if err := c.start(c.store); err != nil {
		return err
	}
	p50, last, err := c.recovered("-outage", time.Now())
	what := "store away for " + c.o.outage.String() + ", then until "
	c.add("outage", what+"half allocate", "s", p50)
	c.add("outage", what+"all allocate", "s", last)
	return err
}

// stop ends the store and a host, in both ways.
func (c *cluster) stop() error {
	start := time.Now()
	if err := c.store.p.Stop(); err != nil {
		return err
	}
	c.add("stop", "SIGTERM of the store, until it is gone", "s", time.Since(start).Seconds())
	if err := c.start(c.store); err != nil {
		return err
	}
	_, last, err := c.recovered("-term", time.Now())
	if err != nil {
		return err
	}
	c.add("stop", "SIGTERM of the store, until all allocate", "s", last)
	c.store.p.Kill()
	if err := c.start(c.store); err != nil {
		return err
	}
	if _, last, err = c.recovered("-kill", time.Now()); err != nil {
		return err
	}
	c.add("stop", "kill -9 of the store, until all allocate", "s", last)
	h := c.hosts[len(c.hosts)/2]
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		start := time.Now()
		if sig == syscall.SIGKILL {
			h.p.Kill()
		} else if err := h.p.Stop(); err != nil {
			return err
		}
		if err := c.start(h); err != nil {
			return err
		}
		if err := c.attach(c.ctx, h, "lan", "-"+strconv.Itoa(int(sig))); err != nil {
			return err
		}
		how := map[syscall.Signal]string{syscall.SIGKILL: "kill -9", syscall.SIGTERM: "SIGTERM"}[sig]
		c.add("stop", how+" of a host, until it allocates", "s", time.Since(start).Seconds())
	}
	return nil
}

// view fills the store with hosts and blocks, starts all hosts anew at once, and asks them.
func (c *cluster) view() error {
	if err := c.define("big", "10.128.0.0/9"); err != nil {
		return err
	}
	var changes []store.Change
	put := func(key string, o any) error {
		data, err := json.Marshal(o)
		changes = append(changes, store.Change{Key: key, Value: data})
		return err
	}
	for i := range c.o.hosts {
		id, a := fmt.Sprintf("%032d", i), netip.AddrFrom4([4]byte{172, 30, byte(i >> 8), byte(i)})
		h := metadata.Host{Name: fmt.Sprintf("synthetic%05d", i), MachineID: id, BootID: id, Joined: time.Unix(1e9, 0).UTC(),
			AgentVersion: "synthetic", MAC: metadata.MAC{0x0e, 0, 0xff, 0, byte(i >> 8), byte(i)},
			Underlay: []metadata.Underlay{{Address: netip.PrefixFrom(a, 16), Device: "eth0", MTU: 1500}}}
		if err := put("view/hosts/"+h.Name, h); err != nil {
			return err
		}
	}
	a := netip.MustParseAddr("10.128.0.0").As4()
	for i := range c.o.blocks {
		at := uint32(i) << 6
		cidr := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, a[1] + byte(at>>16), byte(at >> 8), byte(at)}), 26)
		b := metadata.Block{Network: "big", CIDR: cidr, Host: fmt.Sprintf("synthetic%05d", i%c.o.hosts)}
		if i < c.o.hosts {
			b.Gateway = cidr.Addr().Next()
		}
		if err := put("view/blocks/"+metadata.BlockKey(b), b); err != nil {
			return err
		}
	}
	for from := 0; from < len(changes); from += 1000 { // a minute's deadline is no matter
		for _, r := range c.etcd.Write(c.ctx, changes[from:min(len(changes), from+1000)]...) {
			if r.Err != nil {
				return r.Err
			}
		}
	}
	for _, h := range c.hosts {
		h.p.Kill()
	}
	var mu sync.Mutex
	var samples []float64
	start := time.Now()
	failed, _, first := c.each(func(h *host) error {
		err := c.start(h)
		mu.Lock()
		defer mu.Unlock()
		if err == nil {
			samples = append(samples, time.Since(start).Seconds())
		}
		return err
	})
	slices.Sort(samples)
	c.add("view", "all start at once, until half are ready", "s", quantile(samples, 0.5))
	c.add("view", "all start at once, until all are ready", "s", quantile(samples, 1))
	c.add("view", "hosts that failed", "", float64(failed))
	if failed == len(c.hosts) {
		fmt.Fprintln(os.Stderr, first)
		return nil
	}
	h := c.hosts[slices.IndexFunc(c.hosts, func(h *host) bool { return h.p != nil })]
	if _, resident, err := h.cpu(); err == nil {
		c.add("view", "resident memory of a host", "MiB", resident)
	}
	paths := []string{"/v1/hosts", "/v1/networks", "/v1/networks/lan/status", "/v1/networks/big/status", "/metrics",
		"/readyz"}
	for _, path := range paths {
		var times []float64
		for range 11 {
			_, took, err := h.get(c.ctx, path)
			if err != nil {
				return err
			}
			times = append(times, float64(took)/float64(time.Millisecond))
		}
		slices.Sort(times)
		c.add("view", "GET "+path+", p50", "ms", quantile(times, 0.5))
	}
	for _, args := range [][]string{{"status"}, {"host", "list"}} {
		start := time.Now()
		command := append([]string{c.o.bin + "/lariat", "--socket", h.client.Socket}, args...)
		if _, err := c.ns.Output(c.ctx, command...); err != nil {
			return err
		}
		c.add("view", "lariat "+strings.Join(args, " "), "ms", 1000*time.Since(start).Seconds())
	}
	start = time.Now()
	last := metadata.Network{Subnets: []netip.Prefix{netip.MustParsePrefix("10.17.0.0/16")}}
	create := func(ctx context.Context) error { return h.client.Put(ctx, metadata.KindNetwork, "last", last) }
	if _, err := until(c.ctx, time.Minute, create); err != nil {
		return err
	}
	c.add("view", "a network is created", "ms", 1000*time.Since(start).Seconds())
	return nil
}
