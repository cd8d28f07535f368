// Command testsum reads the output of "go test -json" and prints what a person wants of it as it comes: one line for
// each top-level test and package, everything a failed test said, why a test skipped, and a summary at the end.
//
// It exits with 1 when anything failed.
package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"
)

// event is a line of "go test -json"; see "go doc test2json" and "go help buildjson".
type event struct {
	Action     string
	Package    string
	ImportPath string // of build-output and build-fail
	Test       string
	Elapsed    float64
	Output     string
}

type key struct{ pkg, test string }

type timed struct {
	name    string
	elapsed float64
}

// summary is what has been seen so far.
type summary struct {
	out                     io.Writer
	held                    map[key][]string // output of tests whose end has not come yet
	passed, failed, skipped int
	packages, badPackages   int
	failures, skips         []string
	slowest                 []timed
	start                   time.Time
}

func main() {
	s := newSummary(os.Stdout)
	if err := s.read(os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, "testsum:", err)
		os.Exit(1)
	}
	if !s.print() {
		os.Exit(1)
	}
}

func newSummary(out io.Writer) *summary {
	return &summary{out: out, held: map[key][]string{}, start: time.Now()}
}

func (s *summary) read(r io.Reader) error {
	in := bufio.NewScanner(r)
	in.Buffer(make([]byte, 1<<20), 64<<20)
	for in.Scan() {
		var e event
		if json.Unmarshal(in.Bytes(), &e) != nil {
			fmt.Fprintln(s.out, in.Text()) // the go command's own words
			continue
		}
		s.add(e)
	}
	return in.Err()
}

// kept are lines of a passing test that are worth seeing: what a ginkgo suite ran.
var kept = regexp.MustCompile(`^(\x1b\[[0-9;]*m)*Ran \d+ of \d+ Specs|^(\x1b\[[0-9;]*m)*(SUCCESS|FAIL)!`)

func (s *summary) add(e event) {
	k := key{e.Package, e.Test}
	switch e.Action {
	case "build-output":
		fmt.Fprint(s.out, e.Output)
	case "build-fail":
		s.failures = append(s.failures, e.ImportPath+" (does not build)")
		s.badPackages++
	case "command-failed":
		if s.failed == 0 && s.badPackages == 0 {
			s.failures = append(s.failures, "go test itself")
			s.badPackages++
		}
	case "output":
		switch {
		case e.Test == "" && (strings.HasPrefix(e.Output, "ok ") || strings.HasPrefix(e.Output, "FAIL")):
			fmt.Fprint(s.out, e.Output)
		case e.Test == "" && e.Output == "PASS\n":
		default:
			if kept.MatchString(e.Output) {
				fmt.Fprint(s.out, "    ", e.Output)
			}
			s.held[k] = append(s.held[k], e.Output)
		}
	case "pass", "fail", "skip":
		s.end(k, e)
	}
}

// end takes the last event of a test, or of a package when the test has no name.
func (s *summary) end(k key, e event) {
	output := s.held[k]
	delete(s.held, k)
	if k.test == "" {
		s.packages++
		if e.Action == "fail" {
			s.badPackages++
			s.flush(k.pkg) // a crash or a timeout: the tests that were running never ended
			fmt.Fprint(s.out, strings.Join(output, ""))
			s.failures = append(s.failures, k.pkg)
		}
		return
	}
	top := !strings.Contains(k.test, "/")
	switch e.Action {
	case "pass":
		s.passed++
		if top {
			fmt.Fprintf(s.out, "--- PASS: %s (%.2fs)\n", k.test, e.Elapsed)
			s.slowest = append(s.slowest, timed{short(k.pkg) + " " + k.test, e.Elapsed})
		}
	case "skip":
		s.skipped++
		s.skips = append(s.skips, short(k.pkg)+" "+k.test+": "+reason(output))
	case "fail":
		s.failed++
		s.failures = append(s.failures, short(k.pkg)+" "+k.test)
		fmt.Fprint(s.out, strings.Join(output, ""))
	}
}

// flush prints the output of tests of a package that never ended.
func (s *summary) flush(pkg string) {
	for k, lines := range s.held {
		if k.pkg == pkg && k.test != "" {
			fmt.Fprint(s.out, strings.Join(lines, ""))
			delete(s.held, k)
		}
	}
}

// reason is what a test said when it skipped.
func reason(output []string) string {
	for _, line := range slices.Backward(output) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "--- SKIP") || strings.HasPrefix(line, "=== ") {
			continue
		}
		if _, text, ok := strings.Cut(line, ".go:"); ok {
			_, text, _ = strings.Cut(text, ": ")
			return text
		}
		return line
	}
	return "no reason given"
}

func short(pkg string) string {
	return strings.TrimPrefix(pkg, "github.com/lariat-net/lariat/")
}

// print ends the report, and says whether all is well.
func (s *summary) print() bool {
	slices.SortFunc(s.slowest, func(a, b timed) int { return cmp.Compare(b.elapsed, a.elapsed) })
	if n := min(5, len(s.slowest)); n > 0 {
		fmt.Fprintln(s.out, "== slowest:")
		for _, t := range s.slowest[:n] {
			fmt.Fprintf(s.out, "   %6.1fs  %s\n", t.elapsed, t.name)
		}
	}
	if len(s.skips) > 0 {
		fmt.Fprintln(s.out, "== skipped:")
		for _, t := range s.skips {
			fmt.Fprintln(s.out, "  ", t)
		}
	}
	if len(s.failures) > 0 {
		fmt.Fprintln(s.out, "== FAILED:")
		for _, t := range s.failures {
			fmt.Fprintln(s.out, "  ", t)
		}
	}
	fmt.Fprintf(s.out, "== tests: %d passed, %d failed, %d skipped in %d packages, %.0f s\n",
		s.passed, s.failed, s.skipped, s.packages, time.Since(s.start).Seconds())
	return len(s.failures) == 0
}
