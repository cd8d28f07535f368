// Package doctor finds out why a host's network does not work, and says what to do about it.
//
// Gather collects facts: it asks the metadata service and the network manager, reads the kernel, and probes
// the other hosts. It changes nothing. Check is pure and turns facts into findings, so that each finding has
// a test that needs no broken host.
package doctor

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"
)

// Severity of a finding.
type Severity string

// An error breaks something now; a warning will, or does for some.
const (
	Warning Severity = "warning"
	Error   Severity = "error"
)

// Finding is one thing that is wrong.
type Finding struct {
	Check    string   `json:"check"`
	Severity Severity `json:"severity"`
	What     string   `json:"what"`
	Where    string   `json:"where"`
	Remedy   string   `json:"remedy"`
}

// Skipped is a check that could not be made.
type Skipped struct {
	Check string `json:"check"`
	Why   string `json:"why"`
}

// Passed is a check that found nothing.
type Passed struct {
	Check string `json:"check"`
	What  string `json:"what"`
}

// Report is the outcome of a check-up. Errors stand before warnings.
type Report struct {
	Findings []Finding `json:"findings"`
	Skipped  []Skipped `json:"skipped"`
	Passed   []Passed  `json:"passed"`
}

// ExitStatus is 1 when there is an error, else 2 when something could not be checked, else 0.
func (r *Report) ExitStatus() int {
	switch {
	case slices.ContainsFunc(r.Findings, func(f Finding) bool { return f.Severity == Error }):
		return 1
	case len(r.Skipped) > 0:
		return 2
	}
	return 0
}

// checkContext is one check under way.
type checkContext struct {
	*Facts
	name    string
	report  *Report
	found   []Finding
	skipped bool
}

func (e *checkContext) add(s Severity, where, remedy, format string, a ...any) {
	e.found = append(e.found, Finding{Check: e.name, Severity: s, What: fmt.Sprintf(format, a...), Where: where,
		Remedy: remedy})
}

func (e *checkContext) skip(format string, a ...any) {
	e.skipped = true
	e.report.Skipped = append(e.report.Skipped, Skipped{Check: e.name, Why: fmt.Sprintf(format, a...)})
}

// needs skips the check when a group of facts is absent, and reports whether to go on.
func (e *checkContext) needs(group string, there bool) bool {
	if !there {
		e.skip("%s", cmp.Or(e.Unavailable[group], group+" was not looked at"))
	}
	return there
}

func (e *checkContext) needsSnapshot() bool {
	return e.needs("metadata", e.Metadata != nil && e.Metadata.Snapshot != nil)
}

// Check turns facts into findings. With names it makes these checks only.
func Check(f *Facts, names ...string) *Report { return confirm(f, nil, names) }

// confirm is Check without the findings that an earlier look did not make at the same place; nil: there was none.
func confirm(f *Facts, before *Report, names []string) *Report {
	r := &Report{Findings: []Finding{}, Skipped: []Skipped{}, Passed: []Passed{}}
	for _, c := range checks {
		if len(names) > 0 && !slices.Contains(names, c.name) {
			continue
		}
		e := &checkContext{Facts: f, name: c.name, report: r}
		c.run(e)
		if before != nil {
			e.found = slices.DeleteFunc(e.found, func(f Finding) bool {
				return !slices.ContainsFunc(before.Findings, func(b Finding) bool {
					return b.Check == f.Check &&
						b.Where == f.Where
				})
			})
		}
		r.Findings = append(r.Findings, e.found...)
		if len(e.found) == 0 && !e.skipped {
			r.Passed = append(r.Passed, Passed{Check: c.name, What: c.good})
		}
	}
	// error < warning
	slices.SortStableFunc(r.Findings, func(a, b Finding) int { return cmp.Compare(a.Severity, b.Severity) })
	return r
}

// A change of the model, an ADD or a DEL may be under way, which facts show at different times.
const (
	settle = time.Second // until another look
	looks  = 3           // at most
)

// CheckUp gathers facts and checks them, and looks again while it finds something that it did not find before: a
// finding counts when two looks in a row make it, at the same place. With names it makes these checks only.
func (g Gatherer) CheckUp(ctx context.Context, names ...string) *Report {
	return checkUp(ctx, g.Gather, names)
}

func checkUp(ctx context.Context, gather func(context.Context) *Facts, names []string) *Report {
	facts := gather(ctx)
	before := Check(facts, names...)
	for look := 2; len(before.Findings) > 0; look++ {
		t := time.NewTimer(settle)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return before
		}
		again := gather(ctx)
		if ctx.Err() != nil {
			return before // what was not answered in time is no fact
		}
		now, differ := Check(again, names...), again.Disagreements
		again.Disagreements = both(facts.Disagreements, differ)
		if r := confirm(again, before, names); len(r.Findings) == len(now.Findings) || look == looks {
			return r
		}
		again.Disagreements, facts, before = differ, again, now
	}
	return before
}

// both returns what is in two lists; nil where one of them was not made.
func both(a, b []string) []string {
	if a == nil || b == nil {
		return nil
	}
	return slices.DeleteFunc(slices.Clone(b), func(s string) bool { return !slices.Contains(a, s) })
}

// Names lists the checks, with what each says when all is well.
func Names() []Passed {
	out := make([]Passed, len(checks))
	for i, c := range checks {
		out[i] = Passed{c.name, c.good}
	}
	return out
}
