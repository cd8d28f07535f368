package volume

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

type toy struct{ Text string }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestJournal(t *testing.T) {
	j := Journal[toy]{Dir: filepath.Join(t.TempDir(), "deep", "journal")}
	if all, err := j.List(); err != nil || len(all) != 0 {
		t.Errorf("an empty one: %v %v", all, err)
	}
	keys := []string{"v", strings.Repeat("n", MaxName), "/var/lib/kubelet/pods/x", "/" + strings.Repeat("long/", 500)}
	for _, k := range keys {
		must(t, j.Put(k, toy{"first"}))
		must(t, j.Put(k, toy{k}))
	}
	for _, k := range keys {
		if v, found, err := j.Get(k); err != nil || !found || v.Text != k {
			t.Errorf("%.20s: %v %v %v", k, v, found, err)
		}
	}
	if all, err := j.List(); err != nil || len(all) != len(keys) || all[keys[2]].Text != keys[2] {
		t.Errorf("list: %v %v", all, err)
	}
	must(t, j.Prune(func(v toy) bool { return v.Text == "v" }))
	if all, err := j.List(); err != nil || len(all) != len(keys)-1 || all["v"].Text != "" {
		t.Errorf("pruned: %v %v", all, err)
	}
	for _, k := range keys {
		must(t, j.Remove(k))
		must(t, j.Remove(k))
	}
	if _, found, err := j.Get("v"); found || err != nil {
		t.Errorf("removed: %v %v", found, err)
	}
}

// F158: a torn record, or a record under another key's name, is set aside and blocks no caller.
func TestF158DamagedRecord(t *testing.T) {
	j := Journal[toy]{Dir: t.TempDir()}
	for name, text := range map[string]string{"empty": "", "torn": `{"key":"torn","val`,
		"stranger": `{"key":"other","value":{"Text":"x"}}`, "type": `{"key":"type","value":[]}`} {
		must(t, os.WriteFile(filepath.Join(j.Dir, name+".json"), []byte(text), 0o600))
		if _, found, err := j.Get(name); found || err != nil {
			t.Errorf("%s: %v %v", name, found, err)
		}
		if data, err := os.ReadFile(filepath.Join(j.Dir, ".damaged-"+name+".json")); err != nil || string(data) != text {
			t.Errorf("%s is not kept: %q %v", name, data, err)
		}
		must(t, j.Put(name, toy{"new"}))
	}
	if all, err := j.List(); err != nil || len(all) != 4 {
		t.Errorf("%v %v", all, err)
	}
}

func TestJournalOnAFullDisk(t *testing.T) {
	j := Journal[toy]{Dir: t.TempDir()}
	must(t, j.Put("v", toy{"old"}))
	must(t, os.Mkdir(filepath.Join(j.Dir, ".new-v.json"), 0o700)) // nothing can be written there
	if err := j.Put("v", toy{"new"}); err == nil {
		t.Error("no error")
	}
	if v, found, err := j.Get("v"); err != nil || !found || v.Text != "old" {
		t.Errorf("the old record: %v %v %v", v, found, err)
	}
}

func TestLocks(t *testing.T) {
	l := Locks{Dir: filepath.Join(t.TempDir(), "locks")}
	var inside, most atomic.Int32
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			for range 20 {
				unlock, err := l.Lock(t.Context(), "v", "test")
				if err != nil {
					t.Error(err)
					return
				}
				if n := inside.Add(1); n > 1 {
					most.Store(n)
				}
				inside.Add(-1)
				unlock()
			}
		})
	}
	wg.Wait()
	if most.Load() > 1 {
		t.Errorf("%d had the lock at once", most.Load())
	}
	if left, _ := filepath.Glob(l.Dir + "/*"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}

	unlock, err := l.Lock(t.Context(), "v", "mount")
	must(t, err)
	ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, Timeout(50*time.Millisecond))
	defer cancel()
	_, err = l.Lock(ctx, "v", "unmount")
	if !errors.Is(err, ErrInUse) || !errors.Is(err, context.DeadlineExceeded) ||
		!strings.Contains(err.Error(), "unmount of v waited for process") || !strings.Contains(err.Error(), "(mount)") {
		t.Errorf("%v", err)
	}
	other, err := l.Lock(t.Context(), "w", "mount") // no caller waits for another volume
	must(t, err)
	other()
	// LockAll releases its locks when it cannot take one of them.
	if _, err := l.LockAll(ctx, "mount", "w", "v"); !errors.Is(err, ErrInUse) {
		t.Errorf("%v", err)
	}
	unlock()
	all, err := l.LockAll(t.Context(), "mount", "w", "v")
	must(t, err)
	all()
	again, err := l.Lock(t.Context(), "v", "unmount")
	must(t, err)
	again()
	// A cancelled waiter leaves no file when it gets the lock.
	if left, _ := filepath.Glob(l.Dir + "/*"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestErrors(t *testing.T) {
	for _, e := range []error{ErrNotSupported, ErrInvalid, ErrConflict, ErrNotFound} {
		if wrapped := Errorf(e, "what: %w", os.ErrNotExist); !IsFinal(wrapped) || !errors.Is(wrapped, e) ||
			!errors.Is(wrapped, os.ErrNotExist) || wrapped.Error() != "what: file does not exist" {
			t.Errorf("%v: %v", e, wrapped)
		}
	}
	if IsFinal(Errorf(ErrInUse, "x")) || IsFinal(Timeout(time.Second)) || IsFinal(nil) {
		t.Error("what passes by itself is final")
	}
}

// FuzzJournal tests that every file of the journal is a record of its key or no record.
func FuzzJournal(f *testing.F) {
	f.Add("data", []byte(`{"key":"data","value":{"id":"vol-1","count":3}}`))
	f.Add("@0123456789abcdef0123456789abcdef", []byte(`{"key":"a/b","value":{}}`))
	f.Add("data", []byte(`{"key":"other","value":null}`))
	f.Add("data", []byte("\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, name string, data []byte) {
		if name == "" || len(name) > 100 || strings.ContainsAny(name, "/\x00") || strings.HasPrefix(name, ".") {
			return
		}
		type value struct {
			ID    string
			Count int
		}
		j := Journal[value]{Dir: t.TempDir()}
		if err := os.WriteFile(filepath.Join(j.Dir, name+".json"), data, 0o600); err != nil {
			t.Skip(err) // a name that the file system does not take
		}
		all, err := j.List()
		if err != nil || len(all) > 1 {
			t.Fatalf("%v %v", all, err)
		}
		for key, v := range all {
			if got, found, err := j.Get(key); err != nil || !found || got != v || fileName(key) != name {
				t.Errorf("%q under %q: %+v %t %v", key, name, got, found, err)
			}
		}
		if err := j.Put("data", value{ID: "x"}); err != nil {
			t.Error(err)
		}
		if got, found, err := j.Get("data"); err != nil || !found || got.ID != "x" {
			t.Errorf("%+v %t %v", got, found, err)
		}
	})
}
