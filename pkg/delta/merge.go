package delta

import (
	"cmp"
)

// Merge returns one state that holds the objects of all states.
// When two states want different values of one object, the first state wins.
// Merge notes each such conflict in Problems. It skips nil states.
// It does not change its arguments, but the result shares the slices of their sets and chains.
func Merge(states ...*State) *State {
	out := &State{}
	for _, s := range states {
		if s == nil {
			continue
		}
		merge(out, &out.Sysctls, s.Sysctls, equal, cmp.Compare, appendSysctl)
		merge(out, &out.Links, s.Links, equal, cmp.Compare, appendLink)
		merge(out, &out.Addrs, s.Addrs, equal, compareAddr,
			func(b []byte, a Addr, _ struct{}) []byte { return appendAddr(b, a) })
		merge(out, &out.Neighs, s.Neighs, equal, compareNeigh, appendNeigh)
		merge(out, &out.FDB, s.FDB, equal, compareFDB, func(b []byte, f FDB, _ struct{}) []byte { return appendFDB(b, f) })
		merge(out, &out.Nexthops, s.Nexthops, equal, cmp.Compare, appendNexthop)
		merge(out, &out.Routes, s.Routes, equal, compareRoute, appendRoute)
		merge(out, &out.Sets, s.Sets, Set.Equal, cmp.Compare, appendSet)
		merge(out, &out.Chains, s.Chains, Chain.Equal, cmp.Compare, func(b []byte, name string, c Chain) []byte {
			b = appendChainBase(b, name, c)
			for _, r := range c.Rules {
				b = append(append(b, "; "...), r.String()...)
			}
			return b
		})
		out.Problems = append(out.Problems, s.Problems...)
	}
	return out
}

func merge[K comparable, V any](out *State, to *map[K]V, from map[K]V, same func(a, b V) bool, compare func(a, b K) int,
	line func([]byte, K, V) []byte) {
	if len(*to) == 0 {
		*to = make(map[K]V, len(from)) // the first state holds nearly all objects
	}
	conflicts := map[K]V{}
	for k, v := range from {
		have, ok := (*to)[k]
		if !ok {
			(*to)[k] = v
		} else if !same(have, v) {
			conflicts[k] = v
		}
	}
	for _, k := range sortedKeys(conflicts, compare) {
		out.Problemf("%s is left out, it conflicts with %s", line(nil, k, conflicts[k]), line(nil, k, (*to)[k]))
	}
}
