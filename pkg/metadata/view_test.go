package metadata

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"
)

// bigView is a view of two networks with so many hosts and blocks.
func bigView(hosts, blocks int) *Snapshot {
	s := &Snapshot{Revision: 1, Self: "h0"}
	for i, subnet := range []string{"10.0.0.0/8", "172.16.0.0/12"} {
		s.Networks = append(s.Networks, Network{Name: fmt.Sprint("n", i),
			Subnets: []netip.Prefix{netip.MustParsePrefix(subnet)}, Encapsulation: EncapVXLAN,
			VNI: uint32(1042 + i), BlockSizeV4: 26, HostNAT: true})
	}
	for i := range hosts {
		a := netip.AddrFrom4([4]byte{192, 168, byte(i >> 8), byte(i)})
		b := a.As4()
		s.Hosts = append(s.Hosts, Host{Name: fmt.Sprint("h", i), MachineID: fmt.Sprint("m", i), BootID: fmt.Sprint("b", i),
			Live: true,
			MAC:  MAC{0x0e, 0, b[0], b[1], b[2], b[3]}, Underlay: []Underlay{{Address: netip.PrefixFrom(a, 16), Device: "eth0",
				MTU: 1500}}})
	}
	for i := range blocks {
		first := netip.AddrFrom4([4]byte{10, byte(i >> 10), byte(i >> 2), byte(i << 6)})
		b := Block{Network: "n0", CIDR: netip.PrefixFrom(first, 26), Host: fmt.Sprint("h", i%hosts)}
		if i < hosts {
			b.Gateway = first.Next()
		}
		s.Blocks = append(s.Blocks, b)
	}
	return s
}

// event is a change as the service sends it; a nil object is a deletion.
func event(tb testing.TB, revision int64, kind, key string, object any) Event {
	ev := Event{Type: EventDelete, Kind: kind, Key: key, Revision: revision}
	if object != nil {
		data, err := json.Marshal(object)
		if err != nil {
			tb.Fatal(err)
		}
		ev.Type, ev.Object = EventPut, data
	}
	return ev
}

// BenchmarkChange is what one change costs whoever watches 2 000 hosts and 20 000 blocks.
func BenchmarkChange(b *testing.B) {
	s := bigView(2000, 20000)
	block := s.Blocks[len(s.Blocks)-1]
	for name, change := range map[string]func(i int) Event{
		"liveness": func(i int) Event {
			h := s.Hosts[1000]
			h.Live = i%2 == 0
			return event(b, int64(i), KindHost, h.Name, h)
		},
		"block": func(i int) Event {
			if i%2 == 0 {
				return event(b, int64(i), KindBlock, BlockKey(block), nil)
			}
			return event(b, int64(i), KindBlock, BlockKey(block), block)
		},
	} {
		b.Run(name, func(b *testing.B) {
			var v viewState
			v.load(s)
			v.snapshot()
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if _, err := v.apply(change(i)); err != nil {
					b.Fatal(err)
				}
				v.snapshot()
			}
		})
	}
}

// plainView is a view as simple as can be: what is known, put together anew each time.
type plainView struct {
	hosts     map[string]Host
	networks  map[string]Network
	blocks    map[string]Block
	endpoints map[string]HostRoute
	problems  map[string]string
}

func newPlainView() *plainView {
	return &plainView{map[string]Host{}, map[string]Network{}, map[string]Block{}, map[string]HostRoute{},
		map[string]string{}}
}

func (p *plainView) apply(ev Event) {
	switch ev.Kind {
	case KindHost:
		applyPlainly(p, p.hosts, ev)
	case KindNetwork:
		applyPlainly(p, p.networks, ev)
	case KindBlock:
		applyPlainly(p, p.blocks, ev)
	case KindHostRoute:
		applyPlainly(p, p.endpoints, ev)
	case KindProblem:
		changeText(p.problems, ev)
	}
}

func applyPlainly[T interface{ Check(key string) error }](p *plainView, m map[string]T, ev Event) {
	o, err := Decode[T](ev.Key, ev.Object)
	switch {
	case ev.Type == EventDelete:
		delete(m, ev.Key)
		delete(p.problems, ev.Kind+"/"+ev.Key)
	case err != nil:
		p.problems[ev.Kind+"/"+ev.Key] = NewProblem(ev.Kind+"/"+ev.Key, err).What
	default:
		m[ev.Key] = o
		delete(p.problems, ev.Kind+"/"+ev.Key)
	}
}

// all returns everything that is known, usable or not.
func (p *plainView) all() *Snapshot {
	s := &Snapshot{Hosts: values(p.hosts), Networks: values(p.networks), Blocks: values(p.blocks),
		HostRoutes: values(p.endpoints)}
	for _, k := range slices.Sorted(maps.Keys(p.problems)) {
		s.Problems = append(s.Problems, Problem{k, p.problems[k]})
	}
	return s
}

func values[T any](m map[string]T) []T {
	out := make([]T, 0, len(m))
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, m[k])
	}
	return out
}

// change is a random event among few names, addresses and faults, so that they meet.
func randomChange(tb testing.TB, r *rand.Rand) Event {
	pick := func(words ...string) string { return words[r.IntN(len(words))] }
	when := func() time.Time { return []time.Time{{}, time.Unix(1, 0).UTC(), time.Unix(2, 0).UTC()}[r.IntN(3)] }
	host := func() string { return pick("a", "b", "c", "d") }
	network := func() string { return pick("red", "green", "blue", "lan") }
	var kind, key string
	var object any
	switch r.IntN(10) {
	case 0, 1, 2:
		h := Host{Name: host(), Live: r.IntN(2) == 0, Joined: when(), BootID: pick("1", "2")}
		for range r.IntN(3) {
			h.Underlay = append(h.Underlay, Underlay{Address: netip.MustParsePrefix(pick("192.0.2.1/24", "192.0.2.2/24",
				"10.42.0.70/24", "0.0.0.0/24", "fd99::1/64")),
				Device: "eth0", MTU: 1500})
		}
		kind, key, object = KindHost, h.Name, h
	case 3, 4:
		n := Network{Name: network(), Encapsulation: pick(EncapVXLAN, EncapVXLAN, EncapIPsec, EncapNone, "x"),
			VNI: 1042 + uint32(r.IntN(3)), Created: when(),
			BlockSizeV4: []int{0, 26, 27}[r.IntN(3)], Subnets: []netip.Prefix{netip.MustParsePrefix(pick("10.42.0.0/16",
				"10.42.0.0/24", "10.43.0.0/16", "172.30.0.0/16"))}}
		kind, key, object = KindNetwork, n.Name, n
	case 5, 6, 7:
		b := Block{Network: network(), CIDR: netip.MustParsePrefix(pick("10.42.0.0/26", "10.42.0.64/26", "10.42.1.0/26",
			"10.43.0.0/26", "10.42.0.0/27", "172.30.0.0/26")), Host: host()}
		if r.IntN(2) == 0 {
			b.Gateway = b.CIDR.Addr().Next()
		}
		kind, key, object = KindBlock, BlockKey(b), b
	case 8:
		e := HostRoute{Network: network(), Address: netip.MustParseAddr(pick("10.42.0.5", "10.43.0.5", "192.0.2.9",
			"192.168.1.1", "8.8.8.8")), Host: host()}
		kind, key, object = KindHostRoute, HostRouteKey(e), e
	case 9:
		kind, key = KindProblem, pick("hosts/a", "networks/red", "blocks/red/10.42.0.0/26", "tables/x")
		object = "the service says so"
	}
	if r.IntN(3) == 0 {
		object = nil
	} else if r.IntN(20) == 0 {
		object = map[string]any{"name": 7, "network": "\x1b", "host": []string{}}
	}
	return event(tb, r.Int64N(1000), kind, key, object)
}

// TestViewEqualsTheOneBuiltFromNothing after any sequence of changes, and what was handed out before is as it was.
func TestViewEqualsTheOneBuiltFromNothing(t *testing.T) {
	conflicts := 0
	for seed := range uint64(40) {
		r := rand.New(rand.NewPCG(seed, 17))
		plain := newPlainView()
		var v viewState
		v.load(&Snapshot{})
		type past struct{ now, then *Snapshot }
		var handed []past
		for step := range 400 {
			if r.IntN(150) == 0 { // the watch starts over
				v.load(plain.all())
			}
			ev := randomChange(t, r)
			plain.apply(ev)
			if _, err := v.apply(ev); err != nil {
				t.Fatal(err)
			}
			if r.IntN(3) == 0 {
				continue // folded
			}
			got, want := v.snapshot(), plain.all().Sane()
			conflicts += len(got.Problems)
			if text := differ(got, want); text != "" {
				t.Fatalf("seed %d, step %d, after %+v: %s", seed, step, ev, text)
			}
			handed = append(handed, past{got, clone(got)})
		}
		for i, p := range handed {
			if text := differ(p.now, p.then); text != "" {
				t.Fatalf("seed %d: snapshot %d was changed later: %s", seed, i, text)
			}
		}
	}
	if conflicts == 0 {
		t.Error("nothing ever was in conflict")
	}
}

func clone(s *Snapshot) *Snapshot {
	c := *s
	c.Hosts, c.Networks, c.Blocks = slices.Clone(s.Hosts), slices.Clone(s.Networks), slices.Clone(s.Blocks)
	c.HostRoutes, c.Problems = slices.Clone(s.HostRoutes), slices.Clone(s.Problems)
	return &c
}

// differ names the first kind in which two views differ.
func differ(a, b *Snapshot) string {
	problems := func(s *Snapshot) []Problem {
		return slices.SortedFunc(slices.Values(s.Problems), func(a, b Problem) int { return cmp.Compare(a.Key, b.Key) })
	}
	for kind, x := range map[string][2]any{KindHost: {a.Hosts, b.Hosts}, KindNetwork: {a.Networks, b.Networks},
		KindBlock:     {a.Blocks, b.Blocks},
		KindHostRoute: {a.HostRoutes, b.HostRoutes}, KindProblem: {problems(a), problems(b)}} {
		if (reflect.ValueOf(x[0]).Len() > 0 || reflect.ValueOf(x[1]).Len() > 0) && !reflect.DeepEqual(x[0], x[1]) {
			return fmt.Sprintf("%s are\n%+v, want\n%+v", kind, x[0], x[1])
		}
	}
	return ""
}
