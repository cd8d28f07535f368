package guest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// sh runs a script in a guest.
func sh(t *testing.T, o Options, script string) (res Result, said, out string, err error) {
	t.Helper()
	Need(t)
	var stdout bytes.Buffer
	out = t.TempDir()
	res, err = Run(t.Context(), o, Command{Args: []string{"/bin/sh", "-c", script}, Env: []string{"WORD=it's one"},
		Stdout: &stdout, Out: out, Limit: 2 * time.Minute})
	return res, stdout.String(), out, err
}

func TestRunBringsOutWhatItPromises(t *testing.T) {
	t.Parallel()
	o := Options{Files: map[string]string{"data/list": "packages.list"}, CPUs: 2, Memory: 768,
		KernelArgs: []string{"lariat.test=1"}, Slots: 2}
	res, said, out, err := sh(t, o, `
		echo "$WORD"; echo to stderr >&2
		head -c 3000000 /dev/zero | tr '\0' x; echo
		grep -o 'lariat.test=1' /proc/cmdline; nproc; wc -l <data/list
		mkdir -p "$LARIAT_OUT/deep/er"; head -c 2000000 /dev/urandom >"$LARIAT_OUT/deep/er/file"; sha256sum <"$LARIAT_OUT/deep/er/file"
		cat /sys/class/virtio-ports/*/name; ls /sys/bus/pci/slots
		exit 42`)
	if err != nil {
		t.Fatal(err)
	}
	if res.Code != 42 {
		t.Errorf("exit status %d, want 42", res.Code)
	}
	t.Logf("ready after %s, all told %s", res.Ready, res.Took)
	data, err := os.ReadFile(filepath.Join(out, "deep/er/file"))
	if err != nil || len(data) != 2000000 {
		t.Errorf("the file came out with %d bytes, %v", len(data), err)
	}
	cmd := exec.Command("sha256sum")
	cmd.Stdin = bytes.NewReader(data)
	sum, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(said, "x"); n < 3000000 {
		t.Errorf("%d bytes of output of 3000000 came out", n)
	}
	said = strings.ReplaceAll(said, "xx", "")
	for _, want := range []string{"it's one\n", "to stderr\n", "lariat.test=1\n2\n" + lines(t, "packages.list") + "\n",
		string(sum), "qmp\n"} {
		if !strings.Contains(said, want) {
			t.Errorf("%q is missing in\n%s", want, said)
		}
	}
}

// TestKernelOfARelease: each listed kernel is there, boots with its own modules, and is what was asked for.
func TestKernelOfARelease(t *testing.T) {
	t.Parallel()
	for release, version := range map[string]string{"bookworm": "6.1.", "trixie": "6.12."} {
		res, said, _, err := sh(t, Options{Kernel: release}, `modprobe vxlan && uname -r`)
		if err != nil || res.Code != 0 || !strings.HasPrefix(said, version) {
			t.Errorf("the kernel of %s: want %s…, have %q, exit status %d, %v", release, version, said, res.Code, err)
		}
	}
	_, _, _, err := sh(t, Options{Kernel: "sarge"}, `true`)
	if err == nil || !strings.Contains(err.Error(), "no kernel of Debian sarge") {
		t.Errorf("a release that is not listed: %v", err)
	}
}

func lines(t *testing.T, file string) string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	n, _ := json.Marshal(bytes.Count(data, []byte("\n")))
	return string(n)
}

func TestPanicIsReportedWithTheConsole(t *testing.T) {
	t.Parallel()
	_, said, out, err := sh(t, Options{}, `echo before; echo c >/proc/sysrq-trigger; echo after`)
	var e *Error
	if !errors.As(err, &e) || !e.Ready || !strings.Contains(e.Console, "Kernel panic") {
		t.Fatalf("a panic ends as %v", err)
	}
	if said != "before\n" {
		t.Errorf("it said %q", said)
	}
	if data, err := os.ReadFile(filepath.Join(out, "console.log")); err != nil || !bytes.Contains(data, []byte("sysrq")) {
		t.Errorf("the console is not kept: %v", err)
	}
}

func TestGuestThatDoesNotBootIsTriedAgainAndShowsItsConsole(t *testing.T) {
	t.Parallel()
	start := time.Now()
	res, _, _, err := sh(t, Options{KernelArgs: []string{"init=/nonexistent"}}, `true`)
	var e *Error
	if !errors.As(err, &e) || e.Ready || !strings.Contains(e.Console, "init /nonexistent failed") {
		t.Fatalf("a guest without PID 1 ends as %v", err)
	}
	if res.Attempts != attempts {
		t.Errorf("%d attempts, want %d", res.Attempts, attempts)
	}
	t.Logf("they took %s", time.Since(start))
}

func TestGuestThatHangsAtBootIsGivenUp(t *testing.T) {
	t.Parallel()
	Need(t)
	image, err := Find()
	if err != nil {
		t.Fatal(err)
	}
	_, err = run(t.Context(), image, Options{KernelArgs: []string{"init=/bin/cat"}, Boot: 2 * time.Second},
		Command{Args: []string{"true"}})
	var e *Error
	if !errors.As(err, &e) || e.Ready || !strings.Contains(err.Error(), "not ready after 2s") {
		t.Fatalf("a guest that hangs ends as %v", err)
	}
}

func TestCommandThatHangsIsStoppedAtItsLimit(t *testing.T) {
	t.Parallel()
	Need(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	// It ends when it is told to and not before, so the limit is this test's own word rather than a guess of how
	// long a boot takes.
	started := writer(func(p []byte) { cancel() })
	_, err := Run(ctx, Options{}, Command{Args: []string{"/bin/sh", "-c", "echo here; exec cat /dev/ttyS0"},
		Stdout: started})
	var e *Error
	if !errors.As(err, &e) || !e.Ready || !errors.Is(err, context.Canceled) {
		t.Fatalf("a command that hangs ends as %v", err)
	}
}

// TestTwoGuestsJoined: a cable between two machines, for tests that one kernel cannot do.
func TestTwoGuestsJoined(t *testing.T) {
	t.Parallel()
	Need(t)
	dir, err := os.MkdirTemp("", "joined-") // short, as paths of sockets must be
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ends := []string{filepath.Join(dir, "1"), filepath.Join(dir, "2")}
	scripts := []string{
		"busybox nc -l -p 7777",
		"until echo hello from 2 | busybox nc -w 2 192.0.2.1 7777; do :; done",
	}
	said := make([]bytes.Buffer, 2)
	errs := make(chan error)
	for i, script := range scripts {
		o := Options{QEMUArgs: []string{
			"-netdev", "dgram,id=cable,local.type=unix,local.path=" + ends[i] + ",remote.type=unix,remote.path=" + ends[1-i],
			"-device", "virtio-net-pci,netdev=cable,mac=02:00:00:00:00:0" + string(rune('1'+i)),
		}}
		setup := "set -e; modprobe virtio_net; ip addr add 192.0.2." + string(rune('1'+i)) +
			"/24 dev eth0; ip link set eth0 up; "
		go func() {
			res, err := Run(t.Context(), o, Command{Args: []string{"/bin/sh", "-c", setup + script}, Stdout: &said[i],
				Limit: 90 * time.Second})
			if err == nil && res.Code != 0 {
				err = errors.New("it exits with an error")
			}
			errs <- err
		}()
	}
	for range scripts {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if said[0].String() != "hello from 2\n" {
		t.Errorf("the first guest heard %q, the second said %q", said[0].String(), said[1].String())
	}
}

type writer func(p []byte)

func (w writer) Write(p []byte) (int, error) {
	w(p)
	return len(p), nil
}

// TestMainBringsResultsOut runs a test package whose tests differ in how they end, as a developer would.
func TestMainBringsResultsOut(t *testing.T) {
	t.Parallel()
	Need(t)
	cmd := exec.CommandContext(t.Context(), "go", "test", "-json", "-count=1", "./testdata/mixed")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "REQUIRE=")
	out, err := cmd.Output()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("go test ends as %v, want exit status 1", err)
	}
	got := map[string]string{}
	for in := bufio.NewScanner(bytes.NewReader(out)); in.Scan(); {
		var e struct{ Action, Test, Output string }
		if err := json.Unmarshal(in.Bytes(), &e); err != nil {
			t.Fatal(err)
		}
		if slices.Contains([]string{"pass", "fail", "skip"}, e.Action) {
			got[e.Test] = e.Action
		}
	}
	if want := map[string]string{"TestPasses": "pass", "TestFails": "fail", "TestSkips": "skip",
		"": "fail"}; !maps.Equal(got, want) {
		t.Errorf("got %v, want %v\n%s", got, want, out)
	}
	root, err := moduleRoot()
	if err != nil {
		t.Fatal(err)
	}
	kept := filepath.Join(root, ".cache/guest/test/guest/testdata/mixed/evidence")
	if data, err := os.ReadFile(kept); err != nil || string(data) != "from the guest\n" {
		t.Errorf("what a failing test left: %q, %v", data, err)
	}
}

// TestWithoutAnImage: the tests of a package skip with the reason, and fail where REQUIRE says that there
// must be a guest.
func TestWithoutAnImage(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ require, want string }{
		{"", "--- SKIP: TestGuest"},
		{"veth,guest", "--- FAIL: TestGuest"},
	} {
		cmd := exec.CommandContext(t.Context(), "go", "test", "-v", "-count=1", "-run", "TestPasses", "./testdata/mixed")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "LARIAT_GUEST_CACHE="+t.TempDir(), "REQUIRE="+tc.require)
		out, err := cmd.CombinedOutput()
		if (err != nil) != strings.Contains(tc.want, "FAIL") || !strings.Contains(string(out), tc.want) ||
			!strings.Contains(string(out), "make guest-image") {
			t.Errorf("REQUIRE=%s: %v\n%s", tc.require, err, out)
		}
	}
}

func TestExcerptBeginsWhereTheKernelFailed(t *testing.T) {
	long := strings.Repeat("line\n", 60)
	for _, tc := range []struct{ name, console, first string }{
		{"the last lines of a quiet one", "first\n" + long, "line"},
		{"a panic and its long trace", long + "Kernel panic - not syncing\n" + long, "Kernel panic - not syncing"},
		{"an oops before the panic", long + "BUG: bad\n" + long + "Kernel panic\n", "BUG: bad"},
		{"a short one, all of it", "one\nKernel panic\n", "one"},
	} {
		if first, _, _ := strings.Cut(excerpt(tc.console), "\n"); first != tc.first {
			t.Errorf("%s: begins with %q, want %q", tc.name, first, tc.first)
		}
	}
}

func TestInnerFlags(t *testing.T) {
	in, profiles := inner([]string{"-test.v=test2json", "-test.testlogfile=/tmp/log", "-test.run=A b",
		"-test.coverprofile=/tmp/c.out", "-ginkgo.focus=x"})
	if want := []string{"-test.v=test2json", "-test.run=A b", "-test.coverprofile=/lariat/out/coverprofile",
		"-ginkgo.focus=x"}; !slices.Equal(in, want) {
		t.Errorf("flags %q, want %q", in, want)
	}
	if want := map[string]string{"coverprofile": "/tmp/c.out"}; !maps.Equal(profiles, want) {
		t.Errorf("profiles %v, want %v", profiles, want)
	}
}

func TestPassedVariables(t *testing.T) {
	got := passed([]string{"HOME=/x", "LARIAT_BIN=/x", "LARIAT_SEED=7", "LARIAT_GUEST=1", "LARIAT_GUEST_CACHE=/x",
		"GODEBUG=a=1", "REQUIRE=x", "CI=true"})
	if want := []string{"LARIAT_SEED=7", "GODEBUG=a=1", "CI=true"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestPackagesListHasBothHalves(t *testing.T) {
	qemu, guest, without, kernels := wanted()
	if !slices.Equal(qemu, []string{"qemu-system-x86"}) || !slices.Contains(guest, "linux-image-cloud-amd64") ||
		!slices.Contains(without, "perl") ||
		kernels["trixie"] != "linux-image-cloud-amd64" {
		t.Errorf("qemu %v\nguest %v\nwithout %v\nkernels %v", qemu, guest, without, kernels)
	}
	for _, w := range without {
		if slices.Contains(guest, w) {
			t.Errorf("%s is wanted and left out", w)
		}
	}
}

// TestArchiveStaysInItsFolder: what comes out of a guest lands where it should, whatever its name.
func TestArchiveStaysInItsFolder(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "in"), 0o755); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	w := newInput(&b)
	if err := w.text("../escaped", "x"); err != nil {
		t.Fatal(err)
	}
	if err := w.w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := readFiles(&b, filepath.Join(dir, "in")); err == nil {
		t.Error("a name above the folder is accepted")
	}
	if _, err := os.Stat(filepath.Join(dir, "escaped")); err == nil {
		t.Error("it was written above the folder")
	}
}
