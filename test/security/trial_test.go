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

// trial is a set of attacks with marked packets, those who listen for the marks, and the controls that show
// that an attack would have been heard.
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
		switch { // an ICMP error quotes what it is about
		case p.Way == unix.PACKET_OUTGOING, p.Way == unix.PACKET_OTHERHOST, p.Proto == unix.IPPROTO_ICMP,
			p.Proto == unix.IPPROTO_ICMPV6:
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

// attack sends a packet that carries the mark, until it is seen to be sent: a link that was just made may be deaf.
func (t *trial) attack(what string, send func(mark string) error) {
	GinkgoHelper()
	mark := newMark("attack")
	t.attacks[mark] = what
	if t.sender != "" {
		t.repeat(t.sender, what+", which is not even sent,", mark, send)
		return
	}
	Expect(send(mark)).To(Succeed(), what)
}

func (t *trial) heard(ear, mark string) func() int {
	return func() int { return t.ears[ear].Counts()[mark] }
}

// control sends a packet that is allowed until it is heard.
func (t *trial) control(ear, what string, send func(mark string) error) {
	GinkgoHelper()
	t.repeat(ear, "the control "+what, newMark("control"), send)
}

func (t *trial) repeat(ear, what, mark string, send func(mark string) error) {
	GinkgoHelper()
	tries := 0
	Eventually(func() int {
		if tries++; tries%10 == 1 { // every 50 ms
			Expect(send(mark)).To(Succeed(), what)
		}
		return t.heard(ear, mark)()
	}).Should(BeNumerically(">", 0), "%s is not heard by %s", what, ear)
}

// nothing fails when an attack was heard. Call it after the controls: they went the same way.
func (t *trial) nothing() {
	GinkgoHelper()
	Consistently(func() string {
		var out []string
		for name, ear := range t.ears {
			if name == t.sender {
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
