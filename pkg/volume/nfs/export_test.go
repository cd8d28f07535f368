package nfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lariat-net/lariat/pkg/volume"
)

// base is a folder that plays an export.
func base(t *testing.T) (*os.Root, string) {
	t.Helper()
	dir := t.TempDir()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	return root, dir
}

// F158: two hosts that create one volume at the same time, interleaved at each step, both find that it is
// Lariat's, and there is one folder.
func TestF158TwoHostsCreate(t *testing.T) {
	defer func() { volume.OnFailpoint = nil }()
	for _, step := range []string{"hidden-made", "folder-made-aside", "mark-written", "folder-marked", "folder-named"} {
		root, dir := base(t)
		busy := false
		volume.OnFailpoint = func(name string) {
			if name == step && !busy {
				busy = true // the other host is faster, all of a sudden
				if c, err := create(root, exportArgs{Name: "v"}); err != nil || !c.Ours {
					t.Errorf("%s: the other host: %+v %v", step, c, err)
				}
				if err := os.WriteFile(filepath.Join(dir, "v", "data"), nil, 0o600); err != nil {
					t.Errorf("%s: %v", step, err)
				}
			}
		}
		c, err := create(root, exportArgs{Name: "v"})
		volume.OnFailpoint = nil
		// On one host a lock excludes this, and each host writes a draft of its own; here both are the same host.
		if step == "mark-written" && err != nil {
			continue
		}
		if err != nil {
			t.Errorf("%s: %+v %v", step, c, err)
		}
		if _, err := os.Stat(filepath.Join(dir, "v", "data")); err != nil {
			t.Errorf("%s: the other host's data: %v", step, err)
		}
		if left, _ := filepath.Glob(filepath.Join(dir, hidden, "new-*")); len(left) > 0 {
			t.Errorf("%s: left %v", step, left)
		}
		if c, err := create(root, exportArgs{Name: "v"}); err != nil || c.New {
			t.Errorf("%s: again: %+v %v", step, c, err)
		}
	}
}

// F105: somebody else makes the folder just before it gets its name: it is theirs.
func TestF105SomebodyElseIsFaster(t *testing.T) {
	defer func() { volume.OnFailpoint = nil }()
	root, dir := base(t)
	volume.OnFailpoint = func(name string) {
		if name == "folder-marked" {
			if err := os.MkdirAll(filepath.Join(dir, "v", "theirs"), 0o700); err != nil {
				t.Error(err)
			}
		}
	}
	if c, err := create(root, exportArgs{Name: "v"}); err != nil || c.Ours {
		t.Errorf("%+v %v", c, err)
	}
	volume.OnFailpoint = nil
	if r, err := remove(root, exportArgs{Name: "v", OnRemove: Purge}); err != nil ||
		!strings.Contains(r.Message, "is kept") {
		t.Errorf("%+v %v", r, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "v", "theirs")); err != nil {
		t.Error(err)
	}
}

// F105: the mark is gone, torn, or of another folder: nothing is purged.
func TestF105BrokenMarks(t *testing.T) {
	for _, text := range []string{"", "{", `{"name":"v"}`, `{"name":"v","inode":1}`, `{"name":"v","inode":"x"}`, "[]"} {
		root, dir := base(t)
		if _, err := create(root, exportArgs{Name: "v"}); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, markFile("v")), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if r, err := remove(root, exportArgs{Name: "v", OnRemove: Purge}); err != nil ||
			!strings.Contains(r.Message, "is kept") {
			t.Errorf("%q: %+v %v", text, r, err)
		}
	}
}

func TestF105WhatIsNoFolder(t *testing.T) {
	root, dir := base(t)
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "file"), nil, 0o600),
		os.Symlink("/etc", filepath.Join(dir, "link"))); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"file", "link"} {
		if _, err := create(root, exportArgs{Name: name}); !errors.Is(err, volume.ErrConflict) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A link in place of our own folder leads nowhere.
	outside := t.TempDir()
	if err := os.Symlink(outside, filepath.Join(dir, hidden)); err != nil {
		t.Fatal(err)
	}
	if _, err := create(root, exportArgs{Name: "v"}); err == nil {
		t.Error("no error")
	}
	if left, _ := os.ReadDir(outside); len(left) > 0 {
		t.Errorf("written outside: %v", left)
	}
}

func TestPurgeCounts(t *testing.T) {
	root, dir := base(t)
	if _, err := create(root, exportArgs{Name: "v"}); err != nil {
		t.Fatal(err)
	}
	deep := filepath.Join(dir, "v", strings.Repeat("d/", 100))
	if err := os.MkdirAll(deep, 0o700); err != nil {
		t.Fatal(err)
	}
	for i := range 2500 {
		if err := os.WriteFile(filepath.Join(deep, fmt.Sprint(i)), []byte("four"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if r, err := remove(root, exportArgs{Name: "v", OnRemove: Purge}); err != nil ||
		r.Message != "purged 2500 files, 10000 octets" {
		t.Errorf("%+v %v", r, err)
	}
	left, _ := filepath.Glob(dir + "/*")
	if marks, _ := filepath.Glob(filepath.Join(dir, hidden, "*")); len(left) != 1 || len(marks) > 0 {
		t.Errorf("left: %v %v", left, marks)
	}
}
