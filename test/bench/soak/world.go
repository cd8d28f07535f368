package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/lariat-net/lariat/pkg/certs"
	"github.com/lariat-net/lariat/pkg/metadata/store"
	"github.com/lariat-net/lariat/test/conformance/cnirun"
)

// world is what is there: lines by host and kind.
type world map[string][]string

// tables are what a host's kernel holds.
var tables = []struct{ kind, command string }{
	{"links", "ip -d -o link"},
	{"addresses", "ip -o addr"},
	{"routes", "ip -o route show table all; ip -6 -o route show table all"},
	{"rules", "ip rule; ip -6 rule"},
	{"next hops", "ip nexthop"},
	{"neighbours", "ip neigh show nud permanent; ip -6 neigh show nud permanent"},
	{"forwarding entries", "bridge fdb show"},
	{"nftables", "nft list ruleset"},
	{"iptables", "iptables-save; ip6tables-save"},
}

// passing is what of a line differs from one look to the next and means nothing: counters, times,
// numbers that the kernel gives out.
var passing = regexp.MustCompile(`^\d+: |@if\d+|\blink-netnsid \d+|\bexpires \d+sec|\[\d+:\d+\]|` +
	`\bpackets \d+ bytes \d+|\bvalid_lft \S+ preferred_lft \S+|^#.*`)

// lines splits a text, and leaves out what means nothing.
func lines(text string) (out []string) {
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(passing.ReplaceAllString(strings.TrimSpace(line), "")); line != "" {
			out = append(out, line)
		}
	}
	slices.Sort(out)
	return out
}

// compare lists what of a world is more than before, or less.
func compare(before, after world) (out []string) {
	for _, key := range slices.Sorted(maps.Keys(before)) {
		count := map[string]int{}
		for _, l := range before[key] {
			count[l]--
		}
		for _, l := range after[key] {
			count[l]++
		}
		for _, l := range slices.Sorted(maps.Keys(count)) {
			switch n := count[l]; {
			case n > 0:
				out = append(out, fmt.Sprintf("%s: left behind: %s", key, l))
			case n < 0:
				out = append(out, fmt.Sprintf("%s: gone: %s", key, l))
			}
		}
	}
	return out
}

// figures of a process.
type figures struct {
	pid                             int
	descriptors, goroutines, octets float64
}

// grown says in what a process has become larger than its work explains. One that was started anew began with less.
func grown(before, after figures) (out []string) {
	for _, f := range []struct {
		what        string
		have, limit float64
	}{
		{"open descriptors", after.descriptors, before.descriptors + 10},
		{"goroutines", after.goroutines, before.goroutines + 20},
		{"resident MiB", after.octets / (1 << 20), 2*before.octets/(1<<20) + 32},
	} {
		if f.have > f.limit {
			out = append(out, fmt.Sprintf("%.0f %s, at most %.0f were expected", f.have, f.what, f.limit))
		}
	}
	return out
}

// view is a look at everything.
type view struct {
	world
	processes map[string]figures
}

// look reads all tables of all hosts but the visitor, the store and the processes' own figures.
func (s *soak) look(ctx context.Context) (view, error) {
	v := view{world: world{}, processes: map[string]figures{}}
	for _, h := range s.Hosts[:3] {
		for _, t := range tables {
			text, err := h.Output(ctx, "sh", "-ec", t.command)
			if err != nil {
				return v, err
			}
			v.world["host "+h.Name+" "+t.kind] = lines(text)
		}
		journal, err := cnirun.Journal(h.StateDir())
		if err != nil {
			return v, err
		}
		v.world["host "+h.Name+" journal"] = journal
		held, err := cnirun.Held(ctx, h)
		if err != nil {
			return v, err
		}
		v.world["host "+h.Name+" held"] = lines(held)
		for name, socket := range map[string]string{"metadata": h.Socket(), "network-manager": h.ManagerSocket()} {
			body, err := get(ctx, socket, "/metrics")
			if err != nil {
				return v, err
			}
			f, err := parseFigures(body)
			if err != nil {
				return v, fmt.Errorf("metrics of %s: %w", socket, err)
			}
			v.processes[h.Name+" "+name] = f
		}
		p := v.processes[h.Name+" metadata"]
		p.pid = h.Metadata.Pid()
		v.processes[h.Name+" metadata"] = p
		p = v.processes[h.Name+" network-manager"]
		p.pid = h.Manager.Pid()
		v.processes[h.Name+" network-manager"] = p
	}
	keys, err := s.keys(ctx)
	v.world["store keys"] = keys
	return v, err
}

// parseFigures reads what every helper says of its process.
func parseFigures(metrics []byte) (f figures, err error) {
	want := map[string]*float64{"process_open_fds": &f.descriptors, "go_goroutines": &f.goroutines,
		"process_resident_memory_bytes": &f.octets}
	for in := bufio.NewScanner(bytes.NewReader(metrics)); in.Scan(); {
		name, value, _ := strings.Cut(in.Text(), " ")
		if to := want[name]; to != nil {
			if *to, err = strconv.ParseFloat(value, 64); err != nil {
				return f, err
			}
			delete(want, name)
		}
	}
	if len(want) > 0 {
		return f, fmt.Errorf("no %v", slices.Sorted(maps.Keys(want)))
	}
	return f, nil
}

// asKeys in the environment makes this program print the store's keys: a client in a host's namespace
// is a process of its own there. It names the store's endpoint and the files of the certificate
// authority, the certificate and its key.
const asKeys = "LARIAT_SOAK_KEYS"

// keys are the store's.
func (s *soak) keys(ctx context.Context) ([]string, error) {
	h, dir := s.Hosts[0], filepath.Join(s.Dir, "certs")
	where := fmt.Sprintf("%s=https://%s:2379 %s %s %s", asKeys, h.Addr.Addr(), filepath.Join(dir, certs.CACert),
		filepath.Join(dir, h.Name+".crt"), filepath.Join(dir, h.Name+".key"))
	out, err := h.Output(ctx, "env", where, "/proc/"+strconv.Itoa(os.Getpid())+"/exe")
	return lines(out), err
}

func printKeys(ctx context.Context, where string) error {
	f := strings.Fields(where)
	if len(f) != 4 {
		return fmt.Errorf("%s=%q", asKeys, where)
	}
	pem, err := os.ReadFile(f[1])
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	cert, err := tls.LoadX509KeyPair(f[2], f[3])
	if err != nil {
		return err
	}
	e, err := store.Dial(ctx, store.External{Endpoints: f[:1], Prefix: "/", Log: slog.New(slog.DiscardHandler),
		TLS: &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13}})
	if err != nil {
		return err
	}
	defer e.Close()
	list, _, err := store.List(ctx, e, "", 0)
	for _, entry := range list {
		fmt.Println(entry.Key)
	}
	return err
}

// settled looks until nothing differs from before, or too long, and returns what does.
func (s *soak) settled(ctx context.Context, before view) (after view, left []string) {
	ctx, cancel := context.WithTimeout(ctx, s.o.settle)
	defer cancel()
	start := time.Now()
	err := eventually(ctx, func() (err error) {
		look, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if after, err = s.look(look); err != nil {
			left = []string{err.Error()}
			return err
		}
		if left = compare(before.world, after.world); len(left) > 0 {
			return errors.New("something is left")
		}
		return nil
	})
	if err == nil {
		s.r.took("until nothing was left", time.Since(start))
	}
	return after, left
}

// conclude makes faults of what is left and of what has grown, and the table.
func (s *soak) conclude(before, after view, left []string) {
	for _, l := range left {
		s.r.fault("after %s at the end, %s", s.o.settle, l)
	}
	s.r.row("what", "at the start", "at the end")
	for _, key := range slices.Sorted(maps.Keys(before.world)) {
		s.r.row(key, strconv.Itoa(len(before.world[key])), strconv.Itoa(len(after.world[key])))
	}
	s.r.row()
	s.r.row("process", "descriptors", "goroutines", "resident MiB")
	for _, key := range slices.Sorted(maps.Keys(before.processes)) {
		b, a := before.processes[key], after.processes[key]
		s.r.row(key+map[bool]string{true: ", the same all the time", false: ""}[a.pid == b.pid],
			fmt.Sprintf("%.0f -> %.0f", b.descriptors, a.descriptors), fmt.Sprintf("%.0f -> %.0f", b.goroutines, a.goroutines),
			fmt.Sprintf("%.0f -> %.0f", b.octets/(1<<20), a.octets/(1<<20)))
		for _, g := range grown(b, a) {
			s.r.fault("%s: %s", key, g)
		}
	}
	t := s.traffic
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, p := range []string{"on one host", "between hosts"} {
		s.r.row(fmt.Sprintf("pings %s", p), fmt.Sprintf("%d sent", t.sent[p]), fmt.Sprintf("%d lost", t.lost[p]))
	}
	s.r.row("first pings", fmt.Sprintf("%d answered", t.first), fmt.Sprintf("%d of them after more than %s", t.late, hang))
	s.r.row("slowest answer", t.slowest.Round(time.Millisecond).String())
}
