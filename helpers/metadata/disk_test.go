package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
)

// inMountNamespace runs the test again where it may mount, as an ordinary user too.
func inMountNamespace(t *testing.T) bool {
	t.Helper()
	const inside = "LARIAT_METADATA_TEST_INSIDE"
	if os.Getenv(inside) == t.Name() {
		return true
	}
	if err := exec.Command("unshare", "-Urm", "true").Run(); err != nil {
		if strings.Contains(","+os.Getenv("REQUIRE")+",", ",userns,") {
			t.Fatalf("user namespaces are required: %v", err)
		}
		t.Skipf("needs user namespaces: %v", err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command("unshare", "-Urm", self, "-test.run=^"+t.Name()+"$", "-test.v")
	c.Env = append(os.Environ(), inside+"="+t.Name())
	out, err := c.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS") {
		t.Errorf("%v\n%s", err, out)
	}
	return false
}

func TestDiskFullIsNamedAndLosesNothing(t *testing.T) {
	if !inMountNamespace(t) {
		return
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	dir := shortDir(t)
	data := filepath.Join(dir, "etcd")
	t.Cleanup(func() { syscall.Unmount(data, syscall.MNT_DETACH) }) //nolint:errcheck // so that the folder can be removed
	mount := func(size string) {
		t.Helper()
		if err := os.MkdirAll(data, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Mount("tmpfs", data, "tmpfs", 0, "size="+size); err != nil {
			t.Fatal(err)
		}
	}
	mount("40m")
	out, err := program(identity(dir, "a")...).CombinedOutput()
	if err == nil || !strings.Contains(string(out), data) || !strings.Contains(string(out), "MiB free") {
		t.Errorf("too small from the start: %v: %s", err, out)
	}
	if err := syscall.Unmount(data, 0); err != nil {
		t.Fatal(err)
	}

	mount("400m")
	p := start(t, dir, "a").ready(t)
	want := map[string]metadata.AttachmentAddress{}
	take := func(n int) error {
		for range n {
			id := fmt.Sprint("c", len(want))
			a, err := p.Attach(ctx, "lan", metadata.AttachRequest{ContainerID: id, IfName: "eth0", Create: lan})
			if err != nil {
				return err
			}
			want[id] = a.Addresses[0]
		}
		return nil
	}
	if err := take(200); err != nil {
		t.Fatal(err)
	}
	filler := filepath.Join(data, "filler")
	fill := func(leave int64) {
		t.Helper()
		f, err := os.Create(filler)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for {
			var st syscall.Statfs_t
			if err := syscall.Statfs(data, &st); err != nil {
				t.Fatal(err)
			}
			err := syscall.Fallocate(int(f.Fd()), 0, 0, int64(st.Bavail)*st.Bsize-leave)
			if err == nil {
				return
			}
			if !errors.Is(err, syscall.ENOSPC) { // the service was faster, and took some of it
				t.Fatal(err)
			}
		}
	}
	until := func(what string, ok func() bool) {
		t.Helper()
		for deadline := time.Now().Add(20 * time.Second); !ok(); {
			if time.Now().After(deadline) {
				t.Fatalf("%s does not come", what)
			}
			<-time.After(20 * time.Millisecond) // a disk that fills up is no event
		}
	}

	// Nearly full: writes are refused with the reason, reads go on, and all is well again when there is room.
	fill(20 << 20)
	var refused error
	until("the refusal", func() bool { refused = take(1); return refused != nil })
	var e *metadata.Error
	if !errors.As(refused, &e) || e.Code != metadata.CodeUnavailable || !strings.Contains(e.Message, data) ||
		!strings.Contains(e.Message, "free some space") {
		t.Errorf("%v", refused)
	}
	if list, err := p.Allocations(ctx, "lan", false); err != nil || len(list) != len(want) {
		t.Errorf("%d addresses, %d acknowledged: %v", len(list), len(want), err)
	}
	os.Remove(filler) //nolint:errcheck // noticed next
	until("the recovery", func() bool { return take(1) == nil })

	// Full at once, and killed. What had been preallocated is free again, so the next start may serve what it has, which
	// is best, or say what is wrong; it does neither silently nor for ever.
	fill(0)
	until("the refusal", func() bool { return take(1) != nil })
	p.kill()
	p = start(t, dir, "a")
	until("an answer on a full disk", func() bool {
		list, err := p.Allocations(ctx, "lan", true)
		if err == nil && len(list) < len(want) {
			t.Errorf("%d addresses, %d acknowledged", len(list), len(want))
		}
		select {
		case <-p.done:
			return true
		default:
			return err == nil
		}
	})
	select {
	case <-p.done:
		if !strings.Contains(p.log.String(), data) {
			t.Errorf("it ended without naming the folder: %s", p.log)
		}
	default:
		p.kill()
	}

	os.Remove(filler) //nolint:errcheck // noticed next
	p = start(t, dir, "a").ready(t)
	list, err := p.Allocations(ctx, "lan", true)
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]metadata.Allocation{}
	for _, x := range list {
		have[x.ContainerID] = x
	}
	for id, a := range want {
		if have[id].Address != a.Address || have[id].Sequence != a.Sequence {
			t.Errorf("%s: acknowledged %+v, now %+v", id, a, have[id])
		}
	}
}
