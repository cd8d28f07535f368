package integration_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"

	"github.com/lariat-net/lariat/pkg/cni"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/test/lab"
)

// inside runs f in the container and hands it eth0.
func inside(c *lab.Container, f func(eth0 netlink.Link)) {
	GinkgoHelper()
	Expect(c.Do(func() error {
		defer GinkgoRecover()
		l, err := netlink.LinkByName("eth0")
		Expect(err).NotTo(HaveOccurred())
		f(l)
		return nil
	})).To(Succeed())
}

func code(err error) uint {
	var e *types.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return 0
}

var _ = Describe("An attachment", func() {
	It("F1: is a routed veth: /32, default route by the host's overlay address, one route on the host; both ping", func() {
		c := connected(host(0), "overlay")
		gw := c.Result.IPs[0].Gateway
		inside(c, func(l netlink.Link) {
			addrs, err := kernel.RetryDump(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_V4) })
			Expect(err).NotTo(HaveOccurred())
			Expect(addrs).To(HaveLen(1))
			Expect(addrs[0].IPNet.String()).To(Equal(c.Addr(false).String() + "/32"))
			routes, err := kernel.RetryDump(func() ([]netlink.Route, error) { return netlink.RouteList(l, netlink.FAMILY_V4) })
			Expect(err).NotTo(HaveOccurred())
			Expect(routes).To(ContainElement(WithTransform(func(r netlink.Route) string { return r.Gw.String() },
				Equal(gw.String()))))
			neighs, err := kernel.RetryDump(func() ([]netlink.Neigh, error) {
				return netlink.NeighList(l.Attrs().Index,
					netlink.FAMILY_V4)
			})
			Expect(err).NotTo(HaveOccurred())
			Expect(neighs).To(ContainElement(And(WithTransform(func(n netlink.Neigh) string { return n.IP.String() },
				Equal(gw.String())), HaveField("State", netlink.NUD_PERMANENT))))
		})
		on(host(0), func() {
			routes, err := kernel.RetryDump(func() ([]netlink.Route, error) { return netlink.RouteList(nil, netlink.FAMILY_V4) })
			Expect(err).NotTo(HaveOccurred())
			Expect(routes).To(ContainElement(WithTransform(func(r netlink.Route) string { return r.Dst.String() },
				Equal(c.Addr(false).String()+"/32"))))
		})
		own, _ := netip.AddrFromSlice(gw)
		pings(c.Netns, own.Unmap())
		pings(host(0).Netns, c.Addr(false))
		pings(host(0).Netns, c.Addr(true))
	})

	It("F3: a second ADD for the same interface gives the same result and no second veth", func() {
		c := connected(host(0), "overlay")
		before, first := ports(host(0)), resultText(c)
		Expect(c.Add(ctx, call(host(0), "overlay", nil))).To(Succeed())
		Expect(resultText(c)).To(Equal(first))
		Expect(ports(host(0))).To(Equal(before))
	})

	It("F4: a dangling host end of the same name is replaced", func() {
		c, cl := container(host(0)), call(host(0), "overlay", nil)
		Expect(c.Add(ctx, cl)).To(Succeed())
		name := c.Result.Interfaces[0].Name
		Expect(c.Del(ctx, cl)).To(Succeed())
		Expect(host(0).Do(func() error {
			return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "dangling"})
		})).To(Succeed())
		Expect(c.Add(ctx, cl)).To(Succeed())
		pings(host(0).Netns, c.Addr(false))
		Expect(c.Del(ctx, cl)).To(Succeed())
	})

	It("F5: a failing IPAM, ours or another, leaves nothing", func() {
		c := container(host(0))
		before := ports(host(0))
		err := c.Add(ctx, call(host(0), "overlay",
			map[string]any{"ipam": map[string]any{"type": "static", "addresses": []any{map[string]any{"address": "nonsense"}}}}))
		Expect(err).To(HaveOccurred())
		err = c.Add(ctx, call(host(0), "nowhere", nil))
		Expect(err).To(MatchError(ContainSubstring("nowhere")))
		Expect(ports(host(0))).To(Equal(before))
		Expect(held(host(0), "overlay")).NotTo(ContainElement(HaveField("ContainerID", c.ID)))
		Expect(records(host(0), "overlay")).NotTo(ContainElement(ContainSubstring(c.ID)))
	})

	It("F6: DEL succeeds twice, with an empty netns, and with one that vanished", func() {
		c, cl := container(host(0)), call(host(0), "overlay", nil)
		Expect(c.Add(ctx, cl)).To(Succeed())
		Expect(c.Del(ctx, cl)).To(Succeed())
		Expect(c.Del(ctx, cl)).To(Succeed())
		Expect(c.Add(ctx, cl)).To(Succeed())
		gone := *c
		gone.Path = ""
		Expect(gone.Del(ctx, cl)).To(Succeed())
		gone.Path = "/run/netns/vanished"
		Expect(gone.Del(ctx, cl)).To(Succeed())
		Expect(held(host(0), "overlay")).NotTo(ContainElement(HaveField("ContainerID", c.ID)))
		Expect(ports(host(0))).NotTo(ContainElement(c.Result.Interfaces[0].Name))
	})

	It("F7: CHECK names the route that is missing; GC drops what is not listed, and nothing without a list", func() {
		keep, drop := connected(host(0), "overlay"), connected(host(0), "overlay")
		cl := call(host(0), "overlay", nil)
		Expect(keep.Check(ctx, cl)).To(Succeed())
		inside(drop, func(l netlink.Link) {
			Expect(netlink.RouteDel(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: drop.Result.IPs[0].Gateway})).To(Succeed())
		})
		Expect(drop.Check(ctx, cl)).To(MatchError(ContainSubstring("0.0.0.0/0 via " + drop.Result.IPs[0].Gateway.String())))

		_, err := raw(host(0), "GC", "", `{"cniVersion":"1.1.0","name":"overlay","type":"lariat-vxlan"`)
		Expect(err).NotTo(HaveOccurred())
		Expect(ports(host(0))).To(ContainElement(drop.Result.Interfaces[0].Name))
		_, err = raw(host(0), "GC", "",
			fmt.Sprintf(`{"cniVersion":"1.1.0","name":"overlay","type":"lariat-vxlan","cni.dev/valid-attachments":[{"containerID":%q,"ifname":"eth0"}]`, keep.ID))
		Expect(err).NotTo(HaveOccurred())
		Expect(ports(host(0))).To(ConsistOf(keep.Result.Interfaces[0].Name))
		Expect(held(host(0), "overlay")).NotTo(ContainElement(HaveField("ContainerID", drop.ID)))
		Expect(keep.Check(ctx, cl)).To(Succeed())
		_, err = raw(host(0), "GC", "",
			`{"cniVersion":"1.1.0","name":"overlay","type":"lariat-vxlan","cni.dev/valid-attachments":[]`)
		Expect(err).NotTo(HaveOccurred())
		Expect(ports(host(0))).To(BeEmpty())
		Expect(held(host(0), "overlay")).To(BeEmpty())
	})

	It("F8: the MTU is the underlay's minus the overhead, in the result too; LinkMTUOverhead=0 gives the underlay's",
		func() {
			c := connected(host(0), "overlay")
			inside(c, func(l netlink.Link) { Expect(l.Attrs().MTU).To(Equal(1450)) })
			Expect(c.Result.Interfaces[1].Mtu).To(Equal(1450))
			full, cl := container(host(0)), call(host(0), "overlay", nil)
			cl.Args = map[string]string{"LinkMTUOverhead": "0", "IgnoreUnknown": "1"}
			Expect(full.Add(ctx, cl)).To(Succeed())
			inside(full, func(l netlink.Link) { Expect(l.Attrs().MTU).To(Equal(1500)) })
			Expect(full.Del(ctx, cl)).To(Succeed())
		})

	It("F11: the MAC is the one asked for", func() {
		c, cl := container(host(0)), call(host(0), "overlay", map[string]any{"capabilities": map[string]bool{"mac": true}})
		cl.Capabilities = map[string]any{"mac": "0a:11:22:33:44:55"}
		Expect(c.Add(ctx, cl)).To(Succeed())
		inside(c, func(l netlink.Link) { Expect(l.Attrs().HardwareAddr.String()).To(Equal("0a:11:22:33:44:55")) })
		Expect(c.Result.Interfaces[1].Mac).To(Equal("0a:11:22:33:44:55"))
		Expect(c.Del(ctx, cl)).To(Succeed())

		m := container(host(0))
		Expect(host(0).Client().Put(ctx, metadata.KindContainer, "a/"+m.ID,
			metadata.Container{ID: m.ID, Host: "a", Network: "overlay", MAC: metadata.MAC{0x0a, 9, 9, 9, 9, 9}})).To(Succeed())
		cl = call(host(0), "overlay", nil)
		Expect(m.Add(ctx, cl)).To(Succeed())
		inside(m, func(l netlink.Link) { Expect(l.Attrs().HardwareAddr.String()).To(Equal("0a:09:09:09:09:09")) })
		Expect(m.Del(ctx, cl)).To(Succeed())
	})

	It("F14: an address that another attachment or the host holds is refused, and the holder named", func() {
		c := connected(host(0), "overlay")
		other := container(host(1))
		cl := call(host(1), "overlay", map[string]any{"capabilities": map[string]bool{"ips": true}})
		cl.Capabilities = map[string]any{"ips": []string{c.Addr(false).String()}}
		err := other.Add(ctx, cl)
		Expect(err).To(MatchError(ContainSubstring(c.ID)))
		Expect(code(err)).To(BeEquivalentTo(cni.ErrAddressHeld))
		gw, _ := netip.AddrFromSlice(c.Result.IPs[0].Gateway)
		cl.Capabilities = map[string]any{"ips": []string{gw.Unmap().String()}}
		Expect(other.Add(ctx, cl)).To(MatchError(ContainSubstring("host a")))
		Expect(held(host(1), "overlay")).NotTo(ContainElement(HaveField("ContainerID", other.ID)))
	})

	It("F19: an explicit address with its length needs no metadata, and is registered later", func() {
		Expect(host(2).Metadata.Stop()).To(Succeed())
		c := container(host(2))
		cl := call(host(2), "overlay", map[string]any{"type": "ptp", "ipam": map[string]any{"type": "lariat-ipam"}})
		cl.Args = map[string]string{"IPAddress": "10.42.200.9/16", "IgnoreUnknown": "1"}
		Expect(c.Add(ctx, cl)).To(Succeed())
		Expect(c.Addr(false).String()).To(Equal("10.42.200.9"))
		Expect(host(2).StartMetadata(ctx)).To(Succeed())
		Eventually(func() []metadata.Allocation {
			return held(host(2),
				"overlay")
		}).Should(ContainElement(HaveField("Address", c.Addr(false))))
		Expect(c.Del(ctx, cl)).To(Succeed())
		Eventually(func() []metadata.Allocation {
			return held(host(2),
				"overlay")
		}).ShouldNot(ContainElement(HaveField("ContainerID", c.ID)))
	})

	It("F20: subnetPrefixSize and routes of the ipam block are in the result", func() {
		c := container(host(0))
		cl := call(host(0), "overlay",
			map[string]any{"type": "ptp", "ipam": map[string]any{"type": "lariat-ipam", "subnetPrefixSize": "/24",
				"routes": []any{map[string]any{"dst": "10.99.0.0/16"}}}})
		Expect(c.Add(ctx, cl)).To(Succeed())
		ones, _ := c.Result.IPs[0].Address.Mask.Size()
		Expect(ones).To(Equal(24))
		Expect(c.Result.Routes).To(ContainElement(WithTransform(func(r *types.Route) string { return r.Dst.String() },
			Equal("10.99.0.0/16"))))
		Expect(c.Del(ctx, cl)).To(Succeed())
	})

	It("F16, F17, F21: the address that metadata assigns, waited for; without it the error names the id and the time",
		func() {
			c, cl := container(host(0)),
				call(host(0), "overlay", map[string]any{"ipam": map[string]any{"type": "lariat-ipam", "waitSeconds": 20}})
			added := make(chan error, 1)
			go func() { added <- c.Add(ctx, cl) }()
			Consistently(added, "300ms").ShouldNot(Receive())
			Expect(host(1).Client().Put(ctx, metadata.KindContainer, "a/"+c.ID,
				metadata.Container{ID: c.ID, Host: "a", Network: "overlay",
					Addresses: []netip.Addr{netip.MustParseAddr("10.42.77.7"), netip.MustParseAddr("fd42::77:7")}})).To(Succeed())
			Eventually(added).Should(Receive(Succeed()))
			Expect(c.Addr(false).String()).To(Equal("10.42.77.7"))
			Expect(c.Del(ctx, cl)).To(Succeed())

			unknown, short := container(host(0)),
				call(host(0), "overlay", map[string]any{"ipam": map[string]any{"type": "lariat-ipam", "waitSeconds": 1}})
			err := unknown.Add(ctx, short)
			Expect(err).To(MatchError(And(ContainSubstring(unknown.ID), MatchRegexp(`[0-9.]+m?s`))))
			Expect(code(err)).To(BeEquivalentTo(cni.ErrTryAgain))
		})

	It("F18: the wait survives a restart of the metadata service", func() {
		c, cl := container(host(2)),
			call(host(2), "overlay", map[string]any{"ipam": map[string]any{"type": "lariat-ipam", "waitSeconds": 30}})
		added := make(chan error, 1)
		go func() { added <- c.Add(ctx, cl) }()
		Consistently(added, "200ms").ShouldNot(Receive())
		Expect(host(2).Metadata.Stop()).To(Succeed())
		Expect(host(2).StartMetadata(ctx)).To(Succeed())
		Expect(host(0).Client().Put(ctx, metadata.KindContainer, "c/"+c.ID,
			metadata.Container{ID: c.ID, Host: "c", Network: "overlay",
				Addresses: []netip.Addr{netip.MustParseAddr("10.42.77.8"), netip.MustParseAddr("fd42::77:8")}})).To(Succeed())
		Eventually(added, "20s").Should(Receive(Succeed()))
		Expect(c.Del(ctx, cl)).To(Succeed())
	})

	It("F127: DEL, CHECK and GC work with the metadata service down, and the release is replayed", func() {
		c, d, cl := connected(host(2), "overlay"), connected(host(2), "overlay"), call(host(2), "overlay", nil)
		Expect(host(2).Metadata.Stop()).To(Succeed())
		Expect(c.Check(ctx, cl)).To(Succeed())
		Expect(c.Del(ctx, cl)).To(Succeed())
		_, err := raw(host(2), "GC", "",
			`{"cniVersion":"1.1.0","name":"overlay","type":"lariat-vxlan","cni.dev/valid-attachments":[]`)
		Expect(err).NotTo(HaveOccurred())
		Expect(ports(host(2))).To(BeEmpty())
		Expect(host(2).StartMetadata(ctx)).To(Succeed())
		Eventually(func() []metadata.Allocation { return held(host(2), "overlay") }).Should(BeEmpty())
		Eventually(func() []string { return records(host(2), "overlay") }).Should(BeEmpty())
		_ = d
	})

	It("F128: a new boot gives all of the old one's addresses back, and none of a live container", func() {
		h := host(2)
		dead, cl := container(h), call(h, "overlay", nil)
		Expect(dead.Add(ctx, cl)).To(Succeed())
		live := connected(h, "overlay")
		Expect(h.Manager.Stop()).To(Succeed())
		Expect(h.Metadata.Stop()).To(Succeed())
		Expect(h.Do(func() error { // a reboot takes links and namespaces with it
			l, err := netlink.LinkByName(dead.Result.Interfaces[0].Name)
			if err != nil {
				return err
			}
			return netlink.LinkDel(l)
		})).To(Succeed())
		Expect(dead.Netns.Remove()).To(Succeed())
		Expect(h.Reboot(2)).To(Succeed())
		Expect(h.StartMetadata(ctx)).To(Succeed())
		Expect(h.StartManager(ctx)).To(Succeed())
		Eventually(func() []metadata.Allocation {
			return held(h,
				"overlay")
		}).ShouldNot(ContainElement(HaveField("ContainerID", dead.ID)))
		Consistently(func() []metadata.Allocation { return held(h, "overlay") }, "1500ms",
			"100ms").Should(ContainElement(HaveField("ContainerID", live.ID)))
		pings(host(0).Netns, live.Addr(false))
	})

	It("F133: what a runtime that never sends GC leaves behind goes all the same; a live container's never", func() {
		live, cl := connected(host(1), "overlay"), call(host(1), "overlay", nil)
		dead := container(host(1))
		Expect(dead.Add(ctx, cl)).To(Succeed())
		Expect(dead.Netns.Remove()).To(Succeed()) // its runtime is dead too
		Eventually(func() []metadata.Allocation {
			return held(host(1),
				"overlay")
		}).ShouldNot(ContainElement(HaveField("ContainerID", dead.ID)))
		Eventually(func() []string { return ports(host(1)) }).ShouldNot(ContainElement(dead.Result.Interfaces[0].Name))
		Expect(live.Check(ctx, cl)).To(Succeed())
		pings(host(0).Netns, live.Addr(false))
	})

	It("F134: STATUS tells what is wrong, with its code and remedy", func() {
		h := host(1)
		c := connected(h, "overlay")
		_ = c
		conf := `{"cniVersion":"1.1.0","name":"overlay","type":"lariat-vxlan"`
		_, err := raw(h, "STATUS", "", conf)
		Expect(err).NotTo(HaveOccurred())
		Expect(h.Manager.Stop()).To(Succeed())
		Expect(h.Do(func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("0"), 0) })).To(Succeed())
		_, err = raw(h, "STATUS", "", conf)
		Expect(code(err)).To(BeEquivalentTo(51))
		Expect(err).To(MatchError(ContainSubstring("ip_forward")))
		Expect(h.Do(func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0) })).To(Succeed())
		Expect(h.Do(func() error {
			l, err := netlink.LinkByName("vtep1042")
			if err != nil {
				return err
			}
			return netlink.LinkDel(l)
		})).To(Succeed())
		_, err = raw(h, "STATUS", "", conf)
		Expect(err).NotTo(HaveOccurred(), "the next ADD makes the device")
		_, err = raw(h, "STATUS", "", conf+`,"strictStatus":true`)
		Expect(code(err)).To(BeEquivalentTo(51))
		Expect(err).To(MatchError(ContainSubstring("vtep1042")))
		Expect(h.Metadata.Stop()).To(Succeed())
		_, err = raw(h, "STATUS", "", conf)
		Expect(code(err)).To(BeEquivalentTo(50))
		Expect(err).To(MatchError(ContainSubstring("lariat-metadata")))
		Expect(h.StartMetadata(ctx)).To(Succeed())
		Expect(h.StartManager(ctx)).To(Succeed())
		Eventually(func() error { _, err := raw(h, "STATUS", "", conf); return err }).Should(Succeed())
	})

	It("works before, and without, the manager: ADD makes the device itself", func() {
		h := host(1)
		Expect(h.Manager.Stop()).To(Succeed())
		Expect(h.Do(func() error {
			l, err := netlink.LinkByName("vtep1042")
			if err != nil {
				return err
			}
			return netlink.LinkDel(l)
		})).To(Succeed())
		c := connected(h, "overlay")
		pings(host(0).Netns, c.Addr(false))
		Expect(h.StartManager(ctx)).To(Succeed())
	})
})

// raw calls lariat-vxlan as a runtime would, with this host's paths put behind the configuration, which lacks
// its last brace.
func raw(h *lab.Host, verb, containerID, conf string) (string, error) {
	conf += fmt.Sprintf(`,"socket":%q,"managerSocket":%q,"stateDir":%q,"ipam":{"type":"lariat-ipam"}}`, h.Socket(),
		h.ManagerSocket(), h.StateDir())
	return h.Exec(ctx, filepath.Join(cluster.Bin, "lariat-vxlan"), conf, "CNI_COMMAND="+verb, "CNI_CONTAINERID="+
		containerID, "CNI_IFNAME=eth0", "CNI_PATH="+cluster.Bin)
}

func resultText(c *lab.Container) string {
	GinkgoHelper()
	data, err := json.Marshal(c.Result)
	Expect(err).NotTo(HaveOccurred())
	return string(data)
}
