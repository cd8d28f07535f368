package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
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
			_, cpu, err := execPlugin(paths[s.Who], conf, "CNI_COMMAND=VERSION", "CNI_PATH="+b.opt.peers)
			took := time.Since(start)
			if i < 3 {
				continue // page cache
			}
			if err != nil {
				s.fail(err)
				continue
			}
			s.addTime(took)
			s.cpu += cpu
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
	b.rep.add(durable)
	if err := b.roundTrips(n); err != nil {
		return fmt.Errorf("metadata round trip: %w", err)
	}
	return b.ctx.Err()
}

// writeDurably writes a small file so that it survives a crash: the least that an ADD has to do to be known after a reboot.
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

// explain says what an ADD and a DEL are made of, so that a target that was missed can be judged by how near the floor it is.
func (r *report) explain() {
	start := r.find(seriesKey{"start", "VERSION", "empty program", "start"})
	durable := r.find(seriesKey{"start", "parts", "durable file", "write"})
	for op, call := range map[string]string{"ADD": "attach", "DEL": "release"} {
		trip := r.find(seriesKey{"start", "parts", "metadata round trip", call})
		kernel, ours := r.find(cniKey("plain", "floor", op)), r.find(cniKey("plain", oursName, op))
		if start == nil || durable == nil || kernel == nil || ours == nil || trip == nil {
			continue
		}
		floor := start.P50 + kernel.P50 + durable.P50 + trip.P50
		r.note("%s: ours takes %s ms; its parts alone are %s: a Go process %s, the kernel's work %s, the journal's durable record %s, the metadata round trip with its own durable write %s",
			op, number(ours.P50), number(floor), number(start.P50), number(kernel.P50), number(durable.P50), number(trip.P50))
	}
}
