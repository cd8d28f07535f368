// Package forgotten_test takes from the metadata service what it knows of containers that run: the store is lost,
// or a host is removed while it is suspended.
package forgotten_test

import (
	"context"
	"encoding/json"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/lariat-net/lariat/pkg/attach"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/probe"
	"github.com/lariat-net/lariat/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }

var (
	ctx     = context.Background()
	cluster *lab.Cluster
	a, b, c *lab.Host
)

func TestForgotten(t *testing.T) {
	probe.Need(t, probe.UserNS, probe.Veth, probe.Bridge, probe.VXLAN, probe.NexthopObjects, probe.Nft, probe.NftFib,
		probe.NftNAT, probe.IPv6)
	RegisterFailHandler(Fail)
	RunSpecs(t, "What the service has forgotten")
}

var overlay = metadata.Network{Name: "overlay", Encapsulation: metadata.EncapVXLAN, VNI: 1042, HostNAT: true,
	Subnets: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("fd42::/48")}}

var _ = BeforeSuite(func() {
	SetDefaultEventuallyTimeout(time.Minute)
	SetDefaultEventuallyPollingInterval(50 * time.Millisecond)
	var err error
	// The slow timer never comes: what heals does so by an event.
	cluster, err = lab.New(lab.Options{Hosts: 3, Log: GinkgoWriter, Metadata: []string{"--lease", "3s"},
		Manager: []string{"--interval", "1h", "--grace", "0s"}})
	Expect(err).NotTo(HaveOccurred())
	Expect(cluster.Up(ctx)).To(Succeed())
	a, b, c = cluster.Hosts[0], cluster.Hosts[1], cluster.Hosts[2]
	Expect(a.Client().Put(ctx, metadata.KindNetwork, "overlay", overlay)).To(Succeed())
	for _, h := range cluster.Hosts {
		Eventually(func() error { return h.Settled(ctx) }).Should(Succeed())
	}
})

func call(h *lab.Host, ip ...netip.Addr) lab.Call {
	GinkgoHelper()
	conf, err := h.Conf("overlay", nil)
	Expect(err).NotTo(HaveOccurred())
	call := lab.Call{Conf: conf}
	for _, x := range ip {
		call.Args = map[string]string{"IP": x.String()}
	}
	return call
}

// connected is a new container of the host.
func connected(h *lab.Host, name string, ip ...netip.Addr) *lab.Container {
	GinkgoHelper()
	x, err := h.NewContainer(name)
	Expect(err).NotTo(HaveOccurred())
	patient, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	Expect(x.AddPatiently(patient, call(h, ip...))).To(Succeed(), name)
	DeferCleanup(func() {
		Expect(x.Del(ctx, call(h))).To(Succeed())
		Expect(x.Netns.Remove()).To(Succeed())
	})
	return x
}

// known fails unless the service of the host lists the container under its own host, with its addresses.
func known(h *lab.Host, x *lab.Container) func() error {
	return func() error {
		var o metadata.Container
		if err := h.Client().Get(ctx, metadata.KindContainer, x.Host.Name+"/"+x.ID, &o); err != nil {
			return err
		}
		held, err := x.Host.Client().Attachment(ctx, "overlay", metadata.AttachmentID{ContainerID: x.ID, IfName: "eth0"})
		if err != nil {
			return err
		}
		if len(held.Addresses) != 2 || held.Addresses[0].Address != x.Addr(false) ||
			held.Addresses[1].Address != x.Addr(true) {
			return metadata.Errorf(metadata.CodeConflict, "%s has %s, the service says %+v", x.ID, x.Addr(false), held.Addresses)
		}
		return nil
	}
}

// reaches fails unless the packets of one container come to the other and back.
func reaches(x, y *lab.Container) func() error {
	return func() error {
		short, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		for _, v6 := range []bool{false, true} {
			if _, err := x.Netns.Ping(short, y.Addr(v6), 56); err != nil {
				return err
			}
		}
		return nil
	}
}

// local fails unless the host's route to the container's address leads to the container's own port.
func local(x *lab.Container) func() string {
	return func() string {
		out, err := x.Host.Output(ctx, "ip", "route", "show", x.Addr(false).String())
		if err != nil {
			return err.Error()
		}
		name := attach.HostName(metadata.AttachmentID{ContainerID: x.ID, IfName: "eth0"})
		if !strings.Contains(out, " dev "+name+" ") {
			return out
		}
		return ""
	}
}

// findings is what a check of the doctor has to say on a host.
func findings(h *lab.Host, checks ...string) func() string {
	return func() string {
		out, _ := h.Lariat(ctx, append([]string{"doctor", "--no-probe", "--output", "json"}, checks...)...)
		var r struct {
			Findings []struct{ What string }
			Skipped  []struct{ Why string }
		}
		if err := json.Unmarshal([]byte(out), &r); err != nil {
			return err.Error() + out
		}
		var all []string
		for _, f := range r.Findings {
			all = append(all, f.What)
		}
		for _, s := range r.Skipped {
			all = append(all, "skipped: "+s.Why)
		}
		return strings.Join(all, "\n")
	}
}

// ready is what keeps the host's network manager from being ready.
func ready(h *lab.Host) func() string {
	return func() string {
		err := (metadata.Client{Socket: h.ManagerSocket()}).Do(ctx, http.MethodGet, "/readyz", nil, nil)
		if err != nil {
			return err.Error()
		}
		return ""
	}
}

var _ = Describe("Containers that the service has forgotten", Ordered, func() {
	It("keep their addresses when the store is lost and the network is made anew", func() {
		old := []*lab.Container{connected(a, "web"), connected(a, "web2"), connected(b, "db"), connected(b, "db2")}
		Expect(a.Metadata.Stop()).To(Succeed())
		Expect(os.RemoveAll(filepath.Join(a.Dir, "etcd"))).To(Succeed())
		Expect(a.StartMetadata(ctx)).To(Succeed())
		Expect(a.Client().Put(ctx, metadata.KindNetwork, "overlay", overlay)).To(Succeed())

		// Without a slow timer and without an ADD each host says what it runs.
		for _, x := range old {
			Eventually(known(a, x)).Should(Succeed(), x.Name)
		}
		all := slices.Clone(old)
		for _, h := range []*lab.Host{a, b} {
			all = append(all, connected(h, "next"), connected(h, "next2"))
		}
		seen := map[netip.Addr]string{}
		for _, x := range all {
			for _, v6 := range []bool{false, true} {
				Expect(seen).NotTo(HaveKey(x.Addr(v6)), "%s has the address of %s", x.Name, seen[x.Addr(v6)])
				seen[x.Addr(v6)] = x.Name
			}
		}
		for _, x := range all {
			Expect(local(x)()).To(BeEmpty(), x.Name)
			Eventually(known(a, x)).Should(Succeed(), x.Name)
			Eventually(known(b, x)).Should(Succeed(), x.Name)
		}
		for _, x := range all {
			for _, y := range all {
				if x != y {
					Eventually(reaches(x, y)).Should(Succeed(), "%s to %s", x.Name, y.Name)
				}
			}
		}
		for _, h := range cluster.Hosts {
			Eventually(ready(h)).Should(BeEmpty())
			Eventually(findings(h, "attachments", "manager")).Should(BeEmpty())
		}
	})

	It("of a host that was removed while it was suspended are announced again, but for an address that another host "+
		"uses now", func() {
		near := connected(a, "near")
		kept, doubled := connected(c, "kept"), connected(c, "doubled")
		for _, p := range []*lab.Process{c.Manager, c.Metadata} {
			Expect(syscall.Kill(p.Pid(), syscall.SIGSTOP)).To(Succeed())
		}
		asleep := true
		wake := func() {
			for _, p := range []*lab.Process{c.Metadata, c.Manager} {
				Expect(syscall.Kill(p.Pid(), syscall.SIGCONT)).To(Succeed())
			}
			asleep = false
		}
		DeferCleanup(func() {
			if asleep {
				wake()
			}
		})
		Eventually(func() error { _, err := a.Lariat(ctx, "host", "remove", "c"); return err }).Should(Succeed())
		heir := connected(b, "heir", doubled.Addr(false))
		wake()

		Eventually(known(a, kept)).Should(Succeed())
		Eventually(reaches(near, kept)).Should(Succeed())
		Eventually(findings(c, "attachments")).Should(And(ContainSubstring("container "+metadata.ShortID(doubled.ID)+" has "+
			doubled.Addr(false).String()),
			ContainSubstring("container "+metadata.ShortID(heir.ID)+" of host b"),
			Not(ContainSubstring(metadata.ShortID(kept.ID)))))
		Eventually(ready(c)).Should(ContainSubstring(doubled.ID))
		Eventually(findings(c, "manager")).Should(And(ContainSubstring(doubled.ID), ContainSubstring(heir.ID)))
		Eventually(reaches(near, heir)).Should(Succeed())
		Expect(local(heir)()).To(BeEmpty())
		Eventually(local(doubled)).Should(BeEmpty(), "its own host leads elsewhere")
		Eventually(reaches(near, connected(c, "later"))).Should(Succeed())
	})
})
