// Command scale measures what many hosts do to one store: N lariat-metadata processes in one
// network namespace, joined over TLS to the store of one more.
//
// It runs itself in a user, network and mount namespace, so it needs no privileges and leaves
// nothing behind. All hosts share this machine's processors, so a figure at N hosts is an upper
// bound of what N machines would take: only ratios within one machine mean anything. It never fails
// on a figure.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/lariat-net/lariat/test/lab"
)

// options are the flags.
type options struct {
	sizes         []int
	phases        string
	outage, idle  time.Duration
	changes       int
	hosts, blocks int
	bin, dir      string
	json, before  string
}

func parse() (options, error) {
	var o options
	sizes := flag.String("n", "25", "numbers of hosts, comma-separated; the issue's are 25,100,200")
	flag.StringVar(&o.phases, "phases", "",
		"phases to run beside join: "+strings.Join(phaseNames(), ", ")+" (comma-separated; default all)")
	flag.DurationVar(&o.outage, "outage", 45*time.Second, "how long the store is away; a lease is 30 s long")
	flag.DurationVar(&o.idle, "idle", 15*time.Second, "how long the idle cost is counted")
	flag.IntVar(&o.changes, "changes", 50, "changes of which the propagation is measured")
	flag.IntVar(&o.hosts, "view-hosts", 2000, "hosts of the big view")
	flag.IntVar(&o.blocks, "view-blocks", 20000, "blocks of the big view")
	flag.StringVar(&o.bin, "bin", envOr("LARIAT_BIN", "bin"), "where the executables are")
	flag.StringVar(&o.dir, "dir", os.TempDir(), "keep state below this `directory`; it decides what a durable write costs")
	flag.StringVar(&o.json, "json", "", "also write all figures to this `file`")
	flag.StringVar(&o.before, "before", "", "print the figures of this `file`, which -json wrote, beside the new ones")
	flag.Parse()
	for _, s := range strings.Split(*sizes, ",") {
		n, err := strconv.Atoi(strings.TrimSpace(s))
		if err != nil || n < 1 || n > maxHosts {
			return o, fmt.Errorf("-n %s: want numbers from 1 to %d", *sizes, maxHosts)
		}
		o.sizes = append(o.sizes, n)
	}
	for _, p := range []*string{&o.bin, &o.dir} {
		abs, err := filepath.Abs(*p)
		if err != nil {
			return o, err
		}
		*p = abs
	}
	return o, nil
}

func envOr(name, def string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return def
}

func main() {
	o, err := parse()
	if err != nil {
		fmt.Fprintln(os.Stderr, "scale:", err)
		os.Exit(2)
	}
	lab.Enter()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "scale:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) error {
	t := &table{}
	if o.before != "" {
		data, err := os.ReadFile(o.before)
		if err != nil {
			return err
		}
		if err := json.Unmarshal(data, &t.before); err != nil {
			return fmt.Errorf("%s: %w", o.before, err)
		}
	}
	start := time.Now()
	var failed error
	for _, n := range o.sizes {
		if failed = measure(ctx, o, n, t); failed != nil {
			failed = fmt.Errorf("%d hosts: %w", n, failed)
			break // what was measured is worth showing
		}
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return err
	}
	fmt.Printf("Lariat scale: %d CPUs, %s, load %s, %.0f s\n", runtime.NumCPU(), runtime.Version(),
		strings.Fields(string(load))[0], time.Since(start).Seconds())
	t.print(os.Stdout)
	if o.json == "" {
		return failed
	}
	data, err := json.MarshalIndent(t.figures, "", "  ")
	if err != nil {
		return err
	}
	return errors.Join(failed, os.WriteFile(o.json, append(data, '\n'), 0o644))
}

// measure runs all phases with n hosts on a store of their own.
func measure(ctx context.Context, o options, n int, t *table) (err error) {
	work, err := os.MkdirTemp(o.dir, "lariat-scale-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	c, err := newCluster(ctx, o, n, work)
	if err != nil {
		return err
	}
	defer c.close()
	c.t = t
	for _, p := range phases {
		if p.name != "join" && o.phases != "" && !strings.Contains(","+o.phases+",", ","+p.name+",") {
			continue
		}
		fmt.Fprintf(os.Stderr, "%d hosts: %s\n", n, p.name)
		if err := p.run(c); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return nil
}
