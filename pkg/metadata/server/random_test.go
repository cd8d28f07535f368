package server

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"testing"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// Three hosts fight for a network that is too small for them: they claim, borrow, request, collide, release
// and restart. Whatever happens, no address has two holders, and when everything is released nothing is left.
func TestRandomUseByThreeHosts(t *testing.T) {
	ctx := t.Context()
	st := openStore(t, t.TempDir())
	defer st.Close()
	nodes := make([]*node, 3)
	config := func(i int) Config {
		c := hostConfig(string(rune('a'+i)), fmt.Sprintf("192.0.2.%d/24", i+1))
		return c
	}
	for i := range nodes {
		nodes[i] = startNode(t, st, config(i))
	}
	def := overlay("10.42.0.0/26", "fd42::/121")
	def.BlockSizeV4, def.BlockSizeV6, def.CooldownSeconds = 28, 124, 1
	define(t, nodes[0], "lan", def)

	for round := range 3 {
		var mu sync.Mutex
		holders := map[netip.Addr]string{}
		var wg sync.WaitGroup
		for i, n := range nodes {
			for w := range 6 {
				wg.Go(func() {
					rnd := rand.New(rand.NewPCG(uint64(round*100+i*10+w), 7))
					mine := map[string][]netip.Addr{}
					for step := range 40 {
						if rnd.IntN(3) > 0 || len(mine) == 0 {
							id := fmt.Sprintf("%d-%d-%d-%d", round, i, w, step)
							r := req(id)
							if rnd.IntN(4) == 0 {
								r.Requested = []netip.Addr{netip.AddrFrom4([4]byte{10, 42, 0, byte(rnd.IntN(64))})}
							}
							a, err := n.Client.Attach(ctx, "lan", r)
							if err != nil {
								if !metadata.IsCode(err, metadata.CodeExhausted) && !metadata.IsCode(err, metadata.CodeHeld) &&
									!metadata.IsCode(err, metadata.CodeInvalid) {
									t.Errorf("%s: %v", id, err)
								}
								continue
							}
							if len(a.Addresses) != 2 {
								t.Errorf("%s: %+v", id, a.Addresses)
							}
							mu.Lock()
							for _, x := range a.Addresses {
								if old := holders[x.Address]; old != "" {
									t.Errorf("%s has two holders: %s and %s", x.Address, old, id)
								}
								holders[x.Address] = id
								mine[id] = append(mine[id], x.Address)
							}
							mu.Unlock()
							continue
						}
						for id, addrs := range mine {
							mu.Lock()
							for _, x := range addrs {
								delete(holders, x)
							}
							mu.Unlock()
							delete(mine, id)
							if err := n.Client.Release(ctx, "lan", aid(id), 0); err != nil {
								t.Error(err)
							}
							break
						}
					}
				})
			}
		}
		wg.Wait()
		if t.Failed() {
			return
		}
		all, err := nodes[round].Client.Allocations(ctx, "lan", true)
		if err != nil || len(all) != len(holders) {
			t.Fatalf("round %d: the tables hold %d, %d are held: %v", round, len(all), len(holders), err)
		}
		for _, x := range all {
			if holders[x.Address] != x.ContainerID {
				t.Errorf("%s: table says %s, holder is %q", x.Address, x.ContainerID, holders[x.Address])
			}
		}
		// Routing follows: what lies in no block of its host has an endpoint, and nothing else has.
		eventually(t, nodes[round], func(s *metadata.Snapshot) bool {
			owner := map[netip.Prefix]string{}
			for _, b := range s.Blocks {
				owner[b.CIDR] = b.Host
			}
			want := map[metadata.HostRoute]bool{}
			for _, x := range all {
				p, _ := x.Address.Prefix(x.Address.BitLen() - 4)
				if owner[p] != x.Host {
					want[metadata.HostRoute{Network: "lan", Address: x.Address, Host: x.Host}] = true
				}
			}
			for _, e := range s.HostRoutes {
				if !want[e] {
					return false
				}
			}
			return len(want) == len(s.HostRoutes)
		})
		// A restarted one knows what it holds.
		nodes[round].stop()
		nodes[round] = startNode(t, st, config(round))
		borrowed := 0
		for _, n := range nodes {
			r, err := n.Client.GC(ctx, "lan", nil)
			if err != nil {
				t.Fatal(err)
			}
			for _, x := range r.Released {
				delete(holders, x.Address)
			}
			borrowed += len(n.view.snapshot().HostRoutes)
		}
		t.Logf("round %d: %d addresses at its end, %d endpoints", round, len(all), borrowed)
		if len(holders) > 0 {
			t.Errorf("round %d: not released: %v", round, holders)
		}
		eventually(t, nodes[0], func(s *metadata.Snapshot) bool { return len(s.HostRoutes) == 0 })
		if list, _, err := store.List(ctx, st, entry.ContainerPrefix, 0); err != nil || len(list) != 0 {
			t.Errorf("round %d: %d containers left: %v", round, len(list), err)
		}
	}
}
