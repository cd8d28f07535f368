package delta

import (
	"net/netip"
	"slices"
)

// Disjoint sorts prefixes and drops those that another one covers: an interval set takes no overlaps.
func Disjoint(prefixes []netip.Prefix) []netip.Prefix {
	sorted := slices.Clone(prefixes)
	slices.SortFunc(sorted, func(a, b netip.Prefix) int {
		if c := a.Addr().Compare(b.Addr()); c != 0 {
			return c
		}
		return a.Bits() - b.Bits()
	})
	out := sorted[:0]
	for _, p := range sorted {
		if len(out) == 0 || !out[len(out)-1].Overlaps(p) {
			out = append(out, p)
		}
	}
	return out
}

// Without is what is left of a prefix when others are taken out of it: the fewest prefixes that cover that, sorted.
func Without(p netip.Prefix, others []netip.Prefix) []netip.Prefix {
	overlaps := false
	for _, o := range others {
		if o.Bits() <= p.Bits() && o.Contains(p.Addr()) {
			return nil
		}
		overlaps = overlaps || o.Overlaps(p)
	}
	if !overlaps {
		return []netip.Prefix{p}
	}
	low := netip.PrefixFrom(p.Addr(), p.Bits()+1)
	high := p.Addr().AsSlice()
	high[p.Bits()/8] |= 0x80 >> (p.Bits() % 8)
	upper, _ := netip.AddrFromSlice(high)
	return append(Without(low, others), Without(netip.PrefixFrom(upper, p.Bits()+1), others)...)
}
