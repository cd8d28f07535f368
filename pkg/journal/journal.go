// Package journal is a host's own record of its attachments: which container interface holds which addresses
// of which network.
//
// The metadata service decides about addresses; the journal lets DEL, CHECK and GC work while it is away, and
// lets the network manager find what a killed plugin or a reboot has left over. One small JSON file per
// attachment, replaced atomically, so that a lookup costs the same with one attachment and with ten thousand.
package journal

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/cni"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// States of a record.
const (
	// Held: the interface holds its addresses, and the metadata service knows it.
	Held = "held"
	// Unregistered: the interface holds addresses that were given explicitly while the service was away; it must be told.
	Unregistered = "unregistered"
	// Released: the interface is gone, and the service must be told.
	Released = "released"
)

// Record is one attachment.
type Record struct {
	metadata.AttachmentID
	// as the service answered; of a Released record maybe only the network
	Attachment metadata.Attachment `json:"attachment"`
	State      string              `json:"state"`
	// of the plugin that asked: lariat-vxlan, or lariat-ipam under another one
	Type       string            `json:"type"`
	Netns      string            `json:"netns,omitempty"`
	NetnsInode uint64            `json:"netnsInode,omitempty"`
	BootID     string            `json:"bootID"`
	Name       string            `json:"name,omitempty"`
	UUID       string            `json:"uuid,omitempty"`
	Labels     map[string]string `json:"labels,omitempty"`
	Created    time.Time         `json:"created"`

	// Terminating: a DEL has begun to take the interface away, and may have asked the network manager to. Even
	// if that DEL died, what it asked for may come yet, so the interface that stands must not be relied on.
	Terminating bool `json:"leaving,omitempty"`
}

// Sequence is the highest one among the record's addresses: a release that names it cannot hit a later holder.
func (r Record) Sequence() uint64 {
	var seq uint64
	for _, a := range r.Attachment.Addresses {
		seq = max(seq, a.Sequence)
	}
	return seq
}

// Gone reports whether the attachment's network namespace exists no more. Of a record without a path the boot
// alone tells.
func (r Record) Gone(bootID string) bool {
	if r.Netns == "" {
		return r.BootID != bootID
	}
	inode, err := cni.NetnsInode(r.Netns)
	if err != nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	return inode != r.NetnsInode
}

// Lost returns the records whose addresses the service does not know to be theirs; allocations is all that it
// knows of this host. The records must have been read before the allocations were.
func Lost(records []Record, allocations []metadata.Allocation) (out []Record) {
	type claim struct {
		metadata.AttachmentID
		address netip.Addr
	}
	known := make(map[claim]bool, len(allocations))
	for _, a := range allocations {
		known[claim{metadata.AttachmentID{ContainerID: a.ContainerID, IfName: a.IfName}, a.Address}] = true
	}
	for _, r := range records {
		if r.State == Released || r.Terminating {
			continue
		}
		if slices.ContainsFunc(r.Attachment.Addresses, func(a metadata.AttachmentAddress) bool {
			return !known[claim{r.AttachmentID, a.Address}]
		}) {
			out = append(out, r)
		}
	}
	return out
}

// Journal is the folder of records.
type Journal struct{ Dir string }

// New keeps its records under a state directory; empty means metadata.DefaultStateDir.
func New(stateDir string) Journal {
	return Journal{Dir: filepath.Join(cmp.Or(stateDir, metadata.DefaultStateDir), "attachments")}
}

// StateDir is the state directory that the journal is in, as an absolute path.
func (j Journal) StateDir() string {
	dir := filepath.Dir(j.Dir)
	if abs, err := filepath.Abs(dir); err == nil {
		return abs
	}
	return dir
}

func (j Journal) path(network string, id metadata.AttachmentID) string {
	// Neither part may hold a colon or a slash: pkg/cni has refused them.
	return filepath.Join(j.Dir, network, id.ContainerID+":"+id.IfName)
}

// Lock serialises the verbs of one attachment across processes; the kernel drops it with the process. Attachments
// never wait for each other: a verb that waits for the store keeps its lock. Each locks a byte of its own in one
// file per network.
func (j Journal) Lock(network string, id metadata.AttachmentID) (unlock func(), err error) {
	return j.lock(network, id, unix.F_OFD_SETLKW)
}

// TryLock is Lock for who holds another attachment's lock: it fails when a verb is at work.
func (j Journal) TryLock(network string, id metadata.AttachmentID) (unlock func(), err error) {
	return j.lock(network, id, unix.F_OFD_SETLK)
}

// LockIfPossible is Lock for who takes away. On a disk that is full or read-only no lock file can be made; a
// runtime must be able to remove a container all the same, and nobody can add one meanwhile.
func (j Journal) LockIfPossible(network string, id metadata.AttachmentID) (unlock func()) {
	unlock, err := j.Lock(network, id)
	if err != nil {
		return func() {}
	}
	return unlock
}

const lockFile = ".lock"

func (j Journal) lock(network string, id metadata.AttachmentID, how int) (unlock func(), err error) {
	h := fnv.New64a()
	h.Write([]byte(id.String()))
	unlock, err = j.lockBytes(network, int64(h.Sum64()>>2), 1, how)
	if err != nil {
		return nil, fmt.Errorf("lock attachment %s of network %s: %w", id, network, err)
	}
	return unlock, nil
}

// lockBytes locks a range of a network's lock file; a length of 0 is all of it.
func (j Journal) lockBytes(network string, start, length int64, how int) (unlock func(), err error) {
	name := filepath.Join(j.Dir, network, lockFile)
	for try := 0; ; try++ {
		f, err := j.create(name, os.O_RDWR|os.O_CREATE)
		if (errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrExist)) && try < 100 {
			continue // RemoveNetwork has removed the directory just now
		}
		if err != nil {
			return nil, err
		}
		for {
			// Locks of a file description, not of a process: also two threads of one process exclude each other.
			err = unix.FcntlFlock(f.Fd(), how, &unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: start,
				Len: length})
			if !errors.Is(err, unix.EINTR) {
				break
			}
		}
		var held, there unix.Stat_t
		if err == nil {
			err = unix.Fstat(int(f.Fd()), &held)
		}
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", name, err)
		}
		if unix.Stat(name, &there) == nil && there.Ino == held.Ino && there.Dev == held.Dev {
			return func() { f.Close() }, nil
		}
		f.Close() // RemoveNetwork was faster
	}
}

func (j Journal) create(name string, flag int) (*os.File, error) {
	f, err := os.OpenFile(name, flag, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			return nil, err
		}
		f, err = os.OpenFile(name, flag, 0o600)
	}
	return f, err
}

// Put writes a record, whole or not at all. The caller holds its lock, so the temporary name is its own.
//
// There is no fsync, on purpose. What a power failure can tear is by then a record of an earlier boot, whose
// containers are gone and whose addresses the manager gives back by their boot id, so nothing hangs on it
// (docs/design/journal.md). What kill -9 can interrupt is covered by the rename. The 0.7 ms of two fsyncs are
// a sixth of an ADD.
func (j Journal) Put(r Record) error {
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("journal %s: %w", r.AttachmentID, err)
	}
	path := j.path(r.Attachment.Network, r.AttachmentID)
	tmp := temporary(path)
	f, err := j.create(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC)
	if err == nil {
		_, err = f.Write(data)
		err = errors.Join(err, f.Close())
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		os.Remove(tmp)
		return fmt.Errorf("journal attachment %s of network %s: %w", r.AttachmentID, r.Attachment.Network, err)
	}
	return nil
}

// SetTerminating notes whether a DEL has begun; without a record there is nothing to note.
func (j Journal) SetTerminating(network string, id metadata.AttachmentID, leaving bool) error {
	r, ok, err := j.Get(network, id)
	if err != nil || !ok || r.Terminating == leaving {
		return err
	}
	r.Terminating = leaving
	return j.Put(r)
}

// Get reads a record; ok is false when there is none. A torn one counts as none: it is of an earlier boot.
func (j Journal) Get(network string, id metadata.AttachmentID) (r Record, ok bool, err error) {
	data, err := os.ReadFile(j.path(network, id))
	if errors.Is(err, fs.ErrNotExist) {
		return r, false, nil
	}
	if err != nil {
		return r, false, fmt.Errorf("journal: %w", err)
	}
	if json.Unmarshal(data, &r) != nil || r.AttachmentID != id || r.Attachment.Network != network {
		return Record{}, false, nil
	}
	return r, true, nil
}

const temporaryPrefix = ".tmp-"

func temporary(path string) string {
	return filepath.Join(filepath.Dir(path), temporaryPrefix+filepath.Base(path))
}

// Remove forgets a record, and what a killed Put may have left of one.
func (j Journal) Remove(network string, id metadata.AttachmentID) error {
	for _, name := range []string{j.path(network, id), temporary(j.path(network, id))} {
		err := os.Remove(name)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			continue
		}
		// A file system that is read-only says so of files that are not there, too.
		if _, there := os.Lstat(name); !errors.Is(there, fs.ErrNotExist) {
			return fmt.Errorf("journal: %w", err)
		}
	}
	return nil
}

// BeginHostSetup notes that a plugin sets this host up for a network, and EndHostSetup that it came to its end.
func (j Journal) BeginHostSetup(network string) error {
	f, err := j.create(j.hostSetupFile(network), os.O_WRONLY|os.O_CREATE)
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	return f.Close()
}

// EndHostSetup takes back what BeginHostSetup noted.
func (j Journal) EndHostSetup(network string) error {
	if err := os.Remove(j.hostSetupFile(network)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("journal: %w", err)
	}
	return nil
}

// HostSetupPending reports whether a BeginHostSetup has found no EndHostSetup yet: it is under way, or was
// killed. It costs one system call.
func (j Journal) HostSetupPending(network string) bool {
	_, err := os.Lstat(j.hostSetupFile(network))
	return err == nil
}

func (j Journal) hostSetupFile(network string) string {
	return filepath.Join(j.Dir, network, ".joining")
}

// RemoveNetwork removes the directory of a network that has no records. It reports whether there was one to remove;
// a directory that has records, or that somebody works in, stays.
func (j Journal) RemoveNetwork(network string) (bool, error) {
	dir := filepath.Join(j.Dir, network)
	if entries, err := os.ReadDir(dir); err != nil ||
		slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return !strings.HasPrefix(e.Name(), ".") }) {
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return false, err
	}
	unlock, err := j.lockBytes(network, 0, 0, unix.F_OFD_SETLK)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("journal: %w", err)
	}
	defer unlock()
	entries, err := os.ReadDir(dir)
	if err != nil {
		return false, fmt.Errorf("journal: %w", err)
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") { // it came meanwhile
			return false, nil
		}
	}
	// The lock file last: until it is gone, whoever comes waits for it, and then begins anew.
	for _, e := range entries {
		if e.Name() != lockFile {
			err = errors.Join(err, os.Remove(filepath.Join(dir, e.Name())))
		}
	}
	if err = errors.Join(err, os.Remove(filepath.Join(dir, lockFile))); err != nil {
		return false, fmt.Errorf("journal: %w", err)
	}
	// Somebody may have begun anew meanwhile, or even have come to an end.
	if err := os.Remove(dir); err != nil && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("journal: %w", err)
	}
	return true, nil
}

// Networks lists the networks that have records.
func (j Journal) Networks() ([]string, error) {
	entries, err := os.ReadDir(j.Dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("journal: %w", err)
	}
	var out []string
	for _, e := range entries {
		if e.IsDir() {
			out = append(out, e.Name())
		}
	}
	return out, nil
}

// List reads all records of a network. A torn one is listed with its id and the State Released: all that can
// be done about it is to give back what it held. Temporary files of killed processes are removed, unless the
// caller holds their record's lock.
func (j Journal) List(network string) ([]Record, error) {
	dir := filepath.Join(j.Dir, network)
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("journal: %w", err)
	}
	var out []Record
	for _, e := range entries {
		if name := e.Name(); strings.HasPrefix(name, ".") {
			if rest, ok := strings.CutPrefix(name, temporaryPrefix); ok {
				j.removeStale(network, rest)
			}
			continue
		}
		container, ifname, ok := strings.Cut(e.Name(), ":")
		if !ok {
			continue
		}
		id := metadata.AttachmentID{ContainerID: container, IfName: ifname}
		r, ok, err := j.Get(network, id)
		if err != nil {
			return out, err
		}
		if !ok {
			if _, err := os.Stat(filepath.Join(dir, e.Name())); err != nil {
				continue // went away meanwhile
			}
			r = Record{AttachmentID: id, Attachment: metadata.Attachment{Network: network}, State: Released}
		}
		out = append(out, r)
	}
	return out, nil
}

// removeStale removes a temporary file whose writer is dead: it holds the record's lock no more.
func (j Journal) removeStale(network, record string) {
	container, ifname, ok := strings.Cut(record, ":")
	if !ok {
		return
	}
	id := metadata.AttachmentID{ContainerID: container, IfName: ifname}
	if unlock, err := j.TryLock(network, id); err == nil {
		os.Remove(temporary(j.path(network, id)))
		unlock()
	}
}
