// Package journal is a host's own record of its attachments: which container interface holds which
// addresses of which network.
//
// The metadata service decides about addresses. With the journal, DEL, CHECK and GC work while the
// service is away. The network manager finds in it the remains of a killed plugin or a reboot. The
// journal has one small JSON file per attachment, which is replaced atomically. So a lookup costs
// the same with one attachment and with ten thousand.
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
	// Unregistered: the caller named the addresses while the service was away. They must be
	// registered.
	Unregistered = "unregistered"
	// Released: the interface is removed, and the release must be replayed to the service.
	Released = "released"
)

// Record describes one attachment.
type Record struct {
	metadata.AttachmentID
	// as the service answered; in a Released record maybe only the network
	Attachment metadata.Attachment `json:"attachment"`
	State      string              `json:"state"`
	// the plugin that asked: lariat-vxlan, or lariat-ipam under another plugin
	Type       string            `json:"type"`
	Netns      string            `json:"netns,omitempty"`
	NetnsInode uint64            `json:"netnsInode,omitempty"`
	BootID     string            `json:"bootID"`
	Name       string            `json:"name,omitempty"`
	UUID       string            `json:"uuid,omitempty"`
	Labels     map[string]string `json:"labels,omitempty"`
	Created    time.Time         `json:"created"`

	// Terminating: a DEL has started to remove the interface, and may have asked the network
	// manager to do so. That request may take effect even after the DEL has died. So do not rely on
	// an existing interface.
	Terminating bool `json:"leaving,omitempty"`
}

// Sequence returns the highest sequence number of the record's addresses. A release with this
// number cannot hit a later holder.
func (r Record) Sequence() uint64 {
	var seq uint64
	for _, a := range r.Attachment.Addresses {
		seq = max(seq, a.Sequence)
	}
	return seq
}

// Gone reports whether the attachment's network namespace no longer exists. For a record without a
// path, only the boot id decides.
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

// Lost returns the records with addresses that the service does not know as theirs. allocations is
// the service's complete list for this host. The records must have been read before the
// allocations.
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

// Journal is the directory of records.
type Journal struct{ Dir string }

// New returns the journal under a state directory. An empty stateDir means
// metadata.DefaultStateDir.
func New(stateDir string) Journal {
	return Journal{Dir: filepath.Join(cmp.Or(stateDir, metadata.DefaultStateDir), "attachments")}
}

// StateDir returns the journal's state directory, as an absolute path.
func (j Journal) StateDir() string {
	dir := filepath.Dir(j.Dir)
	if abs, err := filepath.Abs(dir); err == nil {
		return abs
	}
	return dir
}

func (j Journal) path(network string, id metadata.AttachmentID) string {
	// Neither part can hold a colon or a slash: pkg/cni has refused them.
	return filepath.Join(j.Dir, network, id.ContainerID+":"+id.IfName)
}

// Lock serialises the verbs of one attachment across processes. The kernel drops the lock when the
// process ends. A verb that waits for the store keeps its lock, so attachments must never wait for
// each other. Each attachment locks its own byte in one file per network.
func (j Journal) Lock(network string, id metadata.AttachmentID) (unlock func(), err error) {
	return j.lock(network, id, unix.F_OFD_SETLKW)
}

// TryLock is Lock for a caller that holds another attachment's lock. It fails when a verb is in
// progress.
func (j Journal) TryLock(network string, id metadata.AttachmentID) (unlock func(), err error) {
	return j.lock(network, id, unix.F_OFD_SETLK)
}

// LockIfPossible is Lock for removals. On a full or read-only disk no lock file can be created. A
// runtime must still be able to remove a container, and no ADD can run meanwhile.
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

// lockBytes locks a range of a network's lock file. A length of 0 means the whole file.
func (j Journal) lockBytes(network string, start, length int64, how int) (unlock func(), err error) {
	name := filepath.Join(j.Dir, network, lockFile)
	for try := 0; ; try++ {
		f, err := j.create(name, os.O_RDWR|os.O_CREATE)
		if (errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrExist)) && try < 100 {
			continue // RemoveNetwork has just removed the directory
		}
		if err != nil {
			return nil, err
		}
		for {
			// The lock belongs to a file description, not to a process. So it also excludes two
			// threads of one process.
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

// Put writes a record completely or not at all. The caller holds the record's lock, so no other
// process uses the temporary name.
//
// Put does not call fsync, on purpose. A power failure can corrupt only records of an earlier boot.
// Their containers do not exist any more, and the manager releases their addresses by the boot id.
// So nothing depends on such a record (docs/design/journal.md). The rename protects against kill
// -9. Two fsyncs would take 0.7 ms, a sixth of an ADD.
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

// SetTerminating records whether a DEL has started. Without a record it does nothing.
func (j Journal) SetTerminating(network string, id metadata.AttachmentID, leaving bool) error {
	r, ok, err := j.Get(network, id)
	if err != nil || !ok || r.Terminating == leaving {
		return err
	}
	r.Terminating = leaving
	return j.Put(r)
}

// Get reads a record. ok is false when there is none. A corrupt record counts as none: it is from
// an earlier boot.
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

// Remove removes a record, and the temporary file that a killed Put may have left.
func (j Journal) Remove(network string, id metadata.AttachmentID) error {
	for _, name := range []string{j.path(network, id), temporary(j.path(network, id))} {
		err := os.Remove(name)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			continue
		}
		// A read-only file system reports EROFS even for files that do not exist.
		if _, there := os.Lstat(name); !errors.Is(there, fs.ErrNotExist) {
			return fmt.Errorf("journal: %w", err)
		}
	}
	return nil
}

// BeginHostSetup records that a plugin is setting this host up for a network. EndHostSetup records
// the end.
func (j Journal) BeginHostSetup(network string) error {
	f, err := j.create(j.hostSetupFile(network), os.O_WRONLY|os.O_CREATE)
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	return f.Close()
}

// EndHostSetup removes the mark of BeginHostSetup.
func (j Journal) EndHostSetup(network string) error {
	if err := os.Remove(j.hostSetupFile(network)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("journal: %w", err)
	}
	return nil
}

// HostSetupPending reports whether a BeginHostSetup has no EndHostSetup yet. Then the setup is in
// progress, or was killed. The check costs one system call.
func (j Journal) HostSetupPending(network string) bool {
	_, err := os.Lstat(j.hostSetupFile(network))
	return err == nil
}

func (j Journal) hostSetupFile(network string) string {
	return filepath.Join(j.Dir, network, ".joining")
}

// RemoveNetwork removes the directory of a network without records, and reports whether it did. A
// directory with records, or with a verb in progress, stays.
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
		if !strings.HasPrefix(e.Name(), ".") { // created meanwhile
			return false, nil
		}
	}
	// Remove the lock file last. Until then every newcomer waits for the lock, and then starts
	// again with a new file.
	for _, e := range entries {
		if e.Name() != lockFile {
			err = errors.Join(err, os.Remove(filepath.Join(dir, e.Name())))
		}
	}
	if err = errors.Join(err, os.Remove(filepath.Join(dir, lockFile))); err != nil {
		return false, fmt.Errorf("journal: %w", err)
	}
	// Another process may have created the directory again meanwhile, or even have removed it.
	if err := os.Remove(dir); err != nil && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("journal: %w", err)
	}
	return true, nil
}

// Networks lists the networks that have a directory.
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

// List reads all records of a network. It lists a corrupt record with its id and the State
// Released, because the only useful action is to release its addresses. List removes temporary
// files of killed processes, unless the caller holds their record's lock.
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
				continue // removed meanwhile
			}
			r = Record{AttachmentID: id, Attachment: metadata.Attachment{Network: network}, State: Released}
		}
		out = append(out, r)
	}
	return out, nil
}

// removeStale removes a temporary file whose writer is dead: a dead writer no longer holds the
// record's lock.
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
