package docs_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
)

// Redirections of a shell make files by its umask. The first is of our own command, the second of anything
// into a file of that kind.
var (
	secretRedirected = regexp.MustCompile(`lariat ipsec secret[^|]*>`)
	intoSecret       = regexp.MustCompile(`(^|\s)>\s*\S*(secret|\.key)\b`)
)

// tracked are the files of the repository that a person may copy commands from.
func tracked(t *testing.T, patterns ...string) []string {
	t.Helper()
	out, err := exec.Command("git",
		append([]string{"-C", root, "ls-files", "--cached", "--others", "--exclude-standard", "--"}, patterns...)...).Output()
	if err != nil {
		t.Skip("not a git checkout")
	}
	var files []string
	for _, f := range strings.Fields(string(out)) {
		if !strings.HasSuffix(f, "_test.go") && !strings.Contains(f, "/testdata/") {
			files = append(files, f)
		}
	}
	return files
}

// TestNoDocumentedCommandLeavesASecretReadable: --out writes secrets with mode 0600, and where there is a
// redirection it has an umask.
func TestNoDocumentedCommandLeavesASecretReadable(t *testing.T) {
	found := 0
	for _, f := range tracked(t, "*.md", "*.go", "examples", "hack") {
		for line := range strings.Lines(read(t, filepath.Join(root, f))) {
			found += strings.Count(line, "lariat ipsec secret --out ")
			if strings.Contains(line, "umask 077") {
				continue
			}
			if secretRedirected.MatchString(line) || !strings.HasSuffix(f, ".go") && intoSecret.MatchString(line) {
				t.Errorf("%s: the file gets the mode that the umask leaves: %s", f, strings.TrimSpace(line))
			}
		}
	}
	if found < 6 {
		t.Errorf("only %d commands make a secret", found)
	}
}

var certsCommand = regexp.MustCompile(`lariat certs (init|host|show) ([a-z/]\S*)`)

// copied are what a command copies to a host: the words between its name and the destination.
func copied(line string) []string {
	words := strings.Fields(line)
	if len(words) < 3 || words[0] != "scp" && words[0] != "rsync" && words[0] != "cp" {
		return nil
	}
	var out []string
	for _, w := range words[1 : len(words)-1] {
		if !strings.HasPrefix(w, "-") {
			out = append(out, w)
		}
	}
	return out
}

// TestAuthorityKeyStaysWithTheAdministrator: every document and help text makes certificates in a directory
// of the administrator and copies to hosts what is theirs, never ca.key. What they say works, and leaves
// every file its owner's alone.
func TestAuthorityKeyStaysWithTheAdministrator(t *testing.T) {
	lariat := bin(t, "lariat")
	texts := map[string]string{}
	for _, f := range tracked(t, "*.md") {
		texts[f] = read(t, filepath.Join(root, f))
	}
	for _, args := range [][]string{{"certs"}, {"certs", "init"}, {"certs", "host"}, {"certs", "show"}} {
		out, err := exec.Command(lariat, append(args, "--help")...).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
		texts["lariat "+strings.Join(args, " ")+" --help"] = string(out)
	}
	for name, text := range texts {
		for line := range strings.Lines(text) {
			for _, c := range certsCommand.FindAllStringSubmatch(line, -1) {
				if strings.HasPrefix(c[2], "/etc/") {
					t.Errorf("%s: the authority is on a host: %s", name, strings.TrimSpace(line))
				}
			}
			for _, f := range copied(line) {
				if base := filepath.Base(f); base == "ca.key" || base == "pki" || strings.Contains(base, "*") &&
					strings.Contains(f, "pki") {
					t.Errorf("%s: ca.key is copied to a host: %s", name, strings.TrimSpace(line))
				}
			}
		}
	}

	old := syscall.Umask(0)
	defer syscall.Umask(old)
	for _, name := range []string{"docs/three-hosts.md", "lariat certs --help"} {
		if !strings.Contains(texts[name], "ca.key") {
			t.Errorf("%s does not say where ca.key stays", name)
		}
		dir, made, sent := t.TempDir(), 0, 0
		for line := range strings.Lines(texts[name]) {
			if line = strings.TrimSpace(line); certsCommand.MatchString(line) && !strings.Contains(line, "`") {
				cmd := exec.Command(lariat, strings.Fields(line)[1:]...)
				cmd.Dir = dir
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Errorf("%s: %s: %v: %s", name, line, err, out)
				}
				made++
			}
			for _, f := range copied(line) {
				if info, err := os.Stat(filepath.Join(dir, f)); err != nil || info.Mode() != 0o600 {
					t.Errorf("%s: %s: %s: %v", name, line, f, err)
				}
				sent++
			}
		}
		if made < 3 || sent < 3 {
			t.Errorf("%s: %d commands make certificates, and %d files are copied", name, made, sent)
		}
		if info, err := os.Stat(filepath.Join(dir, "pki/ca.key")); err != nil || info.Mode() != 0o600 {
			t.Errorf("%s: ca.key: %v", name, err)
		}
	}
}
