package kernel_test

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/kernel/netnstest"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/probe"
)

// next waits for one of the wanted events. Other events may arrive first.
func next(t *testing.T, events <-chan kernel.Event, want kernel.Event) {
	t.Helper()
	deadline := time.After(5 * time.Second)
	var seen []kernel.Event
	for {
		select {
		case e, ok := <-events:
			if !ok {
				t.Fatalf("the channel was closed before %q; seen %v", want, seen)
			}
			if e == want {
				return
			}
			seen = append(seen, e)
		case <-deadline:
			t.Fatalf("no event %q; seen %v", want, seen)
		}
	}
}

func TestF29WatchTellsWhatIsTouchedByHand(t *testing.T) {
	ns, k := newKernel(t)
	want := overlay(2)
	for name, set := range filters().Sets {
		want.Sets[name] = set
	}
	reconcile(t, k, want)
	ctx, cancel := context.WithCancel(t.Context())
	var events <-chan kernel.Event
	ns.Do(t, func() {
		var err error
		if events, err = kernel.Watch(ctx); err != nil {
			t.Fatal(err)
		}
	})
	for _, tc := range []struct {
		command []string
		event   kernel.Event
	}{
		{[]string{"bridge", "fdb", "del", "0e:00:c6:12:00:01", "dev", "vtep1042", "dst", "198.18.0.1", "self"},
			kernel.Event{Kind: kernel.EventNeigh, Name: "vtep1042"}},
		{[]string{"ip", "neigh", "del", "198.18.0.2", "dev", "vtep1042"},
			kernel.Event{Kind: kernel.EventNeigh, Name: "vtep1042"}},
		{[]string{"ip", "route", "del", "10.43.0.64/26"}, kernel.Event{Kind: kernel.EventRoute, Name: "10.43.0.64/26"}},
		{[]string{"ip", "nexthop", "del", "id", "1275068418"}, kernel.Event{Kind: kernel.EventNexthop}},
		{[]string{"ip", "addr", "del", "10.42.0.1/32", "dev", "vtep1042"},
			kernel.Event{Kind: kernel.EventAddr, Name: "vtep1042"}},
		{[]string{"ip", "link", "set", "vtep1042", "mtu", "1400"}, kernel.Event{Kind: kernel.EventLink, Name: "vtep1042"}},
		{[]string{"nft", "flush set inet lariat vteps4"}, kernel.Event{Kind: kernel.EventNft, Name: delta.Table}},
		{[]string{"nft", "add table ip filter; add chain ip filter FORWARD; add rule ip filter FORWARD reject"},
			kernel.Event{Kind: kernel.EventNft, Name: "filter"}},
		{[]string{"nft", "flush chain ip filter FORWARD"}, kernel.Event{Kind: kernel.EventNft, Name: "filter"}},
		{[]string{"sh", "-c", "echo 2 > /proc/sys/net/ipv4/conf/all/rp_filter"}, kernel.Event{Kind: kernel.EventSysctl}},
		{[]string{"sh", "-c", "echo 1 > /proc/sys/net/ipv4/conf/all/rp_filter"}, kernel.Event{Kind: kernel.EventSysctl}},
		{[]string{"sh", "-c", "echo 2 > /proc/sys/net/ipv4/conf/default/rp_filter"}, kernel.Event{Kind: kernel.EventSysctl}},
		{[]string{"ip", "link", "del", "vtep1042"}, kernel.Event{Kind: kernel.EventLink, Name: "vtep1042"}},
	} {
		ns.Command(t, tc.command[0], tc.command[1:]...)
		next(t, events, tc.event)
	}
	cancel()
	for range events { // closed at last
	}
}

func TestWatchKeepsQuietAboutOthers(t *testing.T) {
	probe.Need(t, probe.VXLAN, probe.NexthopObjects, probe.Nft, probe.Veth)
	ns, other := netnstest.New(t), netnstest.New(t)
	dev, _ := netnstest.Veth(t, ns, "192.0.2.1/24", other, "192.0.2.2/24")
	var events <-chan kernel.Event
	ns.Do(t, func() {
		var err error
		if events, err = kernel.Watch(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	ns.Command(t, "ip", "route", "add", "203.0.113.0/24", "via", "192.0.2.2", "proto", "static")
	ns.Command(t, "ip", "neigh", "add", "192.0.2.9", "lladdr", "02:00:00:00:00:09", "dev", dev)
	ns.Command(t, "nft", "add table inet others")
	ns.Command(t, "ip", "link", "add", "lrtabc", "type", "veth", "peer", "name", "lrtdef")
	ns.Command(t, "ip", "link", "set", "lrtabc", "up")
	ns.Command(t, "ip", "route", "add", "10.42.0.5/32", "dev", "lrtabc", "proto", "76")
	ns.Command(t, "ip", "link", "del", "lrtabc")
	ns.Command(t, "ip", "link", "set", dev, "mtu", "1400") // the underlay's, and the first that counts
	if e := <-events; e != (kernel.Event{Kind: kernel.EventLink, Name: dev}) {
		t.Errorf("the first event is %q, want link %s", e, dev)
	}
}

func TestUnderlaysListWhatMayCarryTunnels(t *testing.T) {
	ns, k := newKernel(t)
	other := netnstest.New(t)
	dev, _ := netnstest.Veth(t, ns, "192.0.2.1/24", other, "192.0.2.2/24")
	ns.Up(t, dev, "2001:db8::1/64")
	reconcile(t, k, overlay(1))
	ns.Command(t, "ip", "link", "set", dev, "mtu", "9000")
	ns.Do(t, func() {
		got, err := kernel.Underlays()
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != 2 || got[0].Address.String() != "192.0.2.1/24" || got[1].Address.String() != "2001:db8::1/64" ||
			got[0].MTU != 9000 || got[1].Device != dev {
			t.Errorf("got %v, want both addresses of %s", got, dev)
		}
	})
}

// Foreign distinguishes a host's links and routes from Lariat's, from the underlay, and from routes
// that no network could have.
func TestForeignListsWhatANetworkMustNotHave(t *testing.T) {
	ns, k := newKernel(t)
	other := netnstest.New(t)
	dev, _ := netnstest.Veth(t, ns, "192.0.2.1/24", other, "192.0.2.2/24")
	reconcile(t, k, overlay(2))
	ns.Command(t, "ip", "link", "add", "docker0", "type", "bridge")
	ns.Up(t, "docker0", "172.17.0.1/16")
	ns.Up(t, "docker0", "fd17::1/64")
	for _, route := range []string{"default via 192.0.2.2", "128.0.0.0/1 via 192.0.2.2", "10.0.0.0/8 via 192.0.2.2",
		"10.9.9.9/32 via 192.0.2.2",
		"10.10.0.0/16 via 192.0.2.2 proto bird", "10.11.0.0/16 via 192.0.2.2 proto dhcp",
		"10.12.0.0/16 nexthop via 192.0.2.2 nexthop via 192.0.2.3"} {
		ns.Command(t, "ip", append([]string{"route", "add"}, strings.Fields(route)...)...)
	}
	ns.Do(t, func() {
		got, err := kernel.Foreign([]metadata.Underlay{{Address: netip.MustParsePrefix("192.0.2.1/24"), Device: dev}})
		if err != nil {
			t.Fatal(err)
		}
		want := strings.ReplaceAll("[172.17.0.0/16 dev docker0 fd17::/64 dev docker0 10.0.0.0/8 via 192.0.2.2 dev D "+
			"10.11.0.0/16 via 192.0.2.2 dev D 10.12.0.0/16 via 192.0.2.2 dev D]", "D", dev)
		if fmt.Sprint(got) != want {
			t.Errorf("got  %v\nwant %s", got, want)
		}
	})
}
