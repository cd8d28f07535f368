package main

import (
	"os"
	"strings"
	"testing"
)

// TestKEEPWithoutATerminal: standard input that is at its end from the start ends nothing.
func TestKEEPWithoutATerminal(t *testing.T) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	w.Close()
	for _, f := range []*os.File{null, r} {
		if until, enter := end(f); enter || !strings.Contains(until, "SIGINT") {
			t.Errorf("%s: it ends when %s", f.Name(), until)
		}
	}
	terminal, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skip(err)
	}
	defer terminal.Close()
	if until, enter := end(terminal); !enter || !strings.Contains(until, "Enter") {
		t.Errorf("a terminal: it ends when %s", until)
	}
}
