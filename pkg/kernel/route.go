package kernel

import (
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/delta"
)

type (
	nexthopEntry = delta.Entry[uint32, delta.Nexthop]
	routeEntry   = delta.Entry[delta.RouteKey, delta.Route]
)

// collisions resolves refusals with EEXIST. An object of that key exists, and Observe did not see it.
// Either the object is Lariat's, and is replaced. A faster process or an earlier Apply created it.
// Or the object is foreign, and remains.
type collisions struct {
	a      *application
	seen   *delta.State
	failed error
}

func (c *collisions) observe() *delta.State {
	if c.seen == nil {
		o := observation{n: c.a.n, want: &delta.State{}, names: map[uint32]string{}, lookup: c.a.n.name, s: delta.NewState()}
		c.failed = errors.Join(o.nexthops(), o.routes(unix.AF_INET), o.routes(unix.AF_INET6))
		c.seen = o.s
	}
	return c.seen
}

func (a *application) nexthops() {
	var again []nexthopEntry
	entries := a.d.Nexthops.Set
	refuse(a, entries, a.setNexthop, nexthopName, func(e *nexthopEntry) { again = append(again, *e) })
	if len(again) == 0 {
		return
	}
	c := collisions{a: a}
	ours := again[:0]
	for _, e := range again {
		if have, ok := c.observe().Nexthops[e.Key]; ok {
			if e.Replaces = true; have != e.Value {
				ours = append(ours, e)
			}
			continue
		}
		a.fail("set %s: the id is taken by a nexthop that is not Lariat's (see: ip nexthop show id %d): %w", nexthopName(&e),
			e.Key, errors.Join(unix.EEXIST, c.failed))
	}
	send(a, "set", ours, a.setNexthop, nexthopName)
}

func (a *application) routes() {
	var again []routeEntry
	refuse(a, a.d.Routes.Set, a.setRoute, routeName, func(e *routeEntry) { again = append(again, *e) })
	if len(again) == 0 {
		return
	}
	c := collisions{a: a}
	ours := again[:0]
	for _, e := range again {
		if have, ok := c.observe().Routes[e.Key]; ok {
			if e.Replaces = true; have != e.Value {
				ours = append(ours, e)
			}
			continue
		}
		a.fail("set %s: the destination has a route that is not the overlay's and is left alone (see: ip route show %s): %w",
			routeName(&e), e.Key.Dst, errors.Join(unix.EEXIST, c.failed))
	}
	send(a, "set", ours, a.setRoute, routeName)
}

// refuse sends entries like send, and calls exists for every object that already exists.
func refuse[K comparable, V any](a *application, entries []delta.Entry[K, V],
	build func(*message, *delta.Entry[K, V]) bool,
	name func(*delta.Entry[K, V]) string, exists func(*delta.Entry[K, V])) {
	if len(entries) == 0 {
		return
	}
	refused := 0
	err := a.n.rt.run(len(entries), func(m *message, i int) bool { return build(m, &entries[i]) }, func(i int, err error) {
		if errors.Is(err, unix.EEXIST) {
			exists(&entries[i])
		} else if refused++; refused <= maxErrors {
			a.fail("set %s: %w", name(&entries[i]), named(err, "this kernel lacks nexthop objects (Linux 5.3)", unix.EOPNOTSUPP))
		}
	})
	if err != nil {
		a.fail("set %s and what follows: %w", name(&entries[0]), err)
	}
	if refused > maxErrors {
		a.fail("and %d more like %s", refused-maxErrors, name(&entries[0]))
	}
}

// createOrReplace returns the flags of a request. replaces says that the object is known to exist.
// Without it the request fails for an existing object, because that object may be foreign.
func createOrReplace(replaces bool) uint16 {
	if replaces {
		return unix.NLM_F_CREATE | unix.NLM_F_REPLACE
	}
	return unix.NLM_F_CREATE | unix.NLM_F_EXCL
}

func (a *application) setNexthop(m *message, e *nexthopEntry) bool {
	index := a.index(e.Value.Dev)
	if index == 0 {
		return false
	}
	m.begin(unix.RTM_NEWNEXTHOP, createOrReplace(e.Replaces))
	m.raw(family(e.Value.Via.Is6()), 0, delta.Protocol, 0)
	var flags uint32
	if e.Value.Onlink {
		flags = unix.RTNH_F_ONLINK
	}
	m.rawU32(flags)
	m.u32(nhaID, e.Key)
	if e.Value.Via.IsValid() {
		m.addr(nhaGateway, e.Value.Via)
	}
	m.u32(nhaOIF, index)
	return true
}

func (a *application) removeNexthop(m *message, e *nexthopEntry) bool {
	m.begin(unix.RTM_DELNEXTHOP, 0)
	m.raw(make([]byte, sizeofNhMsg)...)
	m.u32(nhaID, e.Key)
	return true
}

func (a *application) setRoute(m *message, e *routeEntry) bool {
	return a.route(m, unix.RTM_NEWROUTE, createOrReplace(e.Replaces), e.Key, e.Value)
}

// removeRoute sends all known properties of the route.
// Another route to the same destination may have appeared since, and must remain.
// An example is the route of a container that moved to this host.
func (a *application) removeRoute(m *message, e *routeEntry) bool {
	return a.route(m, unix.RTM_DELROUTE, 0, e.Key, e.Value)
}

func routeType(word string) (kind byte, known bool) {
	if word == "" {
		return unix.RTN_UNICAST, true
	}
	for k, w := range routeTypes {
		if w == word {
			return k, true
		}
	}
	return unix.RTN_UNICAST, false
}

// metric6 is the metric of an IPv6 route that was created without one (IP6_RT_PRIO_USER).
const metric6 = 1024

func (a *application) route(m *message, typ, flags uint16, k delta.RouteKey, r delta.Route) bool {
	dst, metric := k.Dst, k.Metric
	var index uint32
	if r.Dev != "" {
		if index = a.index(r.Dev); index == 0 {
			return false
		}
	}
	v6 := dst.Addr().Is6()
	if v6 && metric == 0 {
		metric = metric6 // a removal without a metric would match any metric
	}
	m.begin(typ, flags)
	kind, known := routeType(r.Type)
	scope := byte(unix.RT_SCOPE_UNIVERSE)
	switch {
	case typ == unix.RTM_DELROUTE:
		scope = unix.RT_SCOPE_NOWHERE // any
		if !known {
			kind = 0 // any
		}
	case !v6 && index != 0 && !r.Via.IsValid():
		scope = unix.RT_SCOPE_LINK
	}
	m.raw(family(v6), byte(dst.Bits()), 0, 0, unix.RT_TABLE_MAIN, delta.Protocol, scope, kind)
	var rtFlags uint32
	if r.Onlink {
		rtFlags = unix.RTNH_F_ONLINK
	}
	m.rawU32(rtFlags)
	m.addr(unix.RTA_DST, dst.Addr())
	if metric != 0 {
		m.u32(unix.RTA_PRIORITY, metric)
	}
	if r.NH != 0 {
		m.u32(rtaNHID, r.NH)
	}
	if r.Via.IsValid() {
		if r.Via.Is6() == v6 {
			m.addr(unix.RTA_GATEWAY, r.Via)
		} else {
			at := len(m.b) // an IPv4 route by an IPv6 gateway: struct rtvia
			m.attrHead(unix.RTA_VIA, 18)
			m.b = binary.NativeEndian.AppendUint16(m.b, unix.AF_INET6)
			v := r.Via.As16()
			m.b = append(m.b, v[:]...)
			m.end(at)
			m.pad()
		}
	}
	if index != 0 {
		m.u32(unix.RTA_OIF, index)
	}
	if r.Src.IsValid() && typ == unix.RTM_NEWROUTE {
		m.addr(unix.RTA_PREFSRC, r.Src)
	}
	if r.MTU != 0 && typ == unix.RTM_NEWROUTE {
		metrics := m.nest(unix.RTA_METRICS)
		m.u32(unix.RTAX_MTU, uint32(r.MTU))
		m.end(metrics)
	}
	return true
}
