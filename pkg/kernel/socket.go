package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// batchSize is the size of a batch of requests in bytes. Batches above 64 KiB are no faster.
// The default send buffer takes no more than 208 KiB.
const batchSize = 60 << 10

// replyTimeout limits the wait for one answer. The kernel answers during the send of the request.
// A longer wait therefore means that an answer was lost.
// Link removals are the slowest requests and take some 16 ms each.
const replyTimeout = 30 * time.Second

// errInterrupted means that the list changed during its dump (NLM_F_DUMP_INTR).
var errInterrupted = errors.New("the kernel's list changed while it was read")

// A socket is a netlink socket that sends many requests at once and reads answers without
// allocations. It belongs to one caller at a time.
type socket struct {
	fd  int
	seq uint32
	out message
	in  []byte
}

// openSocket opens a netlink socket in the current network namespace.
func openSocket(family int) (*socket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, family)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("bind", err)
	}
	// These options make the socket faster or its errors clearer. Older kernels work without them.
	const size = 4 << 20
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, size) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, size)
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1)
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1)
	tv := unix.NsecToTimeval(int64(replyTimeout))
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
	return &socket{fd: fd}, nil
}

func (s *socket) close() error { return os.NewSyscallError("close", unix.Close(s.fd)) }

func (s *socket) send(b []byte) error {
	for {
		err := unix.Sendto(s.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		if err != unix.EINTR {
			return os.NewSyscallError("netlink send", err)
		}
	}
}

func (s *socket) receive() ([]byte, error) {
	if s.in == nil {
		s.in = make([]byte, 64<<10) // the kernel fills at most 32 KiB for a dump
	}
	for {
		n, _, err := unix.Recvfrom(s.fd, s.in, 0)
		switch err {
		case nil:
			return s.in[:n], nil
		case unix.EINTR:
		case unix.EAGAIN:
			return nil, fmt.Errorf("netlink: no answer within %s", replyTimeout)
		default:
			return nil, os.NewSyscallError("netlink receive", err)
		}
	}
}

// dump requests a list and calls each with every message of the list.
// The body is valid only during the call of each.
// The error is errInterrupted when dump has read the whole list and the list may be inconsistent.
func (s *socket) dump(typ uint16, build func(m *message), each func(typ uint16, body []byte)) error {
	s.seq++
	m := &s.out
	m.b = m.b[:0]
	m.begin(typ, unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	build(m)
	m.finish(s.seq)
	if err := s.send(m.b); err != nil {
		return err
	}
	interrupted := false
	for {
		in, err := s.receive()
		if err != nil {
			return err
		}
		for len(in) >= unix.NLMSG_HDRLEN {
			h := header(in)
			n := h.length()
			if n < unix.NLMSG_HDRLEN || n > len(in) {
				return errors.New("netlink: message cut short")
			}
			body := in[unix.NLMSG_HDRLEN:n]
			in = in[min(align(n), len(in)):]
			if h.seq() != s.seq {
				continue // an answer to an earlier, abandoned request
			}
			interrupted = interrupted || h.flags()&unix.NLM_F_DUMP_INTR != 0
			switch h.typ() {
			case unix.NLMSG_DONE, unix.NLMSG_ERROR:
				if err := ackError(body, h); err != nil {
					return err
				}
				if interrupted {
					return errInterrupted
				}
				return nil
			default:
				each(h.typ(), body)
			}
		}
	}
}

// get requests one object and calls each with the answer.
// For a missing object it returns the kernel's error.
func (s *socket) get(typ uint16, build func(m *message), each func(typ uint16, body []byte)) error {
	s.seq++
	m := &s.out
	m.b = m.b[:0]
	m.begin(typ, unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	build(m)
	m.finish(s.seq)
	if err := s.send(m.b); err != nil {
		return err
	}
	return s.acks(s.seq, s.seq, each, func(_ uint32, err error) error { return err })
}

// run sends n requests in batches. build writes request i, starting with m.begin, or returns false
// to leave it out. run calls failed for each request that the kernel refuses.
// The kernel carries out the other requests. The error is one of the socket itself.
//
// Only the last request of each batch asks for an acknowledgement.
// The kernel processes a batch in order and always reports refusals.
// Therefore the last acknowledgement covers all requests before it.
// One acknowledgement for each request would cost a quarter more.
// Those acknowledgements would also overflow a small receive buffer.
func (s *socket) run(n int, build func(m *message, i int) bool, failed func(i int, err error)) error {
	m := &s.out
	m.b = m.b[:0]
	base := s.seq + 1
	last, pending := -1, false
	s.seq += uint32(n)
	for i := range n {
		before := len(m.b)
		if build(m, i) {
			m.finish(base + uint32(i))
			last, pending = i, true
		} else {
			m.b = m.b[:before]
		}
		if !pending || (len(m.b) < batchSize && i < n-1) {
			continue
		}
		m.askAck()
		if err := s.send(m.b); err != nil {
			return err
		}
		err := s.acks(base, base+uint32(last), nil, func(seq uint32, err error) error {
			failed(int(seq-base), err)
			return nil
		})
		if err != nil {
			return err
		}
		m.b, pending = m.b[:0], false
	}
	return nil
}

// do sends one request and waits for its acknowledgement.
func (s *socket) do(build func(m *message)) (err error) {
	serr := s.run(1, func(m *message, _ int) bool { build(m); return true }, func(_ int, e error) { err = e })
	return errors.Join(err, serr)
}

func (s *socket) acks(first, last uint32, each func(typ uint16, body []byte),
	failed func(seq uint32, err error) error) error {
	for {
		in, err := s.receive()
		if err != nil {
			return err
		}
		for len(in) >= unix.NLMSG_HDRLEN {
			h := header(in)
			n := h.length()
			if n < unix.NLMSG_HDRLEN || n > len(in) {
				return errors.New("netlink: message cut short")
			}
			body := in[unix.NLMSG_HDRLEN:n]
			in = in[min(align(n), len(in)):]
			if seq := h.seq(); seq-first > last-first {
				continue
			} else if h.typ() != unix.NLMSG_ERROR {
				if each != nil {
					each(h.typ(), body)
				}
			} else {
				if err := ackError(body, h); err != nil {
					if err := failed(seq, err); err != nil {
						return err
					}
				}
				if seq == last {
					return nil
				}
			}
		}
	}
}

type header []byte

func (h header) length() int   { return int(binary.NativeEndian.Uint32(h)) }
func (h header) typ() uint16   { return binary.NativeEndian.Uint16(h[4:]) }
func (h header) flags() uint16 { return binary.NativeEndian.Uint16(h[6:]) }
func (h header) seq() uint32   { return binary.NativeEndian.Uint32(h[8:]) }

// ackError returns the error of an NLMSG_ERROR or NLMSG_DONE.
// It holds the error number, and the kernel's message when there is one (NETLINK_EXT_ACK).
func ackError(body []byte, h header) error {
	if len(body) < 4 {
		return nil
	}
	code := int32(binary.NativeEndian.Uint32(body))
	if code >= 0 {
		return nil
	}
	errno := unix.Errno(-code)
	if h.flags()&unix.NLM_F_ACK_TLVS == 0 {
		return errno
	}
	rest := body[4:]
	if h.typ() == unix.NLMSG_ERROR {
		if len(rest) < unix.NLMSG_HDRLEN {
			return errno
		}
		skip := unix.NLMSG_HDRLEN
		if h.flags()&unix.NLM_F_CAPPED == 0 {
			skip = align(header(rest).length())
		}
		rest = rest[min(skip, len(rest)):]
	}
	for a := newAttrs(rest); a.next(); {
		if a.typ == unix.NLMSGERR_ATTR_MSG {
			return fmt.Errorf("%w (%s)", errno, cstring(a.value))
		}
	}
	return errno
}

func align(n int) int { return (n + 3) &^ 3 }

func cstring(b []byte) string {
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}

// A message is a buffer of netlink requests. The last request is incomplete.
type message struct {
	b     []byte
	start int
}

func (m *message) begin(typ, flags uint16) {
	m.start = len(m.b)
	m.b = append(m.b, make([]byte, unix.NLMSG_HDRLEN)...)
	binary.NativeEndian.PutUint16(m.b[m.start+4:], typ)
	binary.NativeEndian.PutUint16(m.b[m.start+6:], flags|unix.NLM_F_REQUEST)
}

func (m *message) finish(seq uint32) {
	binary.NativeEndian.PutUint32(m.b[m.start:], uint32(len(m.b)-m.start))
	binary.NativeEndian.PutUint32(m.b[m.start+8:], seq)
}

func (m *message) askAck() {
	f := m.b[m.start+6:]
	binary.NativeEndian.PutUint16(f, binary.NativeEndian.Uint16(f)|unix.NLM_F_ACK)
}

func (m *message) raw(b ...byte) { m.b = append(m.b, b...) }

func (m *message) rawU32(v uint32) { m.b = binary.NativeEndian.AppendUint32(m.b, v) }

func (m *message) attrHead(typ uint16, n int) {
	m.b = binary.NativeEndian.AppendUint16(m.b, uint16(n+4))
	m.b = binary.NativeEndian.AppendUint16(m.b, typ)
}

func (m *message) pad() {
	for len(m.b)&3 != 0 {
		m.b = append(m.b, 0)
	}
}

func (m *message) bytes(typ uint16, v []byte) {
	m.attrHead(typ, len(v))
	m.b = append(m.b, v...)
	m.pad()
}

func (m *message) string(typ uint16, v string) {
	m.attrHead(typ, len(v)+1)
	m.b = append(append(m.b, v...), 0)
	m.pad()
}

func (m *message) u8(typ uint16, v uint8) {
	m.attrHead(typ, 1)
	m.b = append(m.b, v, 0, 0, 0)
}

func (m *message) u16be(typ, v uint16) {
	m.attrHead(typ, 2)
	m.b = append(m.b, byte(v>>8), byte(v), 0, 0)
}

func (m *message) u32(typ uint16, v uint32) {
	m.attrHead(typ, 4)
	m.b = binary.NativeEndian.AppendUint32(m.b, v)
}

func (m *message) addr(typ uint16, a netip.Addr) {
	if a.Is4() {
		v := a.As4()
		m.attrHead(typ, 4)
		m.b = append(m.b, v[:]...)
	} else {
		v := a.As16()
		m.attrHead(typ, 16)
		m.b = append(m.b, v[:]...)
	}
}

// nest begins a nested attribute. The caller passes the result to end.
func (m *message) nest(typ uint16) int {
	at := len(m.b)
	m.attrHead(typ|unix.NLA_F_NESTED, 0)
	return at
}

func (m *message) end(at int) {
	binary.NativeEndian.PutUint16(m.b[at:], uint16(len(m.b)-at))
}

// attrs walks over attributes:
//
//	for a := newAttrs(body); a.next(); {
//		switch a.typ { … a.value … }
//	}
type attrs struct {
	rest  []byte
	typ   uint16
	value []byte
}

func newAttrs(b []byte) attrs { return attrs{rest: b} }

func (a *attrs) next() bool {
	if len(a.rest) < 4 {
		return false
	}
	n := int(binary.NativeEndian.Uint16(a.rest))
	if n < 4 || n > len(a.rest) {
		return false
	}
	a.typ = binary.NativeEndian.Uint16(a.rest[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
	a.value = a.rest[4:n]
	a.rest = a.rest[min(align(n), len(a.rest)):]
	return true
}

func (a *attrs) u8() uint8 {
	if len(a.value) < 1 {
		return 0
	}
	return a.value[0]
}

func (a *attrs) u16be() uint16 {
	if len(a.value) < 2 {
		return 0
	}
	return binary.BigEndian.Uint16(a.value)
}

func (a *attrs) u32() uint32 {
	if len(a.value) < 4 {
		return 0
	}
	return binary.NativeEndian.Uint32(a.value)
}

func (a *attrs) u32be() uint32 {
	if len(a.value) < 4 {
		return 0
	}
	return binary.BigEndian.Uint32(a.value)
}

// gateway returns the address of RTA_GATEWAY or RTA_VIA. RTA_VIA has the family before the address.
func (a *attrs) gateway() netip.Addr {
	if a.typ == unix.RTA_VIA && len(a.value) > 2 {
		v, _ := netip.AddrFromSlice(a.value[2:])
		return v
	}
	return a.addr()
}

// addr returns the value as an IP address, or the zero Addr when the value is no address.
func (a *attrs) addr() netip.Addr {
	v, _ := netip.AddrFromSlice(a.value)
	return v
}
