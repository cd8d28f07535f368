package nfs

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/mounts"
)

// Names below .lariat in the base, where Lariat keeps its state on an export. The directory holds a
// mark for each directory that Lariat created. It also holds directories in creation and in
// removal. All hosts see it. Containers do not, because they see only their volume.
const (
	hidden = ".lariat"
	made   = "new-"
	trash  = "trash-"
)

// mark identifies a directory that Lariat created. It holds the identity on the server, because
// another directory may have taken the name.
type mark struct {
	Name  string `json:"name"`
	ID    string `json:"id,omitempty"` // of the volume; "": an older version wrote the mark, see identity
	Inode uint64 `json:"inode"`
	// Handle is the server's file handle, where the client reports it. A handle is never reused,
	// unlike an inode number.
	Handle   string    `json:"handle,omitempty"`
	OnRemove OnRemove  `json:"onRemove,omitempty"` // the creator's choice; "": the creator made none
	Deleting bool      `json:"deleting,omitempty"`
	Host     string    `json:"host,omitempty"`
	Time     time.Time `json:"time"`

	born int64 // last write to the directory; while it is aside, that is its creation
}

func (m mark) is(of mark) bool {
	return m.Inode == of.Inode && (m.Handle == of.Handle || m.Handle == "" || of.Handle == "")
}

// identity returns an identity that is equal on all hosts and unique to the volume. Marks of older
// versions hold no identity. Their identity follows from their other members.
func (m mark) identity() string {
	if m.ID != "" {
		return m.ID
	}
	return digest(m.Name, m.Inode, m.Handle, m.Host, m.Time.UTC().Format(time.RFC3339))
}

func digest(of ...any) string {
	sum := sha256.Sum256(fmt.Appendln(nil, of...))
	return hex.EncodeToString(sum[:16])
}

// hostname returns the name of this host. Tests simulate several hosts.
var hostname = os.Hostname

// maker returns the creator of a volume, for messages.
func (m mark) maker() string {
	return fmt.Sprintf("host %s created it at %s", cmp.Or(m.Host, "unknown"), m.Time.UTC().Format(time.RFC3339))
}

// unmarked is the identity of all directories that Lariat did not create. Only the administrator
// decides about them.
const unmarked = "unmarked"

// exportArgs holds the arguments of children that work on an export.
type exportArgs struct {
	Mount    mounts.Spec // of the base
	RunDir   string
	Name     string
	OnRemove OnRemove `json:",omitempty"` // omitted if empty, because "" is not a valid word
	Want     string   // identity of the only volume to touch; "": only the name is known
	// Legacy is set when an older version wrote the record, so that Want is unknown. It holds host
	// and time of the latest possible mark.
	Legacy *mark
}

// created describes a directory, as the base shows it.
type created struct {
	Ours     bool   // Lariat created the directory, now or earlier
	New      bool   // this call created the directory
	Identity string // "": there is no directory
	Inode    uint64
	OnRemove OnRemove `json:",omitempty"` // the creator's choice; omitted if empty, because "" is not a valid word
	Made     string   // creator and time, for messages
	NoFolder bool     // the name belongs to a file or another non-directory
}

type removed struct {
	Message string
	Other   bool // the name belongs to another volume by now; nothing was touched
}

// These tasks have mount namespaces of their own, so the host never sees the base.
var (
	createOn = mounts.PrivateTask("nfs-create", func(a exportArgs) (created, error) {
		root, err := a.open()
		if err != nil {
			return created{}, err
		}
		defer root.Close()
		return create(root, a)
	})
	lookOn = mounts.PrivateTask("nfs-look", func(a exportArgs) (created, error) {
		root, err := a.open()
		if err != nil {
			return created{}, err
		}
		defer root.Close()
		return look(root, a.Name)
	})
	removeOn = mounts.PrivateTask("nfs-remove", func(a exportArgs) (removed, error) {
		root, err := a.open()
		if err != nil {
			return removed{}, err
		}
		defer root.Close()
		return remove(root, a)
	})
	// rootInode reads the inode at a volume's mount.
	rootInode = mounts.Task("nfs-inode", func(dir string) (uint64, error) {
		var st unix.Stat_t
		err := unix.Lstat(dir, &st)
		return st.Ino, err
	})
	// setGroup sets the group at a volume's mount.
	setGroup = mounts.Task("nfs-group", func(a groupArgs) (struct{}, error) { return struct{}{}, group(a) })
)

// open mounts the base out of sight of the host.
func (a exportArgs) open() (*os.Root, error) {
	// The tmpfs only holds the mount directory.
	if err := unix.Mount("tmpfs", a.RunDir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "size=64k,mode=0700"); err != nil {
		return nil, fmt.Errorf("mount a tmpfs: %w", err)
	}
	a.Mount.Dir = filepath.Join(a.RunDir, "base")
	if err := mounts.MountHere(a.Mount, false); err != nil {
		return nil, err
	}
	return os.OpenRoot(a.Mount.Dir)
}

// look returns the state of the base's directory name.
func look(root *os.Root, name string) (created, error) {
	m, marked, err := readMark(root, name)
	if err != nil {
		return created{}, err
	}
	return see(root, name, m, marked)
}

func see(root *os.Root, name string, m mark, marked bool) (created, error) {
	fi, err := root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return created{}, nil
	}
	if err != nil {
		return created{}, err
	}
	if !fi.IsDir() {
		return created{Identity: unmarked, Made: "it is not a folder", NoFolder: true}, nil
	}
	id, err := identify(root, name)
	if errors.Is(err, fs.ErrNotExist) {
		return created{}, nil
	}
	if err != nil || !marked || !m.is(id) {
		return created{Identity: unmarked, Inode: id.Inode, Made: "Lariat did not create it"}, err
	}
	return created{Ours: true, Identity: m.identity(), Inode: id.Inode, OnRemove: m.OnRemove, Made: m.maker()}, nil
}

// create makes the base's directory name, unless it exists. It can be killed at any point, and
// several hosts may run it at once. The directory is made aside and marked, and gets its name last.
func create(root *os.Root, a exportArgs) (created, error) {
	name := a.Name
	aside := filepath.Join(hidden, made+name)
	for try := range 5 { // repeat if another host was faster
		m, marked, err := readMark(root, name)
		if err != nil {
			return created{}, err
		}
		c, err := see(root, name, m, marked)
		if err != nil {
			return created{}, err
		}
		switch {
		case marked && m.Deleting && (c.Ours || c.Identity == ""):
			return created{}, volume.Errorf(volume.ErrInUse, "volume %s is being removed; repeat its removal first", name)
		case c.NoFolder:
			return created{}, volume.Errorf(volume.ErrConflict, "%s is there, and is not a folder", name)
		case c.Identity != "":
			if try > 0 {
				_ = root.Remove(aside) // made here, but not needed
			}
			return c, nil
		case marked && putBack(root, m):
			continue
		}
		if err := root.Mkdir(hidden, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return created{}, denied(err)
		}
		volume.Failpoint("hidden-made")
		// An existing directory was left by a killed creation, or another host is creating it.
		if err := root.Mkdir(aside, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return created{}, denied(err)
		}
		volume.Failpoint("folder-made-aside")
		id, err := identify(root, aside)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return created{}, err
		}
		// Hosts that create at the same time find the same directory. They therefore compute the
		// same identity before any host writes to the directory.
		id.ID = digest(name, id.Inode, id.Handle, id.born)
		id.Name, id.OnRemove, id.Time = name, a.OnRemove, time.Now().UTC().Truncate(time.Second)
		if marked && m.ID == id.ID {
			id.OnRemove = cautious(m.OnRemove, id.OnRemove)
		}
		id.Host, _ = hostname()
		if err := writeMark(root, id, m, marked); errors.Is(err, errOvertaken) {
			continue
		} else if err != nil {
			return created{}, err
		}
		volume.Failpoint("folder-marked")
		err = root.Rename(aside, name)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, fs.ErrExist) ||
			errors.Is(err, unix.ENOTDIR) {
			if !errors.Is(err, fs.ErrNotExist) { // another process made the name meanwhile
				_ = root.Remove(aside)
			}
			continue
		}
		if err != nil {
			return created{}, err
		}
		volume.Failpoint("folder-named")
		return created{Ours: true, New: true, Identity: id.ID, Inode: id.Inode, OnRemove: id.OnRemove, Made: id.maker()}, nil
	}
	return created{}, fmt.Errorf("folder %s: others keep changing it", name)
}

// denied adds the usual cause to a permission error.
func denied(err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w: the export must be writable for root (no_root_squash), or its base for the user that "+
			"root is mapped to", err)
	}
	return err
}

// remove applies onRemove to a directory that Lariat created. It can be killed at any point. The
// next call finishes a purge that has begun. Other hosts may work on the directory at the same
// time. After each move, remove therefore checks the identity of the moved directory.
func remove(root *os.Root, a exportArgs) (removed, error) {
	name := a.Name
	m, marked, err := readMark(root, name)
	if err != nil {
		return removed{}, err
	}
	c, err := see(root, name, m, marked)
	switch {
	case err != nil:
		return removed{}, err
	case c.Identity == "" && !marked:
		return removed{}, nil
	}
	gone := c.Identity == "" // only the mark is left, or the directory is in transit
	if gone {
		c.Identity, c.Made = m.identity(), m.maker()
	}
	switch {
	case c.Identity == unmarked && marked:
		return removed{Message: fmt.Sprintf("folder %s is kept: it is not the one that Lariat created under this name",
			name)}, nil
	case c.Identity == unmarked:
		return removed{Message: fmt.Sprintf("folder %s is kept: Lariat did not create it", name)}, nil
	case a.Want != "" && a.Want != c.Identity:
		return removed{Other: true, Message: fmt.Sprintf(
			"folder %s is kept: volume %s, identity %s, that this host knows does not exist any "+
				"more, and this one is another (identity %s, %s)",
			name, name, a.Want, c.Identity, c.Made)}, nil
	case a.Want == "" && a.Legacy != nil && !m.Deleting && !a.Legacy.covers(m):
		return removed{Other: true, Message: fmt.Sprintf(
			"folder %s is kept: this host's record is of an older version and does not prove that it"+
				" is about this folder (%s); create and delete it again to remove it",
			name, c.Made)}, nil
	}
	if gone && !m.Deleting && !putBack(root, m) {
		_ = root.Remove(filepath.Join(hidden, made+name)) // of a killed creation
		return removed{}, dropMark(root, m)
	}
	how := cautious(m.OnRemove, a.OnRemove)
	if m.Deleting {
		how = Purge
	}
	if how == Retain {
		return removed{Message: fmt.Sprintf(
			"folder %s is kept, as onRemove=retain of its creator says (%s); to change that, change "+
				"onRemove in %s on the server", name, c.Made, markFile(name))}, nil
	}
	bin := m.bin()
	if !m.Deleting {
		if how == Archive {
			to := "archived-" + name + "-" + time.Now().UTC().Format("20060102T150405.000Z")
			if err := move(root, m, to); err != nil {
				return removed{}, err
			}
			volume.Failpoint("archived")
			return removed{Message: "kept as " + to}, dropMark(root, m)
		}
		old := m
		m.Deleting = true
		if err := writeMark(root, m, old, true); err != nil {
			return removed{}, err
		}
		volume.Failpoint("removal-marked")
	}
	if err := move(root, m, bin); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return removed{}, err
	}
	volume.Failpoint("moved-to-trash")
	var n tally
	err = n.clear(root, bin, 0, m.is)
	volume.Failpoint("trash-cleared")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return removed{}, fmt.Errorf("purge %s, after %s: %w", name, n, err)
	}
	return removed{Message: "purged " + n.String()}, dropMark(root, m)
}

// covers reports whether a mark can belong to a record of an older version, which has no identity.
// Such a mark is of the same host, and not later than the record.
func (m mark) covers(other mark) bool {
	return other.ID == "" && other.Host == m.Host && !other.Time.After(m.Time)
}

// bin returns the path to which a directory is moved to be emptied. Older versions had one path for
// each name.
func (m mark) bin() string {
	if m.ID == "" {
		return filepath.Join(hidden, trash+m.Name)
	}
	return filepath.Join(hidden, trash+m.Name+"@"+m.ID)
}

// errOvertaken means that another host has changed a volume since this host examined it.
var errOvertaken = volume.Errorf(volume.ErrInUse, "another host has just changed the volume: try again")

// move renames the marked directory. A rename uses only the old name. move therefore checks the
// directory afterwards, and renames a wrong directory back.
func move(root *os.Root, m mark, to string) error {
	if err := root.Rename(m.Name, to); err != nil {
		return err
	}
	volume.Failpoint("moved")
	id, err := identify(root, to)
	if err == nil && !m.is(id) {
		err = errors.Join(errOvertaken, root.Rename(to, m.Name))
	}
	return err
}

// putBack restores the name of a marked directory. It applies if a removal of another volume moved
// the directory, and was killed before it could rename it back.
func putBack(root *os.Root, m mark) bool {
	f, err := root.Open(hidden)
	if err != nil {
		return false
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return false
	}
	for _, n := range names {
		if !strings.HasPrefix(n, trash+m.Name+"@") {
			continue
		}
		if id, err := identify(root, filepath.Join(hidden, n)); err == nil && m.is(id) {
			return root.Rename(filepath.Join(hidden, n), m.Name) == nil
		}
	}
	return false
}

// tally counts removed files and bytes, so that a purge of nothing is visible.
type tally struct{ Files, Bytes int64 }

func (n tally) String() string { return fmt.Sprintf("%d files, %d octets", n.Files, n.Bytes) }

// clear removes a directory with all its content. It follows no link and enters no other file
// system. os.Root keeps it below the directory despite concurrent changes. The opened directory
// must satisfy is, which clear calls for the top directory only.
func (n *tally) clear(parent *os.Root, name string, device uint64, is func(mark) bool) error {
	dir, err := parent.OpenRoot(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	if is != nil {
		if id, err := identify(dir, "."); err != nil || !is(id) {
			return errors.Join(err, errOvertaken)
		}
	}
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
				if err := n.clear(dir, e.Name(), device, nil); err != nil && !errors.Is(err, fs.ErrNotExist) {
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
				volume.Failpoint("removing")
			}
		}
	}
	return parent.Remove(name)
}

// identify returns the server's identity of a directory in the base.
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
	m := mark{Inode: fi.Sys().(*syscall.Stat_t).Ino, born: fi.ModTime().UnixNano()}
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
		return mark{}, false, nil // a torn mark proves nothing: the directory counts as foreign
	}
	return m, true, nil
}

// writeMark replaces the mark, or the absence of a mark, that was read before.
func writeMark(root *os.Root, m, old mark, marked bool) error {
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
		volume.Failpoint("mark-written")
		if now, there, rerr := readMark(root, m.Name); rerr != nil || there != marked || now != old {
			_ = root.Remove(tmp)
			return errors.Join(rerr, errOvertaken)
		}
		err = root.Rename(tmp, markFile(m.Name))
	}
	if err != nil {
		_ = root.Remove(tmp)
		return fmt.Errorf("mark volume %s as Lariat's: %w", m.Name, denied(err))
	}
	return nil
}

// draft returns the path of a mark during its writing. Each host has its own path, and holds the
// volume's lock meanwhile.
func draft(name string) string {
	host, _ := hostname()
	return filepath.Join(hidden, "."+name+"@"+host)
}

// dropMark removes a volume's mark, unless the mark belongs to another volume by now.
func dropMark(root *os.Root, m mark) error {
	_ = root.Remove(draft(m.Name)) // a killed process may have left it
	now, marked, err := readMark(root, m.Name)
	if err != nil || marked && now.identity() != m.identity() {
		return err
	}
	if err := root.Remove(markFile(m.Name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

type groupArgs struct {
	Dir   string
	Group int64
}

// group gives a volume's top directory to a group, which may write and whose id new files inherit.
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
