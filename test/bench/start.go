package main

import (
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
	return b.ctx.Err()
}
