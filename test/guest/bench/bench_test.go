// Package bench_test measures in a guest what an encrypted network costs, against the same tunnel made by
// hand and against none. "make bench/guest" runs it; there is no test in it, and nothing fails on a figure.
package bench_test

import (
	"encoding/json"
	"flag"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/lariat-net/lariat/pkg/probe"
	"github.com/lariat-net/lariat/test/guest"
)

var (
	rounds  = flag.Int("rounds", 5, "how often each datapath has its turn")
	seconds = flag.Float64("seconds", 1.5, "how long each measurement takes, of the guest's time")
)

func TestMain(m *testing.M) {
	flag.Parse()
	if flag.Lookup("test.bench").Value.String() == "" {
		os.Exit(m.Run()) // no tests: no guest has to be booted for that
	}
	guest.Main(m, guest.Options{Warm: true, Memory: 2048, Counted: true, Boot: 3 * time.Minute})
}

// target is what is promised of ours against the tunnel by hand.
const target = 0.97

// measures of one datapath, one value a round.
type measures struct {
	Who  string    `json:"who"`
	Mbit []float64 `json:"mbitPerSecond"` // TCP, one stream
	// of the whole machine meanwhile: both hosts, both containers, sender and receiver
	CPU       []float64 `json:"cpuNanosPerOctet"`
	Exchanges []float64 `json:"exchangesPerSecond"` // 64 octets there and back by TCP, one at a time
	// what went through the kernel's security associations, to show that it did
	ESP float64 `json:"espOctetsPerPayload"`
}

// verdict is a ratio of ours to theirs: the median of the rounds' ratios, for neighbours in time suffer alike
// from what else the machine does.
type verdict struct {
	What    string     `json:"what"`
	Ratio   float64    `json:"ratio"`
	Middle  [2]float64 `json:"middleHalf"` // of the rounds' ratios
	Wanted  float64    `json:"wanted,omitempty"`
	Verdict string     `json:"verdict"`
}

// report is what comes out.
type report struct {
	Kernel   string      `json:"kernel"`
	CPUs     int         `json:"cpus"`
	Emulated string      `json:"note"`
	Rounds   int         `json:"rounds"`
	Seconds  float64     `json:"secondsEach"`
	Paths    []*measures `json:"datapaths"`
	Targets  []verdict   `json:"targets"`
}

const note = "The processor is emulated, and a second is a thousand million instructions, AES-NI's among them, " +
	"whatever else the machine\n" +
	"does meanwhile. There are no caches and no wire. No figure means anything by itself; ratios within one run do."

func BenchmarkTunnel(b *testing.B) {
	probe.Need(b, probe.ESP, probe.AESGCM, probe.XfrmInterface, probe.Veth, probe.VXLAN, probe.Nft)
	runtime.GOMAXPROCS(4) // the two ends block in the kernel; neither shall wait until the runtime has noticed
	ours, hand, ruled := newLariat(b, "lariat", false), newByHand(b, "ipsec by hand", ipsecByHand, ""),
		newByHand(b, "ipsec by hand, same rules", ipsecByHand, rulesByHand)
	// Those that are compared with each other stand side by side.
	paths := []*path{
		newByHand(b, "plain veth", plainByHand, ""), newByHand(b, "vxlan by hand", vxlanByHand, ""),
		hand, ours, ruled, newLariat(b, "lariat, hostNAT", true),
	}
	all := map[*path]*measures{}
	r := report{Kernel: text(b, "/proc/sys/kernel/osrelease"), CPUs: runtime.NumCPU(), Emulated: note, Rounds: *rounds,
		Seconds: *seconds}
	for _, p := range paths {
		all[p] = &measures{Who: p.name}
		r.Paths = append(r.Paths, all[p])
		p.ready(b)
	}
	for b.Loop() {
		for round := range *rounds {
			order := slices.Clone(paths)
			if round%2 == 1 {
				slices.Reverse(order)
			}
			for i := range order {
				p := order[(i+round/2)%len(order)]
				m := all[p]
				esp := p.esp(b)
				mbit, cpu, octets := p.stream(b, *seconds)
				m.Mbit, m.CPU, m.ESP = append(m.Mbit, mbit), append(m.CPU, cpu), float64(p.esp(b)-esp)/octets
				if m.ESP > 0 != p.encrypted || p.encrypted && m.ESP < 1 {
					b.Fatalf("%s: of each octet %.2f went through ESP", p.name, m.ESP)
				}
				m.Exchanges = append(m.Exchanges, p.exchanges(b, *seconds/5))
			}
		}
	}
	for _, x := range []struct {
		what     string
		a, b     []float64
		promised bool
	}{
		{"throughput of the tunnel by hand", all[ours].Mbit, all[hand].Mbit, true},
		{"octets per CPU time of the tunnel by hand", all[hand].CPU, all[ours].CPU, true},
		{"exchanges of the tunnel by hand", all[ours].Exchanges, all[hand].Exchanges, false},
		{"throughput of the tunnel by hand with the same rules", all[ours].Mbit, all[ruled].Mbit, false},
		{"octets per CPU time of the tunnel by hand with the same rules", all[ruled].CPU, all[ours].CPU, false},
	} {
		r.Targets = append(r.Targets, judge(x.what, x.a, x.b, x.promised))
	}
	b.ReportMetric(r.Targets[0].Ratio, "of-throughput-by-hand")
	b.ReportMetric(r.Targets[1].Ratio, "of-octets/CPU-by-hand")
	b.ReportMetric(0, "ns/op")
	fmt.Print(r.table(all[hand]))
	if out := guest.Out(); out != "" {
		data, err := json.MarshalIndent(r, "", "  ")
		must(b, err)
		must(b, os.WriteFile(filepath.Join(out, "bench.json"), append(data, '\n'), 0o644))
	}
}

func judge(what string, ours, theirs []float64, promised bool) verdict {
	x := ratios(ours, theirs)
	v := verdict{What: what, Ratio: quantile(x, 0.5), Middle: [2]float64{quantile(x, 0.25), quantile(x, 0.75)},
		Verdict: "for the reader"}
	if promised {
		v.Wanted, v.Verdict = target, "missed"
		if v.Ratio >= target {
			v.Verdict = "met"
		}
	}
	return v
}

// table prints the report; base is what the ratios in it refer to.
func (r *report) table(base *measures) string {
	var s strings.Builder
	fmt.Fprintf(&s, "\nENCRYPTED NETWORK, in Linux %s, %d processor, %d rounds of %g s, medians\n%s\n\n", r.Kernel, r.CPUs,
		r.Rounds, r.Seconds, r.Emulated)
	t := tabwriter.NewWriter(&s, 2, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "datapath\tTCP Mbit/s\tof by hand\tCPU ns/octet\tof by hand\tTCP_RR/s\tof by hand\t")
	for _, m := range r.Paths {
		fmt.Fprintf(t, "%s\t%.0f\t%.2f\t%.1f\t%.2f\t%.0f\t%.2f\t\n", m.Who, median(m.Mbit),
			quantile(ratios(m.Mbit, base.Mbit), 0.5),
			median(m.CPU), quantile(ratios(m.CPU, base.CPU), 0.5), median(m.Exchanges),
			quantile(ratios(m.Exchanges, base.Exchanges), 0.5))
	}
	t.Flush()
	fmt.Fprintln(&s, "\nTARGETS (lariat's, the median of the rounds' ratios)")
	t = tabwriter.NewWriter(&s, 2, 8, 2, ' ', 0)
	fmt.Fprintln(t, "target\twanted\tmeasured\tmiddle half\tverdict")
	for _, v := range r.Targets {
		wanted := ""
		if v.Wanted > 0 {
			wanted = fmt.Sprintf("at least %g", v.Wanted)
		}
		fmt.Fprintf(t, "%s\t%s\t%.3f\t%.3f to %.3f\t%s\n", v.What, wanted, v.Ratio, v.Middle[0], v.Middle[1], v.Verdict)
	}
	t.Flush()
	return s.String()
}

// ratios of each round, sorted.
func ratios(a, b []float64) []float64 {
	out := make([]float64, len(a))
	for i := range a {
		out[i] = a[i] / b[i]
	}
	slices.Sort(out)
	return out
}

func median(x []float64) float64 {
	x = slices.Clone(x)
	slices.Sort(x)
	return quantile(x, 0.5)
}

// quantile of sorted values, interpolated between neighbours.
func quantile(sorted []float64, q float64) float64 {
	if len(sorted) == 0 {
		return math.NaN()
	}
	at := q * float64(len(sorted)-1)
	low := int(at)
	if low+1 >= len(sorted) {
		return sorted[low]
	}
	return sorted[low] + (at-float64(low))*(sorted[low+1]-sorted[low])
}

func text(b *testing.B, file string) string {
	b.Helper()
	data, err := os.ReadFile(file)
	must(b, err)
	return strings.TrimSpace(string(data))
}

func must(b *testing.B, err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// eventually tries until it is so.
func eventually(b *testing.B, what string, limit time.Duration, so func() bool) {
	b.Helper()
	again := time.NewTicker(50 * time.Millisecond)
	defer again.Stop()
	late := time.After(limit)
	for !so() {
		select {
		case <-late:
			b.Fatalf("not after %s: %s", limit, what)
		case <-again.C:
		}
	}
}
