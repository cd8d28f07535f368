package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/lariat-net/lariat/pkg/metadata"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// lariat runs the program in this process.
func lariat(t testing.TB, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	return lariatWith(t, strings.NewReader(""), args...)
}

func lariatWith(t testing.TB, stdin io.Reader, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	var out, errs bytes.Buffer
	status = run(args, stdin, &out, &errs)
	return out.String(), errs.String(), status
}

// must is lariat where it has to work.
func must(t testing.TB, args ...string) string {
	t.Helper()
	out, errs, status := lariat(t, args...)
	if status != 0 || errs != "" {
		t.Fatalf("lariat %s: status %d: %s", strings.Join(args, " "), status, errs)
	}
	return out
}

func golden(t *testing.T, file, got string) {
	t.Helper()
	file = filepath.Join("testdata", file)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs; got\n%s", file, got)
	}
}

func TestF135PlanPrintsTheTextOfTheGoldenFiles(t *testing.T) {
	for _, name := range []string{"one", "three", "ipsec"} {
		golden(t, name+".plan", must(t, "plan", "--metadata", "testdata/"+name+".json"))
	}
	// What pkg/vxlan and pkg/ipsec pin stands in it word for word, but for tunnels, whose options are the
	// network manager's.
	files, err := filepath.Glob("../../pkg/[vi][xp]*/testdata/*.plan")
	if err != nil || len(files) == 0 {
		t.Fatalf("no golden plans: %v", err)
	}
	for _, file := range files {
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		snapshot := strings.TrimSuffix(file, ".plan") + ".json"
		out, errs, status := lariat(t, "plan", "--metadata", snapshot)
		if status != 0 {
			t.Errorf("%s: status %d: %s", snapshot, status, errs)
			continue
		}
		lines := strings.Split(out, "\n")
		for line := range strings.Lines(string(want)) {
			if line = strings.TrimSuffix(line, "\n"); !slices.Contains(lines, line) && !strings.HasPrefix(line, "conn ") &&
				!strings.HasPrefix(line, "child ") {
				t.Errorf("%s: the plan lacks %q", snapshot, line)
			}
		}
	}
}

func TestF135PlanOfAnotherHost(t *testing.T) {
	out := must(t, "plan", "--metadata", "testdata/three.json", "--host", "h3")
	if !strings.Contains(out, "local 198.51.100.3") || !strings.Contains(out, "addr  10.42.3.1/32 dev vtep1042") {
		t.Error(out)
	}
	b, err := os.ReadFile("testdata/three.json")
	if err != nil {
		t.Fatal(err)
	}
	if piped, _, _ := lariatWith(t, bytes.NewReader(b), "plan", "--metadata", "-", "--host", "h3"); piped != out {
		t.Error("from standard input it is another plan")
	}
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"plan", "--metadata", "testdata/three.json", "--host", "h9"},
			"host h9 is not in the metadata; there are: h1 h2 h3"},
		{[]string{"plan", "--metadata", "testdata/none.json"}, "no such file"},
		{[]string{"plan", "--metadata", "lariat_test.go"}, "lariat status --snapshot"},
		{[]string{"plan", "--metadata", "/dev/null"}, "there is no host in it"},
	} {
		if out, errs, status := lariat(t, tc.args...); status != 1 || out != "" || !strings.Contains(errs, tc.want) {
			t.Errorf("%v: status %d, %q", tc.args, status, errs)
		}
	}
}

func TestF136GraphIsThePictureOfThePackage(t *testing.T) {
	for _, name := range []string{"one", "three", "fifty", "ipsec"} {
		for _, kind := range []string{"svg", "dot"} {
			want, err := os.ReadFile(filepath.Join("../../pkg/graph/testdata", name+"."+kind))
			if err != nil {
				t.Fatal(err)
			}
			if got := must(t, "graph", "--format", kind, "--metadata", "testdata/"+name+".json"); got != string(want) {
				t.Errorf("%s.%s is another picture", name, kind)
			}
		}
	}
	if _, errs, status := lariat(t, "graph", "--format", "png", "--metadata", "testdata/one.json"); status != 1 ||
		!strings.Contains(errs, "want svg or dot") {
		t.Error(errs)
	}
}

func TestStatusOfAFile(t *testing.T) {
	for _, name := range []string{"one", "three", "fifty"} {
		golden(t, name+".status", must(t, "status", "--metadata", "testdata/"+name+".json"))
	}
	golden(t, "three.table", must(t, "status", "--metadata", "testdata/three.json", "--output", "table"))
}

func TestOutputFormats(t *testing.T) {
	var fromJSON, fromYAML statusReport
	if err := json.Unmarshal([]byte(must(t, "status", "--metadata", "testdata/fifty.json", "-o", "json")),
		&fromJSON); err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal([]byte(must(t, "status", "--metadata", "testdata/fifty.json", "-o", "yaml")),
		&fromYAML); err != nil {
		t.Fatal(err)
	}
	if len(fromJSON.Hosts) != 50 || len(fromYAML.Hosts) != 50 || len(fromJSON.Problems) != 1 || fromJSON.Hosts[16].Live ||
		fromJSON.Networks[0].Subnets[0].Used != 195 {
		t.Errorf("%+v", fromJSON)
	}
	if _, errs, status := lariat(t, "status", "-o", "xml"); status != 1 || !strings.Contains(errs,
		"want text, json, yaml or table") {
		t.Error(errs)
	}
	var s metadata.Snapshot
	if err := json.Unmarshal([]byte(must(t, "status", "--snapshot", "--metadata", "testdata/three.json")),
		&s); err != nil || len(s.Containers) != 8 {
		t.Errorf("%v %+v", err, s)
	}
}

func TestNoColourWhereNobodyLooks(t *testing.T) {
	if out := must(t, "status", "--metadata", "testdata/fifty.json"); strings.Contains(out, "\x1b") {
		t.Error("colours go into a pipe")
	}
	w := &writer{colour: true}
	w.columns([]string{"A", "B"}, [][]cell{{styled(bad, "x"), txt("1")}, {txt("long"), txt("")}})
	if got := w.String(); got != "\x1b[1mA\x1b[0m     \x1b[1mB\x1b[0m\n\x1b[31mx\x1b[0m     1\nlong  -\n" {
		t.Errorf("%q", got)
	}
}

// Without a service every command says why it cannot do its work, and what helps.
func TestWithoutService(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "none.sock")
	for _, args := range [][]string{
		{"plan"}, {"graph"}, {"network", "list"}, {"network", "show", "x"}, {"network", "delete", "x"},
		{"network", "create", "x", "--subnet", "10.0.0.0/16"},
		{"network", "update", "x", "--mtu", "1400"}, {"host", "list"}, {"host", "show", "x"}, {"host", "remove", "x"},
		{"ip", "list"}, {"ip", "show", "10.0.0.1"}, {"ip", "release", "10.0.0.1"},
	} {
		out, errs, status := lariat(t, append(args, "--socket", missing)...)
		if status != 1 || out != "" || !strings.Contains(errs, "there is no socket "+missing) || !strings.Contains(errs,
			"systemctl start lariat-metadata") {
			t.Errorf("%v: status %d, %q", args, status, errs)
		}
	}
	out, _, status := lariat(t, "status", "--socket", missing, "--manager-socket", missing)
	if status != 1 || !strings.Contains(out, "there is no socket") || !strings.Contains(out,
		"the network manager is not running") {
		t.Errorf("status %d: %s", status, out)
	}
	out, _, status = lariat(t, "doctor", "--socket", missing, "--manager-socket", missing)
	if status != 1 || !strings.Contains(out, "there is no socket") || !strings.Contains(out, "skipped") {
		t.Errorf("status %d: %s", status, out)
	}
	// Completion says nothing, and does not fail.
	if out, _, status := lariat(t, "__complete", "--socket", missing, "network", "show", ""); status != 0 ||
		!strings.HasPrefix(out, ":4") {
		t.Errorf("status %d: %q", status, out)
	}
}

func TestCertificates(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pki")
	for _, args := range [][]string{{"certs", "init", dir}, {"certs", "host", dir, "h1", "--ip", "192.0.2.1", "--dns",
		"h1.example.org"}, {"certs", "show", dir}, {"certs", "show", dir, "-o", "yaml"}} {
		out := must(t, args...)
		key, err := os.ReadFile(filepath.Join(dir, "ca.key"))
		if err != nil {
			t.Fatal(err)
		}
		if body := strings.Split(string(key), "\n")[1]; strings.Contains(out, "PRIVATE") || strings.Contains(out, body) {
			t.Errorf("%v prints a key", args)
		}
	}
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"certs", "init", dir}, "there already"},
		{[]string{"certs", "host", dir, "h1"}, "--renew"},
		{[]string{"certs", "host", dir, "h2", "--ip", "300.1.1.1"}, "300.1.1.1"},
	} {
		if _, errs, status := lariat(t, tc.args...); status != 1 || !strings.Contains(errs, tc.want) || strings.Contains(errs,
			"PRIVATE") {
			t.Errorf("%v: %q", tc.args, errs)
		}
	}
	must(t, "certs", "host", dir, "h1", "--renew")
}

func TestCompletionOfFixedValues(t *testing.T) {
	for _, tc := range []struct{ args, want string }{
		{"graph --format ", "svg\ndot\n"},
		{"status --output ", "text\njson\nyaml\ntable\n"},
		{"network create x --encapsulation ", "vxlan\nipsec\nnone\n"},
		{"plan --metadata testdata/three.json --host ", "h1\t192.0.2.1\nh2\t192.0.2.2\nh3\t198.51.100.3\n"},
		{"doctor mt", "mtu\n"},
	} {
		out, _, status := lariat(t, append([]string{"__complete"}, strings.Split(tc.args, " ")...)...)
		if status != 0 || !strings.HasPrefix(out, tc.want+":") {
			t.Errorf("%s: %q", tc.args, out)
		}
	}
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if out := must(t, "completion", shell); len(out) < 1000 {
			t.Errorf("%s: %s", shell, out)
		}
	}
}

// every calls fn with each command of ours.
func every(c *cobra.Command, fn func(*cobra.Command)) {
	for _, sub := range c.Commands() {
		if name := sub.Name(); name == "help" || name == "completion" {
			continue
		}
		fn(sub)
		every(sub, fn)
	}
}

// Each command's --help has examples, and each example that needs no service works.
func TestExamplesOfHelp(t *testing.T) {
	dir := t.TempDir()
	if err := os.CopyFS(filepath.Join(dir, "testdata"), os.DirFS("testdata")); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	ran := 0
	every((&app{}).root(), func(c *cobra.Command) {
		if c.Example == "" {
			t.Errorf("%s has no example", c.CommandPath())
		}
		for line := range strings.Lines(c.Example) {
			args := strings.Fields(line)
			if len(args) > 0 && args[0] == "lariat" && (strings.Contains(line, "testdata/") || args[1] == "certs" &&
				c.Name() == "certs") {
				if i := slices.Index(args, ">"); i > 0 {
					args = args[:i]
				}
				must(t, args[1:]...)
				ran++
			}
		}
	})
	if ran < 6 {
		t.Errorf("only %d examples ran", ran)
	}
}

func TestManual(t *testing.T) {
	b, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	manual := string(b)
	at := -1
	for _, section := range []string{"Name", "Synopsis", "Description", "Configuration", "Examples", "Verbs",
		"What it owns", "Errors", "Limits", "See also"} {
		i := strings.Index(manual, "\n## "+section+"\n")
		if i <= at {
			t.Errorf("section %s is missing or out of order", section)
		}
		at = i
	}
	every((&app{}).root(), func(c *cobra.Command) {
		if !c.HasSubCommands() && !strings.Contains(manual, "`"+c.Name()+"`") && !regexp.MustCompile("`[a-z]+ "+c.Name()+
			"`").MatchString(manual) {
			t.Errorf("the manual does not tell about %s", c.CommandPath())
		}
	})
	// Examples parse: every indented line that begins so is a command that exists with flags that exist.
	for line := range strings.Lines(manual) {
		args := strings.Fields(line)
		if !strings.HasPrefix(line, "    lariat ") || strings.Contains(line, "COMMAND") || args[1] == "completion" {
			continue
		}
		if i := slices.IndexFunc(args, func(s string) bool { return s == ">" || s == "|" }); i > 0 {
			args = args[:i]
		}
		c, rest, err := (&app{}).root().Find(args[1:])
		if err != nil || c.Name() == "lariat" {
			t.Errorf("%s: %v", line, err)
		} else if err := c.ParseFlags(rest); err != nil {
			t.Errorf("%s: %v", line, err)
		}
	}
}
