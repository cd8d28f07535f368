package failure_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/cni"
	"github.com/lariat-net/lariat/test/lab"
)

// TestMemberOfTheStoreLost: with one of three members dead, whichever it is, containers on the other two
// hosts come and go; what the dead host runs keeps its network, and DEL works there.
func TestMemberOfTheStoreLost(t *testing.T) {
	c := start(t)
	for i, lost := range c.Hosts {
		t.Run("host "+lost.Name, func(t *testing.T) {
			other, third := c.Hosts[(i+1)%3], c.Hosts[(i+2)%3]
			stays, goes := container(t, lost), container(t, lost)
			works(t, lost, call(stays, "ADD"))
			works(t, lost, call(goes, "ADD"))
			lost.Metadata.Kill()
			began := time.Now()
			var slowest time.Duration
			var added []*lab.Container
			for range 5 {
				for _, h := range []*lab.Host{other, third} {
					x := container(t, h)
					begin := time.Now()
					works(t, h, call(x, "ADD"))
					slowest = max(slowest, time.Since(begin))
					added = append(added, x)
				}
			}
			t.Logf("10 ADDs in %s with host %s's member dead, the slowest in %s", time.Since(began), lost.Name, slowest)
			x := added[0]
			pings(t, added[1].Netns, address(t, x))
			pings(t, stays.Netns, address(t, x))
			works(t, lost, call(goes, "DEL"))
			for _, x := range added {
				works(t, x.Host, call(x, "DEL"))
			}
			must(t, startMetadata(c, lost))
			eventually(t, 10*time.Second, func() error { // the DEL is told later
				if w := world(t, lost); strings.Contains(w, goes.ID) {
					return fmt.Errorf("%s", lines(w, goes.ID))
				}
				return nil
			})
			works(t, lost, call(stays, "DEL"))
		})
	}
}

// TestF29_DeviceDeletedUnderLoad: while containers come and go, the tunnel's device is deleted by hand. It is
// back within a second, with everything on it, by the kernel's own account of when.
func TestF29_DeviceDeletedUnderLoad(t *testing.T) {
	c := start(t)
	a, b := c.Hosts[0], c.Hosts[1]
	near, far := container(t, a), container(t, b)
	works(t, a, call(near, "ADD"))
	works(t, b, call(far, "ADD"))
	to := address(t, far)
	pings(t, near.Netns, to)

	load, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			ns, err := a.NewContainer(fmt.Sprint("load", w))
			if err != nil {
				t.Error(err)
				return
			}
			defer ns.Netns.Remove()
			for load.Err() == nil {
				works(t, a, call(ns, "ADD"))
				works(t, a, call(ns, "DEL"))
			}
		})
	}
	defer wg.Wait()
	defer cancel()

	type event struct {
		at   time.Time
		gone bool
	}
	events := make(chan event, 100)
	done := make(chan struct{})
	defer close(done)
	must(t, a.Do(func() error {
		updates := make(chan netlink.LinkUpdate, 1000)
		if err := netlink.LinkSubscribe(updates, done); err != nil {
			return err
		}
		go func() {
			for u := range updates {
				if u.Link.Attrs().Name == "vtep1042" {
					events <- event{time.Now(), u.Header.Type == unix.RTM_DELLINK}
				}
			}
		}()
		return nil
	}))
	fastest := time.Hour
	for range 3 {
		must(t, a.Do(func() error {
			l, err := netlink.LinkByName("vtep1042")
			if err != nil {
				return err
			}
			return netlink.LinkDel(l)
		}))
		var gone time.Time
		limit := time.After(20 * time.Second)
	wait:
		for {
			select {
			case e := <-events:
				if e.gone {
					gone = e.at
				} else if !gone.IsZero() {
					break wait
				}
			case <-limit:
				t.Fatal("the device did not come back within 20 s")
			}
		}
		short, cancel := context.WithTimeout(ctx, 20*time.Second)
		_, err := near.Ping(short, to, 56)
		cancel()
		took := time.Since(gone)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("packets pass again %s after the device was deleted", took)
		fastest = min(fastest, took)
		for len(events) > 0 {
			<-events
		}
	}
	if fastest > time.Second { // the machine may have been busy once
		t.Errorf("it never took less than a second")
	}
	cancel()
	wg.Wait()
	works(t, a, call(near, "DEL"))
	works(t, b, call(far, "DEL"))
}

// TestDiskFull: an ADD that cannot note what it does is refused, names the file, and leaves nothing; a second
// ADD of a running container costs it nothing; DEL works.
func TestDiskFull(t *testing.T) {
	h := start(t).Hosts[0]
	// The disk is the manager's too: what is in another folder is unknown to it, and it gives back addresses
	// that no record and no port vouches for.
	dir := h.StateDir()
	must(t, os.MkdirAll(dir, 0o700))
	before := world(t, h)
	for _, tc := range []struct {
		name, options string
		fill          func() error // by names that are no records
	}{
		{"no space", "size=64k", func() error {
			err := os.WriteFile(filepath.Join(dir, ".lock-ballast"), make([]byte, 1<<20), 0o600)
			if err == nil {
				return fmt.Errorf("a MiB fits into 64 KiB")
			}
			return nil
		}},
		{"no inodes", "nr_inodes=40", func() error {
			for i := range 100 {
				if os.WriteFile(filepath.Join(dir, fmt.Sprint(".lock-ballast", i)), nil, 0o600) != nil {
					return nil
				}
			}
			return fmt.Errorf("100 files fit into 40 inodes")
		}},
		{"read only", "size=64k", func() error { return unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, "") }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			must(t, unix.Mount("small", dir, "tmpfs", 0, tc.options))
			defer unix.Unmount(dir, unix.MNT_DETACH) // again, where the test ended early
			early, late := container(t, h), container(t, h)
			works(t, h, call(early, "ADD"))
			running := world(t, h)
			must(t, tc.fill())
			o, err := call(late, "ADD").Run(ctx, h.Netns)
			must(t, err)
			e, err := o.CNIError()
			must(t, err)
			if e.Code != cni.ErrIO || !strings.Contains(e.Msg, dir) {
				t.Errorf("want code %d and %s in it: %s", cni.ErrIO, dir, o.Stdout)
			}
			t.Log(e.Msg)
			if d := difference(running, world(t, h)); d != "" {
				t.Errorf("the ADD that failed:\n%s", d)
			}
			if o, err := call(early, "ADD").Run(ctx, h.Netns); err != nil || o.Code == -1 {
				t.Errorf("the second ADD of the running container: %v %s", err, o.Stderr)
			}
			if d := difference(running, world(t, h)); d != "" {
				t.Errorf("the second ADD of a running container:\n%s", d)
			}
			works(t, h, call(late, "DEL")) // a runtime sends one after a failed ADD
			if tc.name != "read only" {
				works(t, h, call(early, "DEL"))
			} else if _, err := call(early, "DEL").Run(ctx, h.Netns); err != nil {
				t.Error(err)
			}
			must(t, unix.Unmount(dir, unix.MNT_DETACH)) // with the record that a read-only disk kept
			if d := difference(before, world(t, h)); d != "" {
				t.Errorf("after DEL:\n%s", d)
			}
		})
	}
}
