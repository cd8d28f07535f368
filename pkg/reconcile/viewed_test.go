package reconcile

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
)

// TestViewedPlansWhatIsNew: each view comes into force, and only one from which something else is planned runs
// the planners.
func TestViewedPlansWhatIsNew(t *testing.T) {
	var told int
	m := &Manager{Log: discard(), OnView: func(*metadata.Snapshot) { told++ }}
	c := NewConcern("test", time.Hour, nil)
	s := &metadata.Snapshot{Self: "a", Hosts: []metadata.Host{{Name: "a", Live: true}, {Name: "b", Live: true}},
		Networks: []metadata.Network{{Name: "red", Encapsulation: metadata.EncapVXLAN, VNI: 1042}}}
	for i, step := range []struct {
		name   string
		change func(*metadata.Snapshot)
		runs   bool
	}{
		{"the first", func(*metadata.Snapshot) {}, true},
		{"the same again", func(s *metadata.Snapshot) { s.Revision++ }, false},
		{"a host is gone", func(s *metadata.Snapshot) { s.Hosts[1].Live = false }, false},
		{"labels of a host", func(s *metadata.Snapshot) { s.Hosts[1].Labels = map[string]string{"a": "b"} }, false},
		{"a block", func(s *metadata.Snapshot) {
			s.Blocks = append(s.Blocks, metadata.Block{Network: "red", CIDR: netip.MustParsePrefix("10.42.0.0/26"), Host: "b"})
		}, true},
		{"a host moved", func(s *metadata.Snapshot) { s.Hosts[1].BootID = "another" }, true},
	} {
		next := *s
		next.Hosts, next.Blocks = slices.Clone(s.Hosts), slices.Clone(s.Blocks)
		step.change(&next)
		s = &next
		if first, _ := m.viewed(s, c); first != (i == 0) || m.View() != s || told != i+1 {
			t.Errorf("%s: first %t, told %d times", step.name, first, told)
		}
		if runs := len(c.trigger) == 1; runs != step.runs {
			t.Errorf("%s: a pass %t, want %t", step.name, runs, step.runs)
		}
		select {
		case <-c.trigger:
		default:
		}
	}
}
