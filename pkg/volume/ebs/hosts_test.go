package ebs

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/test/fakeaws"
	"github.com/lariat-net/lariat/test/flextest"
)

// host is one of several with a journal of its own, in one cloud.
type host struct {
	l     *lab
	node  string
	d     *Driver
	facts bool // the caller gives back what Create answered; otherwise the driver's journal must do
	name  string
	how   string
	opts  map[string]string
	knows string
}

func (l *lab) host(node, name string, facts bool) *host {
	return &host{l: l, node: node, name: name, facts: facts, d: New(Config{StateDir: l.TempDir(), RunDir: l.TempDir()},
		slog.New(slog.DiscardHandler))}
}

func (h *host) request() volume.Request {
	r := request(h.name, "size", "1", "onRemove", h.how)
	if h.facts {
		maps.Copy(r.Options, h.opts)
	}
	return r
}

func (h *host) create(how string) error {
	before := h.how
	h.how = how
	r, err := h.d.Create(h.l.ctx, h.request())
	if err != nil {
		h.how = before
		return err
	}
	h.opts, h.knows = r.Options, r.Options[volume.Identity]
	return nil
}

func (h *host) attach() error {
	_, err := h.d.Attach(h.l.ctx, h.request(), h.node)
	return err
}

func (h *host) remove() (volume.Reply, error) {
	r, err := h.d.Delete(h.l.ctx, h.request())
	if err == nil && h.facts {
		_, err = h.d.Delete(h.l.ctx, h.request()) // the answer was lost
	}
	return r, err
}

// F106: a name that another host has given to another volume: neither Delete, nor Attach, nor
// Create of the first host touches that one, and each says so.
func TestF106ReplacedElsewhere(t *testing.T) {
	for _, facts := range []bool{true, false} {
		l := newLab(t, 1, Config{})
		one, two := l.host(self, "v", facts), l.host(other, "v", facts)
		l.ok(one.create("purge"))
		l.ok(two.create("purge"))
		if one.knows == "" || one.knows != two.knows {
			t.Fatalf("%s %s", one.knows, two.knows)
		}
		_, err := two.remove()
		l.ok(err)
		l.says(one.attach(), volume.ErrNotFound, "was "+one.knows+" and does not exist any more: create makes a new one")
		two.opts = nil
		l.ok(two.create("retain"))
		l.says(one.attach(), volume.ErrConflict, "and "+two.knows+" of the same name is another, created at ")
		l.says(one.create("purge"), volume.ErrConflict, "delete the volume on this host, which touches nothing")
		_, err = one.d.WaitForAttach(l.ctx, "", one.request())
		l.says(err, volume.ErrConflict, two.knows)
		_, err = one.d.Expand(l.ctx, one.request(), volume.Expansion{Size: 5 << 30})
		l.says(err, volume.ErrConflict, two.knows)
		for range 2 {
			r, err := one.remove()
			l.ok(err)
			if v := l.only(); v.ID != two.knows || v.Size != 1 || !strings.Contains(r.Message, two.knows+" is kept") {
				t.Errorf("%+v %+v", v, r)
			}
		}
		// Used together, the creator's word counts.
		one.opts = nil
		l.ok(one.create("purge"))
		l.ok(one.attach())
		l.ok(one.d.Detach(l.ctx, "v", one.node))
		r, err := one.remove()
		l.ok(err)
		if v := l.only(); v.ID != two.knows || !strings.Contains(r.Message, "onRemove=retain of its creator says") {
			t.Errorf("%+v %+v", v, r)
		}
		// What is gone is made anew by Create.
		third := l.host(self, "v", false)
		third.how = "purge"
		// as an older version wrote it
		l.ok(third.d.volumes.Put("v", record{ID: "vol-00000000000000bad", Region: "eu-test-1"}))
		r, err = third.remove()
		l.ok(err)
		if v := l.only(); v.ID != two.knows || !strings.Contains(r.Message, "is kept") {
			t.Errorf("an older record: %+v %+v", v, r)
		}
	}
}

// F106: a Create that AWS has refused has not made this host forget what it knew: its Delete takes
// nothing that another host has made since.
func TestF106RefusedCreate(t *testing.T) {
	l := newLab(t, 1, Config{})
	one, two := l.host(self, "v", false), l.host(other, "v", false)
	l.ok(one.create("purge"))
	l.ok(two.create("purge"))
	_, err := two.remove()
	l.ok(err)
	l.Fail("CreateVolume", "VolumeLimitExceeded", 1)
	l.says(one.create("purge"), nil, "VolumeLimitExceeded")
	l.ok(two.create("purge"))
	for range 2 {
		r, err := one.remove()
		l.ok(err)
		if v := l.only(); v.ID != two.knows || !strings.Contains(r.Message, two.knows+" is kept") {
			t.Errorf("%+v %+v", v, r)
		}
	}
	l.ok(one.create("purge"))
	_, err = one.remove()
	l.ok(err)
	if all := l.Volumes(); len(all) > 0 {
		t.Errorf("%+v", all)
	}
}

// F106, F158: two hosts, each call of the one cut at each of its steps by calls of the other, or by
// a kill. No volume is deleted but by who knew it and may.
func TestF106F158TwoHostsAnyOrder(t *testing.T) {
	l := newLab(t, -1, Config{})
	ctx, cancel := context.WithTimeoutCause(t.Context(), 10*time.Minute, volume.Timeout(10*time.Minute))
	defer cancel()
	l.ctx = ctx
	usual := appearance
	appearance = time.Millisecond
	t.Cleanup(func() { appearance, volume.OnFailpoint = usual, nil })
	steps := map[string]int{}
	for seed := range 60 {
		rnd := rand.New(rand.NewPCG(uint64(seed), 7))
		name := fmt.Sprint("v", seed)
		hosts := []*host{l.host(self, name, rnd.IntN(2) == 0), l.host(other, name, rnd.IntN(2) == 0)}
		story, alive, free := []string{}, map[string]string{}, map[string]bool{}
		note := func() map[string]fakeaws.Volume {
			all := map[string]fakeaws.Volume{}
			for _, v := range l.Volumes() {
				if v.Tags[tagVolume] == name {
					all[v.ID], alive[v.ID] = v, v.Tags[tagOnRemove]
				}
			}
			return all
		}
		do := func(n int) {
			h, what := hosts[n], ""
			now := note()
			err := flextest.Survive(func() (err error) {
				switch n := rnd.IntN(10); {
				case h.knows == "" || n < 2:
					how := []string{"purge", "purge", "retain"}[rnd.IntN(3)]
					what = "create " + how
					err = h.create(how)
					what += " " + h.knows
				case n < 4:
					what = "attach"
					if err = h.attach(); err == nil {
						for id, v := range note() {
							if v.Attachment.Instance == h.node && id != h.knows {
								t.Errorf("%s was attached, and the caller was told %s", id, h.knows)
							}
						}
					}
				case n < 6:
					what = "detach"
					err = h.d.Detach(l.ctx, name, h.node)
				default:
					what = "remove " + h.knows
					if v := now[h.knows]; h.how == "purge" && v.Tags[tagOnRemove] == "purge" {
						free[h.knows] = true
					}
					if _, err = h.remove(); err == nil {
						h.knows, h.opts, h.how = "", nil, ""
					}
				}
				return err
			})
			story = append(story, fmt.Sprintf("%s %s: %v", h.node[len(h.node)-1:], what, err))
		}
		cuts := flextest.Cuts{Rand: rnd, Act: do, Steps: 8, Most: 3, Reached: steps,
			Tell: func(line string) { story = append(story, line) }}
		for range 10 {
			cuts.Next()
			now := note()
			for id := range alive {
				if _, there := now[id]; !there && !free[id] {
					t.Fatalf("seed %d: %s is gone:\n%s", seed, id, strings.Join(story, "\n"))
				}
			}
			if t.Failed() {
				t.Fatalf("seed %d:\n%s", seed, strings.Join(story, "\n"))
			}
		}
	}
	flextest.WantReached(t, steps, "before-create", "created", "volume-recorded", "before-attach", "attached",
		"before-detach", "delete-journalled", "deleted", "delete-done")
}
