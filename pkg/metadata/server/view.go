package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// hostLease is the object that a live host's lease holds.
type hostLease struct {
	Host      string    `json:"host"`
	MachineID string    `json:"machineID"`
	BootID    string    `json:"bootID"`
	Address   string    `json:"address"`
	Since     time.Time `json:"since"`
}

// Check reports why no host's lease may hold it.
func (p hostLease) Check(key string) error {
	if p.Host != key {
		return fmt.Errorf("it says that it is of host %q", p.Host)
	}
	return metadata.ValidName(p.Host)
}

// view is the network view in memory, and the last changes of it for those who watch.
type view struct {
	self string

	mu        sync.RWMutex
	revision  int64
	loaded    bool
	updated   time.Time // when the store last proved to be there
	hosts     map[string]metadata.Host
	live      map[string]hostLease
	defined   map[string]metadata.Network                  // every network that is valid by itself
	claimed   map[string]map[netip.Prefix]metadata.Block   // every such block
	announced map[string]map[netip.Addr]metadata.HostRoute // every such endpoint
	problems  map[string]string                            // why other entries are not used, by kind and key
	underlay  map[netip.Addr]string                        // whose

	// What of it can be used together; see place.
	networks  map[string]metadata.Network
	blocks    map[string]map[netip.Prefix]metadata.Block
	endpoints map[string]map[netip.Addr]metadata.HostRoute
	gateways  map[string]map[netip.Addr]string           // by network: whose
	own       map[string][]netip.Addr                    // this host's gateways by network
	mine      map[string]map[netip.Prefix]metadata.Block // this host's blocks
	counts    map[string]map[netip.Prefix]int            // blocks by network and subnet

	loading bool          // what can be used together is found out at the end
	spoilt  chan struct{} // gets a word when an entry of this host's own was spoilt
	kept    kept          // last valid values of entries that cannot be used
	keeping chan struct{} // gets a word when that changes
	claim   hostLease     // of this process
	renamed chan struct{} // gets a word when another stands in its place, or none

	gen map[string]uint64 // by network: grows with each change of its blocks, endpoints or definition

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
	v := &view{self: self, changed: make(chan struct{}), spoilt: make(chan struct{}, 1), renamed: make(chan struct{}, 1),
		kept: kept{}, keeping: make(chan struct{}, 1), gen: map[string]uint64{}}
	v.clear()
	return v
}

func (v *view) clear() {
	v.hosts, v.live, v.underlay = map[string]metadata.Host{}, map[string]hostLease{}, map[netip.Addr]string{}
	v.defined, v.networks = map[string]metadata.Network{}, map[string]metadata.Network{}
	v.claimed, v.blocks = map[string]map[netip.Prefix]metadata.Block{}, map[string]map[netip.Prefix]metadata.Block{}
	v.announced, v.endpoints = map[string]map[netip.Addr]metadata.HostRoute{},
		map[string]map[netip.Addr]metadata.HostRoute{}
	v.gateways, v.own = map[string]map[netip.Addr]string{}, map[string][]netip.Addr{}
	v.mine, v.counts = map[string]map[netip.Prefix]metadata.Block{}, map[string]map[netip.Prefix]int{}
	v.problems = map[string]string{}
}

// load replaces everything by a list.
func (v *view) load(entries []store.Entry, revision int64) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.clear()
	v.loading = true
	var errs []error
	for _, e := range entries {
		_, err := v.change(e)
		errs = append(errs, err)
	}
	v.loading = false
	for at := range v.kept {
		if _, bad := v.problems[at]; !bad { // it went while nobody looked
			delete(v.kept, at)
			v.noteKept()
		}
	}
	v.place(slices.Collect(maps.Keys(v.defined))...)
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

// age is how long ago the store last proved to be there.
func (v *view) age() time.Duration {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return time.Since(v.updated)
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
		errs = append(errs, err)
		out = append(out, ev...)
	}
	out = fold(out)
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

// fold keeps the last event of each object: a new host's entry and its lease come at one revision, and are one
// host to those who watch.
func fold(list []metadata.Event) []metadata.Event {
	type object struct{ kind, key string }
	last := make(map[object]int, len(list))
	for i, ev := range list {
		last[object{ev.Kind, ev.Key}] = i
	}
	out := list[:0]
	for i, ev := range list {
		if last[object{ev.Kind, ev.Key}] == i && (ev.Type != metadata.EventBookmark || len(last) == 1) {
			out = append(out, ev)
		}
	}
	return out
}

// change applies one entry and returns what those who watch are to be told. An entry that cannot be used is
// told as a problem and as the error, and changes nothing else: what was known of it stays in force.
func (v *view) change(e store.Entry) ([]metadata.Event, error) {
	at := strings.TrimPrefix(e.Key, entry.ViewPrefix)
	ev, err := v.set(e)
	if ev.Kind == "" && ev.Type == "" {
		return nil, nil // of a newer version
	}
	if v.keep(at, e, err) {
		err = fmt.Errorf("%w; its last valid value stays in force", err)
	}
	return v.note(at, ev, err)
}

// set puts one entry in force and returns the event that tells of it. An entry of a kind that is not known gives none.
func (v *view) set(e store.Entry) (ev metadata.Event, err error) {
	kind, key, _ := strings.Cut(strings.TrimPrefix(e.Key, entry.ViewPrefix), "/")
	ev = metadata.Event{Type: metadata.EventPut, Kind: kind, Key: key}
	if e.Deleted {
		ev.Type = metadata.EventDelete
	}
	switch kind {
	case metadata.KindHost:
		var h metadata.Host
		if h, err = entry.Decode[metadata.Host](key, e); err == nil {
			v.setHost(key, h, e.Deleted)
			_, h.Live = v.live[key]
			err = encode(&ev, h)
		}
	case metadata.KindLive:
		var p hostLease
		if p, err = entry.Decode[hostLease](key, e); err == nil {
			_, was := v.live[key]
			if e.Deleted {
				delete(v.live, key)
			} else {
				v.live[key] = p
			}
			if key == v.self && p != v.claim {
				v.rename()
			}
			h, ok := v.hosts[key]
			if ok && was == e.Deleted {
				h.Live = !e.Deleted
				ev = metadata.Event{Type: metadata.EventPut, Kind: metadata.KindHost, Key: key}
				err = encode(&ev, h)
			} else { // registered in a moment, removed just now, or its service began anew within its lease
				ev = metadata.Event{Type: metadata.EventBookmark}
			}
		}
	case metadata.KindNetwork:
		var n metadata.Network
		if n, err = entry.Decode[metadata.Network](key, e); err == nil {
			if e.Deleted {
				delete(v.defined, key)
			} else {
				v.defined[key] = n
			}
			if !v.loading {
				v.place(key)
			}
			err = encode(&ev, n)
		}
	case metadata.KindBlock:
		network, cidr, _ := strings.Cut(key, "/")
		var b metadata.Block
		if b, err = entry.Decode[metadata.Block](key, e); err == nil {
			p := b.CIDR
			if e.Deleted {
				p, _ = netip.ParsePrefix(cidr)
			}
			v.gen[network]++
			v.unplaceBlock(network, p)
			if e.Deleted {
				delete(v.claimed[network], p)
			} else {
				put(v.claimed, network, p, b)
				v.placeBlock(b)
			}
			err = encode(&ev, b)
		}
	case metadata.KindHostRoute:
		network, addr, _ := strings.Cut(key, "/")
		var p metadata.HostRoute
		if p, err = entry.Decode[metadata.HostRoute](key, e); err == nil {
			a := p.Address
			if e.Deleted {
				a, _ = netip.ParseAddr(addr)
			}
			v.gen[network]++
			delete(v.endpoints[network], a)
			if e.Deleted {
				delete(v.announced[network], a)
			} else {
				put(v.announced, network, a, p)
				v.placeHostRoute(p)
			}
			err = encode(&ev, p)
		}
	default:
		return metadata.Event{}, nil
	}
	if err != nil && key == v.self && (kind == metadata.KindHost || kind == metadata.KindLive) {
		select {
		case v.spoilt <- struct{}{}:
		default:
		}
	}
	return ev, err
}

// rename has somebody look at who has this host's name.
func (v *view) rename() {
	select {
	case v.renamed <- struct{}{}:
	default:
	}
}

// note keeps the problems up to date.
func (v *view) note(at string, ev metadata.Event, err error) ([]metadata.Event, error) {
	_, had := v.problems[at]
	p := metadata.Event{Type: metadata.EventDelete, Kind: metadata.KindProblem, Key: at}
	if err != nil {
		v.problems[at] = metadata.NewProblem(at, err).What
		p.Type = metadata.EventPut
		if eerr := encode(&p, v.problems[at]); eerr != nil {
			return nil, eerr
		}
		return []metadata.Event{p}, fmt.Errorf("%s: %w", at, err)
	}
	if had {
		delete(v.problems, at)
		return []metadata.Event{p, ev}, nil
	}
	return []metadata.Event{ev}, nil
}

// encode makes o the object of an event, unless the event tells of a deletion.
func encode(ev *metadata.Event, o any) (err error) {
	if ev.Type != metadata.EventDelete {
		ev.Object, err = json.Marshal(o)
	}
	return err
}

func (v *view) setHost(name string, h metadata.Host, deleted bool) {
	for _, u := range v.hosts[name].Underlay {
		if a := u.Address.Addr(); v.underlay[a] == name {
			delete(v.underlay, a)
		}
	}
	if deleted {
		delete(v.hosts, name)
		return
	}
	for _, u := range h.Underlay {
		v.underlay[u.Address.Addr()] = name
	}
	v.hosts[name] = h
}

// place finds out anew which networks can be used, and which blocks and endpoints fit those that changed.
func (v *view) place(changed ...string) {
	before := v.networks
	all := make([]metadata.Network, 0, len(v.defined))
	for _, name := range slices.Sorted(maps.Keys(v.defined)) {
		all = append(all, v.defined[name])
	}
	usable, _ := metadata.Compatible(all)
	v.networks = make(map[string]metadata.Network, len(usable))
	for _, n := range usable {
		v.networks[n.Name] = n
	}
	affected := map[string]bool{}
	for _, name := range changed {
		affected[name] = true
	}
	for name := range v.defined {
		_, was := before[name]
		_, is := v.networks[name]
		affected[name] = affected[name] || was != is
	}
	for name := range affected {
		v.gen[name]++
		delete(v.blocks, name)
		delete(v.endpoints, name)
		delete(v.gateways, name)
		delete(v.own, name)
		delete(v.mine, name)
		delete(v.counts, name)
		for _, b := range v.claimed[name] {
			v.placeBlock(b)
		}
		for _, e := range v.announced[name] {
			v.placeHostRoute(e)
		}
	}
}

// placeBlock puts a block in force if its network admits it.
func (v *view) placeBlock(b metadata.Block) {
	if n, ok := v.networks[b.Network]; !ok || n.Admits(b) != nil {
		return
	}
	put(v.blocks, b.Network, b.CIDR, b)
	v.count(b, 1)
	if b.Host == v.self {
		put(v.mine, b.Network, b.CIDR, b)
	}
	if b.Gateway.IsValid() {
		put(v.gateways, b.Network, b.Gateway, b.Host)
		if b.Host == v.self {
			v.own[b.Network] = append(v.own[b.Network], b.Gateway)
		}
	}
}

func (v *view) unplaceBlock(network string, p netip.Prefix) {
	old, ok := v.blocks[network][p]
	if !ok {
		return
	}
	if old.Gateway.IsValid() {
		delete(v.gateways[network], old.Gateway)
		v.own[network] = slices.DeleteFunc(v.own[network], func(a netip.Addr) bool { return a == old.Gateway })
	}
	delete(v.blocks[network], p)
	delete(v.mine[network], p)
	v.count(old, -1)
}

// count keeps how many blocks of each subnet are in force.
func (v *view) count(b metadata.Block, by int) {
	for _, p := range v.networks[b.Network].Subnets {
		if p.Contains(b.CIDR.Addr()) {
			put(v.counts, b.Network, p, v.counts[b.Network][p]+by)
		}
	}
}

// placeHostRoute puts an endpoint in force if its network is there. Whether it can be announced is for those
// who route to it.
func (v *view) placeHostRoute(e metadata.HostRoute) {
	if _, ok := v.networks[e.Network]; ok {
		put(v.endpoints, e.Network, e.Address, e)
	}
}

func put[K1, K2 comparable, V any](m map[K1]map[K2]V, k1 K1, k2 K2, value V) {
	if m[k1] == nil {
		m[k1] = map[K2]V{}
	}
	m[k1][k2] = value
}

// Revision returns the revision that the view has come to.
func (v *view) Revision() int64 {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.revision
}

// Wait returns when the view has come to a revision.
func (v *view) Wait(ctx context.Context, revision int64) error {
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

// snapshot returns all that is valid by itself, also what cannot be used together: a later change may end
// that without another word about it. Who does not watch asks for its Sane.
func (v *view) snapshot() *metadata.Snapshot {
	v.mu.RLock()
	defer v.mu.RUnlock()
	s := v.topologyLocked()
	for _, network := range slices.Sorted(maps.Keys(v.claimed)) {
		for _, p := range slices.SortedFunc(maps.Keys(v.claimed[network]), comparePrefix) {
			s.Blocks = append(s.Blocks, v.claimed[network][p])
		}
	}
	for _, network := range slices.Sorted(maps.Keys(v.announced)) {
		for _, a := range slices.SortedFunc(maps.Keys(v.announced[network]), netip.Addr.Compare) {
			s.HostRoutes = append(s.HostRoutes, v.announced[network][a])
		}
	}
	return s
}

// topology is a snapshot without blocks and endpoints, of which there are many.
func (v *view) topology() *metadata.Snapshot {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.topologyLocked()
}

func (v *view) topologyLocked() *metadata.Snapshot {
	s := &metadata.Snapshot{Revision: v.revision, Self: v.self,
		Hosts: v.hostsLocked(), Networks: []metadata.Network{}, Blocks: []metadata.Block{}}
	for _, name := range slices.Sorted(maps.Keys(v.defined)) {
		s.Networks = append(s.Networks, v.defined[name])
	}
	for _, at := range slices.Sorted(maps.Keys(v.problems)) {
		s.Problems = append(s.Problems, metadata.Problem{Key: at, What: v.problems[at]})
	}
	return s
}

func (v *view) hostsLocked() []metadata.Host {
	out := make([]metadata.Host, 0, len(v.hosts))
	for _, name := range slices.Sorted(maps.Keys(v.hosts)) {
		h := v.hosts[name]
		_, h.Live = v.live[name]
		out = append(out, h)
	}
	return out
}

func comparePrefix(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return a.Bits() - b.Bits()
}

// Network returns a network that can be used, and its generation.
func (v *view) Network(name string) (metadata.Network, uint64, bool) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	n, ok := v.networks[name]
	return n, v.gen[name], ok
}

// orphans returns the keys of this host's blocks and host routes whose network is not defined, by network.
func (v *view) orphans() map[string][]string {
	v.mu.RLock()
	defer v.mu.RUnlock()
	out := map[string][]string{}
	for network, blocks := range v.claimed {
		for p, b := range blocks {
			if _, ok := v.defined[network]; !ok && b.Host == v.self {
				out[network] = append(out[network], entry.BlockKey(network, p))
			}
		}
	}
	for network, routes := range v.announced {
		for a, r := range routes {
			if _, ok := v.defined[network]; !ok && r.Host == v.self {
				out[network] = append(out[network], entry.HostRouteKey(network, a))
			}
		}
	}
	return out
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

// HostCount counts the hosts.
func (v *view) HostCount() int {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return len(v.hosts)
}

func (v *view) hostList() []metadata.Host {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.hostsLocked()
}

// liveCount counts the hosts that are live, and all.
func (v *view) liveCount() (live, all int) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	for name := range v.live {
		if _, ok := v.hosts[name]; ok {
			live++
		}
	}
	return live, len(v.hosts)
}

// definitions are the networks that are valid by themselves, by name.
func (v *view) definitions() map[string]metadata.Network {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return maps.Clone(v.defined)
}

// networkProblem returns why a network is not used, as an error for who asks for it; nil when nothing is wrong with it.
func (v *view) networkProblem(name string) error {
	for _, p := range v.topology().Sane().Problems {
		if p.Key == metadata.KindNetwork+"/"+name {
			return metadata.Errorf(metadata.CodeConflict, "%s; %s", p, p.Remedy())
		}
	}
	return nil
}

// Unknown returns the error for a network that is not in force.
func (v *view) Unknown(name string) error {
	if err := v.networkProblem(name); err != nil {
		return err
	}
	e := metadata.Errorf(metadata.CodeNotFound, "there is no network %s", name)
	if all := v.networkNames(); len(all) > 0 {
		e.Details = "known: " + strings.Join(all, ", ")
	} else {
		e.Details = "no network is defined yet; make one with `lariat network create " + name +
			" --subnet 10.42.0.0/16`, or name a subnet in the CNI configuration"
	}
	return e
}

// Block returns a claimed block.
func (v *view) Block(network string, p netip.Prefix) (metadata.Block, bool) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	b, ok := v.blocks[network][p]
	return b, ok
}

// OwnBlocks lists this host's blocks of a network, sorted.
func (v *view) OwnBlocks(network string) []metadata.Block {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return slices.SortedFunc(maps.Values(v.mine[network]),
		func(a, b metadata.Block) int { return comparePrefix(a.CIDR, b.CIDR) })
}

// BlockCount counts the blocks of a subnet, and those of them that are this host's.
func (v *view) BlockCount(network string, subnet netip.Prefix) (all, own int) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	for p := range v.mine[network] {
		if subnet.Contains(p.Addr()) {
			own++
		}
	}
	return v.counts[network][subnet], own
}

// Blocks lists a network's blocks that match, sorted. It looks at all of them.
func (v *view) Blocks(network string, match func(metadata.Block) bool) []metadata.Block {
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

// Gateway is this host's own address on a network in the family of subnet.
func (v *view) Gateway(network string, subnet netip.Prefix) netip.Addr {
	v.mu.RLock()
	defer v.mu.RUnlock()
	for _, a := range v.own[network] {
		if subnet.Contains(a) {
			return a
		}
	}
	return netip.Addr{}
}

// OwnHostRoutes lists the addresses that this host announces one by one.
func (v *view) OwnHostRoutes(network string) []netip.Addr {
	v.mu.RLock()
	defer v.mu.RUnlock()
	var out []netip.Addr
	for a, e := range v.endpoints[network] {
		if e.Host == v.self {
			out = append(out, a)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

// Holder says who has an address although no table does; empty: nobody.
func (v *view) Holder(network string, a netip.Addr) string {
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

// Announceable returns why an address outside of its network's subnets cannot be announced, or nil.
func (v *view) Announceable(a netip.Addr) error {
	s := v.topology().Sane()
	return metadata.Announceable(a, s.Networks, metadata.Links(s.Hosts))
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

// upTo returns the revision that a watcher has come to who has seen all events before an index; 0 when there are
// further ones.
func (v *view) upTo(index uint64) int64 {
	v.mu.RLock()
	defer v.mu.RUnlock()
	if index != v.first+uint64(len(v.events)) {
		return 0
	}
	return v.revision
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
