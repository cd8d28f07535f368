package efs

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/test/fakeaws"
	"github.com/lariat-net/lariat/test/flextest"
)

// host is one of several with a journal of its own, in one account.
type host struct {
	t     *testing.T
	d     *Driver
	short bool // no call waits long: what one host has asked for and another has removed does not show any more
	facts bool // the caller gives back what Create answered; otherwise the driver's journal must do
	name  string
	o     options
	how   string
	opts  options
	knows string
}

func (h *host) request() volume.Request {
	o := maps.Clone(h.o)
	if h.facts {
		maps.Copy(o, h.opts)
	}
	o["onRemove"] = h.how
	return volume.Request{Name: h.name, Options: o}
}

func (h *host) context() (context.Context, context.CancelFunc) {
	if h.short {
		return context.WithTimeoutCause(h.t.Context(), time.Second, volume.Timeout(time.Second))
	}
	return h.t.Context(), func() {}
}

func (h *host) create(how string) error {
	before := h.how
	h.how = how
	ctx, cancel := h.context()
	defer cancel()
	r, err := h.d.Create(ctx, h.request())
	if err != nil {
		h.how = before
		return err
	}
	h.opts, h.knows = r.Options, r.Options[volume.Identity]
	return nil
}

// mount is Mount without the kernel: where it would be mounted from.
func (h *host) mount() (id string, err error) {
	v, err := h.d.known(h.request())
	if err != nil {
		return "", err
	}
	m, err := h.d.source(h.t.Context(), v)
	if _, point, ok := strings.Cut(m.ID, "/"); ok {
		return point, err
	}
	return m.ID, err
}

func (h *host) remove() (volume.Reply, error) {
	ctx, cancel := h.context()
	defer cancel()
	r, err := h.d.Delete(ctx, h.request())
	if err == nil && h.facts {
		_, err = h.d.Delete(ctx, h.request()) // the answer was lost
	}
	return r, err
}

// owned are the file systems, or the access points, that have the name, with what their creators said.
func owned(c *fakeaws.Cloud, name string) map[string]string {
	all := map[string]string{}
	for _, fs := range c.FileSystems() {
		if fs.Tags[ownerTag] == name {
			all[fs.ID] = fs.Tags[removeTag]
		}
	}
	for _, p := range c.AccessPoints() {
		if p.Tags[ownerTag] == name {
			all[p.ID] = p.Tags[removeTag]
		}
	}
	return all
}

// F106: a name that another host has given to another file system or access point: neither Delete,
// nor Mount, nor Create of the first host touches that one, and each says so.
func TestF106ReplacedElsewhere(t *testing.T) {
	c, _ := cloudOf(t)
	fs := create(t, driver(t), "shared", nil).Options["fsid"]
	for kind, o := range map[string]options{"file system": {}, "access point": {"fsid": fs, "basePath": "/vols"}} {
		for _, facts := range []bool{true, false} {
			t.Run(fmt.Sprint(kind, facts), func(t *testing.T) {
				one, two := &host{t: t, d: driver(t), facts: facts, name: "v", o: o},
					&host{t: t, d: driver(t), facts: facts, name: "v", o: o}
				ok := func(err error) {
					t.Helper()
					if err != nil {
						t.Fatal(err)
					}
				}
				says := func(err, kind error, words string) {
					t.Helper()
					if !errors.Is(err, kind) || !strings.Contains(err.Error(), words) {
						t.Errorf("got  %v\nwant %s", err, words)
					}
				}
				ok(one.create("purge"))
				ok(two.create("purge"))
				if one.knows == "" || one.knows != two.knows {
					t.Fatalf("%s %s", one.knows, two.knows)
				}
				if id, err := one.mount(); id != one.knows || err != nil {
					t.Errorf("%s %v", id, err)
				}
				_, err := two.remove()
				ok(err)
				_, err = one.mount()
				says(err, volume.ErrNotFound, "was "+one.knows+" and does not exist any more: create makes a new one")
				two.opts = nil
				ok(two.create("retain"))
				if id, err := one.mount(); err == nil || id == two.knows && kind == "file system" {
					t.Errorf("mount: %s %v", id, err)
				}
				says(one.create("purge"), volume.ErrConflict, "and "+two.knows+
					" of the same name is another: delete the volume on this host, which touches nothing")
				for range 2 {
					r, err := one.remove()
					ok(err)
					if owned(c, "v")[two.knows] != "retain" || !facts && !strings.Contains(r.Message, two.knows+" is kept") {
						t.Errorf("%+v %+v", owned(c, "v"), r)
					}
				}
				// Used together, the creator's word counts.
				one.opts = nil
				ok(one.create("purge"))
				r, err := one.remove()
				ok(err)
				if owned(c, "v")[two.knows] != "retain" || !strings.Contains(r.Message, "onRemove=retain of its creator says") {
					t.Errorf("%+v %+v", owned(c, "v"), r)
				}
				// What is gone is made anew by Create.
				v, err := two.d.known(two.request())
				ok(err)
				a, err := open(t.Context(), "", two.d.log)
				ok(err)
				if kind == "file system" {
					ok(a.removeFileSystem(t.Context(), v, two.knows))
				} else {
					ok(a.removeAccessPoint(t.Context(), v, two.knows))
				}
				old := two.knows
				two.opts = nil
				ok(two.create("purge"))
				if two.knows == old || owned(c, "v")[two.knows] != "purge" {
					t.Errorf("%s %v", two.knows, owned(c, "v"))
				}
				_, err = two.remove()
				ok(err)
				if left := owned(c, "v"); len(left) > 0 {
					t.Errorf("%v", left)
				}
			})
		}
	}
}

// F106: a Create that ran out of time has not made this host forget what it knew: its Delete takes
// nothing that another host has made since.
func TestF106UnfinishedCreate(t *testing.T) {
	c, _ := cloudOf(t)
	one, two := &host{t: t, d: driver(t), name: "v", o: options{}}, &host{t: t, d: driver(t), name: "v", o: options{}}
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ok(one.create("purge"))
	ok(two.create("purge"))
	_, err := two.remove()
	ok(err)
	ctx, cancel := context.WithCancelCause(t.Context())
	writes := 0
	volume.OnFailpoint = func(step string) {
		if step == "journal-written" {
			if writes++; writes == 2 { // the volume is gone, and nothing was asked for yet
				cancel(volume.Timeout(time.Second))
			}
		}
	}
	t.Cleanup(func() { volume.OnFailpoint = nil })
	_, err = one.d.Create(ctx, one.request())
	if volume.OnFailpoint = nil; !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, context.Canceled) {
		t.Fatalf("create: %v", err)
	}
	ok(two.create("purge"))
	for range 2 {
		r, err := one.remove()
		ok(err)
		if owned(c, "v")[two.knows] != "purge" || !strings.Contains(r.Message, two.knows+" is kept") {
			t.Errorf("%+v %+v", owned(c, "v"), r)
		}
	}
	ok(one.create("purge"))
	_, err = one.remove()
	ok(err)
	if left := owned(c, "v"); len(left) > 0 {
		t.Errorf("%v", left)
	}
}

// F106, F158: two hosts, each call of the one cut at each of its steps by calls of the other, or by
// a kill. Nothing is deleted but by who knew it and may.
func TestF106F158TwoHostsAnyOrder(t *testing.T) {
	c, _ := cloudOf(t)
	fs := create(t, driver(t), "shared", nil).Options["fsid"]
	t.Cleanup(func() { volume.OnFailpoint = nil })
	steps := map[string]int{}
	for seed := range 24 {
		rnd := rand.New(rand.NewPCG(uint64(seed), 7))
		name, o := fmt.Sprint("v", seed), options{}
		if seed%2 == 0 {
			o = options{"fsid": fs, "basePath": "/vols"}
		}
		var hosts []*host
		for range 2 {
			hosts = append(hosts, &host{t: t, short: true, d: driver(t), facts: rnd.IntN(2) == 0, name: name, o: o})
		}
		var story []string
		seen, free := map[string]bool{}, map[string]bool{}
		do := func(n int) {
			h, what := hosts[n], ""
			now := owned(c, name)
			for id := range now {
				seen[id] = true
			}
			err := flextest.Survive(func() (err error) {
				switch n := rnd.IntN(10); {
				case h.knows == "" || n < 2:
					how := []string{"purge", "purge", "retain"}[rnd.IntN(3)]
					what = "create " + how
					err = h.create(how)
					what += " " + h.knows
				case n < 5:
					what = "mount"
					var id string
					if id, err = h.mount(); err == nil && id != h.knows {
						t.Errorf("%s would be mounted, and the caller was told %s", id, h.knows)
					}
				default:
					what = "remove " + h.knows
					if h.how == "purge" && now[h.knows] == "purge" {
						free[h.knows] = true
					}
					if _, err = h.remove(); err == nil {
						h.knows, h.opts, h.how = "", nil, ""
					}
				}
				return err
			})
			story = append(story, fmt.Sprintf("%d %s: %v", n, what, err))
		}
		cuts := flextest.Cuts{Rand: rnd, Act: do, Steps: 7, Most: 3, Reached: steps,
			Tell: func(line string) { story = append(story, line) }}
		for range 8 {
			cuts.Next()
			now := owned(c, name)
			for id := range seen {
				if _, there := now[id]; !there && !free[id] {
					t.Fatalf("seed %d: %s is gone:\n%s", seed, id, strings.Join(story, "\n"))
				}
			}
			if t.Failed() {
				t.Fatalf("seed %d:\n%s", seed, strings.Join(story, "\n"))
			}
		}
	}
	flextest.WantReached(t, steps, "create-journalled", "create-recorded", "file-system-asked", "access-point-asked",
		"delete-journalled", "file-system-removed", "access-point-removed", "delete-done")
}
