package integration_test

import (
	"path/filepath"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/lariat-net/lariat/test/lab"
)

// traces are the lines of a host's network that speak of Lariat.
func traces(h *lab.Host) (out []string) {
	GinkgoHelper()
	for _, command := range []string{
		"ip -o link show group 76", "ip -o link show type vxlan", "ip -o address show dev lo",
		"ip route show table all proto 76",
		"ip -6 route show table all proto 76", "ip nexthop show proto 76", "nft list tables", "iptables-save",
		"ip6tables-save",
	} {
		all, err := h.Netns.Output(ctx, strings.Fields(command)...)
		Expect(err).NotTo(HaveOccurred(), command)
		for line := range strings.Lines(all) {
			if words := strings.ToLower(line); strings.Contains(command, " 76") || strings.Contains(words, "lariat") ||
				strings.Contains(words, "169.254.169.250") || strings.Contains(words, "vtep") {
				out = append(out, command+": "+strings.TrimSpace(line))
			}
		}
	}
	return out
}

var _ = Describe("A host's network is taken away", func() {
	It("by one command, which leaves what is not Lariat's, and can be repeated", func() {
		h := host(2)
		run := func(args ...string) (string, error) {
			return h.Netns.Output(ctx, append([]string{filepath.Join(cluster.Bin, "lariat-network-manager"), "--socket",
				h.ManagerSocket(), "--ike-dir", h.IKEDir()}, args...)...)
		}
		for _, command := range []string{
			"ip link add foreign type veth peer name foreign2", "ip link set foreign up",
			"ip addr add 198.51.100.7/32 dev foreign", "ip route add 198.51.100.128/25 dev foreign",
			"nft add table inet foreign", "iptables -P FORWARD DROP", "ip6tables -P FORWARD DROP",
		} {
			_, err := h.Netns.Output(ctx, strings.Fields(command)...)
			Expect(err).NotTo(HaveOccurred(), command)
		}
		DeferCleanup(func() {
			for _, command := range []string{"ip link del foreign", "nft delete table inet foreign",
				"iptables -P FORWARD ACCEPT", "ip6tables -P FORWARD ACCEPT"} {
				_, err := h.Netns.Output(ctx, strings.Fields(command)...)
				Expect(err).NotTo(HaveOccurred(), command)
			}
		})
		connected(h, "overlay")
		Eventually(func() string { return strings.Join(traces(h), "\n") }).Should(And(ContainSubstring("LARIAT-FORWARD"),
			ContainSubstring("169.254.169.250")))

		_, err := run("teardown", "--yes")
		Expect(err).To(MatchError(ContainSubstring("serves it already")), "a manager would make everything anew")
		before := traces(h)
		listed, err := run("teardown")
		Expect(err).NotTo(HaveOccurred())
		Expect(listed).To(And(ContainSubstring("- port lrt"), ContainSubstring("vtep1042"),
			ContainSubstring("169.254.169.250"), ContainSubstring("LARIAT-FORWARD"), ContainSubstring("nothing was removed")))
		Expect(traces(h)).To(Equal(before))

		Expect(h.Manager.Stop()).To(Succeed())
		removed, err := run("teardown", "--yes")
		Expect(err).NotTo(HaveOccurred())
		Expect(listed).To(HavePrefix(removed))
		Expect(traces(h)).To(BeEmpty())
		for command, want := range map[string]string{"ip addr show dev foreign": "198.51.100.7",
			"ip route show dev foreign": "198.51.100.128/25", "nft list tables": "inet foreign"} {
			out, err := h.Netns.Output(ctx, strings.Fields(command)...)
			Expect(err).NotTo(HaveOccurred())
			Expect(out).To(ContainSubstring(want))
		}
		again, err := run("teardown", "--yes")
		Expect(err).NotTo(HaveOccurred())
		Expect(again).To(Equal("Lariat owns nothing in the network of this host\n"))

		Expect(h.StartManager(ctx)).To(Succeed())
		Eventually(func() error { return h.Settled(ctx) }).Should(Succeed())
		pings(host(0).Netns, connected(h, "overlay").Addr(false))
	})
})
