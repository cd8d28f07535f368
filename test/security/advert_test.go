package security_test

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/test/lab"
)

// planted is what an advertisement makes its victims believe in.
var planted = netip.MustParsePrefix("2001:db8:bad::/64")

// believed is what a namespace took over from router advertisements, a line each.
func believed(n lab.Netns) string {
	GinkgoHelper()
	var out []string
	within(n, func() {
		routes, err := kernel.RetryDump(func() ([]netlink.Route, error) { return netlink.RouteList(nil, netlink.FAMILY_V6) })
		Expect(err).NotTo(HaveOccurred())
		for _, r := range routes {
			if r.Protocol == unix.RTPROT_RA || r.Dst == nil || r.Dst.IP.IsUnspecified() ||
				planted.Contains(netipAddr(r.Dst.IP)) {
				out = append(out, "route "+r.String())
			}
		}
		addrs, err := kernel.RetryDump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_V6) })
		Expect(err).NotTo(HaveOccurred())
		for _, a := range addrs {
			if planted.Contains(netipAddr(a.IP)) {
				out = append(out, "address "+a.String())
			}
		}
	})
	slices.Sort(out)
	return strings.Join(out, "\n")
}

func netipAddr(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a
}

// advert is a frame with a router advertisement.
func advert(to net.HardwareAddr, dst netip.Addr) []byte {
	from := net.HardwareAddr{0x0e, 0, 0, 0, 0, 0x77}
	return lab.Ethernet(to, from, lab.RouterAdvertisement(netip.MustParseAddr("fe80::77"), dst, from, planted))
}

var (
	allNodes    = netip.MustParseAddr("ff02::1")
	allNodesMAC = net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}
)

// gullible shows that the advertisements work: on a machine that believes them.
func gullible() {
	GinkgoHelper()
	victim, err := lab.NewNetns("gullible")
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(victim.Remove)
	within(victim, func() {
		write("net/ipv6/conf/default/accept_ra", "2")
		Expect(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "near"}, PeerName: "far"})).To(Succeed())
		Expect(netlink.LinkSetUp(link("near"))).To(Succeed())
		Expect(netlink.LinkSetUp(link("far"))).To(Succeed())
	})
	Eventually(func() string {
		Expect(victim.SendFrames("far", advert(allNodesMAC, allNodes))).To(Succeed())
		return believed(victim)
	}, "10s", "20ms").Should(And(ContainSubstring("route"), ContainSubstring("address")))
}

// advertisements: nobody behind a port or a tunnel gives the host a default route or an address (CVE-2020-10749).
func advertisements(one world) {
	It("no router advertisement is believed, from a container or through a tunnel", func() {
		gullible()
		mallory, peer := connected(host(0), "red"), connected(host(1), "red")
		pings(peer.Netns, mallory.Addr(false))
		var linkLocals []netip.Addr
		on(host(0), func() {
			for _, dev := range []string{port(mallory), "vtep1042"} {
				addrs, err := kernel.RetryDump(func() ([]netlink.Addr, error) {
					return netlink.AddrList(link(dev),
						netlink.FAMILY_V6)
				})
				Expect(err).NotTo(HaveOccurred())
				for _, a := range addrs {
					linkLocals = append(linkLocals, netipAddr(a.IP))
				}
			}
		})
		// All that comes in on the two devices is counted in front of the host's own stack.
		seen := map[string]*lab.Wire{}
		for _, dev := range []string{port(mallory), "vtep1042", "vtep1043"} {
			wire, err := host(0).Listen(dev, func(p lab.Packet) string {
				if p.Proto == unix.IPPROTO_ICMPV6 && len(p.Payload) > 0 && p.Payload[0] == 134 {
					return "advertisement"
				}
				return ""
			})
			Expect(err).NotTo(HaveOccurred())
			DeferCleanup(wire.Close)
			seen[dev] = wire
		}
		before := believed(host(0).Netns)
		sent := 0
		for _, dst := range append([]netip.Addr{allNodes, netip.MustParseAddr("fe80::1")}, linkLocals...) {
			to, inner := hostEnd(mallory), vtep(0)
			if dst == allNodes {
				to, inner = allNodesMAC, allNodesMAC
			}
			Expect(mallory.SendFrames("eth0", advert(to, dst))).To(Succeed())
			for _, vni := range []uint32{1042, 1043} {
				Expect(host(1).SendUDP(netip.AddrPort{}, at(under(0), 4789), lab.VXLAN(vni, advert(inner, dst)))).To(Succeed())
			}
			sent++
		}
		for dev, wire := range seen {
			Eventually(func() int { return wire.Counts()["advertisement"] }).Should(Equal(sent), "sent to %s", dev)
		}
		Consistently(func() string { return believed(host(0).Netns) }, "300ms").Should(Equal(before))
	})

	It("a container itself believes none of another's", func() {
		if !one.dual {
			Skip("no container has IPv6")
		}
		mallory, victim := connected(host(0), "red"), connected(host(0), "red")
		before := believed(victim.Netns)
		Expect(mallory.SendFrames("eth0", advert(allNodesMAC, allNodes),
			advert(hostEnd(mallory), victim.Addr(true)))).To(Succeed())
		pings(mallory.Netns, victim.Addr(true))
		Consistently(func() string { return believed(victim.Netns) }, "60ms").Should(Equal(before))
	})
}

// devices: what keeps advertisements and forged sources out is so from the first moment, is repaired, and its
// absence is told.
func devices(one world) {
	// wanted are the settings of a device.
	wanted := func(dev string) map[string]string {
		m := map[string]string{"net/ipv6/conf/" + dev + "/accept_ra": "0"}
		if strings.HasPrefix(dev, "lrt") {
			m["net/ipv4/conf/"+dev+"/rp_filter"] = "1"
		}
		// Over an IPv6 underlay, routes of both families go by a link-local nexthop on the tunnel's device.
		if !one.dual && (!one.v6 || strings.HasPrefix(dev, "lrt")) {
			m["net/ipv6/conf/"+dev+"/disable_ipv6"] = "1"
		}
		return m
	}
	// wrong names the settings that are not as wanted; of one kind, or of all.
	wrong := func(kind string, devs ...string) (out string) {
		on(host(0), func() {
			for _, dev := range devs {
				for key, value := range wanted(dev) {
					if got := read(key); strings.HasSuffix(key, kind) && got != value {
						out += fmt.Sprintf("%s=%s, not %s\n", key, got, value)
					}
				}
			}
		})
		return out
	}

	It("all devices refuse advertisements, and IPv6 where no network has it, whatever the default is", func() {
		c := fresh(host(0), "red")
		Expect(wrong("", port(c), "vtep1042", "vtep1043", "vtep1044")).To(BeEmpty())
	})

	kinds := []string{"rp_filter", "accept_ra", "disable_ipv6"}
	if one.dual {
		kinds = kinds[:2]
	}
	for _, kind := range kinds {
		bad := map[string][]string{"rp_filter": {"0", "2"}, "accept_ra": {"1", "2"}, "disable_ipv6": {"0"}}[kind]
		It("repairs what somebody changes: "+kind, func() {
			Expect(host(0).Manager.Stop()).To(Succeed())
			Expect(host(0).StartManager(ctx, "--interval", "100ms")).To(Succeed())
			DeferCleanup(func() {
				Expect(host(0).Manager.Stop()).To(Succeed())
				Expect(host(0).StartManager(ctx)).To(Succeed())
				settle()
			})
			c := fresh(host(0), "red")
			devs := []string{port(c), "vtep1042"}
			Expect(wrong(kind, devs...)).To(BeEmpty())
			for _, value := range bad {
				for _, dev := range devs {
					for key := range wanted(dev) {
						if strings.HasSuffix(key, kind) {
							on(host(0), func() { write(key, value) })
						}
					}
				}
				Eventually(func() string { return wrong(kind, devs...) }, "5s", "10ms").Should(BeEmpty(), "%s=%s", kind, value)
			}
		})

		It("names what somebody changed, by CHECK and by doctor, when nobody repairs it: "+kind, func() {
			c := fresh(host(0), "red")
			Expect(wrong(kind, port(c))).To(BeEmpty())
			Expect(c.Check(ctx, call(host(0), "red"))).To(Succeed())
			Expect(host(0).Manager.Stop()).To(Succeed())
			DeferCleanup(func() { Expect(host(0).StartManager(ctx)).To(Succeed()); settle() })
			said, _ := host(0).Lariat(ctx, "doctor") // it fails, for it misses the manager
			Expect(said).NotTo(ContainSubstring(kind))
			for key, right := range wanted(port(c)) {
				if !strings.HasSuffix(key, kind) {
					continue
				}
				for _, value := range bad {
					on(host(0), func() { write(key, value) })
					Expect(c.Check(ctx, call(host(0), "red"))).To(MatchError(ContainSubstring(kind)), "%s=%s", key, value)
					said, _ = host(0).Lariat(ctx, "doctor")
					Expect(said).To(ContainSubstring(kind), "%s=%s", key, value)
					on(host(0), func() { write(key, right) })
				}
			}
			Expect(c.Check(ctx, call(host(0), "red"))).To(Succeed())
		})
	}
}
