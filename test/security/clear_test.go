package security_test

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/test/lab"
)

func ipnet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// behindBridge puts a namespace behind a bridge of a host, as Docker has its containers. It has the
// addresses, and its routes lead to the host.
func behindBridge(h *lab.Host, name string) lab.Netns {
	GinkgoHelper()
	n, err := lab.NewNetns(name)
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(n.Remove)
	on(h, func() {
		bridge, err := lab.NewSwitch("docker0", 1500)
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(func() { on(h, func() { Expect(bridge.Remove()).To(Succeed()) }) })
		for _, a := range []string{"172.17.0.1/16", "fd17::1/64"} {
			addr, err := netlink.ParseAddr(a)
			Expect(err).NotTo(HaveOccurred())
			addr.Flags = unix.IFA_F_NODAD
			Expect(netlink.AddrAdd(link("docker0"), addr)).To(Succeed())
		}
		Expect(bridge.Plug(n, "eth0", 1500, netip.MustParsePrefix("172.17.0.2/16"),
			netip.MustParsePrefix("fd17::2/64"))).To(Succeed())
		// until then it is deaf, and the first question for a neighbour costs a second
		for _, dev := range []string{"sw-" + name, "docker0"} {
			Eventually(func() netlink.LinkOperState { return link(dev).Attrs().OperState }).
				Should(BeEquivalentTo(netlink.OperUp), dev)
		}
	})
	within(n, func() {
		for _, gw := range []string{"172.17.0.1", "fd17::1"} {
			Expect(netlink.RouteAdd(&netlink.Route{LinkIndex: link("eth0").Attrs().Index, Gw: net.ParseIP(gw)})).To(Succeed())
		}
	})
	return n
}

func bridged(v6 bool) netip.Addr {
	if v6 {
		return netip.MustParseAddr("fd17::2")
	}
	return netip.MustParseAddr("172.17.0.2")
}

// clear: packets with overlay addresses come in from nowhere but ports and tunnels.
func clear(one world) {
	It("a neighbour's packets in clear reach no container, whatever their source", func() {
		red, blue := connected(host(0), "red"), connected(host(0), "blue")
		t := newTrial()
		t.listen("red on a", red.Netns, "eth0")
		t.listen("blue on a", blue.Netns, "eth0")
		t.sent("the wire to a", host(0).Netns, "eth0")
		for _, v6 := range families(one) {
			sources := map[string]netip.Addr{
				"another container's source":     connectedPeer("red", v6),
				"a peer's gateway as its source": gateway(1, "red", v6),
				"another network's source":       connectedPeer("blue", v6),
				"the host's own gateway":         gateway(0, "red", v6),
				"a source outside":               elsewhere(v6),
			}
			if v6 == one.v6 {
				sources["its own source"], sources["a listed host's source"] = outside(66), under(1)
			}
			for what, from := range sources {
				for who, c := range map[string]*lab.Container{"red": red, "blue": blue} {
					t.attack(fmt.Sprintf("%s with %s to %s", family(v6), what, who), func(mark string) error {
						return neighbour.SendFrames("eth0", lab.Ethernet(cable(0), net.HardwareAddr{0x0e, 0, 0, 0, 0, 0x66},
							lab.UDP(at(from, 12345), at(c.Addr(v6), 7), []byte(mark))))
					})
				}
			}
			t.control("red on a", family(v6)+" by the tunnel", func(mark string) error {
				return host(1).SendUDP(netip.AddrPort{}, at(red.Addr(v6), 7), []byte(mark))
			})
			t.control("blue on a", family(v6)+" by the tunnel", func(mark string) error {
				return host(1).SendUDP(netip.AddrPort{}, at(blue.Addr(v6), 7), []byte(mark))
			})
		}
		t.nothing()
	})

	It("packets from another interface of the host reach no container, whatever their source", func() {
		red, blue := connected(host(0), "red"), connected(host(0), "blue")
		docker := behindBridge(host(0), "docker")
		t := newTrial()
		t.listen("red on a", red.Netns, "eth0")
		t.listen("blue on a", blue.Netns, "eth0")
		// with br_netfilter, rules stop it in front of the bridge itself
		t.sent("the bridge's port", host(0).Netns, "sw-docker")
		var bridge net.HardwareAddr
		on(host(0), func() { bridge = link("docker0").Attrs().HardwareAddr })
		for _, v6 := range families(one) {
			for what, from := range map[string]netip.Addr{"its own source": bridged(v6),
				"another container's source": connectedPeer("red", v6), "a source outside": elsewhere(v6)} {
				for who, c := range map[string]*lab.Container{"red": red, "blue": blue} {
					t.attack(fmt.Sprintf("%s with %s to %s", family(v6), what, who), func(mark string) error {
						return docker.SendFrames("eth0", lab.Ethernet(bridge, net.HardwareAddr{0x0e, 0, 0, 0, 0, 0x17},
							lab.UDP(at(from, 12345), at(c.Addr(v6), 7), []byte(mark))))
					})
				}
			}
			for who, c := range map[string]*lab.Container{"red on a": red, "blue on a": blue} {
				t.control(who, family(v6)+" from the host", func(mark string) error {
					return host(0).SendUDP(netip.AddrPort{}, at(c.Addr(v6), 7), []byte(mark))
				})
			}
		}
		t.nothing()
	})

	It("a container's connections to the outside and to other interfaces of its host are answered", func() {
		c := connected(host(0), "red")
		docker := behindBridge(host(0), "docker")
		for _, v6 := range families(one) {
			serve(docker, at(bridged(v6), 81))
			Eventually(func() error { return answers(c.Netns, at(bridged(v6), 81), 0) }).Should(Succeed(), family(v6))
			if v6 == one.v6 {
				toHosts(one, v6)
				serve(neighbour, at(outside(66), 81))
				Eventually(func() error { return answers(c.Netns, at(outside(66), 81), 0) }).Should(Succeed(), family(v6))
			}
		}
	})

	It("with direct routing, packets of listed hosts pass in clear, and a neighbour's do not", func() {
		change("red", map[string]any{"directRouting": true})
		red, far := connected(host(0), "red"), connected(host(1), "red")
		t := newTrial()
		t.listen("red on a", red.Netns, "eth0")
		t.sent("the wire to a", host(0).Netns, "eth0")
		for _, v6 := range families(one) {
			if v6 != one.v6 {
				continue // these take the tunnel
			}
			t.control("the wire to a", "a container of a listed host, in clear", func(mark string) error {
				return far.SendUDP(netip.AddrPort{}, at(red.Addr(v6), 7), []byte(mark))
			})
			pings(far.Netns, red.Addr(v6))
			pings(host(1).Netns, red.Addr(v6))
			pings(red.Netns, far.Addr(v6))
			for what, from := range map[string]netip.Addr{"its own source": outside(66), "a source outside": elsewhere(v6),
				"another network's source": connectedPeer("blue", v6)} {
				t.attack(family(v6)+" with "+what, func(mark string) error {
					return neighbour.SendFrames("eth0", lab.Ethernet(cable(0), net.HardwareAddr{0x0e, 0, 0, 0, 0, 0x66},
						lab.UDP(at(from, 12345), at(red.Addr(v6), 7), []byte(mark))))
				})
			}
			t.control("red on a", "a container of a listed host", func(mark string) error {
				return far.SendUDP(netip.AddrPort{}, at(red.Addr(v6), 7), []byte(mark))
			})
		}
		t.nothing()
	})

	It("F174: --allow-from a prefix opens a network to the neighbours in it", func() {
		if one.v6 && !one.dual {
			Skip("no container has an address of the underlay's family")
		}
		change("red", map[string]any{"allowFrom": []string{netip.PrefixFrom(outside(66), outside(66).BitLen()).String()}})
		red, blue := connected(host(0), "red"), connected(host(0), "blue")
		toHosts(one, one.v6)
		serve(red.Netns, at(red.Addr(one.v6), 80))
		Eventually(func() error { return answers(neighbour, at(red.Addr(one.v6), 80), 0) }).Should(Succeed())
		t := newTrial()
		t.listen("red on a", red.Netns, "eth0")
		t.listen("blue on a", blue.Netns, "eth0")
		t.sent("the wire to a", host(0).Netns, "eth0")
		send := func(from netip.Addr, to *lab.Container) func(string) error {
			return func(mark string) error {
				return neighbour.SendFrames("eth0", lab.Ethernet(cable(0), net.HardwareAddr{0x0e, 0, 0, 0, 0, 0x66},
					lab.UDP(at(from, 12345), at(to.Addr(one.v6), 7), []byte(mark))))
			}
		}
		t.attack("another neighbour to red", send(outside(67), red))
		t.attack("the neighbour to another network", send(outside(66), blue))
		t.attack("the neighbour with an overlay source", send(connectedPeer("red", one.v6), red))
		t.control("red on a", "the neighbour to red", send(outside(66), red))
		t.nothing()
	})
}

// toHosts gives the neighbour routes to host a's containers.
func toHosts(one world, v6 bool) {
	GinkgoHelper()
	within(neighbour, func() {
		for _, n := range networks {
			for _, p := range n.Subnets {
				if p.Addr().Is6() == v6 {
					Expect(netlink.RouteReplace(&netlink.Route{LinkIndex: link("eth0").Attrs().Index, Dst: ipnet(p),
						Gw: under(0).AsSlice()})).To(Succeed())
				}
			}
		}
	})
}

// firewall: where a policy drops forwarded packets, Lariat's chain accepts no more than what is its own.
func firewall(one world) {
	It("behind a policy of DROP, Lariat accepts its networks' packets and no others", func() {
		if _, err := exec.LookPath("iptables"); err != nil {
			required := strings.Split(os.Getenv("REQUIRE"), ",")
			Expect(required).NotTo(Or(ContainElement("iptables"), ContainElement("all")), "the program is missing")
			Skip("needs the program iptables")
		}
		ipt := func(command string, args ...string) {
			GinkgoHelper()
			_, err := host(0).Output(ctx, append([]string{command, "-w"}, args...)...)
			Expect(err).NotTo(HaveOccurred())
		}
		c, near, far := connected(host(0), "red"), connected(host(0), "red"), connected(host(1), "red")
		docker := behindBridge(host(0), "docker")
		commands := map[bool]string{false: "iptables", true: "ip6tables"}
		for _, v6 := range families(one) {
			ipt(commands[v6], "-P", "FORWARD", "DROP")
			DeferCleanup(func() {
				ipt(commands[v6], "-P", "FORWARD", "ACCEPT")
				Eventually(func() (string, error) { return host(0).Output(ctx, commands[v6], "-S", "FORWARD") }, "15s",
					"50ms").ShouldNot(ContainSubstring("LARIAT-FORWARD"))
			})
		}
		t := newTrial()
		t.listen("the bridge's machine", docker, "eth0")
		t.listen("red on a", c.Netns, "eth0")
		for _, v6 := range families(one) {
			// the manager may have looked for bridges a moment too early
			Eventually(func() (string, error) { return host(0).Output(ctx, commands[v6], "-S") }, "15s", "50ms").Should(And(
				ContainSubstring("-A FORWARD -j LARIAT-FORWARD"), ContainSubstring("-o docker0 -j RETURN")))
			pings(c.Netns, near.Addr(v6))
			pings(c.Netns, far.Addr(v6))
			pings(far.Netns, c.Addr(v6))
			if masked && v6 == one.v6 {
				serve(neighbour, at(outside(66), 82))
				Eventually(func() error { return answers(c.Netns, at(outside(66), 82), 0) }).Should(Succeed(),
					"replies of what is masqueraded")
			}
			t.attack(family(v6)+" from a container to another program's interface", func(mark string) error {
				return c.SendUDP(netip.AddrPort{}, at(bridged(v6), 7), []byte(mark))
			})
			t.attack(family(v6)+" from another program's interface to a container", func(mark string) error {
				return docker.SendUDP(netip.AddrPort{}, at(c.Addr(v6), 7), []byte(mark))
			})
			t.control("the bridge's machine", family(v6)+" from the host", func(mark string) error {
				return host(0).SendUDP(netip.AddrPort{}, at(bridged(v6), 7), []byte(mark))
			})
			t.control("red on a", family(v6)+" from the host", func(mark string) error {
				return host(0).SendUDP(netip.AddrPort{}, at(c.Addr(v6), 7), []byte(mark))
			})
		}
		t.nothing()
	})
}
