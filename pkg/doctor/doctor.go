// Package doctor finds the causes of a host's network problems, and names a remedy for each.
//
// Gather collects facts: it asks the metadata service and the network manager, reads the kernel,
// and probes the other hosts. It changes no configuration. Check is pure and turns facts into
// findings. So the test of a finding needs no broken host.
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

// An error breaks something now. A warning will break something, or breaks it for some.
const (
	Warning Severity = "warning"
	Error   Severity = "error"
)

// A Finding is one fault.
type Finding struct {
	Check    string   `json:"check"`
	Severity Severity `json:"severity"`
	What     string   `json:"what"`
	Where    string   `json:"where"`
	Remedy   string   `json:"remedy"`
}

// Skipped is a check that could not run.
type Skipped struct {
	Check string `json:"check"`
	Why   string `json:"why"`
}

// Passed is a check without findings.
type Passed struct {
	Check string `json:"check"`
	What  string `json:"what"`
}

// Report is the outcome of a check-up. Errors come before warnings.
type Report struct {
	Findings []Finding `json:"findings"`
	Skipped  []Skipped `json:"skipped"`
	Passed   []Passed  `json:"passed"`
}

// ExitStatus returns 1 when there is an error, else 2 when a check was skipped, else 0.
func (r *Report) ExitStatus() int {
	switch {
	case slices.ContainsFunc(r.Findings, func(f Finding) bool { return f.Severity == Error }):
		return 1
	case len(r.Skipped) > 0:
		return 2
	}
	return 0
}

// A checkContext is one check in progress.
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

// needs reports whether a group of facts is present. It skips the check when the group is absent.
func (e *checkContext) needs(group string, there bool) bool {
	if !there {
		e.skip("%s", cmp.Or(e.Unavailable[group], group+" was not looked at"))
	}
	return there
}

func (e *checkContext) needsSnapshot() bool {
	return e.needs("metadata", e.Metadata != nil && e.Metadata.Snapshot != nil)
}

// Check turns facts into findings. With names it runs only these checks.
func Check(f *Facts, names ...string) *Report { return confirm(f, nil, names) }

// confirm is Check without findings that the earlier report lacks at the same place. With a nil
// report it keeps all findings.
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

// A change of the model, an ADD or a DEL may be in progress. Facts may show it at different times.
const (
	settle = time.Second // until the facts are gathered again
	looks  = 3           // at most
)

// CheckUp gathers facts and checks them. It repeats this while it makes a new finding. A finding
// counts when two rounds in a row make it at the same place. With names it runs only these checks.
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
			return before // an answer that was cut off is no fact
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

// both returns the elements of both lists, or nil when one list is nil.
func both(a, b []string) []string {
	if a == nil || b == nil {
		return nil
	}
	return slices.DeleteFunc(slices.Clone(b), func(s string) bool { return !slices.Contains(a, s) })
}

// Names lists the checks, with the text of each when it finds nothing.
func Names() []Passed {
	out := make([]Passed, len(checks))
	for i, c := range checks {
		out[i] = Passed{c.name, c.good}
	}
	return out
}
