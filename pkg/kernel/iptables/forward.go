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
)

const (
	// UserChain comes first and is never written to: an administrator's own rules go there.
	UserChain = "LARIAT-USER"
	// ForwardChain accepts what comes from or goes to a network of ours.
	ForwardChain = "LARIAT-FORWARD"
)

// AcceptForward makes the chains where the policy is DROP, and takes them away where it is not (any more). It returns what it
// changed. A host without iptables needs nothing.
func AcceptForward(subnets []netip.Prefix) (changed []string, err error) {
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
		lines, err := family(f.proto, own)
		for _, l := range lines {
			changed = append(changed, f.command+" "+l)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: accept forwarded packets: %w", f.command, err))
		}
	}
	return changed, errors.Join(errs...)
}

func family(proto iptables.Protocol, subnets []string) ([]string, error) {
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
	return provide(ipt, rules, subnets)
}

func provide(ipt *iptables.IPTables, forward []string, subnets []string) (changed []string, err error) {
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
	want := []string{"-N " + ForwardChain}
	for _, s := range subnets {
		want = append(want, fmt.Sprintf("-A %s -s %s -j ACCEPT", ForwardChain, s), fmt.Sprintf("-A %s -d %s -j ACCEPT", ForwardChain, s))
	}
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
