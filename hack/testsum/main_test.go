package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestSummary(t *testing.T) {
	for _, tc := range []struct {
		name, in string
		ok       bool
		want     []string
		not      []string
	}{
		{"a passing package shows its tests and keeps their talk to itself", `
{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Test":"TestA","Output":"    a_test.go:1: chatter\n"}
{"Action":"output","Package":"p","Test":"TestA","Output":"Ran 3 of 3 Specs in 0.1 seconds\n"}
{"Action":"pass","Package":"p","Test":"TestA","Elapsed":0.25}
{"Action":"output","Package":"p","Output":"ok  \tp\t0.3s\n"}
{"Action":"pass","Package":"p","Elapsed":0.3}
`, true, []string{"--- PASS: TestA (0.25s)", "Ran 3 of 3 Specs", "ok  \tp", "1 passed, 0 failed, 0 skipped in 1 packages"}, []string{"chatter"}},
		{"a failing test says all it said", `
{"Action":"output","Package":"p","Test":"TestB","Output":"    b_test.go:1: broken\n"}
{"Action":"fail","Package":"p","Test":"TestB","Elapsed":0.1}
{"Action":"fail","Package":"p","Elapsed":0.1}
`, false, []string{"broken", "== FAILED:", "p TestB", "0 passed, 1 failed"}, nil},
		{"a skip gives its reason", `
{"Action":"output","Package":"p","Test":"TestC","Output":"=== RUN   TestC\n"}
{"Action":"output","Package":"p","Test":"TestC","Output":"    c_test.go:9: needs root\n"}
{"Action":"output","Package":"p","Test":"TestC","Output":"--- SKIP: TestC (0.00s)\n"}
{"Action":"skip","Package":"p","Test":"TestC"}
`, true, []string{"p TestC: needs root", "1 skipped"}, nil},
		{"a package that does not build fails the run", `
{"ImportPath":"p","Action":"build-output","Output":"x.go:1: undefined\n"}
{"ImportPath":"p","Action":"build-fail"}
`, false, []string{"undefined", "p (does not build)"}, nil},
		{"a crash shows the test that never ended", `
{"Action":"output","Package":"p","Test":"TestD","Output":"panic: boom\n"}
{"Action":"fail","Package":"p","Elapsed":0.1}
`, false, []string{"panic: boom"}, nil},
		{"a go command that failed without a word fails the run", `{"Action":"command-failed"}`, false,
			[]string{"go test itself"}, nil},
		{"what is not JSON is shown", "go: no such tool\n", true, []string{"go: no such tool"}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var out bytes.Buffer
			s := newSummary(&out)
			if err := s.read(strings.NewReader(strings.TrimPrefix(tc.in, "\n"))); err != nil {
				t.Fatal(err)
			}
			if ok := s.print(); ok != tc.ok {
				t.Errorf("all well = %t, want %t", ok, tc.ok)
			}
			for _, w := range tc.want {
				if !strings.Contains(out.String(), w) {
					t.Errorf("%q is missing in\n%s", w, out.String())
				}
			}
			for _, w := range tc.not {
				if strings.Contains(out.String(), w) {
					t.Errorf("%q should not be in\n%s", w, out.String())
				}
			}
		})
	}
}
