// Package fake is a kernel in memory: it behaves like the real one as far as Lariat can tell, prints its
// whole world, and fails on request.
//
// Each primitive change is a numbered step: an object added, replaced or removed, one part of a port, one
// nftables transaction. A test makes every single one of them fail in turn, and looks at what is left:
//
//	for n := 1; ; n++ {
//		k := fake.New()
//		k.FailAt(n, unix.ENOMEM)
//		err := k.AddEndpoint(ctx, "/run/netns/c", port)
//		if !k.Failed() {
//			break // there is no step n
//		}
//		… err is told, and k.String() is as it was before …
//	}
package fake

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/kernel"
)

// ErrKilled is what every call gives from the step of KillAt on. The process is dead: nothing is rolled back.
var ErrKilled = errors.New("killed")

var _ kernel.Kernel = (*Kernel)(nil)

// Kernel is the fake. Its methods may be called from several goroutines.
type Kernel struct {
	mu      sync.Mutex
	world   *delta.State      // the host's, without ports
	devices map[string]string // of others: name to kind
	ports   map[string]*port  // by the name of the host's end
	netns   map[string]map[string]bool

	steps  []string
	failAt int
	err    error
	killAt int
	failed bool
}

// port is a veth pair and what was done to its ends so far, as an operator would have typed it.
type port struct {
	p            delta.Endpoint
	netns        string
	alias        string
	host, inside []string
}

// New returns the kernel of a host with nothing but a loopback device.
func New() *Kernel {
	return &Kernel{world: delta.NewState(), devices: map[string]string{"lo": "loopback"}, ports: map[string]*port{},
		netns: map[string]map[string]bool{}}
}

// FailAt makes step n fail with err instead of doing anything; the others work. Steps are counted from 1,
// from this call on. 0 makes none fail.
func (k *Kernel) FailAt(n int, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.steps, k.failAt, k.err, k.killAt, k.failed = nil, n, err, 0, false
}

// KillAt ends the process at step n, which is not carried out: it and all that follow give ErrKilled until
// the next call of KillAt or FailAt, which stands for a new process. Steps are counted from 1, from this call
// on.
func (k *Kernel) KillAt(n int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.steps, k.failAt, k.err, k.killAt, k.failed = nil, 0, nil, n, false
}

// Failed says whether the step of FailAt or KillAt was reached.
func (k *Kernel) Failed() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.failed
}

// Steps lists what was done or tried since New, FailAt or KillAt.
func (k *Kernel) Steps() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.steps)
}

// step counts a change and says whether it may happen.
func (k *Kernel) step(what string) error {
	if k.killAt > 0 && len(k.steps)+1 >= k.killAt {
		k.failed = true
		return ErrKilled
	}
	k.steps = append(k.steps, what)
	if len(k.steps) == k.failAt {
		k.failed = true
		return k.err
	}
	return nil
}

// Meddle changes the host's world behind Lariat's back, as an administrator may. Nothing is checked, and no
// step is counted.
func (k *Kernel) Meddle(f func(world *delta.State)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f(k.world)
}

// AddDevice adds a device of others to the host, such as eth0.
func (k *Kernel) AddDevice(name, kind string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.devices[name] = kind
}

// AddInterface adds an interface of others to a container.
func (k *Kernel) AddInterface(netns, name string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.netns[netns] == nil {
		k.netns[netns] = map[string]bool{}
	}
	k.netns[netns][name] = true
}

// RemoveNetns removes a container's namespace: the ports in it go too, both ends.
func (k *Kernel) RemoveNetns(path string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.netns, path)
	maps.DeleteFunc(k.ports, func(_ string, p *port) bool { return p.netns == path })
}

// String prints the host's world, and then for each port what stands at either end.
func (k *Kernel) String() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	var b strings.Builder
	b.WriteString(k.world.String())
	for _, name := range slices.Sorted(maps.Keys(k.ports)) {
		p := k.ports[name]
		for _, l := range p.host {
			b.WriteString(l + "\n")
		}
		for _, l := range p.inside {
			b.WriteString("in " + p.netns + ": " + l + "\n")
		}
	}
	return b.String()
}

// Close implements kernel.Kernel.
func (k *Kernel) Close() error { return nil }

// Observe implements kernel.Kernel.
func (k *Kernel) Observe(ctx context.Context, want *delta.State) (*delta.State, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.dead() {
		return nil, ErrKilled
	}
	if want == nil {
		want = &delta.State{}
	}
	s := &delta.State{
		Links: maps.Clone(k.world.Links), Addrs: maps.Clone(k.world.Addrs), Neighs: maps.Clone(k.world.Neighs),
		FDB:      maps.Clone(k.world.FDB),
		Nexthops: maps.Clone(k.world.Nexthops), Routes: maps.Clone(k.world.Routes), Sysctls: maps.Clone(k.world.Sysctls),
		Sets: maps.Clone(k.world.Sets), Chains: maps.Clone(k.world.Chains),
	}
	maps.DeleteFunc(s.Sysctls, func(key, _ string) bool { _, wanted := want.Sysctls[key]; return !wanted })
	maps.DeleteFunc(s.Addrs, func(a delta.Addr, _ struct{}) bool {
		_, owned := s.Links[a.Dev]
		_, wanted := want.Addrs[a]
		return !owned && !wanted
	})
	return s, ctx.Err()
}

func (k *Kernel) dead() bool { return k.killAt > 0 && k.failed }

// Apply implements kernel.Kernel, in the order of the real one.
func (k *Kernel) Apply(ctx context.Context, d *delta.Difference) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.dead() {
		return ErrKilled
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	a := &application{k: k}
	w := k.world
	// One step for each line of the difference that has an object of its own.
	made := map[string]bool{}
	for _, e := range d.Links.Set {
		made[e.Key] = true
	}
	a.grow(d)
	var early, late delta.Changes[string, string] // those of a device have to wait for it
	for _, e := range d.Sysctls.Set {
		if made[delta.SysctlDevice(e.Key)] {
			late.Set = append(late.Set, e)
		} else {
			early.Set = append(early.Set, e)
		}
	}
	apply(a, &early, w.Sysctls, delta.SysctlString, nil)
	a.links(d)
	apply(a, &late, w.Sysctls, delta.SysctlString, func(key, _ string) string { return delta.SysctlDevice(key) })
	apply(a, &d.Addrs, w.Addrs, func(x delta.Addr, _ struct{}) string { return x.String() },
		func(x delta.Addr, _ struct{}) string { return x.Dev })
	apply(a, &d.Neighs, w.Neighs, delta.NeighString, func(x delta.Neigh, _ delta.MAC) string { return x.Dev })
	apply(a, &d.FDB, w.FDB, func(x delta.FDB, _ struct{}) string { return x.String() },
		func(x delta.FDB, _ struct{}) string { return x.Dev })
	apply(a, &d.Nexthops, w.Nexthops, delta.NexthopString, func(_ uint32, x delta.Nexthop) string { return x.Dev })
	a.routes(d)
	remove(a, &d.Routes, w.Routes, delta.RouteString)
	remove(a, &d.Nexthops, w.Nexthops, delta.NexthopString)
	for _, e := range d.Nexthops.Remove {
		k.dropNexthop(e.Key)
	}
	remove(a, &d.FDB, w.FDB, func(x delta.FDB, _ struct{}) string { return x.String() })
	remove(a, &d.Neighs, w.Neighs, delta.NeighString)
	remove(a, &d.Addrs, w.Addrs, func(x delta.Addr, _ struct{}) string { return x.String() })
	for _, e := range d.Links.Remove {
		a.removeLink(e.Key)
	}
	a.shrink(d)
	return errors.Join(a.errs...)
}

type application struct {
	k      *Kernel
	bare   bool // the rules could not be made
	errs   []error
	killed bool
}

// try counts a step; a refusal is noted, and the rest goes on unless it was a kill.
func (a *application) try(what string) bool {
	if a.killed {
		return false
	}
	err := a.k.step(what)
	if err == nil {
		return true
	}
	a.killed = errors.Is(err, ErrKilled)
	a.errs = append(a.errs, fmt.Errorf("%s: %w", what, err))
	return false
}

func (a *application) refuse(what string, err error) {
	if !a.killed {
		a.errs = append(a.errs, fmt.Errorf("%s: %w", what, err))
	}
}

func (k *Kernel) exists(dev string) bool {
	_, ours := k.world.Links[dev]
	_, theirs := k.devices[dev]
	return ours || theirs || k.ports[dev] != nil
}

func apply[K comparable, V any](a *application, c *delta.Changes[K, V], to map[K]V, line func(K, V) string,
	dev func(K, V) string) {
	for _, e := range c.Set {
		what := "set " + line(e.Key, e.Value)
		if dev != nil && !a.k.exists(dev(e.Key, e.Value)) {
			a.refuse(what, unix.ENODEV)
		} else if a.try(what) {
			to[e.Key] = e.Value
		}
	}
}

func remove[K comparable, V any](a *application, c *delta.Changes[K, V], from map[K]V, line func(K, V) string) {
	for _, e := range c.Remove {
		if _, ok := from[e.Key]; ok && a.try("remove "+line(e.Key, e.Value)) {
			delete(from, e.Key)
		}
	}
}

func (a *application) links(d *delta.Difference) {
	w := a.k.world
	for _, e := range d.Links.Set {
		what := "set " + delta.LinkString(e.Key, e.Value)
		old, ours := w.Links[e.Key]
		if kind, theirs := a.k.devices[e.Key]; theirs {
			a.refuse(what, fmt.Errorf("a device of that name is there, of kind %q: %w", kind, unix.EEXIST))
			continue
		}
		if a.bare && e.Value.Kind == delta.KindXFRM {
			a.refuse(what, errors.New("without the rules that keep packets from leaving in clear it is not made"))
			continue
		}
		if ours && e.Value.Remake(old) && !a.removeLink(e.Key) {
			continue
		}
		if !a.try(what) {
			continue
		}
		if ours && !e.Value.Remake(old) && old.MAC != e.Value.MAC {
			maps.DeleteFunc(w.Neighs, func(n delta.Neigh, _ delta.MAC) bool { return n.Dev == e.Key })
		}
		w.Links[e.Key] = e.Value
	}
}

// removeLink removes a device and all that the kernel flushes with it.
func (a *application) removeLink(name string) bool {
	w := a.k.world
	l, ok := w.Links[name]
	if !ok {
		return true
	}
	if !a.try("remove " + delta.LinkString(name, l)) {
		return false
	}
	a.k.flush(name)
	return true
}

// RemoveLink deletes a device of Lariat's by hand, with all that stands on it.
func (k *Kernel) RemoveLink(name string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.flush(name)
}

func (k *Kernel) flush(dev string) {
	w := k.world
	delete(w.Links, dev)
	sources := map[netip.Addr]bool{}
	for a := range w.Addrs {
		if a.Dev == dev {
			sources[a.Prefix.Addr()] = true
			delete(w.Addrs, a)
		}
	}
	maps.DeleteFunc(w.Neighs, func(n delta.Neigh, _ delta.MAC) bool { return n.Dev == dev })
	maps.DeleteFunc(w.FDB, func(f delta.FDB, _ struct{}) bool { return f.Dev == dev })
	for id, n := range w.Nexthops {
		if n.Dev == dev {
			delete(w.Nexthops, id)
			k.dropNexthop(id)
		}
	}
	for dst, r := range w.Routes {
		switch {
		case r.Dev == dev || (sources[r.Src] && r.Src.Is4()):
			delete(w.Routes, dst)
		case sources[r.Src]: // IPv6 routes stay and lose their source
			r.Src = netip.Addr{}
			w.Routes[dst] = r
		}
	}
	maps.DeleteFunc(w.Sysctls, func(key, _ string) bool { return delta.SysctlDevice(key) == dev })
}

// dropNexthop takes the routes of a nexthop that is gone with it.
func (k *Kernel) dropNexthop(id uint32) {
	if _, still := k.world.Nexthops[id]; !still {
		maps.DeleteFunc(k.world.Routes, func(_ delta.RouteKey, r delta.Route) bool { return r.NH == id })
	}
}

func (a *application) routes(d *delta.Difference) {
	w := a.k.world
	for _, e := range d.Routes.Set {
		what := "set " + delta.RouteString(e.Key, e.Value)
		_, held := w.Nexthops[e.Value.NH]
		switch {
		case e.Value.NH != 0 && !held, e.Value.Dev != "" && !a.k.exists(e.Value.Dev):
			a.refuse(what, unix.ENODEV)
		case e.Value.Src.IsValid() && !a.k.local(e.Value.Src):
			a.refuse(what, unix.EINVAL)
		case a.try(what):
			w.Routes[e.Key] = e.Value
		}
	}
}

func (k *Kernel) local(ip netip.Addr) bool {
	for a := range k.world.Addrs {
		if a.Prefix.Addr() == ip {
			return true
		}
	}
	return false
}

// grow adds what nftables is to have beside what it has. Without it no encrypted device is made.
func (a *application) grow(d *delta.Difference) {
	if len(d.Sets.Set)+len(d.Chains.Set) == 0 {
		return
	}
	if !a.try("nftables transaction") {
		a.bare = true
		return
	}
	w := a.k.world
	for _, e := range d.Sets.Set {
		if have, ok := w.Sets[e.Key]; ok && have.SameType(e.Value) {
			e.Value.Elements = delta.Disjoint(slices.Concat(e.Value.Elements, have.Elements))
		}
		w.Sets[e.Key] = e.Value
	}
	for _, e := range d.Chains.Set {
		if have, ok := w.Chains[e.Key]; ok {
			e.Value = delta.MergeForTransition(e.Value, have)
		}
		w.Chains[e.Key] = e.Value
	}
}

// shrink takes away from nftables what goes.
func (a *application) shrink(d *delta.Difference) {
	w := a.k.world
	less := len(d.Sets.Remove)+len(d.Chains.Remove) > 0
	for _, e := range d.Sets.Set {
		less = less || !w.Sets[e.Key].Equal(e.Value)
	}
	for _, e := range d.Chains.Set {
		less = less || !w.Chains[e.Key].Equal(e.Value)
	}
	if !less || a.bare || !a.try("nftables transaction") {
		return
	}
	for _, e := range d.Sets.Remove {
		delete(w.Sets, e.Key)
	}
	for _, e := range d.Chains.Remove {
		delete(w.Chains, e.Key)
	}
	for _, e := range d.Sets.Set {
		w.Sets[e.Key] = e.Value
	}
	for _, e := range d.Chains.Set {
		w.Chains[e.Key] = e.Value
	}
}
