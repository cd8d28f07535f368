package main

import (
	"cmp"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// series is what was measured of one contender in one scenario: many samples of one operation.
type series struct {
	Section  string  `json:"section"`  // cni, reconcile, datapath, start
	Scenario string  `json:"scenario"` // what was the same for all contenders of a comparison
	Who      string  `json:"who"`
	Op       string  `json:"op"`
	Unit     string  `json:"unit"`
	N        int     `json:"n"`
	P50      float64 `json:"p50"`
	P95      float64 `json:"p95"`
	Min      float64 `json:"min"`
	CPU      float64 `json:"cpu,omitempty"`    // ms of all processes that worked for one operation, daemons included
	Faults   float64 `json:"faults,omitempty"` // page faults of the processes that one operation started
	Rate     float64 `json:"rate,omitempty"`   // operations a second, of a whole batch: the median of the rounds
	Errors   int     `json:"errors,omitempty"`
	FirstErr string  `json:"firstError,omitempty"`

	samples []float64
	inOrder []float64 // the samples as they were taken, one each round; kept for datapath
	cpu     time.Duration
	faults  int
	rates   []float64
}

func (s *series) add(v float64) { s.samples = append(s.samples, v) }

func (s *series) addTime(d time.Duration) { s.add(float64(d) / float64(time.Millisecond)) }

func (s *series) pay(c cost) {
	s.cpu += c.cpu
	s.faults += c.faults
}

func (s *series) fail(err error) {
	s.Errors++
	if s.FirstErr == "" {
		s.FirstErr = err.Error()
	}
}

// finish derives the figures.
func (s *series) finish() {
	s.inOrder = slices.Clone(s.samples)
	slices.Sort(s.samples)
	s.N = len(s.samples)
	if s.N == 0 {
		s.P50, s.P95 = 0, 0
		return
	}
	s.P50, s.P95, s.Min = quantile(s.samples, 0.5), quantile(s.samples, 0.95), s.samples[0]
	s.CPU = float64(s.cpu) / float64(time.Millisecond) / float64(s.N)
	s.Faults = float64(s.faults) / float64(s.N)
	if len(s.rates) > 0 {
		slices.Sort(s.rates)
		s.Rate = quantile(s.rates, 0.5)
	}
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

// report is everything that was measured, and what was not and why.
type report struct {
	Machine machine   `json:"machine"`
	Series  []*series `json:"series"`
	Targets []verdict `json:"targets"`
	Notes   []string  `json:"notes,omitempty"`
}

type machine struct {
	Kernel  string  `json:"kernel"`
	CPUs    int     `json:"cpus"`
	Go      string  `json:"go"`
	Store   string  `json:"store"` // file system that state was kept on
	Load    string  `json:"load"`
	Seconds float64 `json:"seconds"`
	Quick   bool    `json:"quick,omitempty"`
}

func (r *report) add(s ...*series) {
	for _, x := range s {
		x.finish()
		r.Series = append(r.Series, x)
	}
}

func (r *report) note(format string, a ...any) {
	r.Notes = append(r.Notes, fmt.Sprintf(format, a...))
}

// find returns the series that the key names, or nil.
func (r *report) find(k seriesKey) *series {
	for _, s := range r.Series {
		if s.Section == k.Section && s.Scenario == k.Scenario && s.Who == k.Who && s.Op == k.Op && s.N > 0 {
			return s
		}
	}
	return nil
}

type seriesKey struct{ Section, Scenario, Who, Op string }

// print writes one table for each section, scenarios in the order in which they ran.
func (r *report) print(w io.Writer) {
	var sections []string
	for _, s := range r.Series {
		if !slices.Contains(sections, s.Section) {
			sections = append(sections, s.Section)
		}
	}
	for _, section := range sections {
		fmt.Fprintf(w, "\n%s\n", strings.ToUpper(section))
		t := tabwriter.NewWriter(w, 2, 8, 2, ' ', tabwriter.AlignRight)
		fmt.Fprintln(t, "scenario\top\twho\tn\tp50\tp95\tmin\tunit\tCPU ms\trate/s\tof ours\terrors\t")
		rows := slices.Clone(r.Series)
		rows = slices.DeleteFunc(rows, func(s *series) bool { return s.Section != section })
		order := map[string]int{}
		for i, s := range rows {
			if k := s.Scenario + "\x00" + s.Op; order[k] == 0 {
				order[k] = i + 1
			}
		}
		slices.SortStableFunc(rows, func(a, b *series) int {
			return cmp.Compare(order[a.Scenario+"\x00"+a.Op], order[b.Scenario+"\x00"+b.Op])
		})
		for _, s := range rows {
			ratio := ""
			if ours := r.find(seriesKey{section, s.Scenario, oursName, s.Op}); ours != nil && s.N > 0 && s.Who != oursName &&
				ours.P50 > 0 {
				ratio = fmt.Sprintf("%.2f", s.P50/ours.P50)
			}
			errs := ""
			if s.Errors > 0 {
				errs = fmt.Sprint(s.Errors)
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t\n", s.Scenario, s.Op, s.Who, s.N,
				number(s.P50), number(s.P95), number(s.Min), s.Unit, optional(s.CPU), optional(s.Rate), ratio, errs)
		}
		t.Flush()
	}
	for _, s := range r.Series {
		if s.FirstErr != "" {
			fmt.Fprintf(w, "\n%s %s %s %s: %d errors, the first: %s\n", s.Section, s.Scenario, s.Op, s.Who, s.Errors, s.FirstErr)
		}
	}
	if len(r.Targets) > 0 {
		fmt.Fprintln(w, "\nTARGETS")
		t := tabwriter.NewWriter(w, 2, 8, 2, ' ', 0)
		fmt.Fprintln(t, "target\twanted\tmeasured\tours\ttheirs\tverdict")
		for _, v := range r.Targets {
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", v.What, v.Wanted, v.Measured, v.Ours, v.Theirs, v.Verdict)
		}
		t.Flush()
	}
	if len(r.Notes) > 0 {
		fmt.Fprintln(w, "\nNOTES")
		for _, n := range r.Notes {
			fmt.Fprintln(w, " ", n)
		}
	}
}

func number(v float64) string {
	switch {
	case v == 0:
		return "0"
	case math.Abs(v) < 1:
		return fmt.Sprintf("%.3f", v)
	case math.Abs(v) < 100:
		return fmt.Sprintf("%.2f", v)
	default:
		return fmt.Sprintf("%.0f", v)
	}
}

func optional(v float64) string {
	if v == 0 {
		return ""
	}
	return number(v)
}
