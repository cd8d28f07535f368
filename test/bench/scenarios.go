package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func ipNet(ip []byte, bits int) *net.IPNet {
	return &net.IPNet{IP: ip, Mask: net.CIDRMask(bits, 8*len(ip))}
}

// processCPU is the CPU time of all threads of a process, by its CPU clock (clock_getcpuclockid(3)).
func processCPU(pid int) time.Duration {
	var ts unix.Timespec
	const wholeProcess = 2
	if unix.ClockGettime(int32(^pid<<3|wholeProcess), &ts) != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// bench is one run.
type bench struct {
	opt      options
	ctx      context.Context
	rep      *report
	work     string // directory for state
	hosts    int    // so many host namespaces were made
	stops    []func()
	hasIPT   bool
	hasNFT   bool
	oursHere bool
}

func (b *bench) cleanup(f func()) { b.stops = append(b.stops, f) }

func (b *bench) close() {
	for _, f := range slices.Backward(b.stops) {
		f()
	}
	b.stops = nil
}

// scope runs fn and frees what it made.
func (b *bench) scope(fn func() error) error {
	outer := b.stops
	b.stops = nil
	err := fn()
	b.close()
	b.stops = outer
	return err
}

func (b *bench) logf(format string, a ...any) {
	fmt.Fprintf(os.Stderr, "bench: "+format+"\n", a...)
}

func has(command string) bool {
	_, err := exec.LookPath(command)
	return err == nil
}

// setup says what to measure in a comparison.
type setup struct {
	n, rounds, parallel int
	masq, dual          bool
	existing            int
	who                 []string // bridge, ptp, lariat, floor
}

// compare makes the contenders of one scenario, lets them race, and removes them.
func (b *bench) compare(scenario string, s setup) error {
	if err := b.ctx.Err(); err != nil {
		return err
	}
	b.logf("cni, %s: %s; %d containers, %d rounds", scenario, strings.Join(s.who, ", "), s.n, s.rounds)
	return b.scope(func() error {
		var list []*contender
		for _, who := range s.who {
			c, err := b.contender(who, s)
			if errors.Is(err, errAbsent) {
				b.rep.note("%s: %s left out: %v", scenario, who, err)
				continue
			}
			if err != nil {
				return fmt.Errorf("%s: %w", who, err)
			}
			list = append(list, c)
		}
		// One call of each that does not count: page cache, first-time nftables tables, the bridge itself.
		for _, c := range list {
			c.crew.Run(func() {
				_, err := c.attacher.Add(0)
				_, errDel := c.attacher.Del(0)
				if err := errors.Join(err, errDel); err != nil {
					b.rep.note("%s: first call of %s: %v", scenario, c.name, err)
				}
			})
		}
		b.rep.add(race(scenario, list, s.n, s.rounds, s.parallel)...)
		return nil
	})
}

var errAbsent = errors.New("not available here")

func (b *bench) contender(who string, s setup) (*contender, error) {
	b.hosts++
	tag := fmt.Sprintf("h%d", b.hosts)
	host, err := newNamespace(tag)
	if err != nil {
		return nil, err
	}
	b.cleanup(func() { host.Remove() })
	world, err := newNamespace(tag + "w")
	if err != nil {
		return nil, err
	}
	b.cleanup(func() { world.Remove() })
	if err := wire(host, world, "up0", "up1", "192.0.2.1/24", "192.0.2.254/24"); err != nil {
		return nil, err
	}
	c := &contender{name: who, host: host}
	if c.containers, err = namespaces(tag+"c", s.n); err != nil {
		return nil, err
	}
	b.cleanup(func() {
		for _, ns := range c.containers {
			ns.Remove()
		}
	})
	if c.crew, err = newCrew(host, max(1, s.parallel)); err != nil {
		return nil, err
	}
	b.cleanup(c.crew.Close)

	dir := filepath.Join(b.work, tag)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	b.cleanup(func() { os.RemoveAll(dir) })
	kind, backend, _ := strings.Cut(who, " ")
	switch kind {
	case "floor":
		f, err := newFloor(c)
		if err != nil {
			return nil, err
		}
		b.cleanup(f.Close)
		c.attacher = f
	case oursName:
		if who == oursEmpty {
			s.existing = 0
		}
		err = b.ours(c, dir, s)
	case "bridge", "ptp":
		err = b.peer(c, dir, kind, backend, s)
	default:
		err = fmt.Errorf("no contender is called %q", who)
	}
	return c, err
}

// peer is a reference plugin with host-local.
func (b *bench) peer(c *contender, dir, kind, backend string, s setup) error {
	v4, v6 := netip.MustParsePrefix("10.88.0.0/16"), netip.MustParsePrefix("fd88::/112")
	ranges := [][]map[string]string{{{"subnet": v4.String()}}}
	routes := []map[string]string{{"dst": "0.0.0.0/0"}}
	if s.dual {
		ranges = append(ranges, []map[string]string{{"subnet": v6.String()}})
		routes = append(routes, map[string]string{"dst": "::/0"})
	}
	conf := map[string]any{
		"cniVersion": "1.1.0", "name": "peer", "type": kind,
		"ipam": map[string]any{"type": "host-local", "dataDir": dir, "ranges": ranges, "routes": routes},
	}
	if kind == "bridge" {
		conf["bridge"] = "cni0"
		conf["isGateway"] = true
	}
	if s.masq {
		conf["ipMasq"] = true
		switch backend {
		case "ipt":
			if !b.hasIPT {
				return fmt.Errorf("iptables is %w", errAbsent)
			}
			conf["ipMasqBackend"] = "iptables"
		case "nft":
			if !b.hasNFT {
				return fmt.Errorf("nft is %w", errAbsent)
			}
			conf["ipMasqBackend"] = "nftables"
		}
	}
	if err := reserve(filepath.Join(dir, "peer"), v4, s.existing); err != nil {
		return err
	}
	p := &plugin{c: c, path: filepath.Join(b.opt.peers, kind), cniPath: b.opt.peers, conf: conf, prefix: c.host.Name + "x",
		results: make([]json.RawMessage, s.n)}
	c.attacher = p
	return nil
}

// reserve writes host-local's store as it would stand after n ADDs: a file for each address, named by it,
// which holds the container's id and interface, and the address handed out last.
func reserve(dir string, subnet netip.Prefix, n int) error {
	if n == 0 {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	base := subnet.Addr().As4()
	first := binary.BigEndian.Uint32(base[:])
	last := ""
	for i := range n {
		var a [4]byte
		binary.BigEndian.PutUint32(a[:], first+2+uint32(i)) // .1 is the gateway
		last = netip.AddrFrom4(a).String()
		if err := os.WriteFile(filepath.Join(dir, last), fmt.Appendf(nil, "existing%06d\r\neth0", i), 0o600); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(dir, "last_reserved_ip.0"), []byte(last), 0o600)
}

// existing names a scenario by the reservations that are there beforehand.
func existing(n int) string { return fmt.Sprintf("%d existing", n) }

// containers measures ADD and DEL.
func (b *bench) containers() error {
	q := b.opt.quick
	pick := func(full, quick int) int {
		if q {
			return quick
		}
		return full
	}
	n, rounds := pick(b.opt.n, 3), pick(b.opt.rounds, 1)
	masq := []string{oursName, "bridge ipt", "bridge nft", "ptp ipt", "ptp nft"}
	par := pick(40, 8)
	list := []struct {
		name string
		setup
	}{
		{"plain", setup{n: n, rounds: rounds, who: []string{oursName, "bridge", "ptp", "floor"}}},
		{"masq", setup{n: pick(n/2, 2), rounds: rounds, masq: true, who: masq}},
		{"dual stack", setup{n: pick(max(4, n/8), 1), rounds: 1, dual: true, who: []string{oursName, "bridge", "ptp"}}},
		{existing(0), setup{n: pick(n/2, 2), rounds: rounds, who: []string{oursName, "bridge", "ptp"}}},
		{existing(pick(1000, 100)), setup{n: pick(n/2, 2), rounds: rounds, existing: pick(1000, 100),
			who: []string{oursName, "bridge", "ptp"}}},
		{existing(10000), setup{n: pick(n/4, 0), rounds: pick(2, 1), existing: 10000,
			who: []string{oursName, "bridge", "ptp"}}},
		{existing(60000), setup{n: pick(n/2, 0), rounds: rounds, existing: 60000, who: []string{oursName, oursEmpty}}},
		{fmt.Sprintf("%d parallel", par), setup{n: pick(80, 8), rounds: rounds, parallel: par,
			who: []string{oursName, "bridge", "ptp"}}},
		{fmt.Sprintf("%d parallel masq", par), setup{n: pick(80, 8), rounds: pick(min(rounds, 2), 1), parallel: par,
			masq: true, who: masq}},
	}
	for _, s := range list {
		if s.n == 0 {
			continue // not in a quick run
		}
		if err := b.compare(s.name, s.setup); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return nil
}
