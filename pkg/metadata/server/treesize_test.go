package server

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
	"github.com/lariat-net/lariat/pkg/metadata/store"
	"github.com/lariat-net/lariat/pkg/metadata/tree"
)

// BenchmarkTreeOf is what a host keeps in memory, and builds when it changes, with the containers of 1 000 hosts
// and with its own.
func BenchmarkTreeOf(b *testing.B) {
	snap := &metadata.Snapshot{Self: "h0", Networks: []metadata.Network{{Name: "lan", Encapsulation: metadata.EncapVXLAN,
		VNI: 1042}}}
	var entries []store.Entry
	for i := range 1000 {
		host := fmt.Sprint("h", i)
		block := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 10), byte(i >> 2), byte(i << 6)}), 26)
		snap.Hosts = append(snap.Hosts, metadata.Host{Name: host})
		snap.Blocks = append(snap.Blocks, metadata.Block{Network: "lan", CIDR: block, Host: host,
			Gateway: block.Addr().Next()})
		a := block.Addr().Next()
		for j := range 30 {
			a = a.Next()
			c := metadata.Container{ID: fmt.Sprintf("%064x", i*100+j), Name: fmt.Sprintf("default/web-%d-%d", i, j), Host: host,
				Network: "lan", State: "running",
				Addresses: []netip.Addr{a}, MAC: metadata.MAC{2, 0, 0, 0, byte(i), byte(j)}, Created: time.Unix(1<<30, 0).UTC(),
				Interfaces: []metadata.ContainerInterface{{Network: "lan", IfName: "eth0", Addresses: []netip.Addr{a}}},
				Labels:     map[string]string{"lariat.stack": "app", "lariat.service": fmt.Sprint("web", j)}}
			value, err := json.Marshal(c)
			if err != nil {
				b.Fatal(err)
			}
			entries = append(entries, store.Entry{Key: entry.ContainerPrefix + metadata.ContainerKey(c), Value: value,
				Revision: 1})
		}
	}
	base := tree.NewBase(snap)
	for _, n := range []int{30, 30000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			bytes := 0
			for _, e := range entries[:n] {
				bytes += len(e.Key) + len(e.Value)
			}
			heap := func() uint64 {
				var m runtime.MemStats
				runtime.GC()
				runtime.ReadMemStats(&m)
				return m.HeapAlloc
			}
			before := heap()
			c := newContainers("h0")
			if err := c.load(entries[:n]); err != nil {
				b.Fatal(err)
			}
			t := base.Tree(c.list(), n > 30)
			held := heap() - before
			for b.Loop() {
				base.Tree(c.list(), n > 30)
			}
			runtime.KeepAlive(t)
			runtime.KeepAlive(c)
			b.ReportMetric(float64(bytes), "B-in-store")
			b.ReportMetric(float64(held), "B-in-memory")
		})
	}
}
