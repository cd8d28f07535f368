package probe

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/kernel/netnstest"
)

func TestMain(m *testing.M) { netnstest.Main(m) }

// fakeT records the result of a test.
type fakeT struct{ skipped, failed string }

func (f *fakeT) Helper()                           {}
func (f *fakeT) Skipf(format string, args ...any)  { f.skipped = fmt.Sprintf(format, args...) }
func (f *fakeT) Fatalf(format string, args ...any) { f.failed = fmt.Sprintf(format, args...) }

func TestNeedSkipsWithTheNamesAndFailsWhereRequired(t *testing.T) {
	check := func(f Feature) error {
		if f == Veth {
			return nil
		}
		return fmt.Errorf("%s: %w", f, errors.ErrUnsupported)
	}
	for _, tc := range []struct {
		name, require string
		features      []Feature
		skip, fail    bool
	}{
		{"runs when nothing is missing", "all", []Feature{Veth}, false, false},
		{"skips what is missing", "", []Feature{Veth, VXLAN}, true, false},
		{"skips what is missing and not required", "veth,nftfib", []Feature{VXLAN}, true, false},
		{"fails what is required", "nftfib,vxlan", []Feature{VXLAN}, false, true},
		{"fails all", "all", []Feature{IFB}, false, true},
	} {
		var f fakeT
		need(&f, tc.require, check, tc.features)
		if (f.skipped != "") != tc.skip || (f.failed != "") != tc.fail {
			t.Errorf("%s: skipped %q, failed %q", tc.name, f.skipped, f.failed)
		}
		if (tc.skip || tc.fail) && !strings.Contains(f.skipped+f.failed, string(tc.features[len(tc.features)-1])) {
			t.Errorf("%s: the feature is not named: %q", tc.name, f.skipped+f.failed)
		}
	}
}

// The features differ between machines.
// On all machines every check ends soon and returns a clear error.
func TestCheckAnswersForEveryFeature(t *testing.T) {
	for _, f := range All() {
		start := time.Now()
		err := Check(f)
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("%s took %s", f, took)
		}
		if err != nil && !strings.HasPrefix(err.Error(), string(f)+": ") {
			t.Errorf("%s is not named in %q", f, err)
		}
		t.Logf("%-8s %v", f, err)
	}
	if Check("nonsense") == nil {
		t.Error("an unknown feature is there")
	}
}
