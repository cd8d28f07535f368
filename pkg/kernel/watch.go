package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/delta"
)

// An EventKind is the kind of the object that changed.
type EventKind string

// The kinds of events.
const (
	EventLink    EventKind = "link"
	EventAddr    EventKind = "addr"
	EventNeigh   EventKind = "neigh" // also forwarding entries
	EventRoute   EventKind = "route"
	EventNexthop EventKind = "nexthop"
	EventNft     EventKind = "nft"
	EventBridge  EventKind = "bridge" // a foreign bridge
	EventPort    EventKind = "port"   // a host end lost a property
	EventSysctl  EventKind = "sysctl" // forwarding or the reverse-path check of all devices, or of new devices
	EventResync  EventKind = "resync" // events were lost, because the reader was too slow
)

// An Event says that any process changed an object. It does not hold the new state of the object.
type Event struct {
	Kind EventKind
	Name string // a device, destination, or nftables table; empty when unknown
}

// String returns the kind and the name.
func (e Event) String() string { return strings.TrimSpace(string(e.Kind) + " " + e.Name) }

// quiet is the time in which events are collected before they are passed on.
// A process that changes one object mostly changes many.
const quiet = 10 * time.Millisecond

// Watch reports changes of Lariat's objects in the current network namespace.
// It also reports changes of foreign links and addresses, because the underlay is among them.
// Watch does not report the creation and removal of host ends, but it reports lost properties.
// It merges equal events within some milliseconds. It closes the channel when ctx ends.
//
// Watch also reports Lariat's own changes. The pass that follows finds nothing to do.
func Watch(ctx context.Context) (<-chan Event, error) {
	rt, err := subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH, unix.RTNLGRP_IPV4_IFADDR,
		unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_NETCONF)
	if err != nil {
		return nil, fmt.Errorf("watch the kernel: %w", err)
	}
	raw, err := rt.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("watch the kernel: %w", err)
	}
	// Older kernels without nexthop objects or nftables send no such events.
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, unix.RTNLGRP_NEXTHOP)
	})
	w := &watcher{pending: map[Event]struct{}{}, notify: make(chan struct{}, 1),
		owned: map[uint32]string{}, macs: map[uint32]delta.MAC{}}
	if err := w.learn(); err != nil {
		rt.Close()
		return nil, fmt.Errorf("watch the kernel: %w", err)
	}
	sockets := []*os.File{rt}
	var readers sync.WaitGroup
	readers.Go(func() { w.read(rt, w.route) })
	if nf, err := subscribe(unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTABLES); err == nil {
		sockets = append(sockets, nf)
		readers.Go(func() { w.read(nf, w.nft) })
	}
	if fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err == nil {
		readers.Go(func() { w.legacy(ctx, fd) })
	}
	out := make(chan Event)
	go func() {
		defer close(out)
		w.forward(ctx, out)
		for _, s := range sockets {
			s.Close() // ends the reader
		}
		readers.Wait()
		_ = w.names.close()
	}()
	return out, nil
}

func subscribe(family int, groups ...int) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, family)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	f := os.NewFile(uintptr(fd), "netlink")
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		f.Close()
		return nil, os.NewSyscallError("bind", err)
	}
	const size = 1 << 20
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, size) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, size)
	}
	for _, g := range groups {
		if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, g); err != nil {
			f.Close()
			return nil, os.NewSyscallError("join netlink group", err)
		}
	}
	return f, nil
}

type watcher struct {
	mu      sync.Mutex
	pending map[Event]struct{}
	notify  chan struct{}

	// Only the reader of routes uses these fields.
	owned map[uint32]string    // Lariat's devices by index, without host ends
	macs  map[uint32]delta.MAC // known MACs of host ends, by index
	names *socket              // for lookups of device names in the namespace of Watch's caller
}

// learn finds the existing devices of Lariat.
func (w *watcher) learn() (err error) {
	if w.names, err = openSocket(unix.NETLINK_ROUTE); err != nil {
		return err
	}
	for _, kind := range linkKinds {
		err = w.names.dump(unix.RTM_GETLINK, func(m *message) { allOfKind(m, kind) }, func(_ uint16, body []byte) {
			if f := parseLink(body); f.kind == kind && strings.HasPrefix(f.link.Alias, delta.AliasPrefix) {
				w.owned[f.index] = f.name
			}
		})
		if err != nil && !errors.Is(err, errInterrupted) {
			return err
		}
	}
	return nil
}

func (w *watcher) add(kind EventKind, name string) {
	w.mu.Lock()
	w.pending[Event{kind, name}] = struct{}{}
	w.mu.Unlock()
	select {
	case w.notify <- struct{}{}:
	default:
	}
}

func (w *watcher) forward(ctx context.Context, out chan<- Event) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.notify:
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(quiet):
		}
		w.mu.Lock()
		events := w.pending
		w.pending = make(map[Event]struct{}, len(events))
		w.mu.Unlock()
		for e := range events {
			select {
			case <-ctx.Done():
				return
			case out <- e:
			}
		}
	}
}

func (w *watcher) read(f *os.File, each func(typ uint16, body []byte)) {
	receive(f, each, func() { w.add(EventResync, "") })
}

// receive calls each with every message until the socket is closed.
// It calls lost when messages did not fit into the receive buffer.
func receive(f *os.File, each func(typ uint16, body []byte), lost func()) {
	buf := make([]byte, 64<<10)
	for {
		n, err := f.Read(buf)
		switch {
		case errors.Is(err, os.ErrClosed):
			return
		case err != nil: // ENOBUFS
			lost()
			continue
		}
		split(buf[:n], each)
	}
}

// split calls each with every message in the buffer.
func split(in []byte, each func(typ uint16, body []byte)) {
	for len(in) >= unix.NLMSG_HDRLEN {
		h := header(in)
		n := h.length()
		if n < unix.NLMSG_HDRLEN || n > len(in) {
			break
		}
		each(h.typ(), in[unix.NLMSG_HDRLEN:n])
		in = in[min(align(n), len(in)):]
	}
}

func (w *watcher) route(typ uint16, body []byte) {
	switch typ {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		if len(body) >= unix.SizeofIfInfomsg && body[0] == unix.AF_UNSPEC { // other families concern bridges only
			w.link(typ, binary.NativeEndian.Uint32(body[12:]), parseLink(body))
		}
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		if len(body) >= unix.SizeofIfAddrmsg {
			index, addr := parseAddr(body)
			// An ADD gives the host end this address and no other.
			lost := (typ == unix.RTM_DELADDR) == (addr == delta.GatewayAddress6)
			if name := w.device(index); !strings.HasPrefix(name, delta.VethPrefix) {
				w.add(EventAddr, name)
			} else if lost {
				w.add(EventPort, name)
			}
		}
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		if len(body) >= unix.SizeofNdMsg {
			if name, ok := w.owned[binary.NativeEndian.Uint32(body[4:])]; ok {
				w.add(EventNeigh, name)
			}
		}
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		o := observation{names: map[uint32]string{}, s: delta.NewState(), lookup: w.device,
			ports: map[string]map[netip.Prefix]delta.Route{}}
		o.route(body)
		if typ == unix.RTM_DELROUTE {
			for name := range o.ports {
				w.add(EventPort, name)
			}
		}
		for key, r := range o.s.Routes {
			// A route without a device name belonged to a removed host end.
			if r.NH != 0 || r.Type != "" || r.Dev != "" {
				w.add(EventRoute, key.Dst.String())
			}
		}
	case unix.RTM_NEWNETCONF:
		w.netconf(body)
	case unix.RTM_NEWNEXTHOP, unix.RTM_DELNEXTHOP:
		if len(body) >= sizeofNhMsg && body[2] == delta.Protocol {
			w.add(EventNexthop, "")
		}
	}
}

// netconf reports a setting of IPv4 that somebody disabled on a host end.
// It reports every change of such a setting of all devices or of new devices.
// It ignores the message of a new device, which has all settings.
func (w *watcher) netconf(body []byte) {
	const ( // include/uapi/linux/netconf.h
		header     = 4 // struct netconfmsg, aligned
		ifindex    = 1
		forwarding = 2
		rpFilter   = 3

		allDevices, newDevices = math.MaxUint32, math.MaxUint32 - 1 // -1 and -2
	)
	if len(body) < header {
		return
	}
	var index uint32
	settings, worse := 0, false
	for a := newAttrs(body[header:]); a.next(); {
		switch a.typ {
		case ifindex:
			index = a.u32()
		case forwarding, rpFilter:
			settings++
			worse = a.u32() != 1
		}
	}
	if settings != 1 {
		return
	}
	if index == allDevices || index == newDevices {
		w.add(EventSysctl, "")
	} else if name := w.device(index); worse && strings.HasPrefix(name, delta.VethPrefix) {
		w.add(EventPort, name)
	}
}

// port reports a host end that somebody set down or gave another group or MAC.
// It ignores the messages of ADD and DEL, which set the device up or announce a new device (~0).
func (w *watcher) port(typ uint16, change uint32, f foundLink) {
	if typ == unix.RTM_DELLINK {
		delete(w.macs, f.index)
		return
	}
	mac, known := w.macs[f.index]
	w.macs[f.index] = f.link.MAC
	_, ours := delta.ParseEndpointAlias(f.link.Alias)
	down := f.link.Down && change&unix.IFF_UP != 0
	if ours && change != math.MaxUint32 && (down || f.group != delta.OverlayLinkGroup || known && mac != f.link.MAC) {
		w.add(EventPort, f.name)
	}
}

func (w *watcher) link(typ uint16, change uint32, f foundLink) {
	ours := slices.Contains(linkKinds, f.kind) && strings.HasPrefix(f.link.Alias, delta.AliasPrefix)
	switch {
	case strings.HasPrefix(f.name, delta.VethPrefix):
		w.port(typ, change, f)
		return
	case ours && typ == unix.RTM_NEWLINK:
		w.owned[f.index] = f.name
	case typ == unix.RTM_DELLINK:
		delete(w.owned, f.index)
	}
	if f.kind == "bridge" {
		w.add(EventBridge, f.name)
	}
	w.add(EventLink, f.name)
}

func (w *watcher) device(index uint32) string {
	if name, ok := w.owned[index]; ok {
		return name
	}
	return deviceName(w.names.fd, index)
}

// nft reports all changes of Lariat's table.
// In foreign tables it reports changes of chains, and of iptables' rules in FORWARD.
// The policy of a foreign chain may drop all forwarded packets, as Docker's does.
// A rule in FORWARD accepts Lariat's packets.
func (w *watcher) nft(typ uint16, body []byte) {
	typ &= 0xff
	if typ == unix.NFT_MSG_NEWGEN || len(body) < 4 {
		return
	}
	var table, chain string
	for a := newAttrs(body[4:]); a.next(); {
		switch a.typ {
		case 1: // the table's name in all messages of nftables
			table = cstring(a.value)
		case unix.NFTA_RULE_CHAIN: // of rules
			chain = cstring(a.value)
		}
	}
	switch typ {
	case unix.NFT_MSG_NEWCHAIN, unix.NFT_MSG_DELCHAIN, unix.NFT_MSG_DELTABLE:
	case unix.NFT_MSG_NEWRULE, unix.NFT_MSG_DELRULE:
		if table != delta.Table && chain != "FORWARD" {
			return
		}
	default:
		if table != delta.Table {
			return
		}
	}
	w.add(EventNft, table)
}
