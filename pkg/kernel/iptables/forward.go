// Package iptables lets Lariat's packets through where another program (Docker) set the policy of FORWARD to DROP.
//
// An accept in our own nftables table would not help: a packet must pass every base chain. So this is the one place that adds to
// a table of others: two chains of our own, and two jumps to them. It speaks the iptables command, because only
// that knows which of the two back-ends the host uses.
package iptables

import (
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
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

// AcceptForward makes the chains where the policy is DROP, and takes them away where it is not (any more). It returns what it
// changed. A host without iptables needs nothing.
//
// What leads to a container's port is accepted from everywhere: pkg/guard has dropped by then what must not. What comes from one is accepted to
// everywhere but the bridges of others, such as Docker's, whose own rules then decide. underlay are the host's own addresses: a bridge that has
// one of them is the way to the outside.
func AcceptForward(subnets []netip.Prefix, underlay []netip.Addr) (changed []string, err error) {
	bridges, err := foreignBridges(underlay)
	if err != nil {
		return nil, fmt.Errorf("accept forwarded packets: %w", err)
	}
	var errs []error
	for _, f := range []struct {
		proto   iptables.Protocol
		command string
		v6      bool
	}{{iptables.ProtocolIPv4, "iptables", false}, {iptables.ProtocolIPv6, "ip6tables", true}} {
		if _, err := exec.LookPath(f.command); err != nil {
			continue
		}
		var own []string
		for _, s := range subnets {
			if s.Addr().Is6() == f.v6 {
				own = append(own, s.String())
			}
		}
		lines, err := family(f.proto, own, bridges)
		for _, l := range lines {
			changed = append(changed, f.command+" "+l)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: accept forwarded packets: %w", f.command, err))
		}
	}
	return changed, errors.Join(errs...)
}

func family(proto iptables.Protocol, subnets, bridges []string) ([]string, error) {
	ipt, err := iptables.New(iptables.IPFamily(proto), iptables.Timeout(5))
	if err != nil {
		return nil, err
	}
	rules, err := ipt.List("filter", "FORWARD")
	if err != nil {
		return nil, err
	}
	dropping := slices.Contains(rules, "-P FORWARD DROP")
	jumps := slices.Contains(rules, "-A FORWARD -j "+ForwardChain)
	if !dropping || len(subnets) == 0 {
		if !jumps {
			return nil, nil
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
	const port = delta.PortPrefix + "+"
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
	// Behind Docker's own hook for users, before everything else. Only presence is looked at afterwards: Docker moves its jumps to
	// the top at each start, and to fight about the order would be flapping.
	position := 1
	for i, r := range forward[1:] {
		if r == "-A FORWARD -j DOCKER-USER" {
			position = i + 2
		}
	}
	for _, chain := range []string{ForwardChain, UserChain} { // each lands in front of the one before
		if slices.Contains(forward, "-A FORWARD -j "+chain) {
			continue
		}
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
	err := errors.Join(ipt.Delete("filter", "FORWARD", "-j", ForwardChain), ipt.ClearAndDeleteChain("filter", ForwardChain))
	if user, lerr := ipt.List("filter", UserChain); lerr == nil && len(user) == 1 {
		err = errors.Join(err, ipt.DeleteIfExists("filter", "FORWARD", "-j", UserChain), ipt.ClearAndDeleteChain("filter", UserChain))
		changed = append(changed, "-X "+UserChain)
	}
	return changed, err
}
