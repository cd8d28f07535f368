package kernel

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// Underlays lists the addresses of the current network namespace that could carry tunnels.
// The addresses are global and permanent, on devices that are up.
// Underlays leaves out the loopback and Lariat's own devices.
// It sorts by device, then address, IPv4 first.
func Underlays() ([]metadata.Underlay, error) {
	addrs, err := RetryDump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	links := map[int]netlink.Link{}
	var out []metadata.Underlay
	for _, a := range addrs {
		ip, ok := netip.AddrFromSlice(a.IP)
		ip = ip.Unmap()
		if !ok || a.Scope != int(netlink.SCOPE_UNIVERSE) || ip.IsLinkLocalUnicast() || ip.IsLoopback() {
			continue
		}
		if ip.Is6() && a.Flags&(unix.IFA_F_TEMPORARY|unix.IFA_F_DEPRECATED) != 0 {
			continue // it will vanish soon
		}
		link, known := links[a.LinkIndex]
		if !known {
			if link, err = netlink.LinkByIndex(a.LinkIndex); err != nil {
				var gone netlink.LinkNotFoundError
				if errors.As(err, &gone) {
					continue
				}
				return nil, fmt.Errorf("device %d of address %s: %w", a.LinkIndex, ip, err)
			}
			links[a.LinkIndex] = link
		}
		attrs := link.Attrs()
		if attrs.Flags&net.FlagUp == 0 || attrs.Flags&net.FlagLoopback != 0 ||
			strings.HasPrefix(attrs.Alias, delta.AliasPrefix) {
			continue
		}
		bits, _ := a.Mask.Size()
		out = append(out, metadata.Underlay{Address: netip.PrefixFrom(ip, bits), Device: attrs.Name, MTU: attrs.MTU})
	}
	slices.SortFunc(out, func(a, b metadata.Underlay) int {
		return cmp.Or(cmp.Compare(a.Device, b.Device), a.Address.Addr().Compare(b.Address.Addr()))
	})
	return out, nil
}

// foreignProtocols are the protocols of routes that somebody configured.
// The routes of routing daemons are left out, because they change by the thousand.
var foreignProtocols = []byte{unix.RTPROT_KERNEL, unix.RTPROT_BOOT, unix.RTPROT_STATIC, unix.RTPROT_RA,
	unix.RTPROT_DHCP}

// Foreign lists routes of the main table in the current network namespace.
// It lists the routes to links and the routes by gateways.
// No network of Lariat should use the addresses of these routes.
// Foreign leaves out the underlay's links, default routes and similarly wide routes.
// It also leaves out single addresses and the links' own addresses.
// Links come first. Foreign cuts the list at metadata.MaxForeign.
func Foreign(underlay []metadata.Underlay) ([]metadata.Foreign, error) {
	s, err := openSocket(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	defer s.close()
	name := func(index uint32) string { return deviceName(s.fd, index) }
	out, err := RetryDump(func() (list []metadata.Foreign, err error) {
		for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
			for _, protocol := range foreignProtocols {
				derr := s.dump(unix.RTM_GETROUTE, func(m *message) {
					m.raw(family, 0, 0, 0, unix.RT_TABLE_MAIN, protocol, 0, 0)
					m.rawU32(0)
				}, func(_ uint16, body []byte) {
					f, ok := parseForeign(body, name)
					ours := slices.ContainsFunc(underlay, func(u metadata.Underlay) bool {
						return !f.Via.IsValid() && f.Prefix == u.Address.Masked() && f.Device == u.Device
					})
					if ok && !ours && !slices.Contains(list, f) {
						list = append(list, f)
					}
				})
				switch {
				case errors.Is(derr, errInterrupted):
					err = netlink.ErrDumpInterrupted
				case derr != nil && !errors.Is(derr, unix.ENOENT) && !errors.Is(derr, unix.EOPNOTSUPP):
					return nil, derr
				}
			}
		}
		return list, err
	})
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	slices.SortFunc(out, func(a, b metadata.Foreign) int {
		if a.Via.IsValid() != b.Via.IsValid() {
			return map[bool]int{false: -1, true: 1}[a.Via.IsValid()]
		}
		return cmp.Or(a.Prefix.Compare(b.Prefix), cmp.Compare(a.Device, b.Device), a.Via.Compare(b.Via))
	})
	return out[:min(len(out), metadata.MaxForeign)], nil
}

func parseForeign(body []byte, name func(index uint32) string) (f metadata.Foreign, ok bool) {
	if len(body) < unix.SizeofRtMsg || body[4] != unix.RT_TABLE_MAIN || body[7] != unix.RTN_UNICAST ||
		!slices.Contains(foreignProtocols, body[5]) || binary.NativeEndian.Uint32(body[8:])&unix.RTM_F_CLONED != 0 {
		return f, false
	}
	var dst netip.Addr
	var oif uint32
	read := func(in []byte) {
		for a := newAttrs(in); a.next(); {
			switch a.typ {
			case unix.RTA_DST:
				dst = a.addr()
			case unix.RTA_GATEWAY, unix.RTA_VIA:
				f.Via = a.gateway()
			case unix.RTA_OIF:
				oif = a.u32()
			}
		}
	}
	read(body[unix.SizeofRtMsg:])
	for a := newAttrs(body[unix.SizeofRtMsg:]); a.next(); {
		if a.typ == unix.RTA_MULTIPATH && len(a.value) >= unix.SizeofRtNexthop { // use the first nexthop only
			oif = binary.NativeEndian.Uint32(a.value[4:])
			n := int(binary.NativeEndian.Uint16(a.value))
			read(a.value[unix.SizeofRtNexthop:max(unix.SizeofRtNexthop, min(n, len(a.value)))])
		}
	}
	bits := int(body[1])
	if !dst.IsValid() || bits < 8 || bits == dst.BitLen() || dst.IsLinkLocalUnicast() || dst.IsMulticast() ||
		dst.IsLoopback() {
		return f, false
	}
	f.Prefix, f.Device = netip.PrefixFrom(dst, bits), name(oif)
	for _, own := range []string{delta.VethPrefix, delta.TunnelPrefix, delta.VTEPPrefix} {
		if strings.HasPrefix(f.Device, own) {
			return f, false
		}
	}
	return f, f.Device != ""
}

// Neighbour reports whether a host on a link has recently answered for an address.
func Neighbour(index int, a netip.Addr) bool {
	family := netlink.FAMILY_V4
	if a.Is6() {
		family = netlink.FAMILY_V6
	}
	list, err := RetryDump(func() ([]netlink.Neigh, error) { return netlink.NeighList(index, family) })
	const answered = netlink.NUD_REACHABLE | netlink.NUD_STALE | netlink.NUD_DELAY | netlink.NUD_PROBE
	return err == nil && slices.ContainsFunc(list, func(n netlink.Neigh) bool {
		return n.IP.Equal(a.AsSlice()) &&
			n.State&answered != 0
	})
}
