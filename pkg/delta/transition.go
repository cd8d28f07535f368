package delta

import "slices"

// MergeForTransition is a chain as it shall be, and behind that the rules that it had and shall have no
// longer: what a rule keeps out, it keeps out until what it was for is gone. A chain of another base, and
// rules that cannot be written again, are not kept.
func MergeForTransition(want, have Chain) Chain {
	if !want.SameBase(have) {
		return want
	}
	out := want
	out.Rules = slices.Clone(want.Rules)
	for _, r := range have.Rules {
		foreign := slices.ContainsFunc(r, func(s Statement) bool { _, unknown := s.(Unknown); return unknown })
		if !foreign && !slices.ContainsFunc(want.Rules, r.Equal) {
			out.Rules = append(out.Rules, r)
		}
	}
	return out
}
