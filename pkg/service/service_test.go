package service

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// folder has a path that is short enough for a socket's.
func folder(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "s")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// TestOneAtATime: of many that want a socket whose last holder was killed, one gets it, and the others are
// told who that is.
func TestOneAtATime(t *testing.T) {
	path := filepath.Join(folder(t), "new", "x.sock")
	for round := range 20 {
		var wg sync.WaitGroup
		var lock sync.Mutex
		var got []*Socket
		for range 8 {
			wg.Go(func() {
				l, err := Listen(path)
				lock.Lock()
				defer lock.Unlock()
				switch {
				case err == nil:
					got = append(got, l)
				case !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "serves it already"):
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if len(got) != 1 {
			t.Fatalf("round %d: %d got it", round, len(got))
		}
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
			t.Fatalf("%v %v", st, err)
		}
		if _, err := Listen(path); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("process id %d", os.Getpid())) {
			t.Error(err)
		}
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		if round%2 == 0 { // killed: the kernel closes what it had open, and the socket's file stays
			if err := errors.Join(got[0].Listener.Close(), got[0].lock.Close()); err != nil {
				t.Fatal(err)
			}
		} else if err := got[0].Close(); err != nil {
			t.Fatal(err)
		}
		for _, file := range []string{path, path + ".lock"} { // a clean end leaves neither
			if _, err := os.Stat(file); (err == nil) != (round%2 == 0) {
				t.Errorf("round %d: %s: %v", round, file, err)
			}
		}
	}
}

// TestHandedOver: a socket goes from hand to hand, and at no time do two have it.
func TestHandedOver(t *testing.T) {
	path := filepath.Join(folder(t), "x")
	var have atomic.Int32
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for got := 0; got < 50; {
				l, err := Listen(path)
				if err != nil {
					if !strings.Contains(err.Error(), "serves it") {
						t.Error(err)
						return
					}
					continue
				}
				got++
				if n := have.Add(1); n != 1 {
					t.Errorf("%d have it", n)
				}
				have.Add(-1)
				if err := l.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

// TestForeignSocket: what another program serves is left alone, and a second Close takes nothing from who came next.
func TestForeignSocket(t *testing.T) {
	path := filepath.Join(folder(t), "x")
	first, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	first.Close()
	other, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	first.Close()
	if _, err := Listen(path); err == nil || !strings.Contains(err.Error(), "another program serves it") {
		t.Error(err)
	}
	if _, err := os.Stat(path + ".lock"); err == nil {
		t.Error("the lock's file stays of one that gave up")
	}
	if c, err := net.Dial("unix", path); err != nil {
		t.Error(err)
	} else {
		c.Close()
	}
}

// TestSystemd: ready once, then alive at half the unit's interval for as long as it is so, and the end.
func TestSystemd(t *testing.T) {
	path := filepath.Join(folder(t), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", "20000")
	t.Setenv("WATCHDOG_PID", fmt.Sprint(os.Getpid()))
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	asked := make(chan bool)
	ready(ctx, func() bool { return <-asked })
	next := func() string {
		t.Helper()
		buf := make([]byte, 100)
		if err := l.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		n, err := l.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		return string(buf[:n])
	}
	if got := next(); got != "READY=1" {
		t.Error(got)
	}
	asked <- true
	if got := next(); got != "WATCHDOG=1" {
		t.Error(got)
	}
	asked <- false // nothing is sent
	asked <- false
	stopping()
	if got := next(); got != "STOPPING=1" {
		t.Error(got)
	}
}
