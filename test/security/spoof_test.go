package security_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/test/lab"
)

// loopback are addresses that are a machine's own matter.
var loopback = []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.53"),
	netip.MustParseAddr("127.255.255.254")}

// spoofing: what a container sends with addresses that are not its own goes nowhere, in either family,
// whatever the networks have.
func spoofing(one world) {
	It("a container's packets with forged sources leave its host in neither family", func() {
		mallory, victim := connected(host(0), "red"), connected(host(0), "red")
		far := connected(host(1), "red")
		pings(far.Netns, victim.Addr(false))
		t := newTrial()
		t.sent("the port of the attacker", host(0).Netns, port(mallory))
		t.listen("the neighbour", neighbour, "eth0")
		t.listen("the wire to the peer", host(1).Netns, "eth0")
		t.listen("red on a", victim.Netns, "eth0")
		t.listen("red on b", far.Netns, "eth0")
		send := func(from, to netip.Addr, port uint16, payload []byte) error {
			return mallory.SendFrames("eth0",
				lab.Ethernet(hostEnd(mallory), mac(mallory), lab.UDP(at(from, 12345), at(to, port), payload)))
		}
		for _, v6 := range []bool{false, true} {
			sources := map[string]netip.Addr{"a random source": elsewhere(v6),
				"a link-local source": netip.MustParseAddr(map[bool]string{false: "169.254.9.9", true: "fe80::99"}[v6])}
			targets := map[string]netip.Addr{}
			if v6 == one.v6 {
				sources["its host's source"], sources["a peer's source"], sources["a neighbour's source"] = under(0), under(1),
					outside(67)
				targets["a neighbour"], targets["a peer"] = outside(66), under(1)
			}
			if !v6 || one.dual {
				sources["another container's source"], sources["its gateway's source"] = victim.Addr(v6), gateway(0, "red", v6)
				sources["another network's source"], sources["a far container's source"] = connectedPeer("blue", v6), far.Addr(v6)
				targets["a far container"] = far.Addr(v6)
				targets["a container of the same host"] = victim.Addr(v6)
			}
			for what, from := range sources {
				for whom, to := range targets {
					if from == to {
						continue
					}
					t.attack(fmt.Sprintf("%s with %s to %s", family(v6), what, whom),
						func(mark string) error { return send(from, to, 7, []byte(mark)) })
				}
			}
			// The same as tunnel datagrams: with a listed source they would be believed.
			if v6 == one.v6 {
				for what, from := range map[string]netip.Addr{"its host's source": under(0), "a third host's source": under(2)} {
					f := forgery{"", 1042, victim.Addr(false), far.Addr(false)}
					t.attack(fmt.Sprintf("a tunnel datagram with %s", what), func(mark string) error {
						return send(from, under(1), 4789, f.datagram(vtep(1), mark))
					})
				}
			}
		}
		t.control("the neighbour", "from the host", func(mark string) error {
			return host(0).SendUDP(netip.AddrPort{}, at(outside(66), 7), []byte(mark))
		})
		t.control("the wire to the peer", "from the host", func(mark string) error {
			return host(0).SendUDP(netip.AddrPort{}, at(under(1), 7), []byte(mark))
		})
		t.control("red on b", "with its own source", func(mark string) error {
			return send(mallory.Addr(false), far.Addr(false), 7, []byte(mark))
		})
		t.control("red on a", "with its own source", func(mark string) error {
			return send(mallory.Addr(false), victim.Addr(false), 7, []byte(mark))
		})
		t.nothing()
	})

	It("a container reaches nothing that listens on its host's 127.0.0.0/8, with route_localnet as portmap sets it",
		func() {
			mallory := fresh(host(0), "red")
			on(host(0), func() { write("net/ipv4/conf/"+port(mallory)+"/route_localnet", "1") })
			own := gateway(0, "red", false)
			var listeners []*sink
			for _, a := range append([]netip.Addr{own}, loopback...) {
				listeners = append(listeners, newSink(host(0).Do, at(a, 1753)))
				serve(host(0).Netns, at(a, 1753))
			}
			frame := func(packet []byte) []byte { return lab.Ethernet(hostEnd(mallory), mac(mallory), packet) }
			// A SYN that arrives is answered, and the answer is seen in the container.
			answered, err := mallory.Listen("eth0", func(p lab.Packet) string {
				if p.Proto == unix.IPPROTO_TCP && p.SrcPort == 1753 {
					return p.Src.String()
				}
				return ""
			})
			Expect(err).NotTo(HaveOccurred())
			DeferCleanup(answered.Close)
			t := newTrial()
			t.sent("the port of the attacker", host(0).Netns, port(mallory))
			attacks := map[string]netip.Addr{}
			for _, a := range loopback {
				for what, from := range map[string]netip.Addr{"own": mallory.Addr(false),
					"loopback": netip.MustParseAddr("127.0.0.9")} {
					mark := ""
					t.attack("UDP to "+a.String()+" with its "+what+" source", func(m string) error {
						mark = m
						return mallory.SendFrames("eth0", frame(lab.UDP(at(from, 12345), at(a, 1753), []byte(m))),
							frame(lab.SYN(at(from, 12345), at(a, 1753))))
					})
					attacks[mark] = a
				}
			}
			mark := newMark("control")
			Eventually(func() string {
				Expect(mallory.SendFrames("eth0", frame(lab.UDP(at(mallory.Addr(false), 12345), at(own, 1753), []byte(mark))),
					frame(lab.SYN(at(mallory.Addr(false), 12346), at(own, 1753))))).To(Succeed())
				return fmt.Sprint(listeners[0].count(mark) > 0, answered.Counts()[own.String()] > 0)
			}, "10s", "50ms").Should(Equal("true true"), "the control: the gateway's own address")
			Consistently(func() string {
				out := ""
				for mark, a := range attacks {
					for _, l := range listeners[1:] {
						if l.count(mark) > 0 {
							out += "UDP reached " + a.String() + "\n"
						}
					}
					if answered.Counts()[a.String()] > 0 {
						out += "TCP is answered by " + a.String() + "\n"
					}
				}
				return out
			}, "60ms").Should(BeEmpty())
		})
}

// redirection: nobody makes a host say, learn or believe what does harm to others.
func redirection(one world) {
	// complaints counts the ICMP errors that come in.
	complaints := func(n lab.Netns) *lab.Wire {
		GinkgoHelper()
		wire, err := n.Listen("eth0", func(p lab.Packet) string {
			if p.Way == unix.PACKET_OUTGOING || len(p.Payload) == 0 {
				return ""
			}
			kind := p.Payload[0]
			if p.Proto == unix.IPPROTO_ICMP && (kind == 3 || kind == 11 || kind == 12) || p.Proto == unix.IPPROTO_ICMPV6 &&
				kind >= 1 && kind <= 4 {
				return string(markPattern.Find(p.Payload))
			}
			return ""
		})
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(wire.Close)
		return wire
	}

	It("a host sends no ICMP error to a forged source", func() {
		mallory, victim, far := connected(host(0), "red"), connected(host(0), "red"), connected(host(1), "red")
		pings(far.Netns, victim.Addr(false))
		wires := map[string]*lab.Wire{"the attacker": complaints(mallory.Netns),
			"a container of the same host": complaints(victim.Netns), "a far container": complaints(far.Netns)}
		t := newTrial()
		byContainer := func(packet []byte) error {
			return mallory.SendFrames("eth0", lab.Ethernet(hostEnd(mallory), mac(mallory), packet))
		}
		byNeighbour := func(packet []byte) error {
			return neighbour.SendFrames("eth0", lab.Ethernet(cable(0), net.HardwareAddr{0x0e, 0, 0, 0, 0, 0x66}, packet))
		}
		t.listen("the port of the attacker", host(0).Netns, port(mallory))
		t.listen("the wire to a", host(0).Netns, "eth0")
		for _, v6 := range families(one) {
			for whom, from := range map[string]netip.Addr{"a container of the same host": victim.Addr(v6),
				"a far container": far.Addr(v6)} {
				for who, send := range map[string]func([]byte) error{"the port of the attacker": byContainer,
					"the wire to a": byNeighbour} {
					t.sender = who
					t.attack(fmt.Sprintf("%s, expired, seen at %s: the error goes to %s", family(v6), who, whom),
						func(mark string) error {
							return send(lab.Hops(lab.UDP(at(from, 12345), at(mallory.Addr(v6), 7), []byte(mark)), 1))
						})
					t.attack(fmt.Sprintf("%s, to a closed port of the host, seen at %s: the error goes to %s", family(v6), who, whom),
						func(mark string) error {
							return send(lab.UDP(at(from, 12345), at(gateway(0, "red", v6), 9), []byte(mark)))
						})
				}
			}
			// The attacker's own packets are answered: the test can fail.
			mark := newMark("control")
			Eventually(func() int {
				Expect(byContainer(lab.Hops(lab.UDP(at(mallory.Addr(v6), 12345), at(far.Addr(v6), 7), []byte(mark)),
					1))).To(Succeed())
				return wires["the attacker"].Counts()[mark]
			}, "10s", "100ms").Should(BeNumerically(">", 0))
		}
		Consistently(func() string {
			out := ""
			for who, wire := range wires {
				for mark := range wire.Counts() {
					if what := t.attacks[mark]; what != "" {
						out += who + " got an error about: " + what + "\n"
					}
				}
			}
			return out
		}, "100ms").Should(BeEmpty())
	})

	It("a container does not fill its host's table of neighbours", func() {
		mallory := fresh(host(0), "red")
		entries := func() (n int) {
			on(host(0), func() {
				dev := link(port(mallory)).Attrs().Index
				list, err := kernel.RetryDump(func() ([]netlink.Neigh, error) { return netlink.NeighList(dev, netlink.FAMILY_ALL) })
				Expect(err).NotTo(HaveOccurred())
				n = len(list)
			})
			return n
		}
		seen, err := host(0).Listen(port(mallory), func(p lab.Packet) string {
			if p.Way == unix.PACKET_OUTGOING {
				return ""
			}
			return "frames"
		})
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(seen.Close)
		before := entries()
		gw6 := netip.MustParseAddr("fe80::1")
		var frames [][]byte
		const each = 300
		for i := range uint16(each) {
			v4 := netip.AddrFrom4([4]byte{10, 42, 200 + byte(i>>8), byte(i)})
			ll := netip.MustParseAddr(fmt.Sprintf("fe80::bad:%x", i+1))
			global := netip.MustParseAddr(fmt.Sprintf("fd42::bad:%x", i+1))
			frames = append(frames, lab.ARPRequest(mac(mallory), v4, gateway4(mallory)))
			for _, from := range []netip.Addr{ll, global} {
				for _, p := range [][]byte{lab.NeighbourSolicitation(from, gw6, mac(mallory)),
					lab.NeighbourAdvertisement(from, gw6, mac(mallory)),
					lab.ICMP(128, 0, from, gw6, 64, []byte{0, 1, 0, byte(i)}),
					lab.UDP(at(from, 12345), at(gw6, 9), []byte("anybody?"))} {
					frames = append(frames, lab.Ethernet(hostEnd(mallory), mac(mallory), p))
				}
			}
			if len(frames) > 200 { // no more than a queue takes
				Expect(mallory.SendFrames("eth0", frames...)).To(Succeed())
				frames = nil
			}
		}
		Expect(mallory.SendFrames("eth0", frames...)).To(Succeed())
		Eventually(func() int { return seen.Counts()["frames"] }).Should(BeNumerically(">=", 4*each))
		pings(host(0).Netns, mallory.Addr(false))
		Consistently(entries, "100ms").Should(BeNumerically("<=", before+8), "%d before", before)
	})

	It("a forged complaint about a packet's size does not shrink the path MTU of a tunnel", func() {
		near, far := connected(host(0), "red"), connected(host(1), "red")
		mtu := near.Result.Interfaces[1].Mtu
		whole := func(mark string) error { // a packet that just fits, and may not be cut
			return near.DoBare(func() error {
				conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(at(far.Addr(false), 7)))
				if err != nil {
					return err
				}
				defer conn.Close()
				raw, err := conn.SyscallConn()
				if err != nil {
					return err
				}
				if err := raw.Control(func(fd uintptr) {
					_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE)
				}); err != nil {
					return err
				}
				_, err = conn.Write(append([]byte(mark), bytes.Repeat([]byte{'.'}, mtu-28-len(mark))...))
				return err
			})
		}
		pathMTU := func() (mtu int) {
			on(host(0), func() {
				conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(at(under(1), 4789)))
				Expect(err).NotTo(HaveOccurred())
				defer conn.Close()
				raw, err := conn.SyscallConn()
				Expect(err).NotTo(HaveOccurred())
				Expect(raw.Control(func(fd uintptr) {
					if one.v6 {
						mtu, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU)
					} else {
						mtu, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU)
					}
				})).To(Succeed())
				Expect(err).NotTo(HaveOccurred())
			})
			return mtu
		}
		t := newTrial()
		t.listen("red on b", far.Netns, "eth0")
		t.control("red on b", "before", whole)
		Expect(pathMTU()).To(Equal(1500))
		// What such a tunnel packet looks like is no secret.
		quoted := lab.UDP(at(under(0), 40000), at(under(1), 4789),
			lab.VXLAN(1042, lab.Ethernet(vtep(1), vtep(0), lab.UDP(at(near.Addr(false), 1), at(far.Addr(false), 2),
				make([]byte, 100)))))
		limit := 600
		if one.v6 {
			limit = 1280
		}
		seen, err := host(0).Listen("eth0", func(p lab.Packet) string {
			if len(p.Payload) > 8 && (p.Proto == unix.IPPROTO_ICMP && p.Payload[0] == 3 || p.Proto == unix.IPPROTO_ICMPV6 &&
				p.Payload[0] == 2) {
				return fmt.Sprint("from ", p.Src, " size ", binary.BigEndian.Uint16(p.Payload[6:]))
			}
			return ""
		})
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(seen.Close)
		froms := []netip.Addr{outside(66), under(1), elsewhere(one.v6)}
		for _, from := range froms {
			Expect(neighbour.SendFrames("eth0", lab.Ethernet(cable(0), net.HardwareAddr{0x0e, 0, 0, 0, 0, 0x66},
				lab.TooBig(from, limit, quoted)))).To(Succeed())
			if !one.v6 || one.dual {
				Expect(near.SendFrames("eth0",
					lab.Ethernet(hostEnd(near), mac(near), lab.TooBig(near.Addr(one.v6), limit, quoted)))).To(Succeed())
			}
			Eventually(func() map[string]int { return seen.Counts() }).Should(HaveKey(fmt.Sprint("from ", from, " size ",
				limit)))
		}
		t.control("red on b", "afterwards", whole)
		Expect(pathMTU()).To(BeNumerically(">=", mtu+map[bool]int{false: 50, true: 70}[one.v6]), "of host a to host b")
	})
}

// gateway4 is what a container takes for its gateway.
func gateway4(c *lab.Container) netip.Addr {
	GinkgoHelper()
	for _, ip := range c.Result.IPs {
		if a := netipAddr(ip.Gateway).Unmap(); a.Is4() {
			return a
		}
	}
	Fail("no IPv4 gateway")
	return netip.Addr{}
}
