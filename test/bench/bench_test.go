package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lariat-net/lariat/pkg/probe"
)

// TestMain lets the test binary be the bench: the bench runs itself anew inside of its namespaces, and as the
// ends of traffic.
func TestMain(m *testing.M) {
	if os.Getenv(asBench) != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

const asBench = "LARIAT_BENCH_MAIN"

// TestQuickRun shows that every section of the bench works. It says nothing about the figures.
func TestQuickRun(t *testing.T) {
	peers, err := filepath.Abs(envOr("LARIAT_PEERS", "../../bin/peers"))
	if err != nil {
		t.Fatal(err)
	}
	if !exists(filepath.Join(peers, "bridge")) {
		t.Skipf("no reference plugins in %s; run `make peers`", peers)
	}
	probe.Need(t, probe.UserNS)
	bin, err := filepath.Abs(envOr("LARIAT_BIN", "../../bin"))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "bench.json")
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-quick", "-json", file, "-dir", t.TempDir(), "-bin", bin,
		"-peers", peers)
	cmd.Env = append(os.Environ(), asBench+"=1")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		t.Fatalf("bench: %v\n%s", err, out.String())
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var r report
	if err := json.Unmarshal(data, &r); err != nil {
		t.Fatal(err)
	}
	if len(r.Targets) != len(targets()) {
		t.Errorf("%d verdicts for %d targets", len(r.Targets), len(targets()))
	}
	sections := map[string]int{}
	for _, s := range r.Series {
		sections[s.Section]++
		if s.Errors > 0 {
			t.Errorf("%s, %s, %s of %s: %d errors, the first: %s", s.Section, s.Scenario, s.Op, s.Who, s.Errors, s.FirstErr)
		}
		if s.N == 0 {
			t.Errorf("%s, %s, %s of %s: nothing was measured", s.Section, s.Scenario, s.Op, s.Who)
		}
	}
	for _, section := range []string{"start", "cni", "reconcile"} {
		if sections[section] == 0 {
			t.Errorf("section %s measured nothing", section)
		}
	}
	if t.Failed() {
		t.Log(out.String())
	}
}

// TestBatcherReportsTheKernelsRefusal: a floor that swallowed errors would be too low.
func TestBatcherReportsTheKernelsRefusal(t *testing.T) {
	b, err := newBatcher()
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if err := b.program(1<<30, peersOf(3)); err == nil {
		t.Error("programming a device that does not exist went well")
	} else if errors.Unwrap(err) == nil {
		t.Errorf("%v wraps no errno", err)
	}
}

func TestQuantile(t *testing.T) {
	for _, tc := range []struct {
		values []float64
		q, is  float64
	}{
		{[]float64{7}, 0.5, 7},
		{[]float64{1, 2, 3}, 0.5, 2},
		{[]float64{1, 3}, 0.5, 2},
		{[]float64{0, 10}, 0.95, 9.5},
	} {
		if got := quantile(tc.values, tc.q); got != tc.is {
			t.Errorf("quantile %g of %v = %g, want %g", tc.q, tc.values, got, tc.is)
		}
	}
}

// TestVerdicts: the better of two peers counts, a target without figures is not met by accident.
func TestVerdicts(t *testing.T) {
	r := &report{}
	for who, ms := range map[string]float64{oursName: 4, "bridge ipt": 25, "bridge nft": 40} {
		s := &series{Section: "cni", Scenario: "masq", Who: who, Op: "ADD", Unit: "ms"}
		s.add(ms)
		r.add(s)
	}
	r.judge()
	for _, v := range r.Targets {
		switch v.What {
		case "ADD with masquerade of bridge":
			if v.Ratio != 0.16 || v.Verdict != "met" || !strings.HasPrefix(v.Theirs, "bridge ipt") {
				t.Errorf("got %+v, want 4 of 25, met", v)
			}
		default:
			if v.Verdict != "not measured" {
				t.Errorf("%s: %s without a figure", v.What, v.Verdict)
			}
		}
	}
}
