package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/delta"
)

// interruptedTries limits the reads of an inconsistent list. Observe then uses the last read.
// Each change that follows from this read is harmless, and the next pass sees the rest.
const interruptedTries = 4

// Observe implements Kernel.
func (n *Netns) Observe(ctx context.Context, want *delta.State) (*delta.State, error) {
	if want == nil {
		want = &delta.State{}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	var s *delta.State
	var err error
	for range interruptedTries {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		o := observation{n: n, want: want, names: map[uint32]string{}, lookup: n.name, s: sized(want)}
		err = o.run()
		s = o.s
		if !errors.Is(err, errInterrupted) {
			break
		}
	}
	if err != nil && !errors.Is(err, errInterrupted) {
		return nil, fmt.Errorf("observe the kernel: %w", err)
	}
	if err := n.observeNft(s, want); err != nil {
		return nil, fmt.Errorf("observe the kernel: %w", err)
	}
	if err := n.observeSysctls(s, want); err != nil {
		return nil, fmt.Errorf("observe the kernel: %w", err)
	}
	return s, nil
}

// sized returns an empty state with the capacity of want.
// No map grows when the kernel holds the desired state.
func sized(want *delta.State) *delta.State {
	return &delta.State{
		Links:    make(map[string]delta.Link, len(want.Links)),
		Addrs:    make(map[delta.Addr]struct{}, len(want.Addrs)),
		Neighs:   make(map[delta.Neigh]delta.MAC, len(want.Neighs)),
		FDB:      make(map[delta.FDB]struct{}, len(want.FDB)),
		Nexthops: make(map[uint32]delta.Nexthop, len(want.Nexthops)),
		Routes:   make(map[delta.RouteKey]delta.Route, len(want.Routes)),
		Sysctls:  make(map[string]string, len(want.Sysctls)),
		Sets:     map[string]delta.Set{},
		Chains:   map[string]delta.Chain{},
	}
}

type observation struct {
	n     *Netns
	want  *delta.State
	s     *delta.State
	names map[uint32]string // known names of interface indexes; lookup finds the others
	owned []uint32          // indexes of owned devices

	lookup func(index uint32) string

	interrupted bool

	ports map[string]map[netip.Prefix]delta.Route // routes to containers, by device; nil: not requested
}

func (o *observation) run() error {
	if err := o.links(); err != nil {
		return err
	}
	if err := o.addrs(); err != nil {
		return err
	}
	for _, index := range o.owned {
		if o.s.Links[o.name(index)].Kind != delta.KindVXLAN {
			continue // other kinds have no neighbours and no forwarding entries
		}
		if err := o.neighs(index); err != nil {
			return err
		}
		if err := o.fdb(index); err != nil {
			return err
		}
	}
	if err := o.nexthops(); err != nil {
		return err
	}
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		if err := o.routes(family); err != nil {
			return err
		}
	}
	if o.interrupted {
		return errInterrupted
	}
	return nil
}

// dump returns no error for an inconsistent list, but sets interrupted.
func (o *observation) dump(what string, typ uint16, build func(m *message), each func(body []byte)) error {
	err := o.n.rt.dump(typ, build, func(_ uint16, body []byte) { each(body) })
	if errors.Is(err, errInterrupted) {
		o.interrupted = true
		return nil
	}
	if err != nil {
		return fmt.Errorf("list %s: %w", what, err)
	}
	return nil
}

func (o *observation) name(index uint32) string {
	name, ok := o.names[index]
	if !ok {
		name = o.lookup(index)
		o.names[index] = name
	}
	return name
}

// A foundLink is a device as the kernel describes it.
type foundLink struct {
	index uint32
	name  string
	kind  string
	link  delta.Link

	oper       byte // the operational state
	group      uint32
	rpFilter   int
	forwarding bool
}

func (o *observation) links() error {
	for _, kind := range linkKinds {
		if o.n.unknown[kind] && !o.wants(kind) {
			continue
		}
		err := o.dump(kind+" devices", unix.RTM_GETLINK, func(m *message) { allOfKind(m, kind) }, func(body []byte) {
			f := parseLink(body)
			if f.kind != kind { // the kernel lists all devices when it does not know the kind
				if o.n.unknown == nil {
					o.n.unknown = map[string]bool{}
				}
				o.n.unknown[kind] = true
				return
			}
			want, wanted := o.want.Links[f.name]
			if wanted && want.Kind == kind || strings.HasPrefix(f.link.Alias, delta.AliasPrefix) {
				o.s.Links[f.name] = f.link
				o.names[f.index] = f.name
				o.owned = append(o.owned, f.index)
			}
		})
		if err != nil {
			return err
		}
	}
	for name, l := range o.want.Links {
		if _, ok := o.s.Links[name]; ok {
			continue
		}
		if _, err := o.n.index(name); err == nil {
			o.s.Problemf("%s is there and is no %s device; it is left alone: rename it, or give the network another %s", name,
				l.Kind, map[string]string{delta.KindVXLAN: "VNI", delta.KindXFRM: "name"}[l.Kind])
		}
	}
	return nil
}

func (o *observation) wants(kind string) bool {
	for _, l := range o.want.Links {
		if l.Kind == kind {
			return true
		}
	}
	return false
}

// linkKinds are the kinds of devices that Lariat creates for a host.
var linkKinds = []string{delta.KindVXLAN, delta.KindXFRM}

// allOfKind requests the devices of one kind. The kernel leaves out thousands of containers' veths.
func allOfKind(m *message, kind string) {
	m.raw(make([]byte, unix.SizeofIfInfomsg)...)
	info := m.nest(unix.IFLA_LINKINFO)
	m.bytes(unix.IFLA_INFO_KIND, []byte(kind))
	m.end(info)
	m.u32(unix.IFLA_EXT_MASK, rtextFilterSkipStats)
}

// addrs reads all addresses of owned devices, and the desired addresses of foreign devices.
func (o *observation) addrs() error {
	for _, index := range o.owned {
		if dev := o.name(index); strings.HasPrefix(dev, delta.TunnelPrefix) && !o.addressed(dev) {
			continue // none of the hundreds of tunnels to peers has an address
		}
		if err := o.addrsOf(index, o.name(index), true); err != nil {
			return err
		}
	}
	var others []string
	for a := range o.want.Addrs {
		if _, ok := o.s.Links[a.Dev]; !ok && !slices.Contains(others, a.Dev) {
			others = append(others, a.Dev)
		}
	}
	for _, dev := range others {
		index, err := o.n.index(dev)
		if errors.Is(err, unix.ENODEV) {
			continue
		}
		if err != nil {
			return err
		}
		if err := o.addrsOf(index, dev, false); err != nil {
			return err
		}
	}
	return nil
}

// addressed reports whether a device has a desired address.
func (o *observation) addressed(dev string) bool {
	for a := range o.want.Addrs {
		if a.Dev == dev {
			return true
		}
	}
	return false
}

// parseAddr parses an RTM_NEWADDR. It returns the address and the index of the device.
func parseAddr(body []byte) (index uint32, p netip.Prefix) {
	if len(body) < unix.SizeofIfAddrmsg {
		return 0, p
	}
	var local, address netip.Addr
	for a := newAttrs(body[unix.SizeofIfAddrmsg:]); a.next(); {
		switch a.typ {
		case unix.IFA_LOCAL:
			local = a.addr()
		case unix.IFA_ADDRESS:
			address = a.addr()
		}
	}
	if !local.IsValid() {
		local = address
	}
	return binary.NativeEndian.Uint32(body[4:]), netip.PrefixFrom(local, int(body[1]))
}

func (o *observation) addrsOf(index uint32, dev string, owned bool) error {
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		err := o.dump("addresses of "+dev, unix.RTM_GETADDR, func(m *message) {
			m.raw(family, 0, 0, 0)
			m.rawU32(index)
		}, func(body []byte) {
			if len(body) < unix.SizeofIfAddrmsg || binary.NativeEndian.Uint32(body[4:]) != index {
				return
			}
			_, addr := parseAddr(body)
			key := delta.Addr{Dev: dev, Prefix: addr}
			if _, wanted := o.want.Addrs[key]; owned || wanted {
				o.s.Addrs[key] = struct{}{}
			}
		})
		// A kernel without IPv6 answers EOPNOTSUPP or all addresses.
		// The code above filters those addresses.
		if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
			return err
		}
	}
	return nil
}

func (o *observation) neighs(index uint32) error {
	dev := o.name(index)
	return o.dump("neighbours of "+dev, unix.RTM_GETNEIGH, func(m *message) {
		m.raw(make([]byte, unix.SizeofNdMsg)...)
		m.u32(unix.NDA_IFINDEX, index)
	}, func(body []byte) {
		addr, mac, ok := parseNeigh(body, index, unix.NUD_PERMANENT)
		if ok && addr.IsValid() {
			o.s.Neighs[delta.Neigh{Dev: dev, Addr: addr}] = mac
		}
	})
}

func (o *observation) fdb(index uint32) error {
	dev := o.name(index)
	return o.dump("forwarding entries of "+dev, unix.RTM_GETNEIGH, func(m *message) {
		m.raw(unix.AF_BRIDGE, 0, 0, 0)
		m.rawU32(index)
		m.rawU32(0)
	}, func(body []byte) {
		addr, mac, ok := parseNeigh(body, index, unix.NUD_PERMANENT|unix.NUD_NOARP)
		if ok {
			o.s.FDB[delta.FDB{Dev: dev, MAC: mac, Dst: addr}] = struct{}{}
		}
	})
}

func parseNeigh(body []byte, index uint32, states uint16) (addr netip.Addr, mac delta.MAC, ok bool) {
	if len(body) < unix.SizeofNdMsg || binary.NativeEndian.Uint32(body[4:]) != index ||
		binary.NativeEndian.Uint16(body[8:])&states == 0 {
		return
	}
	for a := newAttrs(body[unix.SizeofNdMsg:]); a.next(); {
		switch a.typ {
		case unix.NDA_DST:
			addr = a.addr()
		case unix.NDA_LLADDR:
			copy(mac[:], a.value)
		}
	}
	return addr, mac, true
}

// These are numbers of nexthop objects (Linux 5.3, include/uapi/linux/nexthop.h).
// struct nhmsg has the fields family, scope, protocol, reserved and flags.
const (
	sizeofNhMsg = 8
	nhaID       = 1
	nhaOIF      = 5
	nhaGateway  = 6
	rtaNHID     = 30

	rtextFilterSkipStats = 8
)

func (o *observation) nexthops() error {
	err := o.dump("nexthops", unix.RTM_GETNEXTHOP, func(m *message) { m.raw(make([]byte, sizeofNhMsg)...) },
		func(body []byte) {
			if len(body) < sizeofNhMsg || body[2] != delta.Protocol {
				return
			}
			var id uint32
			nh := delta.Nexthop{Onlink: binary.NativeEndian.Uint32(body[4:])&unix.RTNH_F_ONLINK != 0}
			for a := newAttrs(body[sizeofNhMsg:]); a.next(); {
				switch a.typ {
				case nhaID:
					id = a.u32()
				case nhaGateway:
					nh.Via = a.addr()
				case nhaOIF:
					nh.Dev = o.name(a.u32())
				}
			}
			o.s.Nexthops[id] = nh
		})
	if errors.Is(err, unix.EOPNOTSUPP) && len(o.want.Nexthops) == 0 {
		return nil
	}
	return named(err, "this kernel lacks nexthop objects (Linux 5.3)", unix.EOPNOTSUPP)
}

// named adds a meaning to an error of the kernel when the error is one of codes.
func named(err error, meaning string, codes ...error) error {
	for _, c := range codes {
		if errors.Is(err, c) {
			return fmt.Errorf("%s: %w", meaning, err)
		}
	}
	return err
}

func (o *observation) routes(family byte) error {
	err := o.dump("routes", unix.RTM_GETROUTE, func(m *message) {
		ownRoutes(m, family)
	}, o.route)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil // an IPv4 table appears with its first route; a kernel without IPv6 has no table
	}
	return err
}

// ownRoutes requests Lariat's routes of one family.
func ownRoutes(m *message, family byte) {
	m.raw(family, 0, 0, 0, unix.RT_TABLE_MAIN, delta.Protocol, 0, 0)
	m.rawU32(0)
}

var routeTypes = map[byte]string{
	unix.RTN_UNICAST: "", unix.RTN_BLACKHOLE: "blackhole", unix.RTN_UNREACHABLE: "unreachable",
	unix.RTN_PROHIBIT: "prohibit", unix.RTN_THROW: "throw", unix.RTN_LOCAL: "local",
}

func (o *observation) route(body []byte) {
	if len(body) < unix.SizeofRtMsg || body[4] != unix.RT_TABLE_MAIN || body[5] != delta.Protocol {
		return // older kernels do not filter
	}
	flags := binary.NativeEndian.Uint32(body[8:])
	if flags&unix.RTM_F_CLONED != 0 {
		return
	}
	dst := netip.IPv4Unspecified()
	if body[0] == unix.AF_INET6 {
		dst = netip.IPv6Unspecified()
	}
	r := delta.Route{Type: routeTypes[body[7]], Onlink: flags&unix.RTNH_F_ONLINK != 0}
	var oif, metric uint32
	for a := newAttrs(body[unix.SizeofRtMsg:]); a.next(); {
		switch a.typ {
		case unix.RTA_DST:
			dst = a.addr()
		case unix.RTA_GATEWAY, unix.RTA_VIA:
			r.Via = a.gateway()
		case unix.RTA_OIF:
			oif = a.u32()
		case unix.RTA_PREFSRC:
			r.Src = a.addr()
		case rtaNHID:
			r.NH = a.u32()
		case unix.RTA_PRIORITY:
			metric = a.u32()
		case unix.RTA_METRICS:
			for m := newAttrs(a.value); m.next(); {
				if m.typ == unix.RTAX_MTU {
					r.MTU = int(m.u32())
				}
			}
		case unix.RTA_MULTIPATH:
			r.Type = "multipath" // Lariat never writes it, so it differs from every desired route
		}
	}
	switch {
	case r.NH != 0 || r.Type != "":
		r.Via, r.Onlink = netip.Addr{}, false // the values of the nexthop object, or of lo for other types
	case oif != 0:
		r.Dev = o.name(oif)
		if strings.HasPrefix(r.Dev, delta.VethPrefix) { // a container's route, created and removed with its endpoint
			if o.ports != nil {
				if o.ports[r.Dev] == nil {
					o.ports[r.Dev] = map[netip.Prefix]delta.Route{}
				}
				o.ports[r.Dev][netip.PrefixFrom(dst, int(body[1]))] = r
			}
			return
		}
	}
	if dst.Is6() && metric == metric6 {
		metric = 0
	}
	o.s.Routes[delta.RouteKey{Dst: netip.PrefixFrom(dst, int(body[1])), Metric: metric}] = r
}
