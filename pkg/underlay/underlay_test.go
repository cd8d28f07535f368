package underlay

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// TestLiveHostBeforeADeadRecord checks that a live host gets its address when the record of a dead
// host claims the address. The order of joining and the names do not matter.
func TestLiveHostBeforeADeadRecord(t *testing.T) {
	host := func(name, address string, live bool, day int) metadata.Host {
		return metadata.Host{Name: name, Live: live, Joined: time.Date(2026, 1, day, 0, 0, 0, 0, time.UTC),
			Underlay: []metadata.Underlay{{Address: netip.MustParsePrefix(address), Device: "eth0"}}}
	}
	me := host("me", "192.0.2.1/24", true, 1)
	for _, names := range [][2]string{{"a", "z"}, {"z", "a"}} {
		for _, days := range [][2]int{{2, 9}, {9, 2}} {
			dead, live := host(names[0], "192.0.2.9/24", false, days[0]), host(names[1], "192.0.2.9/24", true, days[1])
			for _, hosts := range [][]metadata.Host{{me, dead, live}, {live, dead, me}} {
				s := delta.NewState()
				peers := Peers(&metadata.Snapshot{Hosts: hosts}, me, s)
				if len(peers) != 1 || peers[0].Name != live.Name || len(s.Problems) != 1 {
					t.Errorf("%v: peers %v, problems %q", names, slices.Collect(func(yield func(string) bool) {
						for _, p := range peers {
							yield(p.Name)
						}
					}), s.Problems)
				}
			}
		}
	}
}
