package delta

import (
	"cmp"
	"net/netip"
	"slices"
)

// Entry is one object of a difference.
type Entry[K comparable, V any] struct {
	Key   K
	Value V // the desired value; in a removal, the observed value

	// Replaces is set when the kernel holds an unequal object of the same key. Old is that object.
	Replaces bool
	Old      V
}

// Changes keeps the changes that make objects of one kind equal to the desired state.
// Both lists are sorted by key, so that the same difference always prints and runs the same way.
// Set runs before Remove: a peer that moves is never without a path.
type Changes[K comparable, V any] struct {
	Set    []Entry[K, V] // absent or different in the kernel: add or replace
	Remove []Entry[K, V] // Lariat's, in the kernel, no longer desired
}

// Len returns the number of objects to change.
func (c *Changes[K, V]) Len() int { return len(c.Set) + len(c.Remove) }

// Difference keeps all changes that make a host equal to a desired state.
type Difference struct {
	Sysctls  Changes[string, string] // never removed: the earlier value is unknown
	Links    Changes[string, Link]
	Addrs    Changes[Addr, struct{}]
	Neighs   Changes[Neigh, MAC]
	FDB      Changes[FDB, struct{}]
	Nexthops Changes[uint32, Nexthop]
	Routes   Changes[RouteKey, Route]
	Sets     Changes[string, Set]
	Chains   Changes[string, Chain]
}

// Between returns the changes that make observed equal to desired.
// observed must hold only objects with Lariat's mark, because Between removes every object that
// desired lacks.
//
// When a device is removed or re-created, the kernel removes all objects on that device.
// Between accounts for this effect. Desired objects on such a device are in Set although they were
// observed. Objects on it that are not desired are in no Remove list.
//
// A nil state counts as an empty one.
func Between(desired, observed *State) *Difference {
	if desired == nil {
		desired = &State{}
	}
	if observed == nil {
		observed = &State{}
	}
	d := &Difference{}
	diff(&d.Links, desired.Links, observed.Links, func(a, b Link) bool { return a == b }, cmp.Compare)
	observed = survivors(&d.Links, observed)
	diff(&d.Sysctls, desired.Sysctls, observed.Sysctls, equal, cmp.Compare)
	d.Sysctls.Remove = nil
	diff(&d.Addrs, desired.Addrs, observed.Addrs, equal, compareAddr)
	diff(&d.Neighs, desired.Neighs, observed.Neighs, equal, compareNeigh)
	diff(&d.FDB, desired.FDB, observed.FDB, equal, compareFDB)
	diff(&d.Nexthops, desired.Nexthops, observed.Nexthops, equal, cmp.Compare)
	diff(&d.Routes, desired.Routes, observed.Routes, equal, compareRoute)
	diff(&d.Sets, desired.Sets, observed.Sets, Set.Equal, cmp.Compare)
	diff(&d.Chains, desired.Chains, observed.Chains, Chain.Equal, cmp.Compare)
	return d
}

func equal[V comparable](a, b V) bool { return a == b }

func diff[K comparable, V any](c *Changes[K, V], desired, observed map[K]V, equal func(a, b V) bool,
	compare func(a, b K) int) {
	var keys []K
	if len(observed) == 0 {
		keys = make([]K, 0, len(desired))
	}
	kept := 0
	for k, want := range desired {
		have, ok := observed[k]
		if ok {
			kept++
			if equal(want, have) {
				continue
			}
		}
		keys = append(keys, k)
	}
	// Sort keys, not entries: entries are ten times as big, and sorting mostly moves data.
	if len(keys) > 0 {
		slices.SortFunc(keys, compare)
		c.Set = make([]Entry[K, V], len(keys))
		for i, k := range keys {
			e := &c.Set[i]
			e.Key, e.Value = k, desired[k]
			e.Old, e.Replaces = observed[k]
		}
	}
	if kept == len(observed) {
		return // the usual case: nothing to remove, and the second walk is saved
	}
	keys = keys[:0]
	for k := range observed {
		if _, ok := desired[k]; !ok {
			keys = append(keys, k)
		}
	}
	slices.SortFunc(keys, compare)
	c.Remove = make([]Entry[K, V], len(keys))
	for i, k := range keys {
		c.Remove[i] = Entry[K, V]{Key: k, Value: observed[k]}
	}
}

// survivors returns the part of observed that remains after the changes of the links.
func survivors(links *Changes[string, Link], observed *State) *State {
	gone := map[string]bool{} // true: the device is removed; false: only its neighbours are removed
	for _, e := range links.Remove {
		gone[e.Key] = true
	}
	for _, e := range links.Set {
		switch {
		case !e.Replaces: // an absent device holds no objects, although an observer may have raced
			gone[e.Key] = true
		case e.Value.Remake(e.Old):
			gone[e.Key] = true
		case e.Value.MAC != e.Old.MAC:
			// The kernel flushes all neighbours of a device whose address changes.
			// It flushes permanent neighbours too.
			gone[e.Key] = false
		}
	}
	if len(gone) == 0 {
		return observed
	}
	// sources holds the addresses that are removed.
	// The kernel also removes IPv4 routes that prefer such an address, on every device.
	sources := map[netip.Addr]bool{}
	for a := range observed.Addrs {
		if gone[a.Dev] {
			sources[a.Prefix.Addr()] = true
		}
	}
	nexthops := filter(observed.Nexthops, func(_ uint32, n Nexthop) bool { return !gone[n.Dev] })
	routes := filter(observed.Routes, func(_ RouteKey, r Route) bool {
		_, held := nexthops[r.NH]
		return !gone[r.Dev] && (r.NH == 0 || held) && !(r.Src.Is4() && sources[r.Src])
	})
	for key, r := range routes {
		if sources[r.Src] { // IPv6 routes remain and lose their source
			r.Src = netip.Addr{}
			routes[key] = r
		}
	}
	return &State{
		Links:    observed.Links,
		Addrs:    filter(observed.Addrs, func(a Addr, _ struct{}) bool { return !gone[a.Dev] }),
		Neighs:   filter(observed.Neighs, func(n Neigh, _ MAC) bool { _, ok := gone[n.Dev]; return !ok }),
		FDB:      filter(observed.FDB, func(f FDB, _ struct{}) bool { return !gone[f.Dev] }),
		Nexthops: nexthops,
		Routes:   routes,
		Sysctls:  filter(observed.Sysctls, func(k, _ string) bool { return !gone[SysctlDevice(k)] }),
		Sets:     observed.Sets,
		Chains:   observed.Chains,
	}
}

func filter[K comparable, V any](m map[K]V, keep func(K, V) bool) map[K]V {
	out := make(map[K]V, len(m))
	for k, v := range m {
		if keep(k, v) {
			out[k] = v
		}
	}
	return out
}

// SysctlDevice returns the device of a sysctl such as net/ipv4/conf/vtep1042/rp_filter.
// It returns an empty string for a sysctl of no device.
// The kernel creates and removes such sysctls with their device.
func SysctlDevice(key string) string {
	for _, prefix := range []string{"net/ipv4/conf/", "net/ipv6/conf/", "net/ipv4/neigh/", "net/ipv6/neigh/"} {
		if len(key) > len(prefix) && key[:len(prefix)] == prefix {
			rest := key[len(prefix):]
			for i := range rest {
				if rest[i] == '/' && rest[:i] != "all" && rest[:i] != "default" {
					return rest[:i]
				}
			}
		}
	}
	return ""
}

// Empty reports whether there is nothing to change.
func (d *Difference) Empty() bool { return d.Len() == 0 }

// Len returns the number of objects to change.
func (d *Difference) Len() int {
	return d.Sysctls.Len() + d.Links.Len() + d.Addrs.Len() + d.Neighs.Len() + d.FDB.Len() + d.Nexthops.Len() +
		d.Routes.Len() + d.Sets.Len() + d.Chains.Len()
}

// String prints the changes in the order in which Apply makes them.
// "+ " adds an object, "~ " replaces it, and "- " removes it.
// A comment after a replacement shows the old object.
// Sets show their changed elements instead, and chains show their changed rules.
func (d *Difference) String() string {
	var b []byte
	set(&b, &d.Sysctls, appendSysctl)
	set(&b, &d.Links, appendLink)
	set(&b, &d.Addrs, func(b []byte, a Addr, _ struct{}) []byte { return appendAddr(b, a) })
	set(&b, &d.Neighs, appendNeigh)
	set(&b, &d.FDB, func(b []byte, f FDB, _ struct{}) []byte { return appendFDB(b, f) })
	set(&b, &d.Nexthops, appendNexthop)
	set(&b, &d.Routes, appendRoute)
	for _, e := range d.Sets.Set {
		if !e.Replaces || !e.Value.SameType(e.Old) {
			setOne(&b, &e, appendSet)
			continue
		}
		add, gone := ElementChanges(e.Value.Elements, e.Old.Elements)
		if len(add) > 0 {
			b = appendElementLine(b, "+ ", e.Key, add)
		}
		if len(gone) > 0 {
			b = appendElementLine(b, "- ", e.Key, gone)
		}
	}
	for _, e := range d.Chains.Set {
		if e.Replaces && e.Value.SameBase(e.Old) {
			b = appendRules(b, "- ", e.Key, e.Old.Rules, e.Value.Rules)
			b = appendRules(b, "+ ", e.Key, e.Value.Rules, e.Old.Rules)
			continue
		}
		setOne(&b, &e, appendChainBase)
		b = appendRules(b, "+ ", e.Key, e.Value.Rules, nil)
	}
	remove(&b, &d.Chains, appendChainBase)
	remove(&b, &d.Sets, appendSet)
	remove(&b, &d.Routes, appendRoute)
	remove(&b, &d.Nexthops, appendNexthop)
	remove(&b, &d.FDB, func(b []byte, f FDB, _ struct{}) []byte { return appendFDB(b, f) })
	remove(&b, &d.Neighs, appendNeigh)
	remove(&b, &d.Addrs, func(b []byte, a Addr, _ struct{}) []byte { return appendAddr(b, a) })
	remove(&b, &d.Links, appendLink)
	return string(b)
}

func set[K comparable, V any](b *[]byte, c *Changes[K, V], line func([]byte, K, V) []byte) {
	for i := range c.Set {
		setOne(b, &c.Set[i], line)
	}
}

func setOne[K comparable, V any](b *[]byte, e *Entry[K, V], line func([]byte, K, V) []byte) {
	start, sign := len(*b), "+ "
	if e.Replaces {
		sign = "~ "
	}
	*b = line(append(*b, sign...), e.Key, e.Value)
	if e.Replaces {
		*b = line(append(*b, " # was "...), e.Key, e.Old)
	}
	*b = endLine(*b, start)
}

func remove[K comparable, V any](b *[]byte, c *Changes[K, V], line func([]byte, K, V) []byte) {
	for _, e := range c.Remove {
		start := len(*b)
		*b = endLine(line(append(*b, "- "...), e.Key, e.Value), start)
	}
}

func appendElementLine(b []byte, sign, name string, elements []netip.Prefix) []byte {
	start := len(b)
	b = append(append(append(b, sign...), "element inet "+Table+" "...), name...)
	return endLine(appendElements(append(b, ' '), elements), start)
}

// appendRules prints the rules that others lacks.
// When both lists differ in order only, appendRules prints all rules.
func appendRules(b []byte, sign, chain string, rules, others []Rule) []byte {
	before := len(b)
	add := func(r Rule) {
		start := len(b)
		b = endLine(appendRule(append(b, sign...), chain, r), start)
	}
	for _, r := range rules {
		if !slices.ContainsFunc(others, r.Equal) {
			add(r)
		}
	}
	if len(b) == before && len(rules) >= len(others) {
		for _, r := range rules {
			add(r)
		}
	}
	return b
}

// ElementChanges returns the elements to add and to remove. Both arguments are sorted.
func ElementChanges(desired, observed []netip.Prefix) (add, remove []netip.Prefix) {
	for len(desired) > 0 || len(observed) > 0 {
		c := 0
		switch {
		case len(desired) == 0:
			c = 1
		case len(observed) == 0:
			c = -1
		default:
			c = comparePrefix(desired[0], observed[0])
		}
		switch {
		case c < 0:
			add, desired = append(add, desired[0]), desired[1:]
		case c > 0:
			remove, observed = append(remove, observed[0]), observed[1:]
		default:
			desired, observed = desired[1:], observed[1:]
		}
	}
	return add, remove
}
