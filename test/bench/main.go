// Command bench measures Lariat against the reference CNI plugins and against a VXLAN made by hand, all in
// one run on one machine, in turn.
//
// It runs itself in a user, network and mount namespace, so it needs no privileges and leaves nothing behind.
// The CNI part needs nothing but the executables of `make build peers`; masquerading by the peers needs nft
// or iptables, the datapath iproute2 and iperf3. What cannot be measured is named.
//
// The figures are medians of one machine at one time: only ratios within one run mean anything. It never
// fails on a figure; the exit code says only whether the bench itself worked.
package main

import (
	"context"
	_ "embed"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/test/lab"
)

// options are the flags.
type options struct {
	n, rounds  int
	quick      bool
	only       string
	json       string
	dir        string
	bin, peers string
	empty      string
}

func parse() options {
	var o options
	flag.IntVar(&o.n, "n", 40, "containers of the plain comparison; others take a part of it")
	flag.IntVar(&o.rounds, "rounds", 3, "rounds of each comparison")
	flag.BoolVar(&o.quick, "quick", false, "a few calls of everything, to show that the bench works")
	flag.StringVar(&o.only, "only", "", "sections to run: cni, start, reconcile, datapath (comma-separated; default all)")
	flag.StringVar(&o.json, "json", "bench.json", "also write all figures to this `file`; empty: do not")
	flag.StringVar(&o.dir, "dir", os.TempDir(), "keep state below this `directory`; it decides what a durable write costs")
	flag.StringVar(&o.bin, "bin", envOr("LARIAT_BIN", "bin"), "where our executables are")
	flag.StringVar(&o.peers, "peers", envOr("LARIAT_PEERS", "bin/peers"), "where the reference plugins are")
	flag.Parse()
	return o
}

func envOr(name, def string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return def
}

func main() {
	if os.Getenv(trafficRole) != "" {
		traffic()
		return
	}
	o := parse()
	lab.Enter()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) (err error) {
	// Administrators' programs are not in every user's PATH.
	os.Setenv("PATH", os.Getenv("PATH")+":/usr/local/sbin:/usr/sbin:/sbin")
	for _, p := range []*string{&o.bin, &o.peers, &o.dir} {
		if *p, err = filepath.Abs(*p); err != nil {
			return err
		}
	}
	if !exists(filepath.Join(o.peers, "bridge")) {
		return fmt.Errorf("no reference plugins in %s; run `make peers`", o.peers)
	}
	work, err := os.MkdirTemp(o.dir, "lariat-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	if o.empty, err = buildEmpty(ctx, work); err != nil {
		return err
	}
	b := &bench{opt: o, ctx: ctx, work: work, rep: &report{}, hasIPT: has("iptables"), hasNFT: has("nft")}
	b.oursHere = exists(filepath.Join(o.bin, "lariat-vxlan")) && exists(filepath.Join(o.bin, "lariat-metadata"))
	if !b.oursHere {
		b.rep.note("our own executables are not in %s: only the peers were measured", o.bin)
	}
	defer b.close()
	start := time.Now()
	b.rep.Machine = describe(work)
	b.rep.Machine.Quick = o.quick
	for _, s := range []struct {
		name string
		run  func() error
	}{{"start", b.starts}, {"cni", b.containers}, {"reconcile", b.reconciles}, {"datapath", b.datapath}} {
		if o.only != "" && !strings.Contains(","+o.only+",", ","+s.name+",") {
			continue
		}
		if err := s.run(); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	b.rep.Machine.Seconds = time.Since(start).Seconds()
	b.rep.judge()
	b.rep.explain()
	m := b.rep.Machine
	fmt.Printf("Lariat bench: %d CPUs, Linux %s, %s, state on %s, load %s, %.0f s\n", m.CPUs, m.Kernel, m.Go, m.Store,
		m.Load, m.Seconds)
	b.rep.print(os.Stdout)
	if o.json == "" {
		return nil
	}
	data, err := json.MarshalIndent(b.rep, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(o.json, append(data, '\n'), 0o644)
}

//go:embed empty/main.go
var emptySource []byte

// buildEmpty compiles the empty program.
func buildEmpty(ctx context.Context, dir string) (string, error) {
	source, program := filepath.Join(dir, "main.go"), filepath.Join(dir, "empty")
	if err := os.WriteFile(source, emptySource, 0o600); err != nil {
		return "", err
	}
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", program, source)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the empty program: %w: %s", err, clip(out))
	}
	return program, nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func describe(dir string) machine {
	m := machine{CPUs: runtime.NumCPU(), Go: runtime.Version()}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	if load, err := os.ReadFile("/proc/loadavg"); err == nil {
		m.Load = strings.Join(strings.Fields(string(load))[:3], " ")
	}
	var fs unix.Statfs_t
	if unix.Statfs(dir, &fs) == nil {
		names := map[int64]string{unix.EXT4_SUPER_MAGIC: "ext4", unix.TMPFS_MAGIC: "tmpfs", unix.XFS_SUPER_MAGIC: "xfs",
			unix.BTRFS_SUPER_MAGIC: "btrfs", unix.OVERLAYFS_SUPER_MAGIC: "overlayfs"}
		kind := int64(fs.Type) //nolint:unconvert // its type differs between architectures
		if m.Store = names[kind]; m.Store == "" {
			m.Store = fmt.Sprintf("file system %#x", fs.Type)
		}
	}
	return m
}
