package kernel

import (
	"encoding/binary"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/delta"
)

// parseLink parses an RTM_NEWLINK.
// Other names the properties that Lariat's vxlan devices never have, in the words of ip.
func parseLink(body []byte) foundLink {
	var f foundLink
	if len(body) < unix.SizeofIfInfomsg {
		return f
	}
	f.index = binary.NativeEndian.Uint32(body[4:])
	f.link.NoIPv6 = true // without IPv6 the message has no such attribute
	f.link.Down = binary.NativeEndian.Uint32(body[8:])&unix.IFF_UP == 0
	var data []byte
	for a := newAttrs(body[unix.SizeofIfInfomsg:]); a.next(); {
		switch a.typ {
		case unix.IFLA_IFNAME:
			f.name = cstring(a.value)
		case unix.IFLA_MTU:
			f.link.MTU = int(a.u32())
		case unix.IFLA_ADDRESS:
			copy(f.link.MAC[:], a.value)
		case unix.IFLA_IFALIAS:
			f.link.Alias = cstring(a.value)
		case unix.IFLA_OPERSTATE:
			if len(a.value) == 1 {
				f.oper = a.value[0]
			}
		case unix.IFLA_GROUP:
			f.group = a.u32()
		case unix.IFLA_AF_SPEC:
			conf := parseConf(a.value)
			f.link.NoIPv6, f.link.AcceptRA = conf.disableIPv6, conf.acceptRA
			f.rpFilter, f.forwarding = conf.rpFilter, conf.forwarding
		case unix.IFLA_LINKINFO:
			for i := newAttrs(a.value); i.next(); {
				switch i.typ {
				case unix.IFLA_INFO_KIND:
					f.kind = cstring(i.value)
				case unix.IFLA_INFO_DATA:
					data = i.value
				}
			}
		}
	}
	f.link.Kind = f.kind
	switch f.kind {
	case delta.KindVXLAN:
		parseVXLAN(&f.link, data)
	case delta.KindXFRM:
		f.link.MAC = delta.MAC{} // the kernel sets a random MAC and never uses it
		f.link.Group = f.group
		parseXFRM(&f.link, data)
	}
	return f
}

// link requests one link by its index, or by its name when the index is 0.
func (s *socket) link(index uint32, name string, each func(body []byte)) error {
	ask := func(m *message) { askLink(m, index, name) }
	return s.get(unix.RTM_GETLINK, ask, func(_ uint16, body []byte) { each(body) })
}

func askLink(m *message, index uint32, name string) {
	m.raw(0, 0, 0, 0)
	m.rawU32(index)
	m.raw(make([]byte, unix.SizeofIfInfomsg-8)...)
	if name != "" {
		m.string(unix.IFLA_IFNAME, name)
	}
}

// deviceConf keeps the settings in a link's message.
// The same settings are below /proc/sys/net/{ipv4,ipv6}/conf.
type deviceConf struct {
	rpFilter, acceptRA      int
	forwarding, disableIPv6 bool
}

// parseConf parses IFLA_AF_SPEC. include/uapi/linux/ip.h and include/uapi/linux/ipv6.h have the
// indexes of its arrays. The indexes of ip.h start at 1.
func parseConf(spec []byte) deviceConf {
	const (
		conf        = 1 // IFLA_INET_CONF
		conf6       = 2 // IFLA_INET6_CONF
		acceptRA    = 3
		disableIPv6 = 26
	)
	at := func(values []byte, i int) int {
		if len(values) < 4*(i+1) {
			return 0
		}
		return int(int32(binary.NativeEndian.Uint32(values[4*i:])))
	}
	c := deviceConf{disableIPv6: true}
	for family := newAttrs(spec); family.next(); {
		for a := newAttrs(family.value); a.next(); {
			switch {
			case family.typ == unix.AF_INET && a.typ == conf:
				c.rpFilter, c.forwarding = at(a.value, rpFilter-1), at(a.value, ipv4Forwarding-1) != 0
			case family.typ == unix.AF_INET6 && a.typ == conf6:
				c.acceptRA, c.disableIPv6 = at(a.value, acceptRA), at(a.value, disableIPv6) != 0
			}
		}
	}
	return c
}

// Operational states, of include/uapi/linux/if.h.
const operUnknown, operUp = 0, 6

// IPV4_DEVCONF_FORWARDING and IPV4_DEVCONF_RP_FILTER of include/uapi/linux/ip.h.
const (
	ipv4Forwarding = 1
	rpFilter       = 8
)

func parseVXLAN(l *delta.Link, data []byte) {
	var other []string
	flag := func(set bool, word string) {
		if set {
			other = append(other, word)
		}
	}
	for a := newAttrs(data); a.next(); {
		switch a.typ {
		case unix.IFLA_VXLAN_ID:
			l.VNI = a.u32()
		case unix.IFLA_VXLAN_PORT:
			l.Port = a.u16be()
		case unix.IFLA_VXLAN_LOCAL, unix.IFLA_VXLAN_LOCAL6:
			l.Local = a.addr()
		case unix.IFLA_VXLAN_GROUP, unix.IFLA_VXLAN_GROUP6:
			other = append(other, "remote "+a.addr().String())
		case unix.IFLA_VXLAN_LINK:
			flag(a.u32() != 0, "dev")
		case unix.IFLA_VXLAN_LEARNING:
			flag(a.u8() != 0, "learning")
		case unix.IFLA_VXLAN_PROXY:
			flag(a.u8() != 0, "proxy")
		case unix.IFLA_VXLAN_RSC:
			flag(a.u8() != 0, "rsc")
		case unix.IFLA_VXLAN_L2MISS:
			flag(a.u8() != 0, "l2miss")
		case unix.IFLA_VXLAN_L3MISS:
			flag(a.u8() != 0, "l3miss")
		case unix.IFLA_VXLAN_COLLECT_METADATA:
			flag(a.u8() != 0, "external")
		case unix.IFLA_VXLAN_GBP:
			other = append(other, "gbp")
		case unix.IFLA_VXLAN_GPE:
			other = append(other, "gpe")
		case unix.IFLA_VXLAN_LIMIT:
			flag(a.u32() != 0, "maxaddress")
		case unix.IFLA_VXLAN_UDP_CSUM:
			flag(a.u8() == 0, "noudpcsum")
		}
	}
	l.Other = strings.Join(other, " ")
}

// Attributes of an XFRM interface (Linux 4.19, include/uapi/linux/if_link.h).
const (
	iflaXFRMLink     = 1
	iflaXFRMIfID     = 2
	iflaXFRMMetadata = 3
)

func parseXFRM(l *delta.Link, data []byte) {
	for a := newAttrs(data); a.next(); {
		switch {
		case a.typ == iflaXFRMIfID:
			l.IfID = a.u32()
		case a.typ == iflaXFRMLink && a.u32() != 0:
			l.Other = "dev"
		case a.typ == iflaXFRMMetadata:
			l.Other = "external"
		}
	}
}

// createLink writes the message that creates a device. The message includes the MAC.
// udev may replace a MAC that is set later (MACAddressPolicy=persistent).
// The forwarding entries of every peer are then wrong (flannel-io/flannel#1155).
func createLink(m *message, name string, l delta.Link) {
	m.begin(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	m.raw(make([]byte, unix.SizeofIfInfomsg)...)
	m.string(unix.IFLA_IFNAME, name)
	if l.Kind == delta.KindVXLAN {
		m.bytes(unix.IFLA_ADDRESS, l.MAC[:])
	}
	if l.MTU != 0 {
		m.u32(unix.IFLA_MTU, uint32(l.MTU))
	}
	if l.Group != 0 {
		m.u32(unix.IFLA_GROUP, l.Group)
	}
	info := m.nest(unix.IFLA_LINKINFO)
	m.bytes(unix.IFLA_INFO_KIND, []byte(l.Kind))
	data := m.nest(unix.IFLA_INFO_DATA)
	switch l.Kind {
	case delta.KindXFRM:
		// Bind the interface to no device.
		// The outer packets follow the current routes of the underlay.
		m.u32(iflaXFRMIfID, l.IfID)
	case delta.KindVXLAN:
		m.u32(unix.IFLA_VXLAN_ID, l.VNI)
		m.u16be(unix.IFLA_VXLAN_PORT, l.Port)
		m.u8(unix.IFLA_VXLAN_LEARNING, 0)
		if l.Local.Is4() {
			m.addr(unix.IFLA_VXLAN_LOCAL, l.Local)
		} else if l.Local.IsValid() {
			m.addr(unix.IFLA_VXLAN_LOCAL6, l.Local)
		}
	}
	m.end(data)
	m.end(info)
}

// changeLink begins a message that changes a device in place.
func changeLink(m *message, index uint32, flags, mask uint32) {
	m.begin(unix.RTM_NEWLINK, 0)
	m.raw(0, 0, 0, 0)
	m.rawU32(index)
	m.rawU32(flags)
	m.rawU32(mask)
}

// noLinkLocal keeps the kernel from generating a link-local address.
// The kernel would run duplicate address detection for a second.
// Until then the kernel sends no packets from that address.
// The planners name the address, and Apply adds it without the detection.
func noLinkLocal(m *message, index uint32) {
	const in6AddrGenModeNone = 1
	changeLink(m, index, 0, 0)
	spec := m.nest(unix.IFLA_AF_SPEC)
	v6 := m.nest(unix.AF_INET6)
	m.u8(unix.IFLA_INET6_ADDR_GEN_MODE, in6AddrGenModeNone)
	m.end(v6)
	m.end(spec)
}
