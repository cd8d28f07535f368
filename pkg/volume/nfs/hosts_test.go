package nfs

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/test/flextest"
)

// field is an export that several hosts share, each with a driver and a journal of its own. The
// export is a folder of this machine: the children's work is done in this process, so that a test
// can let one host act between any two steps of another.
type field struct {
	*testing.T
	dir     string
	port    string
	story   []string        // what was done, for a failure
	data    map[string]word // by identity: what is to be found
	free    map[string]bool // identities that somebody may have removed
	current *host
}

// word is what the creator of a volume said.
type word struct{ onRemove OnRemove }

type host struct {
	f    *field
	name string
	d    *Driver
	// the caller gives back what Create answered, as Docker's door does; otherwise the driver's
	// journal must do
	facts bool
	knows string            // identity that this host's caller was told
	asked OnRemove          // of a Create that was killed: the caller repeats it before all else
	how   OnRemove          // what the caller said at Create
	opts  map[string]string // Create's answer
}

func newField(t *testing.T) *field {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0") // the driver looks for a server
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	_, port, _ := net.SplitHostPort(l.Addr().String())
	f := &field{T: t, dir: memory(t), port: port, data: map[string]word{}, free: map[string]bool{}}
	c, l2, r, h := createOn, lookOn, removeOn, hostname
	t.Cleanup(func() { createOn, lookOn, removeOn, hostname, volume.OnFailpoint = c, l2, r, h, nil })
	hostname = func() (string, error) { return f.current.name, nil }
	createOn = onField(f, create)
	lookOn = onField(f, func(root *os.Root, a exportArgs) (created, error) { return look(root, a.Name) })
	removeOn = onField(f, remove)
	return f
}

// onField does a child's work here, with all that would pass between the processes.
func onField[R any](f *field, work func(*os.Root, exportArgs) (R, error)) func(context.Context, exportArgs) (R, error) {
	return func(_ context.Context, a exportArgs) (reply R, err error) {
		var args exportArgs
		if err := through(a, &args); err != nil {
			return reply, err
		}
		root, err := os.OpenRoot(f.dir)
		if err != nil {
			return reply, err
		}
		defer root.Close()
		said, err := work(root, args)
		return reply, errors.Join(err, through(said, &reply))
	}
}

func through(from, to any) error {
	data, err := json.Marshal(from)
	if err != nil {
		return err
	}
	return json.Unmarshal(data, to)
}

// memory is a folder where fsync costs nothing: nothing here is about power failures.
func memory(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "lariat-test")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func (f *field) open(do func(*os.Root) error) error {
	root, err := os.OpenRoot(f.dir)
	if err != nil {
		return err
	}
	defer root.Close()
	return do(root)
}

func (f *field) host(name string, facts bool) *host {
	dir := memory(f.T)
	return &host{f: f, name: name, facts: facts, d: New(Config{StateDir: dir, RunDir: dir}, slog.New(slog.DiscardHandler))}
}

func (h *host) request(how OnRemove) volume.Request {
	o := map[string]string{}
	if h.facts {
		maps.Copy(o, h.opts)
	}
	maps.Copy(o, map[string]string{"host": "127.0.0.1", "exportBase": "/srv", "mntOptions": "port=" + h.f.port,
		"onRemove": string(how)})
	return volume.Request{Name: "v", Options: o}
}

// as lets a host act, and comes back to the other afterwards. A kill ends it where it is.
func (h *host) as(what string, act func() error) (err error) {
	before := h.f.current
	h.f.current = h
	defer func() { h.f.current = before }()
	h.f.story = append(h.f.story, h.name+": "+what)
	err = flextest.Survive(act)
	h.f.story = append(h.f.story, fmt.Sprintf("%s: %s: %v", h.name, what, err))
	return err
}

func (h *host) create(how OnRemove) error {
	err := h.as("create "+string(how), func() error {
		r, err := h.d.Create(h.f.Context(), h.request(how))
		if err == nil {
			h.opts, h.how = r.Options, how
			h.knows = h.opts[volume.Identity]
			h.f.noteAll()
		}
		return err
	})
	if h.asked = ""; errors.Is(err, flextest.ErrKilled) {
		h.asked = how
	}
	return err
}

// noteAll learns what the creators of all volumes said.
func (f *field) noteAll() {
	data, err := os.ReadFile(filepath.Join(f.dir, markFile("v")))
	var m mark
	if err == nil && json.Unmarshal(data, &m) == nil {
		if _, known := f.data[m.identity()]; !known {
			f.data[m.identity()] = word{m.OnRemove}
		}
	}
}

// mount does what Mount does before and after it asks the kernel, and writes to the folder that it
// holds, as a container would.
func (h *host) mount() error {
	return h.as("mount", func() error {
		v, err := h.d.config.Volume(h.request(h.how))
		if err != nil {
			return err
		}
		rec, _, err := h.d.volumes.Get("v")
		if err != nil {
			return err
		}
		want := rec.want(h.request(h.how))
		if want == "" {
			return nil // no caller of this test comes here without Create
		}
		ctx, cancel := volume.WithDeadline(h.f.Context(), volume.Deadlines.Long)
		defer cancel()
		inode, err := h.d.verify(ctx, v, want)
		if err != nil {
			return err
		}
		volume.Failpoint("mount-verified")
		root, err := os.OpenRoot(filepath.Join(h.f.dir, "v"))
		if err != nil {
			return err
		}
		defer root.Close()
		if id, err := identify(root, "."); err != nil || id.Inode != inode {
			return errors.Join(err, errOvertaken)
		}
		h.f.noteAll()
		if h.knows != want {
			h.f.Errorf("%s got %s, and its caller was told %s", h.name, want, h.knows)
		}
		entries, err := fs.ReadDir(root.FS(), ".")
		if err != nil {
			return err
		}
		for _, e := range entries {
			if e.Name() != "data-"+want {
				h.f.Errorf("%s got a volume with %s, and wanted %s", h.name, e.Name(), want)
			}
		}
		if err := root.WriteFile("data-"+want, []byte(want), 0o600); err != nil {
			return err
		}
		if _, known := h.f.data[want]; !known {
			h.f.data[want] = word{}
		}
		h.f.data["written "+want] = word{}
		return nil
	})
}

func (h *host) remove() error {
	return h.as("remove", func() error {
		h.f.noteAll()
		if h.knows != "" && h.how == Purge && h.f.data[h.knows].onRemove == Purge {
			h.f.free[h.knows] = true // nobody else's may be touched
		}
		_, err := h.d.Delete(h.f.Context(), h.request(h.how))
		if err == nil && h.facts {
			_, err = h.d.Delete(h.f.Context(), h.request(h.how)) // the answer was lost
		}
		if err == nil {
			h.knows, h.opts, h.how = "", nil, ""
		}
		return err
	})
}

// check: all that was written is there, but for what may have been removed.
func (f *field) check() {
	f.Helper()
	found := map[string]bool{}
	err := filepath.WalkDir(f.dir, func(p string, e fs.DirEntry, err error) error {
		if id, ok := strings.CutPrefix(filepath.Base(p), "data-"); ok && err == nil && !e.IsDir() {
			found[id] = true
		}
		return err
	})
	if err != nil {
		f.Fatal(err)
	}
	for key := range f.data {
		if id, written := strings.CutPrefix(key, "written "); written && !found[id] && !f.free[id] {
			f.Fatalf("the data of volume %s is gone:\n%s", id, strings.Join(f.story, "\n"))
		}
	}
}

// F105: a name that another host has given to another volume: neither Remove, nor Mount, nor Create
// of the first host touches that one, and each says so.
func TestF105ReplacedElsewhere(t *testing.T) {
	for _, facts := range []bool{true, false} {
		f := newField(t)
		one, two := f.host("one", facts), f.host("two", facts)
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatalf("%v\n%s", err, strings.Join(f.story, "\n"))
			}
		}
		must(one.create(Purge))
		must(one.mount())
		must(two.create(Purge))
		must(two.remove())
		if err := one.mount(); !errors.Is(err, volume.ErrNotFound) ||
			!strings.Contains(err.Error(), "does not exist any more: there is no folder 127.0.0.1:/srv/v") {
			t.Errorf("mount of what is gone: %v", err)
		}
		must(two.create(Retain))
		must(two.mount())
		for what, err := range map[string]error{"mount": one.mount(), "create": one.create(Purge)} {
			if !errors.Is(err, volume.ErrConflict) ||
				!strings.Contains(err.Error(), "that this host knows does not exist any more") ||
				!strings.Contains(err.Error(), "host two created it") {
				t.Errorf("%s: %v", what, err)
			}
		}
		for range 2 { // the answer to the first is lost
			f.current = one
			r, err := one.d.Delete(t.Context(), one.request(Purge))
			if must(err); !strings.Contains(r.Message, "is another") && !strings.Contains(r.Message, "exists as") {
				t.Errorf("remove: %+v", r)
			}
			f.check()
		}
		// Used together, the creator's word counts.
		one.knows, one.opts = "", nil
		must(one.create(Purge))
		must(one.mount())
		must(one.remove())
		f.check()
		must(two.mount())
		// What is gone is made anew by Create.
		three := f.host("three", facts)
		must(os.RemoveAll(filepath.Join(f.dir, "v")))
		f.free[two.knows] = true
		must(two.create(Purge))
		must(two.mount())
		must(three.create(Retain))
		must(three.remove()) // it is more cautious than the creator
		f.check()
		must(two.remove())
		if left, _ := os.ReadDir(f.dir); len(left) != 1 {
			t.Errorf("left: %v", left)
		}
	}
}

// F105: a Create that was refused has not made this host forget what it knew: its Delete takes
// nothing that another host has made since.
func TestF105RefusedCreate(t *testing.T) {
	f := newField(t)
	one, two := f.host("one", false), f.host("two", false)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%v\n%s", err, strings.Join(f.story, "\n"))
		}
	}
	must(one.create(Purge))
	must(two.create(Purge))
	volume.OnFailpoint = func(step string) {
		if step == "moved-to-trash" {
			volume.OnFailpoint = nil
			if err := one.create(Purge); !errors.Is(err, volume.ErrInUse) || !strings.Contains(err.Error(), "is being removed") {
				t.Errorf("create: %v", err)
			}
		}
	}
	must(two.remove())
	must(two.create(Purge))
	must(two.mount())
	for range 2 {
		f.current = one
		r, err := one.d.Delete(t.Context(), one.request(Purge))
		if must(err); !strings.Contains(r.Message, "is kept") {
			t.Errorf("remove: %+v", r)
		}
		f.check()
	}
	must(one.create(Purge))
	must(one.remove())
	f.free[two.knows] = true
	f.check()
}

// F105, F158: two hosts, each call of the one cut at each of its steps by calls of the other, or by
// a kill. No byte of a volume is lost that nobody who knew that volume has removed.
func TestF105F158TwoHostsAnyOrder(t *testing.T) {
	const runs = 300
	steps := map[string]int{}
	for seed := range runs {
		rnd := rand.New(rand.NewPCG(uint64(seed), 7))
		f := newField(t)
		f.story = append(f.story, fmt.Sprint("seed ", seed))
		hosts := []*host{f.host("one", rnd.IntN(2) == 0), f.host("two", rnd.IntN(2) == 0)}
		act := func(n int) {
			h := hosts[n]
			switch n := rnd.IntN(10); {
			case h.knows == "" || h.asked != "" || n < 2:
				err := h.create(cmp.Or(h.asked, []OnRemove{Purge, Purge, Retain}[rnd.IntN(3)]))
				if err == nil && rnd.IntN(2) == 0 {
					_ = h.mount() // only what was written can be missed
				}
			case n < 5:
				_ = h.mount()
			default:
				_ = h.remove()
			}
		}
		cuts := flextest.Cuts{Rand: rnd, Act: act, Steps: 14, Most: 4, Reached: steps,
			Tell: func(line string) { f.story = append(f.story, line) }}
		for range 12 {
			cuts.Next()
			f.check()
		}
		if t.Failed() {
			t.Fatal(strings.Join(f.story, "\n"))
		}
	}
	flextest.WantReached(t, steps, "hidden-made", "folder-made-aside", "mark-written", "folder-marked", "folder-named",
		"removal-marked", "moved", "moved-to-trash", "trash-cleared", "delete-done", "mount-verified")
}

// F105: journals and marks of older versions, which have no identity: removed is only what this host provably made.
func TestF105OlderRecords(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*mark, *record)
		kept   bool
	}{
		{"this host's own", func(*mark, *record) {}, false},
		{"another host's", func(m *mark, _ *record) { m.Host = "two" }, true},
		{"made since", func(m *mark, r *record) { r.Time = m.Time.Add(-time.Hour) }, true},
		{"made since by a newer version", func(m *mark, _ *record) { m.ID = "0123" }, true},
		{"in removal", func(m *mark, _ *record) { m.Deleting, m.Host = true, "two" }, false},
		{"of a record that is new", func(m *mark, r *record) { r.Identity = m.identity() }, false},
		{"of another record that is new", func(_ *mark, r *record) { r.Identity = "0123" }, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newField(t)
			one := f.host("one", false)
			if err := one.create(Purge); err != nil {
				t.Fatal(err)
			}
			rec, _, err := one.d.volumes.Get("v")
			if err != nil {
				t.Fatal(err)
			}
			rec.Identity = ""
			f.current = one
			err = f.open(func(root *os.Root) error {
				m, _, err := readMark(root, "v")
				if err != nil {
					return err
				}
				old := m
				m.ID, m.OnRemove = "", ""
				tc.change(&m, &rec)
				return writeMark(root, m, old, true)
			})
			if err != nil {
				t.Fatal(err)
			}
			if err := one.d.volumes.Put("v", rec); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				f.current = one
				r, err := one.d.Delete(t.Context(), one.request(Purge))
				if err != nil {
					t.Fatal(err)
				}
				if _, err := os.Stat(filepath.Join(f.dir, "v")); (err == nil) != tc.kept ||
					tc.kept != strings.Contains(r.Message, "is kept") {
					t.Errorf("%+v %v", r, err)
				}
			}
			if err := one.create(Purge); err != nil { // an explicit word for what is there
				t.Error(err)
			}
		})
	}
}
