package kernel_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/ipsec"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/probe"
)

// encrypted returns the desired state of host a for an encrypted network with one peer.
func encrypted(mtu int, blocks ...string) *delta.State {
	s := &metadata.Snapshot{Networks: []metadata.Network{{Name: "private", Encapsulation: metadata.EncapIPsec, MTU: mtu,
		Subnets: prefixes("10.44.0.0/16", "fd44::/48")}}}
	for i, name := range []string{"a", "b"} {
		s.Hosts = append(s.Hosts, metadata.Host{Name: name,
			Underlay: []metadata.Underlay{{Address: netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)}), 24),
				Device: "eth0", MTU: 1500}}})
	}
	s.Blocks = []metadata.Block{{Network: "private", Host: "a", CIDR: netip.MustParsePrefix("10.44.0.0/26"),
		Gateway: netip.MustParseAddr("10.44.0.1")},
		{Network: "private", Host: "a", CIDR: netip.MustParsePrefix("fd44::/122"), Gateway: netip.MustParseAddr("fd44::1")}}
	for _, b := range blocks {
		s.Blocks = append(s.Blocks, metadata.Block{Network: "private", Host: "b", CIDR: netip.MustParsePrefix(b)})
	}
	return ipsec.Plan(s, "a")
}

// TestXFRMInterfacesHoldWhatThePlanSays checks the creation of XFRM interfaces and a second pass.
// It also checks a change in place, a repair after manual damage, and complete removal.
func TestXFRMInterfacesHoldWhatThePlanSays(t *testing.T) {
	probe.Need(t, probe.XfrmInterface, probe.Nft, probe.IPv6)
	ns, k := newKernel(t)
	empty := observe(t, k, nil).String()
	want := encrypted(0, "10.44.0.64/26", "fd44::40/122")
	reconcile(t, k, want)
	wantText(t, observe(t, k, want).String(), want.String())
	if d := reconcile(t, k, want); !d.Empty() {
		t.Errorf("F141: a settled host still differs:\n%s", d)
	}
	more := encrypted(1400, "10.44.0.64/26", "fd44::40/122", "10.44.0.128/26")
	d := reconcile(t, k, more)
	if d.Links.Len() != 2 || len(d.Links.Remove) > 0 || len(d.Routes.Set) != 1 {
		t.Errorf("another MTU and one more block:\n%s", d)
	}
	wantText(t, observe(t, k, more).String(), more.String())
	var tunnel string
	for name, l := range more.Links {
		if strings.HasSuffix(l.Alias, ":b") {
			tunnel = name
		}
	}
	ns.Command(t, "ip", "link", "del", tunnel)
	reconcile(t, k, more)
	wantText(t, observe(t, k, more).String(), more.String())
	ns.Command(t, "ip", "link", "del", tunnel)
	ns.Command(t, "ip", "link", "add", tunnel, "type", "xfrm", "if_id", "99")
	reconcile(t, k, more)
	wantText(t, observe(t, k, more).String(), more.String())
	reconcile(t, k, delta.NewState())
	wantText(t, observe(t, k, nil).String(), empty)
}

// TestXFRMRulesComeFirst checks that a host gets its rules before any encrypted device.
// A host whose rules cannot be created gets no encrypted device.
func TestXFRMRulesComeFirst(t *testing.T) {
	probe.Need(t, probe.XfrmInterface, probe.Nft)
	_, k := newKernel(t)
	want := encrypted(0)
	broken := encrypted(0)
	c := broken.Chains[ipsec.ClearOut]
	c.Rules = append(c.Rules, delta.Rule{delta.Unknown("no such rule")})
	broken.Chains[ipsec.ClearOut] = c
	have := observe(t, k, broken)
	if err := k.Apply(t.Context(), delta.Between(broken, have)); err == nil ||
		!strings.Contains(err.Error(), "it is not made") {
		t.Errorf("rules that cannot be: %v", err)
	}
	if s := observe(t, k, broken); len(s.Links)+len(s.Chains) > 0 {
		t.Errorf("without its rules the host has\n%s", s)
	}
	reconcile(t, k, want)
	wantText(t, observe(t, k, want).String(), want.String())
}

// TestXFRMListsAndRemovesOursAlone checks that XFRM lists only SAs and policies of Lariat's if_ids.
// The test removes these. Foreign SAs and policies remain.
func TestXFRMListsAndRemovesOursAlone(t *testing.T) {
	probe.Need(t, probe.ESP, probe.AESGCM, probe.XfrmInterface)
	ns, k := newKernel(t)
	var subnets []*net.IPNet
	for _, p := range []string{"0.0.0.0/0", "10.44.0.0/16", "fd44::/48", "fd44:1:2:3:4::/80"} {
		_, subnet, err := net.ParseCIDR(p)
		if err != nil {
			t.Fatal(err)
		}
		subnets = append(subnets, subnet)
	}
	ns.Do(t, func() {
		for i, id := range []int{0x4c000007, 7} {
			state := &netlink.XfrmState{Src: net.ParseIP("192.0.2.1"), Dst: net.ParseIP("192.0.2.2"),
				Proto: netlink.XFRM_PROTO_ESP, Mode: netlink.XFRM_MODE_TUNNEL, Spi: 0x1000 + i, Ifid: id,
				Aead: &netlink.XfrmStateAlgo{Name: "rfc4106(gcm(aes))", Key: make([]byte, 20), ICVLen: 128}}
			if err := netlink.XfrmStateAdd(state); err != nil {
				t.Fatal(err)
			}
			for _, dir := range []string{"in", "fwd", "out"} {
				for _, p := range subnets { // not by the library, which takes fd44::/48 for 253.68.0.0/48
					if out, err := exec.Command("ip", "xfrm", "policy", "add", "src", p.String(), "dst", p.String(), "dir", dir,
						"if_id", fmt.Sprint(id), "action", "block").CombinedOutput(); err != nil {
						t.Fatalf("%v: %s", err, out)
					}
				}
			}
		}
	})
	sas, policies, err := k.XFRM(t.Context(), ipsec.Owned)
	if err != nil || len(sas) != 1 || len(policies) != 12 {
		t.Fatalf("%v %v %v", sas, policies, err)
	}
	for _, dir := range []string{"in", "fwd", "out"} {
		for _, p := range subnets {
			want := fmt.Sprintf("xfrm policy src %s dst %s dir %s if_id 0x4c000007", p, p, dir)
			if !slices.ContainsFunc(policies, func(p kernel.XFRMPolicy) bool { return p.String() == want }) {
				t.Errorf("%q is not in %v", want, policies)
			}
		}
	}
	if got := sas[0].String(); got != "xfrm state src 192.0.2.1 dst 192.0.2.2 spi 0x00001000 if_id 0x4c000007" {
		t.Errorf("it prints %q", got)
	}
	for range 2 { // a missing object is no error
		if err := k.RemoveSA(t.Context(), sas[0]); err != nil {
			t.Error(err)
		}
		for _, p := range policies {
			if err := k.RemovePolicy(t.Context(), p); err != nil {
				t.Error(err)
			}
		}
	}
	theirs, others, err := k.XFRM(t.Context(), func(uint32) bool { return true })
	if err != nil || len(theirs) != 1 || len(others) != 12 || theirs[0].IfID != 7 {
		t.Errorf("left are %v %v %v", theirs, others, err)
	}
}

// TestF42_XFRMFlushesAreTold checks that Flushes reports a flush at once, and no single removals.
func TestF42_XFRMFlushesAreTold(t *testing.T) {
	probe.Need(t, probe.ESP, probe.XfrmInterface)
	ns, k := newKernel(t)
	told := make(chan struct{}, 9)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if err := k.Flushes(ctx, func() { told <- struct{}{} }); err != nil {
		t.Fatal(err)
	}
	ip := func(args ...string) {
		t.Helper()
		ns.Do(t, func() {
			if out, err := exec.Command("ip", append([]string{"xfrm"}, args...)...).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		})
	}
	policy := strings.Fields("src 10.44.0.0/16 dst 10.44.0.0/16 dir out if_id 7")
	for _, flush := range []string{"policy", "state"} {
		ip(append([]string{"policy", "add"}, append(policy, "action", "block")...)...)
		ip(append([]string{"policy", "delete"}, policy...)...)
		ip("state", "add", "src", "192.0.2.1", "dst", "192.0.2.2", "proto", "esp", "spi", "7", "enc", "ecb(cipher_null)", "")
		ip("state", "delete", "src", "192.0.2.1", "dst", "192.0.2.2", "proto", "esp", "spi", "7")
		if len(told) > 0 {
			t.Error("a flush was told where there was none")
		}
		ip("state", "add", "src", "192.0.2.1", "dst", "192.0.2.2", "proto", "esp", "spi", "7", "enc", "ecb(cipher_null)", "")
		ip(append([]string{"policy", "add"}, append(policy, "action", "block")...)...)
		ip(flush, "flush")
		<-told // or the test's own limit
		if flush == "policy" {
			ip("state", "delete", "src", "192.0.2.1", "dst", "192.0.2.2", "proto", "esp", "spi", "7")
		}
	}
}
