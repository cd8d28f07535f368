package kernel

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/delta"
)

// hostLinkLocal is the IPv6 gateway's address on the host's end of every port.
var hostLinkLocal = netip.MustParsePrefix("fe80::1/64")

// AddPort implements Kernel.
//
// Both ends are made by one message, the container's already in its own namespace, each with its MAC: set later, udev's
// MACAddressPolicy may replace it. Everything inside is then done by one more socket; no sysctl is written on the way.
func (n *Netns) AddPort(ctx context.Context, path string, p delta.Port) (err error) {
	inside, err := netns.GetFromPath(path)
	if err != nil {
		return fmt.Errorf("open network namespace %s: %w", path, err)
	}
	defer inside.Close()
	host, err := n.handle()
	if err != nil {
		return err
	}
	defer host.Close()
	if err := createPair(host, inside, p); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, deletePort(host, p.HostName))
		}
	}()
	if err := hostEnd(host, p); err != nil {
		return err
	}
	return insideEnd(inside, path, p)
}

func createPair(host *netlink.Handle, inside netns.NsHandle, p delta.Port) error {
	veth := &netlink.Veth{
		LinkAttrs:        netlink.LinkAttrs{Name: p.HostName, MTU: p.MTU, HardwareAddr: p.HostMAC[:], Group: delta.PortGroup, TxQLen: -1},
		PeerName:         p.IfName,
		PeerHardwareAddr: p.MAC[:],
		PeerMTU:          uint32(p.MTU),
		PeerNamespace:    netlink.NsFd(inside),
	}
	err := host.LinkAdd(veth)
	if errors.Is(err, unix.EEXIST) {
		// Either our end is left over from a killed ADD, or the container has such an interface.
		if _, gerr := host.LinkByName(p.HostName); gerr == nil {
			if err := deletePort(host, p.HostName); err != nil {
				return fmt.Errorf("replace the dangling %s: %w", p.HostName, err)
			}
			err = host.LinkAdd(veth)
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

func hostEnd(host *netlink.Handle, p delta.Port) error {
	link, err := host.LinkByName(p.HostName)
	if err != nil {
		return fmt.Errorf("find veth %s: %w", p.HostName, err)
	}
	if err := host.LinkSetAlias(link, p.Alias); err != nil {
		return fmt.Errorf("name %s for its owner: %w", p.HostName, err)
	}
	v6 := slices.ContainsFunc(p.Addrs, netip.Addr.Is6)
	if v6 {
		addr := &netlink.Addr{IPNet: ipNet(hostLinkLocal), Flags: unix.IFA_F_NODAD}
		if err := host.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("give %s the gateway address %s: %w", p.HostName, hostLinkLocal, err)
		}
	}
	if err := host.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", p.HostName, err)
	}
	for _, a := range p.Addrs {
		route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(netip.PrefixFrom(a, a.BitLen())), Protocol: delta.Protocol}
		if a.Is4() {
			route.Scope = netlink.SCOPE_LINK
		}
		if err := host.RouteReplace(route); err != nil {
			return fmt.Errorf("route %s to %s: %w", a, p.HostName, err)
		}
	}
	return nil
}

func insideEnd(inside netns.NsHandle, path string, p delta.Port) error {
	h, err := netlink.NewHandleAt(inside, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("netlink socket in %s: %w", path, err)
	}
	defer h.Close()
	link, err := h.LinkByName(p.IfName)
	if err != nil {
		return fmt.Errorf("find %s in the container: %w", p.IfName, err)
	}
	index := link.Attrs().Index
	for _, a := range p.Addrs {
		addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(a, a.BitLen()))}
		if a.Is6() {
			addr.Flags = unix.IFA_F_NODAD // the address is ours alone by construction, and waiting costs seconds
		}
		err := h.AddrAdd(link, addr)
		if a.Is6() && (errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM)) {
			// Some runtimes switch IPv6 off by default in the namespaces that they make.
			if err = enableIPv6(path, p.IfName); err == nil {
				err = h.AddrAdd(link, addr)
			}
		}
		if err != nil {
			return fmt.Errorf("give %s the address %s: %w", p.IfName, a, err)
		}
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", p.IfName, err)
	}
	for _, g := range p.Gateways {
		neigh := &netlink.Neigh{LinkIndex: index, State: netlink.NUD_PERMANENT, IP: g.AsSlice(), HardwareAddr: p.HostMAC[:]}
		if err := h.NeighSet(neigh); err != nil {
			return fmt.Errorf("neighbour %s of %s: %w", g, p.IfName, err)
		}
		if g.Is4() {
			on := &netlink.Route{LinkIndex: index, Dst: ipNet(netip.PrefixFrom(g, 32)), Scope: netlink.SCOPE_LINK}
			if err := h.RouteReplace(on); err != nil {
				return fmt.Errorf("route to the gateway %s: %w", g, err)
			}
		}
	}
	for _, r := range p.Routes {
		if err := h.RouteReplace(portRoute(index, r)); err != nil {
			return fmt.Errorf("route %s via %s: %w", r.Dst, r.Via, err)
		}
	}
	return nil
}

func portRoute(index int, r delta.PortRoute) *netlink.Route {
	return &netlink.Route{LinkIndex: index, Dst: ipNet(r.Dst), Gw: r.Via.AsSlice(), Flags: int(netlink.FLAG_ONLINK),
		MTU: r.MTU, AdvMSS: r.AdvMSS, Priority: r.Priority, Table: r.Table}
}

func enableIPv6(path, ifname string) error {
	return ns.WithNetNSPath(path, func(ns.NetNS) error {
		return os.WriteFile("/proc/sys/net/ipv6/conf/"+ifname+"/disable_ipv6", []byte("0"), 0)
	})
}

// DelPort implements Kernel.
func (n *Netns) DelPort(ctx context.Context, hostName string) error {
	h, err := n.handle()
	if err != nil {
		return err
	}
	defer h.Close()
	return deletePort(h, hostName)
}

// deletePort asks by name: one message, no look-up before it.
func deletePort(h *netlink.Handle, name string) error {
	err := h.LinkDel(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Name: name}})
	var missing netlink.LinkNotFoundError
	if err != nil && !errors.Is(err, unix.ENODEV) && !errors.As(err, &missing) {
		return fmt.Errorf("remove %s: %w", name, err)
	}
	return nil
}

// DelPorts implements Kernel: the links are put into a group of their own, and the group is deleted.
func (n *Netns) DelPorts(ctx context.Context, names []string) error {
	if len(names) == 0 {
		return nil
	}
	h, err := n.handle()
	if err != nil {
		return err
	}
	defer h.Close()
	if len(names) == 1 {
		return deletePort(h, names[0])
	}
	group := delta.Protocol<<24 | rand.IntN(1<<24)
	var errs []error
	found := 0
	for _, name := range names {
		link, err := h.LinkByName(name)
		var missing netlink.LinkNotFoundError
		if errors.As(err, &missing) {
			continue
		}
		if err == nil {
			err = h.LinkSetGroup(link, group)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("remove %s: %w", name, err))
			continue
		}
		found++
	}
	if found > 0 {
		if err := n.deleteGroup(group); err != nil {
			errs = append(errs, fmt.Errorf("remove %d ports: %w", found, err))
		}
	}
	return errors.Join(errs...)
}

// Joined implements Kernel.
func (n *Netns) Joined(ctx context.Context, device string, addrs []netip.Addr) (bool, error) {
	h, err := n.handle()
	if err != nil {
		return false, err
	}
	defer h.Close()
	if device != "" {
		link, err := h.LinkByName(device)
		var missing netlink.LinkNotFoundError
		if errors.As(err, &missing) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("look for %s: %w", device, err)
		}
		if link.Attrs().Flags&net.FlagUp == 0 || !strings.HasPrefix(link.Attrs().Alias, delta.AliasPrefix) {
			return false, nil
		}
	}
	for _, a := range addrs {
		routes, err := h.RouteGet(a.AsSlice())
		if err != nil || len(routes) == 0 || routes[0].Type != unix.RTN_LOCAL {
			return false, nil // no route at all is no error: it says the same
		}
	}
	return true, nil
}

// Ports implements Kernel.
func (n *Netns) Ports(ctx context.Context) ([]delta.HostPort, error) {
	h, err := n.handle()
	if err != nil {
		return nil, err
	}
	defer h.Close()
	links, err := retryDump(h.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list ports: %w", err)
	}
	var out []delta.HostPort
	for _, l := range links {
		if !strings.HasPrefix(l.Attrs().Name, delta.PortPrefix) {
			continue
		}
		if alias, ok := delta.ParsePortAlias(l.Attrs().Alias); ok {
			out = append(out, delta.HostPort{Name: l.Attrs().Name, Index: l.Attrs().Index, Alias: alias})
		}
	}
	return out, nil
}

// retryDump repeats a dump that changed while it was read. One that was interrupted over and over is complete enough: what it
// missed changed a moment ago, and will be seen by the next pass.
func retryDump[T any](dump func() ([]T, error)) ([]T, error) {
	var out []T
	var err error
	for range 10 {
		if out, err = dump(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return out, err
		}
	}
	return out, nil
}

// CheckPort implements Kernel.
func (n *Netns) CheckPort(ctx context.Context, path string, p delta.Port) error {
	host, err := n.handle()
	if err != nil {
		return err
	}
	defer host.Close()
	var errs []error
	differ := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }
	if link, err := host.LinkByName(p.HostName); err != nil {
		differ("the host's end %s: %w", p.HostName, err)
	} else {
		if link.Attrs().Flags&net.FlagUp == 0 {
			differ("the host's end %s is down", p.HostName)
		}
		for _, a := range p.Addrs {
			routes, err := host.RouteGet(a.AsSlice())
			if err != nil {
				differ("the host's route to %s: %w", a, err)
			} else if len(routes) == 0 || routes[0].LinkIndex != link.Attrs().Index {
				differ("the host does not route %s to %s", a, p.HostName)
			}
		}
	}
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

func checkInside(h *netlink.Handle, p delta.Port) error {
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
	addrs, err := retryDump(func() ([]netlink.Addr, error) { return h.AddrList(link, netlink.FAMILY_ALL) })
	if err != nil {
		differ("addresses of %s: %w", p.IfName, err)
	}
	for _, want := range p.Addrs {
		if !slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return a.IP.Equal(want.AsSlice()) }) {
			differ("%s has lost its address %s", p.IfName, want)
		}
	}
	neighs, err := retryDump(func() ([]netlink.Neigh, error) { return h.NeighList(attrs.Index, netlink.FAMILY_ALL) })
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

func hasRoute(h *netlink.Handle, index int, want delta.PortRoute) (bool, error) {
	family, table := netlink.FAMILY_V4, want.Table
	if want.Dst.Addr().Is6() {
		family = netlink.FAMILY_V6
	}
	if table == 0 {
		table = unix.RT_TABLE_MAIN
	}
	routes, err := retryDump(func() ([]netlink.Route, error) {
		return h.RouteListFiltered(family, &netlink.Route{LinkIndex: index, Table: table}, netlink.RT_FILTER_OIF|netlink.RT_FILTER_TABLE)
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

// deleteGroup is RTM_DELLINK by IFLA_GROUP, which the netlink library has no call for. The kernel unregisters all members in one
// go, and waits for RCU once.
func (n *Netns) deleteGroup(group int) error {
	return n.do(func() error {
		req := nl.NewNetlinkRequest(unix.RTM_DELLINK, unix.NLM_F_ACK)
		req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
		req.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(uint32(group))))
		_, err := req.Execute(unix.NETLINK_ROUTE, 0)
		return err
	})
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
