package security_test

import (
	"fmt"
	"net"
	"net/netip"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/test/lab"
)

// forgery is an inner packet of a forged tunnel datagram.
type forgery struct {
	what     string
	vni      uint32
	from, to netip.Addr
}

// datagram is the payload of the tunnel's UDP packet, to the host with that MAC.
func (f forgery) datagram(mac net.HardwareAddr, mark string) []byte {
	return lab.VXLAN(f.vni, lab.Ethernet(mac, net.HardwareAddr{0x0e, 0, 192, 0, 2, 66},
		lab.UDP(at(f.from, 12345), at(f.to, 7), []byte(mark))))
}

// cast are the containers of an attack: mallory is on host a, in red.
type cast struct{ mallory, redA, blueA, redB, blueB *lab.Container }

func newCast() cast {
	GinkgoHelper()
	return cast{connected(host(0), "red"), connected(host(0), "red"), connected(host(0), "blue"),
		connected(host(1), "red"), connected(host(1), "blue")}
}

func (c cast) listen(t *trial) {
	GinkgoHelper()
	t.listen("red on a", c.redA.Netns, "eth0")
	t.listen("blue on a", c.blueA.Netns, "eth0")
	t.listen("red on b", c.redB.Netns, "eth0")
	t.listen("blue on b", c.blueB.Netns, "eth0")
}

// forgeries are inner packets of all kinds.
func (c cast) forgeries() (out []forgery) {
	GinkgoHelper()
	for _, v6 := range families(w) {
		add := func(what string, vni uint32, from, to netip.Addr) {
			out = append(out, forgery{family(v6) + " " + what, vni, from, to})
		}
		add("own VNI, own source", 1042, c.mallory.Addr(v6), c.redB.Addr(v6))
		add("own VNI, another container's source", 1042, c.redA.Addr(v6), c.redB.Addr(v6))
		add("own VNI, the target host's own source", 1042, gateway(1, "red", v6), c.redB.Addr(v6))
		add("own VNI, another network's source", 1042, c.blueA.Addr(v6), c.redB.Addr(v6))
		add("own VNI, a source outside", 1042, elsewhere(v6), c.redB.Addr(v6))
		if w.v6 == v6 {
			add("own VNI, a host's source", 1042, under(0), c.redB.Addr(v6))
		}
		add("own VNI, to another network", 1042, c.redA.Addr(v6), c.blueB.Addr(v6))
		add("another VNI, its source", 1043, c.blueA.Addr(v6), c.blueB.Addr(v6))
		add("another VNI, own source", 1043, c.mallory.Addr(v6), c.blueB.Addr(v6))
		add("another VNI, a source outside", 1043, elsewhere(v6), c.blueB.Addr(v6))
		add("own VNI, bounced to the own host", 1042, c.redB.Addr(v6), c.redA.Addr(v6))
		add("another VNI, bounced to the own host", 1043, c.blueB.Addr(v6), c.blueA.Addr(v6))
	}
	return out
}

// injection: a container's process without capabilities sends datagrams to the tunnel ports of hosts.
func injection(one world) {
	type target struct {
		what string
		host int
		addr netip.Addr
		far  bool // and must not even leave the container's host
	}
	targets := func() (out []target) {
		GinkgoHelper()
		second := outside(102)
		on(host(1), func() { // a peer's address that the metadata does not know
			a, err := netlink.ParseAddr(netip.PrefixFrom(second, second.BitLen()).String())
			Expect(err).NotTo(HaveOccurred())
			a.Flags = unix.IFA_F_NODAD
			Expect(netlink.AddrReplace(link("eth0"), a)).To(Succeed())
			DeferCleanup(func() { on(host(1), func() { Expect(netlink.AddrDel(link("eth0"), a)).To(Succeed()) }) })
		})
		out = []target{{"the peer", 1, under(1), true}, {"a third host", 2, under(2), true},
			{"an unlisted address of the peer", 1, second, false}, {"the own host", 0, under(0), false}}
		if one.v6 && !one.dual { // no plain socket reaches them: see the specs of spoofing
			out = nil
		}
		out = append(out, target{"the metadata service's address", 0, netip.MustParseAddr("169.254.169.250"), false})
		for _, v6 := range families(one) {
			out = append(out, target{"the own host's " + family(v6) + " gateway", 0, gateway(0, "red", v6), false})
		}
		return out
	}

	It("a container injects nothing into a network by the tunnel port of a host", func() {
		c := newCast()
		t := newTrial()
		c.listen(t)
		t.sent("the port of the attacker", host(0).Netns, port(c.mallory))
		forged := c.forgeries()
		var far = newTrial()
		far.listen("the wire to the peer", host(1).Netns, "eth0")
		far.listen("the wire to the third host", host(2).Netns, "eth0")
		for _, to := range targets() {
			for _, f := range forged {
				t.attack(fmt.Sprintf("%s to %s %s", f.what, to.what, to.addr), func(mark string) error {
					if to.far {
						far.attacks[mark] = f.what + " to " + to.what
					}
					return c.mallory.SendUDP(netip.AddrPort{}, at(to.addr, 4789), f.datagram(vtep(to.host), mark))
				})
			}
		}
		for _, v6 := range families(one) {
			for _, f := range []forgery{{"red", 1042, c.redA.Addr(v6), c.redB.Addr(v6)},
				{"blue", 1043, c.blueA.Addr(v6), c.blueB.Addr(v6)}} {
				t.control(f.what+" on b", family(v6)+" from the host itself", func(mark string) error {
					return host(0).SendUDP(netip.AddrPort{}, at(under(1), 4789), f.datagram(vtep(1), mark))
				})
			}
		}
		t.nothing()
		far.nothing()
	})

	It("a container's packets to the ports of IKE and to ESP of a host do not leave its own host", func() {
		if one.v6 && !one.dual {
			Skip("these containers reach no host by plain sockets")
		}
		mallory := connected(host(0), "red")
		t := newTrial()
		t.sent("the port of the attacker", host(0).Netns, port(mallory))
		t.listen("the wire to the peer", host(1).Netns, "eth0")
		t.listen("the wire to the third host", host(2).Netns, "eth0")
		for _, i := range []int{1, 2} {
			for _, p := range []uint16{500, 4500} {
				t.attack(fmt.Sprintf("UDP %d of %s", p, host(i).Name), func(mark string) error {
					return mallory.SendUDP(netip.AddrPort{}, at(under(i), p), []byte(mark))
				})
			}
			t.attack("ESP to "+host(i).Name, func(mark string) error {
				return mallory.SendFrames("eth0",
					lab.Ethernet(hostEnd(mallory), mac(mallory), lab.IP(unix.IPPROTO_ESP, mallory.Addr(one.v6), under(i), 64,
						append([]byte{0, 0, 1, 0, 0, 0, 0, 1}, mark...))))
			})
		}
		t.control("the wire to the peer", "another port of the peer", func(mark string) error {
			return mallory.SendUDP(netip.AddrPort{}, at(under(1), 4999), []byte(mark))
		})
		t.nothing()
	})

	It("a container may still speak to port 4789 of who is no host", func() {
		mallory, redB := connected(host(0), "red"), connected(host(1), "red")
		t := newTrial()
		t.listen("red on b", redB.Netns, "eth0")
		t.listen("the neighbour", neighbour, "eth0")
		for _, v6 := range families(one) {
			t.control("red on b", family(v6)+" to another container", func(mark string) error {
				return mallory.SendUDP(netip.AddrPort{}, at(redB.Addr(v6), 4789), []byte(mark))
			})
			if v6 == one.v6 {
				t.control("the neighbour", family(v6)+" to the outside", func(mark string) error {
					return mallory.SendUDP(netip.AddrPort{}, at(outside(66), 4789), []byte(mark))
				})
			}
		}
	})
}

// fragments: a neighbour cuts a tunnel datagram in two, the first with no more than the UDP header in it.
func fragments(one world) {
	It("a neighbour injects nothing by fragments of a tunnel datagram", func() {
		red, blue := connected(host(0), "red"), connected(host(0), "blue")
		t := newTrial()
		t.listen("red on a", red.Netns, "eth0")
		t.listen("blue on a", blue.Netns, "eth0")
		send := func(from netip.Addr, port uint16, payload []byte, first int) error {
			var frames [][]byte
			dst := cable(0)
			for _, f := range lab.Fragments(lab.UDP(at(from, 40000), at(under(0), port), payload), first) {
				frames = append(frames, lab.Ethernet(dst, net.HardwareAddr{0x0e, 0, 0, 0, 0, 0x66}, f))
			}
			return neighbour.SendFrames("eth0", frames...)
		}
		for _, v6 := range families(one) {
			for _, first := range []int{8, 16, 24, 32} {
				for _, f := range []forgery{{"red", 1042, elsewhere(v6), red.Addr(v6)},
					{"blue", 1043, connectedPeer("blue", v6), blue.Addr(v6)}} {
					t.attack(fmt.Sprintf("%s %s with a first fragment of %d octets", family(v6), f.what, first),
						func(mark string) error {
							return send(outside(66), 4789, f.datagram(vtep(0), mark), first)
						})
				}
			}
		}
		received(host(0).Netns, at(under(0), 9), "the neighbour's fragments of another datagram", func(mark string) error {
			return send(outside(66), 9, []byte(mark), 8)
		})
		for _, v6 := range families(one) {
			f := forgery{"red", 1042, elsewhere(v6), red.Addr(v6)}
			t.control("red on a", family(v6)+" from a listed host, in one piece", func(mark string) error {
				return host(1).SendUDP(netip.AddrPort{}, at(under(0), 4789), f.datagram(vtep(0), mark))
			})
		}
		t.nothing()
	})
}

// connectedPeer is an address of a network's container on host b, whether there is one or not.
func connectedPeer(network string, v6 bool) netip.Addr {
	GinkgoHelper()
	return gateway(1, network, v6).Next()
}

// cable is the MAC of a host's underlay device.
func cable(i int) (mac net.HardwareAddr) {
	GinkgoHelper()
	on(host(i), func() { mac = link("eth0").Attrs().HardwareAddr })
	return mac
}

// received sends a marked packet until a socket on the address gets it whole.
func received(n lab.Netns, addr netip.AddrPort, what string, send func(mark string) error) {
	GinkgoHelper()
	var conn *net.UDPConn
	within(n, func() {
		var err error
		conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(addr))
		Expect(err).NotTo(HaveOccurred())
	})
	defer conn.Close()
	mark := newMark("control")
	got := make(chan string, 1000)
	go func() {
		buf := make([]byte, 2000)
		for {
			k, err := conn.Read(buf)
			if err != nil {
				return
			}
			got <- string(buf[:k])
		}
	}()
	Eventually(func() <-chan string {
		Expect(send(mark)).To(Succeed())
		return got
	}, "10s", "50ms").Should(Receive(Equal(mark)), what)
}
