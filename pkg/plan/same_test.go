package plan_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/ipsec"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/plan"
)

// everything returns all plans of a view.
func everything(s *metadata.Snapshot) string {
	state := plan.Desired(s, s.Self, false)
	return fmt.Sprint(state, state.Problems, ipsec.Tunnels(s, s.Self, ipsec.Options{Keys: []string{"k1", "k2"}}))
}

// TestSameViewsPlanTheSame checks that two views have equal plans when Same reports true.
func TestSameViewsPlanTheSame(t *testing.T) {
	same, flips := 0, 0
	for seed := range uint64(3000) {
		r := rand.New(rand.NewPCG(seed, 5))
		s := &metadata.Snapshot{Self: "a", Networks: []metadata.Network{
			{Name: "red", Encapsulation: metadata.EncapVXLAN, VNI: 1042,
				Subnets: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")}},
			{Name: "green", Encapsulation: metadata.EncapIPsec, Subnets: []netip.Prefix{netip.MustParsePrefix("10.43.0.0/16")}}}}
		for i, name := range []string{"a", "b", "c", "d"} {
			h := metadata.Host{Name: name, Live: r.IntN(2) == 0, MAC: metadata.MAC{0x0e, 0, byte(1 + r.IntN(8))},
				Joined: time.Unix(r.Int64N(3), 0)}
			for range 1 + r.IntN(2) {
				at := netip.AddrFrom4([4]byte{192, 0, 2, byte(1 + r.IntN(12))})
				h.Underlay = append(h.Underlay, metadata.Underlay{Address: netip.PrefixFrom(at, 24), Device: "eth0", MTU: 1500})
			}
			s.Hosts = append(s.Hosts, h)
			for j, network := range []string{"red", "green"} {
				cidr := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(42 + j), byte(i), 0}), 26)
				s.Blocks = append(s.Blocks, metadata.Block{Network: network, CIDR: cidr, Host: name, Gateway: cidr.Addr().Next()})
			}
		}
		a := s.Sane()
		b := *a
		b.Hosts, b.Blocks = slices.Clone(a.Hosts), slices.Clone(a.Blocks)
		for range 1 + r.IntN(2) {
			if len(b.Hosts) > 0 {
				h := &b.Hosts[r.IntN(len(b.Hosts))]
				switch r.IntN(8) {
				case 0, 1, 2:
					h.Live = !h.Live
				case 3:
					h.Labels, h.AgentVersion, h.MachineID = map[string]string{"a": "b"}, "2", "m2"
				case 4:
					h.BootID = "another"
				case 5:
					h.IKEKeys = []string{"k2"}
				case 6:
					h.MAC[2]++
				case 7:
					h.Joined = time.Unix(9, 0)
				}
			}
		}
		if len(b.Blocks) > 0 && r.IntN(8) == 0 {
			b.Blocks = b.Blocks[1:]
		}
		if !plan.Same(a, &b) {
			continue
		}
		same++
		if !reflect.DeepEqual(a.Hosts, b.Hosts) {
			flips++
		}
		if x, y := everything(a), everything(&b); x != y {
			t.Fatalf("seed %d: of views that are called the same this is planned:\n%s\nand this:\n%s", seed, x, y)
		}
	}
	if same < 200 || flips < 150 {
		t.Errorf("%d of 3000 views were the same, %d of them with hosts that differ", same, flips)
	}
}

// TestSameLooksAtEveryField checks that Same compares each field of a host, block, host route and
// network that a planner reads.
func TestSameLooksAtEveryField(t *testing.T) {
	unread := []string{"Labels", "MachineID", "AgentVersion", "Live"}
	base := func() *metadata.Snapshot {
		return &metadata.Snapshot{Hosts: make([]metadata.Host, 1), Networks: make([]metadata.Network, 1),
			Blocks:     make([]metadata.Block, 1),
			HostRoutes: make([]metadata.HostRoute, 1), Problems: make([]metadata.Problem, 1)}
	}
	fields := func(at func(*metadata.Snapshot) any) {
		kind := reflect.TypeOf(at(base())).Elem()
		for i := range kind.NumField() {
			s := base()
			f := reflect.ValueOf(at(s)).Elem().Field(i)
			switch v := f.Addr().Interface().(type) {
			case *netip.Addr:
				*v = netip.MustParseAddr("192.0.2.1")
			case *netip.Prefix:
				*v = netip.MustParsePrefix("192.0.2.0/24")
			case *time.Time:
				*v = time.Unix(1, 0)
			default:
				switch f.Kind() {
				case reflect.String:
					f.SetString("x")
				case reflect.Bool:
					f.SetBool(true)
				case reflect.Int:
					f.SetInt(1)
				case reflect.Uint32, reflect.Uint16:
					f.SetUint(1)
				case reflect.Slice:
					f.Set(reflect.MakeSlice(f.Type(), 1, 1))
				case reflect.Map:
					f.Set(reflect.MakeMap(f.Type()))
				case reflect.Array:
					f.Index(0).SetUint(2)
				default:
					t.Fatalf("%s.%s: a kind of field that this test does not know", kind, kind.Field(i).Name)
				}
			}
			name := kind.Field(i).Name
			if want := kind.Name() == "Host" && slices.Contains(unread, name); plan.Same(base(), s) != want {
				t.Errorf("%s.%s differs: the same %t, want %t", kind, name, !want, want)
			}
		}
	}
	fields(func(s *metadata.Snapshot) any { return &s.Hosts[0] })
	fields(func(s *metadata.Snapshot) any { return &s.Networks[0] })
	fields(func(s *metadata.Snapshot) any { return &s.Blocks[0] })
	fields(func(s *metadata.Snapshot) any { return &s.HostRoutes[0] })
	fields(func(s *metadata.Snapshot) any { return &s.Problems[0] })
	if other := base(); func() bool { other.Self = "b"; return plan.Same(base(), other) }() {
		t.Error("of another host the same is planned")
	}
}

// BenchmarkChange measures the cost of a change without the view itself.
// It measures Same, which may find that no new plan is needed, and the plan.
func BenchmarkChange(b *testing.B) {
	s := big(2000, 20000)
	flipped := *s
	flipped.Hosts = slices.Clone(s.Hosts)
	flipped.Hosts[1000].Live = !flipped.Hosts[1000].Live
	b.Run("same", func(b *testing.B) {
		for b.Loop() {
			if !plan.Same(s, &flipped) {
				b.Fatal("they differ")
			}
		}
	})
	b.Run("desired", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			plan.Desired(s, "h0", false)
		}
	})
}

// big returns a sane view with the given numbers of hosts and blocks.
func big(hosts, blocks int) *metadata.Snapshot {
	s := &metadata.Snapshot{Self: "h0", Networks: []metadata.Network{{Name: "n",
		Subnets:       []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")},
		Encapsulation: metadata.EncapVXLAN, VNI: 1042, BlockSizeV4: 26, HostNAT: true}}}
	for i := range hosts {
		a := netip.AddrFrom4([4]byte{192, 168, byte(i >> 8), byte(i)})
		s.Hosts = append(s.Hosts, metadata.Host{Name: fmt.Sprint("h", i), Live: true, MAC: metadata.MAC{0x0e, 0, 192, 168,
			byte(i >> 8), byte(i)},
			Underlay: []metadata.Underlay{{Address: netip.PrefixFrom(a, 16), Device: "eth0", MTU: 1500}}})
	}
	for i := range blocks {
		first := netip.AddrFrom4([4]byte{10, byte(i >> 10), byte(i >> 2), byte(i << 6)})
		blk := metadata.Block{Network: "n", CIDR: netip.PrefixFrom(first, 26), Host: fmt.Sprint("h", i%hosts)}
		if i < hosts {
			blk.Gateway = first.Next()
		}
		s.Blocks = append(s.Blocks, blk)
	}
	return s.Sane()
}
