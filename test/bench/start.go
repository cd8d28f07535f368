package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// starts measures what it takes to start an executable, by the cheapest verb, against an empty Go program.
func (b *bench) starts() error {
	n := 300
	if b.opt.quick {
		n = 10
	}
	type program struct{ name, path string }
	list := []program{{"empty program", b.opt.empty}}
	for _, name := range []string{"lariat-vxlan", "lariat-ipam"} {
		list = append(list, program{name, filepath.Join(b.opt.bin, name)})
	}
	for _, name := range []string{"bridge", "host-local"} {
		list = append(list, program{name, filepath.Join(b.opt.peers, name)})
	}
	b.logf("start: %d of each program", n)
	all := make([]*series, 0, len(list))
	for _, p := range list {
		s := &series{Section: "start", Scenario: "VERSION", Who: p.name, Op: "start", Unit: "ms"}
		if _, err := os.Stat(p.path); err != nil {
			b.rep.note("start: %s left out: %v", p.name, err)
			continue
		}
		all = append(all, s)
	}
	conf := []byte(`{"cniVersion":"1.1.0","name":"start","type":"start"}`)
	paths := map[string]string{}
	for _, p := range list {
		paths[p.name] = p.path
	}
	for i := range n + 3 {
		for k := range all {
			s := all[(i+k)%len(all)]
			start := time.Now()
			_, paid, err := execPlugin(paths[s.Who], conf, "CNI_COMMAND=VERSION", "CNI_PATH="+b.opt.peers)
			took := time.Since(start)
			if i < 3 {
				continue // page cache
			}
			if err != nil {
				s.fail(err)
				continue
			}
			s.addTime(took)
			s.pay(paid)
		}
	}
	b.rep.add(all...)
	durable := &series{Section: "start", Scenario: "parts", Who: "durable file", Op: "write", Unit: "ms"}
	for i := range n {
		start := time.Now()
		if err := writeDurably(b.work, fmt.Sprintf("durable%d", i%8)); err != nil {
			return err
		}
		durable.addTime(time.Since(start))
	}
	pages := &series{Section: "start", Scenario: "parts", Who: "memory", Op: "first touch of 256 pages", Unit: "ms"}
	for range n {
		took, err := touch()
		if err != nil {
			return err
		}
		pages.addTime(took)
	}
	b.rep.add(durable, pages)
	if err := b.linkRemoval(max(5, n/10)); err != nil {
		return fmt.Errorf("link removal: %w", err)
	}
	if err := b.roundTrips(n); err != nil {
		return fmt.Errorf("metadata round trip: %w", err)
	}
	return b.ctx.Err()
}

// writeDurably writes a small file so that it survives a crash: the least that an ADD has to do to be known
// after a reboot.
func writeDurably(dir, name string) error {
	f, err := os.CreateTemp(dir, ".durable")
	if err != nil {
		return err
	}
	if _, err = f.WriteString(`{"network":"bench","containerID":"x","ifname":"eth0"}`); err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), filepath.Join(dir, name)); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// touched is how many pages are written to at once, so that the clock's own cost does not count.
const touched = 256

// touch takes fresh pages from the kernel one by one, as a process does that starts and goes its way through
// its code and heap. What that costs differs by machine more than anything else does, most of all within
// virtual ones.
func touch() (time.Duration, error) {
	size := os.Getpagesize()
	m, err := unix.Mmap(-1, 0, touched*size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return 0, fmt.Errorf("%d pages of memory: %w", touched, err)
	}
	start := time.Now()
	for i := 0; i < len(m); i += size {
		m[i] = 1
	}
	took := time.Since(start)
	return took, unix.Munmap(m)
}

// linkRemoval measures what the kernel does when a veth pair is deleted: when it says that the link is gone,
// and when the call that asked for it returns. Between the two it waits for others to let go of what was
// freed (netdev_run_todo), without any lock.
func (b *bench) linkRemoval(n int) error {
	gone := &series{Section: "start", Scenario: "parts", Who: "link removal", Op: "until it is gone", Unit: "ms"}
	returned := &series{Section: "start", Scenario: "parts", Who: "link removal", Op: "until the call returns", Unit: "ms"}
	events, done := make(chan netlink.LinkUpdate, 64), make(chan struct{})
	defer close(done)
	if err := netlink.LinkSubscribe(events, done); err != nil {
		return err
	}
	for range n {
		veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "gone0"}, PeerName: "gone1"}
		if err := netlink.LinkAdd(veth); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(veth); err != nil {
			return err
		}
		start := time.Now()
		result := make(chan error, 1)
		var took time.Duration
		go func() {
			err := netlink.LinkDel(veth)
			took = time.Since(start)
			result <- err
		}()
		for removed := false; !removed; {
			select {
			case e := <-events:
				removed = e.Header.Type == unix.RTM_DELLINK && e.Attrs().Name == veth.Name
			case <-time.After(10 * time.Second):
				return errors.New("the kernel did not tell of a removed link within 10 s")
			}
		}
		gone.addTime(time.Since(start))
		if err := <-result; err != nil {
			return err
		}
		returned.addTime(took)
	}
	b.rep.add(gone, returned)
	return nil
}

// explain says what an ADD and a DEL are made of, so that a target that was missed can be judged by how near
// the floor it is.
func (r *report) explain() {
	start := r.find(seriesKey{"start", "VERSION", "empty program", "start"})
	durable := r.find(seriesKey{"start", "parts", "durable file", "write"})
	pages := r.find(seriesKey{"start", "parts", "memory", "first touch of 256 pages"})
	for _, pair := range [][2]string{{"ADD", "attach"}, {"DEL", "release"}} {
		op, call := pair[0], pair[1]
		trip := r.find(seriesKey{"start", "parts", "metadata round trip", call})
		kernel, ours := r.find(cniKey("plain", "floor", op)), r.find(cniKey("plain", oursName, op))
		if start == nil || durable == nil || pages == nil || kernel == nil || ours == nil || trip == nil {
			continue
		}
		floor := start.P50 + kernel.P50 + trip.P50
		more := ours.Faults - start.Faults
		r.note("%s: ours takes %s ms; its parts alone are %s: a Go process %s, the kernel's work %s, the metadata round "+
			"trip %s, of which one durable write is %s; it takes %.0f page faults more than an empty program's %.0f, and a "+
			"fault is %.2f µs here: %s",
			op, number(ours.P50), number(floor), number(start.P50), number(kernel.P50), number(trip.P50), number(durable.P50),
			more, start.Faults, pages.P50*1000/touched, number(more*pages.P50/touched))
	}
}
