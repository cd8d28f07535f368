package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/delta"
)

// EventKind says what was touched.
type EventKind string

// The kinds of events. Resync means that the kernel had more to tell than the socket could hold: anything may have changed.
const (
	EventLink    EventKind = "link"
	EventAddr    EventKind = "addr"
	EventNeigh   EventKind = "neigh"
	EventRoute   EventKind = "route"
	EventNexthop EventKind = "nexthop"
	EventNft     EventKind = "nft"
	EventResync  EventKind = "resync"
)

// Event tells that something of ours, or something that we depend on, may have changed; Name is the device, a route's destination, or an nftables table, where there is one.
type Event struct {
	Kind EventKind
	Name string
}

// Watch reports changes of the calling goroutine's network namespace until the context ends; the channel is then closed. What
// concerns containers' ports alone is left out: their own ADD and DEL see to that, and there are many. A reader that falls behind
// loses nothing but count: what does not fit becomes one EventResync.
func Watch(ctx context.Context) (<-chan Event, error) {
	rt, err := listen(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_NEXTHOP)
	if err != nil {
		return nil, fmt.Errorf("watch links and routes: %w", err)
	}
	nf, err := listen(unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTABLES)
	if err != nil {
		rt.Close()
		return nil, fmt.Errorf("watch nftables: %w", err)
	}
	w := &watcher{events: make(chan Event, 256), fd: -1}
	if w.fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE); err != nil { // for names
		return nil, errors.Join(os.NewSyscallError("socket", err), rt.Close(), nf.Close())
	}
	stop := context.AfterFunc(ctx, func() { rt.Close(); nf.Close() })
	done := make(chan struct{}, 2)
	go func() { w.read(rt, w.route); done <- struct{}{} }()
	go func() { w.read(nf, w.nft); done <- struct{}{} }()
	go func() {
		<-done
		<-done
		stop()
		unix.Close(w.fd)
		close(w.events)
	}()
	return w.events, nil
}

// listen opens a socket in the current namespace, known to Go's poller so that Close ends a Read.
func listen(family int, groups ...uint32) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, family)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("bind", err)
	}
	for _, g := range groups {
		if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, int(g)); err != nil && g != unix.RTNLGRP_NEXTHOP {
			unix.Close(fd)
			return nil, os.NewSyscallError("setsockopt", err)
		}
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 4<<20)
	return os.NewFile(uintptr(fd), "netlink"), nil
}

type watcher struct {
	events chan Event
	fd     int
}

func (w *watcher) read(f *os.File, each func(h header, body []byte)) {
	buf := make([]byte, 1<<16)
	for {
		n, err := f.Read(buf)
		if errors.Is(err, unix.ENOBUFS) {
			w.tell(Event{Kind: EventResync})
			continue
		}
		if err != nil {
			return
		}
		for in := buf[:n]; len(in) >= unix.NLMSG_HDRLEN; {
			h := header(in)
			size := h.length()
			if size < unix.NLMSG_HDRLEN || size > len(in) {
				break
			}
			each(h, in[unix.NLMSG_HDRLEN:size])
			in = in[min(align(size), len(in)):]
		}
	}
}

// tell never blocks: a full channel is one whose reader will look at everything anyway.
func (w *watcher) tell(e Event) {
	select {
	case w.events <- e:
	default:
	}
}

func (w *watcher) route(h header, body []byte) {
	if len(body) < 8 {
		return
	}
	index := binary.NativeEndian.Uint32(body[4:])
	switch h.typ() {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		f := parseLink(body)
		if !strings.HasPrefix(f.name, delta.PortPrefix) {
			w.tell(Event{EventLink, f.name})
		}
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		if dev := deviceName(w.fd, index); !strings.HasPrefix(dev, delta.PortPrefix) {
			w.tell(Event{EventAddr, dev})
		}
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		// Ours are permanent and on devices of ours; the rest of a busy host's neighbours come and go all the time.
		if state := binary.NativeEndian.Uint16(body[8:]); len(body) >= 12 && (state&unix.NUD_PERMANENT != 0 || h.typ() == unix.RTM_DELNEIGH) {
			if dev := deviceName(w.fd, index); strings.HasPrefix(dev, "vtep") {
				w.tell(Event{EventNeigh, dev})
			}
		}
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		if len(body) < unix.SizeofRtMsg || body[5] != delta.Protocol {
			return
		}
		dev, dst, family := "", netip.Addr{}, body[0]
		for a := newAttrs(body[unix.SizeofRtMsg:]); a.next(); {
			switch a.typ {
			case unix.RTA_OIF:
				dev = deviceName(w.fd, a.u32())
			case unix.RTA_DST:
				dst = a.addr()
			}
		}
		if !strings.HasPrefix(dev, delta.PortPrefix) {
			if !dst.IsValid() && family == unix.AF_INET {
				dst = netip.IPv4Unspecified()
			} else if !dst.IsValid() {
				dst = netip.IPv6Unspecified()
			}
			w.tell(Event{EventRoute, netip.PrefixFrom(dst, int(body[1])).String()})
		}
	case unix.RTM_NEWNEXTHOP, unix.RTM_DELNEXTHOP:
		if body[2] == delta.Protocol {
			w.tell(Event{Kind: EventNexthop})
		}
	}
}

// nft tells of every table: another program's may be the one that drops what is forwarded.
func (w *watcher) nft(h header, body []byte) {
	const (
		sizeofNfgenmsg = 4
		tableAttr      = 1 // NFTA_*_TABLE of chains, rules, sets and elements, NFTA_TABLE_NAME of tables
	)
	if h.typ()&0xff == unix.NFT_MSG_NEWGEN || len(body) < sizeofNfgenmsg {
		return
	}
	for a := newAttrs(body[sizeofNfgenmsg:]); a.next(); {
		if a.typ == tableAttr {
			w.tell(Event{EventNft, cstring(a.value)})
			return
		}
	}
}
