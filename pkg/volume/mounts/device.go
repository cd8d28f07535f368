package mounts

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// attributes are the options that belong to one mount. All others belong to the file system, which
// all mounts of a device share.
var attributes = map[string]struct{ set, clear int }{
	"ro": {unix.MOUNT_ATTR_RDONLY, 0}, "rw": {0, unix.MOUNT_ATTR_RDONLY},
	"nosuid": {unix.MOUNT_ATTR_NOSUID, 0}, "suid": {0, unix.MOUNT_ATTR_NOSUID},
	"nodev": {unix.MOUNT_ATTR_NODEV, 0}, "dev": {0, unix.MOUNT_ATTR_NODEV},
	"noexec": {unix.MOUNT_ATTR_NOEXEC, 0}, "exec": {0, unix.MOUNT_ATTR_NOEXEC},
	"relatime":    {unix.MOUNT_ATTR_RELATIME, unix.MOUNT_ATTR__ATIME},
	"atime":       {unix.MOUNT_ATTR_RELATIME, unix.MOUNT_ATTR__ATIME},
	"noatime":     {unix.MOUNT_ATTR_NOATIME, unix.MOUNT_ATTR__ATIME},
	"strictatime": {unix.MOUNT_ATTR_STRICTATIME, unix.MOUNT_ATTR__ATIME},
	"nodiratime":  {unix.MOUNT_ATTR_NODIRATIME, 0}, "diratime": {0, unix.MOUNT_ATTR_NODIRATIME},
}

// deviceMount mounts a device. mount(2) has one flag for the mount and the file system, so a device
// cannot have a read-only and a read-write mount by it. fsmount separates the two. Kernels before 5.2
// do not have fsmount.
func deviceMount(s Spec) error {
	fs, err := unix.Fsopen(s.FSType, unix.FSOPEN_CLOEXEC)
	if errors.Is(err, unix.ENOSYS) {
		return kernelMount(s, false)
	}
	if errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("mount %s: %w (this kernel has no %s: modprobe %s)", s.Source, err, s.FSType, s.FSType)
	}
	if err != nil {
		return fmt.Errorf("mount %s: %w", s.Source, err)
	}
	defer unix.Close(fs)
	attr, errs := 0, []error{unix.FsconfigSetString(fs, "source", s.Source)}
	for _, o := range s.Options {
		a, own := attributes[o]
		attr = attr&^a.clear | a.set
		switch key, value, valued := strings.Cut(o, "="); {
		case o == "ro" && s.Writable: // applies to the mount alone
		case own && o != "ro" && o != "rw":
		case valued:
			errs = append(errs, unix.FsconfigSetString(fs, key, value))
		default:
			errs = append(errs, unix.FsconfigSetFlag(fs, key))
		}
	}
	if err = errors.Join(errs...); err == nil {
		err = unix.FsconfigCreate(fs)
	}
	if err != nil {
		return fmt.Errorf("mount %s: %w%s", s.Source, err, kernelWords(fs))
	}
	mount, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, attr)
	if err != nil {
		return fmt.Errorf("mount %s: %w%s", s.Source, err, kernelWords(fs))
	}
	defer unix.Close(mount)
	if err := unix.MoveMount(mount, "", unix.AT_FDCWD, s.Dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount %s at %s: %w", s.Source, s.Dir, err)
	}
	return nil
}

// kernelWords returns the kernel's explanation of a refused file system.
func kernelWords(fs int) string {
	var words []string
	buf := make([]byte, 1024)
	for range 10 {
		n, err := unix.Read(fs, buf)
		if err != nil || n <= 0 {
			break
		}
		words = append(words, strings.TrimSpace(string(buf[:n])))
	}
	if len(words) == 0 {
		return " (the kernel's log, dmesg, may say more)"
	}
	return " (" + strings.Join(words, "; ") + ")"
}

// MakeWritable makes the file system that is mounted at a directory writable. Its mounts do not
// change: read-only ones stay read-only.
func MakeWritable(ctx context.Context, dir string) error {
	_, err := doMakeWritable(ctx, dir)
	return err
}

var doMakeWritable = Task("make-writable", func(dir string) (struct{}, error) {
	fs, err := unix.Fspick(unix.AT_FDCWD, dir, unix.FSPICK_CLOEXEC|unix.FSPICK_SYMLINK_NOFOLLOW|unix.FSPICK_NO_AUTOMOUNT)
	if err != nil {
		return struct{}{}, err
	}
	defer unix.Close(fs)
	if err = unix.FsconfigSetFlag(fs, "rw"); err == nil {
		err = unix.FsconfigReconfigure(fs)
	}
	if err != nil {
		err = fmt.Errorf("%w%s", err, kernelWords(fs))
	}
	return struct{}{}, err
})

type modeArgs struct {
	Dir      string
	ReadOnly bool
}

var doSetMode = Task("set-mode", func(a modeArgs) (struct{}, error) {
	attr := unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}
	if a.ReadOnly {
		attr = unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	}
	return struct{}{}, unix.MountSetattr(unix.AT_FDCWD, a.Dir, unix.AT_SYMLINK_NOFOLLOW, &attr)
})

// SetReadOnly makes the mount at a directory read-only, or read-write. Other mounts do not change.
func SetReadOnly(ctx context.Context, dir string, readOnly bool) error {
	_, err := doSetMode(ctx, modeArgs{dir, readOnly})
	return err
}

// Elsewhere returns the mounts of a device in all mount namespaces, one for each namespace, and a
// process of each, as "name (pid) at directory".
func Elsewhere(device string) (found []Entry, who []string) {
	namespaces(func(pid string, table Table) bool {
		for _, m := range table {
			if m.Device == device {
				found, who = append(found, m), append(who, holder(pid, m))
				break
			}
		}
		return len(who) < most
	})
	return found, who
}

// most is the number of processes that a message names.
const most = 5

func holder(pid string, m Entry) string {
	comm, _ := os.ReadFile("/proc/" + pid + "/comm")
	return fmt.Sprintf("%s (%s) at %s", strings.TrimSpace(string(comm)), pid, m.Point)
}

// namespaces calls visit with the mount table of each mount namespace, and a process in it, until
// visit returns false.
func namespaces(visit func(pid string, table Table) (more bool)) {
	seen := map[string]bool{}
	procs, _ := os.ReadDir("/proc")
	for _, p := range procs {
		if p.Name()[0] < '0' || p.Name()[0] > '9' {
			continue
		}
		ns, err := os.Readlink("/proc/" + p.Name() + "/ns/mnt")
		if err != nil || seen[ns] {
			continue
		}
		seen[ns] = true
		data, err := os.ReadFile("/proc/" + p.Name() + "/mountinfo")
		if err != nil {
			delete(seen, ns) // the process ended; another process may be in the namespace
			continue
		}
		if table, err := Parse(data); err == nil && !visit(p.Name(), table) {
			return
		}
	}
}
