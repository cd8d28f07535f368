// Package iptables lets Lariat's packets through where another program (Docker, a firewall) drops or rejects all
// that is forwarded: by the policy of FORWARD, or by a rule there that matches everything.
//
// An accept in our own nftables table would not help: a packet must pass every base chain. So this is the one
// place that adds to a table of others: two chains of our own, and two jumps to them. It speaks the iptables
// command, because that knows the back-end which the host's programs use by default; the other back-end's tables
// hold all the same, and are looked at too.
package iptables

import (
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/coreos/go-iptables/iptables"
	"github.com/vishvananda/netlink"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/kernel"
)

const (
	// UserChain comes first and is never written to: an administrator's own rules go there.
	UserChain = "LARIAT-USER"
	// ForwardChain accepts what comes from or goes to a container's port.
	ForwardChain = "LARIAT-FORWARD"
)

// AcceptForward makes the chains where nothing else would pass, and takes them away where that is not so (any
// more). It returns what it changed. A host without iptables needs nothing.
//
// What leads to a container's port is accepted from everywhere: pkg/guard has dropped by then what must not.
// What comes from one is accepted to everywhere but the bridges of others, such as Docker's, whose own rules
// then decide. underlay are the host's own addresses: a bridge that has one of them is the way to the
// outside.
func AcceptForward(subnets []netip.Prefix, underlay []netip.Addr) (changed []string, err error) {
	bridges, err := foreignBridges(underlay)
	if err != nil {
		return nil, fmt.Errorf("accept forwarded packets: %w", err)
	}
	var errs []error
	for _, v6 := range []bool{false, true} {
		var own []string
		for _, s := range subnets {
			if s.Addr().Is6() == v6 {
				own = append(own, s.String())
			}
		}
		for _, c := range Commands(v6) {
			lines, err := family(c, v6, own, bridges)
			for _, l := range lines {
				changed = append(changed, c+" "+l)
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: accept forwarded packets: %w", c, err))
			}
		}
	}
	return changed, errors.Join(errs...)
}

// Commands returns the commands for the tables of one family that are in use: the host's own, and that of the
// other back-end.
func Commands(v6 bool) (out []string) {
	command := "iptables"
	if v6 {
		command = "ip6tables"
	}
	seen := map[string]bool{}
	for _, suffix := range []string{"", "-nft", "-legacy"} {
		path, err := exec.LookPath(command + suffix)
		if err != nil {
			continue
		}
		if target, err := filepath.EvalSymlinks(path); err == nil {
			path = target // one executable per back-end
		}
		if seen[path] || suffix == "-legacy" && !kernel.LegacyFilter(v6) {
			continue
		}
		seen[path] = true
		out = append(out, command+suffix)
	}
	return out
}

// everything matches a rule of FORWARD behind which no packet comes.
var everything = regexp.MustCompile(`^-A FORWARD(?: -m comment --comment (?:"[^"]*"|\S+))? -j (?:DROP|REJECT(?: .*)?)$`)

// Stop returns the place of the rule, in the list of FORWARD's rules, that drops or rejects all that comes to it;
// -1 when there is none.
func Stop(rules []string) int { return slices.IndexFunc(rules, everything.MatchString) }

func family(command string, v6 bool, subnets, bridges []string) ([]string, error) {
	ipt, err := open(command, v6)
	if err != nil {
		return nil, err
	}
	rules, err := ipt.List("filter", "FORWARD")
	if err != nil {
		return nil, err
	}
	dropping := slices.Contains(rules, "-P FORWARD DROP") || Stop(rules) >= 0
	if !dropping || len(subnets) == 0 {
		// With the jump somebody may have taken away what asked for the chain.
		if ok, err := ipt.ChainExists("filter", ForwardChain); err != nil || !ok {
			return nil, err
		}
		return withdraw(ipt)
	}
	return provide(ipt, rules, accepting(subnets, bridges))
}

// accepting are the rules of ForwardChain, as iptables lists them.
func accepting(subnets, bridges []string) (out []string) {
	add := func(format string, args ...any) {
		out = append(out, "-A "+ForwardChain+" "+fmt.Sprintf(format, args...))
	}
	const port = delta.VethPrefix + "+"
	if len(bridges) > 0 { // answers, and what a program published that has a bridge
		add("-i %s -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT", port)
	}
	for _, b := range bridges {
		add("-i %s -o %s -j RETURN", port, b)
	}
	for _, s := range subnets {
		add("-s %s -i %s -j ACCEPT", s, port)
		add("-d %s -o %s -j ACCEPT", s, port)
	}
	return out
}

// foreignBridges are the bridges of others, without those that have an address of the underlay or a default route.
func foreignBridges(underlay []netip.Addr) (names []string, err error) {
	links, err := kernel.RetryDump(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list bridges: %w", err)
	}
	for _, l := range links {
		if l.Type() != "bridge" {
			continue
		}
		addrs, err := kernel.RetryDump(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_ALL) })
		if err != nil {
			return nil, fmt.Errorf("addresses of bridge %s: %w", l.Attrs().Name, err)
		}
		routes, err := kernel.RetryDump(func() ([]netlink.Route, error) { return netlink.RouteList(l, netlink.FAMILY_ALL) })
		if err != nil {
			return nil, fmt.Errorf("routes of bridge %s: %w", l.Attrs().Name, err)
		}
		outward := slices.ContainsFunc(addrs, func(a netlink.Addr) bool {
			addr, _ := netip.AddrFromSlice(a.IP)
			return slices.Contains(underlay, addr.Unmap())
		}) || slices.ContainsFunc(routes, func(r netlink.Route) bool { return r.Dst == nil || r.Dst.IP.IsUnspecified() })
		if !outward {
			names = append(names, l.Attrs().Name)
		}
	}
	slices.Sort(names)
	return names, nil
}

func provide(ipt *iptables.IPTables, forward, rules []string) (changed []string, err error) {
	for _, chain := range []string{UserChain, ForwardChain} {
		if ok, err := ipt.ChainExists("filter", chain); err != nil {
			return changed, err
		} else if !ok {
			if err := ipt.NewChain("filter", chain); err != nil {
				return changed, err
			}
			changed = append(changed, "-N "+chain)
		}
	}
	have, err := ipt.List("filter", ForwardChain)
	if err != nil {
		return changed, err
	}
	want := append([]string{"-N " + ForwardChain}, rules...)
	if !slices.Equal(have, want) {
		if err := ipt.ClearChain("filter", ForwardChain); err != nil {
			return changed, err
		}
		for _, w := range want[1:] {
			if err := ipt.Append("filter", ForwardChain, strings.Fields(w)[2:]...); err != nil {
				return changed, err
			}
			changed = append(changed, w)
		}
	}
	// Behind Docker's own hook for users, before everything else, and the users' own before ours. Afterwards only
	// that is looked at, that they are there in this order and that packets come to them: Docker moves its jumps
	// to the top at each start, and to fight about the order would be flapping.
	stop := Stop(forward)
	if stop < 0 {
		stop = len(forward)
	}
	jump := func(chain string) string { return "-A FORWARD -j " + chain }
	user, own := slices.Index(forward, jump(UserChain)), slices.Index(forward, jump(ForwardChain))
	if user >= 0 && user < own && own < stop {
		return changed, nil
	}
	for _, chain := range []string{UserChain, ForwardChain} {
		if slices.Contains(forward, jump(chain)) {
			if err := ipt.Delete("filter", "FORWARD", "-j", chain); err != nil {
				return changed, err
			}
			changed = append(changed, "-D FORWARD -j "+chain)
		}
	}
	position := 1
	if i := slices.Index(forward[:stop], "-A FORWARD -j DOCKER-USER"); i > 0 {
		position = i + 1
		for _, r := range forward[1:i] {
			if r == jump(UserChain) || r == jump(ForwardChain) {
				position--
			}
		}
	}
	for _, chain := range []string{ForwardChain, UserChain} { // each lands in front of the one before
		if err := ipt.Insert("filter", "FORWARD", position, "-j", chain); err != nil {
			return changed, err
		}
		changed = append(changed, fmt.Sprintf("-I FORWARD %d -j %s", position, chain))
	}
	return changed, nil
}

// withdraw removes the jump and the chain; the users' chain stays when there is something in it.
func withdraw(ipt *iptables.IPTables) ([]string, error) {
	changed := []string{"-X " + ForwardChain}
	err := errors.Join(ipt.DeleteIfExists("filter", "FORWARD", "-j", ForwardChain),
		ipt.ClearAndDeleteChain("filter", ForwardChain))
	if user, lerr := ipt.List("filter", UserChain); lerr == nil && len(user) == 1 {
		err = errors.Join(err, ipt.DeleteIfExists("filter", "FORWARD", "-j", UserChain),
			ipt.ClearAndDeleteChain("filter", UserChain))
		changed = append(changed, "-X "+UserChain)
	}
	return changed, err
}

// Remove removes the chains and the jumps to them, and returns what it removed. With apply false it returns what
// there is to remove, and changes nothing. A user's chain that has rules stays.
func Remove(apply bool) (lines []string, err error) {
	var errs []error
	for _, v6 := range []bool{false, true} {
		for _, c := range Commands(v6) {
			ipt, err := open(c, v6)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			there, err := ipt.ChainExists("filter", ForwardChain)
			if err != nil || !there {
				errs = append(errs, err)
				continue
			}
			lines = append(lines, fmt.Sprintf("- %s chains %s and, when it is empty, %s", c, ForwardChain, UserChain))
			if apply {
				_, err := withdraw(ipt)
				errs = append(errs, err)
			}
		}
	}
	if err := errors.Join(errs...); err != nil {
		return lines, fmt.Errorf("remove iptables chains: %w", err)
	}
	return lines, nil
}

// open runs a command for one family.
func open(command string, v6 bool) (*iptables.IPTables, error) {
	proto := iptables.ProtocolIPv4
	if v6 {
		proto = iptables.ProtocolIPv6
	}
	return iptables.New(iptables.IPFamily(proto), iptables.Timeout(5), iptables.Path(command))
}
