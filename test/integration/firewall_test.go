package integration_test

import (
	"fmt"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

var _ = Describe("A host's firewall", func() {
	for _, suffix := range []string{"-nft", "-legacy"} {
		It("F29: lets the networks' packets through again, by an event, whatever was done to FORWARD with iptables"+suffix,
			func() {
				h := host(0)
				tables := []string{"iptables" + suffix, "ip6tables" + suffix}
				for _, t := range tables {
					if _, err := h.Output(ctx, t, "-w", "-S", "FORWARD"); err != nil {
						Skip(fmt.Sprintf("this machine has no %s: %v", t, err))
					}
				}
				each := func(args string) {
					GinkgoHelper()
					for _, t := range tables {
						sh(h, t+" -w "+args)
					}
				}
				rarely(h)
				c, far, other := connected(h, "overlay"), connected(host(1), "overlay"), connected(h, "overlay")
				DeferCleanup(func() {
					each("-P FORWARD ACCEPT")
					each("-F FORWARD")
					for _, t := range tables {
						Eventually(func() (string, error) {
							return h.Output(ctx, t, "-w",
								"-S")
						}).ShouldNot(ContainSubstring("LARIAT-FORWARD"))
					}
				})
				for _, done := range []string{
					"-P FORWARD DROP",
					"-F FORWARD",
					"-D FORWARD -j LARIAT-FORWARD",
					"-P FORWARD ACCEPT",
					"-A FORWARD -j REJECT",
					"-I FORWARD -m comment --comment 'nothing passes' -j DROP",
				} {
					began := time.Now()
					each(done)
					stays := done == "-P FORWARD ACCEPT"
					for i, v6 := range []bool{false, true} {
						Eventually(func(g Gomega) {
							out, err := h.Output(ctx, tables[i], "-w", "-S", "FORWARD")
							g.Expect(err).NotTo(HaveOccurred())
							if stays {
								g.Expect(out).NotTo(ContainSubstring("LARIAT-"))
							} else {
								g.Expect(out).To(MatchRegexp("(?m)^-P FORWARD [A-Z]+\n-A FORWARD -j LARIAT-USER\n-A FORWARD -j " +
									"LARIAT-FORWARD$"))
							}
						}).Should(Succeed(), done)
						pings(far.Netns, c.Addr(v6))
						pings(other.Netns, c.Addr(v6))
						pings(c.Netns, far.Addr(v6))
					}
					fmt.Fprintf(GinkgoWriter, "%v: %s\n", time.Since(began), done)
				}
				// An administrator's own rules come first.
				for i, v6 := range []bool{false, true} {
					sh(h, fmt.Sprintf("%s -w -A LARIAT-USER -d %s -j DROP", tables[i], c.Addr(v6)))
					silent(far.Netns, c.Addr(v6))
					sh(h, tables[i]+" -w -F LARIAT-USER")
				}
			})
	}
})
