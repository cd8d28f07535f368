package security_test

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"sync"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/vishvananda/netlink"
)

// sink is a socket that keeps the marks of what it receives.
type sink struct {
	*net.UDPConn
	mu  sync.Mutex
	got map[string]int
	any int
}

// newSink binds a socket by what is Do or DoBare of a namespace, and reads it until the spec ends.
func newSink(do func(func() error) error, addr netip.AddrPort) *sink {
	GinkgoHelper()
	s := &sink{got: map[string]int{}}
	Expect(do(func() (err error) {
		s.UDPConn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(addr))
		return err
	})).To(Succeed())
	DeferCleanup(s.Close)
	go func() {
		for buf := make([]byte, 2000); ; {
			k, err := s.Read(buf)
			if err != nil {
				return
			}
			s.mu.Lock()
			s.any++
			if m := markPattern.Find(buf[:k]); m != nil {
				s.got[string(m)]++
			}
			s.mu.Unlock()
		}
	}()
	return s
}

func (s *sink) count(mark string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.got[mark]
}

func (s *sink) packets() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.any
}

// shadow: a container makes its host take a peer's tunnel packets for answers to the container (the class of
// CVE-2021-3773).
func shadow(one world, masked bool) {
	reachable := !one.v6 || one.dual // hosts, by plain sockets of containers
	forget := func() {
		on(host(0), func() { // some ten thousand connections that later specs have no use for
			_ = netlink.ConntrackTableFlush(netlink.ConntrackTable)
		})
	}
	wild := func() netip.Addr {
		if one.v6 {
			return netip.IPv6Unspecified()
		}
		return netip.IPv4Unspecified()
	}

	It("a container that speaks from the tunnel port to a peer receives none of the peer's packets", func() {
		if !reachable {
			Skip("these containers reach no host by plain sockets")
		}
		mallory, victim, far := connected(host(0), "red"), connected(host(0), "blue"), connected(host(1), "blue")
		pings(far.Netns, victim.Addr(false))
		DeferCleanup(forget)
		thief := newSink(mallory.DoBare, at(wild(), 4789))
		t := newTrial()
		t.listen("the port of the attacker", host(0).Netns, port(mallory))
		Expect(mallory.DoBare(func() error {
			for p := uint16(32768); p < 61000; p++ {
				if _, err := thief.WriteToUDPAddrPort([]byte{0}, at(under(1), p)); err != nil {
					return err
				}
			}
			return nil
		})).To(Succeed())
		t.control("the port of the attacker", "the last of them", func(mark string) error {
			_, err := thief.WriteToUDPAddrPort([]byte(mark), at(under(1), 61000))
			return err
		})
		before := thief.packets()
		for _, v6 := range families(one) {
			heard := newSink(victim.Do, at(victim.Addr(v6), 7))
			const flows = 200
			mark := newMark("secret")
			for p := range uint16(flows) { // each has another source port outside
				Expect(far.SendUDP(at(far.Addr(v6), 20000+p), at(victim.Addr(v6), 7), []byte(mark))).To(Succeed())
			}
			Eventually(func() string {
				return fmt.Sprintf("the victim %d, the thief %d", heard.count(mark), thief.packets()-before)
			}).Should(Equal(fmt.Sprintf("the victim %d, the thief 0", flows)), family(v6))
		}
	})

	It("a container that speaks from a port of IKE to a peer receives none of the peer's packets", func() {
		if !reachable {
			Skip("these containers reach no host by plain sockets")
		}
		mallory := fresh(host(0), "red")
		DeferCleanup(forget)
		within(mallory.Netns, func() { write("net/ipv4/ip_unprivileged_port_start", "0") }) // as Docker and containerd do
		for _, p := range []uint16{500, 4500} {
			thief := newSink(mallory.DoBare, at(wild(), p))
			_, err := thief.WriteToUDPAddrPort([]byte{0}, at(under(1), p))
			Expect(err).NotTo(HaveOccurred())
			t := newTrial()
			t.listen("the port of the attacker", host(0).Netns, port(mallory))
			t.control("the port of the attacker", "from the same port", func(mark string) error {
				_, err := thief.WriteToUDPAddrPort([]byte(mark), at(under(1), p))
				return err
			})
			daemon := newSink(host(0).Do, at(under(0), p))
			before, mark := thief.packets(), newMark("secret")
			Expect(host(1).Do(func() error { // as the host's own daemon would
				conn, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at(under(1), p)))
				if err != nil {
					return err
				}
				defer conn.Close()
				_, err = conn.WriteToUDPAddrPort([]byte(mark), at(under(0), p))
				return err
			})).To(Succeed())
			Eventually(func() string {
				return fmt.Sprintf("the daemon %d, the thief %d", daemon.count(mark), thief.packets()-before)
			}).Should(Equal("the daemon 1, the thief 0"), "port %d", p)
		}
	})

	It("masquerade maps nothing onto a port that the host may use itself", func() {
		if !masked || !reachable {
			Skip("there is no masquerade to be seen outside")
		}
		c := fresh(host(0), "red")
		within(c.Netns, func() { write("net/ipv4/ip_unprivileged_port_start", "0") })
		var l *net.TCPListener
		within(neighbour, func() {
			var err error
			l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at(outside(66), 0)))
			Expect(err).NotTo(HaveOccurred())
		})
		DeferCleanup(l.Close)
		tcp := make(chan netip.AddrPort, 1)
		go func() {
			for {
				conn, err := l.AcceptTCP()
				if err != nil {
					return
				}
				tcp <- conn.RemoteAddr().(*net.TCPAddr).AddrPort()
				conn.Close()
			}
		}()
		var u *net.UDPConn
		within(neighbour, func() {
			var err error
			u, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at(outside(66), 0)))
			Expect(err).NotTo(HaveOccurred())
		})
		DeferCleanup(u.Close)
		udp := make(chan netip.AddrPort, 100)
		go func() {
			for buf := make([]byte, 100); ; {
				k, from, err := u.ReadFromUDPAddrPort(buf)
				if err != nil {
					return
				}
				if bytes.HasPrefix(buf[:k], []byte("hello")) {
					udp <- from
				}
			}
		}()
		free := WithTransform(func(a netip.AddrPort) uint16 { return a.Port() },
			And(BeNumerically(">=", 32768), BeNumerically("<=", 60999)))
		for _, p := range []uint16{22, 80, 500, 2379, 2380, 4500, 4789, 6443, 10250, 51820, 65000} {
			Expect(c.DoBare(func() error {
				d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(at(c.Addr(one.v6), p))}
				conn, err := d.DialContext(ctx, "tcp", l.Addr().String())
				if err == nil {
					err = conn.Close()
				}
				return err
			})).To(Succeed())
			var from netip.AddrPort
			Eventually(tcp).Should(Receive(&from))
			Expect(from.Addr().Unmap()).To(Equal(under(0)))
			Expect(from).To(free, "TCP from port %d", p)
			Expect(c.SendUDP(at(c.Addr(one.v6), p), u.LocalAddr().(*net.UDPAddr).AddrPort(), []byte("hello"))).To(Succeed())
			Eventually(udp).Should(Receive(&from))
			Expect(from.Addr().Unmap()).To(Equal(under(0)))
			Expect(from).To(free, "UDP from port %d", p)
		}
	})
}
