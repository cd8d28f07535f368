package guest

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lariat-net/lariat/test/debian"
)

const marker = "LARIAT_GUEST"

// Inside says whether this process runs in a guest.
func Inside() bool { return os.Getenv(marker) != "" }

// Out is a folder whose files come out of the guest, for what helps to understand a failure: captures, logs.
// It is "" outside.
func Out() string { return os.Getenv("LARIAT_OUT") }

// Main is TestMain of a package whose tests run in a guest; see the comment of the package. In the guest it
// just runs them.
func Main(m *testing.M, o Options) {
	flag.Parse()
	if Inside() || flag.Lookup("test.list").Value.String() != "" {
		os.Exit(m.Run())
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	code, err := outside(ctx, o)
	if errors.Is(err, errNone) {
		without(err)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err)
		code = 1
	}
	os.Exit(code)
}

// errNone is when there is no image to boot.
var errNone = errors.New("no guest")

// outside boots a guest and runs this program in it.
func outside(ctx context.Context, o Options) (int, error) {
	if _, err := Find(); err != nil {
		return 0, fmt.Errorf("%w: %w", errNone, err)
	}
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	dir, err := os.Getwd()
	if err != nil {
		return 0, err
	}
	args, profiles := inner(os.Args[1:])
	if o.Only != "" && flag.Lookup("test.run").Value.String() == "" {
		args = append([]string{"-test.run=" + o.Only}, args...)
	}
	pkg := filepath.Join(dir, o.Package)
	if o.Package != "" {
		tmp, err := os.MkdirTemp("", "guest-test-")
		if err != nil {
			return 0, err
		}
		defer os.RemoveAll(tmp)
		if self, err = compile(ctx, pkg, tmp); err != nil {
			return 0, err
		}
	}
	name := filepath.Base(pkg) + ".test"
	files := map[string]string{name: self}
	if data := filepath.Join(pkg, "testdata"); isDir(data) {
		files["testdata"] = data
	}
	maps.Copy(files, o.Files)
	o.Files = files

	out, err := os.MkdirTemp("", "guest-out-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(out)
	c := Command{Args: append([]string{"./" + name}, args...), Env: passed(os.Environ()), Stdout: os.Stdout, Out: out,
		Limit: limit()}
	res, err := Run(ctx, o, c)
	if res.Attempts > 1 {
		fmt.Fprintf(os.Stderr, "guest: it took %d attempts to boot\n", res.Attempts)
	}
	for from, to := range profiles {
		if data, rerr := os.ReadFile(filepath.Join(out, from)); rerr == nil {
			err = errors.Join(err, os.WriteFile(to, data, 0o644))
			os.Remove(filepath.Join(out, from))
		}
	}
	if err != nil || res.Code != 0 || os.Getenv("LARIAT_GUEST_KEEP") != "" {
		keep(out, dir)
	}
	return res.Code, err
}

// compile makes a package's test binary, static.
func compile(ctx context.Context, pkg, to string) (string, error) {
	binary := filepath.Join(to, "package.test")
	cmd := exec.CommandContext(ctx, "go", "test", "-c", "-vet=off", "-o", binary, ".")
	cmd.Dir, cmd.Env = pkg, append(os.Environ(), "CGO_ENABLED=0")
	_, err := debian.Output(cmd)
	return binary, err
}

func isDir(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.IsDir()
}

// inner are the flags for the guest. What they name as files is made in Out there, and profiles says where it
// belongs here.
func inner(args []string) (in []string, profiles map[string]string) {
	profiles = map[string]string{}
	outputDir := flag.Lookup("test.outputdir").Value.String()
	for _, a := range args {
		name, value, _ := strings.Cut(strings.TrimLeft(a, "-"), "=")
		switch name {
		case "test.testlogfile", "test.outputdir", "test.gocoverdir", "test.fuzzcachedir":
			continue // these are the go command's own, and folders of this machine
		case "test.coverprofile", "test.cpuprofile", "test.memprofile", "test.blockprofile", "test.mutexprofile",
			"test.trace":
			base := strings.TrimPrefix(name, "test.")
			if !filepath.IsAbs(value) {
				value = filepath.Join(outputDir, value)
			}
			profiles[base] = value
			a = "-" + name + "=" + filepath.Join(outDir, base)
		}
		in = append(in, a)
	}
	return in, profiles
}

// passed are the variables that mean something to tests. What names folders or programs of this machine does not.
func passed(environ []string) (out []string) {
	for _, e := range environ {
		name, _, _ := strings.Cut(e, "=")
		switch {
		case slices.Contains([]string{"LARIAT_BIN", "LARIAT_PEERS", "LARIAT_OUT", marker}, name),
			strings.HasPrefix(name, marker+"_"):
		case strings.HasPrefix(name, "LARIAT_"), slices.Contains([]string{"GODEBUG", "GOTRACEBACK", "GOMAXPROCS", "CI"},
			name):
			out = append(out, e)
		}
	}
	return out
}

// limit is the tests' own and some for the boot and for what a test binary says when its time is over.
func limit() time.Duration {
	d, err := time.ParseDuration(flag.Lookup("test.timeout").Value.String())
	if err != nil || d == 0 {
		return 24 * time.Hour
	}
	return d + 90*time.Second
}

// keep moves what came out to where it is found again.
func keep(out, pkgDir string) {
	found, err := os.ReadDir(out)
	if err != nil || len(found) == 0 {
		return
	}
	root, err := moduleRoot()
	if err != nil {
		return
	}
	rel, err := filepath.Rel(root, pkgDir)
	if err != nil {
		return
	}
	to := filepath.Join(root, ".cache", "guest", rel)
	if os.RemoveAll(to) != nil || os.MkdirAll(filepath.Dir(to), 0o755) != nil {
		return
	}
	if err := os.CopyFS(to, os.DirFS(out)); err != nil {
		fmt.Fprintln(os.Stderr, "guest: keep files:", err)
		return
	}
	fmt.Printf("guest: files are in %s\n", to)
}

// required says whether REQUIRE lists something.
func required(what string) bool {
	r := strings.FieldsFunc(os.Getenv("REQUIRE"), func(r rune) bool { return r == ',' || r == ' ' })
	return slices.Contains(r, what) || slices.Contains(r, "all")
}

// Need skips a test of this machine that boots guests itself where none can be had, or fails it if REQUIRE
// lists "guest".
func Need(t testing.TB) {
	t.Helper()
	if _, err := Find(); err != nil {
		noGuest(t, err)
	}
}

func noGuest(t testing.TB, err error) {
	t.Helper()
	if required("guest") {
		t.Fatalf("%v, and REQUIRE=%s", err, os.Getenv("REQUIRE"))
	}
	t.Skip(err)
}

// without runs one test in place of the package's: it says why there is no guest. Like this the reason
// reaches whoever reads the results, in every format; a line on standard output would not. It ends the
// process.
func without(err error) {
	_ = flag.Set("test.run", "")
	_ = flag.Set("test.skip", "")
	testing.Main(func(_, _ string) (bool, error) { return true, nil },
		[]testing.InternalTest{{Name: "TestGuest", F: func(t *testing.T) { noGuest(t, err) }}}, nil, nil)
}
