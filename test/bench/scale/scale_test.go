package main

import (
	"bytes"
	"encoding/json"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lariat-net/lariat/pkg/probe"
)

const asScale = "LARIAT_SCALE_MAIN"

// TestMain lets the test binary be the program, which runs itself anew inside of its namespaces.
func TestMain(m *testing.M) {
	if os.Getenv(asScale) != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// TestQuickRun shows that every phase works. It says nothing about the figures, but that none failed.
func TestQuickRun(t *testing.T) {
	probe.Need(t, probe.UserNS)
	bin, err := filepath.Abs(envOr("LARIAT_BIN", "../../../bin"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(bin, "lariat-metadata")); err != nil {
		t.Skipf("no executables in %s; run `make build`", bin)
	}
	file := filepath.Join(t.TempDir(), "scale.json")
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-n", "3", "-outage", "1s", "-idle", "1s", "-changes", "3",
		"-view-hosts", "50",
		"-view-blocks", "100", "-json", file, "-dir", t.TempDir(), "-bin", bin)
	cmd.Env = append(os.Environ(), asScale+"=1")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		t.Fatalf("scale: %v\n%s", err, out.String())
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var figures []figure
	if err := json.Unmarshal(data, &figures); err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, f := range figures {
		seen[f.Phase] = true
		if strings.Contains(f.What, "failed") && f.Value != 0 {
			t.Errorf("%s: %s: %v", f.Phase, f.What, f.Value)
		}
	}
	for _, p := range phases {
		if !seen[p.name] {
			t.Errorf("phase %s has no figure", p.name)
		}
	}
}

func TestTable(t *testing.T) {
	tb := &table{before: []figure{{25, "join", "until all are ready", "s", 2.5}, {25, "gone", "what was", "", 3}}}
	tb.add(25, "join", "until all are ready", "s", 0.123)
	tb.add(100, "join", "until all are ready", "s", 1234.5)
	tb.add(100, "idle", "memory", "MiB", math.NaN())
	var out bytes.Buffer
	tb.print(&out)
	want := `  phase                 what  unit  25 before    25  100 before   100
   join  until all are ready     s       2.50  0.12           -  1234
   idle               memory   MiB          -     -           -     -
   gone             what was                3     -           -     -
`
	if got := out.String(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}
