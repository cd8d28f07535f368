package main

import (
	"errors"
	"log/slog"
	"os"
	"strings"
	"testing"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/test/flextest"
)

// F155: init is a constant in every environment. Verbs that need the environment report its errors.
func TestF155WrongEnvironment(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("LARIAT_STATE_DIR", dir)
	t.Setenv("LARIAT_RUN_DIR", dir)
	for variable, bad := range map[string]string{"NFS_SERVER": "-o", "MOUNT_DIR": "x/../y", "MOUNT_OPTS": "bind",
		"ON_REMOVE": "shred"} {
		t.Setenv(variable, bad)
		d, err := program().Driver(slog.New(slog.DiscardHandler))
		os.Unsetenv(variable)
		if err != nil {
			t.Fatal(err)
		}
		if caps, err := d.Init(t.Context()); err != nil || caps != (volume.Capabilities{}) {
			t.Errorf("init: %+v %v", caps, err)
		}
		r := volume.Request{Name: "v", Options: map[string]string{"host": "h", "export": "/e"}}
		err = d.Mount(t.Context(), dir+"/at", "", r)
		if !errors.Is(err, volume.ErrInvalid) || !strings.Contains(err.Error(), variable) {
			t.Errorf("mount: %v", err)
		}
		if err := d.Unmount(t.Context(), dir+"/at"); err != nil {
			t.Errorf("unmount: %v", err)
		}
	}
}

// F108: the answer to kubelet's verbs that this driver does not support is always Not supported.
func TestF108NotSupported(t *testing.T) {
	d, err := program().Driver(slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	flextest.NotSupported(t, d)
}
