package security_test

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/test/lab"
)

// trial is a set of attacks with marked packets, those who listen for the marks, and the controls that show that an attack would have been heard.
type trial struct {
	ears    map[string]*lab.Wire
	sender  string
	attacks map[string]string // mark to what it is
}

var (
	markPattern = regexp.MustCompile(`<<[a-z]+-[0-9]+>>`)
	marks       int
)

func newMark(kind string) string {
	marks++
	return fmt.Sprintf("<<%s-%d>>", kind, marks)
}

func newTrial() *trial {
	return &trial{ears: map[string]*lab.Wire{}, attacks: map[string]string{}}
}

// listen counts the marks that come in on a device, under a name for people.
func (t *trial) listen(name string, n lab.Netns, dev string) {
	GinkgoHelper()
	ear, err := n.Listen(dev, func(p lab.Packet) string {
		if p.Way == unix.PACKET_OUTGOING || p.Way == unix.PACKET_OTHERHOST {
			return ""
		}
		return string(markPattern.Find(p.Payload))
	})
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(ear.Close)
	t.ears[name] = ear
}

// sent says where every attack must be seen: on the device behind which it is to be stopped.
func (t *trial) sent(name string, n lab.Netns, dev string) {
	GinkgoHelper()
	t.listen(name, n, dev)
	t.sender = name
}

// attack sends a packet that carries the mark.
func (t *trial) attack(what string, send func(mark string) error) {
	GinkgoHelper()
	mark := newMark("attack")
	t.attacks[mark] = what
	Expect(send(mark)).To(Succeed(), what)
	if t.sender != "" {
		Eventually(t.heard(t.sender, mark)).Should(BeNumerically(">", 0), "%s: not even sent", what)
	}
}

func (t *trial) heard(ear, mark string) func() int {
	return func() int { return t.ears[ear].Counts()[mark] }
}

// control sends a packet that is allowed until it is heard.
func (t *trial) control(ear, what string, send func(mark string) error) {
	GinkgoHelper()
	mark := newMark("control")
	tries := 0
	Eventually(func() int {
		if tries++; tries%10 == 1 { // every 50 ms
			Expect(send(mark)).To(Succeed(), what)
		}
		return t.heard(ear, mark)()
	}).Should(BeNumerically(">", 0), "the control %q is not heard by %s", what, ear)
}

// nothing fails when an attack was heard, but for the ears where that is no harm. Call it after the controls: they went the same way.
func (t *trial) nothing(but ...string) {
	GinkgoHelper()
	Consistently(func() string {
		var out []string
		for name, ear := range t.ears {
			if name == t.sender || slices.Contains(but, name) {
				continue
			}
			for mark := range ear.Counts() {
				if what := t.attacks[mark]; what != "" {
					out = append(out, fmt.Sprintf("%s heard %s", name, what))
				}
			}
		}
		slices.Sort(out)
		if n := len(out); n > 20 {
			out = append(out[:20], fmt.Sprintf("and %d more", n-20))
		}
		return strings.Join(out, "\n")
	}, "60ms").Should(BeEmpty(), "of %d attacks", len(t.attacks))
}
