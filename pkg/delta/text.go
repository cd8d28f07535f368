package delta

import (
	"bytes"
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/lariat-net/lariat/pkg/printable"
)

// These functions append lines to one buffer, without fmt.
// A difference of 10 000 peers has 40 000 lines.

func appendSysctl(b []byte, k, v string) []byte {
	b = append(append(b, "sysctl "...), k...)
	return append(append(b, '='), v...)
}

func appendLink(b []byte, name string, l Link) []byte {
	b = append(append(b, "link  "...), name...)
	b = append(append(b, " type "...), l.Kind...)
	if l.Kind == KindXFRM {
		b = strconv.AppendUint(append(b, " if_id 0x"...), uint64(l.IfID), 16)
		b = strconv.AppendUint(append(b, " group "...), uint64(l.Group), 10)
		if l.Other != "" {
			b = append(append(b, ' '), l.Other...)
		}
		b = strconv.AppendInt(append(b, " mtu "...), int64(l.MTU), 10)
	} else {
		b = appendVXLAN(b, l)
	}
	if l.Alias != "" {
		b = append(append(b, " alias "...), l.Alias...)
	}
	if l.NoIPv6 {
		b = append(b, " noipv6"...)
	}
	if l.AcceptRA != 0 {
		b = strconv.AppendInt(append(b, " accept_ra "...), int64(l.AcceptRA), 10)
	}
	if l.Down {
		b = append(b, " down"...)
	}
	return b
}

func appendVXLAN(b []byte, l Link) []byte {
	b = strconv.AppendUint(append(b, " id "...), uint64(l.VNI), 10)
	if l.Local.IsValid() {
		b = l.Local.AppendTo(append(b, " local "...))
	}
	b = strconv.AppendUint(append(b, " dstport "...), uint64(l.Port), 10)
	if l.Other == "" {
		b = append(b, " nolearning"...)
	} else {
		b = append(append(b, ' '), l.Other...)
	}
	b = strconv.AppendInt(append(b, " mtu "...), int64(l.MTU), 10)
	return l.MAC.Append(append(b, " address "...))
}

func appendAddr(b []byte, a Addr) []byte {
	b = a.Prefix.AppendTo(append(b, "addr  "...))
	return append(append(b, " dev "...), a.Dev...)
}

func appendNeigh(b []byte, n Neigh, m MAC) []byte {
	b = n.Addr.AppendTo(append(b, "neigh "...))
	b = append(append(b, " dev "...), n.Dev...)
	b = m.Append(append(b, " lladdr "...))
	return append(b, " permanent"...)
}

func appendFDB(b []byte, f FDB) []byte {
	b = f.MAC.Append(append(b, "fdb   "...))
	b = append(append(b, " dev "...), f.Dev...)
	return f.Dst.AppendTo(append(b, " dst "...))
}

func appendNexthop(b []byte, id uint32, n Nexthop) []byte {
	b = strconv.AppendUint(append(b, "nexthop id "...), uint64(id), 10)
	b = appendVia(b, n.Via, n.Dev, n.Onlink)
	return append(b, " proto 76"...)
}

func appendVia(b []byte, via netip.Addr, dev string, onlink bool) []byte {
	if via.IsValid() {
		b = via.AppendTo(append(b, " via "...))
	}
	if dev != "" {
		b = append(append(b, " dev "...), dev...)
	}
	if onlink {
		b = append(b, " onlink"...)
	}
	return b
}

func appendRoute(b []byte, k RouteKey, r Route) []byte {
	b = append(b, "route "...)
	if r.Type != "" {
		b = append(append(b, r.Type...), ' ')
	}
	b = k.Dst.AppendTo(b)
	if r.NH != 0 {
		b = strconv.AppendUint(append(b, " nhid "...), uint64(r.NH), 10)
	}
	b = appendVia(b, r.Via, r.Dev, r.Onlink)
	if r.Src.IsValid() {
		b = r.Src.AppendTo(append(b, " src "...))
	}
	if r.MTU != 0 {
		b = strconv.AppendInt(append(b, " mtu "...), int64(r.MTU), 10)
	}
	b = append(b, " proto 76"...)
	if k.Metric != 0 {
		b = strconv.AppendUint(append(b, " metric "...), uint64(k.Metric), 10)
	}
	return b
}

func appendElements(b []byte, elements []netip.Prefix) []byte {
	b = append(b, "{ "...)
	for i, e := range elements {
		if i > 0 {
			b = append(b, ", "...)
		}
		if e.IsSingleIP() {
			b = e.Addr().AppendTo(b)
		} else {
			b = e.AppendTo(b)
		}
	}
	return append(b, " }"...)
}

func appendSet(b []byte, name string, s Set) []byte {
	b = append(append(b, "set   inet "+Table+" "...), name...)
	if s.Ports != nil {
		b = append(b, " { type inet_service; elements = {"...)
		for i, p := range s.Ports {
			if i > 0 {
				b = append(b, ',')
			}
			b = strconv.AppendUint(append(b, ' '), uint64(p), 10)
		}
		return append(b, " }; }"...)
	}
	b = append(b, " { type ipv4_addr;"...)
	if s.V6 {
		b[len(b)-len("4_addr;")] = '6'
	}
	if s.Interval {
		b = append(b, " flags interval;"...)
	}
	if s.Other != "" {
		b = append(append(append(b, " <"...), s.Other...), ">;"...)
	}
	if len(s.Elements) > 0 {
		b = append(appendElements(append(b, " elements = "...), s.Elements), ';')
	}
	return append(b, " }"...)
}

func appendChainBase(b []byte, name string, c Chain) []byte {
	b = append(append(b, "chain inet "+Table+" "...), name...)
	if c.Hook == "" {
		return append(b, " { }"...)
	}
	b = append(append(b, " { type "...), c.Type...)
	b = append(append(b, " hook "...), c.Hook...)
	b = strconv.AppendInt(append(b, " priority "...), int64(c.Priority), 10)
	return append(b, "; policy accept; }"...)
}

func appendRule(b []byte, chain string, r Rule) []byte {
	b = append(append(b, "rule  inet "+Table+" "...), chain...)
	return append(append(b, ' '), r.String()...)
}

// endLine ends the line that begins at start.
// It replaces unprintable bytes, because names of networks and devices may hold any byte.
func endLine(b []byte, start int) []byte {
	if slices.ContainsFunc(b[start:], func(c byte) bool { return c < ' ' || c > '~' }) {
		b = append(b[:start], printable.Line(string(b[start:]))...)
	}
	return append(b, '\n')
}

func compareAddr(a, b Addr) int {
	return cmp.Or(cmp.Compare(a.Dev, b.Dev), comparePrefix(a.Prefix, b.Prefix))
}

func compareNeigh(a, b Neigh) int {
	if c := cmp.Compare(a.Dev, b.Dev); c != 0 {
		return c
	}
	return a.Addr.Compare(b.Addr)
}

func compareFDB(a, b FDB) int {
	if c := cmp.Compare(a.Dev, b.Dev); c != 0 {
		return c
	}
	if c := bytes.Compare(a.MAC[:], b.MAC[:]); c != 0 {
		return c
	}
	return a.Dst.Compare(b.Dst)
}

func comparePrefix(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return cmp.Compare(a.Bits(), b.Bits())
}

func compareRoute(a, b RouteKey) int {
	return cmp.Or(comparePrefix(a.Dst, b.Dst), cmp.Compare(a.Metric, b.Metric))
}

func sortedKeys[K comparable, V any](m map[K]V, compare func(a, b K) int) []K {
	keys := make([]K, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, compare)
	return keys
}

// String prints one object per line, as an operator would type it after ip, bridge, sysctl or
// "nft add". The kinds have the order in which Apply makes them.
// Each kind is sorted, but rules keep their order. Problems come last, as comments.
func (s *State) String() string {
	var b []byte
	start := 0
	line := func() {
		b = endLine(b, start)
		start = len(b)
	}
	for _, k := range sortedKeys(s.Sysctls, cmp.Compare) {
		b = appendSysctl(b, k, s.Sysctls[k])
		line()
	}
	for _, k := range sortedKeys(s.Links, cmp.Compare) {
		b = appendLink(b, k, s.Links[k])
		line()
	}
	for _, k := range sortedKeys(s.Addrs, compareAddr) {
		b = appendAddr(b, k)
		line()
	}
	for _, k := range sortedKeys(s.Neighs, compareNeigh) {
		b = appendNeigh(b, k, s.Neighs[k])
		line()
	}
	for _, k := range sortedKeys(s.FDB, compareFDB) {
		b = appendFDB(b, k)
		line()
	}
	for _, k := range sortedKeys(s.Nexthops, cmp.Compare) {
		b = appendNexthop(b, k, s.Nexthops[k])
		line()
	}
	for _, k := range sortedKeys(s.Routes, compareRoute) {
		b = appendRoute(b, k, s.Routes[k])
		line()
	}
	for _, k := range sortedKeys(s.Sets, cmp.Compare) {
		b = appendSet(b, k, s.Sets[k])
		line()
	}
	for _, k := range sortedKeys(s.Chains, cmp.Compare) {
		b = appendChainBase(b, k, s.Chains[k])
		line()
		for _, r := range s.Chains[k].Rules {
			b = appendRule(b, k, r)
			line()
		}
	}
	for _, p := range s.Problems {
		b = append(append(b, "# problem: "...), strings.ReplaceAll(p, "\n", "; ")...)
		line()
	}
	return string(b)
}

// The names of single objects, for errors.

// SysctlString returns the object's line in State.String.
func SysctlString(key, value string) string { return string(appendSysctl(nil, key, value)) }

// LinkString returns the object's line in State.String.
func LinkString(name string, l Link) string { return string(appendLink(nil, name, l)) }

// String returns the object's line in State.String.
func (a Addr) String() string { return string(appendAddr(nil, a)) }

// NeighString returns the object's line in State.String.
func NeighString(n Neigh, m MAC) string { return string(appendNeigh(nil, n, m)) }

// String returns the object's line in State.String.
func (f FDB) String() string { return string(appendFDB(nil, f)) }

// NexthopString returns the object's line in State.String.
func NexthopString(id uint32, n Nexthop) string { return string(appendNexthop(nil, id, n)) }

// RouteString returns the object's line in State.String.
func RouteString(k RouteKey, r Route) string { return string(appendRoute(nil, k, r)) }
