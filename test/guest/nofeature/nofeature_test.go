// Package nofeature_test runs in a guest whose kernel lacks ESP and XFRM interfaces, though it has everything
// else: what needs them has to say so by name.
package nofeature_test

import (
	"strings"
	"testing"

	"github.com/lariat-net/lariat/pkg/probe"
	"github.com/lariat-net/lariat/test/guest"
)

func TestMain(m *testing.M) {
	guest.Main(m, guest.Options{KernelArgs: []string{"module_blacklist=esp4,esp6,xfrm_interface"}})
}

func TestProbesNameWhatIsMissing(t *testing.T) {
	for f, module := range map[probe.Feature]string{probe.ESP: "esp4", probe.ESP6: "esp6", probe.AESGCM: "esp4",
		probe.XfrmInterface: "xfrm_interface"} {
		err := probe.Check(f)
		if err == nil {
			t.Errorf("%s is there, without %s", f, module)
			continue
		}
		t.Log(err)
		if !strings.HasPrefix(err.Error(), string(f)+": ") || !strings.Contains(err.Error(), module) {
			t.Errorf("neither feature nor remedy is named: %v", err)
		}
	}
	if err := probe.Check(probe.Veth); err != nil {
		t.Errorf("the rest is there all the same: %v", err)
	}
}
