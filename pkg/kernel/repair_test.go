package kernel_test

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/attach"
	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/kernel/netnstest"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// TestF29_PortLosesWhatItsADDMade checks that every lost property of a host end causes an event and
// a fault that names it. One call repairs the host end. The container's end does not change.
func TestF29_PortLosesWhatItsADDMade(t *testing.T) {
	addresses := func(list ...string) (out []metadata.AttachmentAddress) {
		for _, s := range list {
			a := netip.MustParseAddr(s)
			gw := netip.MustParseAddr("10.42.0.1")
			if a.Is6() {
				gw = netip.MustParseAddr("fd42::1")
			}
			out = append(out, metadata.AttachmentAddress{Address: a, Gateway: gw})
		}
		return out
	}
	for _, port := range []struct {
		name      string
		addresses []metadata.AttachmentAddress
		v4, v6    bool
	}{
		{"dual-stack", addresses("10.42.0.5", "fd42::5"), true, true},
		{"IPv4", addresses("10.42.0.6"), true, false},
		{"IPv6", addresses("fd42::7"), false, true},
	} {
		t.Run(port.name, func(t *testing.T) {
			host, inside := netnstest.New(t), netnstest.New(t)
			host.Command(t, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
			// The host's defaults for new devices differ from the settings of a host end.
			host.Command(t, "sh", "-c", "echo 0 > /proc/sys/net/ipv4/conf/default/forwarding")
			host.Command(t, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6")
			host.Command(t, "ip", "link", "add", "own", "type", "veth", "peer", "name", "owm")
			host.Command(t, "sh", "-c", "echo 0 > /proc/sys/net/ipv6/conf/own/disable_ipv6")
			host.Command(t, "ip", "addr", "add", "10.42.0.1/32", "dev", "own")
			host.Command(t, "ip", "addr", "add", "fd42::1/128", "dev", "own", "nodad")
			host.Command(t, "ip", "link", "set", "own", "up")
			p := attach.Plan(&metadata.Attachment{Network: "n", Device: "own", MTU: 1450, Addresses: port.addresses},
				attach.Config{ID: metadata.AttachmentID{ContainerID: "c0ffee", IfName: "eth0"}})
			k := openKernel(t, host)
			if err := k.AddEndpoint(t.Context(), inside.Path(), p); err != nil {
				t.Fatal(err)
			}
			want := p.Veth()
			faults := func() []string {
				t.Helper()
				ports, err := k.Veths(t.Context())
				if err != nil || len(ports) != 1 {
					t.Fatalf("ports: %+v, %v", ports, err)
				}
				return ports[0].Faults(want)
			}
			if f := faults(); len(f) > 0 {
				t.Fatalf("right after its ADD the port lacks %s", f)
			}
			var events <-chan kernel.Event
			host.Do(t, func() {
				var err error
				if events, err = kernel.Watch(t.Context()); err != nil {
					t.Fatal(err)
				}
			})
			sysctl := func(value, key string) string {
				return "echo " + value + " > /proc/sys/net/" + strings.ReplaceAll(key, "D", want.Name)
			}
			for _, tc := range []struct {
				command string
				lacks   []string
				of      bool // only of ports with such addresses
				silent  bool // no event of the kernel tells of it
			}{
				{command: "ip link set D down", lacks: []string{"link  D up"}, of: true},
				{command: "ip link set D down; ip link set D up", lacks: []string{"route 10.42.0"}, of: port.v4},
				{command: "ip link set D down; ip link set D up", lacks: []string{"addr  fe80::1/64 dev D", "route fd42::"},
					of: port.v6},
				{command: "ip route flush dev D", lacks: []string{"route 10.42.0"}, of: port.v4},
				{command: "ip -6 route flush dev D", lacks: []string{"route fd42::"}, of: port.v6},
				{command: "ip route flush proto 76", lacks: []string{"route 10.42.0"}, of: port.v4},
				{command: "ip -6 addr flush dev D", lacks: []string{"addr  fe80::1/64 dev D"}, of: port.v6},
				{command: "ip link set D group 0", lacks: []string{"link  D group 76"}, of: true},
				{command: "ip link set D address 02:00:00:00:00:01", lacks: []string{"link  D address 0e:fe:00:00:00:01"},
					of: true},
				{command: "ip link set D mtu 1400", lacks: []string{"link  D mtu 1450"}, of: true, silent: true},
				{command: sysctl("0", "ipv4/conf/D/rp_filter"), lacks: []string{"sysctl net/ipv4/conf/D/rp_filter=1"}, of: true},
				{command: sysctl("2", "ipv4/conf/D/rp_filter"), lacks: []string{"sysctl net/ipv4/conf/D/rp_filter=1"}, of: true},
				{command: sysctl("0", "ipv4/conf/D/forwarding"), lacks: []string{"sysctl net/ipv4/conf/D/forwarding=1"}, of: true},
				{command: sysctl("1", "ipv6/conf/D/accept_ra"), lacks: []string{"sysctl net/ipv6/conf/D/accept_ra=0"}, of: true,
					silent: true},
				{command: sysctl("1", "ipv6/conf/all/disable_ipv6"),
					lacks: []string{"sysctl net/ipv6/conf/D/disable_ipv6=0", "addr  fe80::1/64 dev D", "route fd42::"}, of: port.v6},
				{command: sysctl("1", "ipv6/conf/all/disable_ipv6") + "; " + sysctl("0", "ipv6/conf/all/disable_ipv6"),
					lacks: []string{"addr  fe80::1/64 dev D", "route fd42::"}, of: port.v6},
				{command: sysctl("0", "ipv6/conf/all/disable_ipv6"), lacks: []string{"sysctl net/ipv6/conf/D/disable_ipv6=1"},
					of: !port.v6, silent: true},
				{command: "ip addr del 10.42.0.1/32 dev own; ip addr add 10.42.0.1/32 dev own", lacks: []string{"route 10.42.0"},
					of: port.v4, silent: true},
			} {
				if !tc.of {
					continue
				}
				command := strings.ReplaceAll(tc.command, "D", want.Name)
				host.Command(t, "sh", "-ec", command)
				// All IPv6 on the host was removed with it, and with IPv6 the host's source address.
				host.Command(t, "sh", "-c", "echo 0 > /proc/sys/net/ipv6/conf/own/disable_ipv6")
				host.Command(t, "ip", "addr", "replace", "fd42::1/128", "dev", "own", "nodad")
				got := faults()
				for _, lack := range tc.lacks {
					lack = strings.ReplaceAll(lack, "D", want.Name)
					if !slices.ContainsFunc(got, func(s string) bool { return strings.HasPrefix(s, lack) }) {
						t.Errorf("after %s: faults %q, want one that begins with %q", command, got, lack)
					}
				}
				if err := k.CheckEndpoint(t.Context(), inside.Path(), p); err == nil {
					t.Errorf("after %s: CheckEndpoint finds nothing", command)
				}
				if !tc.silent {
					next(t, events, kernel.Event{Kind: kernel.EventPort, Name: want.Name})
				}
				if err := k.RepairVeth(t.Context(), want); err != nil {
					t.Fatalf("after %s: mend: %v", command, err)
				}
				if left := faults(); len(left) > 0 {
					t.Fatalf("after %s: mended, the port still lacks %q", command, left)
				}
				if err := k.CheckEndpoint(t.Context(), inside.Path(), p); err != nil {
					t.Fatalf("after %s: mended: %v", command, err)
				}
			}
			if err := k.DelEndpoint(t.Context(), want.Name); err != nil {
				t.Fatal(err)
			}
			if err := k.RepairVeth(t.Context(), want); err != nil {
				t.Errorf("a port that is gone: %v", err)
			}
			if ports, err := k.Veths(t.Context()); err != nil || len(ports) > 0 {
				t.Errorf("mended into being: %+v, %v", ports, err)
			}
		})
	}
}

// TestF29_PortsThatComeAreNoNews checks that no ADD makes the manager read all host ends.
func TestF29_PortsThatComeAreNoNews(t *testing.T) {
	host, inside := netnstest.New(t), netnstest.New(t)
	host.Command(t, "ip", "link", "add", "last", "type", "veth", "peer", "name", "tsal")
	k := openKernel(t, host)
	var events <-chan kernel.Event
	host.Do(t, func() {
		var err error
		if events, err = kernel.Watch(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	p := attach.Plan(&metadata.Attachment{Network: "n", MTU: 1450, Addresses: []metadata.AttachmentAddress{
		{Address: netip.MustParseAddr("10.42.0.5")}, {Address: netip.MustParseAddr("fd42::5")}}},
		attach.Config{ID: metadata.AttachmentID{ContainerID: "c", IfName: "eth0"}})
	if err := k.AddEndpoint(t.Context(), inside.Path(), p); err != nil {
		t.Fatal(err)
	}
	host.Command(t, "ip", "link", "set", "last", "mtu", "1400")
	if e := <-events; e != (kernel.Event{Kind: kernel.EventLink, Name: "last"}) {
		t.Errorf("the first event is %q, want link last", e)
	}
}

// TestF1_HostWithoutItsAddress checks an ADD on a host that has lost its address.
// The kernel removes the address with a deleted device. The manager needs a moment for the repair.
// The ADD succeeds meanwhile, and the faults of its host end show the missing source.
func TestF1_HostWithoutItsAddress(t *testing.T) {
	host, inside := netnstest.New(t), netnstest.New(t)
	k := openKernel(t, host)
	p := attach.Plan(&metadata.Attachment{Network: "n", Device: "own", MTU: 1450, Addresses: []metadata.AttachmentAddress{
		{Address: netip.MustParseAddr("10.42.0.5"), Gateway: netip.MustParseAddr("10.42.0.1")},
		{Address: netip.MustParseAddr("fd42::5"), Gateway: netip.MustParseAddr("fd42::1")}}},
		attach.Config{ID: metadata.AttachmentID{ContainerID: "c", IfName: "eth0"}})
	if err := k.AddEndpoint(t.Context(), inside.Path(), p); err != nil {
		t.Fatal(err)
	}
	ports, err := k.Veths(t.Context())
	if err != nil || len(ports) != 1 || len(ports[0].Routes) != 2 || len(ports[0].Faults(p.Veth())) != 2 {
		t.Errorf("want two routes that lack their source: %+v, %v", ports, err)
	}
}

// TestAddressOfAnotherPort checks that neither an ADD nor the manager replaces certain routes.
// These are routes to a running container, and foreign routes.
// A route of the overlay is replaced: the address was on another host.
func TestAddressOfAnotherPort(t *testing.T) {
	for _, address := range []string{"10.42.0.5", "fd42::5"} {
		t.Run(address, func(t *testing.T) {
			host, one, two := netnstest.New(t), netnstest.New(t), netnstest.New(t)
			k := openKernel(t, host)
			port := func(container string) delta.Endpoint {
				return attach.Plan(&metadata.Attachment{Network: "n", MTU: 1450,
					Addresses: []metadata.AttachmentAddress{{Address: netip.MustParseAddr(address)}}},
					attach.Config{ID: metadata.AttachmentID{ContainerID: container, IfName: "eth0"}})
			}
			running, thief := port("running"), port("thief")
			leads := func(dev string) {
				t.Helper()
				if out := host.Command(t, "ip", "route", "get", address); !strings.Contains(out, " dev "+dev+" ") {
					t.Errorf("%s leads to %s, want %s", address, out, dev)
				}
			}
			if err := k.AddEndpoint(t.Context(), one.Path(), running); err != nil {
				t.Fatal(err)
			}
			err := k.AddEndpoint(t.Context(), two.Path(), thief)
			if !errors.Is(err, kernel.ErrTaken) || !strings.Contains(err.Error(), address) ||
				!strings.Contains(err.Error(), "running") {
				t.Errorf("a second port with the address: %v", err)
			}
			leads(running.HostName)
			if out := host.Command(t, "ip", "-o", "link"); strings.Contains(out, thief.HostName) {
				t.Errorf("the port that failed is there:\n%s", out)
			}
			// The manager finds two host ends, as an earlier version left them.
			if err := k.AddEndpoint(t.Context(), two.Path(), attach.Plan(&metadata.Attachment{Network: "n", MTU: 1450},
				attach.Config{ID: metadata.AttachmentID{ContainerID: "thief", IfName: "eth0"}})); err != nil {
				t.Fatal(err)
			}
			if err := k.RepairVeth(t.Context(), thief.Veth()); !errors.Is(err, kernel.ErrTaken) {
				t.Errorf("mended: %v", err)
			}
			leads(running.HostName)
			if err := k.RepairVeth(t.Context(), running.Veth()); err != nil {
				t.Errorf("a port's own route: %v", err)
			}

			// The route is foreign.
			if err := k.DelEndpoint(t.Context(), running.HostName); err != nil {
				t.Fatal(err)
			}
			host.Command(t, "ip", "link", "add", "other", "type", "veth", "peer", "name", "rehto")
			host.Command(t, "ip", "link", "set", "other", "up")
			host.Command(t, "ip", "route", "add", address, "dev", "other")
			if err := k.RepairVeth(t.Context(), thief.Veth()); !errors.Is(err, kernel.ErrTaken) {
				t.Errorf("over a route of others: %v", err)
			}
			leads("other")
			host.Command(t, "ip", "route", "replace", address, "dev", "other", "proto", "76")
			if err := k.RepairVeth(t.Context(), thief.Veth()); err != nil {
				t.Errorf("over the overlay's: %v", err)
			}
			leads(thief.HostName)
		})
	}
}

// TestF1_LoopbackIsUp checks that lo is up even without the loopback plugin in the list.
func TestF1_LoopbackIsUp(t *testing.T) {
	host, inside := netnstest.New(t), netnstest.New(t)
	inside.Command(t, "ip", "link", "set", "lo", "down")
	k := openKernel(t, host)
	p := attach.Plan(&metadata.Attachment{Network: "n", MTU: 1450,
		Addresses: []metadata.AttachmentAddress{{Address: netip.MustParseAddr("10.42.0.5")}}},
		attach.Config{ID: metadata.AttachmentID{ContainerID: "c", IfName: "eth0"}})
	if err := k.AddEndpoint(t.Context(), inside.Path(), p); err != nil {
		t.Fatal(err)
	}
	inside.Do(t, func() {
		for _, at := range []string{"127.0.0.1:0", "10.42.0.5:0"} {
			l, err := net.Listen("tcp", at)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			conn, err := net.DialTimeout("tcp", l.Addr().String(), 5*time.Second)
			if err != nil {
				t.Fatalf("inside, to %s: %v", at, err)
			}
			conn.Close()
		}
	})
	if err := k.CheckEndpoint(t.Context(), inside.Path(), p); err != nil {
		t.Error(err)
	}
	inside.Command(t, "ip", "link", "set", "lo", "down")
	err := k.CheckEndpoint(t.Context(), inside.Path(), p)
	if err == nil || !strings.Contains(err.Error(), "lo in the container is down") {
		t.Errorf("CheckEndpoint of a container whose lo is down: %v", err)
	}
}

// TestHostPortLeavingHasNoFaults checks that a host end under removal has no faults.
// It is in a link group of its own, and a repair must not change the group.
func TestHostPortLeavingHasNoFaults(t *testing.T) {
	if f := (delta.VethInfo{Group: delta.Protocol<<24 | 5}).Faults(delta.VethInfo{Up: true,
		Group: delta.OverlayLinkGroup}); len(f) > 0 {
		t.Errorf("faults %q", f)
	}
}
