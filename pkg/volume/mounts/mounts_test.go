package mounts

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/volume"
)

var (
	echo  = Task("test-echo", func(s string) (string, error) { return s, nil })
	wrong = Task("test-wrong", func(int) (int, error) {
		return 0, volume.Errorf(volume.ErrConflict, "it is taken: %w", unix.EBUSY)
	})
	hang = Task("test-hang", func(string) (int, error) {
		fmt.Println("waiting for the server")
		return 0, unix.Pause() // where Go sees no deadlock
	})
	become = Task("test-become", func(path string) (int, error) {
		return 0, syscall.Exec(path, []string{"sh", "-c", "echo mount.toy: access denied >&2; exit 32"}, nil)
	})
	private = PrivateTask("test-private", func(dir string) (bool, error) {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			return false, err
		}
		t, err := Read()
		return len(t.At(dir)) == 1, err
	})
)

func TestMain(m *testing.M) {
	RunChild()
	os.Exit(m.Run())
}

func TestChildren(t *testing.T) {
	text := strings.Repeat("a \"long\" text\n", 5000)
	if got, err := echo(t.Context(), text); err != nil || got != text {
		t.Errorf("echo: %d octets, %v", len(got), err)
	}
	_, err := wrong(t.Context(), 1)
	if !errors.Is(err, volume.ErrConflict) || !errors.Is(err, unix.EBUSY) ||
		err.Error() != "it is taken: device or resource busy" {
		t.Errorf("an error: %v", err)
	}
	if _, err := become(t.Context(), "/bin/sh"); err == nil || err.Error() != "mount.toy: access denied" {
		t.Errorf("another program's words: %v", err)
	}
}

// F159: a hanging child is killed, and the error names the cause of the wait.
func TestF159ChildThatHangs(t *testing.T) {
	d := 500 * time.Millisecond
	ctx, cancel := context.WithTimeoutCause(t.Context(), d, volume.Timeout(d))
	defer cancel()
	start := time.Now()
	_, err := hang(ctx, "")
	if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 10*time.Second ||
		!strings.HasPrefix(err.Error(), "no end after 500ms") {
		t.Errorf("after %s: %v", time.Since(start), err)
	}
	if _, err := echo(ctx, "too late"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a child of a context that is over: %v", err)
	}
}

func TestPrivateMountsShowNowhereElse(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("not root")
	}
	dir := t.TempDir()
	seen, err := private(t.Context(), dir)
	if errors.Is(err, unix.EPERM) {
		t.Skip(err)
	}
	if err != nil || !seen {
		t.Errorf("in the child: %v %v", seen, err)
	}
	if table, err := Read(); err != nil || len(table.At(dir)) > 0 {
		t.Errorf("outside: %+v %v", table.At(dir), err)
	}
}

const sample = `22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
40 22 0:34 / /mnt/a rw,nosuid,nodev,relatime shared:16 - nfs4 10.0.0.1:/srv/a rw,vers=4.2,addr=10.0.0.1
41 22 0:34 / /mnt/ab ro,relatime - nfs4 10.0.0.1:/srv/ab rw,vers=4.2
42 22 0:35 / /mnt/with\040blank rw - nfs [fd00::1]:/srv/with\040blank ro,vers=3
43 40 0:36 / /mnt/a rw - tmpfs tmpfs rw
`

func TestTable(t *testing.T) {
	table, err := Parse([]byte(sample))
	if err != nil {
		t.Fatal(err)
	}
	// Exactly the folder: neither one that begins like it nor one that is spelled otherwise.
	if m := table.At("/mnt/a"); len(m) != 2 || m[0].Source != "10.0.0.1:/srv/a" || m[1].FSType != "tmpfs" ||
		!m[0].Shared || m[1].Shared || m[0].ReadOnly() {
		t.Errorf("%+v", m)
	}
	if m := table.At("/mnt/with blank"); len(m) != 1 || m[0].Source != "[fd00::1]:/srv/with blank" || !m[0].ReadOnly() {
		t.Errorf("%+v", m)
	}
	if m := table.Of("10.0.0.1:/srv/ab"); len(m) != 1 || !m[0].ReadOnly() || m[0].Device != "0:34" {
		t.Errorf("%+v", m)
	}
	if m := table.At("/mnt"); m != nil {
		t.Errorf("%+v", m)
	}
}

func TestResolve(t *testing.T) {
	dir := t.TempDir()
	real := filepath.Join(dir, "real")
	link := filepath.Join(dir, "link")
	if err := errors.Join(os.Mkdir(real, 0o700), os.Symlink("real", link)); err != nil {
		t.Fatal(err)
	}
	for in, want := range map[string]string{link + "/data": real + "/data", real + "/data": real + "/data", link +
		"/": link, link + "/none/yet/data": real + "/none/yet/data"} {
		if got, err := Resolve(in); err != nil || got != want {
			t.Errorf("%s: %s %v, want %s", in, got, err, want)
		}
	}
	if _, err := Resolve("/a/../b"); !errors.Is(err, volume.ErrInvalid) {
		t.Error(err)
	}
}

func TestUsers(t *testing.T) {
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	me := fmt.Sprintf("(%d)", os.Getpid())
	if who := Users(dir); !slices.ContainsFunc(who, func(w string) bool { return strings.HasSuffix(w, me) }) {
		t.Errorf("%v", who)
	}
	if who := Users(dir + "x"); len(who) > 0 {
		t.Errorf("%v", who)
	}
}

// TestF159WhoAnswered: an error that the server sent is a sign of life, what the kernel says in its place is none.
func TestF159WhoAnswered(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want bool
	}{
		{nil, false},
		{unix.ESTALE, false},
		{unix.EACCES, false},
		{unix.EIO, true},
		{unix.EHOSTUNREACH, true},
		{unix.Errno(512), true},
		{fmt.Errorf("probe: %w", context.DeadlineExceeded), true},
		{&answer{Text: "probe: errno 512", Errno: 512}, true},
		{&answer{Text: "probe: stale file handle", Errno: unix.ESTALE}, false},
	} {
		if got := unanswered(tc.err); got != tc.want {
			t.Errorf("%v: %v", tc.err, got)
		}
	}
}

func TestUnmountOfNothing(t *testing.T) {
	if how, err := Unmount(t.Context(), t.TempDir(), Policy{}); how != "" || err != nil {
		t.Errorf("%q %v", how, err)
	}
}

func FuzzTable(f *testing.F) {
	f.Add([]byte(sample))
	f.Fuzz(func(t *testing.T, data []byte) {
		table, err := Parse(data)
		if err != nil {
			return
		}
		for _, m := range table {
			if len(table.At(m.Point)) == 0 {
				t.Errorf("lost %+v", m)
			}
		}
	})
}

// FuzzAnswer: what a child may say when it is killed within its answer.
func FuzzAnswer(f *testing.F) {
	f.Add([]byte(`{"error":"x","kind":3,"errno":16}`))
	f.Add([]byte(`{"error":"x","kind":-3}`))
	f.Fuzz(func(_ *testing.T, data []byte) {
		var a answer
		if json.Unmarshal(data, &a) == nil {
			_ = errors.Is(&a, volume.ErrConflict)
		}
	})
}
