// Package encrypted_test shows what encrypted networks promise, with the real programs and the real
// strongSwan, in a guest.
package encrypted_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/ike"
	"github.com/lariat-net/lariat/pkg/ipsec"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/unixhttp"
	"github.com/lariat-net/lariat/test/guest"
	"github.com/lariat-net/lariat/test/lab"
)

func TestMain(m *testing.M) {
	if guest.Inside() {
		lab.Main(m)
	}
	guest.Main(m, guest.Options{Warm: true, Bin: true, Memory: 2048})
}

var (
	ctx     = context.Background()
	cluster *lab.Cluster
	// sentinel listens, while all specs run, for packets that come where they must not.
	sentinel *lab.Sentinel
)

const (
	network = "private"
	secretA = "Y2hvc2VuIGZvciB0ZXN0cywgYW5kIGZvciB0aGVzZSBhbG9uZQ=="
	secretB = "dGhlIG9uZSB0aGF0IGNvbWVzIGFmdGVyIHRoZSBmaXJzdCBvbmU="
)

var subnets = []netip.Prefix{netip.MustParsePrefix("10.44.0.0/16"), netip.MustParsePrefix("fd44::/48")}

func TestEncrypted(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "Encrypted networks")
}

var _ = BeforeSuite(func() {
	SetDefaultEventuallyTimeout(guest.Patience)
	// to ask costs the one emulated processor what those who are asked need to get on
	SetDefaultEventuallyPollingInterval(200 * time.Millisecond)
})

// begin makes the cluster that specs share, with a sentinel at an address of its underlay. It goes with them,
// and then the sentinel must have heard nothing.
func begin(o lab.Options, listener string) {
	GinkgoHelper()
	o.Manager, o.Log = []string{"--interval", "2s", "--grace", "0s"}, GinkgoWriter
	var err error
	cluster, err = lab.New(o)
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(func() {
		for _, h := range cluster.Hosts {
			Expect(h.Manager.Stop()).To(Succeed())
			Expect((&ike.Charon{Dir: h.IKEDir()}).Stop(ctx)).To(Succeed())
		}
		Expect(cluster.Remove()).To(Succeed())
	})
	for _, h := range cluster.Hosts {
		secrets(h, secretA)
	}
	Expect(cluster.Up(ctx)).To(Succeed())
	create(metadata.Network{Name: network, Subnets: subnets, Encapsulation: metadata.EncapIPsec, HostNAT: true})
	sentinel, err = lab.NewSentinel(ctx, cluster, "sentinel", netip.MustParseAddr(listener))
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(func() { Expect(sentinel.Close()).To(Succeed()) })
}

// secrets writes a host's file of secrets.
func secrets(h *lab.Host, lines ...string) {
	GinkgoHelper()
	Expect(os.WriteFile(h.SecretFile(), []byte(strings.Join(lines, "\n")+"\n"), 0o600)).To(Succeed())
}

func host(i int) *lab.Host { return cluster.Hosts[i] }

// create makes a network and waits until every host knows a way to every other.
func create(n metadata.Network) {
	GinkgoHelper()
	Expect(host(0).Client().Put(ctx, metadata.KindNetwork, n.Name, n)).To(Succeed())
	for _, h := range cluster.Hosts {
		ready(h)
	}
}

// ready waits until a host has nothing left to do.
func ready(h *lab.Host) {
	GinkgoHelper()
	Eventually(func() error {
		r, err := report(h)
		if err == nil && (r.Problem != "" || r.Missing != "" || len(r.Networks) == 0) {
			err = fmt.Errorf("host %s: %+v", h.Name, r)
		}
		for _, t := range r.Tunnels {
			if t.State == ipsec.StateDown {
				err = fmt.Errorf("host %s: %+v", h.Name, t)
			}
		}
		if err == nil {
			err = h.Settled(ctx)
		}
		return err
	}).Should(Succeed())
}

// manager asks a host's network manager.
func manager(h *lab.Host, method, path, body string) (int, string) {
	GinkgoHelper()
	ctx, cancel := context.WithTimeout(ctx, guest.Patience)
	defer cancel()
	status, answer, err := unixhttp.Page(ctx, h.ManagerSocket(), method, path, []byte(body))
	if status == 0 {
		return 0, err.Error()
	}
	Expect(err).NotTo(HaveOccurred())
	return status, string(answer)
}

// reload has a host's manager reconcile until that succeeds. On a busy machine the time for one pass is too
// short now and then.
func reload(h *lab.Host) {
	GinkgoHelper()
	Eventually(func() error {
		code, body := manager(h, "POST", "/v1/reload", "")
		if code != http.StatusOK {
			return fmt.Errorf("%d %s", code, body)
		}
		return nil
	}).Should(Succeed())
}

func report(h *lab.Host) (r ipsec.Report, err error) {
	code, body := manager(h, "GET", "/v1/tunnels", "")
	if code != http.StatusOK {
		return r, fmt.Errorf("host %s: %d %s", h.Name, code, body)
	}
	return r, json.Unmarshal([]byte(body), &r)
}

// tunnel is how a host sees its tunnel to another.
func tunnel(h, peer *lab.Host) ipsec.Status {
	r, err := report(h)
	if err != nil {
		return ipsec.Status{LastError: err.Error()}
	}
	for _, t := range r.Tunnels {
		if t.Peer == peer.Name {
			return t
		}
	}
	return ipsec.Status{LastError: "no tunnel to " + peer.Name}
}

var serial int

// connected is a container on the network; its DEL comes with the end of the spec.
func connected(h *lab.Host) *lab.Container {
	GinkgoHelper()
	return connectedTo(h, network, call(h))
}

// connectedTo is a container on any network, which the call names.
func connectedTo(h *lab.Host, network string, call lab.Call) *lab.Container {
	GinkgoHelper()
	serial++
	c, err := h.NewContainer(fmt.Sprint("c", serial))
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(func() { c.Netns.Remove() })
	add(c, call)
	DeferCleanup(func() { Expect(c.Del(ctx, call)).To(Succeed()) })
	stop, err := sentinel.Watch(ctx, c, "eth0", network)
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(stop)
	return c
}

func add(c *lab.Container, call lab.Call) {
	GinkgoHelper()
	limited, cancel := context.WithTimeout(ctx, guest.Patience)
	defer cancel()
	Expect(c.AddPatiently(limited, call)).To(Succeed())
}

func call(h *lab.Host) lab.Call { GinkgoHelper(); return callOf(h, network, "lariat-ipsec") }

// callOf connects to a network by a plugin.
func callOf(h *lab.Host, network, plugin string) lab.Call {
	GinkgoHelper()
	conf, err := h.Conf(network, map[string]any{"type": plugin})
	Expect(err).NotTo(HaveOccurred())
	return lab.Call{Conf: conf}
}

// strict is call with a STATUS that fails also for what does not keep an ADD from its work.
func strict(h *lab.Host) lab.Call {
	GinkgoHelper()
	conf, err := h.Conf(network, map[string]any{"type": "lariat-ipsec", "strictStatus": true})
	Expect(err).NotTo(HaveOccurred())
	return lab.Call{Conf: conf}
}

// pings waits until to answers from, in all families that it has.
func pings(from *lab.Container, to *lab.Container) {
	GinkgoHelper()
	for _, v6 := range []bool{false, true} {
		if a := to.Addr(v6); a.IsValid() {
			ping(from.Netns, a)
		}
	}
}

func ping(from lab.Netns, to netip.Addr) {
	GinkgoHelper()
	short, cancel := context.WithTimeout(ctx, guest.Patience)
	defer cancel()
	_, err := from.Ping(short, to, 56)
	Expect(err).NotTo(HaveOccurred())
}

// silent is a ping that must not be answered.
func silent(from lab.Netns, to netip.Addr) {
	GinkgoHelper()
	short, cancel := context.WithTimeout(ctx, 800*time.Millisecond)
	defer cancel()
	_, err := from.Ping(short, to, 56)
	Expect(err).To(HaveOccurred())
}

// What a wire carries.
const (
	inClear = "clear"
	esp     = "esp"
	espUDP  = "esp in udp"
	ikeUDP  = "ike"
)

// class tells what of the overlay a packet on the underlay shows. A VXLAN packet would show all.
func class(p lab.Packet) string {
	for _, s := range append(slices.Clone(subnets), fourSubnet) {
		if s.Contains(p.Src) || s.Contains(p.Dst) {
			return fmt.Sprintf("%s: %s > %s proto %d", inClear, p.Src, p.Dst, p.Proto)
		}
	}
	switch {
	case p.Proto == unix.IPPROTO_ESP:
		return esp
	case p.Proto == unix.IPPROTO_UDP && (p.SrcPort == 500 || p.DstPort == 500):
		return ikeUDP
	case p.Proto == unix.IPPROTO_UDP && (p.SrcPort == 4500 || p.DstPort == 4500):
		if len(p.Payload) >= 12 && string(p.Payload[8:12]) != "\x00\x00\x00\x00" {
			return espUDP
		}
		return ikeUDP
	case p.Proto == unix.IPPROTO_UDP && p.DstPort == 4789:
		return inClear + ": vxlan"
	}
	return ""
}

// watched listens on every host's underlay during a spec, and fails it for a single clear packet.
func watched() (wires []*lab.Wire) {
	GinkgoHelper()
	for _, h := range cluster.Hosts {
		w, err := h.Listen("eth0", class)
		Expect(err).NotTo(HaveOccurred())
		wires = append(wires, w)
	}
	DeferCleanup(func() {
		for i, w := range wires {
			w.Close()
			for what, n := range w.Counts() {
				if strings.HasPrefix(what, inClear) {
					Fail(fmt.Sprintf("host %s: %d times %s", host(i).Name, n, what))
				}
			}
			GinkgoWriter.Printf("host %s:\n%s", host(i).Name, w)
		}
	})
	return wires
}

// xfrm lists a host's SAs and policies.
func xfrm(h *lab.Host) (sas []netlink.XfrmState, policies []netlink.XfrmPolicy) {
	GinkgoHelper()
	Expect(h.Do(func() (err error) {
		if sas, err = kernel.RetryDump(func() ([]netlink.XfrmState,
			error) {
			return netlink.XfrmStateList(netlink.FAMILY_ALL)
		}); err != nil {
			return err
		}
		policies, err = kernel.RetryDump(func() ([]netlink.XfrmPolicy,
			error) {
			return netlink.XfrmPolicyList(netlink.FAMILY_ALL)
		})
		return err
	})).To(Succeed())
	return sas, policies
}

// charon is the process id of a host's IKE daemon, 0 while there is none.
func charon(h *lab.Host) int { return (&ike.Charon{Dir: h.IKEDir()}).Pid() }

// What a failure was like, from every host's end. The keys of SAs are left out.
var _ = JustAfterEach(func() {
	if !CurrentSpecReport().Failed() {
		return
	}
	for _, h := range cluster.Hosts {
		out, _ := h.Output(ctx, "sh", "-c", "ip -s xfrm state | grep -v 0x................; ip xfrm policy; ip route; "+
			"ip -s link; cat /proc/net/xfrm_stat; grep -E ^I[pc] /proc/net/snmp; nft list table inet lariat; tail -60 "+
			h.IKEDir()+"/charon.log")
		GinkgoWriter.Printf("host %s:\n%s\n", h.Name, out)
	}
})
