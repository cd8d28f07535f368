package lease_test

import (
	"bufio"
	"context"
	"errors"
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

	"github.com/lariat-net/lariat/pkg/cni"
	"github.com/lariat-net/lariat/pkg/lease"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/probe"
	"github.com/lariat-net/lariat/test/lab"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("LEASE_TEST_HOLD"); dir != "" { // see TestF132_LockGoesWithItsProcess
		if _, err := (lease.Journal{Dir: dir}).Lock("overlay", id("c1")); err != nil {
			fmt.Println(err)
		}
		fmt.Println("held")
		io.Copy(io.Discard, os.Stdin) //nolint:errcheck // until killed
	}
	lab.Main(m)
}

var (
	ctx     = context.Background()
	cluster *lab.Cluster
	once    sync.Once
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// service is a real lariat-metadata.
func service(t *testing.T) metadata.Client {
	t.Helper()
	probe.Need(t, probe.UserNS, probe.Veth, probe.Bridge)
	once.Do(func() {
		c, err := lab.New(lab.Options{Hosts: 1})
		must(t, err)
		cluster = c
		must(t, c.Up(ctx))
		must(t, c.Hosts[0].Manager.Stop())
		c.Hosts[0].Manager = nil
		must(t, c.Hosts[0].Client().Put(ctx, metadata.KindNetwork, "overlay", metadata.Network{Name: "overlay", Encapsulation: metadata.EncapVXLAN, VNI: 1042,
			Subnets: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")}}))
	})
	if cluster == nil {
		t.Fatal("the service did not start")
	}
	return cluster.Hosts[0].Client()
}

func id(container string) metadata.AttachmentID {
	return metadata.AttachmentID{ContainerID: container, IfName: "eth0"}
}

func record(container, address string) lease.Record {
	return lease.Record{AttachmentID: id(container), State: lease.Held, Type: "lariat-vxlan", BootID: lease.BootID(), Netns: "/run/netns/x", NetnsInode: 7,
		Attachment: metadata.Attachment{Network: "overlay", Addresses: []metadata.AttachmentAddress{{Address: netip.MustParseAddr(address), Sequence: 3}}}}
}

func files(t *testing.T, j lease.Journal) (out []string) {
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
	j := lease.NewJournal(t.TempDir())
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
	if !ok || err != nil || r.Attachment.Addresses[0].Address.String() != "10.42.0.9" || r.Sequence() != 3 || r.NetnsInode != 7 {
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
	j := lease.NewJournal(t.TempDir())
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
				if l, err := j.List("overlay"); len(l) != 1 || l[0].State != lease.Held || err != nil {
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
	j := lease.NewJournal(t.TempDir())
	must(t, j.Put(record("c1", "10.42.0.9")))
	must(t, j.Put(record("c2", "10.42.0.8")))
	whole, err := os.ReadFile(filepath.Join(j.Dir, "overlay", "c1:eth0"))
	must(t, err)
	for _, torn := range [][]byte{nil, whole[:len(whole)/2], []byte("\x00\x00\x00"), []byte("{}"), []byte(strings.Replace(string(whole), "c1", "c9", 1))} {
		must(t, os.WriteFile(filepath.Join(j.Dir, "overlay", "c1:eth0"), torn, 0o600))
		if _, ok, err := j.Get("overlay", id("c1")); ok || err != nil {
			t.Errorf("%q counts as a record: %v", torn, err)
		}
		list, err := j.List("overlay")
		if err != nil || len(list) != 2 || list[0].AttachmentID != id("c1") || list[0].State != lease.Released || list[0].Attachment.Network != "overlay" || list[1].State != lease.Held {
			t.Errorf("%q is listed as %+v %v", torn, list, err)
		}
	}
}

// TestF132_TemporaryFilesOfTheDead go with the next List or Remove; that of a living writer stays.
func TestF132_TemporaryFilesOfTheDead(t *testing.T) {
	j := lease.NewJournal(t.TempDir())
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
	j := lease.NewJournal(t.TempDir())
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
	j := lease.NewJournal(t.TempDir())
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "LEASE_TEST_HOLD="+j.Dir)
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
	j := lease.NewJournal(t.TempDir())
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
	j := lease.NewJournal(t.TempDir())
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
	j := lease.Journal{Dir: "/proc/nowhere"}
	if _, err := j.Lock("overlay", id("c1")); err == nil || !strings.Contains(err.Error(), "/proc/nowhere") {
		t.Errorf("the error does not name the path: %v", err)
	}
	j.LockIfPossible("overlay", id("c1"))()
	if err := j.Put(record("c1", "10.42.0.9")); err == nil || !strings.Contains(err.Error(), "/proc/nowhere") {
		t.Errorf("the error does not name the path: %v", err)
	}
	must(t, j.Remove("overlay", id("c1")))
}

// TestLookupDoesNotGrow: with 10 000 records a lookup costs what it costs with ten. The fastest of many is compared: it has no
// neighbours' noise in it.
func TestLookupDoesNotGrow(t *testing.T) {
	fastest := func(n int) time.Duration {
		j := lease.NewJournal(t.TempDir())
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

// away is a book whose service does not answer.
func away(t *testing.T) lease.Book {
	return lease.Book{Client: metadata.Client{Socket: "/run/nobody"}, Journal: lease.NewJournal(t.TempDir()), Type: "lariat-ipam"}
}

func state(t *testing.T, b lease.Book, container string) string {
	t.Helper()
	r, ok, err := b.Journal.Get("overlay", id(container))
	must(t, err)
	if !ok {
		return "none"
	}
	return r.State
}

func request(container string) metadata.AttachRequest {
	return metadata.AttachRequest{ContainerID: container, IfName: "eth0"}
}

// TestF19_F127_BookWithTheServiceAway: each call does what the journal alone allows.
func TestF19_F127_BookWithTheServiceAway(t *testing.T) {
	b := away(t)
	if _, err := b.Acquire(ctx, "overlay", request("c1"), lease.Netns{}, nil); !errors.Is(err, metadata.ErrUnreachable) || state(t, b, "c1") != "none" {
		t.Errorf("an address from nowhere: %v, record %s", err, state(t, b, "c1"))
	}
	explicit := &metadata.Attachment{Network: "overlay", Addresses: []metadata.AttachmentAddress{{Address: netip.MustParseAddr("10.42.0.9")}}}
	for range 2 {
		a, err := b.Acquire(ctx, "overlay", request("c1"), lease.Netns{Path: "/run/netns/x", Inode: 7}, explicit)
		if err != nil || !lease.Same(a, []string{"10.42.0.9"}) || state(t, b, "c1") != lease.Unregistered {
			t.Errorf("F19: %+v %v, record %s", a, err, state(t, b, "c1"))
		}
	}
	if a, err := b.Check(ctx, "overlay", id("c1")); err != nil || !lease.Same(a, []string{"10.42.0.9"}) {
		t.Errorf("CHECK: %+v %v", a, err)
	}
	must(t, b.Release(ctx, "overlay", id("c1"))) // the service never knew: nothing is left to tell
	if state(t, b, "c1") != "none" {
		t.Errorf("record %s", state(t, b, "c1"))
	}

	must(t, b.Journal.Put(record("c2", "10.42.0.8")))
	if a, err := b.Acquire(ctx, "overlay", request("c2"), lease.Netns{}, nil); err != nil || !lease.Same(a, []string{"10.42.0.8"}) {
		t.Errorf("F3: what is recorded is not given again: %+v %v", a, err)
	}
	if a, err := b.Check(ctx, "overlay", id("c2")); err != nil || !lease.Same(a, []string{"10.42.0.8"}) {
		t.Errorf("CHECK: %+v %v", a, err)
	}
	for range 2 {
		must(t, b.Release(ctx, "overlay", id("c2")))
		if state(t, b, "c2") != lease.Released {
			t.Errorf("the release is not noted: %s", state(t, b, "c2"))
		}
	}
	if _, err := b.Check(ctx, "overlay", id("c2")); err == nil {
		t.Error("CHECK passes after the release")
	}
	if _, err := b.Acquire(ctx, "overlay", request("c2"), lease.Netns{}, nil); !errors.Is(err, metadata.ErrUnreachable) {
		t.Errorf("an address that was released is given again: %v", err)
	}

	old := record("c3", "10.42.0.7")
	old.BootID = "before"
	must(t, b.Journal.Put(old))
	if _, err := b.Acquire(ctx, "overlay", request("c3"), lease.Netns{}, nil); !errors.Is(err, metadata.ErrUnreachable) {
		t.Errorf("F128: an address of an earlier boot is given again: %v", err)
	}

	must(t, b.Release(ctx, "overlay", id("c4"))) // of which no record is: it may have been killed before it wrote one
	if state(t, b, "c4") != lease.Released {
		t.Errorf("the release of the unknown is not noted: %s", state(t, b, "c4"))
	}

	must(t, b.Journal.Put(record("c5", "10.42.0.6")))
	must(t, b.Journal.Put(record("c6", "10.42.0.5")))
	must(t, b.Collect(ctx, "overlay", []metadata.AttachmentID{id("c5")}))
	if state(t, b, "c5") != lease.Held || state(t, b, "c6") != lease.Released {
		t.Errorf("GC: %s and %s", state(t, b, "c5"), state(t, b, "c6"))
	}
	// What cannot be noted either is an error, and names both causes.
	b.Journal.Dir = "/proc/nowhere"
	if err := b.Release(ctx, "overlay", id("c7")); !errors.Is(err, metadata.ErrUnreachable) || !strings.Contains(err.Error(), "/proc/nowhere") {
		t.Errorf("%v", err)
	}
}

func holds(t *testing.T, c metadata.Client, container string) bool {
	t.Helper()
	_, err := c.Attachment(ctx, "overlay", id(container))
	if err != nil && !metadata.IsCode(err, metadata.CodeNotFound) {
		t.Fatal(err)
	}
	return err == nil
}

func TestBookWithTheService(t *testing.T) {
	b := lease.Book{Client: service(t), Journal: lease.NewJournal(t.TempDir()), Type: "lariat-ipam"}
	first, err := b.Acquire(ctx, "overlay", request("d1"), lease.Netns{Path: "/run/netns/x", Inode: 7}, nil)
	must(t, err)
	again, err := b.Acquire(ctx, "overlay", request("d1"), lease.Netns{Path: "/run/netns/x", Inode: 7}, nil)
	if err != nil || first.Addresses[0] != again.Addresses[0] || state(t, b, "d1") != lease.Held {
		t.Errorf("F3: %+v and %+v, %v", first, again, err)
	}

	// The journal cannot be written: nothing new is held, and nothing old is lost.
	broken := b
	broken.Journal.Dir = "/proc/nowhere"
	_, err = broken.Acquire(ctx, "overlay", request("d2"), lease.Netns{}, nil)
	var e *cni.Error
	if !errors.As(err, &e) || e.Code != cni.ErrIO || holds(t, b.Client, "d2") {
		t.Errorf("%v; held: %t", err, holds(t, b.Client, "d2"))
	}

	// F126: a release that comes late, with the sequence of the first life, does not hit the second.
	r, _, err := b.Journal.Get("overlay", id("d1"))
	must(t, err)
	must(t, b.Release(ctx, "overlay", id("d1")))
	if holds(t, b.Client, "d1") || state(t, b, "d1") != "none" {
		t.Error("not released")
	}
	_, err = b.Acquire(ctx, "overlay", request("d1"), lease.Netns{}, nil)
	must(t, err)
	must(t, b.Client.Release(ctx, "overlay", id("d1"), r.Sequence()))
	if !holds(t, b.Client, "d1") {
		t.Error("F126: a late release freed the address of the next life")
	}

	// GC: what only the service knows goes too, what is listed stays.
	_, err = b.Client.Attach(ctx, "overlay", request("d3"))
	must(t, err)
	must(t, b.Collect(ctx, "overlay", []metadata.AttachmentID{id("d1")}))
	if holds(t, b.Client, "d3") || !holds(t, b.Client, "d1") {
		t.Errorf("GC: d3 %t, d1 %t", holds(t, b.Client, "d3"), holds(t, b.Client, "d1"))
	}
	if _, err := b.Check(ctx, "overlay", id("d3")); !metadata.IsCode(err, metadata.CodeNotFound) {
		t.Errorf("CHECK of what is gone: %v", err)
	}
	must(t, b.Collect(ctx, "nowhere", nil)) // a network that nobody created holds nothing
	must(t, b.Collect(ctx, "overlay", nil))
}

// TestStatus: exhaustion is an error of ADD, not of STATUS, unless the configuration is strict about it.
func TestStatus(t *testing.T) {
	c := service(t)
	must(t, c.Put(ctx, metadata.KindNetwork, "tiny", metadata.Network{Name: "tiny", Encapsulation: metadata.EncapVXLAN, VNI: 1043, BlockSizeV4: 30,
		Subnets: []netip.Prefix{netip.MustParsePrefix("10.43.0.0/30")}}))
	b := lease.Book{Client: c, Journal: lease.NewJournal(t.TempDir()), Type: "lariat-ipam"}
	for i := 0; ; i++ {
		_, err := c.Attach(ctx, "tiny", request(fmt.Sprint("t", i)))
		if metadata.IsCode(err, metadata.CodeExhausted) {
			break
		}
		must(t, err)
	}
	t.Cleanup(func() {
		if _, err := c.GC(ctx, "tiny", nil); err != nil {
			t.Error(err)
		}
		if err := c.Delete(ctx, metadata.KindNetwork, "tiny"); err != nil {
			t.Error(err)
		}
	})
	for _, tc := range []struct {
		name, network string
		book          lease.Book
		d             lease.Definition
		strict        bool
		want          string // in the error; empty: none
	}{
		{"room", "overlay", b, lease.Definition{}, true, ""},
		{"no address", "tiny", b, lease.Definition{}, false, ""},
		{"no address, strict", "tiny", b, lease.Definition{}, true, "no address left"},
		{"no network", "nowhere", b, lease.Definition{}, false, "nowhere"},
		{"no network yet", "nowhere", b, lease.Definition{Subnet: "10.1.0.0/16"}, false, ""},
		{"no service", "overlay", away(t), lease.Definition{}, false, "metadata service unreachable"},
	} {
		_, err := lease.Status(ctx, tc.book, tc.network, tc.d, tc.strict)
		var e *cni.Error
		if tc.want == "" && err != nil || tc.want != "" && (!errors.As(err, &e) || e.Code != cni.ErrNotAvailable || !strings.Contains(e.Error(), tc.want)) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
}

func TestDefinition(t *testing.T) {
	off := false
	for _, tc := range []struct {
		name, encap string
		d           lease.Definition
		want        string // subnets, gateways, NAT; or the error
	}{
		{"nothing", metadata.EncapVXLAN, lease.Definition{VNI: 7}, "none"},
		{"one subnet", metadata.EncapVXLAN, lease.Definition{Subnet: "10.1.0.0/16"}, "[10.1.0.0/16] [] true"},
		{"two families", metadata.EncapVXLAN, lease.Definition{Subnets: []string{"10.1.0.0/16", "fd00::/48"}, HostNAT: &off}, "[10.1.0.0/16 fd00::/48] [] false"},
		{"flat, without a router: the first address is it", metadata.EncapNone, lease.Definition{Subnets: []string{"10.1.0.0/16", "fd00::/64"}}, "[10.1.0.0/16 fd00::/64] [10.1.0.1 fd00::1] true"},
		{"flat, with one", metadata.EncapNone, lease.Definition{Subnet: "10.1.0.0/16", Gateways: []string{"10.1.0.254"}}, "[10.1.0.0/16] [10.1.0.254] true"},
		{"both keys", metadata.EncapVXLAN, lease.Definition{Subnet: "10.1.0.0/16", Subnets: []string{"fd00::/48"}}, `keys "subnet" and "subnets" contradict each other; give one of them`},
		{"no subnet", metadata.EncapVXLAN, lease.Definition{Subnet: "10.1.0.0"}, `key "subnet": netip.ParsePrefix("10.1.0.0"): no '/'`},
		{"no gateway", metadata.EncapNone, lease.Definition{Subnet: "10.1.0.0/16", Gateways: []string{"x"}}, `key "gateways": ParseAddr("x"): unable to parse IP`},
	} {
		n, err := tc.d.Create("x", tc.encap)
		got := "none"
		switch {
		case err != nil:
			got = err.Error()
		case n != nil:
			got = fmt.Sprint(n.Subnets, n.Gateways, n.HostNAT)
		}
		if got != tc.want {
			t.Errorf("%s: %s, want %s", tc.name, got, tc.want)
		}
	}
}

func TestF20_PrefixLength(t *testing.T) {
	for in, want := range map[string]int{"": 0, "/24": 24, "/128": 128, "24": -1, "/0": -1, "/129": -1, "/-1": -1, "/24 ": -1, "/024": -1, "/": -1, "/x": -1} {
		got, err := lease.IPAM{SubnetPrefixSize: in}.PrefixLength()
		if err != nil {
			got = -1
		}
		if got != want {
			t.Errorf("%q is %d, want %d (%v)", in, got, want, err)
		}
	}
}
