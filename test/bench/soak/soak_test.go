package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/lariat-net/lariat/pkg/probe"
)

// TestMain lets the test binary be the program, which runs itself anew inside of its namespaces.
func TestMain(m *testing.M) {
	if os.Getenv(asSoak) != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

const asSoak = "LARIAT_SOAK_MAIN"

// TestFindsWhatIsLeft: a short run works, and its program fails when something is left lying. It waits two minutes
// for what a manager gives back by itself.
func TestFindsWhatIsLeft(t *testing.T) {
	if os.Getenv("LARIAT_SOAK") == "" {
		t.Skip("takes two minutes: make acceptance sets LARIAT_SOAK")
	}
	probe.Need(t, probe.UserNS, probe.Veth, probe.Bridge, probe.VXLAN, probe.NexthopObjects, probe.Nft, probe.NftFib,
		probe.NftNAT, probe.IPv6)
	peers, err := filepath.Abs("../../../bin/peers")
	if p := os.Getenv("LARIAT_PEERS"); p != "" {
		peers, err = filepath.Abs(p)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(peers, "portmap")); err != nil {
		t.Skipf("no reference plugins in %s; run `make peers`", peers)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-t", "3s", "-settle", "1s")
	cmd.Env = append(os.Environ(), asSoak+"=1", leave+"=1", "LARIAT_PEERS="+peers)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err = cmd.Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Fatalf("with one attachment left it ends with %v, want exit status 1\n%s", err, &out)
	}
	for _, want := range []string{"host a journal: left behind: attachments/green/", "host a links: left behind: lrt",
		"host a routes: left behind: 10.43.", "host a held: left behind: held 10.43."} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("it does not name %q\n%s", want, &out)
		}
	}
}

func TestCompare(t *testing.T) {
	before := world{"a": lines("1: eth0@if7: up expires 12sec\n2: lo: up\n"), "b": lines("one\none\n# at noon\n")}
	after := world{"a": lines("1: eth0@if9: up expires 3sec\n17: lrtx: up\n"), "b": lines("one\none\none\n# at night\n")}
	want := []string{"a: gone: lo: up", "a: left behind: lrtx: up", "b: left behind: one"}
	if got := compare(before, after); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := compare(before, before); got != nil {
		t.Errorf("nothing differs, and yet %q", got)
	}
}

func TestGrown(t *testing.T) {
	start := figures{descriptors: 12, goroutines: 30, octets: 20 << 20}
	for _, tc := range []struct {
		name string
		end  figures
		want []string
	}{
		{"as it was", start, nil},
		{"a few more", figures{descriptors: 20, goroutines: 45, octets: 60 << 20}, nil},
		{"descriptors", figures{descriptors: 23, goroutines: 30}, []string{"23 open descriptors, at most 22 were expected"}},
		{"goroutines", figures{descriptors: 12, goroutines: 51}, []string{"51 goroutines, at most 50 were expected"}},
		{"memory", figures{octets: 80 << 20}, []string{"80 resident MiB, at most 72 were expected"}},
	} {
		if got := grown(start, tc.end); !slices.Equal(got, tc.want) {
			t.Errorf("%s: %q, want %q", tc.name, got, tc.want)
		}
	}
}

func TestParseFigures(t *testing.T) {
	const metrics = "# HELP x\ngo_goroutines 21\nprocess_open_fds 9\nprocess_resident_memory_bytes 1.5e+07\n"
	f, err := parseFigures([]byte(metrics))
	if want := (figures{descriptors: 9, goroutines: 21, octets: 1.5e7}); err != nil || f != want {
		t.Errorf("got %+v, %v", f, err)
	}
	if _, err := parseFigures([]byte("go_goroutines 21\n")); err == nil {
		t.Error("figures are missing, and that is no error")
	}
}
