package server

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"runtime"
	"slices"
	"testing"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// mark is a revision that a host's view has come to, and with it to all before.
func mark(t *testing.T, st store.Store, n *node) int64 {
	t.Helper()
	revision, err := store.One(t.Context(), st, store.Change{Key: entry.ViewPrefix + "mark", Value: []byte("{}"),
		Revision: store.Any})
	must(t, err)
	must(t, n.view.Wait(t.Context(), revision))
	return revision
}

// discard takes an answer that nobody reads.
type discard struct{}

func (discard) Header() http.Header { return http.Header{} }

func (discard) Write(b []byte) (int, error) { return len(b), nil }

func (discard) WriteHeader(int) {}

// work is how many bytes something allocates: a measure of what it does that no load of the machine changes.
func work(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// TestAnswersDoNotCostTheWholeView: what concerns one network, or the hosts alone, looks at no
// other network's blocks.
func TestAnswersDoNotCostTheWholeView(t *testing.T) {
	st := openStore(t, t.TempDir())
	t.Cleanup(func() { st.Close() })
	a := startNode(t, st, hostConfig("a", "192.0.2.1/24"))
	define(t, a, "lan", overlay("192.168.0.0/16"))
	attach(t, a, "lan", req("one"))
	ask := map[string]func(){
		"hosts":    func() { a.view.hostList() },
		"networks": func() { a.API().ServeHTTP(discard{}, httptest.NewRequest("GET", "/v1/networks", nil)) },
		"metrics":  func() { a.API().ServeHTTP(discard{}, httptest.NewRequest("GET", "/metrics", nil)) },
		"status": func() {
			if _, err := a.Server.Status(t.Context(), "lan"); err != nil {
				t.Error(err)
			}
		},
		"a big network's status": func() {
			if _, err := a.Server.Status(t.Context(), "big"); err != nil {
				t.Error(err)
			}
		},
		"an unknown network": func() { _ = a.view.Unknown("nothing") },
		"a release":          func() { must(t, a.Server.Release(t.Context(), "lan", aid("nothing"), 0)) },
		"another network": func() {
			_, _, err := a.prepareNetwork(t.Context(),
				metadata.Network{Name: "next", Subnets: []netip.Prefix{netip.MustParsePrefix("172.31.0.0/24")}}, nil, false)
			must(t, err)
		},
	}
	objects := map[string]any{}
	const networks = 200
	for i := range networks {
		n := overlay(fmt.Sprintf("100.64.%d.0/24", i))
		n.Name, n.Encapsulation, n.VNI = fmt.Sprintf("net%03d", i), metadata.EncapVXLAN, metadata.DefaultVNI+1+uint32(i)
		objects[entry.NetworkPrefix+n.Name] = n
	}
	n := overlay("10.0.0.0/8")
	n.Name, n.Encapsulation, n.VNI = "big", metadata.EncapVXLAN, 5000
	objects[entry.NetworkPrefix+"big"] = n
	fill(t, st, objects)
	mark(t, st, a)
	before := map[string]uint64{}
	measure := func(name string) uint64 {
		ask[name]() // what is made once
		var least []uint64
		for range 5 {
			least = append(least, work(ask[name]))
		}
		return slices.Min(least)
	}
	for name := range ask {
		before[name] = measure(name)
	}
	// A list of them has some hundred bytes for each. The store's own work, in this process, makes some noise.
	const blocks, each = 5000, 64
	fill(t, st, big("big", 1, blocks))
	mark(t, st, a)
	for name := range ask {
		if after := measure(name); after > before[name]+blocks*each {
			t.Errorf("%s: %d kB with no blocks in another network, %d kB with %d: it looks at each of them", name,
				before[name]>>10, after>>10, blocks)
		}
	}
}
