package delta_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"github.com/lariat-net/lariat/pkg/delta"
)

var (
	vtep = delta.Link{Kind: "vxlan", VNI: 1042, Port: 4789, Local: netip.MustParseAddr("192.0.2.1"),
		MAC: delta.MAC{0x0e, 0, 0xc0, 0, 2, 1}, MTU: 1450, Alias: "lariat:vxlan:overlay"}
	peer  = delta.MAC{0x0e, 0, 0xc0, 0, 2, 2}
	addr  = netip.MustParseAddr
	block = netip.MustParsePrefix
)

// host returns a state with one object of each kind.
func host() *delta.State {
	s := delta.NewState()
	s.Sysctls["net/ipv4/ip_forward"] = "1"
	s.Links["vtep1042"] = vtep
	s.Addrs[delta.Addr{Dev: "vtep1042", Prefix: block("10.42.1.1/32")}] = struct{}{}
	s.Neighs[delta.Neigh{Dev: "vtep1042", Addr: addr("192.0.2.2")}] = peer
	s.FDB[delta.FDB{Dev: "vtep1042", MAC: peer, Dst: addr("192.0.2.2")}] = struct{}{}
	s.Nexthops[5] = delta.Nexthop{Via: addr("192.0.2.2"), Dev: "vtep1042", Onlink: true}
	s.Routes[delta.To(block("10.42.2.0/26"))] = delta.Route{NH: 5, Src: addr("10.42.1.1")}
	s.Routes[delta.To(block("10.42.1.0/26"))] = delta.Route{Type: "blackhole"}
	s.Routes[delta.To(block("10.42.3.0/26"))] = delta.Route{Via: addr("192.0.2.3"), Dev: "eth0", Src: addr("10.42.1.1"),
		MTU: 1400}
	s.Sets["vteps4"] = delta.Set{Elements: []netip.Prefix{block("192.0.2.1/32"), block("192.0.2.2/32")}}
	s.Sets["nat6"] = delta.Set{V6: true, Interval: true, Elements: []netip.Prefix{block("fd42::/64")}}
	s.Chains["vtep-sources"] = delta.Chain{Type: "filter", Hook: "prerouting", Priority: -300, Rules: []delta.Rule{
		{delta.UDPDport(4789), delta.VXLANVNI(1042), delta.InSet{Field: "saddr", Set: "vteps4", Not: true},
			delta.Verdict("drop")},
		{delta.IifPrefix("lrt"), delta.NoReverse{}, delta.Verdict("drop"), delta.MarkComment("own addresses only")},
	}}
	s.Chains["egress"] = delta.Chain{Type: "nat", Hook: "postrouting", Priority: 100, Rules: []delta.Rule{
		{delta.InSet{Field: "saddr", Set: "nat6", V6: true}, delta.Oif{Name: "vtep1042", Not: true}, delta.Iif{Name: "eth0"},
			delta.Masquerade{}},
	}}
	return s
}

const hostText = `sysctl net/ipv4/ip_forward=1
link  vtep1042 type vxlan id 1042 local 192.0.2.1 dstport 4789 nolearning mtu 1450 address 0e:00:c0:00:02:01 alias lariat:vxlan:overlay
addr  10.42.1.1/32 dev vtep1042
neigh 192.0.2.2 dev vtep1042 lladdr 0e:00:c0:00:02:02 permanent
fdb   0e:00:c0:00:02:02 dev vtep1042 dst 192.0.2.2
nexthop id 5 via 192.0.2.2 dev vtep1042 onlink proto 76
route blackhole 10.42.1.0/26 proto 76
route 10.42.2.0/26 nhid 5 src 10.42.1.1 proto 76
route 10.42.3.0/26 via 192.0.2.3 dev eth0 src 10.42.1.1 mtu 1400 proto 76
set   inet lariat nat6 { type ipv6_addr; flags interval; elements = { fd42::/64 }; }
set   inet lariat vteps4 { type ipv4_addr; elements = { 192.0.2.1, 192.0.2.2 }; }
chain inet lariat egress { type nat hook postrouting priority 100; policy accept; }
rule  inet lariat egress ip6 saddr @nat6 oifname != "vtep1042" iifname "eth0" masquerade
chain inet lariat vtep-sources { type filter hook prerouting priority -300; policy accept; }
rule  inet lariat vtep-sources udp dport 4789 @th,96,24 0x412 ip saddr != @vteps4 drop
rule  inet lariat vtep-sources iifname "lrt*" fib saddr . iif oif missing drop comment "own addresses only"
`

func diffText(t *testing.T, got, want string) {
	t.Helper()
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestStatePrintsAsAnOperatorWouldTypeIt(t *testing.T) {
	s := host()
	s.Problemf("host %s has no address", "c")
	diffText(t, s.String(), hostText+"# problem: host c has no address\n")
}

func TestDifferenceSaysWhatIsLeftToDo(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(want, have *delta.State)
		text   string
	}{
		{"nothing between equal states", func(_, _ *delta.State) {}, ""},
		{"a peer that is new", func(_, have *delta.State) {
			clear(have.Neighs)
			clear(have.FDB)
			clear(have.Nexthops)
			delete(have.Routes, delta.To(block("10.42.2.0/26")))
		}, `+ neigh 192.0.2.2 dev vtep1042 lladdr 0e:00:c0:00:02:02 permanent
+ fdb   0e:00:c0:00:02:02 dev vtep1042 dst 192.0.2.2
+ nexthop id 5 via 192.0.2.2 dev vtep1042 onlink proto 76
+ route 10.42.2.0/26 nhid 5 src 10.42.1.1 proto 76
`},
		{"a peer that is gone leaves in reverse", func(want, _ *delta.State) {
			clear(want.Neighs)
			clear(want.FDB)
			clear(want.Nexthops)
			delete(want.Routes, delta.To(block("10.42.2.0/26")))
		}, `- route 10.42.2.0/26 nhid 5 src 10.42.1.1 proto 76
- nexthop id 5 via 192.0.2.2 dev vtep1042 onlink proto 76
- fdb   0e:00:c0:00:02:02 dev vtep1042 dst 192.0.2.2
- neigh 192.0.2.2 dev vtep1042 lladdr 0e:00:c0:00:02:02 permanent
`},
		{"a block that moves is replaced and never absent", func(want, _ *delta.State) {
			want.Routes[delta.To(block("10.42.3.0/26"))] = delta.Route{NH: 5, Src: addr("10.42.1.1")}
		}, `~ route 10.42.3.0/26 nhid 5 src 10.42.1.1 proto 76 # was route 10.42.3.0/26 via 192.0.2.3 dev eth0 src 10.42.1.1 mtu 1400 proto 76
`},
		{"a peer with another underlay address is there twice for a moment", func(want, have *delta.State) {
			delete(want.FDB, delta.FDB{Dev: "vtep1042", MAC: peer, Dst: addr("192.0.2.2")})
			want.FDB[delta.FDB{Dev: "vtep1042", MAC: peer, Dst: addr("192.0.2.9")}] = struct{}{}
		}, `+ fdb   0e:00:c0:00:02:02 dev vtep1042 dst 192.0.2.9
- fdb   0e:00:c0:00:02:02 dev vtep1042 dst 192.0.2.2
`},
		{"elements, not sets", func(want, _ *delta.State) {
			want.Sets["vteps4"] = delta.Set{Elements: []netip.Prefix{block("192.0.2.2/32"), block("192.0.2.3/32")}}
		}, `+ element inet lariat vteps4 { 192.0.2.3 }
- element inet lariat vteps4 { 192.0.2.1 }
`},
		{"rules, not chains", func(want, _ *delta.State) {
			c := want.Chains["vtep-sources"]
			c.Rules = c.Rules[:1]
			want.Chains["vtep-sources"] = c
		}, `- rule  inet lariat vtep-sources iifname "lrt*" fib saddr . iif oif missing drop comment "own addresses only"
`},
		{"rules in another order", func(want, _ *delta.State) {
			c := want.Chains["vtep-sources"]
			c.Rules = []delta.Rule{c.Rules[1], c.Rules[0]}
			want.Chains["vtep-sources"] = c
		}, `- rule  inet lariat vtep-sources udp dport 4789 @th,96,24 0x412 ip saddr != @vteps4 drop
- rule  inet lariat vtep-sources iifname "lrt*" fib saddr . iif oif missing drop comment "own addresses only"
+ rule  inet lariat vtep-sources iifname "lrt*" fib saddr . iif oif missing drop comment "own addresses only"
+ rule  inet lariat vtep-sources udp dport 4789 @th,96,24 0x412 ip saddr != @vteps4 drop
`},
		{"sysctls are never taken back", func(want, _ *delta.State) { clear(want.Sysctls) }, ""},
		{"problems make no difference", func(want, _ *delta.State) { want.Problemf("something") }, ""},
		{"F139: another MTU in place", func(want, _ *delta.State) {
			l := vtep
			l.MTU = 1400
			want.Links["vtep1042"] = l
		}, `~ link  vtep1042 type vxlan id 1042 local 192.0.2.1 dstport 4789 nolearning mtu 1400 address 0e:00:c0:00:02:01 alias lariat:vxlan:overlay # was link  vtep1042 type vxlan id 1042 local 192.0.2.1 dstport 4789 nolearning mtu 1450 address 0e:00:c0:00:02:01 alias lariat:vxlan:overlay
`},
		{"another MAC takes the neighbours with it", func(_, have *delta.State) {
			l := vtep
			l.MAC = peer
			have.Links["vtep1042"] = l
		}, `~ link  vtep1042 type vxlan id 1042 local 192.0.2.1 dstport 4789 nolearning mtu 1450 address 0e:00:c0:00:02:01 alias lariat:vxlan:overlay # was link  vtep1042 type vxlan id 1042 local 192.0.2.1 dstport 4789 nolearning mtu 1450 address 0e:00:c0:00:02:02 alias lariat:vxlan:overlay
+ neigh 192.0.2.2 dev vtep1042 lladdr 0e:00:c0:00:02:02 permanent
`},
		{"F31: a device with another VNI takes everything with it", func(_, have *delta.State) {
			l := vtep
			l.VNI, l.Other = 7, "learning"
			have.Links["vtep1042"] = l
			have.Neighs[delta.Neigh{Dev: "vtep1042", Addr: addr("192.0.2.77")}] = peer // goes with the device
		}, `~ link  vtep1042 type vxlan id 1042 local 192.0.2.1 dstport 4789 nolearning mtu 1450 address 0e:00:c0:00:02:01 alias lariat:vxlan:overlay # was link  vtep1042 type vxlan id 7 local 192.0.2.1 dstport 4789 learning mtu 1450 address 0e:00:c0:00:02:01 alias lariat:vxlan:overlay
+ addr  10.42.1.1/32 dev vtep1042
+ neigh 192.0.2.2 dev vtep1042 lladdr 0e:00:c0:00:02:02 permanent
+ fdb   0e:00:c0:00:02:02 dev vtep1042 dst 192.0.2.2
+ nexthop id 5 via 192.0.2.2 dev vtep1042 onlink proto 76
+ route 10.42.2.0/26 nhid 5 src 10.42.1.1 proto 76
+ route 10.42.3.0/26 via 192.0.2.3 dev eth0 src 10.42.1.1 mtu 1400 proto 76
`},
		{"a network that is gone goes with its device", func(want, _ *delta.State) {
			*want = *delta.NewState()
			want.Sets, want.Chains = host().Sets, host().Chains
		}, `- route blackhole 10.42.1.0/26 proto 76
- link  vtep1042 type vxlan id 1042 local 192.0.2.1 dstport 4789 nolearning mtu 1450 address 0e:00:c0:00:02:01 alias lariat:vxlan:overlay
`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			want, have := host(), host()
			tc.change(want, have)
			d := delta.Between(want, have)
			diffText(t, d.String(), tc.text)
			if d.Empty() != (tc.text == "") {
				t.Errorf("Empty is %t, with %d objects", d.Empty(), d.Len())
			}
		})
	}
}

func TestBetweenTakesNil(t *testing.T) {
	if d := delta.Between(nil, nil); !d.Empty() {
		t.Errorf("got %s", d)
	}
	if d := delta.Between(host(), nil); d.Len() != host().Len() {
		t.Errorf("%d objects to make, want %d", d.Len(), host().Len())
	}
}

// random returns a state whose objects are on foreign devices.
// No link change of Lariat's removes such objects.
func random(r *rand.Rand) *delta.State {
	s := delta.NewState()
	ip := func() netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, byte(r.IntN(6))}) }
	for range r.IntN(8) {
		s.Addrs[delta.Addr{Dev: "eth0", Prefix: netip.PrefixFrom(ip(), 32)}] = struct{}{}
		s.Neighs[delta.Neigh{Dev: "eth0", Addr: ip()}] = delta.MAC{5: byte(r.IntN(2))}
		s.FDB[delta.FDB{Dev: "eth0", MAC: delta.MAC{5: byte(r.IntN(2))}, Dst: ip()}] = struct{}{}
		s.Nexthops[uint32(r.IntN(4))] = delta.Nexthop{Via: ip(), Dev: "eth0"}
		s.Routes[delta.To(netip.PrefixFrom(ip(), 32))] = delta.Route{Via: ip(), Dev: "eth0"}
		s.Sets[fmt.Sprint(r.IntN(3))] = delta.Set{Interval: r.IntN(2) == 0,
			Elements: []netip.Prefix{netip.PrefixFrom(ip(), 32)}}
		s.Chains[fmt.Sprint(r.IntN(3))] = delta.Chain{Type: "filter", Hook: "input",
			Rules: []delta.Rule{{delta.Verdict([]string{"accept", "drop"}[r.IntN(2)])}}}
	}
	return s
}

func play[K comparable, V any](m map[K]V, c delta.Changes[K, V]) {
	for _, e := range c.Set {
		m[e.Key] = e.Value
	}
	for _, e := range c.Remove {
		delete(m, e.Key)
	}
}

func TestTheDifferenceLeadsFromAnyStateToAnyOther(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for i := range 2000 {
		want, have := random(r), random(r)
		before := have.String()
		d := delta.Between(want, have)
		if again := delta.Between(want, have); again.String() != d.String() {
			t.Fatalf("round %d: the same difference prints differently", i)
		}
		play(have.Addrs, d.Addrs)
		play(have.Neighs, d.Neighs)
		play(have.FDB, d.FDB)
		play(have.Nexthops, d.Nexthops)
		play(have.Routes, d.Routes)
		play(have.Sets, d.Sets)
		play(have.Chains, d.Chains)
		if got := have.String(); got != want.String() {
			t.Fatalf("round %d: from\n%s\nby\n%s\ngot\n%s\nwant\n%s", i, before, d, got, want)
		}
		if rest := delta.Between(want, have); !rest.Empty() {
			t.Fatalf("round %d: left over:\n%s", i, rest)
		}
	}
}

func TestMergeKeepsTheFirstOfAConflictAndSaysSo(t *testing.T) {
	a, b := host(), delta.NewState()
	b.Routes[delta.To(block("10.42.2.0/26"))] = delta.Route{NH: 6}
	b.Routes[delta.To(block("10.42.1.0/26"))] = delta.Route{Type: "blackhole"} // equal: no conflict
	b.Sysctls["net/ipv4/ip_forward"] = "0"
	b.Problemf("host c has no address")
	got := delta.Merge(a, nil, b)
	diffText(t, got.String(), hostText+`# problem: sysctl net/ipv4/ip_forward=0 is left out, it conflicts with sysctl net/ipv4/ip_forward=1
# problem: route 10.42.2.0/26 nhid 6 proto 76 is left out, it conflicts with route 10.42.2.0/26 nhid 5 src 10.42.1.1 proto 76
# problem: host c has no address
`)
	diffText(t, a.String(), hostText)
}

func TestPortAliasReadsBackWhatItWrote(t *testing.T) {
	for _, a := range []delta.EndpointAlias{
		{Network: "overlay", ContainerID: "c0ffee", IfName: "eth0"},
		{Network: "overlay", ContainerID: "c0ffee", IfName: "eth0", Name: "default/web:1"},
	} {
		if got, ok := delta.ParseEndpointAlias(a.String()); !ok || got != a {
			t.Errorf("%s reads back as %+v", a, got)
		}
	}
	long := delta.EndpointAlias{Network: "n", ContainerID: "c", IfName: "e", Name: strings.Repeat("x", 300)}
	if n := len(long.String()); n != 255 {
		t.Errorf("%d octets, the kernel takes 255", n)
	}
	if _, ok := delta.ParseEndpointAlias("lariat:vxlan:overlay"); ok {
		t.Error("a device's alias is taken for a port's")
	}
}

func peers(n int) *delta.State {
	s := delta.NewState()
	s.Links["vtep1042"] = vtep
	for i := range n {
		via := netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)})
		mac := delta.MAC{0x0e, 0, 198, 18, byte(i >> 8), byte(i)}
		s.Neighs[delta.Neigh{Dev: "vtep1042", Addr: via}] = mac
		s.FDB[delta.FDB{Dev: "vtep1042", MAC: mac, Dst: via}] = struct{}{}
		s.Nexthops[uint32(i+1)] = delta.Nexthop{Via: via, Dev: "vtep1042", Onlink: true}
		s.Routes[delta.To(netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 10), byte(i >> 2), byte(i << 6)}),
			26))] = delta.Route{NH: uint32(i + 1)}
	}
	return s
}

func BenchmarkBetweenSettled10000(b *testing.B) {
	want, have := peers(10000), peers(10000)
	for b.Loop() {
		if d := delta.Between(want, have); !d.Empty() {
			b.Fatal(d)
		}
	}
}

func BenchmarkBetweenFromNothing10000(b *testing.B) {
	want, have := peers(10000), delta.NewState()
	for b.Loop() {
		delta.Between(want, have)
	}
}

func BenchmarkPrint10000(b *testing.B) {
	s := peers(10000)
	for b.Loop() {
		_ = s.String()
	}
}

// FuzzPortAlias checks that ParseEndpointAlias reads every ifalias without loss.
func FuzzPortAlias(f *testing.F) {
	f.Add("lariat:port:overlay:c0ffee:eth0:web:1", "overlay", "c0ffee", "eth0", "web")
	f.Add("lariat:port:overlay:c0ffee:eth0", "overlay", strings.Repeat("c", 256), "eth0", "")
	f.Add("lariat:vxlan:overlay", "", "", "", ":")
	f.Add("lariat:port::::", "a", "b\n", "c", "d\x1b[31m")
	f.Fuzz(func(t *testing.T, text, network, container, ifname, name string) {
		if a, ok := delta.ParseEndpointAlias(text); ok && len(text) <= 255 {
			if again := a.String(); again != text && again+":" != text {
				t.Errorf("%q is read as %+v, which is %q", text, a, again)
			}
		}
		a := delta.EndpointAlias{network, container, ifname, name}
		s := a.String()
		if len(s) > 255 {
			t.Errorf("%d bytes", len(s))
		}
		if strings.Contains(network+container+ifname, ":") || len(network)+len(container)+len(ifname) > 200 {
			return
		}
		got, ok := delta.ParseEndpointAlias(s)
		if !ok || got.Network != network || got.ContainerID != container || got.IfName != ifname ||
			!strings.HasPrefix(name, got.Name) {
			t.Errorf("%+v is read as %+v", a, got)
		}
	})
}
