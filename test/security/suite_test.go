package security_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/vishvananda/netlink"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/probe"
	"github.com/lariat-net/lariat/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }

var ctx = context.Background()

// world is a kind of cluster. Three hosts a, b, c carry the networks red, blue and green; a neighbour on
// their underlay is no host.
type world struct {
	name     string
	v6       bool // the underlay
	dual     bool // the networks
	forwards bool // IPv6, so that what containers send of it could leave
}

var worlds = []world{
	{name: "on an IPv4 underlay, dual stack", dual: true, forwards: true},
	{name: "on an IPv4 underlay, IPv4 only"},
	{name: "on an IPv6 underlay, dual stack", v6: true, dual: true, forwards: true},
	{name: "on an IPv6 underlay, IPv4 only", v6: true, forwards: true},
}

// What the specs of one world share.
var (
	w         world
	cluster   *lab.Cluster
	neighbour lab.Netns
	masked    bool                        // masquerade is on
	networks  map[string]metadata.Network // as they were put last
	idle      map[place][]*lab.Container  // connected, and used by no spec
)

// place is where a container is.
type place struct {
	network string
	host    int
}

func TestSecurity(t *testing.T) {
	probe.Need(t, probe.UserNS, probe.Veth, probe.Bridge, probe.VXLAN, probe.NexthopObjects, probe.Nft, probe.NftFib,
		probe.NftNAT, probe.IPv6)
	RegisterFailHandler(Fail)
	RunSpecs(t, "What containers and neighbours may not do")
}

var _ = BeforeSuite(func() {
	SetDefaultEventuallyTimeout(10 * time.Second)
	SetDefaultEventuallyPollingInterval(5 * time.Millisecond)
})

func init() {
	for _, one := range worlds {
		Describe("Three hosts "+one.name, Ordered, ContinueOnFailure, func() {
			BeforeAll(func() { begin(one); watchful() })
			alertness(one)
			for _, on := range []bool{false, true} {
				Context(map[bool]string{true: "with masquerade", false: "without masquerade"}[on], func() {
					BeforeAll(func() { masquerade(on) })
					injection(one)
					fragments(one)
					shadow(one, on)
					isolation(one, on)
					clear(one)
					firewall(one)
				})
			}
			spoofing(one)
			devices(one)
			redirection(one)
			advertisements(one)
		})
	}
}

// begin makes the cluster of a world, which goes with it. Its hosts are told to believe router
// advertisements, whatever Lariat's devices are told.
func begin(one world) {
	GinkgoHelper()
	w, networks, idle = one, map[string]metadata.Network{}, map[place][]*lab.Container{}
	var err error
	cluster, err = lab.New(lab.Options{Hosts: 3, IPv6: one.v6, Manager: []string{"--interval", "5s", "--grace", "0s"},
		Log: GinkgoWriter})
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(func() { Expect(cluster.Remove()).To(Succeed()) })
	for _, h := range cluster.Hosts {
		on(h, func() { write("net/ipv6/conf/default/accept_ra", "2") })
	}
	neighbour, err = cluster.NewNeighbour("neighbour", netip.PrefixFrom(outside(66), host(0).Addr.Bits()))
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(func() { Expect(neighbour.Remove()).To(Succeed()) })
	Expect(cluster.Up(ctx)).To(Succeed())
	DeferCleanup(func() {
		for at, list := range idle {
			for _, c := range list {
				Expect(c.Del(ctx, call(c.Host, at.network))).To(Succeed())
				Expect(c.Netns.Remove()).To(Succeed())
			}
		}
	})
	for i, name := range []string{"red", "blue", "green"} {
		n := metadata.Network{Name: name, Encapsulation: metadata.EncapVXLAN, VNI: uint32(1042 + i),
			Subnets: []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("10.%d.0.0/16", 42+i))}}
		if one.dual {
			n.Subnets = append(n.Subnets, netip.MustParsePrefix(fmt.Sprintf("fd%d::/48", 42+i)))
		}
		put(n, nil)
	}
	settle()
}

// put writes a network with further keys.
func put(n metadata.Network, more map[string]any) {
	GinkgoHelper()
	networks[n.Name] = n
	object := map[string]any{"name": n.Name, "encapsulation": n.Encapsulation, "vni": n.VNI, "subnets": n.Subnets,
		"hostNAT": n.HostNAT, "directRouting": n.DirectRouting}
	for k, v := range more {
		object[k] = v
	}
	Expect(host(0).Client().Put(ctx, metadata.KindNetwork, n.Name, object)).To(Succeed())
}

// change puts a network with further keys, and puts it back when the spec ends.
func change(name string, more map[string]any) {
	GinkgoHelper()
	n := networks[name]
	DeferCleanup(func() { put(n, nil); settle() })
	put(n, more)
	settle()
}

func masquerade(on bool) {
	GinkgoHelper()
	masked = on
	for _, n := range networks {
		n.HostNAT = on
		put(n, nil)
	}
	settle()
}

// settle waits until all hosts are as the metadata wants them, in all networks, and the store tells all hosts the same.
func settle() {
	GinkgoHelper()
	var head metadata.Snapshot
	for i, h := range cluster.Hosts {
		Eventually(func() error {
			v, err := h.Client().View(ctx)
			if err != nil {
				return err
			}
			blocks := 0
			for _, b := range v.Blocks {
				if b.Gateway.IsValid() {
					blocks++
				}
			}
			want := 0
			for _, n := range networks {
				want += len(n.Subnets) * len(cluster.Hosts)
			}
			if i == 0 {
				head = *v
			}
			if blocks < want || v.Revision < head.Revision {
				return fmt.Errorf("host %s knows %d gateways of %d at revision %d of %d", h.Name, blocks, want, v.Revision,
					head.Revision)
			}
			return h.Settled(ctx)
		}, "20s", "20ms").Should(Succeed())
	}
}

func host(i int) *lab.Host { return cluster.Hosts[i] }

func under(i int) netip.Addr { return host(i).Addr.Addr() }

// outside is an address on the underlay's link.
func outside(n byte) netip.Addr {
	if w.v6 {
		return netip.MustParseAddr(fmt.Sprintf("2001:db8::%x", n))
	}
	return netip.AddrFrom4([4]byte{192, 0, 2, n})
}

// on runs f on a host.
func on(h *lab.Host, f func()) { GinkgoHelper(); within(h.Netns, f) }

// within runs f in a namespace.
func within(n lab.Netns, f func()) {
	GinkgoHelper()
	Expect(n.Do(func() error { defer GinkgoRecover(); f(); return nil })).To(Succeed())
}

func write(key, value string) {
	GinkgoHelper()
	Expect(os.WriteFile("/proc/sys/"+key, []byte(value), 0)).To(Succeed())
}

func read(key string) string {
	GinkgoHelper()
	b, err := os.ReadFile("/proc/sys/" + key)
	Expect(err).NotTo(HaveOccurred())
	return strings.TrimSpace(string(b))
}

func link(name string) netlink.Link {
	GinkgoHelper()
	l, err := netlink.LinkByName(name)
	Expect(err).NotTo(HaveOccurred())
	return l
}

var serial int

func call(h *lab.Host, network string) lab.Call {
	GinkgoHelper()
	conf, err := h.Conf(network, nil)
	Expect(err).NotTo(HaveOccurred())
	return lab.Call{Conf: conf}
}

// connected is a container on the network that no other spec uses. Specs use it one after the other, and
// leave it and its port as they were.
func connected(h *lab.Host, network string) (c *lab.Container) {
	GinkgoHelper()
	at := place{network, h.Index}
	if n := len(idle[at]); n > 0 {
		c, idle[at] = idle[at][n-1], idle[at][:n-1]
	} else {
		c = attach(h, network)
	}
	DeferCleanup(func() { idle[at] = append(idle[at], c) })
	return c
}

// fresh is a new container on the network, which goes with the spec: for those who change it or its port, or
// look at how it was made.
func fresh(h *lab.Host, network string) *lab.Container {
	GinkgoHelper()
	c := attach(h, network)
	DeferCleanup(func() {
		Expect(c.Del(ctx, call(h, network))).To(Succeed())
		Expect(c.Netns.Remove()).To(Succeed())
	})
	return c
}

func attach(h *lab.Host, network string) *lab.Container {
	GinkgoHelper()
	serial++
	c, err := h.NewContainer(fmt.Sprintf("%s%d", network[:1], serial))
	Expect(err).NotTo(HaveOccurred())
	Expect(c.Add(ctx, call(h, network))).To(Succeed())
	return c
}

// port is the host's end of a container's interface.
func port(c *lab.Container) string { return c.Result.Interfaces[0].Name }

// mac is the address of a container's own end.
func mac(c *lab.Container) net.HardwareAddr {
	GinkgoHelper()
	m, err := net.ParseMAC(c.Result.Interfaces[1].Mac)
	Expect(err).NotTo(HaveOccurred())
	return m
}

// hostEnd is the MAC of the host's end of all containers' interfaces.
func hostEnd(c *lab.Container) net.HardwareAddr {
	GinkgoHelper()
	m, err := net.ParseMAC(c.Result.Interfaces[0].Mac)
	Expect(err).NotTo(HaveOccurred())
	return m
}

// vtep is the MAC of a host's tunnel devices.
func vtep(i int) net.HardwareAddr {
	GinkgoHelper()
	v, err := host(0).Client().View(ctx)
	Expect(err).NotTo(HaveOccurred())
	h, ok := v.Host(host(i).Name)
	Expect(ok).To(BeTrue())
	return h.MAC[:]
}

// gateways are a host's own addresses on a network, by family.
func gateway(i int, network string, v6 bool) netip.Addr {
	GinkgoHelper()
	v, err := host(0).Client().View(ctx)
	Expect(err).NotTo(HaveOccurred())
	for _, g := range v.Gateways(network, host(i).Name) {
		if g.Is6() == v6 {
			return g
		}
	}
	Fail(fmt.Sprintf("host %s has no gateway on %s", host(i).Name, network))
	return netip.Addr{}
}

// families are those that containers have: IPv6 or not.
func families(one world) []bool {
	if one.dual {
		return []bool{false, true}
	}
	return []bool{false}
}

func family(v6 bool) string { return map[bool]string{true: "IPv6", false: "IPv4"}[v6] }

// elsewhere is an address that nobody has.
func elsewhere(v6 bool) netip.Addr {
	if v6 {
		return netip.MustParseAddr("2001:db8:ffff::9")
	}
	return netip.MustParseAddr("198.51.100.9")
}

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

// pings waits until to answers from.
func pings(from lab.Netns, to netip.Addr) {
	GinkgoHelper()
	short, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	_, err := from.Ping(short, to, 56)
	Expect(err).NotTo(HaveOccurred())
}
