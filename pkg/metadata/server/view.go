package server

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// Keys in the store. What every host watches lies below one prefix, so that one watch delivers it in order; address tables,
// volumes and other hosts' containers, of which there may be a million, do not.
const (
	viewPrefix      = "view/"
	hostPrefix      = "view/hosts/"
	livePrefix      = "view/live/"
	networkPrefix   = "view/networks/"
	blockPrefix     = "view/blocks/"
	endpointPrefix  = "view/endpoints/"
	tablePrefix     = "addresses/"
	containerPrefix = "containers/"
	volumePrefix    = "volumes/"
	vniPrefix       = "vnis/"
	macPrefix       = "macs/"
)

// presence is the object that a live host's lease holds.
type presence struct {
	Host      string    `json:"host"`
	MachineID string    `json:"machineID"`
	BootID    string    `json:"bootID"`
	Address   string    `json:"address"`
	Since     time.Time `json:"since"`
}

// view is the network view in memory, and the last changes of it for those who watch.
type view struct {
	self string

	mu        sync.RWMutex
	revision  int64
	loaded    bool
	updated   time.Time // when the store last proved to be there
	hosts     map[string]metadata.Host
	live      map[string]presence
	networks  map[string]metadata.Network
	blocks    map[string]map[netip.Prefix]metadata.Block
	endpoints map[string]map[netip.Addr]metadata.Endpoint
	gateways  map[string]map[netip.Addr]string // by network: whose
	own       map[string][]netip.Addr          // this host's gateways by network
	underlay  map[netip.Addr]string            // whose
	gen       map[string]uint64                // by network: grows with each change of its blocks, endpoints or definition

	events  []event // ring
	first   uint64  // index of events[0] since the start
	base    int64   // the ring holds every change after this revision
	changed chan struct{}
}

type event struct {
	revision int64
	line     []byte
}

// Kept events: a watcher that lags further gets a snapshot.
const (
	keepEvents = 8192
	dropEvents = keepEvents / 2
)

func newView(self string) *view {
	v := &view{self: self, changed: make(chan struct{}), gen: map[string]uint64{}}
	v.clear()
	return v
}

func (v *view) clear() {
	v.hosts, v.live, v.networks = map[string]metadata.Host{}, map[string]presence{}, map[string]metadata.Network{}
	v.blocks, v.endpoints = map[string]map[netip.Prefix]metadata.Block{}, map[string]map[netip.Addr]metadata.Endpoint{}
	v.gateways, v.underlay, v.own = map[string]map[netip.Addr]string{}, map[netip.Addr]string{}, map[string][]netip.Addr{}
}

// load replaces everything by a list.
func (v *view) load(entries []store.Entry, revision int64) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.clear()
	var errs []error
	for _, e := range entries {
		if _, err := v.change(e); err != nil {
			errs = append(errs, err)
		}
	}
	// Everybody who watches starts over.
	v.first += uint64(len(v.events)) + 1
	v.events, v.base = nil, revision
	for n := range v.gen {
		v.gen[n]++
	}
	v.revision, v.loaded, v.updated = revision, true, time.Now()
	v.wake()
	return errors.Join(errs...)
}

func (v *view) wake() {
	close(v.changed)
	v.changed = make(chan struct{})
}

// apply takes an update of the watch.
func (v *view) apply(u store.Update) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.updated = time.Now()
	if u.Revision <= v.revision {
		return nil
	}
	var errs []error
	var out []metadata.Event
	for _, e := range u.Entries {
		ev, err := v.change(e)
		if err != nil {
			errs = append(errs, err)
		} else {
			out = append(out, ev)
		}
	}
	for i, ev := range out {
		// Only the last change of a revision carries it: whoever resumes from there has seen the others too.
		ev.Revision = u.Revision
		if i < len(out)-1 {
			ev.Revision--
		}
		line, err := json.Marshal(ev)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		v.events = append(v.events, event{ev.Revision, append(line, '\n')})
	}
	if len(v.events) > keepEvents {
		v.base = v.events[dropEvents-1].revision
		v.events = append([]event(nil), v.events[dropEvents:]...)
		v.first += dropEvents
	}
	v.revision = u.Revision
	v.wake()
	return errors.Join(errs...)
}

// change applies one object and returns it as an event.
func (v *view) change(e store.Entry) (metadata.Event, error) {
	ev := metadata.Event{Type: metadata.EventPut, Object: e.Value}
	if e.Deleted {
		ev.Type, ev.Object = metadata.EventDelete, nil
	}
	kind, key, _ := strings.Cut(strings.TrimPrefix(e.Key, viewPrefix), "/")
	ev.Kind, ev.Key = kind, key
	switch kind {
	case "hosts":
		var h metadata.Host
		if !e.Deleted {
			if err := json.Unmarshal(e.Value, &h); err != nil {
				return ev, err
			}
		}
		for _, u := range v.hosts[key].Underlay {
			if a := u.Address.Addr(); v.underlay[a] == key {
				delete(v.underlay, a)
			}
		}
		if e.Deleted {
			delete(v.hosts, key)
			return ev, nil
		}
		for _, u := range h.Underlay {
			v.underlay[u.Address.Addr()] = key
		}
		v.hosts[key] = h
		_, h.Live = v.live[key]
		return ev, reencode(&ev, h)
	case "live":
		ev.Kind = metadata.KindHost
		if e.Deleted {
			delete(v.live, key)
		} else {
			var p presence
			if err := json.Unmarshal(e.Value, &p); err != nil {
				return ev, err
			}
			v.live[key] = p
		}
		h, ok := v.hosts[key]
		if !ok { // registered in a moment, or removed just now
			return metadata.Event{Type: metadata.EventBookmark}, nil
		}
		h.Live = !e.Deleted
		ev.Type = metadata.EventPut
		return ev, reencode(&ev, h)
	case "networks":
		v.gen[key]++
		if e.Deleted {
			delete(v.networks, key)
			return ev, nil
		}
		var n metadata.Network
		if err := json.Unmarshal(e.Value, &n); err != nil {
			return ev, err
		}
		v.networks[key] = n
	case "blocks":
		network, cidr, _ := strings.Cut(key, "/")
		p, err := netip.ParsePrefix(cidr)
		if err != nil {
			return ev, err
		}
		v.gen[network]++
		if old := v.blocks[network][p]; old.Gateway.IsValid() {
			delete(v.gateways[network], old.Gateway)
			v.own[network] = slices.DeleteFunc(v.own[network], func(a netip.Addr) bool { return a == old.Gateway })
		}
		if e.Deleted {
			delete(v.blocks[network], p)
			return ev, nil
		}
		var b metadata.Block
		if err := json.Unmarshal(e.Value, &b); err != nil {
			return ev, err
		}
		put(v.blocks, network, p, b)
		if b.Gateway.IsValid() {
			put(v.gateways, network, b.Gateway, b.Host)
			if b.Host == v.self {
				v.own[network] = append(v.own[network], b.Gateway)
			}
		}
	case "endpoints":
		network, addr, _ := strings.Cut(key, "/")
		a, err := netip.ParseAddr(addr)
		if err != nil {
			return ev, err
		}
		v.gen[network]++
		if e.Deleted {
			delete(v.endpoints[network], a)
			return ev, nil
		}
		var p metadata.Endpoint
		if err := json.Unmarshal(e.Value, &p); err != nil {
			return ev, err
		}
		put(v.endpoints, network, a, p)
	}
	return ev, nil
}

func put[K1, K2 comparable, V any](m map[K1]map[K2]V, k1 K1, k2 K2, value V) {
	if m[k1] == nil {
		m[k1] = map[K2]V{}
	}
	m[k1][k2] = value
}

func reencode(ev *metadata.Event, o any) (err error) {
	ev.Object, err = json.Marshal(o)
	return err
}

// wait returns when the view has come to a revision.
func (v *view) wait(ctx context.Context, revision int64) error {
	for {
		v.mu.RLock()
		now, changed := v.revision, v.changed
		v.mu.RUnlock()
		if now >= revision {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (v *view) snapshot() *metadata.Snapshot {
	v.mu.RLock()
	defer v.mu.RUnlock()
	s := &metadata.Snapshot{Revision: v.revision, Self: v.self,
		Hosts: []metadata.Host{}, Networks: []metadata.Network{}, Blocks: []metadata.Block{}}
	for _, name := range slices.Sorted(maps.Keys(v.hosts)) {
		h := v.hosts[name]
		_, h.Live = v.live[name]
		s.Hosts = append(s.Hosts, h)
	}
	for _, name := range slices.Sorted(maps.Keys(v.networks)) {
		s.Networks = append(s.Networks, v.networks[name])
	}
	for _, network := range slices.Sorted(maps.Keys(v.blocks)) {
		for _, p := range slices.SortedFunc(maps.Keys(v.blocks[network]), comparePrefix) {
			s.Blocks = append(s.Blocks, v.blocks[network][p])
		}
	}
	for _, network := range slices.Sorted(maps.Keys(v.endpoints)) {
		for _, a := range slices.SortedFunc(maps.Keys(v.endpoints[network]), netip.Addr.Compare) {
			s.Endpoints = append(s.Endpoints, v.endpoints[network][a])
		}
	}
	return s
}

func comparePrefix(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return a.Bits() - b.Bits()
}

func (v *view) network(name string) (metadata.Network, uint64, bool) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	n, ok := v.networks[name]
	return n, v.gen[name], ok
}

func (v *view) networkNames() []string {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return slices.Sorted(maps.Keys(v.networks))
}

func (v *view) host(name string) (metadata.Host, bool) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	h, ok := v.hosts[name]
	_, h.Live = v.live[name]
	return h, ok
}

func (v *view) hostList() []metadata.Host {
	return v.snapshot().Hosts
}

// block returns a claimed block.
func (v *view) block(network string, p netip.Prefix) (metadata.Block, bool) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	b, ok := v.blocks[network][p]
	return b, ok
}

// blocksOf lists a network's blocks that match, sorted.
func (v *view) blocksOf(network string, match func(metadata.Block) bool) []metadata.Block {
	v.mu.RLock()
	defer v.mu.RUnlock()
	var out []metadata.Block
	for _, b := range v.blocks[network] {
		if match(b) {
			out = append(out, b)
		}
	}
	slices.SortFunc(out, func(a, b metadata.Block) int { return comparePrefix(a.CIDR, b.CIDR) })
	return out
}

// gateway is this host's own address on a network in the family of subnet.
func (v *view) gateway(network string, subnet netip.Prefix) netip.Addr {
	v.mu.RLock()
	defer v.mu.RUnlock()
	for _, a := range v.own[network] {
		if subnet.Contains(a) {
			return a
		}
	}
	return netip.Addr{}
}

// endpointsOf lists the addresses that a host announces one by one.
func (v *view) endpointsOf(network, host string) []netip.Addr {
	v.mu.RLock()
	defer v.mu.RUnlock()
	var out []netip.Addr
	for a, e := range v.endpoints[network] {
		if e.Host == host {
			out = append(out, a)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

// holder says who has an address although no table does; empty: nobody.
func (v *view) holder(network string, a netip.Addr) string {
	v.mu.RLock()
	defer v.mu.RUnlock()
	if h, ok := v.gateways[network][a]; ok {
		return "host " + h + " itself (its gateway address on the network)"
	}
	if h, ok := v.underlay[a]; ok {
		return "host " + h + " itself (its own address)"
	}
	if e, ok := v.endpoints[network][a]; ok && e.Host != v.self {
		return "a container on host " + e.Host
	}
	if slices.Contains(v.networks[network].Gateways, a) {
		return "the network's router"
	}
	return ""
}

// since returns the events after a revision and the index to go on from; false: they are gone, start with a snapshot.
func (v *view) since(revision int64) (index uint64, ok bool) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	if revision == v.revision {
		return v.first + uint64(len(v.events)), true
	}
	if revision > v.revision || revision < v.base || !v.loaded {
		return 0, false
	}
	i := len(v.events)
	for i > 0 && v.events[i-1].revision > revision {
		i--
	}
	return v.first + uint64(i), true
}

// next returns the events from an index on, and a channel that closes when there are more.
func (v *view) next(index uint64) (lines []event, next uint64, changed <-chan struct{}, ok bool) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	end := v.first + uint64(len(v.events))
	if index < v.first || index > end {
		return nil, 0, nil, false
	}
	return slices.Clone(v.events[index-v.first:]), end, v.changed, true
}

// position is a snapshot together with the index from which its changes follow.
func (v *view) position() (*metadata.Snapshot, uint64) {
	for {
		v.mu.RLock()
		index, revision := v.first+uint64(len(v.events)), v.revision
		v.mu.RUnlock()
		if s := v.snapshot(); s.Revision == revision {
			return s, index
		}
	}
}
