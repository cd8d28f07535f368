package integration_test

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/lariat-net/lariat/pkg/attach"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/test/lab"
)

func port(id string) metadata.AttachmentID {
	return metadata.AttachmentID{ContainerID: id, IfName: "eth0"}
}

func attachment(addrs ...string) *metadata.Attachment {
	a := &metadata.Attachment{Network: "overlay", MTU: 1450}
	for _, s := range addrs {
		addr := netip.MustParseAddr(s)
		aa := metadata.AttachmentAddress{Address: addr}
		if addr.Is4() {
			aa.Gateway = netip.MustParseAddr("10.42.0.1")
		}
		a.Addresses = append(a.Addresses, aa)
	}
	return a
}

// TestF1_Port: address, default route by the gateway, one route on the host; CheckEndpoint agrees, and names
// what is taken away.
func TestF1_F7_Port(t *testing.T) {
	k, err := kernel.New()
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	ns, err := lab.NewNetns(strings.ReplaceAll(t.Name(), "/", "-"))
	if err != nil {
		t.Fatal(err)
	}
	p := attach.Plan(attachment("10.42.0.5", "fd42::5"), attach.Config{ID: port("c0ffee"), Name: "demo/web"})
	if err := k.AddEndpoint(ctx, ns.Path, p); err != nil {
		t.Fatal(err)
	}
	if err := k.CheckEndpoint(ctx, ns.Path, p); err != nil {
		t.Fatalf("right after ADD: %v", err)
	}
	ports, err := k.Veths(ctx)
	if err != nil || len(ports) != 1 || ports[0].Alias.ContainerID != "c0ffee" || ports[0].Alias.Name != "demo/web" {
		t.Fatalf("ports: %v %+v", err, ports)
	}
	if err := k.AddEndpoint(ctx, ns.Path, p); err != nil {
		t.Fatalf("a dangling host end is not replaced: %v", err)
	}
	for _, tc := range []struct {
		name string
		do   func() error
		want string
	}{
		{"route", func() error {
			l, _ := netlink.LinkByName("eth0")
			return netlink.RouteDel(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: []byte{10, 42, 0, 1}})
		}, "route 0.0.0.0/0"},
		{"neighbour", func() error {
			l, _ := netlink.LinkByName("eth0")
			return netlink.NeighDel(&netlink.Neigh{LinkIndex: l.Attrs().Index, IP: []byte{10, 42, 0, 1}})
		}, "neighbour entry of its gateway 10.42.0.1"},
		{"address", func() error {
			l, _ := netlink.LinkByName("eth0")
			a, _ := netlink.ParseAddr("10.42.0.5/32")
			return netlink.AddrDel(l, a)
		}, "lost its address 10.42.0.5"},
		{"mtu", func() error {
			l, _ := netlink.LinkByName("eth0")
			return netlink.LinkSetMTU(l, 1400)
		}, "MTU 1400, not 1450"},
	} {
		if err := ns.Do(tc.do); err != nil {
			t.Fatalf("%s: %v", tc.name, err)
		}
		if err := k.CheckEndpoint(ctx, ns.Path, p); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s taken away: want %q, got %v", tc.name, tc.want, err)
		}
	}
	if err := k.DelEndpoint(ctx, p.HostName); err != nil {
		t.Fatal(err)
	}
	if err := k.DelEndpoint(ctx, p.HostName); err != nil {
		t.Fatalf("repeated: %v", err)
	}
	if ports, _ := k.Veths(ctx); len(ports) != 0 {
		t.Fatalf("left: %v", ports)
	}
}

// TestF14_InterfaceThatIsNotOurs: an eth0 of somebody else is an error, and stays.
func TestF14_InterfaceThatIsNotOurs(t *testing.T) {
	k, err := kernel.New()
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	ns, err := lab.NewNetns(t.Name())
	if err != nil {
		t.Fatal(err)
	}
	if err := ns.Do(func() error {
		return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}})
	}); err != nil {
		t.Fatal(err)
	}
	p := attach.Plan(attachment("10.42.0.6"), attach.Config{ID: port("beef")})
	if err := k.AddEndpoint(ctx, ns.Path, p); !errors.Is(err, kernel.ErrExists) {
		t.Fatalf("want ErrExists, got %v", err)
	}
	if ports, _ := k.Veths(ctx); len(ports) != 0 {
		t.Fatalf("left: %v", ports)
	}
	if err := ns.Do(func() error { _, err := netlink.LinkByName("eth0"); return err }); err != nil {
		t.Fatalf("the foreign eth0 is gone: %v", err)
	}
}

// TestF7_PortsInAGroup: many ports go in one request.
func TestF7_PortsInAGroup(t *testing.T) {
	k, err := kernel.New()
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	var names []string
	for i := range 20 {
		ns, err := lab.NewNetns(fmt.Sprintf("%s-%d", t.Name(), i))
		if err != nil {
			t.Fatal(err)
		}
		p := attach.Plan(attachment(fmt.Sprintf("10.42.0.%d", i+10)), attach.Config{ID: port(fmt.Sprint("g", i))})
		if err := k.AddEndpoint(ctx, ns.Path, p); err != nil {
			t.Fatal(err)
		}
		names = append(names, p.HostName)
	}
	if err := k.DelEndpoints(ctx, append(names[1:], "lrtnothere")); err != nil {
		t.Fatal(err)
	}
	ports, err := k.Veths(ctx)
	if err != nil || len(ports) != 1 || ports[0].Name != names[0] {
		t.Fatalf("want just %s left, got %v %v", names[0], ports, err)
	}
	if err := k.DelEndpoints(ctx, names); err != nil {
		t.Fatal(err)
	}
}

func BenchmarkPort(b *testing.B) {
	k, err := kernel.New()
	if err != nil {
		b.Fatal(err)
	}
	defer k.Close()
	i := 0
	for b.Loop() {
		b.StopTimer()
		i++
		ns, err := lab.NewNetns(fmt.Sprintf("bench-%d", i))
		if err != nil {
			b.Fatal(err)
		}
		p := attach.Plan(attachment("10.42.0.5"), attach.Config{ID: port(fmt.Sprint("b", i))})
		b.StartTimer()
		if err := k.AddEndpoint(ctx, ns.Path, p); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := k.DelEndpoint(ctx, p.HostName); err != nil {
			b.Fatal(err)
		}
		ns.Remove()
		b.StartTimer()
	}
}
