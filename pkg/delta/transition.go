package delta

import "slices"

// MergeForTransition returns the desired chain, followed by the rules of have that want lacks.
// An old rule keeps packets out until the object that the rule protects is removed.
// The result holds no rules of a chain with another base.
// It holds no rule with an Unknown statement, because Lariat cannot write such a rule.
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
