package flextest

import (
	"encoding/json"
	"os/exec"
	"strings"
	"testing"

	"github.com/lariat-net/lariat/pkg/volume/mounts"
)

// Options returns a volume's options as JSON, from alternating keys and values.
func Options(pairs ...string) string {
	m := map[string]string{}
	for i := 0; i < len(pairs); i += 2 {
		m[pairs[i]] = pairs[i+1]
	}
	data, _ := json.Marshal(m)
	return string(data)
}

// At returns the mounts at a directory, the uppermost last.
func At(t *testing.T, dir string) []mounts.Entry {
	t.Helper()
	table, err := mounts.Read()
	Must(t, err)
	return table.At(dir)
}

// NothingAt fails the test if anything is mounted at a directory.
func NothingAt(t *testing.T, dir string) {
	t.Helper()
	if m := At(t, dir); len(m) > 0 {
		t.Errorf("mounted at %s: %+v", dir, m)
	}
}

// Must ends the test if there is an error.
func Must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Sh runs a line of shell and returns its output.
func Sh(t *testing.T, line string) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", line).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v %s", line, err, out)
	}
	return strings.TrimSpace(string(out))
}
