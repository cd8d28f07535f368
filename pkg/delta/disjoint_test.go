package delta_test

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/lariat-net/lariat/pkg/delta"
)

// TestDisjoint: an interval set takes no overlaps, and must match what the list matched.
func TestDisjoint(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 500 {
		var in []netip.Prefix
		for range rng.IntN(12) {
			in = append(in, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(rng.IntN(3)), byte(rng.IntN(4) << 6), 0}), 6+rng.IntN(20)).Masked())
		}
		before := slices.Clone(in)
		out := delta.Disjoint(in)
		if !slices.Equal(in, before) {
			t.Fatalf("the argument was changed: %v", in)
		}
		for i, p := range out {
			for _, q := range out[i+1:] {
				if p.Overlaps(q) {
					t.Fatalf("%v and %v of %v overlap", p, q, in)
				}
			}
		}
		for range 50 {
			a := netip.AddrFrom4([4]byte{byte(8 + rng.IntN(5)), byte(rng.IntN(5)), byte(rng.IntN(256)), 1})
			contains := func(p netip.Prefix) bool { return p.Contains(a) }
			if slices.ContainsFunc(in, contains) != slices.ContainsFunc(out, contains) {
				t.Fatalf("%s is in only one of %v and %v", a, in, out)
			}
		}
	}
}

func TestWithout(t *testing.T) {
	for _, tc := range []struct{ p, others, want string }{
		{"10.0.0.0/8", "", "10.0.0.0/8"},
		{"10.0.0.0/8", "192.0.2.0/24 fd00::/8", "10.0.0.0/8"},
		{"10.0.0.0/8", "0.0.0.0/0", ""},
		{"10.0.0.0/8", "10.0.0.0/8", ""},
		{"10.0.0.0/14", "10.1.0.0/16", "10.0.0.0/16 10.2.0.0/15"},
		{"10.0.0.0/30", "10.0.0.1/32 10.0.0.2/32", "10.0.0.0/32 10.0.0.3/32"},
		{"fd00::/8", "fd80::/9", "fd00::/9"},
		{"0.0.0.0/0", "128.0.0.0/1", "0.0.0.0/1"},
	} {
		var others []netip.Prefix
		for _, o := range strings.Fields(tc.others) {
			others = append(others, netip.MustParsePrefix(o))
		}
		var got []string
		for _, p := range delta.Without(netip.MustParsePrefix(tc.p), others) {
			got = append(got, p.String())
		}
		if strings.Join(got, " ") != tc.want {
			t.Errorf("%s without %s: %v, want %s", tc.p, tc.others, got, tc.want)
		}
	}
}
