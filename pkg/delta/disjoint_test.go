package delta_test

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/lariat-net/lariat/pkg/delta"
)

// TestDisjoint checks that the result has no overlaps and covers the same addresses as the list.
// An interval set rejects overlaps.
func TestDisjoint(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 500 {
		var in []netip.Prefix
		for range rng.IntN(12) {
			in = append(in, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(rng.IntN(3)), byte(rng.IntN(4) << 6), 0}),
				6+rng.IntN(20)).Masked())
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
