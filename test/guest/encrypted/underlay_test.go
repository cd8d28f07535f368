package encrypted_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/test/guest"
	"github.com/lariat-net/lariat/test/lab"
)

// four is a network without IPv6.
const four = "four"

var fourSubnet = netip.MustParsePrefix("10.46.0.0/16")

// Over IPv6, a network with IPv4 alone has tunnels whose devices have no IPv6.
var _ = Describe("Encrypted networks on an IPv6 underlay", Ordered, ContinueOnFailure, func() {
	BeforeAll(func() {
		begin(lab.Options{Hosts: 2, IPv6: true}, "2001:db8::250")
		create(metadata.Network{Name: four, Subnets: []netip.Prefix{fourSubnet}, Encapsulation: metadata.EncapIPsec,
			HostNAT: true})
	})

	outside(true)

	It("F36, F174: carry both families, or IPv4 alone, and neither network reaches the other", func() {
		wires := watched()
		a, b := connected(host(0)), connected(host(1))
		c, d := connectedTo(host(0), four, callOf(host(0), four, "lariat-ipsec")),
			connectedTo(host(1), four, callOf(host(1), four, "lariat-ipsec"))
		pings(a, b)
		pings(c, d)
		pings(d, c)
		Eventually(func() int { return wires[0].Counts()[esp] }).Should(BeNumerically(">=", 6))
		for _, other := range []*lab.Container{c, d} {
			silent(a.Netns, other.Addr(false))
			silent(other.Netns, b.Addr(false))
		}
	})

	It("has tunnels' devices refuse IPv6 where their network has none, and advertisements always, and repairs that",
		func() {
			for _, h := range cluster.Hosts {
				devices := 0
				for file, value := range tunnelSettings(h, "disable_ipv6") {
					isFour := strings.Contains(alias(h, file), ":"+four)
					Expect(value).To(Equal(map[bool]string{true: "1", false: "0"}[isFour]), file)
					if isFour {
						devices++
					}
				}
				Expect(devices).To(Equal(2), "the home and one tunnel")
				settings := tunnelSettings(h, "accept_ra")
				Expect(settings).To(HaveLen(4))
				Expect(settings).To(HaveEach("0"))
				for file := range settings {
					out, err := h.Output(ctx, "sh", "-c", "echo 2 >"+file)
					Expect(err).NotTo(HaveOccurred(), out)
				}
				Eventually(func() map[string]string { return tunnelSettings(h, "accept_ra") }).Should(HaveEach("0"))
			}
		})
})

// tunnelSettings are the values of one IPv6 setting of all tunnels' devices of a host, by file.
func tunnelSettings(h *lab.Host, setting string) map[string]string {
	GinkgoHelper()
	out, err := h.Output(ctx, "sh", "-c", "grep -H . /proc/sys/net/ipv6/conf/"+delta.TunnelPrefix+"*/"+setting)
	Expect(err).NotTo(HaveOccurred(), out)
	values := map[string]string{}
	for line := range strings.Lines(out) {
		file, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		values[file] = value
	}
	return values
}

// alias is the ifalias of the device that a setting's file is of.
func alias(h *lab.Host, file string) string {
	GinkgoHelper()
	out, err := h.Output(ctx, "ip", "link", "show", "dev", filepath.Base(filepath.Dir(file)))
	Expect(err).NotTo(HaveOccurred(), out)
	return out
}

// outside: a machine that is no host answers containers, in the underlay's family.
func outside(v6 bool) {
	It("has containers' connections to the outside answered, by the host's address with masquerade and by their own "+
		"without", func() {
		under := host(0).Addr
		addr := netip.MustParseAddr(map[bool]string{false: "192.0.2.251", true: "2001:db8::251"}[v6])
		machine, err := cluster.NewNeighbour("machine", netip.PrefixFrom(addr, under.Bits()))
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(func() { Expect(machine.Remove()).To(Succeed()) })
		for _, s := range subnets { // without masquerade, it knows the way back
			if s.Addr().Is6() == v6 {
				out, err := machine.Output(ctx, "ip", "route", "add", s.String(), "via", under.Addr().String())
				Expect(err).NotTo(HaveOccurred(), out)
			}
		}
		tellSource(machine, netip.AddrPortFrom(addr, 81))
		c := connected(host(0))
		for _, masked := range []bool{true, false, true} {
			put := metadata.Network{Name: network, Subnets: subnets, Encapsulation: metadata.EncapIPsec, HostNAT: masked}
			Expect(host(0).Client().Put(ctx, metadata.KindNetwork, network, put)).To(Succeed())
			want := c.Addr(v6)
			if masked {
				want = under.Addr()
			}
			Eventually(func() (string, error) {
				return source(c.Netns,
					netip.AddrPortFrom(addr, 81))
			}).Should(Equal(want.String()), "masquerade %t", masked)
		}
		for _, h := range cluster.Hosts {
			ready(h)
		}
	})
}

// tellSource tells everybody who connects the address that they come from.
func tellSource(n lab.Netns, at netip.AddrPort) {
	GinkgoHelper()
	var l net.Listener
	Expect(n.Do(func() (err error) { l, err = net.Listen("tcp", at.String()); return err })).To(Succeed())
	DeferCleanup(l.Close)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			from, _, _ := net.SplitHostPort(conn.RemoteAddr().String())
			_, _ = fmt.Fprint(conn, from)
			conn.Close()
		}
	}()
}

// source is the address that a server sees a namespace come from.
func source(n lab.Netns, server netip.AddrPort) (from string, err error) {
	short, cancel := context.WithTimeout(ctx, guest.Patience)
	defer cancel()
	return from, n.Do(func() error {
		conn, err := (&net.Dialer{Timeout: 2 * time.Second}).DialContext(short, "tcp", server.String())
		if err != nil {
			return err
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(2 * time.Second))
		buf := make([]byte, 64)
		k, err := conn.Read(buf)
		from = string(buf[:k])
		return err
	})
}
