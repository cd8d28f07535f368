package main

import (
	"log/slog"
	"testing"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/test/flextest"
)

// F155, F108: init is a constant in every environment. The answer to kubelet's verbs that this
// driver does not support is always Not supported.
func TestF155Constant(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("LARIAT_STATE_DIR", dir)
	t.Setenv("LARIAT_RUN_DIR", dir)
	t.Setenv("AWS_REGION", "no such region")
	t.Setenv("AWS_CONFIG_FILE", "/etc/shadow")
	d, err := program().Driver(slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if caps, err := d.Init(t.Context()); err != nil || caps != (volume.Capabilities{}) {
		t.Errorf("init: %+v %v", caps, err)
	}
	if err := d.Unmount(t.Context(), dir+"/at"); err != nil {
		t.Errorf("unmount: %v", err)
	}
	flextest.NotSupported(t, d)
}
