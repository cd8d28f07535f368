package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// attacher adds and deletes one container; what is measured is one call.
type attacher interface {
	Add(i int) (cost, error)
	Del(i int) (cost, error)
}

// contender is one way to connect containers, on a host namespace of its own.
type contender struct {
	name       string
	host       *namespace
	crew       *crew
	containers []*namespace
	attacher   attacher

	// daemons whose CPU time counts as part of each operation.
	daemons []int
}

// plugin calls a CNI plugin as libcni does: one process for each call, environment, configuration on stdin,
// and for DEL the result of the ADD within it.
type plugin struct {
	c       *contender
	path    string // of the executable
	cniPath string
	conf    map[string]any
	prefix  string // of container ids

	results []json.RawMessage
}

func (p *plugin) id(i int) string { return fmt.Sprintf("%s%06d", p.prefix, i) }

// Add connects container i.
func (p *plugin) Add(i int) (cost, error) {
	out, paid, err := p.call("ADD", i, nil)
	if err == nil {
		p.results[i] = out
	}
	return paid, err
}

// Del disconnects container i.
func (p *plugin) Del(i int) (cost, error) {
	_, paid, err := p.call("DEL", i, p.results[i])
	p.results[i] = nil
	return paid, err
}

func (p *plugin) call(verb string, i int, prev json.RawMessage) ([]byte, cost, error) {
	conf := p.conf
	if prev != nil {
		conf = make(map[string]any, len(p.conf)+1)
		for k, v := range p.conf {
			conf[k] = v
		}
		conf["prevResult"] = prev
	}
	stdin, err := json.Marshal(conf)
	if err != nil {
		return nil, cost{}, err
	}
	return execPlugin(p.path, stdin, "CNI_COMMAND="+verb, "CNI_CONTAINERID="+p.id(i), "CNI_NETNS="+p.c.containers[i].Path,
		"CNI_IFNAME=eth0", "CNI_ARGS=", "CNI_PATH="+p.cniPath)
}

// cost is what a process and its children took of the machine.
type cost struct {
	cpu    time.Duration
	faults int // pages that it touched for the first time (getrusage(2), ru_minflt)
}

// execPlugin runs one plugin process to its end and returns its answer and what it cost.
func execPlugin(path string, stdin []byte, env ...string) ([]byte, cost, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.Cmd{Path: path, Args: []string{path}, Stdin: bytes.NewReader(stdin), Stdout: &stdout, Stderr: &stderr,
		Env: append([]string{"PATH=" + os.Getenv("PATH")}, env...)}
	err := cmd.Run()
	var paid cost
	if st := cmd.ProcessState; st != nil {
		paid.cpu = st.UserTime() + st.SystemTime()
		if u, ok := st.SysUsage().(*syscall.Rusage); ok {
			paid.faults = int(u.Minflt)
		}
	}
	if err != nil {
		return nil, paid, fmt.Errorf("%s: %w: %s%s", filepath.Base(path), err, clip(stdout.Bytes()), clip(stderr.Bytes()))
	}
	return stdout.Bytes(), paid, nil
}

func clip(b []byte) []byte {
	b = bytes.TrimSpace(b)
	return b[:min(len(b), 600)]
}

// floor is what the kernel alone takes for a routed port, by a process that already runs and keeps its
// sockets: the veth with its peer in the container, addresses, routes, neighbour. No process start, no
// addresses to find, nothing durable.
type floor struct {
	c    *contender
	host *netlink.Handle
	in   []*netlink.Handle // one in each container
}

func newFloor(c *contender) (*floor, error) {
	f := &floor{c: c, in: make([]*netlink.Handle, len(c.containers))}
	open := func(ns *namespace, h **netlink.Handle) error {
		return ns.Do(func() (err error) { *h, err = netlink.NewHandle(unix.NETLINK_ROUTE); return err })
	}
	errs := []error{open(c.host, &f.host)}
	for i, ns := range c.containers {
		errs = append(errs, open(ns, &f.in[i]))
	}
	return f, errors.Join(errs...)
}

func (f *floor) Close() {
	f.host.Close()
	for _, h := range f.in {
		h.Close()
	}
}

func (f *floor) name(i int) string { return "fl" + strconv.Itoa(i) }

// Add makes the port of container i.
func (f *floor) Add(i int) (cost, error) {
	ns, err := os.Open(f.c.containers[i].Path)
	if err != nil {
		return cost{}, err
	}
	defer ns.Close()
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: f.name(i), Flags: 0, MTU: 1450}, PeerName: "eth0",
		PeerNamespace: netlink.NsFd(int(ns.Fd()))}
	if err := f.host.LinkAdd(veth); err != nil {
		return cost{}, fmt.Errorf("floor veth: %w", err)
	}
	outer, err := f.host.LinkByName(f.name(i))
	if err != nil {
		return cost{}, err
	}
	if err := f.host.LinkSetUp(outer); err != nil {
		return cost{}, err
	}
	inner, err := f.in[i].LinkByName("eth0")
	if err != nil {
		return cost{}, err
	}
	ip := []byte{10, 99, byte(i >> 8), byte(i)}
	dst := ipNet(ip, 32)
	gw := ipNet([]byte{10, 99, 255, 254}, 32)
	steps := []func() error{
		func() error { return f.in[i].AddrAdd(inner, &netlink.Addr{IPNet: dst}) },
		func() error { return f.in[i].LinkSetUp(inner) },
		func() error {
			return f.in[i].RouteAdd(&netlink.Route{LinkIndex: inner.Attrs().Index, Dst: gw, Scope: netlink.SCOPE_LINK})
		},
		func() error {
			return f.in[i].RouteAdd(&netlink.Route{LinkIndex: inner.Attrs().Index, Dst: ipNet([]byte{0, 0, 0, 0}, 0), Gw: gw.IP})
		},
		func() error {
			return f.in[i].NeighSet(&netlink.Neigh{LinkIndex: inner.Attrs().Index, IP: gw.IP,
				HardwareAddr: outer.Attrs().HardwareAddr, State: netlink.NUD_PERMANENT})
		},
		func() error {
			return f.host.RouteAdd(&netlink.Route{LinkIndex: outer.Attrs().Index, Dst: dst, Scope: netlink.SCOPE_LINK})
		},
	}
	for n, step := range steps {
		if err := step(); err != nil {
			return cost{}, fmt.Errorf("floor step %d: %w", n, err)
		}
	}
	return cost{}, nil
}

// Del removes the port of container i.
func (f *floor) Del(i int) (cost, error) {
	return cost{}, f.host.LinkDel(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: f.name(i)}})
}

// race lets the contenders add and delete n containers each in turn, so that whatever else the machine does hits all of
// them alike. With one at a time they alternate by single calls, otherwise by batches.
func race(scenario string, contenders []*contender, n, rounds, parallel int) []*series {
	adds, dels := make([]*series, len(contenders)), make([]*series, len(contenders))
	for k, c := range contenders {
		adds[k] = &series{Section: "cni", Scenario: scenario, Who: c.name, Op: "ADD", Unit: "ms"}
		dels[k] = &series{Section: "cni", Scenario: scenario, Who: c.name, Op: "DEL", Unit: "ms"}
	}
	for round := range rounds {
		for _, phase := range []struct {
			to []*series
			op func(attacher) func(int) (cost, error)
		}{
			{adds, func(a attacher) func(int) (cost, error) { return a.Add }},
			{dels, func(a attacher) func(int) (cost, error) { return a.Del }},
		} {
			if parallel > 1 {
				for k := range contenders {
					at := (k + round) % len(contenders)
					batch(contenders[at], phase.to[at], n, phase.op(contenders[at].attacher))
				}
				continue
			}
			for i := range n {
				for k := range contenders {
					at := (k + i + round) % len(contenders)
					c := contenders[at]
					before := c.daemonCPU()
					c.crew.Run(func() { measure(phase.to[at], i, phase.op(c.attacher)) })
					phase.to[at].cpu += c.daemonCPU() - before
				}
			}
		}
	}
	return append(adds, dels...)
}

func measure(s *series, i int, op func(int) (cost, error)) {
	start := time.Now()
	paid, err := op(i)
	took := time.Since(start)
	if err != nil {
		s.fail(err)
		return
	}
	s.addTime(took)
	s.pay(paid)
}

// batch runs all n at once, as many in parallel as the crew is large.
func batch(c *contender, s *series, n int, op func(int) (cost, error)) {
	parts := make([]series, n)
	jobs := make([]func(), n)
	for i := range n {
		jobs[i] = func() { measure(&parts[i], i, op) }
	}
	before, start := c.daemonCPU(), time.Now()
	c.crew.RunAll(jobs)
	took := time.Since(start)
	s.cpu += c.daemonCPU() - before
	done := 0
	for i := range parts {
		s.samples = append(s.samples, parts[i].samples...)
		s.cpu += parts[i].cpu
		s.faults += parts[i].faults
		s.Errors += parts[i].Errors
		if s.FirstErr == "" {
			s.FirstErr = parts[i].FirstErr
		}
		done += len(parts[i].samples)
	}
	if done > 0 {
		s.rates = append(s.rates, float64(done)/took.Seconds())
	}
}

// daemonCPU is the CPU time that the contender's daemons have used so far.
func (c *contender) daemonCPU() (sum time.Duration) {
	for _, pid := range c.daemons {
		sum += processCPU(pid)
	}
	return sum
}
