package guard_test

import (
	"flag"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/guard"
	"github.com/lariat-net/lariat/pkg/metadata"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func prefixes(list ...string) (out []netip.Prefix) {
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func hosts(underlay ...string) (out []metadata.Host) {
	for i, u := range underlay {
		out = append(out, metadata.Host{Name: string(rune('a' + i)),
			Underlay: []metadata.Underlay{{Address: netip.MustParsePrefix(u), Device: "eth0"}}})
	}
	return out
}

var (
	red = metadata.Network{Name: "red", Encapsulation: metadata.EncapVXLAN, VNI: 1042, HostNAT: true,
		Subnets: prefixes("10.42.0.0/16", "fd42::/48")}
	blue = metadata.Network{Name: "blue", Encapsulation: metadata.EncapVXLAN, VNI: 1043, HostNAT: true,
		Subnets: prefixes("10.43.0.0/16")}
	payroll = metadata.Network{Name: "payroll", Encapsulation: metadata.EncapIPsec,
		Subnets: prefixes("10.44.0.0/16", "fd44::/48")}
	flat = metadata.Network{Name: "flat", Encapsulation: metadata.EncapNone, Subnets: prefixes("192.0.2.0/24")}
)

func with(n metadata.Network, change func(*metadata.Network)) metadata.Network {
	change(&n)
	return n
}

// TestF174_Golden checks the rules of each small cluster against testdata.
func TestF174_Golden(t *testing.T) {
	two := hosts("192.0.2.1/24", "192.0.2.2/24")
	for _, tc := range []struct {
		name string
		snap metadata.Snapshot
	}{
		{"none", metadata.Snapshot{Hosts: two}},
		{"flat", metadata.Snapshot{Hosts: two, Networks: []metadata.Network{flat}}},
		{"one", metadata.Snapshot{Hosts: two, Networks: []metadata.Network{red, flat}, Blocks: []metadata.Block{
			{Network: "red", Host: "a", CIDR: netip.MustParsePrefix("10.42.0.0/26"), Gateway: netip.MustParseAddr("10.42.0.1")},
			{Network: "red", Host: "b", CIDR: netip.MustParsePrefix("fd42::40/122"),
				Gateway: netip.MustParseAddr("fd42::41")}}}},
		{"three", metadata.Snapshot{Hosts: two, Networks: []metadata.Network{red, blue, payroll}}},
		{"unlisted-host", metadata.Snapshot{Hosts: two[1:], Networks: []metadata.Network{red, blue}}},
		{"ipv6-underlay", metadata.Snapshot{Hosts: hosts("2001:db8::1/64", "2001:db8::2/64"),
			Networks: []metadata.Network{blue}}},
		{"encrypted", metadata.Snapshot{Hosts: two, Networks: []metadata.Network{payroll}}},
		{"opened", metadata.Snapshot{Hosts: two, Networks: []metadata.Network{
			with(red, func(n *metadata.Network) { n.AllowFrom = []string{"blue", "198.51.100.0/24", "2001:db8::/32"} }),
			with(blue, func(n *metadata.Network) { n.AllowFrom = []string{metadata.AllowAll, "0.0.0.0/0"} }),
			with(payroll, func(n *metadata.Network) { n.DirectRouting = false }), flat}}},
		{"exempt", metadata.Snapshot{Hosts: two, Networks: []metadata.Network{with(blue, func(n *metadata.Network) {
			n.HostNAT, n.AllowFrom, n.HostNATExempt = true, []string{"198.51.100.0/25"},
				prefixes("198.51.100.0/24", "10.42.0.0/15", "2001:db8::/32")
		})}}},
		{"on-its-link", metadata.Snapshot{Hosts: []metadata.Host{{Name: "a", Underlay: two[0].Underlay,
			Foreign: []metadata.Foreign{
				{Prefix: netip.MustParsePrefix("10.42.128.0/17"), Device: "docker0"},
				{Prefix: netip.MustParsePrefix("10.43.0.0/24"), Device: "eth0", Via: netip.MustParseAddr("192.0.2.254")}}}},
			Networks: []metadata.Network{red, blue}}},
		{"direct-routing", metadata.Snapshot{Hosts: two,
			Networks: []metadata.Network{with(red, func(n *metadata.Network) { n.DirectRouting, n.Port = true, 8472 })}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if sane := tc.snap.Sane(); len(sane.Problems) > 0 {
				t.Fatal(sane.Problems)
			}
			got := guard.Plan(&tc.snap, "a", false).String()
			golden := "testdata/" + tc.name + ".plan"
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("differs from %s (make update/golden rewrites it):\n%s", golden, got)
			}
			slices.Reverse(tc.snap.Networks)
			slices.Reverse(tc.snap.Hosts)
			if again := guard.Plan(&tc.snap, "a", false).String(); again != got {
				t.Errorf("the plan depends on the order of networks and hosts:\n%s", again)
			}
		})
	}
}

// TestF37_F144_RulesKnowNoPeers checks that one host and many hosts have the same rules.
// Therefore a change of a peer changes no rule.
func TestF37_F144_RulesKnowNoPeers(t *testing.T) {
	networks := []metadata.Network{red, blue, payroll}
	few := guard.Plan(&metadata.Snapshot{Hosts: hosts("192.0.2.1/24"), Networks: networks}, "a", false)
	many := guard.Plan(&metadata.Snapshot{Hosts: hosts("192.0.2.1/24", "192.0.2.2/24", "198.51.100.3/24"),
		Networks: networks}, "a", false)
	if d := delta.Between(many, few); d.Chains.Len() != 0 {
		t.Errorf("two peers more change the rules:\n%s", d)
	}
}

// TestF45_LooseReversePath checks that with a loose reverse-path check the rule matches both
// families. Nothing else differs.
func TestF45_LooseReversePath(t *testing.T) {
	snap := &metadata.Snapshot{Hosts: hosts("192.0.2.1/24"), Networks: []metadata.Network{red}}
	strict, loose := guard.Plan(snap, "a", false).String(), guard.Plan(snap, "a", true).String()
	want := strings.Replace(strict, "meta nfproto ipv6 fib saddr . iif oif missing drop",
		"fib saddr . iif oif missing drop", 1)
	if want == strict || loose != want {
		t.Errorf("with a loose check:\n%s\nwithout:\n%s", loose, strict)
	}
}

// TestF37_FailsClosed checks that blocking rules remain on a host that may have containers.
// The metadata does not list the host, or the host has no underlay address.
func TestF37_FailsClosed(t *testing.T) {
	bare := hosts("192.0.2.1/24")
	bare[0].Underlay = nil
	for name, list := range map[string][]metadata.Host{"removed": nil, "without an underlay": bare} {
		text := guard.Plan(&metadata.Snapshot{Hosts: list, Networks: []metadata.Network{payroll, red}}, "a", false).String()
		for _, rule := range []string{"guard ip saddr 10.44.0.0/16 iifgroup != 76",
			"guard ip daddr 10.42.0.0/16 iifgroup != 76", "from-port meta nfproto ipv6 fib saddr . iif oif missing drop"} {
			if !strings.Contains(text, rule) {
				t.Errorf("%s: %s is missing:\n%s", name, rule, text)
			}
		}
	}
}
