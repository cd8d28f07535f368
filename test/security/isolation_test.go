package security_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/test/lab"
)

// answers tells whether a TCP connection to the address gets through and back. It has a patience of half a
// second, if none is told: whoever expects it asks again sooner than TCP would.
func answers(from lab.Netns, to netip.AddrPort, patience time.Duration) error {
	if patience == 0 {
		patience = 500 * time.Millisecond
	}
	return from.DoBare(func() error {
		short, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		conn, err := (&net.Dialer{}).DialContext(short, "tcp", to.String())
		if err != nil {
			return err
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(patience))
		buf := make([]byte, 2)
		if _, err := conn.Read(buf); err != nil {
			return err
		}
		if string(buf) != "hi" {
			return fmt.Errorf("%q", buf)
		}
		return nil
	})
}

// serve greets who connects to a port of a container.
func serve(n lab.Netns, addr netip.AddrPort) {
	GinkgoHelper()
	var l net.Listener
	within(n, func() {
		var err error
		l, err = net.Listen("tcp", addr.String())
		Expect(err).NotTo(HaveOccurred())
	})
	DeferCleanup(l.Close)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Write([]byte("hi"))
			conn.Close()
		}
	}()
}

// isolation: networks do not reach each other unless they say so.
func isolation(one world, masked bool) {
	var places []place
	for _, n := range []string{"red", "blue", "green"} {
		places = append(places, place{n, 0}, place{n, 1})
	}
	name := func(p place) string { return fmt.Sprintf("%s on %c", p.network, 'a'+p.host) }

	// matrix sends a packet from each to each, and returns who heard whom, and whose connections work.
	matrix := func(all map[place]*lab.Container, expected func(from, to place) bool) {
		GinkgoHelper()
		t := newTrial()
		for p, c := range all {
			t.listen(name(p), c.Netns, "eth0")
		}
		type way struct {
			from, to place
			v6       bool
		}
		sent := map[string]way{}
		for _, v6 := range families(one) {
			for _, from := range places {
				for _, to := range places {
					if all[from] == nil || all[to] == nil || from == to {
						continue
					}
					if expected(from, to) { // both ways: what is allowed is answered
						Eventually(func() error { return answers(all[from].Netns, at(all[to].Addr(v6), 80), 0) }).Should(Succeed(),
							"%s from %s to %s", family(v6), name(from), name(to))
						continue
					}
					mark := newMark("attack")
					sent[mark] = way{from, to, v6}
					Expect(all[from].SendUDP(netip.AddrPort{}, at(all[to].Addr(v6), 7), []byte(mark))).To(Succeed())
				}
			}
			// And at last each hears from somebody of its own, by the way that all took.
			for _, to := range places {
				if all[to] == nil {
					continue
				}
				for _, from := range places {
					if all[from] != nil && from.network == to.network && from != to {
						t.control(name(to), family(v6)+" of the own network", func(mark string) error {
							return all[from].SendUDP(netip.AddrPort{}, at(all[to].Addr(v6), 7), []byte(mark))
						})
					}
				}
			}
		}
		Consistently(func() string {
			var out []string
			for mark, s := range sent {
				if t.heard(name(s.to), mark)() > 0 {
					out = append(out, fmt.Sprintf("%s: %s heard %s", family(s.v6), name(s.to), name(s.from)))
				}
			}
			slices.Sort(out)
			return strings.Join(out, "\n")
		}, "60ms").Should(BeEmpty(), "of %d ways", len(sent))
	}
	populate := func() map[place]*lab.Container {
		GinkgoHelper()
		all := map[place]*lab.Container{}
		for _, p := range places {
			all[p] = connected(host(p.host), p.network)
			for _, v6 := range families(one) {
				serve(all[p].Netns, at(all[p].Addr(v6), 80))
			}
		}
		return all
	}

	It("F174: networks are isolated from each other, on one host and between hosts", func() {
		matrix(populate(), func(from, to place) bool { return from.network == to.network })
	})

	It("F174: --allow-from opens a network to those that it names, and their connections are answered", func() {
		all := populate()
		change("blue", map[string]any{"allowFrom": []string{"red"}})
		matrix(all, func(from, to place) bool {
			return from.network == to.network || from.network == "red" && to.network == "blue"
		})
	})

	It("F174: --allow-from all opens a network to all", func() {
		all := populate()
		change("blue", map[string]any{"allowFrom": []string{"all"}})
		matrix(all, func(from, to place) bool { return from.network == to.network || to.network == "blue" })
	})

	It("F174: the host reaches the containers of all networks", func() {
		all := populate()
		for p, c := range all {
			for _, v6 := range families(one) {
				for i := range 3 {
					Eventually(func() error { return answers(host(i).Netns, at(c.Addr(v6), 80), 0) }).Should(Succeed(),
						"%s from host %d to %s", family(v6), i, name(p))
				}
				pings(host(0).Netns, c.Addr(v6))
			}
		}
	})

	It("F174: a published port is reached from everywhere", func() {
		if one.v6 && !one.dual {
			Skip("no container has an address of the underlay's family")
		}
		c := connected(host(0), "blue")
		serve(c.Netns, at(c.Addr(one.v6), 80))
		publish(host(0), at(under(0), 8080), at(c.Addr(one.v6), 80))
		from := map[string]lab.Netns{
			"a container of another network on the same host": connected(host(0), "red").Netns,
			"a container of the same network":                 connected(host(0), "blue").Netns,
			"another host":                                    host(1).Netns,
			"a neighbour":                                     neighbour,
		}
		if masked { // else it comes with an overlay source in clear, which nothing may
			from["a container of another network on another host"] = connected(host(1), "red").Netns
		}
		for who, n := range from {
			Eventually(func() error { return answers(n, at(under(0), 8080), 0) }).Should(Succeed(), who)
		}
		other := connected(host(0), "red")
		Expect(answers(other.Netns, at(c.Addr(one.v6), 80), 300*time.Millisecond)).NotTo(Succeed(),
			"and by its own address from nowhere")
	})
}

// publish maps a port of a host to a container's, in a table of its own, as the portmap plugin does.
func publish(h *lab.Host, outer, inner netip.AddrPort) {
	GinkgoHelper()
	on(h, func() {
		conn, err := nftables.New()
		Expect(err).NotTo(HaveOccurred())
		table := conn.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "published"})
		chain := conn.AddChain(&nftables.Chain{Name: "in", Table: table, Type: nftables.ChainTypeNAT,
			Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityNATDest})
		proto, size, offset := byte(unix.NFPROTO_IPV4), uint32(4), uint32(16)
		if outer.Addr().Is6() {
			proto, size, offset = unix.NFPROTO_IPV6, 16, 24
		}
		conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, &expr.Cmp{Register: 1, Data: []byte{proto}},
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Register: 1, Data: []byte{unix.IPPROTO_TCP}},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size},
			&expr.Cmp{Register: 1, Data: outer.Addr().AsSlice()},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
			&expr.Cmp{Register: 1, Data: []byte{byte(outer.Port() >> 8), byte(outer.Port())}},
			&expr.Immediate{Register: 1, Data: inner.Addr().AsSlice()},
			&expr.Immediate{Register: 2, Data: []byte{byte(inner.Port() >> 8), byte(inner.Port())}},
			&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(proto), RegAddrMin: 1, RegProtoMin: 2},
		}})
		Expect(conn.Flush()).To(Succeed())
		DeferCleanup(func() {
			on(h, func() {
				conn, err := nftables.New()
				Expect(err).NotTo(HaveOccurred())
				conn.DelTable(table)
				Expect(conn.Flush()).To(Succeed())
			})
		})
	})
}
