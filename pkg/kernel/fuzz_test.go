package kernel

import (
	"testing"

	"github.com/lariat-net/lariat/pkg/delta"
)

// Package kernel parses the kernel's messages by hand. No message may cause a read beyond its end.
func FuzzParse(f *testing.F) {
	m := &message{}
	createLink(m, "vtep1042", delta.Link{Kind: "vxlan", VNI: 1042, Port: 4789, MTU: 1450})
	m.finish(1)
	f.Add(m.b[16:])
	m = &message{}
	if err := rule(m, "c", delta.Rule{delta.IifPrefix("lrt"), delta.NoReverse{}, delta.UDPDport(4789), delta.VXLANVNI(1),
		delta.InSet{Field: "saddr", Set: "s", V6: true}, delta.Verdict("drop"), delta.MarkComment("c")}); err != nil {
		f.Fatal(err)
	}
	m.finish(1)
	f.Add(m.b[20:])
	f.Fuzz(func(t *testing.T, b []byte) {
		lookup := func(uint32) string { return "dev" }
		o := observation{names: map[uint32]string{}, lookup: lookup, s: delta.NewState()}
		parseLink(b)
		o.route(b)
		parseNeigh(b, 1, 0xffff)
		chains := map[string]delta.Chain{}
		parseChain(b, chains)
		parseRule(b, chains)
		_, s, _ := parseSet(b)
		fromElements(parseElements(nil, b), s)
		w := watcher{pending: map[Event]struct{}{}, notify: make(chan struct{}, 1), owned: map[uint32]string{0: "x"},
			macs: map[uint32]delta.MAC{}}
		w.nft(0xa03, b)
	})
}
