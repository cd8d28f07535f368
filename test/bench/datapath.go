package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// path is a way from one container to another on another host.
type path struct {
	name string
	a, b *namespace // of the containers
	addr string     // of b's container
}

// datapath compares what our executables build with the same overlay made by hand.
func (b *bench) datapath() error {
	if !has("ip") || !b.hasNFT {
		b.rep.note("datapath left out: the overlay by hand needs ip of iproute2, and nft")
		return nil
	}
	rounds, seconds := 3*b.opt.rounds, 1.0
	if b.opt.quick {
		rounds, seconds = 1, 0.2
	}
	return b.scope(func() error {
		var paths []*path
		for _, h := range []struct{ name, prefix, more string }{{"by hand", "h", masquerade},
			{"by hand, guarded", "g", masquerade + guards}} {
			p, err := b.byHand(h.name, h.prefix, h.more)
			if err != nil {
				return fmt.Errorf("%s: %w", h.name, err)
			}
			paths = append(paths, p)
		}
		switch ours, err := b.oursPath(); {
		case errors.Is(err, errAbsent):
		case err != nil:
			return fmt.Errorf("%s: %w", oursName, err)
		default:
			paths = append(paths, ours)
		}
		for _, p := range paths {
			if err := b.servers(p); err != nil {
				return fmt.Errorf("%s: %w", p.name, err)
			}
		}
		return b.traffic(paths, rounds, seconds)
	})
}

func (b *bench) traffic(paths []*path, rounds int, seconds float64) error {
	type load struct {
		name, unit string
		run        func(p *path) (float64, error)
	}
	tcp := func(args ...string) func(p *path) (float64, error) {
		return func(p *path) (float64, error) {
			r, err := runIperf(p.a, p.addr, seconds, args...)
			if err != nil {
				return 0, err
			}
			return r.End.Received.BitsPerSecond / 1e9, nil
		}
	}
	loads := []load{
		{"TCP 1 stream", "Gbit/s", tcp()},
		{"TCP 4 streams", "Gbit/s", tcp("-P", "4")},
		{"UDP 64 B", "kpps", func(p *path) (float64, error) {
			r, err := runIperf(p.a, p.addr, seconds, "-u", "-l", "64", "-b", "0")
			if err != nil || r.End.Sum.Seconds == 0 {
				return 0, err
			}
			return (r.End.Sum.Packets - r.End.Sum.Lost) / r.End.Sum.Seconds / 1000, nil
		}},
		{"TCP_RR", "k/s", func(p *path) (float64, error) {
			e, err := b.ask(p, seconds)
			if err != nil {
				return 0, err
			}
			return float64(e.Count) / e.Seconds / 1000, nil
		}},
	}
	if !has("iperf3") {
		b.rep.note("datapath: TCP and UDP left out: they need iperf3")
		loads = loads[3:]
	}
	for _, l := range loads {
		b.logf("datapath, %s: %d paths, %d rounds", l.name, len(paths), rounds)
		all := make([]*series, len(paths))
		for k, p := range paths {
			all[k] = &series{Section: "datapath", Scenario: l.name, Who: p.name, Op: "throughput", Unit: l.unit}
		}
		for round := range rounds {
			if err := b.ctx.Err(); err != nil {
				return err
			}
			for k := range paths {
				at := (k + round) % len(paths)
				v, err := l.run(paths[at])
				if err != nil {
					all[at].fail(err)
					continue
				}
				all[at].add(v)
			}
		}
		b.rep.add(all...)
	}
	return nil
}

// servers starts the listening ends in the second container of a path.
func (b *bench) servers(p *path) error {
	self := exec.Command("/proc/self/exe")
	self.Stderr = os.Stderr
	self.Env = append(os.Environ(), trafficRole+"=echo "+p.addr)
	if err := b.startIn(p.b, self, "ready"); err != nil {
		return err
	}
	if !has("iperf3") {
		return nil
	}
	return b.startIn(p.b, exec.Command("iperf3", "-s", "--forceflush", "-B", p.addr), "Server listening")
}

// startIn starts a program in a namespace, waits until it prints a line that holds the text, and has it ended with
// the scope.
func (b *bench) startIn(ns *namespace, cmd *exec.Cmd, text string) error {
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := ns.Do(cmd.Start); err != nil {
		return fmt.Errorf("%s: %w", cmd.Path, err)
	}
	b.cleanup(func() { end(cmd) })
	ready := make(chan error, 1)
	go func() {
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			if strings.Contains(lines.Text(), text) {
				ready <- nil
				io.Copy(io.Discard, out) // so that it never blocks on its output
				return
			}
		}
		ready <- fmt.Errorf("%s ended before it was ready", cmd.Path)
	}()
	select {
	case err := <-ready:
		return err
	case <-time.After(20 * time.Second):
		return fmt.Errorf("%s was not ready after 20 s", cmd.Path)
	case <-b.ctx.Done():
		return b.ctx.Err()
	}
}

// end asks a process that we started to stop, and kills it when it does not.
func end(cmd *exec.Cmd) {
	done := make(chan struct{})
	go func() { cmd.Wait(); close(done) }()
	cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		cmd.Process.Kill()
		<-done
	}
}

func (b *bench) ask(p *path, seconds float64) (exchange, error) {
	cmd := exec.CommandContext(b.ctx, "/proc/self/exe")
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=ask %s %g", trafficRole, p.addr, seconds))
	cmd.Stderr = os.Stderr
	var out []byte
	err := p.a.Do(func() (err error) { out, err = cmd.Output(); return err })
	if err != nil {
		return exchange{}, fmt.Errorf("TCP_RR: %w", err)
	}
	var e exchange
	return e, json.Unmarshal(out, &e)
}

// pair makes two hosts joined by a wire, and a container namespace for each.
func (b *bench) pair(prefix string) (hosts, containers [2]*namespace, err error) {
	for i := range 2 {
		for _, ns := range []struct {
			to   **namespace
			name string
		}{{&hosts[i], "h"}, {&containers[i], "c"}} {
			n, err := newNamespace(fmt.Sprintf("%s%s%d", prefix, ns.name, i+1))
			if err != nil {
				return hosts, containers, err
			}
			b.cleanup(func() { n.Remove() })
			*ns.to = n
		}
	}
	return hosts, containers, wire(hosts[0], hosts[1], "up0", "up0", "192.0.2.1/24", "192.0.2.2/24")
}

// byHandHost is the overlay of DESIGN.md §5 in the commands that an administrator would type: $i is this
// host, $j the other, $c what the containers' names begin with.
const byHandHost = `
ip link add vtep1042 address 0e:00:c0:00:02:0$i type vxlan id 1042 dstport 4789 local 192.0.2.$i nolearning
ip address add 10.42.$i.1/32 dev vtep1042
ip link set vtep1042 mtu 1450 up
ip neighbour add 192.0.2.$j lladdr 0e:00:c0:00:02:0$j dev vtep1042 nud permanent
bridge fdb append 0e:00:c0:00:02:0$j dev vtep1042 dst 192.0.2.$j self permanent
ip nexthop add id 100$j via 192.0.2.$j dev vtep1042 onlink
ip route add 10.42.$j.0/26 nhid 100$j src 10.42.$i.1 proto 76
ip route add blackhole 10.42.$i.0/26 proto 76
for f in all default; do echo 1 > /proc/sys/net/ipv4/conf/$f/rp_filter; done
ip link add lrt$i mtu 1450 type veth peer name eth0 mtu 1450 netns $c$i
ip link set lrt$i up
ip route add 10.42.$i.5/32 dev lrt$i proto 76
ip -n $c$i address add 10.42.$i.5/32 dev eth0
ip -n $c$i link set eth0 up
ip -n $c$i neighbour add 10.42.$i.1 lladdr $(ip -o link show lrt$i | sed 's/.*ether \([^ ]*\).*/\1/') dev eth0 nud permanent
ip -n $c$i route add 10.42.$i.1 dev eth0 scope link
ip -n $c$i route add default via 10.42.$i.1 dev eth0
`

// masquerade gives containers a way to the outside, as all contenders have it.
const masquerade = `
nft -f - <<.
table ip nat {
	chain egress { type nat hook postrouting priority 100; ip saddr 10.42.0.0/16 ip daddr != 10.42.0.0/16 masquerade; }
}
.
`

// guards are what Lariat adds and the plain overlay lacks: nobody uses another container's address, and tunnel packets
// come from known hosts only. With them by hand it shows what these cost, and what is left is ours.
const guards = `
nft -f - <<.
table inet guards {
	set vteps { type ipv4_addr; elements = { 192.0.2.1, 192.0.2.2 }; }
	chain antispoof { type filter hook prerouting priority -300; iifname "lrt*" fib saddr . iif oif missing drop; }
	chain sources { type filter hook prerouting priority -300; udp dport 4789 @th,96,24 1042 ip saddr != @vteps drop; }
}
.
`

// byHand builds the overlay without us, and runs more commands on each host.
func (b *bench) byHand(name, prefix, more string) (*path, error) {
	hosts, containers, err := b.pair(prefix)
	if err != nil {
		return nil, err
	}
	for i, host := range hosts {
		cmd := exec.Command("sh", "-ec", fmt.Sprintf("i=%d j=%d c=%sc\n%s%s", i+1, 2-i, prefix, byHandHost, more))
		if err := host.Do(func() error {
			out, err := cmd.CombinedOutput()
			if err != nil {
				return fmt.Errorf("%w: %s", err, clip(out))
			}
			return nil
		}); err != nil {
			return nil, err
		}
	}
	return &path{name, containers[0], containers[1], "10.42.2.5"}, nil
}
