package journal_test

import (
	"bufio"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/hostid"
	"github.com/lariat-net/lariat/pkg/journal"
	"github.com/lariat-net/lariat/pkg/metadata"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("JOURNAL_TEST_HOLD"); dir != "" { // see TestF132_LockGoesWithItsProcess
		if _, err := (journal.Journal{Dir: dir}).Lock("overlay", id("c1")); err != nil {
			fmt.Println(err)
		}
		fmt.Println("held")
		io.Copy(io.Discard, os.Stdin) //nolint:errcheck // until killed
	}
	os.Exit(m.Run())
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func id(container string) metadata.AttachmentID {
	return metadata.AttachmentID{ContainerID: container, IfName: "eth0"}
}

func record(container, address string) journal.Record {
	return journal.Record{AttachmentID: id(container), State: journal.Held, Type: "lariat-vxlan", BootID: hostid.Boot(),
		Netns: "/run/netns/x", NetnsInode: 7,
		Attachment: metadata.Attachment{Network: "overlay",
			Addresses: []metadata.AttachmentAddress{{Address: netip.MustParseAddr(address), Sequence: 3}}}}
}

func files(t *testing.T, j journal.Journal) (out []string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(j.Dir, "overlay"))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".lock") {
			out = append(out, e.Name())
		}
	}
	return out
}

func TestJournalKeepsRecords(t *testing.T) {
	j := journal.New(t.TempDir())
	if _, ok, err := j.Get("overlay", id("c1")); ok || err != nil {
		t.Fatalf("an empty journal has a record: %v", err)
	}
	if list, err := j.List("overlay"); len(list) > 0 || err != nil {
		t.Fatalf("an empty journal lists %v %v", list, err)
	}
	if n, err := j.Networks(); len(n) > 0 || err != nil {
		t.Fatalf("an empty journal has networks %v %v", n, err)
	}
	must(t, j.Remove("overlay", id("c1")))
	for _, c := range []string{"c1", "c2", "c1"} {
		must(t, j.Put(record(c, "10.42.0.9")))
	}
	r, ok, err := j.Get("overlay", id("c1"))
	if !ok || err != nil || r.Attachment.Addresses[0].Address.String() != "10.42.0.9" || r.Sequence() != 3 ||
		r.NetnsInode != 7 {
		t.Errorf("%+v %t %v", r, ok, err)
	}
	if list, err := j.List("overlay"); len(list) != 2 || err != nil {
		t.Errorf("%v %v", list, err)
	}
	if n, err := j.Networks(); !slices.Equal(n, []string{"overlay"}) || err != nil {
		t.Errorf("%v %v", n, err)
	}
	if got := files(t, j); !slices.Equal(got, []string{"c1:eth0", "c2:eth0"}) {
		t.Errorf("files %q", got)
	}
	info, err := os.Stat(filepath.Join(j.Dir, "overlay", "c1:eth0"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v %v", info.Mode(), err)
	}
	must(t, j.Remove("overlay", id("c1")))
	must(t, j.Remove("overlay", id("c1")))
	if _, ok, _ := j.Get("overlay", id("c1")); ok {
		t.Error("removed, and there")
	}
}

// TestF132_RecordsAreWholeOrNot: who reads while another writes sees the old record or the new one.
func TestF132_RecordsAreWholeOrNot(t *testing.T) {
	j := journal.New(t.TempDir())
	must(t, j.Put(record("c1", "10.42.0.9")))
	var stop atomic.Bool
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for !stop.Load() {
				if r, ok, err := j.Get("overlay", id("c1")); !ok || err != nil || len(r.Attachment.Addresses) != 1 {
					t.Errorf("read %+v %t %v", r, ok, err)
					return
				}
				if l, err := j.List("overlay"); len(l) != 1 || l[0].State != journal.Held || err != nil {
					t.Errorf("listed %+v %v", l, err)
					return
				}
			}
		})
	}
	for i := range 500 {
		unlock, err := j.Lock("overlay", id("c1"))
		must(t, err)
		r := record("c1", fmt.Sprintf("10.42.%d.9", i%200))
		r.Name = strings.Repeat("x", i*20)
		must(t, j.Put(r))
		unlock()
	}
	stop.Store(true)
	wg.Wait()
}

// TestTornRecord: of a power failure. It is of an earlier boot, so it counts for nothing but to be released.
func TestTornRecord(t *testing.T) {
	j := journal.New(t.TempDir())
	must(t, j.Put(record("c1", "10.42.0.9")))
	must(t, j.Put(record("c2", "10.42.0.8")))
	whole, err := os.ReadFile(filepath.Join(j.Dir, "overlay", "c1:eth0"))
	must(t, err)
	for _, torn := range [][]byte{nil, whole[:len(whole)/2], []byte("\x00\x00\x00"), []byte("{}"),
		[]byte(strings.Replace(string(whole), "c1", "c9", 1))} {
		must(t, os.WriteFile(filepath.Join(j.Dir, "overlay", "c1:eth0"), torn, 0o600))
		if _, ok, err := j.Get("overlay", id("c1")); ok || err != nil {
			t.Errorf("%q counts as a record: %v", torn, err)
		}
		list, err := j.List("overlay")
		if err != nil || len(list) != 2 || list[0].AttachmentID != id("c1") || list[0].State != journal.Released ||
			list[0].Attachment.Network != "overlay" || list[1].State != journal.Held {
			t.Errorf("%q is listed as %+v %v", torn, list, err)
		}
	}
}

// TestF132_TemporaryFilesOfTheDead go with the next List or Remove; that of a living writer stays.
func TestF132_TemporaryFilesOfTheDead(t *testing.T) {
	j := journal.New(t.TempDir())
	must(t, j.Put(record("c2", "10.42.0.8")))
	dir := filepath.Join(j.Dir, "overlay")
	leave := func() {
		must(t, os.WriteFile(filepath.Join(dir, ".tmp-c1:eth0"), []byte("{"), 0o600))
	}
	leave()
	unlock, err := j.Lock("overlay", id("c1"))
	must(t, err)
	if list, err := j.List("overlay"); len(list) != 1 || err != nil {
		t.Errorf("%+v %v", list, err)
	}
	if got := files(t, j); len(got) != 2 {
		t.Errorf("the file of who holds the lock is gone: %q", got)
	}
	unlock()
	if _, err := j.List("overlay"); err != nil || len(files(t, j)) != 1 {
		t.Errorf("it is still there: %q %v", files(t, j), err)
	}
	leave()
	must(t, j.Remove("overlay", id("c1")))
	if got := files(t, j); len(got) != 1 {
		t.Errorf("it is still there after Remove: %q", got)
	}
}

func TestLockExcludes(t *testing.T) {
	j := journal.New(t.TempDir())
	var inside, entries atomic.Int32
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 50 {
				unlock, err := j.Lock("overlay", id("c1"))
				if err != nil {
					t.Error(err)
					return
				}
				if inside.Add(1) != 1 {
					t.Error("two at once")
				}
				entries.Add(1)
				inside.Add(-1)
				unlock()
			}
		})
	}
	wg.Wait()
	if entries.Load() != 400 {
		t.Errorf("%d of 400 came in", entries.Load())
	}
}

// TestF132_LockGoesWithItsProcess: kill -9 of who holds it is enough.
func TestF132_LockGoesWithItsProcess(t *testing.T) {
	j := journal.New(t.TempDir())
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "JOURNAL_TEST_HOLD="+j.Dir)
	in, err := cmd.StdinPipe()
	must(t, err)
	defer in.Close()
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "held\n" {
		t.Fatalf("%q %v", line, err)
	}
	got := make(chan error, 1)
	go func() {
		_, err := j.Lock("overlay", id("c1"))
		got <- err
	}()
	select {
	case err := <-got:
		t.Fatalf("the lock of another process did not keep us out: %v", err)
	case <-time.After(50 * time.Millisecond): // that nothing happens takes time to see
	}
	must(t, cmd.Process.Kill())
	cmd.Wait() //nolint:errcheck // killed
	select {
	case err := <-got:
		must(t, err)
	case <-time.After(5 * time.Second):
		t.Fatal("the lock outlived its process")
	}
}

// TestAttachmentsDoNotWaitForEachOther: a thousand others are locked, as by ADDs that wait for the store.
func TestAttachmentsDoNotWaitForEachOther(t *testing.T) {
	j := journal.New(t.TempDir())
	for i := range 1000 {
		locked := make(chan error, 1)
		go func() {
			_, err := j.Lock("overlay", id(fmt.Sprint("c", i)))
			locked <- err
		}()
		select {
		case err := <-locked:
			must(t, err)
		case <-time.After(time.Minute):
			t.Fatalf("attachment %d waits for another one", i)
		}
	}
}

// TestRemoveNetwork: a directory goes with its network, but never with a record, and never from under a verb.
func TestRemoveNetwork(t *testing.T) {
	j := journal.New(t.TempDir())
	removes := func(what string, want bool) {
		t.Helper()
		got, err := j.RemoveNetwork("overlay")
		if err != nil || got != want {
			t.Errorf("%s: removed %t, %v", what, got, err)
		}
	}
	removes("there is none", false)
	must(t, j.Put(record("c1", "10.42.0.9")))
	removes("it has a record", false)
	must(t, j.Remove("overlay", id("c1")))
	unlock, err := j.Lock("overlay", id("c1"))
	must(t, err)
	removes("a verb is under way", false)
	waits := make(chan func())
	go func() {
		again, err := j.Lock("overlay", id("c1"))
		if err != nil {
			t.Error(err)
		}
		waits <- again
	}()
	must(t, j.BeginHostSetup("overlay"))
	must(t, os.WriteFile(filepath.Join(j.Dir, "overlay", ".lock-07"), nil, 0o600)) // of an earlier version
	unlock()
	(<-waits)()
	removes("nobody uses it", true)
	if list, err := j.Networks(); err != nil || len(list) != 0 {
		t.Errorf("%q %v", list, err)
	}
	// Whoever comes while it is removed locks what the next one locks.
	var inside atomic.Int32
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 200 {
				unlock, err := j.Lock("overlay", id("c1"))
				if err != nil {
					t.Error(err)
					return
				}
				if inside.Add(1) != 1 {
					t.Error("two at once")
				}
				inside.Add(-1)
				unlock()
				if _, err := j.RemoveNetwork("overlay"); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func TestLockOnADiskThatTakesNoFiles(t *testing.T) {
	j := journal.Journal{Dir: "/proc/nowhere"}
	if _, err := j.Lock("overlay", id("c1")); err == nil || !strings.Contains(err.Error(), "/proc/nowhere") {
		t.Errorf("the error does not name the path: %v", err)
	}
	j.LockIfPossible("overlay", id("c1"))()
	if err := j.Put(record("c1", "10.42.0.9")); err == nil || !strings.Contains(err.Error(), "/proc/nowhere") {
		t.Errorf("the error does not name the path: %v", err)
	}
	must(t, j.Remove("overlay", id("c1")))
}

// TestLookupDoesNotGrow: with 10 000 records a lookup costs what it costs with ten. The fastest of many is
// compared: it has no neighbours' noise in it.
func TestLookupDoesNotGrow(t *testing.T) {
	fastest := func(n int) time.Duration {
		j := journal.New(t.TempDir())
		for i := range n {
			must(t, j.Put(record(fmt.Sprint("c", i), "10.42.0.9")))
		}
		best := time.Hour
		for i := range 2000 {
			begin := time.Now()
			if _, ok, err := j.Get("overlay", id(fmt.Sprint("c", i%n))); !ok || err != nil {
				t.Fatal(ok, err)
			}
			best = min(best, time.Since(begin))
		}
		return best
	}
	few, many := fastest(10), fastest(10_000)
	t.Logf("10 records: %s, 10 000: %s", few, many)
	if many > 2*few {
		t.Errorf("%s against %s", many, few)
	}
}
