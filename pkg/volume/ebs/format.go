package ebs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/mounts"
)

// run executes a program of the system on a device and returns its standard output. A status other
// than 0 is an *ended.
func run(ctx context.Context, program string, args ...string) (out string, err error) {
	path := mounts.Program(program)
	if path == "" {
		return "", fmt.Errorf("%s is not installed", program)
	}
	stdout, words, err := mounts.Run(ctx, exec.Command(path, args...))
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		return string(stdout), &ended{program, exit.ExitCode(), words}
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", program, err)
	}
	return string(stdout), err
}

// ended is the error of a program with a status other than 0.
type ended struct {
	program string
	status  int
	words   string // standard error
}

func (e *ended) Error() string {
	text := fmt.Sprintf("%s ended with status %d", e.program, e.status)
	if e.words != "" {
		text += ": " + e.words
	}
	return text
}

// endedWith reports whether an error is a program's end with a status.
func endedWith(err error, status int) bool {
	var e *ended
	return errors.As(err, &e) && e.status == status
}

// identify returns the type of a device's file system. "" means that nothing was recognised, which
// proves nothing. All other content is an error.
func identify(ctx context.Context, dev device) (string, error) {
	out, err := run(ctx, "blkid", "-p", "-o", "export", dev.path)
	has := map[string]string{}
	for _, line := range strings.Split(out, "\n") {
		if key, value, ok := strings.Cut(line, "="); ok {
			has[key] = value
		}
	}
	switch {
	case endedWith(err, 2) && len(has) == 0:
		return "", nil
	case err != nil:
		return "", fmt.Errorf("what is on %s is not clear: %w", dev.path, err)
	case has["USAGE"] == "filesystem" && slices.Contains(append(FSTypes, "ext2"), has["TYPE"]):
		return has["TYPE"], nil
	case has["TYPE"] != "":
		return "", volume.Errorf(volume.ErrConflict, "on %s is %s, which is not mounted: file systems are %v", dev.path,
			has["TYPE"], FSTypes)
	}
	return "", volume.Errorf(volume.ErrConflict, "on %s is a partition table (%s): file systems of volumes are on "+
		"the whole device", dev.path, has["PTTYPE"])
}

// prepare ensures that a device has a sound file system, and returns its type. The device must not
// be mounted.
func (d *Driver) prepare(ctx context.Context, r *region, v Volume, f *found, dev device) (string, error) {
	fs, err := identify(ctx, dev)
	if err != nil {
		return "", fmt.Errorf("volume %s (%s): %w", v.Name, f.id(), err)
	}
	if fs == "" {
		if fs, err = d.format(ctx, r, v, f, dev); err != nil {
			return "", err
		}
	}
	if v.ReadOnly {
		return fs, nil
	}
	if err := d.formatted(ctx, r, f); err != nil {
		return "", err
	}
	if strings.HasPrefix(fs, "ext") {
		// An xfs mount replays the log by itself.
		if _, err := run(ctx, "e2fsck", "-p", dev.path); err != nil && !endedWith(err, 1) {
			return "", fmt.Errorf("volume %s (%s): the file system on %s may have errors that e2fsck does not repair by "+
				"itself: %w", v.Name, f.id(), dev.path, err)
		}
	}
	return fs, nil
}

// format makes a file system on a volume under four conditions. Lariat created the volume, and not
// from a snapshot. Its tag says that it was never formatted. Its device has the volume's size. The
// device reads as zeros in all places where a file system would leave data.
//
// Before mkfs begins, the journal and the tag record it. A killed mkfs is repeated only if both
// record it. The tag alone may be an outdated answer of AWS, for a volume that has data by now.
func (d *Driver) format(ctx context.Context, r *region, v Volume, f *found, dev device) (string, error) {
	fs := v.FSType
	if fs == "" {
		fs = "ext4"
	}
	refuse := func(format string, args ...any) (string, error) {
		return "", volume.Errorf(volume.ErrConflict, "volume %s (%s) has no file system that is known, and is not "+
			"formatted: "+format, append([]any{v.Name, f.id()}, args...)...)
	}
	_, begun, err := d.formats.Get(f.id())
	if err != nil {
		return "", err
	}
	resume := begun && f.tags[tagFileSystem] == making
	switch {
	case v.ReadOnly:
		return refuse("it is wanted read-only")
	case aws.ToString(f.SnapshotId) != "":
		return refuse("it comes from snapshot %s, so it has data, maybe encrypted", aws.ToString(f.SnapshotId))
	case f.tags[tagVolume] == "":
		return refuse("Lariat did not create it. Format it by hand if it has no data: mkfs.%s %s", fs, dev.path)
	case f.tags[tagFileSystem] == making && !resume:
		return refuse("another host began to format it and did not end; it has no data: delete it and create it anew, "+
			"or format it by hand: mkfs.%s %s", fs, dev.path)
	case f.tags[tagFileSystem] != none && !resume:
		return refuse("it had a file system once (tag %s=%s): fsck.%s %s may find it by a backup of its superblock",
			tagFileSystem, f.tags[tagFileSystem], fs, dev.path)
	case dev.size != f.bytes():
		return refuse("%s has %d octets, and the volume %d", dev.path, dev.size, f.bytes())
	}
	if !resume {
		at, err := proveBlank(ctx, proof{dev.path, dev.number, dev.size})
		if err != nil {
			return refuse("it cannot be proven blank: %w", err)
		}
		if at >= 0 {
			return refuse("it is not blank: there is data at octet %d of %s", at, dev.path)
		}
	}
	if err := d.formats.Put(f.id(), time.Now().UTC()); err != nil {
		return "", err
	}
	volume.Failpoint("format-journalled")
	if err := r.tag(ctx, f.id(), tagFileSystem, making); err != nil {
		return "", fmt.Errorf("before mkfs, its tag must say so: %w", err)
	}
	f.tags[tagFileSystem] = making
	volume.Failpoint("format-marked")
	args := []string{"-q", dev.path}
	if fs != "xfs" {
		args = append([]string{"-m", "0"}, args...)
	}
	// Omit -F and -f, so that these programs refuse a device with data.
	if _, err := run(ctx, "mkfs."+fs, args...); err != nil {
		return "", fmt.Errorf("volume %s (%s): %w", v.Name, f.id(), err)
	}
	volume.Failpoint("formatted")
	d.log.Info("formatted", "volume", v.Name, "id", f.id(), "device", dev.path, "fsType", fs)
	return fs, nil
}

// formatted records that a device has a file system: an mkfs of Lariat that began has ended.
func (d *Driver) formatted(ctx context.Context, r *region, f *found) error {
	if state := f.tags[tagFileSystem]; state == none || state == making {
		if err := r.tag(ctx, f.id(), tagFileSystem, made); err != nil {
			return fmt.Errorf("after mkfs, its tag must say so: %w", err)
		}
		f.tags[tagFileSystem] = made
	}
	volume.Failpoint("format-tagged")
	return d.formats.Remove(f.id())
}

// extent is a range of a device, in bytes.
type extent struct{ from, to int64 }

const (
	edge    = 4 << 20 // the size of the tested range at both ends
	samples = 512
	sample  = 32 << 10
)

// places returns the ranges that must be zero on a blank device. These are both ends, and all
// places where ext file systems of any block size keep copies of their superblock. A sample over
// the whole device includes the starts of xfs's groups.
func places(size int64) (list []extent) {
	add := func(from, length int64) {
		if from, to := max(from, 0), min(from+length, size); from < to {
			list = append(list, extent{from, to})
		}
	}
	add(0, edge)
	add(size-edge, edge)
	for _, block := range []int64{1024, 2048, 4096, 65536} {
		group := 8 * block * block
		for _, base := range []int64{1, 3, 5, 7} {
			for n := base; n*group < size && n <= 1<<24; n *= max(base, 2) {
				add(n*group-block, 4*block) // with blocks of 1024 bytes, the superblock is one block further
			}
		}
	}
	for i := range int64(samples) {
		add(size/samples*i-sample/2, sample)
	}
	slices.SortFunc(list, func(a, b extent) int { return int(min(1, max(-1, a.from-b.from))) })
	merged := list[:0]
	for _, e := range list {
		if n := len(merged); n > 0 && e.from <= merged[n-1].to {
			merged[n-1].to = max(merged[n-1].to, e.to)
		} else {
			merged = append(merged, e)
		}
	}
	return merged
}

type proof struct {
	Path   string
	Number string
	Size   int64
}

// proveBlank reads the places, with the device opened exclusively. It returns the position of the
// first byte that is not zero, or -1.
var proveBlank = mounts.Task("blank", func(p proof) (int64, error) {
	fd, err := unix.Open(p.Path, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if errors.Is(err, unix.EBUSY) {
		return 0, fmt.Errorf("%s is in use", p.Path)
	}
	if err != nil {
		return 0, fmt.Errorf("open %s: %w", p.Path, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK ||
		fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)) != p.Number {
		return 0, fmt.Errorf("%s is not the device any more that it was", p.Path)
	}
	// Cached data may be outdated.
	_ = unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED)
	return firstData(p.Size, func(b []byte, at int64) (int, error) { return syscall.Pread(fd, b, at) })
})

// firstData returns the position of the first byte in the places that is not zero, or -1.
func firstData(size int64, read func(b []byte, at int64) (int, error)) (int64, error) {
	buf := make([]byte, 256<<10)
	for _, e := range places(size) {
		for at := e.from; at < e.to; {
			n, err := read(buf[:min(int64(len(buf)), e.to-at)], at)
			if errors.Is(err, syscall.EINTR) {
				continue
			}
			if err == nil && n <= 0 {
				err = io.ErrUnexpectedEOF
			}
			if err != nil {
				return 0, fmt.Errorf("it cannot be read at octet %d: %w", at, err)
			}
			for i, b := range buf[:n] {
				if b != 0 {
					return at + int64(i), nil
				}
			}
			at += int64(n)
		}
	}
	return -1, nil
}
