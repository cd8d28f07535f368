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

// What Lariat keeps on an export is below .lariat in the base: a mark for each folder that it created,
// folders in the making, and folders that are being removed. All hosts see it, and containers do not, for
// they see only their volume.
const (
	hidden = ".lariat"
	made   = "new-"
	trash  = "trash-"
)

// mark says which folder was created by us: its identity on the server, not its name, for somebody may have
// put another there.
type mark struct {
	Name  string `json:"name"`
	ID    string `json:"id,omitempty"` // of the volume; "": an older version wrote the mark, see identity
	Inode uint64 `json:"inode"`
	// of the file on the server, where the client tells; it does not come back when an inode's
	// number does
	Handle   string    `json:"handle,omitempty"`
	OnRemove OnRemove  `json:"onRemove,omitempty"` // as the creator wants it; "": the creator did not say
	Deleting bool      `json:"deleting,omitempty"`
	Host     string    `json:"host,omitempty"`
	Time     time.Time `json:"time"`

	born int64 // when the folder was last written to, which is its birth as long as it is aside
}

func (m mark) is(of mark) bool {
	return m.Inode == of.Inode && (m.Handle == of.Handle || m.Handle == "" || of.Handle == "")
}

// identity is the same on all hosts, and no other volume ever has it. Marks of older versions have
// none written: theirs follows from the rest.
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

// hostname is this host's; tests play several.
var hostname = os.Hostname

// maker says who created a volume, for messages.
func (m mark) maker() string {
	return fmt.Sprintf("host %s created it at %s", cmp.Or(m.Host, "unknown"), m.Time.UTC().Format(time.RFC3339))
}

// unmarked is the identity of all folders that Lariat did not create: what becomes of them is the administrator's.
const unmarked = "unmarked"

// exportArgs are for children that work on an export.
type exportArgs struct {
	Mount    mounts.Spec // of the base
	RunDir   string
	Name     string
	OnRemove OnRemove `json:",omitempty"` // "" is not a word that can be read
	Want     string   // identity of the only volume that may be touched; "": the name is all that is known
	// Want is not known, because an older version wrote the record: host and time of the latest
	// mark that can be meant
	Legacy *mark
}

// created is what a folder is, as the base shows it.
type created struct {
	Ours     bool   // Lariat created the folder, now or before
	New      bool   // now
	Identity string // "": there is no folder
	Inode    uint64
	OnRemove OnRemove `json:",omitempty"` // as the creator wants it; "" is not a word that can be read
	Made     string   // by whom and when, for messages
	NoFolder bool     // what has the name is a file, or the like
}

type removed struct {
	Message string
	Other   bool // the name is another volume's by now; nothing was touched
}

// In a mount namespace of their own: whatever becomes of them, the host never sees the base.
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
	// rootInode reads where a volume is mounted.
	rootInode = mounts.Task("nfs-inode", func(dir string) (uint64, error) {
		var st unix.Stat_t
		err := unix.Lstat(dir, &st)
		return st.Ino, err
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

// look says what the base's folder name is.
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

// create makes the base's folder name, unless it is there. It can be killed anywhere, and run on several hosts at once:
// the folder is made aside, marked, and gets its name at last.
func create(root *os.Root, a exportArgs) (created, error) {
	name := a.Name
	aside := filepath.Join(hidden, made+name)
	for try := range 5 { // again when another host was faster
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
				_ = root.Remove(aside) // made here, and not needed
			}
			return c, nil
		case marked && putBack(root, m):
			continue
		}
		if err := root.Mkdir(hidden, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return created{}, denied(err)
		}
		volume.Failpoint("hidden-made")
		// What is there already was left by a killed creation, or another host is at it.
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
		// Hosts that are at it at the same time find the same folder, and with it the same
		// identity, before anybody writes to the folder.
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
			if !errors.Is(err, fs.ErrNotExist) { // somebody else's, made in between
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

// denied names the usual cause.
func denied(err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w: the export must be writable for root (no_root_squash), or its base for the user that "+
			"root is mapped to", err)
	}
	return err
}

// remove does what onRemove says to a folder that Lariat created. It can be killed anywhere; a purge once
// begun is finished by the next call. Other hosts may be at it, too: after each move the folder itself says
// whether it is the one that is meant.
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
	gone := c.Identity == "" // the mark is all that is left, or the folder is on its way
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
		_ = root.Remove(filepath.Join(hidden, made+name)) // of a creation that was killed
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

// covers says whether a mark can be the one that an older version's record, which has no identity,
// is about: this host wrote it, not later than that record.
func (m mark) covers(other mark) bool {
	return other.ID == "" && other.Host == m.Host && !other.Time.After(m.Time)
}

// bin is where a folder is moved to be emptied. Older versions had one for each name.
func (m mark) bin() string {
	if m.ID == "" {
		return filepath.Join(hidden, trash+m.Name)
	}
	return filepath.Join(hidden, trash+m.Name+"@"+m.ID)
}

// errOvertaken is when another host has changed a volume since this one looked.
var errOvertaken = volume.Errorf(volume.ErrInUse, "another host has just changed the volume: try again")

// move gives the marked folder another name. A rename goes by the old name alone, so the folder is
// looked at afterwards, and given back if it is another.
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

// putBack gives a marked folder its name again if a removal of another volume took it and was
// killed before it could give the folder back.
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

// tally counts what was removed, so that a purge of nothing shows.
type tally struct{ Files, Bytes int64 }

func (n tally) String() string { return fmt.Sprintf("%d files, %d octets", n.Files, n.Bytes) }

// clear removes a folder with all that is in it. It neither follows a link nor enters another file system:
// os.Root keeps it below the folder, whatever others do meanwhile. The folder that was opened must be the one
// that is meant; is is asked for the uppermost alone.
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
		return mark{}, false, nil // a torn one proves nothing: the folder counts as not ours
	}
	return m, true, nil
}

// writeMark replaces a mark, or the absence of one, that was read before.
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

// draft is a mark that is being written. Each host has its own, and the volume's lock there.
func draft(name string) string {
	host, _ := hostname()
	return filepath.Join(hidden, "."+name+"@"+host)
}

// dropMark removes a volume's mark, unless it is another volume's by now.
func dropMark(root *os.Root, m mark) error {
	_ = root.Remove(draft(m.Name)) // if a process was killed there
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
