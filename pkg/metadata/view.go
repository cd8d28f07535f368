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

// viewState is the network view under construction by a watch.
type viewState struct {
	revision  int64
	self      string
	dirty     bool
	hosts     map[string]Host
	networks  map[string]Network
	blocks    map[string]Block
	endpoints map[string]Endpoint
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
	v.revision = max(v.revision, ev.Revision)
	if ev.Type == EventBookmark {
		return false, nil
	}
	var err error
	switch ev.Kind {
	case KindHost:
		err = change(v.hosts, ev)
	case KindNetwork:
		err = change(v.networks, ev)
	case KindBlock:
		err = change(v.blocks, ev)
	case KindEndpoint:
		err = change(v.endpoints, ev)
	default: // a newer service may send more kinds
		return false, nil
	}
	return err == nil, err
}

func change[T any](m map[string]T, ev Event) error {
	if ev.Type == EventDelete {
		delete(m, ev.Key)
		return nil
	}
	var o T
	if err := json.Unmarshal(ev.Object, &o); err != nil {
		return fmt.Errorf("watch: %s/%s at revision %d: %w", ev.Kind, ev.Key, ev.Revision, err)
	}
	m[ev.Key] = o
	return nil
}

func (v *viewState) load(s *Snapshot) {
	*v = viewState{revision: s.Revision, self: s.Self,
		hosts:     index(s.Hosts, func(h Host) string { return h.Name }),
		networks:  index(s.Networks, func(n Network) string { return n.Name }),
		blocks:    index(s.Blocks, BlockKey),
		endpoints: index(s.Endpoints, EndpointKey)}
}

func index[T any](list []T, key func(T) string) map[string]T {
	m := make(map[string]T, len(list))
	for _, o := range list {
		m[key(o)] = o
	}
	return m
}

func (v *viewState) snapshot() *Snapshot {
	return &Snapshot{Revision: v.revision, Self: v.self,
		Hosts: sorted(v.hosts), Networks: sorted(v.networks), Blocks: sorted(v.blocks), Endpoints: sorted(v.endpoints)}
}

func sorted[T any](m map[string]T) []T {
	out := make([]T, 0, len(m))
	for _, k := range slices.SortedFunc(maps.Keys(m), cmp.Compare[string]) {
		out = append(out, m[k])
	}
	return out
}
