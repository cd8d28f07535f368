package kernel_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/kernel/netnstest"
	"github.com/lariat-net/lariat/pkg/probe"
)

// rows returns the lines of a command's output, with single spaces and in the command's order.
func rows(out string) map[string]bool {
	m := map[string]bool{}
	for line := range strings.Lines(out) {
		if l := strings.Join(strings.Fields(line), " "); l != "" {
			m[l] = true
		}
	}
	return m
}

func sameRows(t *testing.T, what, out string, want ...string) {
	t.Helper()
	got := rows(out)
	for _, w := range want {
		if !got[w] {
			t.Errorf("%s: missing row %q", what, w)
		}
		delete(got, w)
	}
	for g := range got {
		t.Errorf("%s: unexpected row %q", what, g)
	}
}

func TestF23F26IPRouteListsExactlyTheRowsOfThePlan(t *testing.T) {
	ns, k := newKernel(t)
	reconcile(t, k, overlay(2))
	sameRows(t, "ip route", ns.Command(t, "ip", "route"),
		"blackhole 10.42.0.0/26 proto 76",
		"10.43.0.64/26 nhid 1275068417 via 198.18.0.1 dev vtep1042 proto 76 src 10.42.0.1 onlink",
		"10.43.0.128/26 nhid 1275068418 via 198.18.0.2 dev vtep1042 proto 76 src 10.42.0.1 onlink")
	sameRows(t, "ip nexthop", ns.Command(t, "ip", "nexthop"),
		"id 1275068417 via 198.18.0.1 dev vtep1042 scope link proto 76 onlink",
		"id 1275068418 via 198.18.0.2 dev vtep1042 scope link proto 76 onlink")
	sameRows(t, "ip neigh", ns.Command(t, "ip", "neigh", "show", "dev", "vtep1042"),
		"198.18.0.1 lladdr 0e:00:c6:12:00:01 PERMANENT",
		"198.18.0.2 lladdr 0e:00:c6:12:00:02 PERMANENT")
	sameRows(t, "bridge fdb", ns.Command(t, "bridge", "fdb", "show", "dev", "vtep1042"),
		"0e:00:c6:12:00:01 dst 198.18.0.1 self permanent",
		"0e:00:c6:12:00:02 dst 198.18.0.2 self permanent")
	link := ns.Command(t, "ip", "-d", "link", "show", "vtep1042")
	for _, w := range []string{"vxlan id 1042 local 192.0.2.1", "dstport 4789", "nolearning", "mtu 1450",
		"link/ether 0e:00:c0:00:02:01", "alias lariat:vxlan:overlay", "udpcsum", ",UP"} {
		if !strings.Contains(link, w) {
			t.Errorf("ip link does not say %q:\n%s", w, link)
		}
	}
	addrs := ns.Command(t, "ip", "addr", "show", "dev", "vtep1042")
	for _, w := range []string{"inet 10.42.0.1/32", "inet6 fd42::1/128", "inet6 fe80::c00:c0ff:fe00:201/64"} {
		if !strings.Contains(addrs, w) {
			t.Errorf("ip addr does not say %q:\n%s", w, addrs)
		}
	}
	if strings.Contains(addrs, "tentative") {
		t.Errorf("an address waits for duplicates:\n%s", addrs)
	}
}

func TestF25TheMACIsThereFromTheFirstMomentAndStays(t *testing.T) {
	ns, k := newKernel(t)
	// One message creates the device with its MAC: a monitor never sees another MAC.
	want := overlay(1)
	reconcile(t, k, want)
	before := ns.Command(t, "cat", "/proc/net/if_inet6")
	reconcile(t, k, want)
	if after := ns.Command(t, "cat", "/proc/net/if_inet6"); after != before {
		t.Errorf("a second pass changed\n%s\nto\n%s", before, after)
	}
	if got := observe(t, k, want).Links["vtep1042"].MAC; got != want.Links["vtep1042"].MAC {
		t.Errorf("MAC %s", got)
	}
}

func TestF29WhatIsTakenAwayByHandComesBack(t *testing.T) {
	for _, tc := range []struct{ name, command, diff string }{
		{"a forwarding entry", "bridge fdb del 0e:00:c6:12:00:01 dev vtep1042 dst 198.18.0.1 self",
			"+ fdb   0e:00:c6:12:00:01 dev vtep1042 dst 198.18.0.1\n"},
		{"a neighbour", "ip neigh del 198.18.0.1 dev vtep1042",
			"+ neigh 198.18.0.1 dev vtep1042 lladdr 0e:00:c6:12:00:01 permanent\n"},
		{"a neighbour's MAC", "ip neigh replace 198.18.0.1 lladdr 02:00:00:00:00:01 dev vtep1042 nud permanent",
			"~ neigh 198.18.0.1 dev vtep1042 lladdr 0e:00:c6:12:00:01 permanent # was neigh 198.18.0.1 dev vtep1042 lladdr " +
				"02:00:00:00:00:01 permanent\n"},
		{"a neighbour that is not permanent any more", "ip neigh replace 198.18.0.1 lladdr 0e:00:c6:12:00:01 dev " +
			"vtep1042 nud stale", "+ neigh 198.18.0.1 dev vtep1042 lladdr 0e:00:c6:12:00:01 permanent\n"},
		{"a route", "ip route del 10.43.0.64/26", "+ route 10.43.0.64/26 nhid 1275068417 src 10.42.0.1 proto 76\n"},
		{"a route's way", "ip route replace 10.43.0.64/26 dev vtep1042 proto 76",
			"~ route 10.43.0.64/26 nhid 1275068417 src 10.42.0.1 proto 76 # was route 10.43.0.64/26 dev vtep1042 proto 76\n"},
		{"a blackhole", "ip route del blackhole 10.42.0.0/26", "+ route blackhole 10.42.0.0/26 proto 76\n"},
		{"a blackhole of IPv6", "ip -6 route del blackhole fd42::/122", "+ route blackhole fd42::/122 proto 76\n"},
		{"a nexthop with its route", "ip nexthop del id 1275068417",
			"+ nexthop id 1275068417 via 198.18.0.1 dev vtep1042 onlink proto 76\n+ route 10.43.0.64/26 nhid 1275068417 " +
				"src 10.42.0.1 proto 76\n"},
		{"the IPv6 address", "ip addr del fd42::1/128 dev vtep1042", "+ addr  fd42::1/128 dev vtep1042\n"},
		{"an address too many", "ip addr add 10.99.0.1/32 dev vtep1042", "- addr  10.99.0.1/32 dev vtep1042\n"},
		{"a route too many", "ip route add 10.99.0.0/24 dev vtep1042 proto 76",
			"- route 10.99.0.0/24 dev vtep1042 proto 76\n"},
		{"a blackhole of IPv6 too many", "ip -6 route add blackhole fd99::/64 proto 76",
			"- route blackhole fd99::/64 proto 76\n"},
		{"a forwarding entry too many", "bridge fdb append 0e:00:c6:12:00:09 dev vtep1042 dst 198.18.0.9 self permanent",
			"- fdb   0e:00:c6:12:00:09 dev vtep1042 dst 198.18.0.9\n"},
		{"F28: the destination of a forwarding entry",
			"bridge fdb replace 0e:00:c6:12:00:01 dev vtep1042 dst 198.18.0.9 self permanent",
			"+ fdb   0e:00:c6:12:00:01 dev vtep1042 dst 198.18.0.1\n- fdb   0e:00:c6:12:00:01 dev vtep1042 dst 198.18.0.9\n"},
		{"a forwarding entry for what nobody knows", "bridge fdb append 00:00:00:00:00:00 dev vtep1042 dst 198.18.0.9 " +
			"self permanent", "- fdb   00:00:00:00:00:00 dev vtep1042 dst 198.18.0.9\n"},
		{"the MTU", "ip link set vtep1042 mtu 1300", ""},
		{"the MAC, and with it the neighbours", "ip link set vtep1042 address 02:00:00:00:00:01", ""},
		{"the alias", "ip link set vtep1042 alias nothing", ""},
		{"the link is down", "ip link set vtep1042 down", ""},
		{"the device", "ip link del vtep1042", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ns, k := newKernel(t)
			want := overlay(2)
			reconcile(t, k, want)
			f := strings.Fields(tc.command)
			ns.Command(t, f[0], f[1:]...)
			d := reconcile(t, k, want)
			if d.Empty() {
				t.Error("went unnoticed")
			}
			if tc.diff != "" {
				wantText(t, d.String(), tc.diff)
			}
			wantText(t, observe(t, k, want).String(), want.String())
			if d := reconcile(t, k, want); !d.Empty() {
				t.Errorf("not settled after one pass:\n%s", d)
			}
		})
	}
}

func TestF31DeviceWithWrongParametersIsMadeAgain(t *testing.T) {
	for _, tc := range []struct{ name, command string }{
		{"another VNI", "id 7 dstport 4789 local 192.0.2.1 nolearning"},
		{"another port", "id 1042 dstport 8472 local 192.0.2.1 nolearning"},
		{"another local address", "id 1042 dstport 4789 local 192.0.2.99 nolearning"},
		{"no local address", "id 1042 dstport 4789 nolearning"},
		{"learning", "id 1042 dstport 4789 local 192.0.2.1 learning"},
		{"a remote", "id 1042 dstport 4789 local 192.0.2.1 remote 192.0.2.9 nolearning"},
		{"metadata mode", "external dstport 4789 nolearning"},
		{"a group policy", "id 1042 dstport 4789 local 192.0.2.1 nolearning gbp"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ns, k := newKernel(t)
			var log bytes.Buffer
			k.Log = slog.New(slog.NewTextHandler(&log, nil))
			ns.Command(t, "ip", append(strings.Fields("link add vtep1042 type vxlan"), strings.Fields(tc.command)...)...)
			ns.Command(t, "ip", "addr", "add", "10.99.0.1/32", "dev", "vtep1042")
			ns.Command(t, "ip", "link", "set", "vtep1042", "up")
			want := overlay(2)
			reconcile(t, k, want)
			wantText(t, observe(t, k, want).String(), want.String())
			if !strings.Contains(log.String(), "made again") || !strings.Contains(log.String(), "vtep1042") {
				t.Errorf("nothing of it in the log: %q", log.String())
			}
			if d := reconcile(t, k, want); !d.Empty() {
				t.Errorf("not settled:\n%s", d)
			}
		})
	}
}

// After a single pass the re-created device has all objects of the old device.
func TestF31EverythingIsBackInTheSamePass(t *testing.T) {
	_, k := newKernel(t)
	want := overlay(200)
	reconcile(t, k, want)
	l := want.Links["vtep1042"]
	l.Local = netip.MustParseAddr("192.0.2.77")
	want.Links["vtep1042"] = l
	reconcile(t, k, want)
	wantText(t, observe(t, k, want).String(), want.String())
}

func TestF31DeviceWithoutAliasIsAdopted(t *testing.T) {
	ns, k := newKernel(t)
	ns.Command(t, "ip", strings.Fields("link add vtep1042 address 0e:00:c0:00:02:01 type vxlan id 1042 dstport 4789 "+
		"local 192.0.2.1 nolearning")...)
	index := ns.Command(t, "cat", "/proc/net/dev")
	_ = index
	want := overlay(1)
	reconcile(t, k, want)
	wantText(t, observe(t, k, want).String(), want.String())
}

func TestF32ForeignDeviceUnderOurNameIsLeftAloneAndNamed(t *testing.T) {
	ns, k := newKernel(t)
	ns.Command(t, "ip", "link", "add", "vtep1042", "type", "veth", "peer", "name", "x")
	before := ns.Command(t, "ip", "addr")
	want := overlay(2)
	other := delta.Addr{Dev: "lo", Prefix: netip.MustParsePrefix("169.254.169.250/32")}
	want.Addrs[other] = struct{}{}
	have := observe(t, k, want)
	if len(have.Problems) != 1 || !strings.Contains(have.Problems[0], "vtep1042") {
		t.Errorf("problems %q", have.Problems)
	}
	_, err := kernel.Reconcile(t.Context(), k, want)
	if !errors.Is(err, unix.EEXIST) || !strings.Contains(err.Error(), "vtep1042") ||
		!strings.Contains(err.Error(), "veth") {
		t.Errorf("error %v, want one that names vtep1042 and veth", err)
	}
	ns.Command(t, "ip", "addr", "del", "169.254.169.250/32", "dev", "lo") // was set: the rest applies
	if after := ns.Command(t, "ip", "addr"); after != before {
		t.Errorf("the device of others was changed from\n%s\nto\n%s", before, after)
	}
	if out := ns.Command(t, "ip", "neigh"); out != "" {
		t.Errorf("neighbours on a device of others: %s", out)
	}
}

func TestF32ForeignStateSurvives(t *testing.T) {
	probe.Need(t, probe.VXLAN, probe.NexthopObjects, probe.Nft, probe.Veth)
	ns, other := netnstest.New(t), netnstest.New(t)
	k := openKernel(t, ns)
	// The kernel's own link-local addresses appear late, with routes, and send packets.
	for _, n := range []*netnstest.NS{ns, other} {
		n.Do(t, func() {
			if err := os.WriteFile("/proc/sys/net/ipv6/conf/default/addr_gen_mode", []byte("1"), 0); err != nil {
				t.Fatal(err)
			}
		})
	}
	dev, _ := netnstest.Veth(t, ns, "192.0.2.1/24", other, "192.0.2.2/24")
	for _, c := range []string{
		"route add 203.0.113.0/24 via 192.0.2.2 proto static",
		"route add 10.77.0.0/24 via 192.0.2.2 proto 76 table 100", // of another table
		"-6 route add blackhole fd77::/64 proto static",
		"neigh add 192.0.2.9 lladdr 02:00:00:00:00:09 dev " + dev,
		"nexthop add id 7 via 192.0.2.2 dev " + dev,
		"link add mine type vxlan id 99 dstport 4789 local 192.0.2.1 nolearning",
		"addr add 10.88.0.1/24 dev mine",
		"link set mine up",
		"link add lrtaaaa type veth peer name lrtbbbb",
		"link set lrtaaaa up",
		"route add 10.42.0.5/32 dev lrtaaaa proto 76", // a container's
		"-6 route add fd42::5/128 dev lrtaaaa proto 76",
	} {
		ns.Command(t, "ip", strings.Fields(c)...)
	}
	ns.Command(t, "bridge", strings.Fields("fdb append 02:00:00:00:00:01 dev mine dst 192.0.2.9 self permanent")...)
	ns.Command(t, "nft", "add table inet others; add chain inet others c { type filter hook input priority 0; }; add "+
		"rule inet others c counter")
	world := func() string {
		var b strings.Builder
		for _, c := range []string{"ip addr", "ip route show table all", "ip -6 route show table all", "ip neigh show dev " +
			dev, "ip nexthop", "bridge fdb show dev mine", "nft list ruleset"} {
			f := strings.Fields(c)
			b.WriteString(ns.Command(t, f[0], f[1:]...))
		}
		return b.String()
	}
	before := world()
	want := overlay(3)
	for name, s := range filters().Sets {
		want.Sets[name] = s
	}
	reconcile(t, k, want)
	if d := reconcile(t, k, want); !d.Empty() {
		t.Errorf("not settled:\n%s", d)
	}
	if got := reconcile(t, k, delta.NewState()); got.Empty() {
		t.Error("nothing was taken away")
	}
	if after := world(); after != before {
		t.Errorf("before\n%s\nafter\n%s", before, after)
	}
}

func TestF32ForeignRouteToOurDestinationIsNamedAndKept(t *testing.T) {
	ns, k := newKernel(t)
	ns.Command(t, "ip", "link", "add", "x", "type", "veth", "peer", "name", "y")
	ns.Command(t, "ip", "link", "set", "x", "up")
	ns.Command(t, "ip", "link", "set", "y", "up")
	ns.Command(t, "ip", "link", "add", "lrtaaaa", "type", "veth", "peer", "name", "lrtbbbb")
	ns.Command(t, "ip", "link", "set", "lrtaaaa", "up")
	ns.Command(t, "ip", "route", "add", "10.43.0.64/26", "dev", "x", "proto", "static")
	// This is the route of a container that has just moved to this host.
	ns.Command(t, "ip", "route", "add", "10.43.0.128/26", "dev", "lrtaaaa", "proto", "76")
	ns.Command(t, "ip", "nexthop", "add", "id", "1275068419", "dev", "x")
	_, err := kernel.Reconcile(t.Context(), k, overlay(3))
	for _, w := range []string{"10.43.0.64/26", "10.43.0.128/26", "id 1275068419"} {
		if err == nil || !strings.Contains(err.Error(), w) {
			t.Errorf("the error does not name %s: %v", w, err)
		}
	}
	out := ns.Command(t, "ip", "route")
	for _, w := range []string{"10.43.0.64/26 dev x proto static", "10.43.0.128/26 dev lrtaaaa proto 76"} {
		if !strings.Contains(out, w) {
			t.Errorf("%q is gone from\n%s", w, out)
		}
	}
}

// A foreign route to a network's whole subnet remains in force.
// The unreachable route of an earlier version, which had no metric, is replaced.
func TestF32TheLastMetricComesBehindEveryOtherRoute(t *testing.T) {
	ns, k := newKernel(t)
	want := overlay(1)
	subnets := []string{"10.42.0.0/16", "fd42::/48"}
	for _, p := range subnets {
		want.Routes[delta.RouteKey{Dst: netip.MustParsePrefix(p),
			Metric: delta.LastMetric}] = delta.Route{Type: "unreachable"}
	}
	ns.Command(t, "sh", "-ec", "ip link add x type veth peer name y; ip link set y up; ip link set x up")
	for _, p := range subnets {
		ns.Command(t, "ip", "route", "add", p, "dev", "x", "proto", "static")
	}
	taken := func(what string) {
		t.Helper()
		for _, to := range []string{"10.42.200.1", "fd42:0:0:200::1"} {
			if got := ns.Command(t, "sh", "-c", "ip route get "+to+" 2>&1 || true"); !strings.Contains(got, what) {
				t.Errorf("the way to %s is %q, want %q", to, got, what)
			}
		}
	}
	reconcile(t, k, want)
	wantText(t, observe(t, k, want).String(), want.String())
	taken("dev x")
	for _, p := range subnets {
		ns.Command(t, "ip", "route", "del", p, "dev", "x")
		ns.Command(t, "ip", "route", "add", "unreachable", p, "proto", "76")
	}
	if d := reconcile(t, k, want); d.Routes.Len() != 2 || len(d.Routes.Remove) != 2 {
		t.Errorf("done:\n%s", d)
	}
	wantText(t, observe(t, k, want).String(), want.String())
	taken("No route to host") // and not: Network is unreachable
}

func TestApplyTwiceIsHarmless(t *testing.T) {
	_, k := newKernel(t)
	reconcile(t, k, overlay(2))
	want := overlay(4)
	delete(want.Routes, delta.To(netip.MustParsePrefix("10.43.0.64/26")))
	delete(want.Nexthops, 0x4c000001)
	l := want.Links["vtep1042"]
	l.MTU = 1400
	want.Links["vtep1042"] = l
	d := delta.Between(want, observe(t, k, want))
	for range 3 {
		if err := k.Apply(t.Context(), d); err != nil {
			t.Fatal(err)
		}
	}
	wantText(t, observe(t, k, want).String(), want.String())
}

// The plugin and the network manager may create the same overlay at the same time.
func TestReconcileByManyAtOnce(t *testing.T) {
	ns, _ := newKernel(t)
	want := overlay(50)
	for name, s := range filters().Sets {
		want.Sets[name] = s
	}
	for name, c := range filters().Chains {
		want.Chains[name] = c
	}
	var wg sync.WaitGroup
	for range 6 {
		k := openKernel(t, ns)
		wg.Go(func() {
			if _, err := kernel.Reconcile(context.Background(), k, want); err != nil {
				t.Errorf("reconcile: %v", err)
			}
		})
	}
	wg.Wait()
	wantText(t, observe(t, openKernel(t, ns), want).String(), want.String())
}

func TestSysctlsAreThoseOfTheNamespace(t *testing.T) {
	ns, k := newKernel(t)
	want := overlay(1)
	want.Sysctls["net/ipv4/ip_forward"] = "1"
	want.Sysctls["net/ipv4/conf/vtep1042/rp_filter"] = "2"
	d := reconcile(t, k, want)
	if !strings.Contains(d.String(), "sysctl net/ipv4/conf/vtep1042/rp_filter=2") {
		t.Errorf("diff\n%s", d)
	}
	if got := ns.Command(t, "cat", "/proc/sys/net/ipv4/ip_forward",
		"/proc/sys/net/ipv4/conf/vtep1042/rp_filter"); got != "1\n2\n" {
		t.Errorf("sysctls are %q", got)
	}
	if d := reconcile(t, k, want); !d.Empty() {
		t.Errorf("not settled:\n%s", d)
	}
	want.Sysctls["net/no/such"] = "1"
	if _, err := kernel.Reconcile(t.Context(), k, want); err == nil || !strings.Contains(err.Error(), "net/no/such") {
		t.Errorf("error %v, want one that names net/no/such", err)
	}
}

func TestMissingDeviceIsToldOnce(t *testing.T) {
	_, k := newKernel(t)
	want := overlay(500)
	clear(want.Links)
	_, err := kernel.Reconcile(t.Context(), k, want)
	if err == nil || !strings.Contains(err.Error(), "device vtep1042 is missing") || len(err.Error()) > 20000 {
		t.Errorf("got %d characters of error: %.300v", len(fmt.Sprint(err)), err)
	}
}

func TestDirectRoutesNeedNoTunnel(t *testing.T) {
	probe.Need(t, probe.VXLAN, probe.NexthopObjects, probe.Nft, probe.Veth)
	ns, other := netnstest.New(t), netnstest.New(t)
	k := openKernel(t, ns)
	dev, _ := netnstest.Veth(t, ns, "192.0.2.1/24", other, "192.0.2.2/24")
	want := overlay(1)
	want.Nexthops[0x4c00ffff] = delta.Nexthop{Via: netip.MustParseAddr("192.0.2.2"), Dev: dev}
	want.Routes[delta.To(netip.MustParsePrefix("10.60.0.0/26"))] = delta.Route{NH: 0x4c00ffff,
		Src: netip.MustParseAddr("10.42.0.1")}
	want.Routes[delta.To(netip.MustParsePrefix("10.61.0.0/26"))] = delta.Route{Via: netip.MustParseAddr("192.0.2.2"),
		Dev: dev, MTU: 1400}
	want.Routes[delta.To(netip.MustParsePrefix("10.62.0.0/26"))] = delta.Route{Type: "unreachable"}
	want.Routes[delta.To(netip.MustParsePrefix("10.63.0.0/26"))] = delta.Route{Dev: dev}
	// An IPv4 route has an IPv6 nexthop, as over an IPv6 underlay.
	ll := netip.MustParseAddr("fe80::c00:c6ff:fe12:1")
	want.Nexthops[0x4c00fffe] = delta.Nexthop{Via: ll, Dev: "vtep1042", Onlink: true}
	want.Neighs[delta.Neigh{Dev: "vtep1042", Addr: ll}] = delta.MAC{0x0e, 0, 198, 18, 0, 1}
	want.Routes[delta.To(netip.MustParsePrefix("10.64.0.0/26"))] = delta.Route{NH: 0x4c00fffe,
		Src: netip.MustParseAddr("10.42.0.1")}
	want.Routes[delta.To(netip.MustParsePrefix("fd64::/64"))] = delta.Route{NH: 0x4c00fffe,
		Src: netip.MustParseAddr("fd42::1")}
	reconcile(t, k, want)
	wantText(t, observe(t, k, want).String(), want.String())
	if d := reconcile(t, k, want); !d.Empty() {
		t.Errorf("not settled:\n%s", d)
	}
}

func TestVXLANOverIPv6(t *testing.T) {
	_, k := newKernel(t)
	want := delta.NewState()
	want.Links["vtep7"] = delta.Link{Kind: "vxlan", VNI: 7, Port: 4789, Local: netip.MustParseAddr("2001:db8::1"),
		MAC: delta.MAC{0x0e, 1, 2, 3, 4, 5}, MTU: 1430, Alias: "lariat:vxlan:six"}
	want.FDB[delta.FDB{Dev: "vtep7", MAC: delta.MAC{0x0e, 1, 2, 3, 4, 6},
		Dst: netip.MustParseAddr("2001:db8::2")}] = struct{}{}
	reconcile(t, k, want)
	wantText(t, observe(t, k, want).String(), want.String())
}

// A VNI moves to another device name. Apply must remove the old device before it adds the new one.
func TestDeviceThatIsRenamedInThePlan(t *testing.T) {
	_, k := newKernel(t)
	want := delta.NewState()
	l := overlay(0).Links["vtep1042"]
	want.Links["old"] = l
	reconcile(t, k, want)
	delete(want.Links, "old")
	want.Links["new"] = l
	reconcile(t, k, want)
	wantText(t, observe(t, k, want).String(), want.String())
}

func BenchmarkSettled1000Beside2000Ports(b *testing.B) {
	ns, k := newKernel(b)
	want := overlay(1000)
	reconcile(b, k, want)
	var batch strings.Builder
	for i := range 1000 {
		fmt.Fprintf(&batch, "link add lrt%d type veth peer name p%d\nlink set lrt%d up\nroute add 10.42.%d.%d/32 dev "+
			"lrt%d proto 76\n", i, i, i, i>>8, i&255, i)
	}
	file := b.TempDir() + "/batch"
	write(b, file, batch.String())
	ns.Command(b, "ip", "-batch", file)
	for b.Loop() {
		if d := reconcile(b, k, want); !d.Empty() {
			b.Fatal(d)
		}
	}
}
