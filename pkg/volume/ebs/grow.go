package ebs

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/mounts"
)

// superblock holds the needed members of a file system's superblock.
type superblock struct {
	size    int64 // bytes
	damaged bool  // the kernel has found errors; xfs does not record them
}

// superblockSize is the number of bytes that hold the superblock.
const superblockSize = 4096

// parseSuperblock parses the first bytes of a device.
func parseSuperblock(fs string, b []byte) (superblock, error) {
	var s superblock
	be, le := binary.BigEndian, binary.LittleEndian
	switch {
	case len(b) < superblockSize:
	case fs == "xfs" && string(b[:4]) == "XFSB":
		s.size = int64(be.Uint64(b[8:])) * int64(be.Uint32(b[4:]))
	case strings.HasPrefix(fs, "ext") && le.Uint16(b[1024+56:]) == 0xef53 && le.Uint32(b[1024+24:]) <= 6:
		blocks := uint64(le.Uint32(b[1024+4:]))
		if le.Uint32(b[1024+0x60:])&0x80 != 0 { // 64 bits
			blocks |= uint64(le.Uint32(b[1024+0x150:])) << 32
		}
		s.size = int64(blocks) << (10 + le.Uint32(b[1024+24:]))
		s.damaged = le.Uint16(b[1024+58:])&2 != 0
	}
	if s.size <= 0 {
		return s, fmt.Errorf("no superblock of %s is there", fs)
	}
	return s, nil
}

func readSuperblock(fd int, fs string) (superblock, error) {
	b := make([]byte, superblockSize)
	if n, err := unix.Pread(fd, b, 0); err != nil || n < len(b) {
		return superblock{}, fmt.Errorf("%d bytes of the superblock could be read: %w", n, err)
	}
	return parseSuperblock(fs, b)
}

// slack is the accepted difference between the sizes of a device and its file system. ext does not
// use a last group that is too small for its own tables.
const slack = 64 << 20

// grow enlarges a file system that is mounted for writing and is smaller than its device. The
// volume may come from a smaller snapshot, or was enlarged while it was not mounted. A failure is
// not fatal, because the volume is usable at its old size.
func (d *Driver) grow(ctx context.Context, v Volume, f *found, dev device, fd int, fs, dir string) {
	s, err := readSuperblock(fd, fs)
	if err == nil && dev.size-s.size < slack {
		return
	}
	if err == nil {
		err = growFS(ctx, fs, dir, dev)
	}
	volume.Failpoint("grown")
	if err != nil {
		d.log.Warn("the file system is smaller than its volume, and cannot be enlarged", "volume", v.Name, "id", f.id(),
			"error", err)
		return
	}
	d.log.Info("the file system was smaller than its volume, and was enlarged", "volume", v.Name, "id", f.id(),
		"from", s.size, "to", dev.size)
}

// growFS enlarges the file system at a directory to the whole device. It does not call resize2fs,
// which uses the first mount of the device. That mount may be read-only.
func growFS(ctx context.Context, fs, dir string, dev device) (err error) {
	if strings.HasPrefix(fs, "ext") {
		_, err = growExt(ctx, growArgs{dir, dev.number, dev.size})
	} else {
		_, err = run(ctx, "xfs_growfs", dir)
	}
	if err != nil {
		return fmt.Errorf("enlarge the %s of %s at %s: %w", fs, dev.path, dir, err)
	}
	return nil
}

type growArgs struct {
	Dir, Device string
	Size        int64
}

// resizeFS is EXT4_IOC_RESIZE_FS (fs/ext4/ext4.h), whose argument is a number of blocks.
const resizeFS = 0x40086610

var growExt = mounts.Task("ext-grow", func(a growArgs) (struct{}, error) {
	f, err := os.OpenFile(a.Dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return struct{}{}, err
	}
	defer f.Close()
	var st unix.Stat_t
	var fs unix.Statfs_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return struct{}{}, err
	}
	if at := fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)); at != a.Device {
		return struct{}{}, volume.Errorf(volume.ErrConflict, "device %s is mounted there, not %s", at, a.Device)
	}
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return struct{}{}, err
	}
	blocks := uint64(a.Size / fs.Bsize)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), resizeFS, uintptr(unsafe.Pointer(&blocks)))
	if errno != 0 {
		return struct{}{}, fmt.Errorf("%w (the kernel's log, dmesg, says why)", errno)
	}
	return struct{}{}, nil
})
