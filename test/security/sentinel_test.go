package security_test

import (
	"net"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/lariat-net/lariat/test/lab"
)

// watchful puts sentinels beside the specs: an unlisted neighbour, and a container of each network on each
// host to which nobody speaks.
func watchful() {
	GinkgoHelper()
	s, err := lab.NewSentinel(ctx, cluster, "sentinel", outside(250))
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(func() { Expect(s.Close()).To(Succeed()) })
	for _, h := range cluster.Hosts {
		for _, network := range []string{"red", "blue", "green"} {
			watch(s, connected(h, network), network)
		}
	}
}

func watch(s *lab.Sentinel, c *lab.Container, network string) {
	GinkgoHelper()
	stop, err := s.Watch(ctx, c, "eth0", network)
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(stop)
}

// alertness: the sentinels notice what they are there for.
func alertness(one world) {
	It("a sentinel notices a packet of another network, and one in clear on the underlay", func() {
		s, err := lab.NewSentinel(ctx, cluster, "alert", outside(251))
		Expect(err).NotTo(HaveOccurred())
		red, blue := connected(host(0), "red"), connected(host(0), "blue")
		watch(s, red, "red")
		var there net.HardwareAddr
		within(s.Neighbour, func() { there = link("eth0").Attrs().HardwareAddr })
		from, to := at(blue.Addr(false), 1), at(red.Addr(false), 1)
		f := forgery{"", 1043, blue.Addr(false), blue.Addr(false)}
		Expect(s.Leaks()).To(Succeed())
		for want, send := range map[string]func() error{
			"red received a packet of network blue": func() error {
				return host(0).SendFrames(port(red), lab.Ethernet(mac(red), hostEnd(red), lab.UDP(from, to, nil)))
			},
			"red received a tunnel datagram of VNI 1043": func() error {
				return host(0).SendFrames(port(red),
					lab.Ethernet(mac(red), hostEnd(red), lab.UDP(at(elsewhere(false), 1), to, f.datagram(vtep(0), ""))))
			},
			"the unlisted neighbour received a packet of network": func() error {
				return host(0).SendFrames("eth0", lab.Ethernet(there, cable(0), lab.UDP(from, to, nil)))
			},
			"the unlisted neighbour received a tunnel datagram of VNI 1043": func() error {
				return host(0).SendFrames("eth0",
					lab.Ethernet(there, cable(0), lab.UDP(at(under(0), 40000), at(outside(251), 4789), f.datagram(there, ""))))
			},
		} {
			Expect(send()).To(Succeed())
			Eventually(s.Leaks).Should(MatchError(ContainSubstring(want)))
		}
		Expect(s.Close()).NotTo(Succeed())
	})
}
