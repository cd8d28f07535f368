package kernel

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/delta"
)

// AddEndpoint implements Kernel.
//
// One message creates both ends, and the container's end starts in the container's namespace.
// The message sets both MACs, because udev's MACAddressPolicy may replace a MAC that is set later.
// One batch for each end makes the other changes.
// Two settings have no netlink message: AddEndpoint writes them before the host end is up.
func (n *Netns) AddEndpoint(ctx context.Context, path string, p delta.Endpoint) (err error) {
	inside, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open network namespace: %w", err)
	}
	defer inside.Close()
	n.mu.Lock()
	defer n.mu.Unlock()
	var told *os.File
	err = n.do(func() (err error) {
		told, err = subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV6_IFADDR)
		return err
	})
	if err != nil {
		return fmt.Errorf("hear of a port: %w", err)
	}
	defer told.Close()
	if err := n.createPair(inside, p); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.deleteVeth(p.HostName))
		}
	}()
	index, err := n.index(p.HostName)
	if err != nil {
		return err
	}
	alias := func(m *message) { m.bytes(unix.IFLA_IFALIAS, []byte(p.Alias)) }
	err = n.hostEnd(index, p.Veth(), alias)
	if errors.Is(err, unix.EINVAL) && len(p.Sources) > 0 {
		// The host has lost its address, because somebody deleted the device with that address.
		// The network manager restores the address, and later the source of the route.
		// A container need not wait for the repair.
		p.Sources = nil
		err = n.hostEnd(index, p.Veth(), alias)
	}
	if err != nil {
		return err
	}
	if err := insideEnd(ctx, inside, path, p); err != nil {
		return err
	}
	var local []netip.Addr
	if p.Veth().Gateway6 {
		local = append(local, delta.GatewayAddress6.Addr())
	}
	return n.rt.operational(ctx, told, index, []byte{operUp}, local)
}

// operational waits until an end of a veth pair sends and receives.
// Its device is then in one of the states, and the IPv6 addresses are local.
// A container's first packets need both conditions.
// The kernel fulfils both in work queues, some time after the messages that request them.
// linkwatch runs once a second, unless it considers an event urgent.
// An event is not urgent when both ends have the same index, each in its namespace.
// A timeout of three seconds is no error, because there is no remedy.
//
// linkwatch_event gives a device its queue when the peer comes up later.
// The kernel drops earlier packets, such as the host's first ARP request.
// The host repeats an ARP request after a second.
// IPv6 considers the device ready only after linkwatch_event, and then adds the multicast route.
// Without the multicast route the device receives no neighbour solicitation.
// Kernels since 6.8 do that work when a process requests the device (linkwatch_sync_dev in
// rtnl_getlink). Older kernels announce the end of that work.
//
// addrconf_dad_work joins the solicited-node group of an address, makes the address local and
// announces it. addrconf_dad_work also does so without duplicate address detection.
func (s *socket) operational(ctx context.Context, told *os.File, index uint32, states []byte,
	addrs []netip.Addr) error {
	up, missing := false, map[netip.Addr]bool{}
	for _, a := range addrs {
		missing[a] = true
	}
	look := func() error {
		return s.link(index, "", func(body []byte) { up = slices.Contains(states, parseLink(body).oper) })
	}
	if err := look(); err != nil || up && len(missing) == 0 {
		return err
	}
	if err := told.SetReadDeadline(time.Now().Add(3 * time.Second)); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = told.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	for buf := make([]byte, 1<<16); !up || len(missing) > 0; {
		n, err := told.Read(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return ctx.Err()
		}
		split(buf[:max(n, 0)], func(typ uint16, body []byte) {
			if at, p := parseAddr(body); typ == unix.RTM_NEWADDR && at == index {
				delete(missing, p.Addr())
			}
		})
		if !up {
			if err := look(); err != nil {
				return err
			}
		}
	}
	return nil
}

// A step is one message for an endpoint, with the words for an error when the kernel refuses it.
type step struct {
	what  string
	build func(m *message)
}

// steps sends the messages of list in one batch and returns the first refusal.
func (s *socket) steps(list []step) (first error) {
	err := s.run(len(list), func(m *message, i int) bool { list[i].build(m); return true }, func(i int, err error) {
		if first == nil {
			first = fmt.Errorf("%s: %w", list[i].what, err)
		}
	})
	return errors.Join(first, err)
}

func (n *Netns) createPair(inside *os.File, p delta.Endpoint) error {
	create := func() error { return n.rt.do(func(m *message) { createVeth(m, int(inside.Fd()), p) }) }
	err := create()
	if errors.Is(err, unix.EEXIST) {
		// Either a killed ADD left the host end, or the container has such an interface.
		alias, _ := delta.ParseEndpointAlias(p.Alias)
		if err := n.portFree(inside, p.HostName, p.IfName, alias.Network); err != nil {
			return err
		}
		if _, ierr := n.index(p.HostName); ierr == nil {
			if err := n.deleteVeth(p.HostName); err != nil {
				return fmt.Errorf("replace the dangling %s: %w", p.HostName, err)
			}
			err = create()
		}
	}
	switch {
	case errors.Is(err, unix.EEXIST):
		return fmt.Errorf("interface %s in the container: %w; another plugin or an earlier ADD made it", p.IfName, ErrExists)
	case err != nil:
		return fmt.Errorf("create veth %s with peer %s: %w", p.HostName, p.IfName, err)
	}
	return nil
}

// vethInfoPeer is VETH_INFO_PEER of linux/veth.h.
const vethInfoPeer = 1

func createVeth(m *message, netnsFD int, p delta.Endpoint) {
	m.begin(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	m.raw(make([]byte, unix.SizeofIfInfomsg)...)
	m.string(unix.IFLA_IFNAME, p.HostName)
	m.bytes(unix.IFLA_ADDRESS, p.HostMAC[:])
	m.u32(unix.IFLA_MTU, uint32(p.MTU))
	m.u32(unix.IFLA_GROUP, delta.OverlayLinkGroup)
	info := m.nest(unix.IFLA_LINKINFO)
	m.string(unix.IFLA_INFO_KIND, "veth")
	data := m.nest(unix.IFLA_INFO_DATA)
	peer := m.nest(vethInfoPeer)
	m.raw(make([]byte, unix.SizeofIfInfomsg)...)
	m.string(unix.IFLA_IFNAME, p.IfName)
	m.bytes(unix.IFLA_ADDRESS, p.MAC[:])
	m.u32(unix.IFLA_MTU, uint32(p.MTU))
	m.u32(unix.IFLA_NET_NS_FD, uint32(netnsFD))
	m.end(peer)
	m.end(data)
	m.end(info)
}

// hostEnd turns a device into the host end of an endpoint. more adds the caller's link attributes.
// Two settings have no netlink message: hostEnd writes them before the device is up.
func (n *Netns) hostEnd(index uint32, h delta.VethInfo, more func(m *message)) error {
	if err := n.setSysctls(ipv6Settings(h.Name, h.NoIPv6)); err != nil {
		return err
	}
	var list []step
	if !h.NoIPv6 { // a kernel without IPv6 may lack this setting
		// Set this before the device is up.
		// Otherwise the kernel starts duplicate address detection for an unused link-local address.
		list = append(list, step{"keep " + h.Name + " from making addresses", func(m *message) { noLinkLocal(m, index) }})
	}
	list = append(list, step{"set " + h.Name + " up", func(m *message) {
		changeLink(m, index, unix.IFF_UP, unix.IFF_UP)
		more(m)
		forwarding(m)
	}})
	if h.Gateway6 {
		list = append(list, step{"give " + h.Name + " the gateway address", func(m *message) {
			newAddr(m, index, delta.GatewayAddress6)
		}})
	}
	replace := uint16(unix.NLM_F_EXCL)
	for dst, r := range h.Routes {
		list = append(list, step{"route " + dst.String() + " to " + h.Name, func(m *message) {
			newRoute(m, index, delta.EndpointRoute{Dst: dst}, delta.Protocol, replace)
			if r.Src.IsValid() {
				m.addr(unix.RTA_PREFSRC, r.Src)
			}
		}})
	}
	err := n.rt.steps(list)
	if !errors.Is(err, unix.EEXIST) {
		return err
	}
	for dst := range h.Routes {
		if err := n.routeFree(dst, index); err != nil {
			return err
		}
	}
	replace = unix.NLM_F_REPLACE
	return n.rt.steps(list)
}

// routeFree reports why a route to a container's address must not be replaced.
// The route leads to another container, or it is foreign.
// A route of the overlay may be replaced: the address has moved to this host.
func (n *Netns) routeFree(dst netip.Prefix, index uint32) error {
	var bits, protocol byte
	var oif uint32
	err := n.rt.get(unix.RTM_GETROUTE, func(m *message) {
		m.raw(family(dst.Addr().Is6()), byte(dst.Bits()), 0, 0, 0, 0, 0, 0)
		m.rawU32(unix.RTM_F_FIB_MATCH)
		m.addr(unix.RTA_DST, dst.Addr())
	}, func(_ uint16, body []byte) {
		bits, protocol = body[1], body[5]
		for a := newAttrs(body[unix.SizeofRtMsg:]); a.next(); {
			if a.typ == unix.RTA_OIF {
				oif = a.u32()
			}
		}
	})
	if err != nil || int(bits) != dst.Bits() || oif == index {
		return nil // there is no such route now, or it is this endpoint's
	}
	var at foundLink
	if oif != 0 {
		if err := n.rt.link(oif, "", func(body []byte) { at = parseLink(body) }); err != nil {
			return nil // the device vanished, and the route with it
		}
	}
	alias, port := delta.ParseEndpointAlias(at.link.Alias)
	switch {
	case port:
		return fmt.Errorf("%s leads to %s, the port of container %s (%s) of network %s, which runs: %w",
			dst.Addr(), at.name, alias.ContainerID, alias.IfName, alias.Network, ErrTaken)
	case protocol != delta.Protocol:
		return fmt.Errorf("%s has a route that is not Lariat's (see: ip route show %s): %w", dst.Addr(), dst, ErrTaken)
	}
	return nil
}

// RepairVeth implements Kernel.
func (n *Netns) RepairVeth(ctx context.Context, want delta.VethInfo) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	have, err := n.vethInfo(want.Name)
	if err == nil {
		err = n.hostEnd(uint32(have.Index), want, func(m *message) {
			if have.MAC != want.MAC {
				m.bytes(unix.IFLA_ADDRESS, want.MAC[:])
			}
			if want.MTU != 0 && have.MTU != want.MTU {
				m.u32(unix.IFLA_MTU, uint32(want.MTU))
			}
			if have.Group != want.Group {
				m.u32(unix.IFLA_GROUP, want.Group)
			}
		})
	}
	if errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// forwarding sets the device's forwarding and rp_filter to 1, without a write to /proc.
// The host's default for new devices does not matter.
// With rp_filter a packet's source must have its route back by the device.
// Therefore no container can use the address of another container.
func forwarding(m *message) {
	const inetConf = 1 // IFLA_INET_CONF
	spec := m.nest(unix.IFLA_AF_SPEC)
	v4 := m.nest(unix.AF_INET)
	conf := m.nest(inetConf)
	m.u32(ipv4Forwarding, 1)
	m.u32(rpFilter, 1)
	m.end(conf)
	m.end(v4)
	m.end(spec)
}

func insideEnd(ctx context.Context, inside *os.File, path string, p delta.Endpoint) error {
	var s *socket
	var told *os.File
	v6 := slices.ContainsFunc(p.Addrs, netip.Addr.Is6)
	err := within(inside, func() (err error) {
		if s, err = openSocket(unix.NETLINK_ROUTE); err == nil && v6 {
			told, err = subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV6_IFADDR)
		}
		return err
	})
	if s != nil {
		defer s.close()
	}
	if told != nil {
		defer told.Close()
	}
	if err != nil {
		return fmt.Errorf("netlink socket in %s: %w", path, err)
	}
	req, err := unix.NewIfreq(p.IfName)
	if err == nil {
		err = unix.IoctlIfreq(s.fd, unix.SIOCGIFINDEX, req)
	}
	if err != nil {
		return fmt.Errorf("find %s in the container: %w", p.IfName, err)
	}
	list := endpointSteps(req.Uint32(), p)
	err = s.steps(list)
	if errors.Is(err, unix.EACCES) && v6 {
		// Some runtimes disable IPv6 by default in the namespaces that they create.
		// All steps can be repeated.
		if err = enableIPv6(path, p.IfName); err == nil {
			err = s.steps(list)
		}
	}
	if err != nil || !v6 {
		return err
	}
	local := slices.DeleteFunc(slices.Clone(p.Addrs), netip.Addr.Is4)
	// The host end was up first, so the container's end has had a queue from the start.
	return s.operational(ctx, told, req.Uint32(), []byte{operUp, operUnknown}, local)
}

func endpointSteps(index uint32, p delta.Endpoint) []step {
	const lo = 1 // of every network namespace
	// Some runtimes have no loopback plugin in their lists, but servers on 127.0.0.1 need lo.
	// Packets to the container's own address use lo, too.
	list := []step{{"set lo up in the container", func(m *message) { changeLink(m, lo, unix.IFF_UP, unix.IFF_UP) }}}
	for _, a := range p.Addrs {
		list = append(list, step{"give " + p.IfName + " the address " + a.String(), func(m *message) {
			newAddr(m, index, netip.PrefixFrom(a, a.BitLen()))
		}})
	}
	list = append(list, step{"set " + p.IfName + " up",
		func(m *message) { changeLink(m, index, unix.IFF_UP, unix.IFF_UP) }})
	for _, g := range p.Gateways {
		list = append(list, step{"neighbour " + g.String() + " of " + p.IfName, func(m *message) {
			m.begin(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE)
			ndmsg(m, family(g.Is6()), index, unix.NUD_PERMANENT, 0)
			m.addr(unix.NDA_DST, g)
			m.bytes(unix.NDA_LLADDR, p.HostMAC[:])
		}})
		if g.Is4() {
			list = append(list, step{"route to the gateway " + g.String(), func(m *message) {
				newRoute(m, index, delta.EndpointRoute{Dst: netip.PrefixFrom(g, 32)}, unix.RTPROT_BOOT, unix.NLM_F_REPLACE)
			}})
		}
	}
	for _, r := range p.Routes {
		list = append(list, step{fmt.Sprintf("route %s via %s", r.Dst, r.Via), func(m *message) {
			newRoute(m, index, r, unix.RTPROT_BOOT, unix.NLM_F_REPLACE)
		}})
	}
	return list
}

// newAddr adds an address without duplicate address detection.
// The address is unique by construction, and the detection costs seconds.
func newAddr(m *message, index uint32, p netip.Prefix) {
	ip := p.Addr()
	m.begin(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_REPLACE)
	scope := byte(unix.RT_SCOPE_UNIVERSE)
	if ip.IsLinkLocalUnicast() {
		scope = unix.RT_SCOPE_LINK
	}
	flags := byte(0)
	if ip.Is6() {
		flags = unix.IFA_F_NODAD
	}
	m.raw(family(ip.Is6()), byte(p.Bits()), flags, scope)
	m.rawU32(index)
	m.addr(unix.IFA_LOCAL, ip)
	m.addr(unix.IFA_ADDRESS, ip)
}

// newRoute adds a route by the device. Without Via the route is on-link.
// exists is NLM_F_REPLACE or NLM_F_EXCL. With NLM_F_REPLACE newRoute replaces an existing route.
// With NLM_F_EXCL an existing route is an error.
func newRoute(m *message, index uint32, r delta.EndpointRoute, protocol byte, exists uint16) {
	v6 := r.Dst.Addr().Is6()
	table, scope, flags := r.Table, byte(unix.RT_SCOPE_UNIVERSE), uint32(0)
	if table == 0 {
		table = unix.RT_TABLE_MAIN
	}
	if r.Via.IsValid() {
		flags = unix.RTNH_F_ONLINK
	} else if !v6 {
		scope = unix.RT_SCOPE_LINK
	}
	m.begin(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|exists)
	m.raw(family(v6), byte(r.Dst.Bits()), 0, 0, byte(min(table, unix.RT_TABLE_COMPAT)), protocol, scope, unix.RTN_UNICAST)
	m.rawU32(flags)
	if r.Dst.Bits() > 0 {
		m.addr(unix.RTA_DST, r.Dst.Addr())
	}
	if r.Via.IsValid() {
		m.addr(unix.RTA_GATEWAY, r.Via)
	}
	m.u32(unix.RTA_OIF, index)
	m.u32(unix.RTA_TABLE, uint32(table))
	if r.Priority != 0 {
		m.u32(unix.RTA_PRIORITY, uint32(r.Priority))
	}
	if r.MTU != 0 || r.AdvMSS != 0 {
		metrics := m.nest(unix.RTA_METRICS)
		if r.MTU != 0 {
			m.u32(unix.RTAX_MTU, uint32(r.MTU))
		}
		if r.AdvMSS != 0 {
			m.u32(unix.RTAX_ADVMSS, uint32(r.AdvMSS))
		}
		m.end(metrics)
	}
}

// within runs f in another namespace. A socket that f opens stays in that namespace.
// The thread returns to its own namespace.
func within(ns *os.File, f func() error) error {
	runtime.LockOSThread()
	own, err := os.Open(ownNamespace)
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer own.Close()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return os.NewSyscallError("setns", err)
	}
	err = f()
	if berr := unix.Setns(int(own.Fd()), unix.CLONE_NEWNET); berr != nil {
		// Go must not reuse a thread in the wrong namespace.
		// A locked thread ends with its goroutine.
		return errors.Join(err, os.NewSyscallError("setns", berr))
	}
	runtime.UnlockOSThread()
	return err
}

func enableIPv6(path, ifname string) error {
	return ns.WithNetNSPath(path, func(ns.NetNS) error {
		return os.WriteFile("/proc/sys/net/ipv6/conf/"+ifname+"/disable_ipv6", []byte("0"), 0)
	})
}

// DelEndpoint implements Kernel.
func (n *Netns) DelEndpoint(ctx context.Context, hostName string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.deleteVeth(hostName)
}

// deleteVeth deletes a veth by name. This takes one message and no lookup.
func (n *Netns) deleteVeth(name string) error {
	err := n.rt.do(func(m *message) {
		m.begin(unix.RTM_DELLINK, 0)
		m.raw(make([]byte, unix.SizeofIfInfomsg)...)
		m.string(unix.IFLA_IFNAME, name)
	})
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove %s: %w", name, err)
	}
	return nil
}

// DelEndpoints implements Kernel. It moves the links into a new link group and deletes the group.
// The kernel unregisters all members together and waits for RCU once.
func (n *Netns) DelEndpoints(ctx context.Context, names []string) error {
	if len(names) == 0 {
		return nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	var links []uint32
	var errs []error
	for _, name := range names {
		switch index, err := n.index(name); {
		case err == nil:
			links = append(links, index)
		case !errors.Is(err, unix.ENODEV):
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, n.removeGroup(links))...)
}

// removeGroup removes links by their indexes. A missing link is no error.
// Another process may remove the same links, such as the network manager in a garbage collection.
// Between the two steps the links may then vanish or move into that process's group.
func (n *Netns) removeGroup(links []uint32) error {
	if len(links) == 0 {
		return nil
	}
	var err error
	for range 5 { // each failure means that the other process made progress
		if err = n.tryRemoveGroup(links); !errors.Is(err, unix.ENODEV) {
			break
		}
	}
	return err
}

// tryRemoveGroup fails with ENODEV when the group has no links at the time of its removal.
func (n *Netns) tryRemoveGroup(links []uint32) error {
	group := uint32(delta.Protocol<<24 | rand.IntN(1<<24))
	var errs []error
	missing := 0
	err := n.rt.run(len(links), func(m *message, i int) bool {
		changeLink(m, links[i], 0, 0)
		m.u32(unix.IFLA_GROUP, group)
		return true
	}, func(i int, err error) {
		missing++
		if !errors.Is(err, unix.ENODEV) {
			errs = append(errs, fmt.Errorf("remove link %d: %w", links[i], err))
		}
	})
	if err == nil && missing < len(links) {
		err = n.rt.do(func(m *message) {
			m.begin(unix.RTM_DELLINK, 0)
			m.raw(make([]byte, unix.SizeofIfInfomsg)...)
			m.u32(unix.IFLA_GROUP, group)
		})
	}
	if err != nil {
		errs = append(errs, fmt.Errorf("remove %d ports: %w", len(links), err))
	}
	return errors.Join(errs...)
}

// VethIndex returns the interface index of a host end in the calling goroutine's network namespace.
// It returns 0 when there is no such host end.
func VethIndex(hostName string) uint32 {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq(hostName)
	if err != nil || unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, req) != nil {
		return 0
	}
	return req.Uint32()
}

// Joined implements Kernel.
func (n *Netns) Joined(ctx context.Context, device string, addrs []netip.Addr) (bool, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if device != "" {
		var f foundLink
		err := n.rt.link(0, device, func(body []byte) { f = parseLink(body) })
		if errors.Is(err, unix.ENODEV) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("look for %s: %w", device, err)
		}
		if f.link.Down || !strings.HasPrefix(f.link.Alias, delta.AliasPrefix) {
			return false, nil
		}
	}
	for _, a := range addrs {
		local := false
		err := n.rt.get(unix.RTM_GETROUTE, func(m *message) {
			m.raw(family(a.Is6()), byte(a.BitLen()), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
			m.addr(unix.RTA_DST, a)
		}, func(_ uint16, body []byte) { local = len(body) >= unix.SizeofRtMsg && body[7] == unix.RTN_LOCAL })
		if err != nil || !local {
			return false, nil // a missing route is no error: the address is not local either
		}
	}
	return true, nil
}

// Veths implements Kernel.
func (n *Netns) Veths(ctx context.Context) ([]delta.VethInfo, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return RetryDump(func() ([]delta.VethInfo, error) {
		out, err := n.veths()
		if errors.Is(err, errInterrupted) {
			err = netlink.ErrDumpInterrupted
		}
		return out, err
	})
}

// veths combines four dumps: devices, their IPv6 addresses, and the routes of both families.
func (n *Netns) veths() (out []delta.VethInfo, err error) {
	interrupted := false
	dump := func(what string, typ uint16, build func(m *message), each func(body []byte)) {
		err2 := n.rt.dump(typ, build, func(_ uint16, body []byte) { each(body) })
		switch {
		case errors.Is(err2, errInterrupted):
			interrupted = true
		case errors.Is(err2, unix.ENOENT), errors.Is(err2, unix.EOPNOTSUPP): // no IPv6, or no route yet
		case err2 != nil && err == nil:
			err = fmt.Errorf("list %s: %w", what, err2)
		}
	}
	at := map[uint32]int{} // the place in out, by index
	names := map[uint32]string{}
	dump("ports", unix.RTM_GETLINK, func(m *message) { allOfKind(m, "veth") }, func(body []byte) {
		if f := parseLink(body); f.kind == "veth" && strings.HasPrefix(f.name, delta.VethPrefix) {
			if alias, ok := delta.ParseEndpointAlias(f.link.Alias); ok {
				at[f.index], names[f.index] = len(out), f.name
				out = append(out, f.port(alias))
			}
		}
	})
	if len(out) == 0 || err != nil {
		return out, err
	}
	dump("IPv6 addresses", unix.RTM_GETADDR, func(m *message) {
		m.raw(unix.AF_INET6, 0, 0, 0)
		m.rawU32(0)
	}, func(body []byte) {
		if index, addr := parseAddr(body); addr == delta.GatewayAddress6 {
			if i, ok := at[index]; ok {
				out[i].Gateway6 = true
			}
		}
	})
	o := observation{names: names, lookup: func(uint32) string { return "" }, s: delta.NewState(),
		ports: map[string]map[netip.Prefix]delta.Route{}}
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		dump("routes", unix.RTM_GETROUTE, func(m *message) { ownRoutes(m, family) }, o.route)
	}
	for i := range out {
		out[i].Routes = o.ports[out[i].Name]
	}
	if interrupted && err == nil {
		err = errInterrupted
	}
	return out, err
}

// port returns the device as the host end of an endpoint.
func (f foundLink) port(alias delta.EndpointAlias) delta.VethInfo {
	return delta.VethInfo{Name: f.name, Index: int(f.index), Alias: alias,
		Up: !f.link.Down, Group: f.group, MAC: f.link.MAC, MTU: f.link.MTU,
		RPFilter: f.rpFilter, Forwarding: f.forwarding, AcceptRA: f.link.AcceptRA, NoIPv6: f.link.NoIPv6}
}

// RetryDump retries a dump that changed during the read.
// After ten interruptions RetryDump returns the last result, which is complete enough.
// The next pass sees the recent changes that this result misses.
func RetryDump[T any](dump func() ([]T, error)) ([]T, error) {
	var out []T
	var err error
	for range 10 {
		if out, err = dump(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return out, err
		}
	}
	return out, nil
}

// vethInfo returns the device of one host end, without its addresses and routes.
func (n *Netns) vethInfo(name string) (p delta.VethInfo, err error) {
	err = n.rt.link(0, name, func(body []byte) { p = parseLink(body).port(delta.EndpointAlias{}) })
	return p, err
}

// CheckEndpoint implements Kernel.
func (n *Netns) CheckEndpoint(ctx context.Context, path string, p delta.Endpoint) error {
	host, err := n.handle()
	if err != nil {
		return err
	}
	defer host.Close()
	var errs []error
	differ := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }
	errs = append(errs, n.checkHost(host, p.Veth()))
	inside, err := netns.GetFromPath(path)
	if err != nil {
		differ("open network namespace %s: %w", path, err)
		return errors.Join(errs...)
	}
	defer inside.Close()
	h, err := netlink.NewHandleAt(inside, unix.NETLINK_ROUTE)
	if err != nil {
		differ("netlink socket in %s: %w", path, err)
		return errors.Join(errs...)
	}
	defer h.Close()
	errs = append(errs, checkInside(h, p))
	return errors.Join(errs...)
}

// checkHost checks the routes that packets take, not Lariat's own routes.
// A foreign route may be more specific, or a foreign routing rule may come first.
func (n *Netns) checkHost(host *netlink.Handle, want delta.VethInfo) error {
	n.mu.Lock()
	have, err := n.vethInfo(want.Name)
	n.mu.Unlock()
	if err != nil {
		return fmt.Errorf("the host's end %s: %w", want.Name, err)
	}
	var errs []error
	differ := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }
	if want.Gateway6 {
		addrs, err := RetryDump(func() ([]netlink.Addr, error) {
			return host.AddrList(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: have.Index}}, netlink.FAMILY_V6)
		})
		if err != nil {
			differ("addresses of %s: %w", want.Name, err)
		}
		have.Gateway6 = slices.ContainsFunc(addrs, func(a netlink.Addr) bool {
			return a.IPNet.String() == delta.GatewayAddress6.String()
		})
	}
	have.Routes = want.Routes
	for _, fault := range have.Faults(want) {
		differ("the host lacks: %s", fault)
	}
	for dst := range want.Routes {
		routes, err := host.RouteGet(dst.Addr().AsSlice())
		if err != nil {
			differ("the host's route to %s: %w", dst.Addr(), err)
		} else if len(routes) == 0 || routes[0].LinkIndex != have.Index {
			differ("the host does not route %s to %s", dst.Addr(), want.Name)
		}
	}
	return errors.Join(errs...)
}

func checkInside(h *netlink.Handle, p delta.Endpoint) error {
	lo, err := h.LinkByIndex(1)
	if err != nil {
		return fmt.Errorf("lo in the container: %w", err)
	}
	if lo.Attrs().Flags&net.FlagUp == 0 {
		return errors.New("lo in the container is down")
	}
	link, err := h.LinkByName(p.IfName)
	if err != nil {
		return fmt.Errorf("%s in the container: %w", p.IfName, err)
	}
	var errs []error
	differ := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }
	attrs := link.Attrs()
	if attrs.Flags&net.FlagUp == 0 {
		differ("%s is down", p.IfName)
	}
	if got := attrs.HardwareAddr.String(); got != p.MAC.String() {
		differ("%s has the MAC %s, not %s", p.IfName, got, p.MAC)
	}
	if p.MTU != 0 && attrs.MTU != p.MTU {
		differ("%s has the MTU %d, not %d", p.IfName, attrs.MTU, p.MTU)
	}
	addrs, err := RetryDump(func() ([]netlink.Addr, error) { return h.AddrList(link, netlink.FAMILY_ALL) })
	if err != nil {
		differ("addresses of %s: %w", p.IfName, err)
	}
	for _, want := range p.Addrs {
		if !slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return a.IP.Equal(want.AsSlice()) }) {
			differ("%s has lost its address %s", p.IfName, want)
		}
	}
	neighs, err := RetryDump(func() ([]netlink.Neigh, error) { return h.NeighList(attrs.Index, netlink.FAMILY_ALL) })
	if err != nil {
		differ("neighbours of %s: %w", p.IfName, err)
	}
	for _, g := range p.Gateways {
		if !slices.ContainsFunc(neighs, func(x netlink.Neigh) bool {
			return x.IP.Equal(g.AsSlice()) && x.HardwareAddr.String() == p.HostMAC.String() && x.State&netlink.NUD_PERMANENT != 0
		}) {
			differ("%s has lost the neighbour entry of its gateway %s", p.IfName, g)
		}
	}
	for _, want := range p.Routes {
		ok, err := hasRoute(h, attrs.Index, want)
		if err != nil {
			differ("route %s: %w", want.Dst, err)
		} else if !ok {
			differ("the route %s via %s dev %s is missing", want.Dst, want.Via, p.IfName)
		}
	}
	return errors.Join(errs...)
}

func hasRoute(h *netlink.Handle, index int, want delta.EndpointRoute) (bool, error) {
	family, table := netlink.FAMILY_V4, want.Table
	if want.Dst.Addr().Is6() {
		family = netlink.FAMILY_V6
	}
	if table == 0 {
		table = unix.RT_TABLE_MAIN
	}
	routes, err := RetryDump(func() ([]netlink.Route, error) {
		return h.RouteListFiltered(family, &netlink.Route{LinkIndex: index, Table: table},
			netlink.RT_FILTER_OIF|netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(routes, func(r netlink.Route) bool {
		if !r.Gw.Equal(want.Via.AsSlice()) {
			return false
		}
		if r.Dst == nil {
			return want.Dst.Bits() == 0
		}
		ones, _ := r.Dst.Mask.Size()
		return ones == want.Dst.Bits() && r.Dst.IP.Equal(want.Dst.Addr().AsSlice())
	}), nil
}
