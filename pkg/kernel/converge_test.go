package kernel_test

import (
	"net/netip"
	"testing"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/kernel/netnstest"
	"github.com/lariat-net/lariat/pkg/probe"
)

// worlds returns states of a host with an underlay device.
// They differ in properties whose change makes the kernel flush more than the request says.
func worlds(underlay string) map[string]*delta.State {
	base := func(change func(s *delta.State, l *delta.Link)) *delta.State {
		s := overlay(3)
		ll := netip.MustParseAddr("fe80::c00:c6ff:fe12:1")
		s.Neighs[delta.Neigh{Dev: "vtep1042", Addr: ll}] = delta.MAC{0x0e, 0, 198, 18, 0, 1}
		s.Nexthops[0x4c00fffe] = delta.Nexthop{Via: ll, Dev: "vtep1042", Onlink: true}
		s.Routes[delta.To(netip.MustParsePrefix("fd43::/64"))] = delta.Route{NH: 0x4c00fffe,
			Src: netip.MustParseAddr("fd42::1")}
		// Direct routes use the underlay, but the source address of the tunnel device.
		s.Nexthops[0x4c00ffff] = delta.Nexthop{Via: netip.MustParseAddr("192.0.2.2"), Dev: underlay}
		s.Routes[delta.To(netip.MustParsePrefix("10.60.0.0/26"))] = delta.Route{NH: 0x4c00ffff,
			Src: netip.MustParseAddr("10.42.0.1")}
		s.Routes[delta.To(netip.MustParsePrefix("10.61.0.0/26"))] = delta.Route{Via: netip.MustParseAddr("192.0.2.2"),
			Dev: underlay, Src: netip.MustParseAddr("10.42.0.1")}
		s.Routes[delta.To(netip.MustParsePrefix("fd60::/64"))] = delta.Route{Via: netip.MustParseAddr("2001:db8::2"),
			Dev: underlay, Src: netip.MustParseAddr("fd42::1")}
		l := s.Links["vtep1042"]
		change(s, &l)
		if l.Kind != "" {
			s.Links["vtep1042"] = l
		}
		return s
	}
	return map[string]*delta.State{
		"nothing":     delta.NewState(),
		"plain":       base(func(*delta.State, *delta.Link) {}),
		"another VNI": base(func(_ *delta.State, l *delta.Link) { l.VNI = 7 }),
		"another MAC": base(func(s *delta.State, l *delta.Link) {
			l.MAC = delta.MAC{0x0e, 9, 9, 9, 9, 9}
			delete(s.Addrs, delta.Addr{Dev: "vtep1042", Prefix: netip.MustParsePrefix("fe80::c00:c0ff:fe00:201/64")})
			s.Addrs[delta.Addr{Dev: "vtep1042", Prefix: netip.MustParsePrefix("fe80::c09:9ff:fe09:909/64")}] = struct{}{}
		}),
		"another MTU": base(func(_ *delta.State, l *delta.Link) { l.MTU = 1300 }),
		"another own address": base(func(s *delta.State, _ *delta.Link) {
			delete(s.Addrs, delta.Addr{Dev: "vtep1042", Prefix: netip.MustParsePrefix("10.42.0.1/32")})
			delete(s.Addrs, delta.Addr{Dev: "vtep1042", Prefix: netip.MustParsePrefix("fd42::1/128")})
			s.Addrs[delta.Addr{Dev: "vtep1042", Prefix: netip.MustParsePrefix("10.42.0.65/32")}] = struct{}{}
			s.Addrs[delta.Addr{Dev: "vtep1042", Prefix: netip.MustParsePrefix("fd42::65/128")}] = struct{}{}
			for dst, r := range s.Routes {
				if r.Src.Is4() {
					r.Src = netip.MustParseAddr("10.42.0.65")
				} else if r.Src.IsValid() {
					r.Src = netip.MustParseAddr("fd42::65")
				}
				s.Routes[dst] = r
			}
		}),
		"another way": base(func(s *delta.State, _ *delta.Link) {
			s.Routes[delta.To(netip.MustParsePrefix("10.60.0.0/26"))] = delta.Route{NH: 0x4c000001,
				Src: netip.MustParseAddr("10.42.0.1")}
			s.Routes[delta.To(netip.MustParsePrefix("fd43::/64"))] = delta.Route{Type: "blackhole"}
			s.Routes[delta.To(netip.MustParsePrefix("10.43.0.64/26"))] = delta.Route{Type: "blackhole"}
			s.Routes[delta.To(netip.MustParsePrefix("fd42::/122"))] = delta.Route{NH: 0x4c00fffe}
			delete(s.Nexthops, 0x4c00ffff)
		}),
		"peers with other addresses": base(func(s *delta.State, _ *delta.Link) {
			clear(s.FDB)
			for i := range 3 {
				s.FDB[delta.FDB{Dev: "vtep1042", MAC: delta.MAC{0x0e, 0, 198, 18, 0, byte(i + 1)},
					Dst: netip.AddrFrom4([4]byte{198, 19, 0, byte(i)})}] = struct{}{}
			}
			s.Nexthops[0x4c000001] = delta.Nexthop{Via: netip.MustParseAddr("198.18.0.3"), Dev: "vtep1042", Onlink: true}
		}),
		"no device": base(func(s *delta.State, l *delta.Link) {
			*s = *delta.NewState()
			*l = delta.Link{}
			s.Routes[delta.To(netip.MustParsePrefix("10.42.0.0/26"))] = delta.Route{Type: "unreachable"}
		}),
	}
}

// One pass leads from every state to every other state, and a second pass finds nothing to do.
// delta.Between accounts for the objects that the kernel flushes.
func TestOnePassLeadsFromEveryStateToEveryOther(t *testing.T) {
	probe.Need(t, probe.VXLAN, probe.NexthopObjects, probe.IPv6, probe.Veth)
	ns, other := netnstest.New(t), netnstest.New(t)
	dev, _ := netnstest.Veth(t, ns, "192.0.2.1/24", other, "192.0.2.2/24")
	ns.Up(t, dev, "2001:db8::1/64")
	k := openKernel(t, ns)
	for from := range worlds(dev) {
		for to := range worlds(dev) {
			a, b := worlds(dev)[from], worlds(dev)[to]
			reconcile(t, k, a)
			reconcile(t, k, b)
			if got := observe(t, k, b).String(); got != b.String() {
				t.Errorf("from %q to %q:", from, to)
				wantText(t, got, b.String())
			}
			if d := reconcile(t, k, b); !d.Empty() {
				t.Errorf("from %q to %q: left over\n%s", from, to, d)
			}
		}
	}
}
