package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Wire listens to all frames on a device and sorts them, as a tcpdump on the underlay would.
type Wire struct {
	socket *os.File
	done   chan struct{}
	mu     sync.Mutex
	counts map[string]int
}

// Packet is what a Wire sees of a frame.
type Packet struct {
	Way              byte       // PACKET_HOST, PACKET_OTHERHOST, PACKET_OUTGOING, ... of packet(7)
	Src, Dst         netip.Addr // of the outermost IP header; invalid when it has none
	Proto            byte       // of IP
	SrcPort, DstPort uint16     // of UDP and TCP
	Payload          []byte     // behind the IP header
}

// Listen sorts the frames on a device of the namespace by what class says of them; those of class "" are not counted.
func (n Netns) Listen(dev string, class func(Packet) string) (*Wire, error) {
	w := &Wire{done: make(chan struct{}), counts: map[string]int{}}
	err := n.Do(func() (err error) {
		w.socket, err = packetSocket(dev)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen on %s of %s: %w", dev, n.Name, err)
	}
	raw, err := w.socket.SyscallConn()
	if err != nil {
		return nil, err
	}
	go w.read(raw, class)
	return w, nil
}

// packetSocket is open for all frames on a device of the thread's namespace.
func packetSocket(dev string) (*os.File, error) {
	i, err := net.InterfaceByName(dev)
	if err != nil {
		return nil, err
	}
	all := uint16(unix.ETH_P_ALL>>8 | unix.ETH_P_ALL&0xff<<8)
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0) // deaf until it is bound
	if err != nil {
		return nil, err
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20)
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: i.Index}); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), dev), nil
}

func (w *Wire) read(raw syscall.RawConn, class func(Packet) string) {
	defer close(w.done)
	for buf := make([]byte, 1<<16); ; {
		var n int
		var from unix.Sockaddr
		var err error
		if closed := raw.Read(func(fd uintptr) bool {
			n, from, err = unix.Recvfrom(int(fd), buf, 0)
			return err != unix.EAGAIN
		}); closed != nil {
			return
		}
		if err != nil {
			continue // the device is down, say
		}
		p := parse(buf[:n])
		if l, ok := from.(*unix.SockaddrLinklayer); ok {
			p.Way = l.Pkttype
		}
		if c := class(p); c != "" {
			w.mu.Lock()
			w.counts[c]++
			w.mu.Unlock()
		}
	}
}

func parse(frame []byte) (p Packet) {
	if len(frame) < 14 {
		return p
	}
	ip := frame[14:]
	switch kind := binary.BigEndian.Uint16(frame[12:]); {
	case kind == unix.ETH_P_IP && len(ip) >= 20 && len(ip) >= int(ip[0]&15)*4:
		p.Src, p.Dst, p.Proto, p.Payload = netip.AddrFrom4([4]byte(ip[12:16])), netip.AddrFrom4([4]byte(ip[16:20])), ip[9],
			ip[int(ip[0]&15)*4:]
	case kind == unix.ETH_P_IPV6 && len(ip) >= 40:
		p.Src, p.Dst, p.Proto, p.Payload = netip.AddrFrom16([16]byte(ip[8:24])), netip.AddrFrom16([16]byte(ip[24:40])), ip[6],
			ip[40:]
	}
	if (p.Proto == unix.IPPROTO_UDP || p.Proto == unix.IPPROTO_TCP) && len(p.Payload) >= 8 {
		p.SrcPort, p.DstPort = binary.BigEndian.Uint16(p.Payload), binary.BigEndian.Uint16(p.Payload[2:])
	}
	return p
}

// Counts is how many frames of each class there were so far.
func (w *Wire) Counts() map[string]int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return maps.Clone(w.counts)
}

// Close ends it.
func (w *Wire) Close() {
	w.socket.Close()
	<-w.done
}

// String is the counts, sorted.
func (w *Wire) String() string {
	c := w.Counts()
	var b strings.Builder
	for _, k := range slices.Sorted(maps.Keys(c)) {
		fmt.Fprintf(&b, "%s: %d\n", k, c[k])
	}
	return b.String()
}

// Flow is numbered packets that go from one namespace to another and come back, one after each interval.
type Flow struct {
	conn *net.UDPConn
	echo *net.UDPConn
	stop chan struct{}
	done chan struct{}

	mu   sync.Mutex
	sent int
	back map[uint32]bool
	last time.Time // that one came back
}

// Flow starts one to an address of another namespace.
func (n Netns) Flow(to Netns, addr netip.Addr, every time.Duration) (*Flow, error) {
	f := &Flow{stop: make(chan struct{}), done: make(chan struct{}), back: map[uint32]bool{}}
	err := to.Do(func() (err error) {
		f.echo, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, 0)))
		return err
	})
	if err == nil {
		err = n.Do(func() (err error) {
			f.conn, err = net.DialUDP("udp", nil, f.echo.LocalAddr().(*net.UDPAddr))
			return err
		})
	}
	if err != nil {
		return nil, fmt.Errorf("flow from %s to %s: %w", n.Name, addr, err)
	}
	go func() {
		for buf := make([]byte, 1500); ; {
			k, from, err := f.echo.ReadFromUDPAddrPort(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				_, _ = f.echo.WriteToUDPAddrPort(buf[:k], from)
			}
		}
	}()
	go func() {
		for buf := make([]byte, 1500); ; {
			k, err := f.conn.Read(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil && k >= 4 {
				f.mu.Lock()
				f.back[binary.BigEndian.Uint32(buf)] = true
				f.last = time.Now()
				f.mu.Unlock()
			}
		}
	}()
	go func() {
		defer close(f.done)
		t := time.NewTicker(every)
		defer t.Stop()
		payload := make([]byte, 200)
		for {
			select {
			case <-f.stop:
				return
			case <-t.C:
			}
			f.mu.Lock()
			binary.BigEndian.PutUint32(payload, uint32(f.sent))
			f.sent++
			f.mu.Unlock()
			_, _ = f.conn.Write(payload) // an error is a packet that is lost
		}
	}()
	return f, nil
}

// Count is how many were sent and came back so far.
func (f *Flow) Count() (sent, back int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.sent, len(f.back)
}

// Stop ends the flow, gives the last ones some seconds to come back, and returns how many were sent and the
// numbers of those that were lost.
func (f *Flow) Stop() (sent int, lost []int) {
	close(f.stop)
	<-f.done
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); {
		if s, b := f.Count(); s == b {
			break
		}
		<-time.After(10 * time.Millisecond) // packets have no event
	}
	f.conn.Close()
	f.echo.Close()
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range f.sent {
		if !f.back[uint32(i)] {
			lost = append(lost, i)
		}
	}
	return f.sent, lost
}
