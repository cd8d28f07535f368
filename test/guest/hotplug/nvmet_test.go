package hotplug_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lariat-net/lariat/test/fakeaws"
)

// TestEmulatedVolumesAreDrives attaches two volumes of the emulated cloud, and does to the first what EC2 can do to it.
func TestEmulatedVolumesAreDrives(t *testing.T) {
	const (
		first, firstSerial   = "vol-0a123456789abcdef", "vol0a123456789abcdef"
		second, secondSerial = "vol-0fedcba987654321a", "vol0fedcba987654321a"
		mib                  = 1 << 20
	)
	n := fakeaws.NewNvmet(t, t.TempDir())
	must(t, n.Attach(first, "i-1", "/dev/xvdba", 64*mib))
	dev := device(t, firstSerial)
	must(t, n.Attach(second, "i-1", "/dev/xvdbb", 32*mib))
	if other := device(t, secondSerial); other == dev {
		t.Errorf("both are %s", dev)
	}
	for attribute, want := range map[string]string{
		"size": "131072", "queue/logical_block_size": "512", "device/model": "Amazon Elastic Block Store",
		"device/serial": firstSerial,
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
	device(t, secondSerial)

	// Whoever comes back may have another name, but has its data and its size.
	must(t, n.Detach(second))
	must(t, n.Attach(second, "i-1", "/dev/xvdbb", 32*mib))
	must(t, n.Attach(first, "i-1", "/dev/xvdba", 96*mib))
	dev = device(t, firstSerial)
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
