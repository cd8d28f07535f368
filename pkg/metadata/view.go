package metadata

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
)

// Keys of objects within their kind, as they stand in the API's paths, in events and in the store.

// BlockKey returns the key of a block: network/address/length.
func BlockKey(b Block) string { return b.Network + "/" + b.CIDR.String() }

// HostRouteKey returns the key of a host route: network/address.
func HostRouteKey(e HostRoute) string { return e.Network + "/" + e.Address.String() }

// ContainerKey returns the key of a container: host/id.
func ContainerKey(c Container) string { return c.Host + "/" + c.ID }

// VolumeKey returns the key of a volume in the store: host/driver/name.
func VolumeKey(v Volume) string { return v.Host + "/" + v.Driver + "/" + v.Name }

// viewState is the network view that a watch builds. The cost of an event depends on the change,
// not on the view. Lists stay sorted. Only a change of a network, or of a host's claims, checks
// everything again. At 20 000 blocks a full rebuild takes a hundred times as long.
type viewState struct {
	revision   int64
	self       string
	dirty      bool
	anew       bool
	hosts      *listed[Host]
	networks   *listed[Network]
	blocks     *listed[Block]
	hostRoutes *listed[HostRoute]
	problems   map[string]string // entries that the service, or this client, could not use, by key
	away       string            // as in a Snapshot

	// The objects that can be used together; see settle.
	unsettled bool
	usable    map[string]Network
	encap     []Network // those that Announceable checks
	links     []netip.Prefix
	conflicts []Problem
}

// apply applies one event and reports whether the view changed.
func (v *viewState) apply(ev Event) (bool, error) {
	if ev.Type == EventSnapshot {
		var s Snapshot
		if err := json.Unmarshal(ev.Object, &s); err != nil {
			return false, fmt.Errorf("watch: snapshot at revision %d: %w", ev.Revision, err)
		}
		v.load(&s)
		return true, nil
	}
	if v.hosts == nil {
		return false, fmt.Errorf("watch: a change at revision %d comes before a first snapshot", ev.Revision)
	}
	v.revision = max(v.revision, ev.Revision)
	if ev.Type == EventBookmark {
		changed := v.away != ev.Away
		v.away = ev.Away
		return changed, nil
	}
	switch ev.Kind {
	case KindHost:
		before, had := v.hosts.get(ev.Key)
		change(v, v.hosts, ev)
		after, has := v.hosts.get(ev.Key)
		if had != has || !before.Joined.Equal(after.Joined) || !slices.Equal(before.Underlay, after.Underlay) {
			v.unsettled = true
		}
	case KindNetwork:
		change(v, v.networks, ev)
		v.unsettled = true
	case KindBlock:
		change(v, v.blocks, ev)
		fit(v, v.blocks, ev.Key, v.fitBlock)
	case KindHostRoute:
		change(v, v.hostRoutes, ev)
		fit(v, v.hostRoutes, ev.Key, v.fitHostRoute)
	case KindProblem:
		changeText(v.problems, ev)
	default: // a newer service may send more kinds
		return false, nil
	}
	return true, nil
}

// change applies one event of a kind. An invalid object changes only the problems: the known state
// of the entry stays.
func change[T interface{ Check(key string) error }](v *viewState, l *listed[T], ev Event) {
	at := ev.Kind + "/" + ev.Key
	if ev.Type == EventDelete {
		delete(v.problems, at)
		l.remove(ev.Key)
		return
	}
	o, err := Decode[T](ev.Key, ev.Object)
	if err != nil {
		v.problems[at] = problem(ev.Kind, ev.Key, err).What
		return
	}
	delete(v.problems, at)
	l.put(ev.Key, o)
}

// changeText adds or removes a problem that the service reports.
func changeText(m map[string]string, ev Event) {
	var what string
	if ev.Type == EventDelete || json.Unmarshal(ev.Object, &what) != nil {
		delete(m, ev.Key)
		return
	}
	m[ev.Key] = what
}

func (v *viewState) load(s *Snapshot) {
	*v = viewState{revision: s.Revision, self: s.Self, away: s.Away, anew: true, unsettled: true,
		problems: map[string]string{}}
	v.hosts = list(v, KindHost, s.Hosts, func(h Host) string { return h.Name })
	v.networks = list(v, KindNetwork, s.Networks, func(n Network) string { return n.Name })
	v.blocks = list(v, KindBlock, s.Blocks, BlockKey)
	v.hostRoutes = list(v, KindHostRoute, s.HostRoutes, HostRouteKey)
	for _, p := range s.Problems {
		v.problems[p.Key] = p.What
	}
}

// settle computes the objects of the view that can be used together, as Sane does.
func (v *viewState) settle() {
	networks, problems := Compatible(v.networks.list)
	hosts, networks, more := apart(v.hosts.list, networks)
	v.conflicts = append(problems, more...)
	v.usable = make(map[string]Network, len(networks))
	v.encap = slices.Clone(networks) // the list may change in place
	for _, n := range networks {
		v.usable[n.Name] = n
	}
	names := make(map[string]bool, len(hosts))
	for _, h := range hosts {
		names[h.Name] = true
	}
	v.links = Links(hosts)
	v.unsettled = false
	v.hosts.sift(func(h Host) error {
		if !names[h.Name] {
			return errQuiet
		}
		return nil
	})
	v.networks.sift(func(n Network) error {
		if _, ok := v.usable[n.Name]; !ok {
			return errQuiet
		}
		return nil
	})
	v.blocks.sift(v.fitBlock)
	v.hostRoutes.sift(v.fitHostRoute)
}

// errQuiet is the reason for an object that is left out without a message of its own. The conflicts
// name the object, or its network does not exist. A removed network vanishes before its blocks and
// host routes do.
var errQuiet = errors.New("left out")

func (v *viewState) fitBlock(b Block) error {
	n, ok := v.usable[b.Network]
	if !ok {
		return errQuiet
	}
	return n.Admits(b)
}

func (v *viewState) fitHostRoute(e HostRoute) error {
	n, ok := v.usable[e.Network]
	if !ok {
		return errQuiet
	}
	return n.announces(e, v.encap, v.links)
}

// fit checks one object again, unless settle will check all.
func fit[T any](v *viewState, l *listed[T], key string, check func(T) error) {
	if o, ok := l.get(key); ok && !v.unsettled {
		l.leave(key, check(o))
	}
}

// snapshot returns the part of the view that planners can use.
func (v *viewState) snapshot() *Snapshot {
	if v.unsettled {
		v.settle()
	}
	s := &Snapshot{Revision: v.revision, Self: v.self, Away: v.away, Anew: v.anew, sane: true,
		Hosts: v.hosts.used(), Networks: v.networks.used(), Blocks: v.blocks.used(), HostRoutes: v.hostRoutes.used()}
	for _, k := range slices.Sorted(maps.Keys(v.problems)) {
		s.Problems = append(s.Problems, Problem{Key: k, What: v.problems[k]})
	}
	for _, p := range slices.Concat(v.conflicts, v.blocks.problems(KindBlock), v.hostRoutes.problems(KindHostRoute)) {
		if _, told := v.problems[p.Key]; !told {
			s.Problems = append(s.Problems, p)
		}
	}
	return s
}

// listed keeps the objects of a kind sorted by their keys. The lists that it returns are never
// changed.
type listed[T any] struct {
	keys   []string
	list   []T
	shared bool             // list was returned
	left   map[string]error // reasons of unused objects
	kept   []T              // used objects; nil: not computed
}

// list returns a listed of objects. Invalid objects become problems.
func list[T interface{ Check(key string) error }](v *viewState, kind string, objects []T,
	key func(T) string) *listed[T] {
	byKey := make(map[string]T, len(objects))
	for _, o := range objects {
		k := key(o)
		if err := o.Check(k); err != nil {
			v.problems[kind+"/"+k] = problem(kind, k, err).What
			continue
		}
		byKey[k] = o
	}
	l := &listed[T]{keys: slices.Sorted(maps.Keys(byKey)), list: make([]T, 0, len(byKey)), left: map[string]error{}}
	for _, k := range l.keys {
		l.list = append(l.list, byKey[k])
	}
	return l
}

func (l *listed[T]) get(key string) (o T, ok bool) {
	if i, ok := slices.BinarySearch(l.keys, key); ok {
		return l.list[i], true
	}
	return o, false
}

func (l *listed[T]) put(key string, o T) {
	l.own()
	i, ok := slices.BinarySearch(l.keys, key)
	if ok {
		l.list[i] = o
		return
	}
	l.keys, l.list = slices.Insert(l.keys, i, key), slices.Insert(l.list, i, o)
}

func (l *listed[T]) remove(key string) {
	if i, ok := slices.BinarySearch(l.keys, key); ok {
		l.own()
		l.keys, l.list = slices.Delete(l.keys, i, i+1), slices.Delete(l.list, i, i+1)
		delete(l.left, key)
	}
}

// own copies the list when it is shared, so that it may be changed.
func (l *listed[T]) own() {
	l.kept = nil
	if l.shared {
		l.list, l.shared = slices.Clone(l.list), false
	}
}

// leave sets the reason why an object is not used. With nil the object is used.
func (l *listed[T]) leave(key string, why error) {
	if _, was := l.left[key]; !was && why == nil {
		return
	}
	l.kept = nil
	delete(l.left, key)
	if why != nil {
		l.left[key] = why
	}
}

// sift checks all objects.
func (l *listed[T]) sift(check func(T) error) {
	l.kept, l.left = nil, map[string]error{}
	for i, o := range l.list {
		if err := check(o); err != nil {
			l.left[l.keys[i]] = err
		}
	}
}

// used returns the objects that are used, sorted.
func (l *listed[T]) used() []T {
	if len(l.left) == 0 {
		l.shared = true
		return l.list
	}
	if l.kept == nil {
		l.kept = make([]T, 0, len(l.list))
		for i, o := range l.list {
			if l.left[l.keys[i]] == nil {
				l.kept = append(l.kept, o)
			}
		}
	}
	return l.kept
}

// problems returns the reasons of the unused objects.
func (l *listed[T]) problems(kind string) (out []Problem) {
	for _, k := range slices.Sorted(maps.Keys(l.left)) {
		if err := l.left[k]; err != errQuiet { //nolint:errorlint // nobody wraps it
			out = append(out, problem(kind, k, err))
		}
	}
	return out
}
