package integration_test

import (
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/lariat-net/lariat/pkg/journal"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/test/lab"
)

// journalDirs are the networks that a host's journal has a directory of.
func journalDirs(h *lab.Host) []string {
	GinkgoHelper()
	list, err := journal.New(h.StateDir()).Networks()
	Expect(err).NotTo(HaveOccurred())
	return list
}

var _ = Describe("The store is away", func() {
	// No timer of the manager helps: it hears what happens.
	It("costs running containers nothing, blames the store, and what DELs could not tell goes as soon as it is back",
		func() {
			h := host(1)
			Expect(h.Manager.Stop()).To(Succeed())
			Expect(h.StartManager(ctx, "--interval", "1h")).To(Succeed())
			DeferCleanup(func() {
				Expect(h.Manager.Stop()).To(Succeed())
				Expect(h.StartManager(ctx)).To(Succeed())
			})
			stays := connected(h, "overlay")
			goes, cl := container(h), call(h, "overlay", nil)
			Expect(goes.Add(ctx, cl)).To(Succeed())
			Eventually(func() error { return h.Settled(ctx) }).Should(Succeed())

			host(0).Metadata.Kill()
			back := false
			DeferCleanup(func() {
				if !back {
					Expect(host(0).StartMetadata(ctx)).To(Succeed())
				}
			})
			const endpoint, conf = "https://192.0.2.1:2379", `{"cniVersion":"1.1.0","name":"overlay","type":"lariat-vxlan"`
			for range 3 { // the first one waits, the next ones do not
				c := container(h)
				Expect(c.Add(ctx, cl)).To(MatchError(And(ContainSubstring(endpoint),
					Not(ContainSubstring("metadata service unreachable")))))
			}
			_, err := raw(h, "STATUS", "", conf)
			Expect(err).NotTo(HaveOccurred(), "running pods would be evicted")
			_, err = raw(h, "STATUS", "", conf+`,"strictStatus":true`)
			Expect(code(err)).To(BeEquivalentTo(50))
			Expect(err).To(MatchError(And(ContainSubstring(endpoint), Not(ContainSubstring("metadata service unreachable")))))
			out, err := h.Lariat(ctx, "status")
			Expect(err).NotTo(HaveOccurred())
			Expect(out).To(And(ContainSubstring("the store at "+endpoint+" has not answered since"),
				ContainSubstring("overlay")))
			Expect(goes.Del(ctx, cl)).To(Succeed())
			Expect(records(h, "overlay")).To(ContainElement(ContainSubstring(goes.ID)))
			Expect(stays.Check(ctx, cl)).To(Succeed())

			Expect(host(0).StartMetadata(ctx)).To(Succeed())
			back = true
			Eventually(func() []string { return records(h, "overlay") },
				"1m").ShouldNot(ContainElement(ContainSubstring(goes.ID)))
			Expect(held(h, "overlay")).NotTo(ContainElement(HaveField("ContainerID", goes.ID)))
			log := h.Metadata.Log()
			Expect(strings.Count(log, "store lost")).To(Equal(1), log)
			Expect(strings.Count(log, "store answers again")).To(Equal(1), log)
			c := connected(h, "overlay")
			pings(host(0).Netns, c.Addr(false))
		})

	It("F3: the journal of a deleted network goes with it", func() {
		h := host(2)
		create(metadata.Network{Name: "short", Subnets: prefixes("10.99.0.0/16"), Encapsulation: metadata.EncapVXLAN,
			VNI: 1099})
		c, cl := container(h), call(h, "short", nil)
		Expect(c.Add(ctx, cl)).To(Succeed())
		Expect(c.Del(ctx, cl)).To(Succeed())
		Expect(journalDirs(h)).To(ContainElement("short"))
		Expect(h.Manager.Stop()).To(Succeed())
		Expect(h.StartManager(ctx, "--interval", "1h")).To(Succeed())
		Eventually(func() error { return h.Settled(ctx) }).Should(Succeed())
		dropNetwork("short")
		Eventually(func() []string { return journalDirs(h) }, "1m").ShouldNot(ContainElement("short"))
		Expect(h.Manager.Stop()).To(Succeed())
		Expect(h.StartManager(ctx)).To(Succeed())
	})
})
