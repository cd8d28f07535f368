package nfs

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/mounts"
)

// What Lariat keeps on an export is below .lariat in the base: a mark for each folder that it created, folders in the making, and folders
// that are being removed. All hosts see it, and containers do not, for they see only their volume.
const (
	hidden = ".lariat"
	made   = "new-"
	trash  = "trash-"
)

// mark says which folder was created by us: its identity on the server, not its name, for somebody may have put another there.
type mark struct {
	Name     string    `json:"name"`
	Inode    uint64    `json:"inode"`
	Handle   string    `json:"handle,omitempty"` // of the file on the server, where the client tells; it does not come back when an inode's number does
	Deleting bool      `json:"deleting,omitempty"`
	Host     string    `json:"host,omitempty"`
	Time     time.Time `json:"time"`
}

func (m mark) is(of mark) bool {
	return m.Inode == of.Inode && (m.Handle == of.Handle || m.Handle == "" || of.Handle == "")
}

// exportArgs are for children that work on an export.
type exportArgs struct {
	Mount    mounts.Spec // of the base
	RunDir   string
	Name     string
	OnRemove OnRemove
}

type created struct {
	Ours bool // the folder is one that Lariat created, now or before
	New  bool // now
}

type removed struct {
	Message string
}

// In a mount namespace of their own: whatever becomes of them, the host never sees the base.
var (
	createOn = mounts.PrivateTask("nfs-create", func(a exportArgs) (created, error) {
		root, err := a.open()
		if err != nil {
			return created{}, err
		}
		defer root.Close()
		return create(root, a.Name)
	})
	removeOn = mounts.PrivateTask("nfs-remove", func(a exportArgs) (removed, error) {
		root, err := a.open()
		if err != nil {
			return removed{}, err
		}
		defer root.Close()
		return remove(root, a.Name, a.OnRemove)
	})
	// setGroup works on a volume where it is mounted.
	setGroup = mounts.Task("nfs-group", func(a groupArgs) (struct{}, error) { return struct{}{}, group(a) })
)

// open mounts the base out of sight.
func (a exportArgs) open() (*os.Root, error) {
	// A file system in memory, only for a folder to mount at.
	if err := unix.Mount("tmpfs", a.RunDir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "size=64k,mode=0700"); err != nil {
		return nil, fmt.Errorf("mount a tmpfs: %w", err)
	}
	a.Mount.Dir = filepath.Join(a.RunDir, "base")
	if err := mounts.MountHere(a.Mount, false); err != nil {
		return nil, err
	}
	return os.OpenRoot(a.Mount.Dir)
}

// create makes the base's folder name, unless it is there. It can be killed anywhere, and run on several hosts at once:
// the folder is made aside, marked, and gets its name at last.
func create(root *os.Root, name string) (created, error) {
	aside := filepath.Join(hidden, made+name)
	for range 5 { // again when another host was faster
		m, marked, err := readMark(root, name)
		if err != nil {
			return created{}, err
		}
		fi, err := root.Lstat(name)
		switch {
		case err == nil && !fi.IsDir():
			return created{}, volume.Errorf(volume.ErrConflict, "%s is there, and is not a folder", name)
		case err == nil:
			id, err := identify(root, name)
			if err != nil {
				return created{}, err
			}
			if marked && m.Deleting && m.is(id) {
				return created{}, volume.Errorf(volume.ErrInUse, "volume %s is being removed; repeat its removal first", name)
			}
			return created{Ours: marked && m.is(id)}, nil
		case !errors.Is(err, fs.ErrNotExist):
			return created{}, err
		case marked && m.Deleting:
			return created{}, volume.Errorf(volume.ErrInUse, "volume %s is being removed; repeat its removal first", name)
		}
		if err := root.Mkdir(hidden, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return created{}, denied(err)
		}
		volume.Step("hidden-made")
		// What is there already was left by a killed creation, or another host is at it.
		if err := root.Mkdir(aside, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return created{}, denied(err)
		}
		volume.Step("folder-made-aside")
		id, err := identify(root, aside)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return created{}, err
		}
		id.Name, id.Time = name, time.Now().UTC().Truncate(time.Second)
		id.Host, _ = os.Hostname()
		if err := writeMark(root, id); err != nil {
			return created{}, err
		}
		volume.Step("folder-marked")
		err = root.Rename(aside, name)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, fs.ErrExist) || errors.Is(err, unix.ENOTDIR) {
			if !errors.Is(err, fs.ErrNotExist) { // somebody else's, made in between
				_ = root.Remove(aside)
			}
			continue
		}
		if err != nil {
			return created{}, err
		}
		volume.Step("folder-named")
		return created{Ours: true, New: true}, nil
	}
	return created{}, fmt.Errorf("folder %s: others keep changing it", name)
}

// denied names the usual cause.
func denied(err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w: the export must be writable for root (no_root_squash), or its base for the user that root is mapped to", err)
	}
	return err
}

// remove does what onRemove says to a folder that Lariat created. It can be killed anywhere; a purge once begun is finished by the next call.
func remove(root *os.Root, name string, how OnRemove) (removed, error) {
	m, marked, err := readMark(root, name)
	if err != nil {
		return removed{}, err
	}
	id, err := identify(root, name)
	exists := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return removed{}, err
	}
	switch {
	case !marked && exists:
		return removed{Message: fmt.Sprintf("folder %s is kept: Lariat did not create it", name)}, nil
	case !marked:
		return removed{}, nil
	case exists && !m.is(id):
		return removed{Message: fmt.Sprintf("folder %s is kept: it is not the one that Lariat created under this name", name)}, nil
	}
	bin := filepath.Join(hidden, trash+name)
	if !m.Deleting {
		if !exists {
			_ = root.Remove(filepath.Join(hidden, made+name)) // of a creation that was killed
			return removed{}, dropMark(root, name)
		}
		if how == Archive {
			to := "archived-" + name + "-" + time.Now().UTC().Format("20060102T150405.000Z")
			if err := root.Rename(name, to); err != nil {
				return removed{}, err
			}
			volume.Step("archived")
			return removed{Message: "kept as " + to}, dropMark(root, name)
		}
		m.Deleting = true
		if err := writeMark(root, m); err != nil {
			return removed{}, err
		}
		volume.Step("removal-marked")
	}
	if exists {
		if err := root.Rename(name, bin); err != nil {
			return removed{}, err
		}
	}
	volume.Step("moved-to-trash")
	var n tally
	err = n.clear(root, bin, 0)
	volume.Step("trash-cleared")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return removed{}, fmt.Errorf("purge %s, after %s: %w", name, n, err)
	}
	return removed{Message: "purged " + n.String()}, dropMark(root, name)
}

// tally counts what was removed, so that a purge of nothing shows.
type tally struct{ Files, Bytes int64 }

func (n tally) String() string { return fmt.Sprintf("%d files, %d octets", n.Files, n.Bytes) }

// clear removes a folder with all that is in it. It neither follows a link nor enters another file system: os.Root keeps it below the
// folder, whatever others do meanwhile.
func (n *tally) clear(parent *os.Root, name string, device uint64) error {
	dir, err := parent.OpenRoot(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	self, err := dir.Stat(".")
	if err != nil {
		return err
	}
	if dev := self.Sys().(*syscall.Stat_t).Dev; device == 0 {
		device = dev
	} else if dev != device {
		return volume.Errorf(volume.ErrConflict, "%s is another file system: it is not removed", name)
	}
	for {
		f, err := dir.Open(".")
		if err != nil {
			return err
		}
		entries, err := f.ReadDir(1000)
		f.Close()
		if errors.Is(err, io.EOF) || err == nil && len(entries) == 0 {
			break
		}
		if err != nil {
			return err
		}
		for _, e := range entries {
			if e.IsDir() {
				if err := n.clear(dir, e.Name(), device); err != nil && !errors.Is(err, fs.ErrNotExist) {
					return err
				}
				continue
			}
			if fi, err := dir.Lstat(e.Name()); err == nil {
				n.Bytes += fi.Size()
			}
			if err := dir.Remove(e.Name()); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			n.Files++
			if n.Files == 2 {
				volume.Step("removing")
			}
		}
	}
	return parent.Remove(name)
}

// identify is a folder of the base as the server knows it.
func identify(root *os.Root, name string) (mark, error) {
	f, err := root.Open(name)
	if err != nil {
		return mark{}, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return mark{}, err
	}
	m := mark{Inode: fi.Sys().(*syscall.Stat_t).Ino}
	if h, _, err := unix.NameToHandleAt(int(f.Fd()), "", unix.AT_EMPTY_PATH); err == nil {
		m.Handle = hex.EncodeToString(h.Bytes())
	}
	return m, nil
}

func markFile(name string) string { return filepath.Join(hidden, name+".json") }

func readMark(root *os.Root, name string) (m mark, found bool, err error) {
	data, err := root.ReadFile(markFile(name))
	if errors.Is(err, fs.ErrNotExist) {
		return m, false, nil
	}
	if err != nil {
		return m, false, fmt.Errorf("the mark of volume %s: %w", name, err)
	}
	if err := json.Unmarshal(data, &m); err != nil || m.Inode == 0 {
		return mark{}, false, nil // a torn one proves nothing: the folder counts as not ours
	}
	return m, true, nil
}

func writeMark(root *os.Root, m mark) error {
	data, err := json.Marshal(m)
	if err != nil {
		return err
	}
	tmp := draft(m.Name)
	f, err := root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err == nil {
		_, err = f.Write(data)
		err = errors.Join(err, f.Sync(), f.Close())
	}
	if err == nil {
		volume.Step("mark-written")
		err = root.Rename(tmp, markFile(m.Name))
	}
	if err != nil {
		_ = root.Remove(tmp)
		return fmt.Errorf("mark volume %s as Lariat's: %w", m.Name, denied(err))
	}
	return nil
}

// draft is a mark that is being written. Each host has its own, and the volume's lock there.
func draft(name string) string {
	host, _ := os.Hostname()
	return filepath.Join(hidden, "."+name+"@"+host)
}

func dropMark(root *os.Root, name string) error {
	_ = root.Remove(draft(name)) // if a process was killed there
	if err := root.Remove(markFile(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

type groupArgs struct {
	Dir   string
	Group int64
}

// group gives the uppermost folder of a volume to a group, which may write and inherits.
func group(a groupArgs) error {
	f, err := os.OpenFile(a.Dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if st := fi.Sys().(*syscall.Stat_t); int64(st.Gid) != a.Group {
		if err := f.Chown(-1, int(a.Group)); err != nil {
			return err
		}
	}
	if want := fi.Mode() | 0o070 | fs.ModeSetgid; want != fi.Mode() {
		return f.Chmod(want)
	}
	return nil
}
