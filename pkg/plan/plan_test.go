package plan_test

import (
	"encoding/json"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/ipsec"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/plan"
)

// check fails when a plan could harm its host.
// A harmful plan diverts packets that do not belong to the networks.
// Or the kernel refuses the whole plan.
func check(t *testing.T, snap *metadata.Snapshot, s *delta.State) {
	t.Helper()
	sane := snap.Sane()
	for k := range s.Routes {
		p := k.Dst
		inside := slices.ContainsFunc(sane.Networks, func(n metadata.Network) bool {
			return slices.ContainsFunc(n.Subnets, func(q netip.Prefix) bool {
				return q.Bits() <= p.Bits() &&
					q.Contains(p.Addr())
			})
		})
		if p.Bits() < 8 || !inside && !(p.IsSingleIP() && p.Addr().IsPrivate()) || p != p.Masked() {
			t.Errorf("route to %s, which is no network's", p)
		}
		for _, h := range sane.Hosts {
			for _, u := range h.Underlay {
				if !inside && p.Contains(u.Address.Addr()) {
					t.Errorf("route to %s, which is the underlay of host %s", p, h.Name)
				}
			}
		}
	}
	for name, set := range s.Sets {
		if len(name) > 255 || strings.ContainsAny(name, " \n\"{}") {
			t.Errorf("set %.100q", name)
		}
		for i, p := range set.Elements {
			if !p.IsValid() || p.Addr().Is6() != set.V6 || !set.Interval && !p.IsSingleIP() {
				t.Errorf("set %s holds %s", name, p)
			}
			if i > 0 && (set.Elements[i-1].Overlaps(p) || set.Elements[i-1].Addr().Compare(p.Addr()) > 0) {
				t.Errorf("set %s holds %s and %s", name, set.Elements[i-1], p)
			}
		}
	}
	for name, c := range s.Chains {
		if len(name) > 255 {
			t.Errorf("chain %.100q", name)
		}
		for _, r := range c.Rules {
			for _, x := range r {
				if in, ok := x.(delta.InSet); ok && s.Sets[in.Set].V6 != in.V6 {
					t.Errorf("rule %s is for another family than its set", r)
				}
			}
		}
	}
	device := func(name string) {
		if name == "" || len(name) > 15 {
			t.Errorf("device %.100q", name)
		}
	}
	for name, l := range s.Links {
		device(name)
		if len(l.Alias) > 255 || strings.ContainsAny(l.Alias, "\n\x00") || l.MTU < 68 || l.MTU > 65536 || l.MAC[0]&1 != 0 {
			t.Errorf("link %s: %+v", name, l)
		}
	}
	for a := range s.Addrs {
		device(a.Dev)
		if !a.Prefix.IsValid() {
			t.Errorf("address %s", a.Prefix)
		}
	}
	for id, n := range s.Nexthops {
		if id>>24 != delta.Protocol || !n.Via.IsValid() || len(n.Dev) > 15 {
			t.Errorf("nexthop %#x %+v", id, n)
		}
	}
	for f := range s.FDB {
		if !f.Dst.IsValid() || f.Dst.IsMulticast() || f.MAC[0]&1 != 0 {
			t.Errorf("fdb %+v", f)
		}
	}
	for _, p := range s.Problems {
		if strings.ContainsAny(p, "\x1b") || len(p) > 4000 {
			t.Errorf("%q", p)
		}
	}
}

func tunnels(t *testing.T, snap *metadata.Snapshot) {
	t.Helper()
	names := map[string]bool{}
	for _, x := range ipsec.Tunnels(snap, snap.Self, ipsec.Options{Keys: []string{"k1"}}) {
		if names[x.Name] || strings.ContainsAny(x.Name+x.LocalID+x.RemoteID, " \n\x00\x1b") &&
			metadata.ValidName(x.Peer) != nil || !x.Remote.IsValid() || x.Remote == x.Local || len(x.Children) == 0 {
			t.Errorf("%+v", x)
		}
		names[x.Name] = true
		for _, c := range x.Children {
			if !ipsec.Owned(c.IfID) || len(c.Subnets) == 0 {
				t.Errorf("%+v", c)
			}
			for _, p := range c.Subnets {
				if p.Bits() < 8 {
					t.Errorf("%s has the selector %s", x.Name, p)
				}
			}
		}
	}
}

// FuzzDesired checks that the plan of any snapshot harms no host.
func FuzzDesired(f *testing.F) {
	files, err := filepath.Glob("../*/testdata/*.json")
	if err != nil || len(files) < 5 {
		f.Fatalf("seeds: %v %v", files, err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	for _, s := range hostile {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var snap metadata.Snapshot
		if json.Unmarshal(data, &snap) != nil {
			return
		}
		for _, self := range []string{snap.Self, "a", "nobody"} {
			snap.Self = self
			check(t, &snap, plan.Desired(&snap, self, false))
			tunnels(t, &snap)
		}
	})
}

// hostile are snapshots with one bad entry each.
// Such an entry harmed every host, or made the kernel refuse all of a plan.
// The entries red and green are good.
var hostile = []string{
	with(`"blocks":[{"network":"red","cidr":"0.0.0.0/0","host":"b"}]`),
	with(`"blocks":[{"network":"green","cidr":"0.0.0.0/0","host":"b"}]`),
	with(`"blocks":[{"network":"red","cidr":"::/0","host":"b"}]`),
	with(`"blocks":[{"network":"red","cidr":"192.0.2.0/26","host":"b"}]`),
	with(`"endpoints":[{"network":"red","address":"8.8.8.8","host":"b"},{"network":"red","address":"192.0.2.254","host":"b"},{"network":"red","address":"10.43.0.9","host":"b"}]`),
	with(`"blocks":[{"network":"red","cidr":"10.42.0.0/26","host":"b","gateway":"8.8.8.8"}]`),
	with(`"blocks":[{"network":"red","cidr":"","host":"b"},null,{}]`),
	networks(`{"name":"` + strings.Repeat("n", 3000) +
		`","subnets":["10.99.0.0/16"],"encapsulation":"vxlan","vni":9,"hostNAT":true}`),
	networks(`{"name":"aaa","subnets":["0.0.0.0/0"],"encapsulation":"ipsec","hostNAT":true}`),
	networks(`{"name":"aaa","subnets":["10.42.0.0/15"],"encapsulation":"ipsec"}`),
	networks(`{"name":"aaa","subnets":["10.99.0.0/16"],"encapsulation":"vxlan","vni":1042}`),
	networks(`{"name":"aaa","subnets":["10.99.0.0/16"],"encapsulation":"vxlan","vni":9,"hostNAT":true,"hostNATExempt":["","::ffff:1.2.3.4/100"]}`),
	networks(`{"name":"aaa","subnets":[""],"encapsulation":"vxlan","vni":9,"hostNAT":true}`),
	networks(`{}`), networks(`null`), networks(`{"name":7}`),
	networks(`{"name":"aaa","subnets":["192.0.0.0/8"],"encapsulation":"ipsec"}`),
	networks(`{"name":"aaa","subnets":["192.0.2.0/24"],"encapsulation":"vxlan","vni":9,"created":"2026-02-01T00:00:00Z"}`),
	hosts(`{"name":"b2","underlay":[{"address":"10.42.1.9/26","device":"eth0"}],"mac":"0e:00:00:00:00:09","joined":"2026-02-01T00:00:00Z"}`),
	hosts(`{"name":"b2","underlay":[{"address":"224.0.0.1/32"}],"mac":"0e:00:00:00:00:09"}`),
	hosts(`{"name":"b2","underlay":[{"address":"192.0.2.9/24","device":"` + strings.Repeat("d", 99) +
		`"}],"mac":"01:00:00:00:00:09"}`),
	hosts(`{"name":"` + strings.Repeat("h", 3000) +
		`","underlay":[{"address":"192.0.2.9/24"}],"mac":"0e:00:00:00:00:09"}`),
	hosts(`{}`), hosts(`null`), hosts(`{"name":"\u001b[31m"}`),
}

const (
	goodHosts = `{"name":"a","underlay":[{"address":"192.0.2.1/24","device":"eth0","mtu":1500}],"mac":"0e:00:c0:00:02:01","joined":"2026-01-01T00:00:00Z"},` +
		`{"name":"b","underlay":[{"address":"192.0.2.2/24","device":"eth0","mtu":1500}],"mac":"0e:00:c0:00:02:02","joined":"2026-01-01T00:00:00Z"}`
	goodNetworks = `{"name":"red","subnets":["10.42.0.0/16"],"encapsulation":"vxlan","vni":1042,"hostNAT":true,"created":"2026-01-01T00:00:00Z"},` +
		`{"name":"green","subnets":["10.43.0.0/16"],"encapsulation":"ipsec","hostNAT":true,"created":"2026-01-01T00:00:00Z"}`
	goodBlocks = `{"network":"red","cidr":"10.42.1.0/26","host":"b","gateway":"10.42.1.1"},{"network":"green","cidr":"10.43.1.0/26","host":"b","gateway":"10.43.1.1"}`
)

func snapshot(hosts, networks, blocks, more string) string {
	return `{"self":"a","hosts":[` + hosts + `],"networks":[` + networks + `],"blocks":[` + blocks + `]` + more + `}`
}

func with(more string) string {
	if rest, ok := strings.CutPrefix(more, `"blocks":[`); ok {
		return snapshot(goodHosts, goodNetworks, goodBlocks+","+strings.TrimSuffix(rest, "]"), "")
	}
	return snapshot(goodHosts, goodNetworks, goodBlocks, ","+more)
}

func networks(one string) string {
	return snapshot(goodHosts, one+","+goodNetworks, goodBlocks, "")
}

func hosts(one string) string { return snapshot(one+","+goodHosts, goodNetworks, goodBlocks, "") }

// TestF163_OneBadEntry checks that a bad entry changes nothing in the plan but Problems.
func TestF163_OneBadEntry(t *testing.T) {
	read := func(text string) *metadata.Snapshot {
		var s metadata.Snapshot
		if err := json.Unmarshal([]byte(text), &s); err != nil {
			t.Fatal(text, err)
		}
		return &s
	}
	text := func(s *delta.State) string {
		s.Problems = nil
		return s.String()
	}
	good := text(plan.Desired(read(snapshot(goodHosts, goodNetworks, goodBlocks, "")), "a", false))
	for _, s := range hostile {
		snap := read(s)
		got := plan.Desired(snap, "a", false)
		check(t, snap, got)
		tunnels(t, snap)
		if len(got.Problems) == 0 || !strings.Contains(got.Problems[0], "lariat entry remove ") {
			t.Errorf("%.300s\nproblems: %q", s, got.Problems)
		}
		if text(got) != good {
			t.Errorf("%.300s\nplans\n%s", s, text(got))
		}
	}
}

// TestSeniorHostKeepsItsAddress checks that a later claim of a host's address has no effect on any
// host. The name of the later host does not matter.
func TestSeniorHostKeepsItsAddress(t *testing.T) {
	var s metadata.Snapshot
	if err := json.Unmarshal([]byte(hosts(`{"name":"aaa","underlay":[{"address":"192.0.2.2/24","device":"eth0"}],"mac":"0e:00:c0:00:02:02"}`)), &s); err != nil {
		t.Fatal(err)
	}
	s.Hosts[0].Joined = time.Date(2026, 2, 1, 0, 0, 0, 0, time.UTC)
	got := plan.Desired(&s, "a", false)
	if len(got.FDB) != 1 || len(got.Problems) == 0 ||
		!strings.Contains(got.Problems[0], "host aaa has the underlay address 192.0.2.2 of host b") {
		t.Errorf("%s", got)
	}
}

// picker builds snapshots of words that a fuzzer picks. Some words are good, and some have harmed.
type picker struct{ picks []byte }

func (p *picker) n(most int) int {
	if len(p.picks) == 0 || most == 0 {
		return 0
	}
	i := int(p.picks[0]) % most
	p.picks = p.picks[1:]
	return i
}

func pick[T any](p *picker, list ...T) T { return list[p.n(len(list))] }

func (p *picker) name() string {
	return pick(p, "a", "b", "c", "red", "green", "", "../x", strings.Repeat("n", 63), strings.Repeat("n", 64), "x\x1b",
		"ä")
}

func (p *picker) prefix() netip.Prefix {
	q, _ := netip.ParsePrefix(pick(p, "10.42.0.0/16", "10.42.0.0/26", "10.42.0.64/26", "10.42.0.0/24", "10.43.0.0/16",
		"10.43.0.0/26", "fd42::/64", "fd42::/122", "192.0.2.0/24", "192.0.2.0/26",
		"0.0.0.0/0", "::/0", "0.0.0.0/1", "127.0.0.0/8", "224.0.0.0/8", "fe80::/10", "::ffff:10.42.0.0/122", "10.42.0.1/26",
		"10.0.0.0/8", "2000::/3", "", "255.255.255.255/32", "ffff::/16", "8.8.8.0/26"))
	return q
}

func (p *picker) addr() netip.Addr {
	a, _ := netip.ParseAddr(pick(p, "10.42.0.1", "10.42.0.65", "10.43.0.1", "fd42::1", "192.0.2.1", "192.0.2.2",
		"192.0.2.254", "2001:db8::1", "8.8.8.8", "0.0.0.0", "::", "127.0.0.1", "::1",
		"224.0.0.1", "ff02::1", "fe80::1%eth0", "fe80::1", "::ffff:10.42.0.1", "255.255.255.255", "172.30.0.5", "fd99::1",
		""))
	return a
}

func (p *picker) snapshot() *metadata.Snapshot {
	s := &metadata.Snapshot{Self: pick(p, "a", "b", "red", "")}
	when := func() time.Time { return pick(p, time.Time{}, time.Unix(1, 0), time.Unix(2, 0)) }
	for range p.n(4) {
		h := metadata.Host{Name: p.name(), Live: p.n(2) == 0, Joined: when(), MAC: metadata.MAC{byte(p.n(3)), 0, byte(p.n(3)),
			0, 0, 1}, IKEIdentity: pick(p, "", "id", "x\n")}
		for range p.n(3) {
			a := p.addr()
			h.Underlay = append(h.Underlay, metadata.Underlay{Address: netip.PrefixFrom(a, pick(p, 24, 32, 0, 64, 128, 200)),
				Device: pick(p, "eth0", "", strings.Repeat("d", 16), "a/b"), MTU: pick(p, 1500, 0, -1, 9000, 60, 1<<30)})
		}
		s.Hosts = append(s.Hosts, h)
	}
	for range p.n(5) {
		n := metadata.Network{Name: p.name(), Encapsulation: pick(p, "vxlan", "ipsec", "none", "", "x"),
			VNI: pick[uint32](p, 1042, 1043, 0, 1<<24), Port: pick[uint16](p, 0, 4789, 1),
			MTU: pick(p, 0, 1400, 1, -5, 65535), HostNAT: p.n(2) == 0, DirectRouting: p.n(2) == 0,
			BlockSizeV4: pick(p, 0, 26, 32, 8, -1, 99), BlockSizeV6: pick(p, 0, 122, 128, -1), Created: when()}
		for range 1 + p.n(3) {
			n.Subnets = append(n.Subnets, p.prefix())
		}
		for range p.n(4) {
			n.HostNATExempt = append(n.HostNATExempt, p.prefix())
		}
		s.Networks = append(s.Networks, n)
	}
	for range p.n(6) {
		s.Blocks = append(s.Blocks, metadata.Block{Network: p.name(), CIDR: p.prefix(), Host: p.name(), Gateway: p.addr()})
	}
	for range p.n(6) {
		s.HostRoutes = append(s.HostRoutes, metadata.HostRoute{Network: p.name(), Address: p.addr(), Host: p.name()})
	}
	return s
}

// FuzzDesiredOf checks the same as FuzzDesired, with snapshots built of relevant words.
// Therefore the fuzzer need not find JSON first.
func FuzzDesiredOf(f *testing.F) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 300 { // each seed is also a test without the fuzzer
		b := make([]byte, 120)
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, picks []byte) {
		snap := (&picker{picks}).snapshot()
		check(t, snap, plan.Desired(snap, snap.Self, false))
		tunnels(t, snap)
	})
}
