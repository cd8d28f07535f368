package private_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/lariat-net/lariat/pkg/private"
)

// umask sets the process's umask for the rest of a test.
func umask(t *testing.T, mask int) {
	t.Helper()
	old := syscall.Umask(mask)
	t.Cleanup(func() { syscall.Umask(old) })
}

func TestFilesAreTheirOwnersAloneUnderEveryUmask(t *testing.T) {
	for _, mask := range []int{0, 0o022, 0o077, 0o777} {
		dir := t.TempDir()
		umask(t, mask)
		path := filepath.Join(dir, "key")
		for _, write := range []func(string, []byte) error{private.Write, private.Rewrite} {
			if err := write(path, []byte("content")); err != nil {
				t.Fatalf("umask %03o: %v", mask, err)
			}
			info, err := os.Stat(path)
			if err != nil || info.Mode() != 0o600 {
				t.Errorf("umask %03o: %v: mode %v", mask, err, info.Mode())
			}
			if got, err := private.Read(path); err != nil || string(got) != "content" {
				t.Errorf("umask %03o: %v", mask, err)
			}
		}
		if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) > 0 {
			t.Errorf("umask %03o: left over: %v", mask, left)
		}
	}
}

// What has the name already stays, and nothing is written through a link.
func TestWriteNeitherReplacesNorFollows(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	for _, err := range []error{os.WriteFile(path("file"), []byte("old"), 0o644), os.Symlink("file", path("link")),
		os.Symlink("none", path("dangling")), os.Mkdir(path("dir"), 0o700)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"file", "link", "dangling", "dir"} {
		if err := private.Write(path(name), []byte("new")); !errors.Is(err, fs.ErrExist) ||
			!strings.Contains(err.Error(), path(name)) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if got, err := os.ReadFile(path("file")); err != nil || string(got) != "old" {
		t.Errorf("%v: the file is %q", err, got)
	}
	if _, err := os.Lstat(path("none")); err == nil {
		t.Error("the target of a link was made")
	}
	if err := private.Rewrite(path("link"), []byte("new")); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Lstat(path("link")); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v: Rewrite left %v", err, info.Mode())
	}
	if got, err := os.ReadFile(path("file")); err != nil || string(got) != "old" {
		t.Errorf("%v: the link's target is %q", err, got)
	}
	if left, _ := filepath.Glob(path(".*")); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}

// A file has its name when it is whole, or never.
func TestNothingAppearsBeforeItIsWhole(t *testing.T) {
	path := filepath.Join(t.TempDir(), "backup")
	f, err := private.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("half"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); err == nil {
		t.Error("half a file has the name")
	}
	f.Discard()
	if left, _ := os.ReadDir(filepath.Dir(path)); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}

func TestReadRefuses(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "secret")
	for _, mode := range []fs.FileMode{0o604, 0o640, 0o620, 0o602, 0o644, 0o601} {
		os.Remove(path)
		if err := os.WriteFile(path, []byte("hunter2"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := private.Read(path); err == nil || !strings.Contains(err.Error(), "chmod 600 "+path) ||
			strings.Contains(err.Error(), "hunter2") {
			t.Errorf("mode %04o: %v", mode, err)
		}
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := private.Read(path); err != nil || string(got) != "hunter2" {
		t.Errorf("%v", err)
	}
	if err := os.Truncate(path, private.MaxRead+1); err != nil {
		t.Fatal(err)
	}
	if _, err := private.Read(path); err == nil || !strings.Contains(err.Error(), "longer than") {
		t.Errorf("too long: %v", err)
	}
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{pipe, dir} {
		if _, err := private.Read(path); err == nil || !strings.Contains(err.Error(), "not a regular file") {
			t.Errorf("%s: %v", path, err)
		}
	}
	if _, err := private.Read(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}
