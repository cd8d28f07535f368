package integration_test

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/vishvananda/netlink"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }

var ctx = context.Background()

// cluster is the three hosts that the specs share. Each spec brings containers of its own, and takes them away.
var cluster *lab.Cluster

// sentinel listens, while all specs run, for packets that come where they must not.
var sentinel *lab.Sentinel

func TestOverlay(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "Three hosts")
}

var _ = BeforeSuite(func() {
	SetDefaultEventuallyTimeout(10 * time.Second)
	SetDefaultEventuallyPollingInterval(5 * time.Millisecond)
	var err error
	cluster, err = lab.New(lab.Options{Hosts: 3, Manager: []string{"--interval", "1s", "--grace", "0s"},
		Log: GinkgoWriter})
	Expect(err).NotTo(HaveOccurred())
	Expect(cluster.Up(ctx)).To(Succeed())
	create(metadata.Network{Name: "overlay", Subnets: prefixes("10.42.0.0/16", "fd42::/48"),
		Encapsulation: metadata.EncapVXLAN, VNI: 1042, HostNAT: true})
	sentinel, err = lab.NewSentinel(ctx, cluster, "sentinel", netip.MustParseAddr("192.0.2.250"))
	Expect(err).NotTo(HaveOccurred())
})

var _ = AfterSuite(func() {
	if sentinel != nil {
		Expect(sentinel.Close()).To(Succeed())
	}
})

func prefixes(list ...string) (out []netip.Prefix) {
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// create makes a network and waits until every host takes part in it.
func create(n metadata.Network) {
	GinkgoHelper()
	Expect(cluster.Hosts[0].Client().Put(ctx, metadata.KindNetwork, n.Name, n)).To(Succeed())
	if n.Encapsulation != metadata.EncapVXLAN {
		return
	}
	for _, h := range cluster.Hosts {
		Eventually(func() error {
			return h.Do(func() error { _, err := netlink.LinkByName(fmt.Sprintf("vtep%d", n.VNI)); return err })
		}).Should(Succeed())
	}
}

// dropNetwork takes away what create made.
func dropNetwork(name string) {
	GinkgoHelper()
	Expect(cluster.Hosts[0].Client().Delete(ctx, metadata.KindNetwork, name)).To(Succeed())
}

func host(i int) *lab.Host { return cluster.Hosts[i] }

var serial int

// container makes one without connecting it; it goes with the spec.
func container(h *lab.Host) *lab.Container {
	GinkgoHelper()
	serial++
	c, err := h.NewContainer(fmt.Sprintf("c%d", serial))
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(func() { c.Netns.Remove() })
	return c
}

// call is a CNI call for a network with the given changes to its main plugin.
func call(h *lab.Host, network string, plugin map[string]any, chained ...map[string]any) lab.Call {
	GinkgoHelper()
	conf, err := h.Conf(network, plugin, chained...)
	Expect(err).NotTo(HaveOccurred())
	return lab.Call{Conf: conf}
}

// connected is a container on the network; its DEL comes with the end of the spec.
func connected(h *lab.Host, network string) *lab.Container {
	GinkgoHelper()
	c, cl := container(h), call(h, network, nil)
	Expect(c.Add(ctx, cl)).To(Succeed())
	DeferCleanup(func() { Expect(c.Del(ctx, cl)).To(Succeed()) })
	stop, err := sentinel.Watch(ctx, c, "eth0", network)
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(stop)
	return c
}

// pings waits until to answers from.
func pings(from lab.Netns, to netip.Addr) {
	GinkgoHelper()
	short, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	_, err := from.Ping(short, to, 56)
	Expect(err).NotTo(HaveOccurred())
}

// silent is a ping that must not be answered.
func silent(from lab.Netns, to netip.Addr) {
	GinkgoHelper()
	short, cancel := context.WithTimeout(ctx, 600*time.Millisecond)
	defer cancel()
	_, err := from.Ping(short, to, 56)
	Expect(err).To(HaveOccurred())
}

// held are the addresses that a host's attachments hold.
func held(h *lab.Host, network string) []metadata.Allocation {
	GinkgoHelper()
	list, err := h.Client().Allocations(ctx, network, false)
	Expect(err).NotTo(HaveOccurred())
	return list
}

// ports are the host ends of containers' veths.
func ports(h *lab.Host) (names []string) {
	GinkgoHelper()
	Expect(h.Do(func() error {
		links, err := kernel.RetryDump(netlink.LinkList)
		for _, l := range links {
			if strings.HasPrefix(l.Attrs().Name, delta.VethPrefix) {
				names = append(names, l.Attrs().Name)
			}
		}
		return err
	})).To(Succeed())
	return names
}

// records lists the journal of a host's attachments.
func records(h *lab.Host, network string) []string {
	GinkgoHelper()
	found, err := filepath.Glob(filepath.Join(h.StateDir(), "attachments", network, "[^.]*"))
	Expect(err).NotTo(HaveOccurred())
	return found
}
