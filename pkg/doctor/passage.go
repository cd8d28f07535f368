package doctor

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/attach"
	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/kernel/iptables"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/mtu"
)

// Passage is the result of sending a packet from one container's endpoint to another. Both
// endpoints are created for it. They use two network namespaces without a name, which vanish with
// this process in any case. They use two addresses of a block that no host has.
type Passage struct {
	Network string
	Subnet  netip.Prefix
	Passed  bool
	Chain   string // iptables filter FORWARD, nft chain inet firewalld filter_FORWARD; empty: not found
	Rule    string // of Chain, as its program lists it; empty: its policy
}

// passageTimeout limits the time of one packet. passageTries is the number of packets.
const (
	passageTimeout = 300 * time.Millisecond
	passageTries   = 3
)

// passages tests each network's subnets. why names the last subnet that was not tested and the
// reason. It is empty when all were tested.
func (g Gatherer) passages(ctx context.Context, s *metadata.Snapshot) (out []Passage, why string) {
	out = []Passage{}
	me, ok := s.Host(s.Self)
	if !ok {
		return nil, "this host is not in the metadata"
	}
	k, err := kernel.New()
	if err != nil {
		return nil, err.Error()
	}
	defer k.Close()
	for _, n := range s.Networks {
		if n.Encapsulation == metadata.EncapNone {
			continue
		}
		for _, subnet := range n.Subnets {
			a, b, ok := spare(s, n, subnet)
			of4 := subnet.Addr().Is4()
			gateways := slices.DeleteFunc(s.Gateways(n.Name, s.Self), func(g netip.Addr) bool { return g.Is4() != of4 })
			if len(gateways) == 0 {
				continue // the host takes no part in the network, and has no containers there
			}
			if !ok {
				why = fmt.Sprintf("subnet %s of network %s has no block left for a packet from port to port", subnet, n.Name)
				continue
			}
			p := Passage{Network: n.Name, Subnet: subnet}
			try := func(find bool) error {
				return between(ctx, k, n.Name, mtu.Container(n, me), gateways[0], [2]netip.Addr{a, b}, func(w *way) {
					if p.Passed = w.passes(); !p.Passed && find {
						p.Chain, p.Rule = w.stopper(ctx)
					}
				})
			}
			err := try(false)
			if err == nil && !p.Passed { // the failure may be due to a busy moment
				err = try(true)
			}
			if err != nil {
				why = fmt.Sprintf("no port for a packet of network %s could be made: %v", n.Name, err)
				continue
			}
			out = append(out, p)
		}
	}
	return out, why
}

// spare returns two addresses of the last unclaimed block of a subnet.
func spare(s *metadata.Snapshot, n metadata.Network, subnet netip.Prefix) (a, b netip.Addr, ok bool) {
	size := n.BlockSize(subnet)
	last := subnet.Addr().AsSlice()
	for i := subnet.Bits(); i < len(last)*8; i++ {
		last[i/8] |= 0x80 >> (i % 8)
	}
	for at, _ := netip.AddrFromSlice(last); subnet.Contains(at); {
		p := netip.PrefixFrom(at, size).Masked()
		taken := slices.ContainsFunc(s.Blocks, func(b metadata.Block) bool { return b.CIDR.Overlaps(p) }) ||
			slices.ContainsFunc(s.HostRoutes, func(e metadata.HostRoute) bool { return p.Contains(e.Address) })
		if !taken && p.Contains(p.Addr().Next()) {
			return p.Addr(), p.Addr().Next(), true
		}
		at = p.Addr().Prev()
	}
	return a, b, false
}

// A way is two endpoints, with a socket behind each.
type way struct {
	ports [2]string
	conns [2]*net.UDPConn
}

// between creates two endpoints with the addresses, calls f, and removes the endpoints.
func between(ctx context.Context, k kernel.Kernel, network string, size int, gateway netip.Addr, addrs [2]netip.Addr,
	f func(*way)) (err error) {
	w := &way{}
	for i, addr := range addrs {
		inside, err := newNetns()
		if err != nil {
			return err
		}
		defer inside.Close()
		w.ports[i] = fmt.Sprintf("%sp%d-%d", delta.VethPrefix, os.Getpid(), i)
		p := attach.Plan(&metadata.Attachment{Network: network, Device: "-", MTU: size,
			Addresses: []metadata.AttachmentAddress{{Address: addr, Gateway: gateway}}},
			attach.Config{ID: metadata.AttachmentID{ContainerID: w.ports[i], IfName: "eth0"}})
		// Do not use an endpoint's alias: the network manager would look for the container.
		p.HostName, p.Alias = w.ports[i], delta.AliasPrefix+"doctor"
		if err := k.AddEndpoint(ctx, fmt.Sprintf("/proc/self/fd/%d", inside.Fd()), p); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, k.DelEndpoint(context.WithoutCancel(ctx), p.HostName)) }()
		err = within(inside, func() (err error) {
			w.conns[i], err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, 0)))
			return err
		})
		if err != nil {
			return err
		}
		defer w.conns[i].Close()
	}
	f(w)
	return nil
}

// newNetns returns a new network namespace. It lives as long as the file, or a socket in it, is
// open.
func newNetns() (f *os.File, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
			f, err = os.Open("/proc/thread-self/ns/net")
		}
	}()
	<-done
	return f, err
}

// within calls f on a thread inside a network namespace.
func within(netns *os.File, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := os.NewSyscallError("setns", unix.Setns(int(netns.Fd()), unix.CLONE_NEWNET))
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// passes reports whether a packet arrives from the first endpoint at the second, and one in the
// other direction.
func (w *way) passes() bool {
	for range passageTries {
		if w.send(0) && w.send(1) {
			return true
		}
	}
	return false
}

// send sends a packet from one of the two endpoints, and reports whether it arrived at the other.
func (w *way) send(from int) bool {
	packet, buf := make([]byte, 16), make([]byte, 64)
	_, _ = rand.Read(packet)
	source, other := w.conns[from], w.conns[1-from]
	if _, err := source.WriteTo(packet, other.LocalAddr()); err != nil {
		return false
	}
	if err := other.SetReadDeadline(time.Now().Add(passageTimeout)); err != nil {
		return false
	}
	for {
		n, err := other.Read(buf)
		if err != nil {
			return false
		}
		if string(buf[:n]) == string(packet) {
			return true
		}
	}
}

// stopper returns the rule that stops packets. In nftables, which holds the rules of newer iptables
// too, it traces a packet. With the older iptables it compares counters.
func (w *way) stopper(ctx context.Context) (chain, rule string) {
	if chain, rule = w.trace(ctx); chain != "" {
		return chain, rule
	}
	v6 := w.conns[0].LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap().Is6()
	if !kernel.LegacyFilter(v6) {
		return "", ""
	}
	command := iptables.Commands(v6)
	return w.counted(ctx, command[len(command)-1])
}

var (
	traced  = regexp.MustCompile(`^trace id (\S+) (ip6?|inet) (\S+) (\S+) (?:rule (.*) \(verdict drop\)|policy drop)`)
	tracing = regexp.MustCompile(`^trace id (\S+) .* packet: `)
	counts  = regexp.MustCompile(`^(-[AP] \S+.*?) -c (\d+) \d+(.*)$`)
)

// trace marks the endpoints' packets in its own table and listens with the nft command. That
// command prints rules in the form that people know.
func (w *way) trace(ctx context.Context) (chain, rule string) {
	ctx, cancel := context.WithTimeout(ctx, 4*time.Second)
	defer cancel()
	const table = "inet lariat-doctor"
	rules := fmt.Sprintf(`add table %[1]s
delete table %[1]s
table %[1]s {
	chain trace {
		type filter hook prerouting priority -400;
		iifname { %[2]s, %[3]s } meta nftrace set 1
	}
}
`, table, w.ports[0], w.ports[1])
	mark := exec.CommandContext(ctx, "nft", "-f", "-")
	mark.Stdin = strings.NewReader(rules)
	if mark.Run() != nil {
		return "", ""
	}
	defer func() { _ = exec.CommandContext(context.WithoutCancel(ctx), "nft", "delete table "+table).Run() }()
	monitor := exec.CommandContext(ctx, "nft", "monitor", "trace")
	out, err := monitor.StdoutPipe()
	if err != nil || monitor.Start() != nil {
		return "", ""
	}
	defer monitor.Wait() //nolint:errcheck // it was killed
	defer cancel()
	lines := make(chan string, 1024) // a few packets, with a few lines per chain
	go func() {
		defer close(lines)
		for s := bufio.NewScanner(out); s.Scan(); {
			select {
			case lines <- s.Text():
			case <-ctx.Done():
				return
			}
		}
	}()
	ours := map[string]bool{}
	addr := func(c *net.UDPConn) string { return c.LocalAddr().(*net.UDPAddr).IP.String() }
	a, b := addr(w.conns[0]), addr(w.conns[1]) // excludes the links' own packets, which Lariat's rules drop
	for ctx.Err() == nil {
		w.send(0) // repeatedly: nothing shows when the monitor is ready
		w.send(1)
		for open := true; open; {
			select {
			case line, more := <-lines:
				if !more {
					return "", ""
				}
				if m := tracing.FindStringSubmatch(line); m != nil && strings.Contains(line, "addr "+a+" ") &&
					strings.Contains(line, "addr "+b+" ") {
					ours[m[1]] = true
				}
				if m := traced.FindStringSubmatch(line); m != nil && ours[m[1]] {
					return chainName(m[2], m[3], m[4]), m[5]
				}
			default:
				open = false
			}
		}
	}
	return "", ""
}

// chainName returns a chain's name in the form of the program that made it.
func chainName(family, table, chain string) string {
	if commands := map[string]string{"ip": "iptables", "ip6": "ip6tables"}; table == "filter" && commands[family] != "" {
		return commands[family] + " filter " + chain
	}
	return fmt.Sprintf("nft chain %s %s %s", family, table, chain)
}

// counted returns the rule, or policy, of the older iptables whose counter includes the lost
// packets.
func (w *way) counted(ctx context.Context, command string) (chain, rule string) {
	read := func() map[string]int {
		out, err := exec.CommandContext(ctx, command, "-w", "5", "-v", "-S").Output()
		if err != nil {
			return nil
		}
		list := map[string]int{}
		for line := range strings.SplitSeq(string(out), "\n") {
			if m := counts.FindStringSubmatch(line); m != nil {
				if n, err := strconv.Atoi(m[2]); err == nil {
					list[m[1]+m[3]] += n
				}
			}
		}
		return list
	}
	before := read()
	for range passageTries {
		w.send(0)
	}
	for r, n := range read() {
		words := strings.Fields(r)
		stops := words[0] == "-P" && words[2] == "DROP" || slices.Contains(words, "DROP") || slices.Contains(words, "REJECT")
		if !stops || n < before[r]+passageTries || words[1] == "INPUT" || words[1] == "OUTPUT" {
			continue
		}
		name := strings.TrimSuffix(command, "-legacy") + " (legacy) filter " + words[1]
		if words[0] == "-P" {
			return name, ""
		}
		return name, r
	}
	return "", ""
}
