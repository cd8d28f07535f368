// Package hotplug_test plugs volumes into a guest and out of it, as EBS does with an instance.
package hotplug_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/lariat-net/lariat/test/guest"
)

func TestMain(m *testing.M) { guest.Main(m, guest.Options{Slots: 2, Disks: []int{64, 64}}) }

const serial = "vol0123456789abcdef0"

// TestVolumeKeepsItsDataFromPlugToPlug also shows that both slots work at once.
func TestVolumeKeepsItsDataFromPlugToPlug(t *testing.T) {
	m, err := guest.OpenMonitor()
	must(t, err)
	defer m.Close()
	must(t, m.Plug(2, "vol0fedcba9876543210"))
	must(t, m.Plug(1, serial))
	dir := t.TempDir()
	dev := device(t, serial)
	run(t, "mkfs.ext4", "-q", dev)
	run(t, "mount", dev, dir)
	must(t, os.WriteFile(filepath.Join(dir, "data"), []byte("kept"), 0o600))
	run(t, "umount", dir)
	must(t, m.Unplug(1))
	eventually(t, func() error {
		if _, err := os.Stat(dev); err == nil {
			return fmt.Errorf("%s is still there", dev)
		}
		return nil
	})
	device(t, "vol0fedcba9876543210")

	must(t, m.Plug(1, serial))
	run(t, "mount", device(t, serial), dir)
	data, err := os.ReadFile(filepath.Join(dir, "data"))
	if err != nil || string(data) != "kept" {
		t.Errorf("read %q, %v", data, err)
	}
	run(t, "umount", dir)
}

// device waits for the block device of the drive with a serial number. With multipath it has another number
// than the controller, and a hidden path that has no node.
func device(t *testing.T, serial string) (dev string) {
	t.Helper()
	eventually(t, func() error {
		all, err := filepath.Glob("/dev/nvme*n*")
		must(t, err)
		for _, dev = range all {
			if sysfs(dev, "device/serial") == serial {
				return nil
			}
		}
		return fmt.Errorf("no drive has the serial number %s, of %d", serial, len(all))
	})
	return dev
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
