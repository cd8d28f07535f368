package ike

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/certs"
)

// TestF44_CharonThatDies checks that the error has the last lines of the log.
// The retry has back-off.
func TestF44_CharonThatDies(t *testing.T) {
	dir := t.TempDir()
	script := filepath.Join(dir, "charon-systemd")
	if err := os.WriteFile(script, []byte("#!/bin/sh\necho no socket to be had >&2\nexit 3\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	gone := make(chan struct{}, 9)
	c := &Charon{Path: script, Dir: filepath.Join(dir, "run"), Port: 50500, PortNATT: 54500,
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)), OnExit: func() { gone <- struct{}{} }}
	err := c.Ensure(t.Context())
	if err == nil || !strings.Contains(err.Error(), "no socket to be had") {
		t.Fatalf("%v", err)
	}
	<-gone
	err = c.Ensure(t.Context())
	if err == nil || !strings.Contains(err.Error(), "exit status 3") ||
		!strings.Contains(err.Error(), "no socket to be had") || !strings.Contains(err.Error(), "started again in") {
		t.Errorf("%v", err)
	}
	if c.Running() || c.Pid() != 0 {
		t.Error("runs")
	}
	if err := c.Stop(context.Background()); err != nil {
		t.Error(err)
	}
	for range 20 {
		c.short++
		c.started = time.Now()
		if wait, _ := c.backOff(); wait > 30*time.Second || wait < 250*time.Millisecond {
			t.Errorf("after %d: %s", c.short, wait)
		}
	}
}

// TestF44_OneCharonOnly checks that Ensure waits for a charon that has the lock but no answer yet.
// Ensure starts no other charon.
func TestF44_OneCharonOnly(t *testing.T) {
	c := &Charon{Path: "/nonexistent/charon", Dir: t.TempDir()}
	lock, err := c.lock()
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	other := &Charon{Path: "/nonexistent/charon", Dir: c.Dir, Port: 50500, PortNATT: 54500,
		Prepare: func(context.Context) error { return errors.New("there is one") }}
	if !other.Running() {
		t.Error("does not run")
	}
	if err := other.Ensure(ctx); err == nil || !strings.Contains(err.Error(), "does not listen") {
		t.Errorf("%v", err)
	}
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	prepared := 0
	other.Prepare = func(context.Context) error {
		if prepared++; !other.Running() {
			t.Error("another could be started beside")
		}
		return nil
	}
	if err := other.Ensure(t.Context()); err == nil || !strings.Contains(err.Error(), "/nonexistent/charon") ||
		prepared != 1 {
		t.Errorf("%v, prepared %d times", err, prepared)
	}
	other.Prepare = func(context.Context) error { return errors.New("not now") }
	if err := other.Ensure(t.Context()); err == nil || !strings.HasSuffix(err.Error(), "started: not now") {
		t.Errorf("%v", err)
	}
}

// TestF44_PortTaken checks the error for a port in use.
// charon would run without the port and receive nothing.
func TestF44_PortTaken(t *testing.T) {
	l, err := net.ListenUDP("udp", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c := &Charon{Path: "/nonexistent/charon", Dir: t.TempDir(), Port: uint16(l.LocalAddr().(*net.UDPAddr).Port)}
	if err := c.Ensure(t.Context()); err == nil || !strings.Contains(err.Error(), "taken by another IKE daemon") {
		t.Errorf("%v", err)
	}
}

// TestLogIsTrimmed checks that the newer half of a large log remains.
func TestLogIsTrimmed(t *testing.T) {
	c := &Charon{Dir: t.TempDir()}
	if err := os.WriteFile(c.LogFile(), []byte(strings.Repeat("a line\n", maxLog/7+1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.trimLog(); err != nil {
		t.Fatal(err)
	}
	now, err := os.Stat(c.LogFile())
	old, err2 := os.ReadFile(c.LogFile() + ".1")
	if err != nil || err2 != nil || now.Size() != 0 || len(old) > maxLog/2+8 ||
		!strings.HasPrefix(string(old), "a line\n") {
		t.Errorf("%v %v, %d octets, %d beside", err, err2, now.Size(), len(old))
	}
}

// TestConfigGolden checks charon's configuration against its golden file.
func TestConfigGolden(t *testing.T) {
	got := (&Charon{Port: 5500}).config()
	const golden = "testdata/strongswan.conf"
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("differs from %s (make update/golden rewrites it):\n%s", golden, got)
	}
}

// TestF143_LoadCertificates checks that LoadCertificates reads the output of "lariat certs".
// Errors name the faults of a directory.
func TestF143_LoadCertificates(t *testing.T) {
	pki := t.TempDir()
	now := time.Now()
	if _, err := certs.Init(pki, "test", now); err != nil {
		t.Fatal(err)
	}
	for _, h := range []string{"h1", "h2"} {
		if _, err := certs.Host(pki, certs.Request{Name: h}, now); err != nil {
			t.Fatal(err)
		}
	}
	read := func(name string) []byte {
		b, err := os.ReadFile(filepath.Join(pki, name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for _, tc := range []struct {
		name  string
		files map[string][]byte
		mode  os.FileMode
		want  string
	}{
		{"good", map[string][]byte{"ca.crt": read("ca.crt"), "h1.crt": read("h1.crt"), "h1.key": read("h1.key")}, 0o600, ""},
		{"the authority's key beside it", map[string][]byte{"ca.crt": read("ca.crt"), "ca.key": read("ca.key"),
			"h1.crt": read("h1.crt"), "h1.key": read("h1.key")}, 0o600, ""},
		{"no authority", map[string][]byte{"h1.crt": read("h1.crt"), "h1.key": read("h1.key")}, 0o600, "ca.crt"},
		{"no key", map[string][]byte{"ca.crt": read("ca.crt"), "h1.crt": read("h1.crt")}, 0o600, "holds 0 keys"},
		{"two keys", map[string][]byte{"ca.crt": read("ca.crt"), "h1.key": read("h1.key"), "h2.key": read("h2.key")}, 0o600,
			"holds 2 keys"},
		{"another's key", map[string][]byte{"ca.crt": read("ca.crt"), "h1.crt": read("h1.crt"), "h1.key": read("h2.key")},
			0o600, "not the key of the certificate"},
		{"open to all", map[string][]byte{"ca.crt": read("ca.crt"), "h1.crt": read("h1.crt"), "h1.key": read("h1.key")},
			0o644, "chmod 600"},
		{"no PEM", map[string][]byte{"ca.crt": read("ca.crt"), "h1.crt": []byte("x"), "h1.key": read("h1.key")}, 0o600,
			"no certificate in PEM"},
	} {
		dir := t.TempDir()
		for name, content := range tc.files {
			if err := os.WriteFile(filepath.Join(dir, name), content, tc.mode); err != nil {
				t.Fatal(err)
			}
		}
		c, err := LoadCertificates(dir)
		switch {
		case tc.want == "" && (err != nil || len(c.Certificate) != 1 || len(c.CAs) != 1 || len(c.Key) == 0):
			t.Errorf("%s: %v %v", tc.name, c, err)
		case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
			t.Errorf("%s: %v, want %q", tc.name, err, tc.want)
		}
	}
}
