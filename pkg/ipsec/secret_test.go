package ipsec_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/lariat-net/lariat/pkg/ipsec"
)

const (
	first  = "bm90IGEgcmVhbCBzZWNyZXQsIGJ1dCBsb25nIGVub3VnaA=="
	second = "YW5vdGhlciBvbmUgdGhhdCBpcyBub3QgcmVhbCBlaXRoZXI="
)

// TestF143_KeysOfPairs checks that both ends of a pair derive the same key.
// Any other pair or secret has another key.
func TestF143_KeysOfPairs(t *testing.T) {
	s, err := ipsec.ParseSecrets([]byte("# in use\n" + first + "\n\n" + second + "\n"))
	if err != nil {
		t.Fatal(err)
	}
	ids := s.IDs()
	if len(ids) != 2 || ids[0] == ids[1] {
		t.Fatalf("ids %v", ids)
	}
	seen := map[string]string{}
	for _, id := range ids {
		for _, pair := range [][2]string{{"a", "b"}, {"a", "c"}, {"ab", "c"}, {"a", "bc"}, {"a", "b c"}, {"a b", "c"}} {
			key := s.Pair(id, pair[0], pair[1])
			if len(key) != 32 || !bytes.Equal(key, s.Pair(id, pair[1], pair[0])) {
				t.Errorf("%s %v: %x", id, pair, key)
			}
			name := fmt.Sprint(id, pair)
			if other, twice := seen[string(key)]; twice {
				t.Errorf("%s and %s have the same key", name, other)
			}
			seen[string(key)] = name
		}
	}
	if s.Pair("00000000", "a", "b") != nil {
		t.Error("a key of an unknown secret")
	}
	again, _ := ipsec.ParseSecrets([]byte(second + "\n" + first))
	if !bytes.Equal(again.Pair(ids[0], "a", "b"), s.Pair(ids[0], "a", "b")) {
		t.Error("the order in the file changes a key")
	}
}

// TestSecretsNeverPrint checks that no way of logging prints a secret.
func TestSecretsNeverPrint(t *testing.T) {
	s, err := ipsec.ParseSecrets([]byte(first))
	if err != nil {
		t.Fatal(err)
	}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x"} {
		if out := fmt.Sprintf(verb, s); strings.Contains(out, first[:12]) ||
			strings.Contains(out, fmt.Sprintf("%x", first[:12])) {
			t.Errorf("%s prints %s", verb, out)
		}
		if out := fmt.Sprintf(verb, struct{ S ipsec.Secrets }{s}); strings.Contains(out, first[:12]) ||
			strings.Contains(out, fmt.Sprintf("%x", first[:12])) {
			t.Errorf("%s inside of another value prints %s", verb, out)
		}
	}
}

// TestReadSecrets checks that an error names the fault of a file, and never its content.
func TestReadSecrets(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "secret")
	for _, tc := range []struct {
		name, text string
		mode       os.FileMode
		want       string
	}{
		{"good", first + "\n", 0o600, ""},
		{"two", first + "\n" + second, 0o400, ""},
		{"readable by the group", first, 0o640, "chmod 600"},
		{"readable by all", first, 0o604, "chmod 600"},
		{"too short", "hunter2hunter2", 0o600, "line 1: a secret of 14 characters"},
		{"twice", first + "\n" + first, 0o600, "line 2: the same secret"},
		{"empty", "# nothing\n", 0o600, "no secret"},
	} {
		os.Remove(path)
		if err := os.WriteFile(path, []byte(tc.text), tc.mode); err != nil {
			t.Fatal(err)
		}
		_, err := ipsec.ReadSecrets(path)
		switch {
		case tc.want == "" && err != nil:
			t.Errorf("%s: %v", tc.name, err)
		case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), path)):
			t.Errorf("%s: %v, want %q and the path", tc.name, err, tc.want)
		case err != nil && (strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), first)):
			t.Errorf("%s: the error tells the secret: %v", tc.name, err)
		}
	}
	if _, err := ipsec.ReadSecrets(filepath.Join(dir, "none")); err == nil ||
		!strings.Contains(err.Error(), "lariat ipsec secret --out "+filepath.Join(dir, "none")) {
		t.Errorf("no file: %v", err)
	}
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ipsec.ReadSecrets(pipe); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("a pipe: %v", err)
	}
	if _, err := ipsec.ReadSecrets(dir); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("a folder: %v", err)
	}
}

// FuzzParseSecrets checks that no text causes a panic, and that no error repeats a line.
func FuzzParseSecrets(f *testing.F) {
	f.Add([]byte(first + "\n" + second))
	f.Add([]byte("# x\n\n \t\nshort"))
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := ipsec.ParseSecrets(text)
		if err == nil && len(s.IDs()) == 0 {
			t.Fatal("no error and no secret")
		}
		for _, id := range s.IDs() {
			if len(s.Pair(id, "a", "b")) != 32 {
				t.Fatal("a secret without keys")
			}
		}
	})
}
