package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// batch64 is how much is handed to the kernel in one send; larger sends win nothing.
const batch64 = 64 << 10

// Numbers that golang.org/x/sys/unix does not name (linux/nexthop.h, linux/rtnetlink.h).
const (
	nhaID      = 1
	nhaOIF     = 5
	nhaGateway = 6
	rtaNHID    = 30
	ntfSelf    = 2
)

// batcher writes netlink requests by hand, many to a send and one acknowledgement for each send. It is the least that
// programming a peer can cost, so it is what the reconciler is measured against.
type batcher struct {
	fd   int
	buf  []byte
	last int // where the last message begins
	seq  uint32
}

func newBatcher() (*batcher, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	err = errors.Join(unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 4*batch64))
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return &batcher{fd: fd, buf: make([]byte, 0, 2*batch64)}, nil
}

func (b *batcher) Close() error { return unix.Close(b.fd) }

// message appends a request; attributes follow by attr, and the next message, or flush, closes it.
func (b *batcher) message(typ, flags uint16, header ...byte) {
	b.end()
	b.last = len(b.buf)
	b.seq++
	b.buf = binary.NativeEndian.AppendUint32(b.buf, 0) // length, in end
	b.buf = binary.NativeEndian.AppendUint16(b.buf, typ)
	b.buf = binary.NativeEndian.AppendUint16(b.buf, unix.NLM_F_REQUEST|flags)
	b.buf = binary.NativeEndian.AppendUint32(b.buf, b.seq)
	b.buf = binary.NativeEndian.AppendUint32(b.buf, 0)
	b.buf = append(b.buf, header...)
}

func (b *batcher) attr(typ uint16, value []byte) {
	b.buf = binary.NativeEndian.AppendUint16(b.buf, uint16(4+len(value)))
	b.buf = binary.NativeEndian.AppendUint16(b.buf, typ)
	b.buf = append(b.buf, value...)
	for len(b.buf)%4 != 0 {
		b.buf = append(b.buf, 0)
	}
}

func (b *batcher) attr32(typ uint16, v uint32) {
	b.attr(typ, binary.NativeEndian.AppendUint32(nil, v))
}

func (b *batcher) end() {
	if len(b.buf) > b.last {
		binary.NativeEndian.PutUint32(b.buf[b.last:], uint32(len(b.buf)-b.last))
	}
}

// flush sends what has gathered and waits for the kernel's word on it.
func (b *batcher) flush() error {
	if len(b.buf) == 0 {
		return nil
	}
	b.end()
	flags := b.buf[b.last+6:]
	binary.NativeEndian.PutUint16(flags, binary.NativeEndian.Uint16(flags)|unix.NLM_F_ACK)
	if err := unix.Sendto(b.fd, b.buf, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("netlink send: %w", err)
	}
	b.buf, b.last = b.buf[:0], 0
	answer := make([]byte, 64<<10)
	for {
		n, _, err := unix.Recvfrom(b.fd, answer, 0)
		if err != nil {
			return fmt.Errorf("netlink receive: %w", err)
		}
		for rest := answer[:n]; len(rest) >= unix.SizeofNlMsghdr; {
			length := binary.NativeEndian.Uint32(rest)
			if binary.NativeEndian.Uint16(rest[4:]) == unix.NLMSG_ERROR {
				if code := int32(binary.NativeEndian.Uint32(rest[16:])); code != 0 {
					return fmt.Errorf("netlink request %d: %w", binary.NativeEndian.Uint32(rest[8:]), unix.Errno(-code))
				}
				if binary.NativeEndian.Uint32(rest[8:]) == b.seq {
					return nil
				}
			}
			rest = rest[min(len(rest), int(length+3)&^3):]
		}
	}
}

func (b *batcher) full() bool { return len(b.buf) > batch64-512 }

// peer is what a routed VXLAN needs for one other host.
type peer struct {
	Underlay netip.Addr
	MAC      [6]byte
	Block    netip.Prefix
}

// program writes nexthop, route, neighbour and forwarding entry of every peer on the device.
func (b *batcher) program(dev int, peers []peer) error {
	const create = unix.NLM_F_CREATE | unix.NLM_F_EXCL
	index := binary.NativeEndian.AppendUint32(nil, uint32(dev))
	rounds := []func(i int, p peer){
		func(_ int, p peer) {
			b.message(unix.RTM_NEWNEIGH, create, append(append([]byte{unix.AF_INET, 0, 0, 0}, index...), unix.NUD_PERMANENT, 0,
				0, 0)...)
			b.attr(unix.NDA_DST, p.Underlay.AsSlice())
			b.attr(unix.NDA_LLADDR, p.MAC[:])
		},
		func(_ int, p peer) {
			b.message(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_APPEND,
				append(append([]byte{unix.AF_BRIDGE, 0, 0, 0}, index...), unix.NUD_PERMANENT, 0, ntfSelf, 0)...)
			b.attr(unix.NDA_LLADDR, p.MAC[:])
			b.attr(unix.NDA_DST, p.Underlay.AsSlice())
		},
		func(i int, p peer) {
			b.message(unix.RTM_NEWNEXTHOP, create, unix.AF_INET, 0, 76, 0, unix.RTNH_F_ONLINK, 0, 0, 0)
			b.attr32(nhaID, uint32(1000+i))
			b.attr32(nhaOIF, uint32(dev))
			b.attr(nhaGateway, p.Underlay.AsSlice())
		},
		func(i int, p peer) {
			b.message(unix.RTM_NEWROUTE, create, unix.AF_INET, byte(p.Block.Bits()), 0, 0, unix.RT_TABLE_MAIN, 76,
				unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST, 0, 0, 0, 0)
			b.attr(unix.RTA_DST, p.Block.Addr().AsSlice())
			b.attr32(rtaNHID, uint32(1000+i))
		},
	}
	for _, round := range rounds {
		for i, p := range peers {
			round(i, p)
			if b.full() {
				if err := b.flush(); err != nil {
					return err
				}
			}
		}
		if err := b.flush(); err != nil {
			return err
		}
	}
	return nil
}
