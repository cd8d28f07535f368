// Package fakeaws_test shows that volumes of the emulated cloud are NVMe drives, in a guest.
package fakeaws_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lariat-net/lariat/test/fakeaws"
	"github.com/lariat-net/lariat/test/guest"
)

func TestMain(m *testing.M) { guest.Main(m, guest.Options{}) }

const (
	first  = "vol-0123456789abcdef0"
	second = "vol-0fedcba9876543210"
	mib    = 1 << 20
)

// TestVolumesAreDrives attaches two volumes, and does to the first what EC2 can do to it.
func TestVolumesAreDrives(t *testing.T) {
	n := fakeaws.NewNvmet(t, t.TempDir())
	must(t, n.Attach(first, "i-1", "/dev/xvdba", 64*mib))
	dev := device(t, first)
	must(t, n.Attach(second, "i-1", "/dev/xvdbb", 32*mib))
	if other := device(t, second); other == dev {
		t.Errorf("both are %s", dev)
	}
	for attribute, want := range map[string]string{
		"size": "131072", "queue/logical_block_size": "512", "device/model": "Amazon Elastic Block Store", "device/serial": "vol0123456789abcdef0",
	} {
		if got := sysfs(dev, attribute); got != want {
			t.Errorf("%s: %q, want %q", attribute, got, want)
		}
	}
	if hidden, _ := filepath.Glob("/sys/block/nvme*c*n*"); len(hidden) != 2 {
		t.Errorf("hidden paths: %v, want those of native multipath", hidden)
	}
	if err := n.Attach(first, "i-1", "/dev/xvdbc", 64*mib); err == nil {
		t.Error("attached twice")
	}
	if err := n.Delete(first); err == nil {
		t.Error("deleted while attached")
	}

	dir := t.TempDir()
	run(t, "mkfs.ext4", "-q", dev)
	run(t, "mount", dev, dir)
	must(t, os.WriteFile(filepath.Join(dir, "data"), []byte("kept"), 0o600))
	must(t, n.Resize(first, 96*mib))
	eventually(t, func() error {
		if size := sysfs(dev, "size"); size != "196608" {
			return fmt.Errorf("size %s", size)
		}
		return nil
	})
	run(t, "umount", dir)
	must(t, n.Detach(first))
	gone(t, dev)
	device(t, second)

	// Whoever comes back may have another name, but has its data and its size.
	must(t, n.Detach(second))
	must(t, n.Attach(second, "i-1", "/dev/xvdbb", 32*mib))
	must(t, n.Attach(first, "i-1", "/dev/xvdba", 96*mib))
	dev = device(t, first)
	if size := sysfs(dev, "size"); size != "196608" {
		t.Errorf("size %s after it came back", size)
	}
	run(t, "mount", dev, dir)
	data, err := os.ReadFile(filepath.Join(dir, "data"))
	if err != nil || string(data) != "kept" {
		t.Errorf("read %q, %v", data, err)
	}

	// Torn away, it is gone for the machine, but its mount is not.
	must(t, n.Tear(first))
	gone(t, dev)
	must(t, os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0o600))
	if _, err := os.ReadFile(filepath.Join(dir, "data")); err == nil {
		t.Error("read from a drive that is gone")
	}
	run(t, "umount", dir)
	must(t, n.Detach(first))
	must(t, n.Resize(first, 128*mib))
	fi, err := os.Stat(n.Image(first))
	must(t, err)
	if fi.Size() != 128*mib {
		t.Errorf("the file has %d octets", fi.Size())
	}
	must(t, n.Delete(first))
	if _, err := os.Stat(n.Image(first)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("deleted: %v", err)
	}
}

// device waits for the block device of a volume: the visible one with its serial number.
func device(t *testing.T, volume string) (dev string) {
	t.Helper()
	eventually(t, func() error {
		all, err := filepath.Glob("/dev/nvme*n*")
		must(t, err)
		for _, dev = range all {
			if sysfs(dev, "device/serial") == strings.Replace(volume, "-", "", 1) {
				return nil
			}
		}
		return fmt.Errorf("%s is none of %v", volume, all)
	})
	return dev
}

func gone(t *testing.T, dev string) {
	t.Helper()
	eventually(t, func() error {
		if _, err := os.Stat(dev); err == nil {
			return fmt.Errorf("%s is still there", dev)
		}
		return nil
	})
}

// sysfs is an attribute of a block device.
func sysfs(dev, attribute string) string {
	data, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(dev), attribute))
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(data))
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually asks until there is no error.
func eventually(t *testing.T, f func() error) {
	t.Helper()
	deadline := time.After(15 * time.Second)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("still: ", err)
		}
	}
}
