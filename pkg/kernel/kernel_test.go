package kernel_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/kernel/netnstest"
	"github.com/lariat-net/lariat/pkg/probe"
)

func TestMain(m *testing.M) { netnstest.Main(m) }

// overlay returns the desired state of host 192.0.2.1 for n peers.
// Each peer has a neighbour, a forwarding entry, a nexthop and a route.
func overlay(n int) *delta.State {
	s := delta.NewState()
	const dev = "vtep1042"
	s.Links[dev] = delta.Link{Kind: "vxlan", VNI: 1042, Port: 4789, Local: netip.MustParseAddr("192.0.2.1"),
		MAC: delta.MAC{0x0e, 0, 192, 0, 2, 1}, MTU: 1450, Alias: "lariat:vxlan:overlay"}
	for _, p := range []string{"10.42.0.1/32", "fd42::1/128", "fe80::c00:c0ff:fe00:201/64"} {
		s.Addrs[delta.Addr{Dev: dev, Prefix: netip.MustParsePrefix(p)}] = struct{}{}
	}
	s.Routes[delta.To(netip.MustParsePrefix("10.42.0.0/26"))] = delta.Route{Type: "blackhole"}
	s.Routes[delta.To(netip.MustParsePrefix("fd42::/122"))] = delta.Route{Type: "blackhole"}
	for i := 1; i <= n; i++ {
		hi, lo := byte(i>>8), byte(i)
		via := netip.AddrFrom4([4]byte{198, 18 + byte(i>>16), hi, lo})
		mac := delta.MAC{0x0e, 0, 198, 18, hi, lo}
		s.Neighs[delta.Neigh{Dev: dev, Addr: via}] = mac
		s.FDB[delta.FDB{Dev: dev, MAC: mac, Dst: via}] = struct{}{}
		s.Nexthops[0x4c000000+uint32(i)] = delta.Nexthop{Via: via, Dev: dev, Onlink: true}
		dst := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 43 + byte(i>>10), byte(i >> 2), byte(i << 6)}), 26)
		s.Routes[delta.To(dst)] = delta.Route{NH: 0x4c000000 + uint32(i), Src: netip.MustParseAddr("10.42.0.1")}
	}
	return s
}

func newKernel(t testing.TB) (*netnstest.NS, *kernel.Netns) {
	t.Helper()
	probe.Need(t, probe.VXLAN, probe.NexthopObjects, probe.IPv6, probe.Veth)
	ns := netnstest.New(t)
	return ns, openKernel(t, ns)
}

func openKernel(t testing.TB, ns *netnstest.NS) *kernel.Netns {
	t.Helper()
	k, err := kernel.NewAt(ns.Path())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

func reconcile(t testing.TB, k kernel.Kernel, want *delta.State) *delta.Difference {
	t.Helper()
	d, err := kernel.Reconcile(context.Background(), k, want)
	if err != nil {
		t.Fatalf("reconcile: %v", err)
	}
	return d
}

func observe(t testing.TB, k kernel.Kernel, want *delta.State) *delta.State {
	t.Helper()
	s, err := k.Observe(context.Background(), want)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func wantText(t testing.TB, got, want string) {
	t.Helper()
	if got == want {
		return
	}
	g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
	var b strings.Builder
	for _, l := range w {
		if !strings.Contains("\n"+got, "\n"+l+"\n") {
			fmt.Fprintf(&b, "missing:    %s\n", l)
		}
	}
	for _, l := range g {
		if !strings.Contains("\n"+want, "\n"+l+"\n") {
			fmt.Fprintf(&b, "unexpected: %s\n", l)
		}
	}
	t.Errorf("text differs:\n%s\ngot:\n%s", b.String(), got)
}

func TestF23F26ReconcileMakesWhatThePlanSays(t *testing.T) {
	_, k := newKernel(t)
	want := overlay(3)
	reconcile(t, k, want)
	wantText(t, observe(t, k, want).String(), want.String())
}

// A pass without changes writes nothing.
// The kernel announces only the change that the test makes afterwards.
func TestF141SettledPassWritesNothing(t *testing.T) {
	probe.Need(t, probe.NftFib, probe.NftNAT)
	ns, k := newKernel(t)
	want := delta.Merge(overlay(300), filters())
	want.Sysctls["net/ipv4/ip_forward"] = "1"
	reconcile(t, k, want)
	var events <-chan kernel.Event
	ns.Do(t, func() {
		var err error
		if events, err = kernel.Watch(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	var log bytes.Buffer
	passes := []*kernel.Netns{k, k, openKernel(t, ns)}
	// A work queue of the kernel announces an IPv6 address once, some time after its creation.
	// The passes do not cause this event. Therefore one round of several must be silent.
	var e kernel.Event
	for round := range 5 {
		for _, k := range passes {
			k.Log = slog.New(slog.NewTextHandler(&log, nil))
			if d := reconcile(t, k, want); !d.Empty() {
				t.Errorf("a settled kernel still differs:\n%s", d)
			}
		}
		marker := fmt.Sprintf("203.0.113.%d/32", round+1)
		ns.Up(t, "lo", marker)
		silent := kernel.Event{Kind: kernel.EventAddr, Name: "lo"}
		if e = <-events; e == silent {
			break
		}
		for next := e; next != silent; {
			next = <-events
		}
	}
	if e != (kernel.Event{Kind: kernel.EventAddr, Name: "lo"}) {
		t.Errorf("the passes made the event %v, every time", e)
	}
	if log.Len() > 0 {
		t.Errorf("the passes logged %s", log.String())
	}
}

// A Netns that a thread in another namespace opens stays in that namespace for all callers.
func TestNewStaysInTheNamespaceWhereItWasOpened(t *testing.T) {
	probe.Need(t, probe.Nft)
	ns, there := newKernel(t)
	var k *kernel.Netns
	ns.Do(t, func() {
		var err error
		if k, err = kernel.New(); err != nil {
			t.Fatal(err)
		}
	})
	defer k.Close()
	want := overlay(2)
	want.Sysctls["net/ipv4/ip_forward"] = "1"
	want.Sets["vteps4"] = filters().Sets["vteps4"]
	done := make(chan *delta.Difference)
	go func() { done <- reconcile(t, k, want) }()
	<-done
	wantText(t, observe(t, there, want).String(), want.String())
}

func write(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
