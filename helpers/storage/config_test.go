package main

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
)

// F105: a wrong word in the environment does not keep the process from its start, for volumes are
// to be unmounted; it is logged.
func TestF105WrongEnvironment(t *testing.T) {
	for driver, pair := range map[string][2]string{"nfs": {"MOUNT_OPTS", "bind"}, "ebs": {"LARIAT_EBS_CLUSTER", "../x"}} {
		t.Setenv(pair[0], pair[1])
		var log bytes.Buffer
		d, err := config{driver: driver}.open(slog.New(slog.NewTextHandler(&log, nil)))
		if err != nil || !strings.Contains(log.String(), pair[0]) {
			t.Errorf("%s: %v %s", driver, err, log.String())
			continue
		}
		if _, err := d.Init(t.Context()); err != nil {
			t.Error(err)
		}
	}
}
