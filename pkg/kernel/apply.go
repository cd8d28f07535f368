package kernel

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/delta"
)

// maxErrors limits how many refusals of one kind of object are reported separately.
// Ten thousand refusals mostly have one cause.
const maxErrors = 10

// Apply implements Kernel. Additions to nftables come first, in one transaction.
// Blocking rules thus exist before the packets that they block.
// Without these rules Apply creates no encrypted device.
// Sysctls, links, addresses, neighbours, forwarding entries, nexthops and routes follow.
// Removals follow in reverse order, with nftables last.
// Apply leaves out objects on a device that could not be created.
func (n *Netns) Apply(ctx context.Context, d *delta.Difference) error {
	if d.Empty() {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	a := &application{n: n, d: d, indexes: map[string]uint32{}, missing: map[string]int{}}
	a.run()
	return errors.Join(a.errs...)
}

type application struct {
	n       *Netns
	d       *delta.Difference
	indexes map[string]uint32
	missing map[string]int // missing devices, with the number of objects that were left out
	bare    bool           // the rules could not be created
	errs    []error
}

func (a *application) fail(format string, args ...any) {
	a.errs = append(a.errs, fmt.Errorf(format, args...))
}

func (a *application) run() {
	d := a.d
	if err := a.n.applyNft(d, true); err != nil {
		a.errs, a.bare = append(a.errs, err), true
	}
	a.sysctls(false)
	a.links()
	a.sysctls(true)
	send(a, "set", d.Addrs.Set, a.addAddr, func(e *delta.Entry[delta.Addr, struct{}]) string { return e.Key.String() },
		unix.EEXIST)
	send(a, "set", d.Neighs.Set, a.setNeigh, neighName)
	send(a, "set", d.FDB.Set, a.addFDB, fdbName)
	a.nexthops()
	a.routes()
	send(a, "remove", d.Routes.Remove, a.removeRoute, routeName, unix.ESRCH, unix.ENOENT, unix.ENODEV,
		unix.EINVAL) // the route vanished with its nexthop
	send(a, "remove", d.Nexthops.Remove, a.removeNexthop, nexthopName, unix.ENOENT, unix.ESRCH)
	send(a, "remove", d.FDB.Remove, a.removeFDB, fdbName, unix.ENOENT)
	send(a, "remove", d.Neighs.Remove, a.removeNeigh, neighName, unix.ENOENT)
	send(a, "remove", d.Addrs.Remove, a.removeAddr,
		func(e *delta.Entry[delta.Addr, struct{}]) string { return e.Key.String() }, unix.EADDRNOTAVAIL)
	for _, e := range d.Links.Remove {
		a.removeLink(e.Key)
	}
	if !a.bare {
		if err := a.n.applyNft(d, false); err != nil {
			a.errs = append(a.errs, err)
		}
	}
	devs := make([]string, 0, len(a.missing))
	for dev := range a.missing {
		devs = append(devs, dev)
	}
	slices.Sort(devs)
	for _, dev := range devs {
		a.fail("device %s is missing: %d entries on it are left out", dev, a.missing[dev])
	}
}

// index returns 0 when there is no such device.
// run reports each missing device once, with the number of objects that were left out.
func (a *application) index(dev string) uint32 {
	if i, ok := a.indexes[dev]; ok {
		if i == 0 {
			a.missing[dev]++
		}
		return i
	}
	i, err := a.n.index(dev)
	if err != nil {
		i = 0
		a.missing[dev]++
	}
	a.indexes[dev] = i
	return i
}

// send sends one message for each entry, in batches.
// A refusal in harmless means that there was nothing to do.
func send[K comparable, V any](a *application, verb string, entries []delta.Entry[K, V],
	build func(*message, *delta.Entry[K, V]) bool,
	name func(*delta.Entry[K, V]) string, harmless ...error) {
	if len(entries) == 0 {
		return
	}
	refused := 0
	err := a.n.rt.run(len(entries), func(m *message, i int) bool { return build(m, &entries[i]) }, func(i int, err error) {
		for _, h := range harmless {
			if errors.Is(err, h) {
				return
			}
		}
		if refused++; refused <= maxErrors {
			a.fail("%s %s: %w", verb, name(&entries[i]), err)
		}
	})
	if err != nil {
		a.fail("%s %s and what follows: %w", verb, name(&entries[0]), err)
	}
	if refused > maxErrors {
		a.fail("and %d more like %s", refused-maxErrors, name(&entries[0]))
	}
}

func neighName(e *delta.Entry[delta.Neigh, delta.MAC]) string {
	return delta.NeighString(e.Key, e.Value)
}
func fdbName(e *delta.Entry[delta.FDB, struct{}]) string { return e.Key.String() }
func nexthopName(e *nexthopEntry) string                 { return delta.NexthopString(e.Key, e.Value) }
func routeName(e *routeEntry) string                     { return delta.RouteString(e.Key, e.Value) }

func (a *application) links() {
	d := a.d
	for _, e := range d.Links.Remove { // one tunnel end per VNI and port: remove the old one first
		if slices.ContainsFunc(d.Links.Set, func(s delta.Entry[string, delta.Link]) bool {
			return s.Value.Kind == e.Value.Kind && s.Value.VNI == e.Value.VNI && s.Value.Port == e.Value.Port &&
				s.Value.IfID == e.Value.IfID
		}) {
			a.removeLink(e.Key)
		}
	}
	for _, e := range d.Links.Set {
		var err error
		switch {
		case a.bare && e.Value.Kind == delta.KindXFRM:
			err = errors.New("without the rules that keep packets from leaving in clear it is not made")
		case e.Replaces && !e.Value.Remake(e.Old):
			err = a.adjust(e.Key, e.Value, e.Old)
		case e.Replaces:
			a.n.log().Warn("device has the wrong parameters and is made again", "device", e.Key,
				"was", delta.LinkString(e.Key, e.Old), "becomes", delta.LinkString(e.Key, e.Value))
			a.removeLink(e.Key)
			err = a.create(e.Key, e.Value)
		default:
			err = a.create(e.Key, e.Value)
		}
		if err != nil {
			a.fail("set %s: %w", delta.LinkString(e.Key, e.Value), err)
			a.indexes[e.Key] = 0 // put no objects on a device that may be foreign
		}
	}
}

func (a *application) create(name string, l delta.Link) error {
	old := l          // the device after its creation
	old.AcceptRA = -1 // unknown: the host's defaults decide
	err := a.n.rt.do(func(m *message) { createLink(m, name, l) })
	if errors.Is(err, unix.EEXIST) {
		// Another process of Lariat may have been faster.
		// Any other device with that name or VNI is foreign.
		var f foundLink
		gerr := a.n.rt.link(0, name, func(body []byte) { f = parseLink(body) })
		switch {
		case gerr != nil:
			return fmt.Errorf("another device has %s: %w", identity(l), err)
		case f.kind != l.Kind:
			return fmt.Errorf("a device of that name is there, of kind %q, and is left alone; rename it, or give the "+
				"network another %s: %w",
				cmp.Or(f.kind, "hardware"), map[string]string{delta.KindVXLAN: "VNI", delta.KindXFRM: "name"}[l.Kind], err)
		case l.Remake(f.link):
			return fmt.Errorf("appeared meanwhile as %s: %w", delta.LinkString(name, f.link), err)
		}
		old, err = f.link, nil
	}
	if errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("this kernel lacks %s: %w", lacking[l.Kind], err)
	}
	if err != nil {
		return err
	}
	return a.adjust(name, l, old)
}

// lacking names the kernel feature that each kind of device needs.
var lacking = map[string]string{delta.KindVXLAN: "VXLAN devices (CONFIG_VXLAN, module vxlan)",
	delta.KindXFRM: "XFRM interfaces (CONFIG_XFRM_INTERFACE, module xfrm_interface)"}

// identity returns the property that no two devices of a kind may share.
func identity(l delta.Link) string {
	if l.Kind == delta.KindXFRM {
		return fmt.Sprintf("if_id %#x", l.IfID)
	}
	return fmt.Sprintf("VNI %d and port %d", l.VNI, l.Port)
}

// adjust sets the properties that differ from old and can change in place.
// The device is up afterwards. adjust sets the MAC only when the MAC differs.
// The kernel flushes a device's neighbours when it sets a MAC, even the same MAC.
func (a *application) adjust(name string, l, old delta.Link) error {
	index, err := a.n.index(name)
	if err != nil {
		return err
	}
	a.indexes[name] = index
	err = a.n.rt.do(func(m *message) { noLinkLocal(m, index) })
	if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) && !errors.Is(err, unix.EOPNOTSUPP) &&
		!errors.Is(err, unix.EINVAL) {
		return err // the three errors above mean a kernel or device without IPv6
	}
	if l.NoIPv6 != old.NoIPv6 || l.AcceptRA != old.AcceptRA {
		if err := a.n.setSysctls(ipv6Settings(name, l.NoIPv6)); err != nil {
			return err
		}
	}
	return a.n.rt.do(func(m *message) {
		changeLink(m, index, unix.IFF_UP, unix.IFF_UP)
		if l.MAC != old.MAC {
			m.bytes(unix.IFLA_ADDRESS, l.MAC[:])
		}
		if l.MTU != 0 && l.MTU != old.MTU {
			m.u32(unix.IFLA_MTU, uint32(l.MTU))
		}
		if l.Group != old.Group {
			m.u32(unix.IFLA_GROUP, l.Group)
		}
		m.bytes(unix.IFLA_IFALIAS, []byte(l.Alias))
	})
}

func (a *application) removeLink(name string) {
	index, err := a.n.index(name)
	delete(a.indexes, name)
	if errors.Is(err, unix.ENODEV) {
		return
	}
	if err == nil {
		err = a.n.rt.do(func(m *message) {
			m.begin(unix.RTM_DELLINK, 0)
			m.raw(0, 0, 0, 0)
			m.rawU32(index)
			m.rawU32(0)
			m.rawU32(0)
		})
	}
	if err != nil && !errors.Is(err, unix.ENODEV) {
		a.fail("remove link %s: %w", name, err)
	}
}

func (a *application) addAddr(m *message, e *delta.Entry[delta.Addr, struct{}]) bool {
	return a.addr(m, unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL, e.Key)
}

func (a *application) removeAddr(m *message, e *delta.Entry[delta.Addr, struct{}]) bool {
	return a.addr(m, unix.RTM_DELADDR, 0, e.Key)
}

func (a *application) addr(m *message, typ, flags uint16, k delta.Addr) bool {
	index := a.index(k.Dev)
	if index == 0 {
		return false
	}
	ip := k.Prefix.Addr()
	m.begin(typ, flags)
	family, scope, noDAD := byte(unix.AF_INET), byte(unix.RT_SCOPE_UNIVERSE), byte(0)
	if ip.Is6() {
		// The address is unique: it derives from a block or a MAC of this host.
		// Duplicate address detection would cost a second.
		family, noDAD = unix.AF_INET6, unix.IFA_F_NODAD
	}
	if ip.IsLinkLocalUnicast() && ip.Is6() {
		scope = unix.RT_SCOPE_LINK
	}
	if k.Dev == "lo" && ip.Is4() {
		// The kernel uses the first address of the first device for packets by a device without an
		// address. Masqueraded packets are among them.
		scope = unix.RT_SCOPE_HOST
	}
	m.raw(family, byte(k.Prefix.Bits()), noDAD, scope)
	m.rawU32(index)
	m.addr(unix.IFA_LOCAL, ip)
	m.addr(unix.IFA_ADDRESS, ip)
	return true
}

func (a *application) setNeigh(m *message, e *delta.Entry[delta.Neigh, delta.MAC]) bool {
	index := a.index(e.Key.Dev)
	if index == 0 {
		return false
	}
	m.begin(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE)
	ndmsg(m, family(e.Key.Addr.Is6()), index, unix.NUD_PERMANENT, 0)
	m.addr(unix.NDA_DST, e.Key.Addr)
	m.bytes(unix.NDA_LLADDR, e.Value[:])
	return true
}

func (a *application) removeNeigh(m *message, e *delta.Entry[delta.Neigh, delta.MAC]) bool {
	index := a.index(e.Key.Dev)
	if index == 0 {
		return false
	}
	m.begin(unix.RTM_DELNEIGH, 0)
	ndmsg(m, family(e.Key.Addr.Is6()), index, 0, 0)
	m.addr(unix.NDA_DST, e.Key.Addr)
	return true
}

func (a *application) addFDB(m *message, e *delta.Entry[delta.FDB, struct{}]) bool {
	// For a unicast MAC the kernel accepts an appended destination without an error and drops it.
	// A replaced destination works. The later removal of the earlier destination finds nothing.
	// For other MACs an appended destination works and a replaced one does not.
	how := uint16(unix.NLM_F_REPLACE)
	if e.Key.MAC[0]&1 != 0 || e.Key.MAC == (delta.MAC{}) {
		how = unix.NLM_F_APPEND
	}
	return a.fdb(m, unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|how, unix.NUD_PERMANENT, e.Key)
}

func (a *application) removeFDB(m *message, e *delta.Entry[delta.FDB, struct{}]) bool {
	return a.fdb(m, unix.RTM_DELNEIGH, 0, 0, e.Key)
}

func (a *application) fdb(m *message, typ, flags, state uint16, k delta.FDB) bool {
	index := a.index(k.Dev)
	if index == 0 {
		return false
	}
	m.begin(typ, flags)
	ndmsg(m, unix.AF_BRIDGE, index, state, unix.NTF_SELF)
	m.bytes(unix.NDA_LLADDR, k.MAC[:])
	if k.Dst.IsValid() {
		m.addr(unix.NDA_DST, k.Dst)
	}
	return true
}

func ndmsg(m *message, family byte, index uint32, state uint16, flags byte) {
	m.raw(family, 0, 0, 0)
	m.rawU32(index)
	m.b = binary.NativeEndian.AppendUint16(m.b, state)
	m.raw(flags, 0)
}

func family(v6 bool) byte {
	if v6 {
		return unix.AF_INET6
	}
	return unix.AF_INET
}
