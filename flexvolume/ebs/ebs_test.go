package main

import (
	"errors"
	"log/slog"
	"os"
	"strings"
	"testing"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/flex"
)

// F155: init is a constant of the installation in every environment. Verbs that need the
// environment report its errors.
func TestF155WrongEnvironment(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("LARIAT_STATE_DIR", dir)
	t.Setenv("LARIAT_RUN_DIR", dir)
	for variable, bad := range map[string]string{"LARIAT_EBS_ATTACH": "me", "LARIAT_EBS_CLUSTER": "../x"} {
		t.Setenv(variable, bad)
		d, err := program().Driver(slog.New(slog.DiscardHandler))
		os.Unsetenv(variable)
		if err != nil {
			t.Fatal(err)
		}
		want := volume.Capabilities{Attach: true, FSGroup: true, SELinuxRelabel: true, SupportsMetrics: true,
			RequiresFSResize: true}
		if caps, err := d.Init(t.Context()); err != nil || caps != want {
			t.Errorf("init: %+v %v", caps, err)
		}
		for _, line := range []string{"create J", "delete J", "attach J node", "waitforattach /dev/xvdba J",
			"isattached J node", "detach v node", "mountdevice /d /dev/xvdba J", "mount /d J", "expandvolume J /d 2 1",
			"expandfs J /dev/xvdba /d 2 1"} {
			c, err := flex.Parse(strings.Fields(strings.ReplaceAll(line, "J", `{"name":"v","size":"1"}`)))
			if err == nil {
				_, err = flex.Do(t.Context(), d, c)
			}
			if !errors.Is(err, volume.ErrInvalid) || !strings.Contains(err.Error(), variable) {
				t.Errorf("%s: %v", line, err)
			}
		}
		for _, line := range []string{"unmount", "unmountdevice"} {
			c, err := flex.Parse([]string{line, dir + "/at"})
			if err == nil {
				_, err = flex.Do(t.Context(), d, c)
			}
			if err != nil {
				t.Errorf("%s: %v", line, err)
			}
		}
	}
}

// F106: the installation selects the process that attaches, and init reports the choice to kubelet.
func TestF106InitTellsWhoAttaches(t *testing.T) {
	for who, want := range map[string]bool{"": true, "controller": true, "node": false} {
		t.Setenv("LARIAT_EBS_ATTACH", who)
		d, err := program().Driver(slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		if caps, err := d.Init(t.Context()); err != nil || caps.Attach != want {
			t.Errorf("%q: %+v %v", who, caps, err)
		}
		if _, err := d.GetVolumeName(t.Context(), volume.Request{Name: "v"}); !errors.Is(err, volume.ErrNotSupported) {
			t.Errorf("getvolumename: %v", err)
		}
	}
}
