package store

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

func open(t testing.TB, dir string) *Etcd {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	s, err := Open(ctx, Embedded{Dir: dir, Prefix: "/lariat/v1/"})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// implementations are the stores that the same tests hold for.
var implementations = map[string]func(testing.TB) Store{
	"etcd":   func(t testing.TB) Store { return open(t, t.TempDir()) },
	"memory": func(testing.TB) Store { return NewMemory() },
}

// each runs a test for each implementation, within a time that only a hanging one needs.
func each(t *testing.T, test func(*testing.T, context.Context, Store)) {
	for name, make := range implementations {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			s := make(t)
			defer s.Close()
			test(t, ctx, s)
		})
	}
}

// TestSocketIsPrivate: whatever the umask, only the owner opens the store's socket, or its directory.
func TestSocketIsPrivate(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0))
	root, err := os.MkdirTemp("", "st") // a socket's path may have 107 octets
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(root)
	for _, socket := range []string{"", filepath.Join(root, "other")} {
		c := Embedded{Dir: filepath.Join(root, "etcd"), Prefix: "/lariat/v1/"}
		want := filepath.Join(c.Dir, "client.sock")
		if socket != "" {
			c.ListenClient, want = "unix://"+socket, socket
		}
		s, err := Open(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		for path, mode := range map[string]os.FileMode{want: 0o600, c.Dir: 0o700} {
			if st, err := os.Stat(path); err != nil || st.Mode().Perm() != mode {
				t.Errorf("%s: %v %v, want %v", path, st.Mode(), err, mode)
			}
		}
		s.Close()
	}
}

func TestConditionalWrites(t *testing.T) { each(t, conditionalWrites) }

func conditionalWrites(t *testing.T, ctx context.Context, s Store) {
	r1, err := One(ctx, s, Change{Key: "a", Value: []byte("1")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := One(ctx, s, Change{Key: "a", Value: []byte("2")}); !errors.Is(err, ErrConflict) {
		t.Fatalf("created twice: %v", err)
	}
	res := s.Write(ctx, Change{Key: "a", Value: []byte("2"), Revision: r1 + 100}, Change{Key: "b", Value: []byte("1")})
	if !errors.Is(res[0].Err, ErrConflict) || res[1].Err != nil {
		t.Fatalf("one failed condition must stop only its own change: %+v", res)
	}
	e, err := s.Get(ctx, "a")
	if err != nil || string(e.Value) != "1" || e.Revision != r1 {
		t.Fatalf("%+v %v", e, err)
	}
	if r := s.Write(ctx, Change{Key: "nothing", Revision: Any}); r[0].Err != nil || r[0].Revision > e.Revision+1 {
		t.Fatalf("a deletion of what is not there: %+v", r)
	}
	if _, err := s.Get(ctx, "nothing"); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	r2, err := One(ctx, s, Change{Key: "a", Value: []byte("2"), Revision: r1})
	if e, gerr := s.Get(ctx, "a"); err != nil || gerr != nil || e.Created != r1 || e.Revision != r2 || r2 <= r1 {
		t.Fatalf("%+v %v %v", e, err, gerr)
	}
	start := time.Now()
	for i := range 200 {
		One(ctx, s, Change{Key: fmt.Sprint("k", i), Value: make([]byte, 4000)})
	}
	t.Logf("%v per write", time.Since(start)/200)
	list, rev, err := List(ctx, s, "k", 0)
	if err != nil || len(list) != 200 || rev == 0 {
		t.Fatal(len(list), rev, err)
	}
}

func TestWatchGivesWholeRevisionsAndTellsOfCompaction(t *testing.T) { each(t, watchAndCompaction) }

func watchAndCompaction(t *testing.T, ctx context.Context, s Store) {
	first, err := One(ctx, s, Change{Key: "w/a", Value: []byte("1")})
	if err != nil {
		t.Fatal(err)
	}
	s.Write(ctx, Change{Key: "w/b", Value: []byte("1")}, Change{Key: "w/c", Value: []byte("1")},
		Change{Key: "x", Value: []byte("1")})
	if _, err := One(ctx, s, Change{Key: "w/b", Revision: Any}); err != nil {
		t.Fatal(err)
	}
	var got []string
	stop := errors.New("enough")
	err = s.Watch(ctx, "w/", first, func(u Update) error {
		line := ""
		for _, e := range u.Entries {
			line += fmt.Sprintf("%s=%s,%t ", e.Key, e.Value, e.Deleted)
		}
		if got = append(got, line); len(got) == 2 {
			return stop
		}
		return nil
	})
	if !errors.Is(err, stop) || got[0] != "w/b=1,false w/c=1,false " || got[1] != "w/b=,true " {
		t.Errorf("%q %v", got, err)
	}
	now, _ := One(ctx, s, Change{Key: "w/a", Value: []byte("2"), Revision: Any})
	switch s := s.(type) {
	case *Memory:
		s.Compact(now)
	case *Etcd:
		if err := s.compact(now); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Watch(ctx, "w/", first, func(Update) error { return nil }); !errors.Is(err, ErrCompacted) {
		t.Errorf("%v", err)
	}
}

func TestLeaseTakesItsKeysAlong(t *testing.T) { each(t, leaseTakesItsKeysAlong) }

func leaseTakesItsKeysAlong(t *testing.T, ctx context.Context, s Store) {
	l, err := s.Hold(ctx, 30*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	r, err := One(ctx, s, Change{Key: "live", Value: []byte("1"), Lease: l})
	if err != nil {
		t.Fatal(err)
	}
	if e, err := s.Get(ctx, "live"); err != nil || !e.Held {
		t.Errorf("%+v %v", e, err)
	}
	if _, ttl, err := s.Idle(ctx, "live"); err != nil || ttl != 30*time.Second {
		t.Errorf("the lease lasts %s: %v", ttl, err)
	}
	l.Close()
	stop := errors.New("gone")
	if err := s.Watch(ctx, "live", r, func(u Update) error {
		if len(u.Entries) == 1 && u.Entries[0].Deleted {
			return stop
		}
		return nil
	}); !errors.Is(err, stop) {
		t.Error(err)
	}
	if _, _, err := s.Idle(ctx, "live"); !errors.Is(err, ErrNotFound) {
		t.Errorf("the lease of what is gone: %v", err)
	}
	select {
	case <-l.Lost():
	case <-ctx.Done():
		t.Error("the lease does not end")
	}
}

func TestManyChangesInOneCall(t *testing.T) { each(t, manyChangesInOneCall) }

func manyChangesInOneCall(t *testing.T, ctx context.Context, s Store) {
	var changes []Change
	for i := range 1000 { // more than one transaction of etcd takes, in number and in size
		changes = append(changes, Change{Key: fmt.Sprintf("k%03d", i), Value: make([]byte, 9000)})
	}
	for i, r := range s.Write(ctx, changes...) {
		if r.Err != nil {
			t.Fatal(i, r.Err)
		}
	}
	if list, _, err := List(ctx, s, "k", 0); err != nil || len(list) != 1000 || list[999].Key != "k999" {
		t.Error(len(list), err)
	}
}

func TestQuotaUsedUpMakesRoomByItself(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	dir := t.TempDir()
	s, err := Open(ctx, Embedded{Dir: dir, Prefix: "/lariat/v1/", Quota: 16 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	// Old versions of one object fill the quota several times over: history goes, the object stays.
	revision := int64(0)
	for i := range 80 {
		value := make([]byte, 1<<20)
		copy(value, fmt.Sprint(i))
		if revision, err = One(ctx, s, Change{Key: "big", Value: value, Revision: revision}); err != nil {
			t.Fatal(i, err)
		}
	}
	if e, err := s.Get(ctx, "big"); err != nil || string(e.Value[:2]) != "79" {
		t.Error(err)
	}
	// Data that is in use fills it: a clear refusal.
	for i := range 40 {
		if _, err = One(ctx, s, Change{Key: fmt.Sprint("keep", i), Value: make([]byte, 1<<20)}); err != nil {
			break
		}
	}
	if !errors.Is(err, ErrNoSpace) {
		t.Fatal(err)
	}
	st, _ := s.Status(ctx)
	if st.Problem == "" {
		t.Error("the status does not say so")
	}
	// Room is made by deleting; then it goes on.
	for i := range 40 {
		if _, err = One(ctx, s, Change{Key: fmt.Sprint("keep", i), Revision: Any}); err != nil {
			t.Fatal(i, err)
		}
	}
	if _, err = One(ctx, s, Change{Key: "after", Value: []byte("1")}); err != nil {
		t.Error(err)
	}
}

func TestSecondProcessOnTheFolderIsRefused(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if other, err := Open(ctx, Embedded{Dir: dir, Prefix: "/", NoListen: true}); err == nil {
		other.Close()
		t.Error("two members on one folder")
	} else if !strings.Contains(err.Error(), dir) {
		t.Error(err)
	}
	s.Close()
}

// TestCloseWaitsForNoWatch: another host's watch does not hold up a stop. etcd itself waits 7 s for it.
func TestCloseWaitsForNoWatch(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	url := "http://" + l.Addr().String()
	l.Close()
	dir := t.TempDir()
	s, err := Open(t.Context(), Embedded{Dir: dir, Prefix: "/lariat/v1/", ListenClient: url})
	if err != nil {
		t.Fatal(err)
	}
	other, err := Dial(t.Context(), External{Endpoints: []string{url}, Prefix: "/lariat/v1/"})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	watch := other.client.Watch(t.Context(), "/lariat/v1/", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	if _, open := <-watch; !open {
		t.Fatal("no watch")
	}
	start := time.Now()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("Close took %s", took)
	}
	again, err := Open(t.Context(), Embedded{Dir: dir, Prefix: "/lariat/v1/", NoListen: true})
	if err != nil {
		t.Fatalf("open again: %v", err)
	}
	if err := again.Close(); err != nil {
		t.Error(err)
	}
}
