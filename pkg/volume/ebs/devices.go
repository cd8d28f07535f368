package ebs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/volume"
)

// devices finds the block devices of this host below two roots of the kernel, which tests replace.
// It ignores links in /dev/disk/by-id. They need udev, and have led to other volumes.
type devices struct{ sys, dev string }

// device is a block device that was examined.
type device struct {
	path   string // /dev/nvme1n1
	number string // major:minor, as in /sys/dev/block and in the mount table
	size   int64
}

// model is the model name of EBS's NVMe devices.
const model = "Amazon Elastic Block Store"

// nvmeName matches an NVMe namespace. Hidden paths of native multipath, such as nvme0c0n1, and
// partitions do not match.
var nvmeName = regexp.MustCompile(`^nvme[0-9]+n[0-9]+$`)

// serial returns a device's serial number for a volume id.
func serial(id string) string { return strings.Replace(id, "-", "", 1) }

// volume returns the id of the volume behind an NVMe device, or "".
func (d devices) volume(name string) string {
	if !nvmeName.MatchString(name) {
		return ""
	}
	return d.id(filepath.Join(d.sys, "block", name))
}

// numbered returns the id of the volume with a device number, and whether the kernel has a device
// of that number.
func (d devices) numbered(number string) (id string, alive bool) {
	dir := filepath.Join(d.sys, "dev/block", number)
	if _, err := os.Stat(dir); err != nil {
		return "", false
	}
	return d.id(dir), true
}

// id returns the volume id that a device reports in its directory in /sys.
func (d devices) id(dir string) string {
	if text(dir, "hidden") == "1" || text(dir, "device/model") != model {
		return ""
	}
	if id := strings.Replace(text(dir, "device/serial"), "vol", "vol-", 1); volumeID.MatchString(id) {
		return id
	}
	return ""
}

func text(dir, file string) string {
	data, _ := os.ReadFile(filepath.Join(dir, file))
	return strings.TrimSpace(string(data))
}

// find returns the device of a volume, or a zero device. The argument as is AWS's name of the
// device, which alone identifies the volume on instances without NVMe.
func (d devices) find(id, as string) (device, error) {
	entries, err := os.ReadDir(filepath.Join(d.sys, "block"))
	if err != nil {
		return device{}, fmt.Errorf("look for the device of %s: %w", id, err)
	}
	var found []string
	for _, e := range entries {
		if d.volume(e.Name()) == id {
			found = append(found, e.Name())
		}
	}
	if len(found) == 0 {
		if name := xenName(as); name != "" {
			if _, err := os.Stat(filepath.Join(d.sys, "block", name)); err == nil {
				found = append(found, name)
			}
		}
	}
	switch len(found) {
	case 0:
		return device{}, nil
	case 1:
		dev, fd, err := d.open(found[0], id, unix.O_RDONLY)
		if err == nil {
			unix.Close(fd)
		}
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV) {
			return device{}, nil // the device is appearing or vanishing
		}
		return dev, err
	}
	return device{}, fmt.Errorf("the devices %s all say that they are %s", strings.Join(found, ", "), id)
}

// xenName returns the name of Xen's kernels for AWS's name: /dev/sdf and /dev/xvdf become xvdf.
func xenName(as string) string {
	name, ok := strings.CutPrefix(as, "/dev/")
	if rest, sd := strings.CutPrefix(name, "sd"); sd {
		name = "xvd" + rest
	}
	if !ok || !strings.HasPrefix(name, "xvd") || volume.CheckName(name) != nil {
		return ""
	}
	return name
}

// open opens a device and then checks that the open device is the volume, because names change.
// While the device is open, the kernel gives its number to no other device.
func (d devices) open(name, id string, flags int) (device, int, error) {
	dev := device{path: filepath.Join(d.dev, name)}
	fd, err := unix.Open(dev.path, flags|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return dev, -1, fmt.Errorf("open %s: %w", dev.path, err)
	}
	fail := func(format string, args ...any) (device, int, error) {
		unix.Close(fd)
		return dev, -1, fmt.Errorf("device "+dev.path+": "+format, args...)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fail("%w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return fail("not a block device")
	}
	dev.number = fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	dir := filepath.Join(d.sys, "dev/block", dev.number)
	if have := text(filepath.Join(d.sys, "block", name), "dev"); have != dev.number {
		return fail("its number is %s, and the kernel says %s: the node is stale", dev.number, have)
	}
	if nvmeName.MatchString(name) && d.id(dir) != id {
		return fail("it is %q, not %s", d.id(dir), id)
	}
	sectors, err := strconv.ParseInt(text(dir, "size"), 10, 64)
	if err != nil {
		return fail("its size is not known: %w", err)
	}
	dev.size = sectors * 512
	return dev, fd, nil
}

// wait waits until the device of a volume exists.
func (d devices) wait(ctx context.Context, id, as string) (device, error) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		dev, err := d.find(id, as)
		if err != nil || dev.path != "" {
			return dev, err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return device{}, fmt.Errorf("no device appears here whose serial number is %s; if this is that instance, "+
				"detach the volume and attach it again, or stop and start the instance: %w", serial(id), context.Cause(ctx))
		}
	}
}

// rescan makes the kernel read the current size of an NVMe device. The kernel does so by itself if
// the device reports the change, but not all devices report it.
func (d devices) rescan(dev device) {
	dir := filepath.Join(d.sys, "block", filepath.Base(dev.path), "device")
	for _, pattern := range []string{dir + "/rescan_controller", dir + "/nvme*/rescan_controller"} {
		files, _ := filepath.Glob(pattern)
		for _, f := range files {
			_ = os.WriteFile(f, []byte("1"), 0)
		}
	}
}
