package kernel_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/kernel/netnstest"
	"github.com/lariat-net/lariat/pkg/probe"
)

func prefixes(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// filters has one statement of each kind.
func filters() *delta.State {
	s := delta.NewState()
	s.Sets["nat4-overlay"] = delta.Set{Interval: true, Elements: prefixes("10.42.0.0/16")}
	s.Sets["keep4-overlay"] = delta.Set{Interval: true, Elements: prefixes("0.0.0.0/8", "10.42.0.0/16", "10.43.0.0/16",
		"240.0.0.0/4")}
	s.Sets["keep6-overlay"] = delta.Set{Interval: true, V6: true, Elements: prefixes("fd42::/64", "ff00::/8")}
	s.Sets["vteps4"] = delta.Set{Elements: prefixes("192.0.2.1/32", "192.0.2.2/32")}
	s.Sets["vteps6"] = delta.Set{V6: true, Elements: prefixes("2001:db8::1/128")}
	s.Sets["ports"] = delta.Set{Ports: []uint16{500, 4789, 65535}}
	s.Sets["hosts4"] = delta.Set{Elements: prefixes("192.0.2.1/32", "192.0.2.2/32")}
	s.Sets["hosts6"] = delta.Set{V6: true, Elements: prefixes("2001:db8::1/128")}
	s.Chains["antispoof"] = delta.Chain{Type: "filter", Hook: "prerouting", Priority: -300, Rules: []delta.Rule{
		{delta.IifPrefix(delta.VethPrefix), delta.NoReverse{}, delta.Verdict("drop"),
			delta.MarkComment("own addresses only")},
	}}
	s.Chains["vtep-sources"] = delta.Chain{Type: "filter", Hook: "prerouting", Priority: -300, Rules: []delta.Rule{
		{delta.UDPDport(4789), delta.VXLANVNI(1042), delta.InSet{Field: "saddr", Set: "vteps4", Not: true},
			delta.Verdict("drop")},
		{delta.Iif{Name: "vtep1042", Not: true}, delta.UDPDport(4789), delta.InSet{Field: "saddr", Set: "vteps6", V6: true},
			delta.Verdict("accept")},
	}}
	s.Chains["clear-out"] = delta.Chain{Type: "filter", Hook: "postrouting", Priority: -300, Rules: []delta.Rule{
		{delta.InPrefix{Field: "daddr", Prefix: netip.MustParsePrefix("10.44.0.0/16")}, delta.OifGroup{Group: 76, Not: true},
			delta.NotRouteIPsec{}, delta.Verdict("drop")},
		{delta.InPrefix{Field: "saddr", Prefix: netip.MustParsePrefix("10.45.16.0/20")}, delta.IifGroup{Group: 76},
			delta.Verdict("accept")},
		{delta.InPrefix{Field: "daddr", Prefix: netip.MustParsePrefix("fd44::/48")}, delta.Verdict("drop")},
		{delta.InPrefix{Field: "saddr", Prefix: netip.MustParsePrefix("fd44::/50")}, delta.Verdict("drop")},
		{delta.InPrefix{Field: "saddr", Prefix: netip.MustParsePrefix("192.0.2.1/32")}, delta.Verdict("drop")},
	}}
	s.Chains["guard"] = delta.Chain{Type: "filter", Hook: "prerouting", Priority: -300, Rules: []delta.Rule{
		{delta.IifPrefix(delta.VethPrefix), delta.Jump("from-port")},
		{delta.InPrefix{Field: "daddr", Prefix: netip.MustParsePrefix("192.0.2.1/32")}, delta.UDPDport(4789), delta.Notrack{},
			delta.Verdict("accept")},
		{delta.InPrefix{Field: "daddr", Prefix: netip.MustParsePrefix("10.42.0.0/16")}, delta.Reverse{},
			delta.Verdict("accept")},
	}}
	s.Chains["from-port"] = delta.Chain{Rules: []delta.Rule{
		{delta.DportIn{Proto: 6, Set: "ports"}, delta.Verdict("drop")},
		{delta.NoReverse{V6: true}, delta.Verdict("drop")},
		{delta.L4Proto(6), delta.Verdict("accept")},
		{delta.UDPDport(500), delta.ToLocal{}, delta.Verdict("drop")},
		{delta.L4Proto(50), delta.InSet{Field: "daddr", Set: "hosts4"}, delta.Verdict("drop")},
		{delta.L4Proto(99), delta.UDPSport(500), delta.Verdict("drop")},
		{delta.L4Proto(17), delta.Verdict("accept")},
	}}
	s.Chains["isolation"] = delta.Chain{Type: "filter", Hook: "forward", Priority: -10, Rules: []delta.Rule{
		{delta.NotAddr{Field: "daddr", Addr: netip.MustParseAddr("192.0.2.1")}, delta.UDPDport(4789), delta.Verdict("drop")},
		{delta.NotAddr{Field: "saddr", Addr: netip.MustParseAddr("2001:db8::1")}, delta.Fragment{V6: true},
			delta.Verdict("drop")},
		{delta.DportIn{Proto: 17, Set: "ports"}, delta.Fragment{}, delta.ToLocal{}, delta.Verdict("drop")},
		{delta.UDPDport(4789), delta.Fragment{V6: true}, delta.InSet{Field: "saddr", Set: "hosts6", V6: true, Not: true},
			delta.Verdict("drop")},
		{delta.TooBig{From: netip.MustParseAddr("192.0.2.1"), To: "hosts4", Below: 1500}, delta.Verdict("drop")},
		{delta.TooBig{From: netip.MustParseAddr("2001:db8::1"), To: "hosts6", Below: 1500}, delta.Verdict("drop")},
		{delta.NotIifPrefix(delta.VTEPPrefix), delta.CtReply{}, delta.Verdict("accept")},
		{delta.CtDNAT{}, delta.Verdict("accept")},
	}}
	s.Chains["ports"] = delta.Chain{Type: "nat", Hook: "postrouting", Priority: 101, Rules: []delta.Rule{
		{delta.L4Proto(6), delta.Masquerade{First: 32768, Last: 60999}},
		{delta.InSet{Field: "saddr", Set: "hosts4"}, delta.L4Proto(132), delta.Masquerade{First: 32768, Last: 60999}},
		{delta.L4Proto(33), delta.Masquerade{First: 1, Last: 2}},
	}}
	s.Chains["egress"] = delta.Chain{Type: "nat", Hook: "postrouting", Priority: 100, Rules: []delta.Rule{
		{delta.InSet{Field: "saddr", Set: "nat4-overlay"}, delta.InSet{Field: "daddr", Set: "keep4-overlay", Not: true},
			delta.Oif{Name: "vtep1042", Not: true}, delta.Masquerade{}},
	}}
	return s
}

func TestNftablesHoldWhatThePlanSays(t *testing.T) {
	probe.Need(t, probe.NftFib, probe.NftNAT)
	_, k := newKernel(t)
	want := filters()
	reconcile(t, k, want)
	wantText(t, observe(t, k, want).String(), want.String())
	if d := reconcile(t, k, want); !d.Empty() {
		t.Errorf("F141: a settled ruleset still differs:\n%s", d)
	}
}

// Another Netns, which did not write the table and has no cache, must read the same table.
func TestNftablesReadBackByAnother(t *testing.T) {
	probe.Need(t, probe.NftFib, probe.NftNAT)
	ns, k := newKernel(t)
	want := filters()
	reconcile(t, k, want)
	other := openKernel(t, ns)
	wantText(t, observe(t, other, nil).String(), want.String())
}

func TestNftablesPrintAsNftDoes(t *testing.T) {
	probe.Need(t, probe.NftFib, probe.NftNAT)
	ns, k := newKernel(t)
	want := filters()
	reconcile(t, k, want)
	listing := ns.Command(t, "nft", "-y", "list", "table", "inet", delta.Table)
	for name, c := range want.Chains {
		if !strings.Contains(listing, "chain "+name+" {") {
			t.Errorf("nft lists no chain %s", name)
		}
		for _, r := range c.Rules {
			if !strings.Contains(listing, "\t\t"+r.String()+"\n") {
				t.Errorf("nft does not list the rule %s", r)
			}
		}
	}
	squeezed := strings.Join(strings.Fields(listing), " ")
	for name, s := range want.Sets {
		text := strings.TrimPrefix((&delta.State{Sets: map[string]delta.Set{name: s}}).String(), "set   inet lariat ")
		text = strings.ReplaceAll(strings.TrimSpace(text), ";", "")
		if !strings.Contains(squeezed, "set "+text) {
			t.Errorf("nft does not list set %s", text)
		}
	}
	if t.Failed() {
		t.Log(listing)
	}
}

func TestF29NftablesChangedByHandAreMended(t *testing.T) {
	for _, tc := range []struct{ name, command string }{
		{"a rule removed", "flush chain inet lariat antispoof"},
		{"a rule added", "add rule inet lariat egress accept"},
		{"a rule added in front", `insert rule inet lariat vtep-sources ip saddr 1.2.3.4 counter log prefix "x" accept`},
		{"a rule with a counter", "insert rule inet lariat antispoof counter"},
		{"an element added", "add element inet lariat vteps4 { 203.0.113.9 }"},
		{"an element removed", "delete element inet lariat keep4-overlay { 10.43.0.0/16 }"},
		{"a port added", "add element inet lariat ports { 22 }"},
		{"a port removed", "delete element inet lariat ports { 500 }"},
		{"a range added", "add element inet lariat keep4-overlay { 192.0.2.5-192.0.2.9 }"},
		{"a chain added", "add chain inet lariat mine { type filter hook input priority 0; policy drop; }"},
		{"a chain without hook that a rule jumps to", "add chain inet lariat mine; add rule inet lariat mine drop; add " +
			"rule inet lariat antispoof jump mine"},
		{"a policy of drop", "add chain inet lariat antispoof { policy drop; }"},
		{"a set added", "add set inet lariat mine { type inet_service; flags timeout; }"},
		{"a map added", "add map inet lariat mine { type ipv4_addr : ipv4_addr; }"},
		{"a rule with a set of its own", "add rule inet lariat egress tcp dport { 1, 2 } accept"},
		{"the table removed", "delete table inet lariat"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			probe.Need(t, probe.NftFib, probe.NftNAT)
			ns, k := newKernel(t)
			want := filters()
			reconcile(t, k, want)
			ns.Command(t, "nft", tc.command)
			if d := reconcile(t, k, want); d.Empty() {
				t.Fatal("went unnoticed")
			}
			wantText(t, observe(t, openKernel(t, ns), nil).String(), want.String())
			if d := reconcile(t, k, want); !d.Empty() {
				t.Errorf("not settled:\n%s", d)
			}
		})
	}
}

func TestNftablesFollowThePlan(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(s *delta.State)
	}{
		{"an element more and one less", func(s *delta.State) {
			s.Sets["vteps4"] = delta.Set{Elements: prefixes("192.0.2.2/32", "192.0.2.3/32")}
		}},
		{"a wider prefix in place of a narrow one", func(s *delta.State) {
			s.Sets["nat4-overlay"] = delta.Set{Interval: true, Elements: prefixes("10.0.0.0/8")}
		}},
		{"everything", func(s *delta.State) {
			s.Sets["nat4-overlay"] = delta.Set{Interval: true, Elements: prefixes("0.0.0.0/0")}
		}},
		{"a set of another type", func(s *delta.State) {
			s.Sets["vteps4"] = delta.Set{Interval: true, Elements: prefixes("192.0.2.0/24")}
		}},
		{"a chain at another hook", func(s *delta.State) {
			c := s.Chains["antispoof"]
			c.Hook = "forward"
			s.Chains["antispoof"] = c
		}},
		{"a chain and its sets less", func(s *delta.State) {
			delete(s.Chains, "vtep-sources")
			delete(s.Sets, "vteps4")
			delete(s.Sets, "vteps6")
		}},
		{"nothing at all", func(s *delta.State) { *s = *delta.NewState() }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			probe.Need(t, probe.NftFib, probe.NftNAT)
			ns, k := newKernel(t)
			reconcile(t, k, filters())
			want := filters()
			tc.change(want)
			reconcile(t, k, want)
			wantText(t, observe(t, openKernel(t, ns), nil).String(), want.String())
			if d := reconcile(t, k, want); !d.Empty() {
				t.Errorf("not settled:\n%s", d)
			}
		})
	}
}

// Applying a difference again must be harmless, even after half of it was reverted.
func TestNftablesApplyTwice(t *testing.T) {
	probe.Need(t, probe.NftFib, probe.NftNAT)
	ns, k := newKernel(t)
	reconcile(t, k, filters())
	want := filters()
	want.Sets["vteps4"] = delta.Set{Elements: prefixes("192.0.2.2/32", "192.0.2.3/32")}
	delete(want.Chains, "egress")
	delete(want.Sets, "nat4-overlay")
	d := delta.Between(want, observe(t, k, want))
	for range 2 {
		if err := k.Apply(t.Context(), d); err != nil {
			t.Fatal(err)
		}
	}
	if err := openKernel(t, ns).Apply(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	wantText(t, observe(t, openKernel(t, ns), nil).String(), want.String())
}

func BenchmarkNftablesSettled10000(b *testing.B) {
	probe.Need(b, probe.NftFib, probe.NftNAT)
	_, k := newKernel(b)
	want := filters()
	s := delta.Set{}
	for i := range 10000 {
		a := netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)})
		s.Elements = append(s.Elements, netip.PrefixFrom(a, 32))
	}
	want.Sets["vteps4"] = s
	reconcile(b, k, want)
	for b.Loop() {
		if d := reconcile(b, k, want); !d.Empty() {
			b.Fatal(d)
		}
	}
}

func BenchmarkNftablesFromNothing10000(b *testing.B) {
	probe.Need(b, probe.NftFib, probe.NftNAT)
	_, k := newKernel(b)
	want := filters()
	s := delta.Set{}
	for i := range 10000 {
		a := netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)})
		s.Elements = append(s.Elements, netip.PrefixFrom(a, 32))
	}
	want.Sets["vteps4"] = s
	for b.Loop() {
		reconcile(b, k, want)
		b.StopTimer()
		reconcile(b, k, delta.NewState())
		b.StartTimer()
	}
}

// TestF29_SetsThatGoWhileTheyAreRead checks that a listed set that vanishes before its read is no
// error. Another process, such as the network manager, changes the table while an ADD reads it.
func TestF29_SetsThatGoWhileTheyAreRead(t *testing.T) {
	host := netnstest.New(t)
	k := openKernel(t, host)
	var add, remove strings.Builder
	fmt.Fprintln(&add, "add table inet lariat")
	for i := range 200 {
		fmt.Fprintf(&add, "add set inet lariat passing%[1]d { type ipv4_addr; flags interval; elements = { "+
			"10.%[1]d.0.0/16 }; }\n", i)
		fmt.Fprintf(&remove, "delete set inet lariat passing%d\n", i)
	}
	dir := t.TempDir()
	for name, text := range map[string]string{"add": add.String(), "remove": remove.String()} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want := delta.NewState()
	want.Sets["vteps4"] = delta.Set{Elements: prefixes("192.0.2.1/32")}
	done := make(chan struct{})
	go func() {
		defer close(done)
		script := "for i in $(seq 20); do nft -f " + dir + "/add; nft -f " + dir + "/remove; done"
		host.Do(t, func() {
			if out, err := exec.Command("sh", "-ec", script).CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
	}()
	for {
		_, err := k.Observe(t.Context(), want)
		if errors.Is(err, unix.ENOENT) {
			t.Errorf("read while sets come and go: %v", err)
		}
		select {
		case <-done:
			return
		default:
		}
	}
}
