// Package failure_test breaks things on purpose: processes killed between any two system calls, hosts of the
// store lost, disks full, devices deleted, and everything at once.
package failure_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lariat-net/lariat/test/conformance/cnirun"
	"github.com/lariat-net/lariat/test/lab"
)

// groups are the system calls by which a plugin touches the world. At each of the first so many calls of each
// group by a thread, the process is killed before the kernel does what it asks for. What the runtime of Go
// opens and closes at its start is of no interest, but comes first.
var groups = []struct {
	calls string
	most  int
}{
	{"openat", 40}, {"fcntl", 8}, {"socket", 8}, {"connect,bind", 8}, {"sendto,sendmsg", 16}, {"recvfrom,recvmsg", 24},
	{"write", 8}, {"renameat,renameat2,rename", 3},
	{"unlinkat,unlink", 4}, {"setns", 3}, {"mkdirat,mkdir", 4}, {"ioctl", 4},
}

// under puts a call under strace, which kills the process at the n-th of some system calls.
func under(c cnirun.Call, calls string, n int) cnirun.Call {
	c.Wrap = []string{"strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=" + calls, "-e",
		fmt.Sprintf("inject=%s:signal=KILL:when=%d", calls, n)}
	return c
}

// TestF132_KilledAtEachSystemCall kills the real plugin during ADD, and DEL during DEL, at each system call.
// What follows as a runtime does it, DEL or GC, or what the manager does alone when the container is gone,
// leaves the host as it was.
func TestF132_KilledAtEachSystemCall(t *testing.T) {
	need(t, "strace")
	h := start(t).Hosts[0]
	probeStrace(t, h)
	before := world(t, h)
	label := map[string]string{} // of a container: where its ADD was killed
	var forGC, forManager []*lab.Container
	kills, turn := map[string]int{}, 0
	for _, g := range groups {
		for n := 1; n <= g.most; n++ {
			c := container(t, h)
			o, err := under(call(c, "ADD"), g.calls, n).Run(ctx, h.Netns)
			must(t, err)
			label[c.ID] = fmt.Sprintf("%s number %d", g.calls, n)
			if o.Code != -1 { // it lives: there is no n-th call
				works(t, h, call(c, "DEL"))
				if d := difference(before, world(t, h)); d != "" && len(forGC)+len(forManager) == 0 {
					t.Fatalf("an ADD that was not killed, and its DEL:\n%s", d)
				}
				break
			}
			kills[g.calls]++
			switch turn++; turn % 4 {
			case 0:
				forGC = append(forGC, c)
			case 1:
				forManager = append(forManager, c)
			default:
				works(t, h, call(c, "DEL"))
				if w := world(t, h); strings.Contains(w, c.ID) {
					t.Errorf("ADD killed at %s; after DEL:\n%s", label[c.ID], lines(w, c.ID))
				}
			}
		}
	}
	for _, must := range []string{"openat", "fcntl", "connect,bind", "sendto,sendmsg", "write",
		"renameat,renameat2,rename", "setns"} {
		if kills[must] == 0 {
			t.Errorf("no ADD was killed at %s: is the group right?", must)
		}
	}
	t.Logf("%d ADDs killed: %v", turn, kills)

	// The containers of the manager's share are dead; those of GC's live, and their runtime has forgotten them.
	for _, c := range forManager {
		must(t, c.Netns.Remove())
	}
	all := func(list []*lab.Container) func() error {
		return func() error {
			w := world(t, h)
			var errs []error
			for _, c := range list {
				if strings.Contains(w, c.ID) {
					errs = append(errs, fmt.Errorf("ADD killed at %s:\n%s", label[c.ID], lines(w, c.ID)))
				}
			}
			return errors.Join(errs...)
		}
	}
	eventually(t, 10*time.Second, all(forManager))
	works(t, h, gc(h))
	if err := all(forGC)(); err != nil {
		t.Errorf("after GC: %v", err)
	}
	if d := difference(before, world(t, h)); d != "" {
		t.Errorf("at the end:\n%s", d)
	}
}

// TestF132_DELKilledAtEachSystemCall: the next DEL, or GC, finishes it. A DEL that was killed never freed an
// address whose interface was there.
func TestF132_DELKilledAtEachSystemCall(t *testing.T) {
	need(t, "strace")
	h := start(t).Hosts[0]
	probeStrace(t, h)
	before := world(t, h)
	kills := 0
	for _, g := range groups {
		for n := 1; n <= g.most; n++ {
			c := container(t, h)
			works(t, h, call(c, "ADD"))
			o, err := under(call(c, "DEL"), g.calls, n).Run(ctx, h.Netns)
			must(t, err)
			if o.Code != -1 {
				works(t, h, call(c, "DEL"))
				break
			}
			kills++
			if w := lines(world(t, h), c.ID); strings.Contains(w, "device") && !strings.Contains(w, "held") {
				t.Errorf("DEL killed at %s number %d: the interface is there, and its addresses are free:\n%s", g.calls, n, w)
			}
			next := call(c, "DEL")
			if n%2 == 0 {
				next = gc(h)
			}
			works(t, h, next)
			if d := difference(before, world(t, h)); d != "" {
				t.Fatalf("DEL killed at %s number %d, after the next %s:\n%s", g.calls, n, next.Env["CNI_COMMAND"], d)
			}
		}
	}
	t.Logf("%d DELs killed", kills)
}

// probeStrace skips where strace may not trace, as in some containers.
func probeStrace(t *testing.T, h *lab.Host) {
	t.Helper()
	o, err := under(cnirun.Call{Exe: "/bin/true"}, "openat", 1).Run(ctx, h.Netns)
	if err != nil || o.Code != -1 {
		t.Skipf("strace cannot kill here: exit code %d %v %s", o.Code, err, o.Stderr)
	}
}

// lines are those that hold a word.
func lines(text, word string) string {
	return strings.Join(slices.DeleteFunc(strings.Split(text, "\n"),
		func(l string) bool { return !strings.Contains(l, word) }), "\n")
}
