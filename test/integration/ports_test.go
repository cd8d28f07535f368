package integration_test

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/lariat-net/lariat/pkg/attach"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/test/lab"
)

// sh runs commands on a host.
func sh(h *lab.Host, command string) {
	GinkgoHelper()
	_, err := h.Output(ctx, "sh", "-ec", command)
	Expect(err).NotTo(HaveOccurred(), command)
}

// rarely restarts the host's manager with a timer so slow that what heals does so by an event.
func rarely(h *lab.Host) {
	GinkgoHelper()
	Expect(h.Manager.Stop()).To(Succeed())
	Expect(h.StartManager(ctx, "--interval", "1h")).To(Succeed())
	DeferCleanup(func() {
		Expect(h.Manager.Stop()).To(Succeed())
		Expect(h.StartManager(ctx)).To(Succeed())
	})
	Eventually(func() string { return whole(h) }).Should(BeEmpty())
}

func portOf(c *lab.Container) string {
	return attach.HostName(metadata.AttachmentID{ContainerID: c.ID, IfName: "eth0"})
}

// whole fails unless a host's kernel is what metadata and journal want, a container's port included.
func whole(h *lab.Host) string {
	out, err := h.Lariat(ctx, "plan", "--diff")
	if err != nil && out == "" {
		return err.Error()
	}
	return out
}

// disturbances are what other programs do to a port, D, in the belief that it is theirs: dhcpcd,
// NetworkManager, networkd, sysctl.d, a reset by hand.
var disturbances = []string{
	"ip link set D down",
	"ip link set D down; ip link set D up",
	"ip route flush dev D",
	"ip -6 route flush dev D",
	// They end as soon as they find nothing, or after ten rounds.
	"ip route flush proto 76 || true; ip -6 route flush proto 76 || true",
	"ip -6 addr flush dev D",
	"ip link set D group 0",
	"ip link set D address 02:00:00:00:00:99",
	"echo 0 > /proc/sys/net/ipv4/conf/D/rp_filter",
	"echo 0 > /proc/sys/net/ipv4/conf/D/forwarding",
	"echo 1 > /proc/sys/net/ipv6/conf/D/disable_ipv6",
	"cd /proc/sys/net/ipv6/conf/all; echo 1 > disable_ipv6; echo 0 > disable_ipv6; ip addr replace 2001:db8::1/64 " +
		"dev eth0 nodad",
	"ip addr flush dev vtep1042",
	"ip link set vtep1042 down",
	"echo 0 > /proc/sys/net/ipv4/ip_forward",
}

var _ = Describe("A container's port", func() {
	It("F29: is given back what another program takes from it, by an event, and its container's packets flow again",
		func() {
			rarely(host(0))
			c, other, far := connected(host(0), "overlay"), connected(host(0), "overlay"), connected(host(1), "overlay")
			index := func() (i uint32) {
				on(host(0), func() { i = kernel.VethIndex(portOf(c)) })
				return i
			}
			before := index()
			long, err := time.ParseDuration(cmp.Or(os.Getenv("LARIAT_DISTURB"), "0s"))
			Expect(err).NotTo(HaveOccurred())
			r := rand.New(rand.NewPCG(uint64(GinkgoRandomSeed()), 0))
			for start, n := time.Now(), 0; n < len(disturbances) || time.Since(start) < long; n++ {
				if n%len(disturbances) == 0 {
					r.Shuffle(len(disturbances), func(i, j int) {
						disturbances[i], disturbances[j] = disturbances[j],
							disturbances[i]
					})
				}
				d := strings.ReplaceAll(disturbances[n%len(disturbances)], "D", portOf(c))
				began := time.Now()
				sh(host(0), d)
				Eventually(func() string { return whole(host(0)) }).Should(BeEmpty(), "after %s", d)
				for _, v6 := range []bool{false, true} {
					pings(far.Netns, c.Addr(v6))
					pings(other.Netns, c.Addr(v6))
				}
				fmt.Fprintf(GinkgoWriter, "%v: %s\n", time.Since(began), d)
			}
			Expect(index()).To(Equal(before), "the port was made anew")
		})

	It("F29, F137: is reported by CHECK, by plan --diff and by doctor while nobody mends it", func() {
		c := connected(host(0), "overlay")
		Expect(host(0).Manager.Stop()).To(Succeed())
		DeferCleanup(func() {
			if CurrentSpecReport().Failed() {
				_ = host(0).StartManager(ctx)
			}
		})
		sh(host(0), "ip link set "+portOf(c)+" down; ip link set "+portOf(c)+" up")
		Expect(c.Check(ctx, call(host(0), "overlay", nil))).To(MatchError(ContainSubstring("route to " +
			c.Addr(false).String())))
		lost := fmt.Sprintf("route %s/32 dev %s src ", c.Addr(false), portOf(c))
		out, err := host(0).Lariat(ctx, "plan", "--diff")
		Expect(err).To(HaveOccurred())
		Expect(out).To(ContainSubstring("+ " + lost))
		out, err = host(0).Lariat(ctx, "doctor", "ports")
		Expect(err).To(HaveOccurred())
		Expect(out).To(SatisfyAll(ContainSubstring("the port of container "+metadata.ShortID(c.ID)), ContainSubstring(lost)))
		Expect(host(0).StartManager(ctx)).To(Succeed())
		Eventually(func() string { return whole(host(0)) }).Should(BeEmpty())
	})

	It("F137: is asked by doctor, whatever its firewall drops; one that is silent, or that the service does not "+
		"know, is named", func() {
		h := host(0)
		c, walled := connected(h, "overlay"), connected(h, "overlay")
		_, err := walled.Output(ctx, "nft", "add table inet wall; add chain inet wall in { type filter hook input "+
			"priority 0; policy drop; }; add rule inet wall in meta nfproto ipv6 accept")
		Expect(err).NotTo(HaveOccurred())
		out, err := h.Lariat(ctx, "doctor", "containers", "agreement", "forward-policy")
		Expect(err).NotTo(HaveOccurred(), out)
		Expect(out).To(ContainSubstring("It does not look at"))
		_, err = c.Output(ctx, "ip", "addr", "del", c.Addr(false).String()+"/32", "dev", "eth0")
		Expect(err).NotTo(HaveOccurred())
		out, err = h.Lariat(ctx, "doctor", "containers")
		Expect(err).To(HaveOccurred())
		Expect(out).To(ContainSubstring("does not answer at its address " + c.Addr(false).String()))
		Expect(out).NotTo(ContainSubstring(walled.Addr(false).String()))
		_, err = c.Output(ctx, "ip", "addr", "add", c.Addr(false).String()+"/32", "dev", "eth0")
		Expect(err).NotTo(HaveOccurred())
		Expect(h.Manager.Stop()).To(Succeed())
		DeferCleanup(func() { Expect(h.StartManager(ctx)).To(Succeed()) })
		Expect(h.Client().Release(ctx, "overlay", metadata.AttachmentID{ContainerID: c.ID, IfName: "eth0"}, 0)).To(Succeed())
		out, err = h.Lariat(ctx, "doctor", "agreement")
		Expect(err).To(HaveOccurred())
		Expect(out).To(SatisfyAll(ContainSubstring("container "+metadata.ShortID(c.ID)+"/eth0"),
			ContainSubstring("knows no address of it")))
	})

	It("F1: hears its own host by the host's overlay address, and by no metadata address when others masquerade", func() {
		c, local := connected(host(0), "overlay"), connected(host(0), "overlay")
		own := func(v6 bool) netip.Addr {
			s, err := host(0).Client().View(ctx)
			Expect(err).NotTo(HaveOccurred())
			for _, g := range s.Gateways("overlay", s.Self) {
				if g.Is6() == v6 {
					return g
				}
			}
			Fail("the host has no overlay address")
			return netip.Addr{}
		}
		for _, v6 := range []bool{false, true} {
			Expect(heard(c, c.Addr(v6), host(0).Netns)).To(Equal(own(v6)), "the host itself")
			Expect(heard(c, c.Addr(v6), local.Netns)).To(Equal(local.Addr(v6)), "another container")
		}
		// A published port of the host: from the host itself, from another network of the host, from the container itself.
		bridge, err := lab.NewNetns("bridge")
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(func() { bridge.Remove() })
		sh(host(0), `ip link add br9 type bridge; ip addr add 172.31.9.1/24 dev br9; ip link set br9 up
			ip link add veth9 type veth peer name eth0 netns bridge; ip link set veth9 master br9 up`)
		DeferCleanup(func() { sh(host(0), "ip link del br9; nft delete table ip published") })
		Expect(bridge.Do(func() error { return nil })).To(Succeed())
		_, err = bridge.Output(ctx, "sh", "-ec", "ip addr add 172.31.9.2/24 dev eth0; ip link set eth0 up; ip route add "+
			"default via 172.31.9.1")
		Expect(err).NotTo(HaveOccurred())
		sh(host(0), fmt.Sprintf(`nft -f - <<.
table ip published {
	chain pre { type nat hook prerouting priority -100; tcp dport 8080 fib daddr type local dnat to %[1]s
		jump nodeports
	}
	chain out { type nat hook output priority -100; tcp dport 8080 fib daddr type local dnat to %[1]s
		jump nodeports
	}
	chain nodeports { tcp dport 30080 fib daddr type local meta mark set meta mark or 0x4000 dnat to %[1]s:8080
	}
	chain post { type nat hook postrouting priority 100; ip saddr 172.31.9.0/24 oifname "lrt*" masquerade
		ip saddr %[1]s ip daddr %[1]s masquerade
		meta mark and 0x4000 != 0 meta mark set meta mark xor 0x4000 masquerade fully-random
	}
}
.`, c.Addr(false)))
		published := netip.AddrPortFrom(host(0).Addr.Addr(), 8080)
		// What others masquerade has an address that the kernel chooses: of the host, on its first device that has
		// one for all.
		at, underlay := netip.AddrPortFrom(c.Addr(false), 8080), host(0).Addr.Addr()
		Expect(heardAt(c, at, published, bridge)).To(Equal(underlay), "a bridge of the host, masqueraded")
		Expect(heardAt(c, at, published, c.Netns)).To(Equal(underlay), "the container itself, by its published port")
		Expect(heardAt(c, at, published, host(0).Netns)).To(Equal(underlay),
			"the host, by the published port of its underlay address")
		// A node port as kube-proxy makes it: marked, and masqueraded for the mark.
		node := netip.AddrPortFrom(underlay, 30080)
		for who, from := range map[string]lab.Netns{"the host": host(0).Netns, "another host": host(1).Netns,
			"a container": local.Netns} {
			Expect(heardAt(c, at, node, from)).To(Equal(underlay), "%s, by a node port", who)
		}
	})
})

// heard is the source address of a connection that a container sees, to an address of its own.
func heard(c *lab.Container, at netip.Addr, from lab.Netns) netip.Addr {
	GinkgoHelper()
	return heardAt(c, netip.AddrPortFrom(at, 8081), netip.AddrPortFrom(at, 8081), from)
}

// heardAt is the same for a container that listens in one place and is called by another.
func heardAt(c *lab.Container, at, dial netip.AddrPort, from lab.Netns) netip.Addr {
	GinkgoHelper()
	var l net.Listener
	Expect(c.Do(func() (err error) {
		l, err = net.Listen("tcp", at.String())
		return err
	})).To(Succeed())
	defer l.Close()
	Expect(from.Do(func() error {
		short, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		conn, err := new(net.Dialer).DialContext(short, "tcp", dial.String())
		if err == nil {
			conn.Close()
		}
		return err
	})).To(Succeed())
	conn, err := l.Accept()
	Expect(err).NotTo(HaveOccurred())
	defer conn.Close()
	return netip.MustParseAddrPort(conn.RemoteAddr().String()).Addr()
}
