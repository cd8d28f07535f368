package attach_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/lariat-net/lariat/pkg/attach"
	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/metadata"
)

var id = metadata.AttachmentID{ContainerID: "c0ffee", IfName: "eth0"}

// answer returns an answer of the metadata service.
// Its arguments have the form address or address>gateway.
func answer(addresses ...string) *metadata.Attachment {
	a := &metadata.Attachment{Network: "overlay", MTU: 1450, Subnets: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"),
		netip.MustParsePrefix("fd42::/48")}}
	for _, s := range addresses {
		addr, gw, has := strings.Cut(s, ">")
		x := metadata.AttachmentAddress{Address: netip.MustParseAddr(addr)}
		if has {
			x.Gateway = netip.MustParseAddr(gw)
		}
		a.Addresses = append(a.Addresses, x)
	}
	return a
}

func TestF1_F20_Plan(t *testing.T) {
	route := func(dst string, table int) delta.EndpointRoute {
		return delta.EndpointRoute{Dst: netip.MustParsePrefix(dst), Table: table}
	}
	for _, tc := range []struct {
		name     string
		a        *metadata.Attachment
		c        attach.Config
		gateways string
		routes   string
	}{
		{"IPv4", answer("10.42.0.5>10.42.0.1"), attach.Config{}, "[10.42.0.1]", "0.0.0.0/0 via 10.42.0.1"},
		{"IPv6: the host's end, whatever the host's overlay address is", answer("fd42::5>fd42::1"), attach.Config{},
			"[fe80::1]", "::/0 via fe80::1"},
		{"both", answer("10.42.0.5>10.42.0.1", "fd42::5>fd42::1"), attach.Config{}, "[10.42.0.1 fe80::1]",
			"0.0.0.0/0 via 10.42.0.1, ::/0 via fe80::1"},
		{"a host that has no overlay address, since it borrows", answer("10.42.0.5"), attach.Config{}, "[169.254.1.1]",
			"0.0.0.0/0 via 169.254.1.1"},
		{"two addresses of a family share the gateway and the route", answer("10.42.0.5>10.42.0.1", "10.42.0.6>10.42.0.1"),
			attach.Config{}, "[10.42.0.1]", "0.0.0.0/0 via 10.42.0.1"},
		{"no default route: the network's subnets of the families it has", answer("10.42.0.5>10.42.0.1"),
			attach.Config{NoDefaultRoute: true}, "[10.42.0.1]", "10.42.0.0/16 via 10.42.0.1"},
		{"no default route, both", answer("10.42.0.5>10.42.0.1", "fd42::5"), attach.Config{NoDefaultRoute: true},
			"[10.42.0.1 fe80::1]", "10.42.0.0/16 via 10.42.0.1, fd42::/48 via fe80::1"},
		{"further routes take the gateway of their family", answer("10.42.0.5>10.42.0.1", "fd42::5"),
			attach.Config{Routes: []delta.EndpointRoute{route("10.99.0.0/16", 0), route("fd99::/48", 7)}}, "[10.42.0.1 fe80::1]",
			"0.0.0.0/0 via 10.42.0.1, ::/0 via fe80::1, 10.99.0.0/16 via 10.42.0.1, fd99::/48 via fe80::1 table 7"},
		{"a route of a family that it has not is left out", answer("10.42.0.5>10.42.0.1"),
			attach.Config{Routes: []delta.EndpointRoute{route("fd99::/48", 0)}}, "[10.42.0.1]", "0.0.0.0/0 via 10.42.0.1"},
		{"a default route that is asked for is there once", answer("10.42.0.5>10.42.0.1"),
			attach.Config{Routes: []delta.EndpointRoute{route("0.0.0.0/0", 0), route("0.0.0.0/0", 7)}}, "[10.42.0.1]",
			"0.0.0.0/0 via 10.42.0.1, 0.0.0.0/0 via 10.42.0.1 table 7"},
		{"no default route but one that is asked for", answer("10.42.0.5>10.42.0.1"),
			attach.Config{NoDefaultRoute: true, Routes: []delta.EndpointRoute{route("0.0.0.0/0", 0)}}, "[10.42.0.1]",
			"10.42.0.0/16 via 10.42.0.1, 0.0.0.0/0 via 10.42.0.1"},
	} {
		tc.c.ID = id
		p := attach.Plan(tc.a, tc.c)
		var routes []string
		for _, r := range p.Routes {
			s := fmt.Sprintf("%s via %s", r.Dst, r.Via)
			if r.Table != 0 {
				s += fmt.Sprint(" table ", r.Table)
			}
			if !slices.Contains(p.Gateways, r.Via) {
				t.Errorf("%s: %s goes by no gateway of the port", tc.name, s)
			}
			routes = append(routes, s)
		}
		if got := strings.Join(routes, ", "); got != tc.routes {
			t.Errorf("%s: routes %s, want %s", tc.name, got, tc.routes)
		}
		if got := fmt.Sprint(p.Gateways); got != tc.gateways {
			t.Errorf("%s: gateways %s, want %s", tc.name, got, tc.gateways)
		}
		if len(p.Addrs) != len(tc.a.Addresses) || p.MTU != 1450 || p.HostMAC != attach.HostMAC || p.IfName != "eth0" {
			t.Errorf("%s: %+v", tc.name, p)
		}
	}
}

// TestF11_MAC checks the order of MACs: the caller's, the model's, then one that derives from the
// attachment. The derived MAC is the same at each retry.
func TestF11_MAC(t *testing.T) {
	a := answer("10.42.0.5>10.42.0.1")
	made := attach.Plan(a, attach.Config{ID: id}).MAC
	if made != attach.MAC(id) || made[0]&3 != 2 {
		t.Errorf("%s is not the attachment's, or not a local unicast address", made)
	}
	a.MAC = metadata.MAC{0x0a, 1, 1, 1, 1, 1}
	if got := attach.Plan(a, attach.Config{ID: id}).MAC; got != (delta.MAC{0x0a, 1, 1, 1, 1, 1}) {
		t.Errorf("the model's: %s", got)
	}
	if got := attach.Plan(a, attach.Config{ID: id, MAC: delta.MAC{0x0a, 2, 2, 2, 2, 2}}).MAC; got != (delta.MAC{0x0a, 2, 2,
		2, 2, 2}) {
		t.Errorf("the caller's: %s", got)
	}
}

// TestNames checks that names of host ends fit the kernel's limit and differ between attachments.
func TestNames(t *testing.T) {
	names, macs := map[string]metadata.AttachmentID{}, map[delta.MAC]metadata.AttachmentID{}
	for i := range 50_000 {
		x := metadata.AttachmentID{ContainerID: fmt.Sprintf("%064x", i/2), IfName: fmt.Sprint("eth", i%2)}
		n := attach.HostName(x)
		if len(n) > 15 || !strings.HasPrefix(n, delta.VethPrefix) {
			t.Fatalf("name %q", n)
		}
		if y, ok := names[n]; ok {
			t.Fatalf("%s and %s share the name %s", x, y, n)
		}
		if y, ok := macs[attach.MAC(x)]; ok {
			t.Fatalf("%s and %s share a MAC", x, y)
		}
		names[n], macs[attach.MAC(x)] = x, x
	}
	// The boundary between the two parts matters.
	if attach.HostName(metadata.AttachmentID{ContainerID: "a",
		IfName: "bc"}) == attach.HostName(metadata.AttachmentID{ContainerID: "ab", IfName: "c"}) {
		t.Error("a/bc and ab/c share a name")
	}
}
