package main

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"
)

// report is what a run found.
type report struct {
	start time.Time

	mu     sync.Mutex
	counts map[string]*count
	faults []string
	slow   map[string]time.Duration // the longest of each thing that is waited for
	rows   [][]string               // of the table of what was there at the start and is at the end
}

// count is of one kind of operation.
type count struct{ done, refused, failed int }

func newReport() *report {
	return &report{start: time.Now(), counts: map[string]*count{}, slow: map[string]time.Duration{}}
}

func (r *report) age() time.Duration { return time.Since(r.start).Round(time.Millisecond) }

func (r *report) printf(format string, a ...any) { fmt.Printf(format+"\n", a...) }

// fault notes what must not be, and says so at once.
func (r *report) fault(format string, a ...any) {
	text := fmt.Sprintf(format, a...)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faults = append(r.faults, text)
	if len(r.faults) <= 100 {
		fmt.Printf("FAULT [%s] %s\n", r.age(), text)
	}
}

// did counts an operation. One that failed had a reason or is a fault.
func (r *report) did(what string, err error, reason string) {
	r.mu.Lock()
	c := r.counts[what]
	if c == nil {
		c = &count{}
		r.counts[what] = c
	}
	switch {
	case err == nil:
		c.done++
	case reason != "":
		c.refused++
	default:
		c.failed++
	}
	r.mu.Unlock()
	if err != nil && reason == "" {
		r.fault("%s: %v", what, err)
	}
}

// took keeps the longest that something took.
func (r *report) took(what string, d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.slow[what] = max(r.slow[what], d)
}

// row is a line of the table.
func (r *report) row(cells ...string) { r.rows = append(r.rows, cells) }

// print returns the number of faults.
func (r *report) print() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\noperation\tdone\trefused, with a reason\tfailed")
	for _, what := range slices.Sorted(maps.Keys(r.counts)) {
		c := r.counts[what]
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\n", what, c.done, c.refused, c.failed)
	}
	fmt.Fprintln(w)
	for _, what := range slices.Sorted(maps.Keys(r.slow)) {
		fmt.Fprintf(w, "longest: %s\t%s\n", what, r.slow[what].Round(time.Millisecond))
	}
	fmt.Fprintln(w)
	for _, row := range r.rows {
		fmt.Fprintln(w, strings.Join(row, "\t"))
	}
	w.Flush()
	if len(r.faults) == 0 {
		fmt.Println("\nsoak: nothing lost, nothing left, nothing grown")
	} else {
		fmt.Printf("\nsoak: %d faults, in the order in which they were found:\n", len(r.faults))
		for _, f := range r.faults[:min(len(r.faults), 200)] {
			fmt.Println("  " + strings.ReplaceAll(f, "\n", "\n    "))
		}
	}
	return len(r.faults)
}
