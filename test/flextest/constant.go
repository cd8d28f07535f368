package flextest

import (
	"errors"
	"strings"
	"testing"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/flex"
)

// NotSupported tests that a driver of shared file systems answers Not supported to all of kubelet's
// verbs that it does not support.
func NotSupported(t *testing.T, d volume.Driver) {
	t.Helper()
	for line := range strings.Lines(`getvolumename {"kubernetes.io/pvOrVolumeName":"v"}
attach {"name":"v"}
attach {"name":"v"} node
waitforattach /dev/x {"name":"v"}
isattached {"name":"v"} node
mountdevice /dir /dev/x {"name":"v"}
unmountdevice /dir
detach /dev/x
detach v node
expandvolume {"name":"v"} /dir 2 1
expandfs {"name":"v"} /dev/x /dir 2 1
`) {
		c, err := flex.Parse(strings.Fields(line))
		if err != nil {
			t.Errorf("%s: %v", line, err)
			continue
		}
		if _, err := flex.Do(t.Context(), d, c); !errors.Is(err, volume.ErrNotSupported) {
			t.Errorf("%s: %v", line, err)
		}
	}
}
