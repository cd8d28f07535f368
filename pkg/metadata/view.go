package metadata

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
)

// Keys of objects within their kind, as they stand in the API's paths, in events and in the store.

// BlockKey is the key of a block: network/address/length.
func BlockKey(b Block) string { return b.Network + "/" + b.CIDR.String() }

// EndpointKey is the key of an endpoint: network/address.
func EndpointKey(e Endpoint) string { return e.Network + "/" + e.Address.String() }

// ContainerKey is the key of a container: host/id.
func ContainerKey(c Container) string { return c.Host + "/" + c.ID }

// VolumeKey is the key of a volume in the store: host/driver/name.
func VolumeKey(v Volume) string { return v.Host + "/" + v.Driver + "/" + v.Name }

// viewState is the network view under construction by a watch.
type viewState struct {
	revision  int64
	self      string
	dirty     bool
	hosts     map[string]Host
	networks  map[string]Network
	blocks    map[string]Block
	endpoints map[string]Endpoint
	problems  map[string]string // what the service could not use, by key
}

// apply takes one event and reports whether the view changed.
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
		return false, nil
	}
	switch ev.Kind {
	case KindHost:
		change(v, v.hosts, ev)
	case KindNetwork:
		change(v, v.networks, ev)
	case KindBlock:
		change(v, v.blocks, ev)
	case KindEndpoint:
		change(v, v.endpoints, ev)
	case KindProblem:
		changeText(v.problems, ev)
	default: // a newer service may send more kinds
		return false, nil
	}
	return true, nil
}

// change takes one event of a kind. What is not understood changes nothing but the problems: what was known of the entry stays.
func change[T interface{ Check(key string) error }](v *viewState, m map[string]T, ev Event) {
	at := ev.Kind + "/" + ev.Key
	if ev.Type == EventDelete {
		delete(v.problems, at)
		delete(m, ev.Key)
		return
	}
	o, err := Decode[T](ev.Key, ev.Object)
	if err != nil {
		v.problems[at] = problem(ev.Kind, ev.Key, err).What
		return
	}
	delete(v.problems, at)
	m[ev.Key] = o
}

// changeText takes a problem that the service tells, or that is over.
func changeText(m map[string]string, ev Event) {
	var what string
	if ev.Type == EventDelete || json.Unmarshal(ev.Object, &what) != nil {
		delete(m, ev.Key)
		return
	}
	m[ev.Key] = what
}

func (v *viewState) load(s *Snapshot) {
	*v = viewState{revision: s.Revision, self: s.Self,
		hosts:     index(s.Hosts, func(h Host) string { return h.Name }),
		networks:  index(s.Networks, func(n Network) string { return n.Name }),
		blocks:    index(s.Blocks, BlockKey),
		endpoints: index(s.Endpoints, EndpointKey), problems: map[string]string{}}
	for _, p := range s.Problems {
		v.problems[p.Key] = p.What
	}
}

func index[T any](list []T, key func(T) string) map[string]T {
	m := make(map[string]T, len(list))
	for _, o := range list {
		m[key(o)] = o
	}
	return m
}

// snapshot returns what of the view can be planned from.
func (v *viewState) snapshot() *Snapshot {
	s := &Snapshot{Revision: v.revision, Self: v.self,
		Hosts: sorted(v.hosts), Networks: sorted(v.networks), Blocks: sorted(v.blocks), Endpoints: sorted(v.endpoints)}
	for _, k := range slices.Sorted(maps.Keys(v.problems)) {
		s.Problems = append(s.Problems, Problem{Key: k, What: v.problems[k]})
	}
	return s.Sane()
}

func sorted[T any](m map[string]T) []T {
	out := make([]T, 0, len(m))
	for _, k := range slices.SortedFunc(maps.Keys(m), cmp.Compare[string]) {
		out = append(out, m[k])
	}
	return out
}
