package fake_test

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/kernel/fake"
)

// world is a host's overlay with a few peers; gen makes them differ.
func world(peers, gen int) *delta.State {
	s := delta.NewState()
	const dev = "vtep1042"
	s.Sysctls["net/ipv4/ip_forward"] = "1"
	s.Sysctls["net/ipv4/conf/vtep1042/rp_filter"] = "1"
	s.Links[dev] = delta.Link{Kind: "vxlan", VNI: 1042, Port: 4789, Local: netip.MustParseAddr("192.0.2.1"),
		MAC: delta.MAC{0x0e, 0, 192, 0, 2, byte(gen)}, MTU: 1450 - gen, Alias: "lariat:vxlan:overlay"}
	s.Addrs[delta.Addr{Dev: dev, Prefix: netip.MustParsePrefix("10.42.0.1/32")}] = struct{}{}
	s.Routes[delta.To(netip.MustParsePrefix("10.42.0.0/26"))] = delta.Route{Type: "blackhole"}
	s.Sets["vteps4"] = delta.Set{}
	for i := range peers {
		via := netip.AddrFrom4([4]byte{198, 18, byte(gen), byte(i)})
		mac := delta.MAC{0x0e, 0, 198, 18, byte(gen), byte(i)}
		s.Neighs[delta.Neigh{Dev: dev, Addr: via}] = mac
		s.FDB[delta.FDB{Dev: dev, MAC: mac, Dst: via}] = struct{}{}
		s.Nexthops[uint32(i+1)] = delta.Nexthop{Via: via, Dev: dev, Onlink: true}
		s.Routes[delta.To(netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 43, byte(i), 0}), 24))] = delta.Route{NH: uint32(i +
			1), Src: netip.MustParseAddr("10.42.0.1")}
		set := s.Sets["vteps4"]
		set.Elements = append(set.Elements, netip.PrefixFrom(via, 32))
		s.Sets["vteps4"] = set
	}
	s.Chains["vtep-sources"] = delta.Chain{Type: "filter", Hook: "prerouting", Priority: -300, Rules: []delta.Rule{
		{delta.UDPDport(4789), delta.InSet{Field: "saddr", Set: "vteps4", Not: true}, delta.Verdict("drop")}}}
	return s
}

// worlds are states that a host goes through, in an order that changes something of everything.
func worlds() map[string]*delta.State {
	other := world(3, 3)
	l := other.Links["vtep1042"]
	l.VNI = 7
	other.Links["vtep1042"] = l
	return map[string]*delta.State{
		"nothing": delta.NewState(), "one peer": world(1, 1), "four peers": world(4, 1), "other addresses": world(4, 2),
		"another VNI": other,
	}
}

func TestReconcileConvergesFromEveryStateToEveryOther(t *testing.T) {
	for from, a := range worlds() {
		for to, b := range worlds() {
			k := fake.New()
			mustReconcile(t, k, a)
			mustReconcile(t, k, b)
			if got := settled(k); got != visible(b) {
				t.Errorf("from %q to %q:\ngot\n%s\nwant\n%s", from, to, got, visible(b))
			}
			if d := mustReconcile(t, k, b); !d.Empty() {
				t.Errorf("F141: from %q to %q a second pass still changes\n%s", from, to, d)
			}
		}
	}
}

func TestReconcileConvergesAfterAFailureAtEachStep(t *testing.T) {
	injure(t, func(k *fake.Kernel, n int) { k.FailAt(n, unix.ENOMEM) }, unix.ENOMEM)
}

func TestReconcileConvergesAfterAKillAtEachStep(t *testing.T) {
	injure(t, func(k *fake.Kernel, n int) { k.KillAt(n) }, fake.ErrKilled)
}

func injure(t *testing.T, at func(k *fake.Kernel, n int), want error) {
	t.Helper()
	steps := 0
	for from, a := range worlds() {
		for to, b := range worlds() {
			for n := 1; ; n++ {
				k := fake.New()
				mustReconcile(t, k, a)
				at(k, n)
				_, err := kernel.Reconcile(context.Background(), k, b)
				if !k.Failed() {
					break
				}
				steps++
				if !errors.Is(err, want) {
					t.Fatalf("from %q to %q, step %d: error %v, want %v", from, to, n, err, want)
				}
				k.FailAt(0, nil)
				mustReconcile(t, k, b)
				if got := settled(k); got != visible(b) {
					t.Fatalf("from %q to %q, step %d:\ngot\n%s\nwant\n%s", from, to, n, got, visible(b))
				}
			}
		}
	}
	if steps < 100 {
		t.Errorf("only %d steps were tried", steps)
	}
}

func mustReconcile(t *testing.T, k kernel.Kernel, want *delta.State) *delta.Difference {
	t.Helper()
	d, err := kernel.Reconcile(context.Background(), k, want)
	if err != nil {
		t.Fatalf("reconcile: %v", err)
	}
	return d
}

// settled and visible leave sysctls out: they are never taken back.
func settled(k *fake.Kernel) string { return withoutSysctls(k.String()) }
func visible(s *delta.State) string { return withoutSysctls(s.String()) }
func withoutSysctls(text string) (out string) {
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, "sysctl") {
			out += line
		}
	}
	return out
}

func port() delta.Endpoint {
	return delta.Endpoint{
		Network: "overlay", ContainerID: "c0ffee", IfName: "eth0", HostName: "lrtabcdefghijkl",
		Alias:   "lariat:port:overlay:c0ffee:eth0:web",
		HostMAC: delta.MAC{0x0e, 0xfe, 0, 0, 0, 1}, MAC: delta.MAC{0x0a, 1, 2, 3, 4, 5}, MTU: 1450,
		Addrs:    []netip.Addr{netip.MustParseAddr("10.42.0.5"), netip.MustParseAddr("fd42::5")},
		Gateways: []netip.Addr{netip.MustParseAddr("10.42.0.1"), netip.MustParseAddr("fe80::1")},
		Routes: []delta.EndpointRoute{
			{Dst: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr("10.42.0.1")},
			{Dst: netip.MustParsePrefix("::/0"), Via: netip.MustParseAddr("fe80::1"), MTU: 1400},
		},
	}
}

const portText = `link  lrtabcdefghijkl type veth mtu 1450 address 0e:fe:00:00:00:01
link  set lrtabcdefghijkl up alias lariat:port:overlay:c0ffee:eth0:web
addr  fe80::1/64 dev lrtabcdefghijkl
route 10.42.0.5/32 dev lrtabcdefghijkl proto 76
route fd42::5/128 dev lrtabcdefghijkl proto 76
in /run/netns/c: link  eth0 type veth mtu 1450 address 0a:01:02:03:04:05
in /run/netns/c: addr  10.42.0.5/32 dev eth0
in /run/netns/c: addr  fd42::5/128 dev eth0
in /run/netns/c: link  set eth0 up
in /run/netns/c: neigh 10.42.0.1 dev eth0 lladdr 0e:fe:00:00:00:01 permanent
in /run/netns/c: route 10.42.0.1/32 dev eth0
in /run/netns/c: neigh fe80::1 dev eth0 lladdr 0e:fe:00:00:00:01 permanent
in /run/netns/c: route 0.0.0.0/0 via 10.42.0.1 dev eth0 onlink
in /run/netns/c: route ::/0 via fe80::1 dev eth0 onlink mtu 1400
`

func TestAddPortPrintsAsAnOperatorWouldTypeIt(t *testing.T) {
	k := fake.New()
	if err := k.AddEndpoint(t.Context(), "/run/netns/c", port()); err != nil {
		t.Fatal(err)
	}
	if got := k.String(); got != portText {
		t.Errorf("got\n%s\nwant\n%s", got, portText)
	}
	if err := k.CheckEndpoint(t.Context(), "/run/netns/c", port()); err != nil {
		t.Errorf("check: %v", err)
	}
}

func TestF132AddPortFailingAtEachStepLeavesNothing(t *testing.T) {
	n := 1
	for ; ; n++ {
		k := fake.New()
		k.FailAt(n, unix.ENOMEM)
		err := k.AddEndpoint(t.Context(), "/run/netns/c", port())
		if !k.Failed() {
			break
		}
		if !errors.Is(err, unix.ENOMEM) {
			t.Errorf("step %d: error %v, want ENOMEM", n, err)
		}
		if got := k.String(); got != "" {
			t.Errorf("step %d, %s: left behind\n%s", n, k.Steps()[n-1], got)
		}
	}
	if n < 13 {
		t.Errorf("only %d steps", n-1)
	}
}

func TestF132AddPortKilledAtEachStepIsUndoneByDel(t *testing.T) {
	for n := 1; ; n++ {
		k := fake.New()
		k.KillAt(n)
		err := k.AddEndpoint(t.Context(), "/run/netns/c", port())
		if !k.Failed() {
			break
		}
		if !errors.Is(err, fake.ErrKilled) {
			t.Errorf("step %d: error %v, want a kill", n, err)
		}
		left := k.String()
		if n > 1 && left == "" {
			t.Errorf("step %d: a killed ADD was rolled back", n)
		}
		k.KillAt(0)
		if n%2 == 0 { // a second try replaces what is left
			if err := k.AddEndpoint(t.Context(), "/run/netns/c", port()); err != nil {
				t.Errorf("step %d: once more: %v", n, err)
			}
			if got := k.String(); got != portText {
				t.Errorf("step %d: once more gives\n%s", n, got)
			}
		}
		if err := k.DelEndpoint(t.Context(), port().HostName); err != nil {
			t.Errorf("step %d: del: %v", n, err)
		}
		if got := k.String(); got != "" {
			t.Errorf("step %d: left behind\n%s", n, got)
		}
	}
}

func TestAddPortRefusesATakenInterface(t *testing.T) {
	k := fake.New()
	k.AddInterface("/run/netns/c", "eth0")
	if err := k.AddEndpoint(t.Context(), "/run/netns/c", port()); !errors.Is(err, kernel.ErrExists) {
		t.Errorf("got %v, want ErrExists", err)
	}
}

func TestCheckPortNamesWhatIsMissing(t *testing.T) {
	k := fake.New()
	if err := k.AddEndpoint(t.Context(), "/run/netns/c", port()); err != nil {
		t.Fatal(err)
	}
	line := "route 10.42.0.5/32 dev lrtabcdefghijkl proto 76"
	if !k.Spoil(port().HostName, line) {
		t.Fatal("no such line")
	}
	if err := k.CheckEndpoint(t.Context(), "/run/netns/c", port()); err == nil || !strings.Contains(err.Error(), line) {
		t.Errorf("got %v, want it to name %s", err, line)
	}
}
