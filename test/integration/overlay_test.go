package integration_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/guard"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/test/lab"
)

// on runs f on a host.
func on(h *lab.Host, f func()) {
	GinkgoHelper()
	Expect(h.Do(func() error { defer GinkgoRecover(); f(); return nil })).To(Succeed())
}

func link(name string) netlink.Link {
	GinkgoHelper()
	l, err := netlink.LinkByName(name)
	Expect(err).NotTo(HaveOccurred())
	return l
}

func device(h *lab.Host, name string) (v *netlink.Vxlan) {
	on(h, func() {
		if l, err := netlink.LinkByName(name); err == nil {
			v, _ = l.(*netlink.Vxlan)
		}
	})
	return v
}

// settled is what a host lacks of being as its metadata wants it; empty when nothing.
func settled(h *lab.Host) string {
	if err := h.Settled(ctx); err != nil {
		return err.Error()
	}
	return ""
}

var _ = Describe("The overlay", func() {
	It("F23: has a device with VNI, port, no learning and the computed MTU", func() {
		v := device(host(0), "vtep1042")
		Expect(v).NotTo(BeNil())
		Expect(v.VxlanId).To(Equal(1042))
		Expect(v.Port).To(Equal(4789))
		Expect(v.Learning).To(BeFalse())
		Expect(v.Attrs().MTU).To(Equal(1450))
		Expect(v.Attrs().Alias).To(Equal("lariat:vxlan:overlay"))
	})

	It("F24, F33: containers on different hosts ping each other, and a host's processes ping containers on another host",
		func() {
			a, b, c := connected(host(0), "overlay"), connected(host(1), "overlay"), connected(host(2), "overlay")
			for _, from := range []*lab.Container{a, b, c} {
				for _, to := range []*lab.Container{a, b, c} {
					if from != to {
						pings(from.Netns, to.Addr(false))
						pings(from.Netns, to.Addr(true))
					}
				}
			}
			pings(host(0).Netns, b.Addr(false))
			pings(host(0).Netns, b.Addr(true))
			pings(host(2).Netns, a.Addr(false))
			_, err := a.Transfer(ctx, b.Netns, b.Addr(false), 8<<20)
			Expect(err).NotTo(HaveOccurred())
			_, err = a.Transfer(ctx, c.Netns, c.Addr(true), 8<<20)
			Expect(err).NotTo(HaveOccurred())
		})

	It("F25: gives a host the same MAC after a restart, and no two hosts the same", func() {
		seen := map[string]bool{}
		for _, h := range cluster.Hosts {
			seen[device(h, "vtep1042").Attrs().HardwareAddr.String()] = true
		}
		Expect(seen).To(HaveLen(3))
		before := device(host(1), "vtep1042").Attrs().HardwareAddr.String()
		Expect(host(1).Metadata.Stop()).To(Succeed())
		Expect(host(1).StartMetadata(ctx)).To(Succeed())
		Consistently(func() string { return device(host(1), "vtep1042").Attrs().HardwareAddr.String() },
			"300ms").Should(Equal(before))
	})

	It("F26, F141: holds exactly the planned rows, and a settled host is not written to", func() {
		connected(host(1), "overlay")
		for _, h := range cluster.Hosts {
			Eventually(func() string { return settled(h) }).Should(BeEmpty())
			// The kernel's own change notifications tell of every write.
			updates, done := make(chan netlink.RouteUpdate, 100), make(chan struct{})
			on(h, func() { Expect(netlink.RouteSubscribe(updates, done)).To(Succeed()) })
			neighs := make(chan netlink.NeighUpdate, 100)
			on(h, func() { Expect(netlink.NeighSubscribe(neighs, done)).To(Succeed()) })
			// more than one pass of the manager
			Consistently(updates, "1200ms").ShouldNot(Receive(HaveField("Protocol", netlink.RouteProtocol(delta.Protocol))))
			Expect(neighs).NotTo(Receive(HaveField("State", netlink.NUD_PERMANENT)))
			close(done)
		}
	})

	It("F27: a container that moves to another host is reached there, and nothing stale stays", func() {
		ips := map[string]any{"capabilities": map[string]bool{"ips": true}}
		addr := "10.42.150.150"
		first, second := container(host(0)), container(host(1))
		cl0, cl1 := call(host(0), "overlay", ips), call(host(1), "overlay", ips)
		cl0.Capabilities = map[string]any{"ips": []string{addr}}
		cl1.Capabilities = cl0.Capabilities
		Expect(first.Add(ctx, cl0)).To(Succeed())
		pings(host(2).Netns, netip.MustParseAddr(addr))
		Expect(first.Del(ctx, cl0)).To(Succeed())
		Expect(second.Add(ctx, cl1)).To(Succeed())
		pings(host(2).Netns, netip.MustParseAddr(addr))
		pings(host(0).Netns, netip.MustParseAddr(addr))
		Expect(second.Del(ctx, cl1)).To(Succeed())
		Eventually(func() string { return settled(host(2)) }).Should(BeEmpty())
	})

	It("F29: repairs what is deleted by hand, with the metadata unchanged", func() {
		c := connected(host(1), "overlay")
		pings(host(0).Netns, c.Addr(false))
		on(host(0), func() {
			vtep := link("vtep1042")
			neighs, err := kernel.RetryDump(func() ([]netlink.Neigh, error) {
				return netlink.NeighList(vtep.Attrs().Index,
					unix.AF_BRIDGE)
			})
			Expect(err).NotTo(HaveOccurred())
			for _, n := range neighs {
				_ = netlink.NeighDel(&n) // the manager may be repairing already: one is as good as all
			}
			ours, by := &netlink.Route{Protocol: delta.Protocol}, netlink.RT_FILTER_PROTOCOL
			routes, err := kernel.RetryDump(func() ([]netlink.Route, error) {
				return netlink.RouteListFiltered(netlink.FAMILY_V4,
					ours, by)
			})
			Expect(err).NotTo(HaveOccurred())
			for _, r := range routes {
				if r.LinkIndex == vtep.Attrs().Index {
					_ = netlink.RouteDel(&r)
				}
			}
		})
		Eventually(func() string { return settled(host(0)) }, "2s").Should(BeEmpty())
		pings(host(0).Netns, c.Addr(false))
	})

	It("rebuilds its device within a second after it was deleted, and replays everything on it", func() {
		c := connected(host(1), "overlay")
		start := time.Now()
		on(host(0), func() { Expect(netlink.LinkDel(link("vtep1042"))).To(Succeed()) })
		Eventually(func() string { return settled(host(0)) }, "5s").Should(BeEmpty())
		AddReportEntry("rebuilt after", time.Since(start))
		pings(host(0).Netns, c.Addr(false))
	})

	It("F30: loses no packet when the manager and the metadata service are killed and restarted", func() {
		a, b := connected(host(0), "overlay"), connected(host(1), "overlay")
		pings(a.Netns, b.Addr(false))
		flow, err := a.Flow(b.Netns, b.Addr(false), 5*time.Millisecond)
		Expect(err).NotTo(HaveOccurred())
		Eventually(func() int { _, back := flow.Count(); return back }).Should(BeNumerically(">", 5))
		host(0).Manager.Kill()
		host(0).Metadata.Kill()
		Expect(host(0).StartMetadata(ctx)).To(Succeed())
		Expect(host(0).StartManager(ctx)).To(Succeed())
		Eventually(func() string { return settled(host(0)) }).Should(BeEmpty())
		sent, lost := flow.Stop()
		Expect(lost).To(BeEmpty(), "of %d", sent)
	})

	It("F31: makes a device with the wrong VNI anew", func() {
		on(host(0), func() {
			old := link("vtep1042")
			Expect(netlink.LinkDel(old)).To(Succeed())
			// The manager may be faster; then this one is refused, and there is nothing to test for.
			_ = netlink.LinkAdd(&netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: "vtep1042"}, VxlanId: 77, Port: 4789,
				Learning: true})
		})
		Eventually(func() int {
			if v := device(host(0), "vtep1042"); v != nil {
				return v.VxlanId
			}
			return 0
		}).Should(Equal(1042))
		Eventually(func() string { return settled(host(0)) }).Should(BeEmpty())
	})

	It("F32: leaves a route, a device and a table of others alone", func() {
		on(host(0), func() {
			Expect(netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "foreign"}})).To(Succeed())
			l := link("foreign")
			Expect(netlink.LinkSetUp(l)).To(Succeed())
			_, dst, _ := net.ParseCIDR("203.0.113.0/24")
			Expect(netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: dst, Protocol: 5})).To(Succeed())
		})
		DeferCleanup(func() { on(host(0), func() { _ = netlink.LinkDel(link("foreign")) }) })
		connected(host(1), "overlay")
		on(host(0), func() { Expect(netlink.LinkDel(link("vtep1042"))).To(Succeed()) })
		Eventually(func() string { return settled(host(0)) }).Should(BeEmpty())
		on(host(0), func() {
			routes, err := kernel.RetryDump(func() ([]netlink.Route, error) {
				return netlink.RouteList(link("foreign"),
					netlink.FAMILY_V4)
			})
			Expect(err).NotTo(HaveOccurred())
			Expect(routes).To(ContainElement(WithTransform(func(r netlink.Route) string { return r.Dst.String() },
				Equal("203.0.113.0/24"))))
		})
	})

	It("F32: refuses what goes to an address that no block holds, whatever the default gateway is", func() {
		c := connected(host(0), "overlay")
		sh(host(0), "ip route add default via 192.0.2.250; ip -6 route add default dev eth0")
		DeferCleanup(func() { sh(host(0), "ip route del default; ip -6 route del default") })
		// The default routes would end otherwise: in silence, or, for IPv6, with no such neighbour.
		for to, answer := range map[string]error{"10.42.250.1:80": unix.EHOSTUNREACH,
			"[fd42:0:0:ffff::1]:80": unix.ENETUNREACH} {
			Expect(c.Do(func() error {
				short, cancel := context.WithTimeout(ctx, 5*time.Second)
				defer cancel()
				_, err := new(net.Dialer).DialContext(short, "tcp", to)
				return err
			})).To(MatchError(answer), to)
		}
	})

	It("works on a host whose new devices have no IPv6, and says nothing else", func() {
		h := host(0)
		sh(h, "echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6")
		DeferCleanup(func() { sh(h, "echo 0 > /proc/sys/net/ipv6/conf/default/disable_ipv6") })
		sh(h, "ip link del vtep1042")
		Eventually(func() string { return whole(h) }).Should(BeEmpty())
		far := connected(host(1), "overlay")
		for range 2 {
			c := connected(h, "overlay")
			pings(far.Netns, c.Addr(true))
			pings(h.Netns, c.Addr(true))
			Expect(c.Check(ctx, call(h, "overlay", nil))).To(Succeed())
			// And where the manager does not, ADD makes the device.
			Expect(h.Manager.Stop()).To(Succeed())
			sh(h, "ip link del vtep1042")
			DeferCleanup(func() {
				if h.Manager == nil || CurrentSpecReport().Failed() {
					_ = h.StartManager(ctx)
				}
			})
			c = connected(h, "overlay")
			pings(far.Netns, c.Addr(true))
			Expect(h.StartManager(ctx)).To(Succeed())
			Eventually(func() string { return whole(h) }).Should(BeEmpty())
			sh(h, "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6; echo 0 > /proc/sys/net/ipv6/conf/eth0/disable_ipv6; "+
				"ip addr replace 2001:db8::1/64 dev eth0 nodad")
			Eventually(func() string { return whole(h) }).Should(BeEmpty())
		}
		sh(h, "echo 0 > /proc/sys/net/ipv6/conf/all/disable_ipv6")
		Eventually(func() string { return whole(h) }).Should(BeEmpty())
	})

	It("F32: leaves a link alone that has a network's addresses: names it, and refuses another such network", func() {
		h, n := host(0), metadata.Network{Name: "wide", Subnets: prefixes("172.17.0.0/16"), VNI: 1717,
			Encapsulation: metadata.EncapVXLAN}
		create(n)
		DeferCleanup(func() { dropNetwork("wide") })
		Eventually(func() string { return whole(h) }).Should(BeEmpty())
		// Its container's address lies in the block that this host has.
		var inside netip.Addr
		Eventually(func(g Gomega) {
			s, err := h.Client().View(ctx)
			g.Expect(err).NotTo(HaveOccurred())
			i := slices.IndexFunc(s.Blocks, func(b metadata.Block) bool { return b.Network == "wide" && b.Host == h.Name })
			g.Expect(i).NotTo(Equal(-1), "no block of network wide")
			inside = s.Blocks[i].CIDR.Addr()
		}).Should(Succeed())
		for range 40 {
			inside = inside.Next()
		}
		// Docker comes later.
		docker, err := lab.NewNetns("docker")
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(func() { docker.Remove() })
		sh(h, `ip link add docker0 type bridge; ip addr add 172.17.0.1/16 dev docker0; ip link set docker0 up
			ip link add veth9 type veth peer name eth0 netns docker; ip link set veth9 master docker0 up`)
		DeferCleanup(func() { sh(h, "ip link del docker0; ip link del veth9") })
		_, err = docker.Output(ctx, "sh", "-ec", fmt.Sprintf("ip addr add %s/16 dev eth0; ip link set eth0 up; ip route "+
			"add default via 172.17.0.1", inside))
		Expect(err).NotTo(HaveOccurred())
		Eventually(func() (string, error) {
			return h.Output(ctx, "ip", "route", "show", "type",
				"blackhole")
		}).ShouldNot(ContainSubstring("172.17."))
		Eventually(func() string { return whole(h) }).Should(BeEmpty())
		pings(h.Netns, inside)
		pings(docker, h.Addr.Addr())
		out, err := h.Lariat(ctx, "doctor", "networks")
		Expect(err).To(HaveOccurred())
		Expect(out).To(ContainSubstring("172.17.0.0/16 dev docker0 is a link of host " + h.Name))
		sh(h, "ip addr add 172.18.0.1/16 dev docker0")
		Eventually(func() (ways string) {
			s, err := host(1).Client().View(ctx)
			Expect(err).NotTo(HaveOccurred())
			for _, o := range s.Hosts {
				ways += fmt.Sprint(o.Foreign)
			}
			return ways
		}).Should(ContainSubstring("172.18.0.0/16 dev docker0"))
		_, err = host(1).Lariat(ctx, "network", "create", "later", "--subnet", "172.18.9.0/24")
		Expect(err).To(MatchError(ContainSubstring("172.18.0.0/16 dev docker0 on host " + h.Name)))
		_, err = host(1).Lariat(ctx, "network", "create", "later", "--subnet", "172.18.9.0/24", "--force")
		Expect(err).NotTo(HaveOccurred())
		dropNetwork("later")
	})

	It("F34: serves the metadata address to containers and to the host", func() {
		c := connected(host(1), "overlay")
		for _, from := range []lab.Netns{c.Netns, host(1).Netns} {
			Eventually(func() (string, error) {
				return get(from,
					"http://169.254.169.250/latest/self/host/name")
			}).Should(Equal("b"))
		}
		Eventually(func() (string, error) {
			return get(c.Netns,
				"http://169.254.169.250/latest/self/container/primary_ip")
		}).Should(Equal(c.Addr(false).String()))
	})

	It("F35: carries several networks at once, each by its own VNI", func() {
		create(metadata.Network{Name: "blue", Subnets: prefixes("10.43.0.0/16"), Encapsulation: metadata.EncapVXLAN,
			VNI: 1043})
		DeferCleanup(func() { dropNetwork("blue") })
		a, b := connected(host(0), "overlay"), connected(host(1), "overlay")
		c, d := connected(host(0), "blue"), connected(host(1), "blue")
		pings(a.Netns, b.Addr(false))
		pings(c.Netns, d.Addr(false))
		Expect(device(host(0), "vtep1043").VxlanId).To(Equal(1043))
	})

	spoof := func(network string) {
		GinkgoHelper()
		thief, victim, far := connected(host(0), network), connected(host(0), network), connected(host(1), network)
		pings(thief.Netns, far.Addr(false))
		inside(thief, func(l netlink.Link) {
			a, err := netlink.ParseAddr(victim.Addr(false).String() + "/32")
			Expect(err).NotTo(HaveOccurred())
			Expect(netlink.AddrAdd(l, a)).To(Succeed())
			routes, err := kernel.RetryDump(func() ([]netlink.Route, error) { return netlink.RouteList(l, netlink.FAMILY_V4) })
			Expect(err).NotTo(HaveOccurred())
			for _, r := range routes {
				if r.Gw != nil {
					r.Src = victim.Addr(false).AsSlice()
					Expect(netlink.RouteReplace(&r)).To(Succeed())
				}
			}
		})
		silent(thief.Netns, far.Addr(false))
		pings(victim.Netns, far.Addr(false))
	}

	It("F45: a container cannot use another's address", func() { spoof("overlay") })

	It("F45: a container cannot use another's address: by its port's reverse-path check alone, and when that is "+
		"overridden, by the rule", func() {
		on(host(0), func() {
			conn, err := nftables.New()
			Expect(err).NotTo(HaveOccurred())
			Expect(host(0).Manager.Stop()).To(Succeed())
			for _, c := range must(conn.ListChains()) {
				if c.Name == guard.Chain {
					conn.DelChain(c)
				}
			}
			Expect(conn.Flush()).To(Succeed())
		})
		spoof("overlay")
		Expect(host(0).StartManager(ctx)).To(Succeed())
		Eventually(func() string { return settled(host(0)) }).Should(BeEmpty())
		on(host(0), func() {
			Expect(os.WriteFile("/proc/sys/net/ipv4/conf/all/rp_filter", []byte("2"), 0)).To(Succeed())
		})
		DeferCleanup(func() {
			on(host(0), func() {
				Expect(os.WriteFile("/proc/sys/net/ipv4/conf/all/rp_filter", []byte("0"), 0)).To(Succeed())
			})
		})
		Eventually(func() string { return settled(host(0)) }).WithTimeout(10 * time.Second).Should(BeEmpty())
		spoof("overlay")
	})

	It("F58, F59: masquerades what leaves the network, but not what is exempted and not what stays inside", func() {
		n := metadata.Network{Name: "nat", Subnets: prefixes("10.45.0.0/16"), Encapsulation: metadata.EncapVXLAN, VNI: 1045,
			HostNAT: true, HostNATExempt: prefixes("198.51.100.0/24")}
		create(n)
		DeferCleanup(func() { dropNetwork("nat") })
		outside, err := lab.NewNetns("outside")
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(func() { outside.Remove() })
		Expect(cluster.Switch.Plug(outside, "eth0", 1500, netip.MustParsePrefix("192.0.2.200/24"),
			netip.MustParsePrefix("198.51.100.200/24"))).To(Succeed())
		exempt := netip.MustParsePrefix("198.51.100.0/24")
		on(host(0), func() {
			Expect(netlink.RouteReplace(&netlink.Route{LinkIndex: link("eth0").Attrs().Index, Dst: ipnet(exempt),
				Scope: netlink.SCOPE_LINK})).To(Succeed())
		})
		DeferCleanup(func() {
			on(host(0), func() {
				_ = netlink.RouteDel(&netlink.Route{LinkIndex: link("eth0").Attrs().Index, Dst: ipnet(exempt)})
			})
		})
		Expect(outside.Do(func() error { // the way back for what keeps its source
			return netlink.RouteAdd(&netlink.Route{LinkIndex: link("eth0").Attrs().Index, Dst: ipnet(n.Subnets[0]),
				Gw: host(0).Addr.Addr().AsSlice()})
		})).To(Succeed())
		c, far := connected(host(0), "nat"), connected(host(1), "nat")
		Eventually(func() string { return settled(host(0)) }).Should(BeEmpty())
		Expect(sourceSeen(c.Netns, outside, netip.MustParseAddr("192.0.2.200"))).To(Equal(host(0).Addr.Addr()))
		Expect(sourceSeen(c.Netns, outside, netip.MustParseAddr("198.51.100.200"))).To(Equal(c.Addr(false)))
		Expect(sourceSeen(c.Netns, far.Netns, far.Addr(false))).To(Equal(c.Addr(false)))
	})

	It("F138: uses plain routes to hosts on the same link when asked, and the tunnel when not", func() {
		n := metadata.Network{Name: "direct", Subnets: prefixes("10.46.0.0/16"), Encapsulation: metadata.EncapVXLAN,
			VNI: 1046, DirectRouting: true}
		create(n)
		DeferCleanup(func() { dropNetwork("direct") })
		a, b := connected(host(0), "direct"), connected(host(1), "direct")
		pings(a.Netns, b.Addr(false))
		way := func() (dev string) {
			on(host(0), func() {
				r, err := netlink.RouteGet(b.Addr(false).AsSlice())
				Expect(err).NotTo(HaveOccurred())
				l, err := netlink.LinkByIndex(r[0].LinkIndex)
				Expect(err).NotTo(HaveOccurred())
				dev = l.Attrs().Name
			})
			return dev
		}
		Expect(way()).To(Equal("eth0"))
		n.DirectRouting = false
		Expect(host(0).Client().Put(ctx, metadata.KindNetwork, n.Name, n)).To(Succeed())
		Eventually(way).Should(Equal("vtep1046"))
		pings(a.Netns, b.Addr(false))
	})

	It("F139: follows the underlay's MTU", func() {
		set := func(mtu int) {
			on(host(2), func() { Expect(netlink.LinkSetMTU(link("eth0"), mtu)).To(Succeed()) })
		}
		DeferCleanup(set, 1500)
		set(1400)
		Eventually(func() int { return device(host(2), "vtep1042").Attrs().MTU }).Should(Equal(1350))
		c := connected(host(2), "overlay")
		Expect(c.Result.Interfaces[1].Mtu).To(Equal(1350))
	})

	It("F28: a host's new underlay address reaches the others' forwarding entries", func() {
		h := host(2)
		c := connected(h, "overlay")
		pings(host(0).Netns, c.Addr(false))
		move := func(from, to string) {
			on(h, func() {
				l := link("eth0")
				b, _ := netlink.ParseAddr(from)
				Expect(netlink.AddrDel(l, b)).To(Succeed())
				a, _ := netlink.ParseAddr(to)
				Expect(netlink.AddrAdd(l, a)).To(Succeed())
			})
		}
		// The store is reached over the underlay too, so this is an outage that heals.
		move("192.0.2.3/24", "192.0.2.33/24")
		DeferCleanup(func() {
			move("192.0.2.33/24", "192.0.2.3/24")
			Eventually(func() string { return settled(host(0)) }).Should(BeEmpty())
			Eventually(func() error { _, err := h.Client().View(ctx); return err }, "15s").Should(Succeed())
		})
		Eventually(func() (out []string) {
			on(host(0), func() {
				vtep := link("vtep1042")
				neighs, err := kernel.RetryDump(func() ([]netlink.Neigh, error) {
					return netlink.NeighList(vtep.Attrs().Index,
						unix.AF_BRIDGE)
				})
				Expect(err).NotTo(HaveOccurred())
				for _, n := range neighs {
					out = append(out, n.IP.String())
				}
			})
			return out
		}, "20s").Should(And(ContainElement("192.0.2.33"), Not(ContainElement("192.0.2.3"))))
		pings(host(0).Netns, c.Addr(false))
	})

	It("F140: drops a VXLAN packet from a host that is not in the metadata", func() {
		c := connected(host(0), "overlay")
		stranger, err := lab.NewNetns("stranger")
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(func() { stranger.Remove() })
		Expect(cluster.Switch.Plug(stranger, "eth0", 1500, netip.MustParsePrefix("192.0.2.66/24"))).To(Succeed())
		arrived := make(chan struct{}, 1)
		listener := udpListener(c, 7)
		go func() {
			buf := make([]byte, 100)
			if _, _, err := listener.ReadFrom(buf); err == nil {
				arrived <- struct{}{}
			}
		}()
		DeferCleanup(listener.Close)
		forged := vxlanUDP(1042, device(host(0), "vtep1042").Attrs().HardwareAddr, netip.MustParseAddr("10.42.0.200"),
			c.Addr(false), 7)
		send := func(from lab.Netns) {
			Expect(from.Do(func() error {
				conn, err := net.Dial("udp", "192.0.2.1:4789")
				if err != nil {
					return err
				}
				defer conn.Close()
				_, err = conn.Write(forged)
				return err
			})).To(Succeed())
		}
		send(stranger)
		Consistently(arrived, "300ms").ShouldNot(Receive())
		// The same packet from a listed host arrives: the test can fail.
		send(host(1).Netns)
		Eventually(arrived).Should(Receive())
	})
})

func ipnet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// get fetches a URL from inside of a namespace.
func get(from lab.Netns, url string) (body string, err error) {
	err = from.Do(func() error {
		conn, err := net.DialTimeout("tcp", "169.254.169.250:80", 2*time.Second)
		if err != nil {
			return err
		}
		defer conn.Close()
		client := http.Client{Transport: &http.Transport{DisableKeepAlives: true,
			DialContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil }}, Timeout: 5 * time.Second}
		res, err := client.Get(url)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		data, err := io.ReadAll(res.Body)
		body = string(data)
		if res.StatusCode != 200 {
			return fmt.Errorf("status %s: %s", res.Status, body)
		}
		return err
	})
	return body, err
}

// sourceSeen is the address that to sees when from speaks to it.
func sourceSeen(from, to lab.Netns, addr netip.Addr) netip.Addr {
	GinkgoHelper()
	var l net.Listener
	Expect(to.Do(func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(addr, 0).String())
		return err
	})).To(Succeed())
	defer l.Close()
	seen := make(chan netip.Addr, 1)
	go func() {
		if c, err := l.Accept(); err == nil {
			seen <- c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr()
			c.Close()
		}
	}()
	Expect(from.Do(func() error {
		c, err := net.DialTimeout("tcp", l.Addr().String(), 5*time.Second)
		if err == nil {
			c.Close()
		}
		return err
	})).To(Succeed())
	var out netip.Addr
	Eventually(seen).Should(Receive(&out))
	return out
}

func udpListener(c *lab.Container, port int) net.PacketConn {
	GinkgoHelper()
	var l net.PacketConn
	Expect(c.Do(func() (err error) {
		l, err = net.ListenPacket("udp4", fmt.Sprintf("%s:%d", c.Addr(false), port))
		return err
	})).To(Succeed())
	return l
}

// vxlanUDP is a VXLAN payload with an Ethernet frame that holds a UDP packet.
func vxlanUDP(vni uint32, dst net.HardwareAddr, from, to netip.Addr, port uint16) []byte {
	p := []byte{0x08, 0, 0, 0, byte(vni >> 16), byte(vni >> 8), byte(vni), 0}
	p = append(p, dst...)
	p = append(p, 0x0e, 0, 192, 0, 2, 66, 0x08, 0x00)
	f, t := from.As4(), to.As4()
	ip := []byte{0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0, 0, f[0], f[1], f[2], f[3], t[0], t[1], t[2], t[3]}
	var sum uint32
	for i := 0; i < len(ip); i += 2 {
		sum += uint32(ip[i])<<8 | uint32(ip[i+1])
	}
	sum = sum>>16 + sum&0xffff
	sum += sum >> 16
	ip[10], ip[11] = byte(^sum>>8), byte(^sum)
	p = append(p, ip...)
	return append(p, 0x30, 0x39, byte(port>>8), byte(port), 0, 12, 0, 0, 'f', 'o', 'r', 'g')
}

func must[T any](v T, err error) T {
	GinkgoHelper()
	Expect(err).NotTo(HaveOccurred())
	return v
}
