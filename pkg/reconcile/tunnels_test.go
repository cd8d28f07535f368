package reconcile

import (
	"errors"
	"testing"

	"github.com/lariat-net/lariat/pkg/metadata"
)

// TestF46NothingIsKnownBeforeTheFirstPass: that no network is encrypted is said by who has looked.
func TestF46NothingIsKnownBeforeTheFirstPass(t *testing.T) {
	var view *metadata.Snapshot
	tunnels := &Tunnels{View: func() *metadata.Snapshot { return view }, clean: true}
	ask := func(known bool) {
		t.Helper()
		for _, detail := range []bool{false, true} {
			r := tunnels.Report(t.Context(), detail)
			if r.Networks == nil || r.Tunnels == nil || (r.Problem == "") != known || (r.Remedy == "") != known {
				t.Errorf("detail %v: %+v", detail, r)
			}
		}
	}
	ask(false)
	if _, err := tunnels.Run(t.Context()); !errors.Is(err, errNoView) {
		t.Error(err)
	}
	ask(false)
	view = &metadata.Snapshot{}
	if _, err := tunnels.Run(t.Context()); err != nil {
		t.Error(err)
	}
	ask(true)
}
