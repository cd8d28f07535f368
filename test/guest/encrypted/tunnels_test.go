package encrypted_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/certs"
	"github.com/lariat-net/lariat/pkg/ike"
	"github.com/lariat-net/lariat/pkg/ipsec"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/test/guest"
	"github.com/lariat-net/lariat/test/lab"
)

// established is one IKE SA with one child, both ends agree.
func established(a, b *lab.Host) {
	GinkgoHelper()
	for _, ends := range [][2]*lab.Host{{a, b}, {b, a}} {
		Eventually(func() string { return tunnel(ends[0], ends[1]).State }).Should(Equal(ipsec.StateEstablished))
	}
	for _, ends := range [][2]*lab.Host{{a, b}, {b, a}} {
		Eventually(func() int { return sasBetween(ends[0], ends[1]) }).Should(Equal(2), "one each way")
	}
}

// sasBetween counts a host's SAs with another.
func sasBetween(h, peer *lab.Host) (n int) {
	GinkgoHelper()
	sas, _ := xfrm(h)
	for _, s := range sas {
		if s.Spi != 0 && (s.Src.String() == peer.Addr.Addr().String() || s.Dst.String() == peer.Addr.Addr().String()) {
			n++
		}
	}
	return n
}

// complete compares a host's policies with its tunnels: for both peers three directions in two families, each
// once and bound to its if_id.
func complete(h *lab.Host) error {
	GinkgoHelper()
	ids := map[int]bool{}
	for _, p := range cluster.Hosts {
		if p != h {
			for _, c := range tunnel(h, p).Children {
				ids[int(c.IfID)] = true
			}
		}
	}
	_, policies := xfrm(h)
	count := map[string]int{}
	for _, p := range policies {
		if p.Ifid == 0 {
			continue // sockets of the IKE daemon's own
		}
		k := fmt.Sprintf("if_id %#x %s %s", p.Ifid, p.Dir, p.Src)
		if count[k]++; !ids[p.Ifid] || count[k] > 1 {
			return fmt.Errorf("host %s: policy %s is there %d times; if_ids %v", h.Name, k, count[k], ids)
		}
	}
	if want := 2 * 3 * len(subnets); len(ids) != 2 || len(count) != want {
		return fmt.Errorf("host %s: %d policies, want %d; if_ids %v: %v", h.Name, len(count), want, ids, count)
	}
	return nil
}

// loss runs f while a packet goes from a to b and back each 20 ms (more often, it would take all of the
// emulated processor's time), and returns the numbers of those that were lost.
func loss(a, b *lab.Container, f func()) (sent int, lost []int) {
	GinkgoHelper()
	flow, err := a.Flow(b.Netns, b.Addr(false), 20*time.Millisecond)
	Expect(err).NotTo(HaveOccurred())
	Eventually(func() int { _, back := flow.Count(); return back }).Should(BeNumerically(">", 5))
	f()
	return flow.Stop()
}

// restart gives the first two hosts' managers more flags, each its own; without any they are as before.
func restart(more ...[]string) {
	GinkgoHelper()
	if len(more) == 0 {
		more = make([][]string, 2)
	}
	for i, flags := range more {
		Expect(host(i).Manager.Stop()).To(Succeed())
		Expect(host(i).StartManager(ctx, flags...)).To(Succeed())
	}
	ready(host(0))
	ready(host(1))
}

// terminated has the first two hosts' tunnel made anew by the next packet: what is established keeps what it
// was established with.
func terminated() {
	GinkgoHelper()
	for i := range 2 {
		_, _ = host(i).Output(ctx, "swanctl", "--terminate", "--ike", ipsec.ConnPrefix+host(1-i).Name, "--force", "--uri",
			"unix://"+host(i).IKEDir()+"/charon.vici")
	}
	Eventually(func() int { return sasBetween(host(0), host(1)) }).Should(BeZero())
}

// until waits for something to become true that takes long.
func until(what string, ok func() bool) {
	GinkgoHelper()
	Eventually(ok).Should(BeTrue(), what)
}

var _ = Describe("An encrypted network", Ordered, ContinueOnFailure, func() {
	BeforeAll(func() { begin(lab.Options{Hosts: 3}, "192.0.2.250") })

	outside(false)

	It("F36: sets up one tunnel for a pair of hosts by the first packet, and what is on the wire is ESP", func() {
		wires := watched()
		a, b := connected(host(0)), connected(host(1))
		Expect(tunnel(host(0), host(1)).State).To(Equal(ipsec.StateIdle), "nothing was sent yet")
		start := time.Now()
		pings(a, b)
		GinkgoWriter.Printf("first answers after %s\n", time.Since(start))
		established(host(0), host(1))
		Expect(wires[0].Counts()[esp]).To(BeNumerically(">=", 4))
		t := tunnel(host(0), host(1))
		Expect(t.Suite).To(ContainSubstring("AES_GCM"))
		Expect(t.Children).To(HaveLen(1))
		Expect(t.Children[0].Network).To(Equal(network))
		Expect(t.Children[0].Suite).To(ContainSubstring("AES_GCM"))
		Expect(t.Children[0].BytesOut).To(BeNumerically(">", 0))
		Expect(t.Since).To(BeTemporally("~", time.Now(), time.Minute))
		sas, _ := xfrm(host(0))
		for _, s := range sas {
			if s.Spi == 0 {
				continue
			}
			Expect(ipsec.Owned(uint32(s.Ifid))).To(BeTrue())
		}
		out, err := host(0).Output(ctx, "ip", "xfrm", "state")
		Expect(err).NotTo(HaveOccurred())
		Expect(out).To(ContainSubstring(fmt.Sprintf("replay_window %d", ipsec.ReplayWindow)))
	})

	It("F142: makes one tunnel when both ends send at once, and prints how soon each is answered", func() {
		watched()
		a, b, c := connected(host(0)), connected(host(1)), connected(host(2))
		pairs := [][2]*lab.Container{{a, c}, {c, a}, {b, c}, {c, b}}
		var wg sync.WaitGroup
		took := make([]time.Duration, len(pairs))
		for i, p := range pairs {
			wg.Go(func() {
				defer GinkgoRecover()
				start := time.Now()
				ping(p[0].Netns, p[1].Addr(false))
				took[i] = time.Since(start)
			})
		}
		wg.Wait()
		GinkgoWriter.Printf("answers after %v\n", took)
		established(host(0), host(2))
		established(host(1), host(2))
	})

	It("F38: keeps just the tunnels' policies, each bound to its if_id", func() {
		for _, h := range cluster.Hosts {
			Expect(complete(h)).To(Succeed())
		}
	})

	It("F39: leaves policies and connections of others alone", func() {
		foreign := &netlink.XfrmPolicy{Src: mustCIDR("203.0.113.0/24"), Dst: mustCIDR("198.51.100.0/24"),
			Dir: netlink.XFRM_DIR_OUT, Ifid: 77, Action: netlink.XFRM_POLICY_BLOCK}
		Expect(host(0).Do(func() error { return netlink.XfrmPolicyAdd(foreign) })).To(Succeed())
		DeferCleanup(func() { Expect(host(0).Do(func() error { return netlink.XfrmPolicyDel(foreign) })).To(Succeed()) })
		reload(host(0))
		_, policies := xfrm(host(0))
		Expect(policies).To(ContainElement(HaveField("Ifid", 77)))
	})

	It("F37: drops and does not send in clear while IKE is blocked", func() {
		watched()
		a, b := connected(host(0)), connected(host(1))
		pings(a, b)
		// Nothing of IKE or ESP reaches the other host any more, and the tunnel that there is goes.
		out, err := host(1).Output(ctx, "nft",
			`add table inet block; add chain inet block in { type filter hook prerouting priority -500; }; `+
				`add rule inet block in iifname "eth0" meta l4proto esp drop; add rule inet block in iifname "eth0" udp dport { 500, 4500 } drop`)
		Expect(err).NotTo(HaveOccurred(), out)
		defer func() {
			out, err := host(1).Output(ctx, "nft", "delete", "table", "inet", "block")
			Expect(err).NotTo(HaveOccurred(), out)
			pings(a, b)
		}()
		silent(a.Netns, b.Addr(false))
		silent(a.Netns, b.Addr(true))
		silent(b.Netns, a.Addr(false))
	})

	It("F144: drops a forged packet from the overlay, in clear and in VXLAN, and ESP with a wrong key", func() {
		a, b := connected(host(0)), connected(host(1))
		pings(a, b)
		arrived, err := b.Listen("eth0", func(p lab.Packet) string {
			if p.Proto == unix.IPPROTO_UDP && p.DstPort == 9 {
				return "arrived from " + p.Src.String()
			}
			return ""
		})
		Expect(err).NotTo(HaveOccurred())
		defer arrived.Close()
		// A machine of nobody's on the same link, with a route to the container by its host.
		evil, err := lab.NewNetns("evil")
		Expect(err).NotTo(HaveOccurred())
		defer evil.Remove()
		Expect(cluster.Switch.Plug(evil, "eth0", 1500, netip.MustParsePrefix("192.0.2.66/24"))).To(Succeed())
		hostAddr, to := host(1).Addr.Addr(), b.Addr(false)
		reached, err := host(1).Listen("eth0", func(p lab.Packet) string {
			switch {
			case p.Src == hostAddr:
			case p.Proto == unix.IPPROTO_UDP && p.DstPort == 9:
				return "clear"
			case p.Proto == unix.IPPROTO_UDP && p.DstPort == 4789:
				return "vxlan"
			case p.Proto == unix.IPPROTO_ESP && p.Src == netip.MustParseAddr("192.0.2.66"):
				return "esp"
			}
			return ""
		})
		Expect(err).NotTo(HaveOccurred())
		defer reached.Close()
		for _, forgery := range []struct{ what, script string }{
			{"clear", fmt.Sprintf("ip addr add 10.44.200.1/32 dev lo; ip route add 10.44.0.0/16 via %s src 10.44.200.1",
				hostAddr)},
			{"vxlan", fmt.Sprintf(`ip link add vx type vxlan id 1042 dstport 4789 remote %s dev eth0; ip link set vx up
				ip route add %[2]s/32 dev vx src 10.44.200.1; ip neigh add %[2]s dev vx lladdr 0e:00:c0:00:02:02 nud permanent`, hostAddr, to)},
			{"esp", fmt.Sprintf(`ip route del %[2]s/32 dev vx; ip link add x0 type xfrm dev eth0 if_id 9; ip link set x0 up; ip route add %[2]s/32 dev x0 src 10.44.200.1
				ip xfrm policy add dir out src 0.0.0.0/0 dst 0.0.0.0/0 if_id 9 tmpl src 192.0.2.66 dst %[1]s proto esp reqid 9 mode tunnel
				ip xfrm state add src 192.0.2.66 dst %[1]s proto esp spi %[3]s reqid 9 mode tunnel if_id 9 aead 'rfc4106(gcm(aes))' 0x0123456789abcdef0123456789abcdef01234567 128`,
				hostAddr, to, spiOf(host(1)))},
		} {
			out, err := evil.Output(ctx, "sh", "-e", "-c", forgery.script)
			Expect(err).NotTo(HaveOccurred(), forgery.what+": "+out)
			Eventually(func() map[string]int { send(evil, to); return reached.Counts() }).Should(HaveKey(forgery.what),
				"the forgery gets to the host")
		}
		Expect(arrived.Counts()).To(BeEmpty())
		// The same container does hear what comes the right way, and so would have heard the others.
		Eventually(func() map[string]int { send(a.Netns, to); return arrived.Counts() }).Should(HaveKey("arrived from " +
			a.Addr(false).String()))
		Expect(arrived.Counts()).To(HaveLen(1))
	})

	It("F41: changes keys every ten seconds under load and loses nothing, with one set of SAs in the end", func() {
		watched()
		a, b := connected(host(0)), connected(host(1))
		pings(a, b)
		DeferCleanup(restart)
		restart([]string{"--ipsec-rekey", "10s"}, []string{"--ipsec-rekey", "10s"})
		terminated()
		pings(a, b)
		established(host(0), host(1))
		seen := map[string]bool{}
		sent, lost := loss(a, b, func() {
			start := time.Now()
			until("a minute, and five sets of keys", func() bool {
				seen[spiOf(host(1))] = true
				return len(seen) > 5 && time.Since(start) > time.Minute
			})
		})
		for _, h := range []*lab.Host{host(0), host(1)} {
			log, err := h.Output(ctx, "cat", h.IKEDir()+"/charon.log")
			Expect(err).NotTo(HaveOccurred())
			crossed := regexp.MustCompile(`(?m)^.*_REKEY collision.*$`).FindAllString(log, -1)
			Expect(crossed).To(BeEmpty(), "both ends of the tunnel asked for new keys at once, on host %s", h.Name)
		}
		Expect(lost).To(BeEmpty(), "of %d", sent)
		established(host(0), host(1))
	})

	It("F42: sets a tunnel up again that somebody took down", func() {
		watched()
		a, b := connected(host(0)), connected(host(1))
		pings(a, b)
		out, err := host(0).Output(ctx, "swanctl", "--terminate", "--ike", ipsec.ConnPrefix+host(1).Name, "--uri", "unix://"+
			host(0).IKEDir()+"/charon.vici")
		Expect(err).NotTo(HaveOccurred(), out)
		pings(a, b)
		established(host(0), host(1))
		for _, flush := range []string{"ip xfrm policy flush; ip xfrm state flush", "ip xfrm policy flush",
			"ip xfrm state flush"} {
			By("and what the kernel lost: " + flush)
			out, err = host(0).Output(ctx, "sh", "-c", flush)
			Expect(err).NotTo(HaveOccurred(), out)
			pings(b, a)
			pings(a, b)
			Eventually(func() error { return complete(host(0)) }).Should(Succeed())
			established(host(0), host(1))
		}
		By("and a policy of a tunnel without an SA")
		terminated()
		out, err = host(0).Output(ctx, "ip", "xfrm", "policy", "flush")
		Expect(err).NotTo(HaveOccurred(), out)
		Eventually(func() error { return complete(host(0)) }).Should(Succeed())
		pings(a, b)
		By("and a route and a device that were deleted")
		dev := tunnel(host(0), host(1)).Children[0].Device
		out, err = host(0).Output(ctx, "ip", "link", "del", dev)
		Expect(err).NotTo(HaveOccurred(), out)
		pings(a, b)
	})

	It("F44: starts the IKE daemon again when it is killed, is red meanwhile, and sends nothing in clear", func() {
		watched()
		a, b := connected(host(0)), connected(host(1))
		pings(a, b)
		pid := charon(host(0))
		Expect(pid).NotTo(BeZero())
		red := make(chan string, 1)
		stop := make(chan struct{})
		go func() {
			again := time.NewTicker(20 * time.Millisecond)
			defer again.Stop()
			for {
				if code, body := manager(host(0), "GET", "/readyz", ""); code == 503 && strings.Contains(body, "tunnels") {
					red <- body
					return
				}
				select {
				case <-stop:
					red <- ""
					return
				case <-again.C:
				}
			}
		}()
		Expect(unix.Kill(pid, unix.SIGKILL)).To(Succeed())
		Eventually(func() int { return charon(host(0)) }).ShouldNot(Or(BeZero(), Equal(pid)))
		ready(host(0))
		close(stop)
		Expect(<-red).To(ContainSubstring("tunnels"), "readiness named it")
		pings(a, b)
		pings(b, a)
		established(host(0), host(1))
	})

	It("loses nothing and sends nothing in clear when the manager is killed; the next one takes the daemon over", func() {
		watched()
		a, b := connected(host(0)), connected(host(1))
		pings(a, b)
		pid := charon(host(0))
		sent, lost := loss(a, b, func() {
			host(0).Manager.Kill()
			Expect(host(0).StartManager(ctx)).To(Succeed())
			ready(host(0))
		})
		Expect(lost).To(BeEmpty(), "of %d", sent)
		Expect(charon(host(0))).To(Equal(pid))
	})

	It("F43: changes the secret with both in use for a while, loses nothing, and prints it nowhere; the tunnels are "+
		"made anew when asked", func() {
		watched()
		a, b := connected(host(0)), connected(host(1))
		pings(a, b)
		before := tunnel(host(0), host(1))
		sent, lost := loss(a, b, func() {
			for _, h := range cluster.Hosts {
				secrets(h, secretB, secretA)
				reload(h)
			}
			until("the new secret in use", func() bool {
				t := tunnel(host(0), host(1))
				return len(t.Keys) > 0 && t.Keys[0] != before.Keys[0]
			})
			for _, h := range cluster.Hosts {
				secrets(h, secretB)
				reload(h)
			}
		})
		Expect(lost).To(BeEmpty(), "of %d", sent)
		established(host(0), host(1))
		sent, lost = loss(a, b, func() {
			code, body := manager(host(0), "POST", "/v1/tunnels/reauth", "")
			Expect(code).To(Equal(200), body)
			until("authenticated with the new secret", func() bool {
				t := tunnel(host(0), host(1))
				return t.Since.After(before.Since) && t.State == ipsec.StateEstablished
			})
		})
		Expect(len(lost)).To(BeNumerically("<", sent/2), "of %d: the responder sends with the new keys before the "+
			"initiator has them, which is a part of the exchange", sent)
		c := connected(host(2))
		pings(c, a)
		for _, h := range cluster.Hosts {
			for _, log := range []string{h.Manager.Log(), h.Metadata.Log()} {
				Expect(log).NotTo(Or(ContainSubstring(secretA[:10]), ContainSubstring(secretB[:10])))
			}
		}
	})

	It("recovers at once when a host was rebooted, whose peers still have its old keys", func() {
		watched()
		a, b := connected(host(0)), connected(host(1))
		pings(a, b)
		host(1).Manager.Kill()
		Expect(unix.Kill(charon(host(1)), unix.SIGKILL)).To(Succeed())
		out, err := host(1).Output(ctx, "sh", "-c", "ip xfrm state flush; ip xfrm policy flush; nft flush ruleset; for "+
			"l in $(ip -o link | grep -o 'lrx[0-9a-f]*' | sort -u); do ip link del $l; done")
		Expect(err).NotTo(HaveOccurred(), out)
		host(1).Metadata.Kill()
		Expect(host(1).Reboot(2)).To(Succeed())
		Expect(host(1).StartMetadata(ctx)).To(Succeed())
		Expect(host(1).StartManager(ctx)).To(Succeed())
		ready(host(1))
		c := connected(host(1))
		pings(a, c)
		established(host(0), host(1))
	})

	It("takes the tunnel of a peer that was removed away, and sends it nothing in clear", func() {
		watched()
		a, b := connected(host(0)), connected(host(1))
		pings(a, b)
		addr := b.Addr(false)
		view, err := host(0).Client().View(ctx)
		Expect(err).NotTo(HaveOccurred())
		h, _ := view.Host(host(2).Name)
		Expect(host(2).Manager.Stop()).To(Succeed())
		Expect(host(2).Metadata.Stop()).To(Succeed())
		Expect(host(0).Client().Delete(ctx, metadata.KindHost, h.Name)).To(Succeed())
		Eventually(func() string { return tunnel(host(0), host(2)).LastError }).Should(ContainSubstring("no tunnel to"))
		Eventually(func() int { return sasBetween(host(0), host(2)) }).Should(BeZero())
		_, policies := xfrm(host(0))
		ids := map[int]bool{}
		for _, p := range policies {
			ids[p.Ifid] = p.Ifid != 0
		}
		delete(ids, 0)
		Expect(ids).To(HaveLen(1))
		silent(a.Netns, netip.MustParseAddr("10.44.255.250"))
		ping(a.Netns, addr)
		Expect(host(2).StartMetadata(ctx)).To(Succeed())
		Expect(host(2).StartManager(ctx)).To(Succeed())
		ready(host(2))
		ready(host(0))
	})

	It("F46, F47: tells health and peers, reloads on demand with the cause, and changes its log level", func() {
		code, body := manager(host(0), "GET", "/ping", "")
		Expect(code).To(Equal(200), body)
		r, err := report(host(0))
		Expect(err).NotTo(HaveOccurred())
		Expect(r.Daemon).To(ContainSubstring("strongSwan 5."))
		Expect(r.Tunnels).To(HaveLen(2))
		Expect(os.Chmod(host(0).SecretFile(), 0o644)).To(Succeed())
		code, body = manager(host(0), "POST", "/v1/reload", "")
		Expect(code).To(Equal(500))
		Expect(body).To(And(ContainSubstring("tunnels"), ContainSubstring("chmod 600")))
		Expect(os.Chmod(host(0).SecretFile(), 0o600)).To(Succeed())
		reload(host(0))
		code, body = manager(host(0), "PUT", "/v1/log-level", "debug")
		Expect(code).To(Equal(200), body)
		code, body = manager(host(0), "PUT", "/v1/log-level", "loud")
		Expect(code).To(Equal(400), body)
		manager(host(0), "PUT", "/v1/log-level", "info")
	})

	It("F35, F174: lives beside a VXLAN network on the same hosts, and neither reaches the other", func() {
		Expect(host(0).Client().Put(ctx, metadata.KindNetwork, "plain",
			metadata.Network{Name: "plain", Encapsulation: metadata.EncapVXLAN, VNI: 1042,
				Subnets: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")}})).To(Succeed())
		DeferCleanup(func() { Expect(host(0).Client().Delete(ctx, metadata.KindNetwork, "plain")).To(Succeed()) })
		var plain []*lab.Container
		for _, h := range cluster.Hosts[:2] {
			plain = append(plain, connectedTo(h, "plain", callOf(h, "plain", "lariat-vxlan")))
		}
		a, b := connected(host(0)), connected(host(1))
		pings(a, b)
		ping(plain[0].Netns, plain[1].Addr(false))
		for _, other := range []*lab.Container{a, b} { // on the same host, and on another
			silent(plain[0].Netns, other.Addr(false))
		}
		for _, other := range plain {
			silent(a.Netns, other.Addr(false))
		}
	})

	It("F36: sends ESP in UDP when it is told to, and the tunnel stays one", func() {
		wires := watched()
		a, b := connected(host(0)), connected(host(1))
		DeferCleanup(restart)
		restart([]string{"--ipsec-encap"}, []string{"--ipsec-encap"})
		Eventually(func() int { pings(a, b); return wires[0].Counts()[espUDP] }).Should(BeNumerically(">", 0))
		established(host(0), host(1))
		Expect(tunnel(host(0), host(1)).Encap).To(BeTrue())
	})

	It("F143: takes certificates from a folder in place of the secret, and refuses those of another CA", func() {
		watched()
		a, b := connected(host(0)), connected(host(1))
		DeferCleanup(func() { restart(); pings(a, b) })
		good, bad := authority("lab"), authority("another")
		mine, theirs, wrong := issue(good, host(0)), issue(good, host(1)), issue(bad, host(1))
		restart([]string{"--ipsec-certs", mine}, []string{"--ipsec-certs", theirs})
		terminated()
		pings(a, b)
		established(host(0), host(1))
		r, err := report(host(0))
		Expect(err).NotTo(HaveOccurred())
		Expect(r.Auth).To(Equal(ipsec.AuthPubkey))
		Expect(r.Keys).To(BeEmpty())
		restart([]string{"--ipsec-certs", mine}, []string{"--ipsec-certs", wrong})
		terminated()
		Eventually(func() string {
			silent(a.Netns, b.Addr(false))
			return tunnel(host(0),
				host(1)).LastError
		}).ShouldNot(BeEmpty())
		silent(a.Netns, b.Addr(false))
	})

	It("F134: STATUS names a daemon that cannot be started", func() {
		Expect(host(0).Manager.Stop()).To(Succeed())
		Expect((&ike.Charon{Dir: host(0).IKEDir()}).Stop(ctx)).To(Succeed())
		Expect(host(0).StartManager(ctx, "--charon", "/nowhere/charon")).To(Succeed())
		DeferCleanup(func() {
			Expect(host(0).Manager.Stop()).To(Succeed())
			Expect(host(0).StartManager(ctx)).To(Succeed())
			ready(host(0))
		})
		Eventually(func() error {
			return cniStatus(host(0),
				strict(host(0)))
		}).Should(MatchError(ContainSubstring("/nowhere/charon")))
		// What it has by now is blocked, and containers on the host still reach each other.
		a, c := connected(host(0)), connected(host(0))
		pings(a, c)
	})

	It("F134: STATUS names a daemon that does not run, and a secret that is missing", func() {
		status := func() error {
			return cniStatus(host(0), strict(host(0)))
		}
		Expect(status()).To(Succeed())
		host(0).Manager.Kill()
		err := status()
		Expect(err).To(MatchError(ContainSubstring("network manager does not answer")))
		Expect(cniStatus(host(0), call(host(0)))).To(Succeed(), "ADD works without it")
		Expect(host(0).StartManager(ctx)).To(Succeed())
		ready(host(0))
		Expect(status()).To(Succeed())
	})
})

// send sends one datagram from whatever address the route to it has.
func send(from lab.Netns, to netip.Addr) {
	GinkgoHelper()
	Expect(from.Do(func() error {
		c, err := net.Dial("udp", netip.AddrPortFrom(to, 9).String())
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte("x"))
		return err
	})).To(Succeed())
}

func mustCIDR(s string) *net.IPNet {
	n, err := netlink.ParseIPNet(s)
	Expect(err).NotTo(HaveOccurred())
	return n
}

// authority makes a CA and returns its folder.
func authority(name string) string {
	GinkgoHelper()
	dir := GinkgoT().TempDir()
	_, err := certs.Init(dir, name, time.Now())
	Expect(err).NotTo(HaveOccurred())
	return dir
}

// issue makes a host's certificate and returns a folder with what that host gets.
func issue(ca string, h *lab.Host) string {
	GinkgoHelper()
	_, err := certs.Host(ca, certs.Request{Name: h.Name, IPs: []netip.Addr{h.Addr.Addr()}}, time.Now())
	Expect(err).NotTo(HaveOccurred())
	dir := GinkgoT().TempDir()
	for _, f := range []string{certs.CACert, h.Name + ".crt", h.Name + ".key"} {
		data, err := os.ReadFile(filepath.Join(ca, f))
		Expect(err).NotTo(HaveOccurred())
		Expect(os.WriteFile(filepath.Join(dir, f), data, 0o600)).To(Succeed())
	}
	return dir
}

// spiOf is an SPI by which a host receives, as ip writes it; the newest comes last in the kernel's list.
func spiOf(h *lab.Host) string {
	sas, _ := xfrm(h)
	spi := "0x1"
	for _, s := range sas {
		if s.Spi != 0 && s.Dst.String() == h.Addr.Addr().String() && s.Src.String() == host(0).Addr.Addr().String() {
			spi = fmt.Sprintf("%#x", uint32(s.Spi))
		}
	}
	return spi
}

func cniStatus(h *lab.Host, call lab.Call) error {
	short, cancel := context.WithTimeout(ctx, guest.Patience)
	defer cancel()
	return h.Status(short, call)
}
