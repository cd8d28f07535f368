package server

import (
	"fmt"
	"sync"
	"testing"

	"github.com/lariat-net/lariat/pkg/metadata"
)

// BenchmarkAttach shows that an attach costs the same however many addresses this host has in use. One iteration is an
// attach and its release; only the attach is timed.
func BenchmarkAttach(b *testing.B) {
	st := openStore(b, b.TempDir())
	defer st.Close()
	n := startNode(b, st, hostConfig("a", "192.0.2.1/24"))
	define(b, n, "lan", overlay("10.0.0.0/8"))
	attach(b, n, "lan", req("first"))
	have := 1
	for _, want := range []int{0, 10_000, 60_000} {
		var wg sync.WaitGroup
		for w := range 100 {
			wg.Go(func() {
				for i := have + w; i < want; i += 100 {
					if _, err := n.Server.Attach(b.Context(), "lan", req(fmt.Sprintf("fill%060d", i))); err != nil {
						b.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
		have = max(have, want)
		b.Run(fmt.Sprintf("allocated=%d", want), func(b *testing.B) {
			i := 0
			for b.Loop() {
				i++
				id := fmt.Sprintf("bench%059d", i)
				if _, err := n.Client.Attach(b.Context(), "lan",
					metadata.AttachRequest{ContainerID: id, IfName: "eth0"}); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := n.Client.Release(b.Context(), "lan", aid(id), 0); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}
