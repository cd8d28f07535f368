// Package mixed_test is run by the tests of package guest: one test of it fails, in a guest.
package mixed_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/lariat-net/lariat/test/guest"
)

func TestMain(m *testing.M) { guest.Main(m, guest.Options{}) }

func TestPasses(t *testing.T) {
	if !guest.Inside() || os.Getpid() == 1 || os.Getenv("REQUIRE") != "all" {
		t.Fatal("not in a guest")
	}
	text, err := os.ReadFile("testdata/text")
	if err != nil || string(text) != "from the machine\n" {
		t.Errorf("read %q, %v", text, err)
	}
	if err := os.WriteFile(filepath.Join(guest.Out(), "evidence"), []byte("from the guest\n"), 0o644); err != nil {
		t.Error(err)
	}
}

func TestFails(t *testing.T) { t.Error("on purpose") }

func TestSkips(t *testing.T) { t.Skip("for a reason") }
