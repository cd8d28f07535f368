package dockerapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/lariat-net/lariat/pkg/hostid"
	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/mounts"
)

// Config configures a Server.
type Config struct {
	Driver   volume.Driver
	Name     string // of the driver, as users call it
	StateDir string // holds the journal and the locks of this driver alone
	MountDir string // volumes are mounted here, each in the directory of its name
	Scope    string // local or global: whether a volume's name means the same on all hosts

	// DetachDevice means that the driver's Detach wants the device, as Rancher's dialect does, not
	// the name.
	DetachDevice bool

	Grace   time.Duration // how long a volume without users may stay mounted; 0: a minute
	Log     *slog.Logger
	Observe func(call string, took time.Duration, err error) // called after each call; may be nil
	// Changed is called after a record was written or deleted, because the result of Volumes may
	// differ. It must not block. It may be nil.
	Changed func()

	// Tests replace these functions.
	table func() (mounts.Table, error)
	probe func(ctx context.Context, dir string) (stale bool, err error)
	now   func() time.Time
}

// Server answers Docker. It is an http.Handler.
type Server struct {
	config  Config
	boot    string
	journal volume.Journal[record]
	locks   volume.Locks
	unlock  func()

	mu      sync.RWMutex
	records map[string]record // the content of the journal
	touched map[string]time.Time
}

// one is the key of the lock that a process holds while it serves. No volume has this name.
const one = "@server"

// New reads only the journal and the mount table. It asks no server and no driver.
func New(c Config) (*Server, error) {
	if c.Scope != "local" && c.Scope != "global" {
		return nil, fmt.Errorf("scope %q is neither local nor global", c.Scope)
	}
	if c.Observe == nil {
		c.Observe = func(string, time.Duration, error) {}
	}
	if c.Changed == nil {
		c.Changed = func() {}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Grace <= 0 {
		c.Grace = time.Minute
	}
	if c.table == nil {
		c.table = mounts.Read
	}
	if c.probe == nil {
		c.probe = mounts.Probe
	}
	if c.now == nil {
		c.now = time.Now
	}
	s := &Server{
		config: c, boot: hostid.Boot(), touched: map[string]time.Time{},
		journal: volume.Journal[record]{Dir: filepath.Join(c.StateDir, "volumes")},
		locks:   volume.Locks{Dir: filepath.Join(c.StateDir, "locks")},
	}
	if err := s.start(); err != nil {
		return nil, err
	}
	return s, nil
}

func (s *Server) start() error {
	const wait = 2 * time.Second // a killed predecessor may need this time to end
	ctx, cancel := context.WithTimeoutCause(context.Background(), wait, volume.Timeout(wait))
	defer cancel()
	unlock, err := s.locks.Lock(ctx, one, "serve")
	if err != nil {
		return fmt.Errorf("%s belongs to another process; stop it, or give this one another --state-dir: %w",
			s.config.StateDir, err)
	}
	if err := s.load(); err != nil {
		unlock()
		return err
	}
	s.unlock = unlock
	return nil
}

// load makes memory, journal and mount table agree. It writes no record: the next change of a
// record does.
func (s *Server) load() (err error) {
	if err := os.MkdirAll(s.config.MountDir, 0o711); err != nil {
		return fmt.Errorf("folder for mounts: %w", err)
	}
	if s.config.MountDir, err = mounts.Resolve(s.config.MountDir); err != nil {
		return fmt.Errorf("folder for mounts: %w", err)
	}
	if s.records, err = s.journal.List(); err != nil {
		return err
	}
	table, err := s.config.table()
	if err != nil {
		return err
	}
	for name, rec := range s.records {
		rec = rec.in(s.boot)
		if rec.users() > 0 && len(table.At(s.dir(name))) == 0 {
			s.config.Log.Warn("not mounted any more: its users do not count", "volume", name, "users", rec.users())
			rec.Users = nil
		}
		s.records[name] = rec
	}
	for _, m := range table {
		name, here := strings.CutPrefix(m.Point, s.config.MountDir+"/")
		if _, known := s.records[name]; here && !known && volume.CheckName(name) == nil {
			s.config.Log.Warn("mounted, and not in the journal: it is kept until nobody has it", "volume", name, "source",
				m.Source)
			s.records[name] = record{State: Recovered, Created: time.Now().UTC(), BootID: s.boot}
		}
	}
	return nil
}

// Close releases the lock, so that another process can serve. Mounts stay.
func (s *Server) Close() { s.unlock() }

func (s *Server) dir(name string) string { return filepath.Join(s.config.MountDir, name) }

func (s *Server) get(name string) (record, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	rec, known := s.records[name]
	return rec, known
}

func (s *Server) put(name string, rec record) error {
	if err := s.journal.Put(name, rec); err != nil {
		return err
	}
	s.mu.Lock()
	s.records[name] = rec
	s.mu.Unlock()
	s.config.Changed()
	return nil
}

func (s *Server) drop(name string) error {
	if err := s.journal.Remove(name); err != nil {
		return err
	}
	s.mu.Lock()
	delete(s.records, name)
	delete(s.touched, name)
	s.mu.Unlock()
	s.config.Changed()
	return nil
}

// touch records a request for a volume, so that Sweep ignores the volume for a while.
func (s *Server) touch(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, known := s.records[name]; known {
		s.touched[name] = time.Now()
	}
}

// answered records that the caller has received the last answer. The same call is then a new call,
// not a repetition.
func (s *Server) answered(name string) {
	rec, known := s.get(name)
	if !known || rec.Open == nil {
		return
	}
	rec.Open = nil
	if err := s.put(name, rec); err != nil {
		s.config.Log.Error("the journal cannot be written", "volume", name, "error", err)
	}
}

// Volume describes a volume that the server knows, for people and metrics.
type Volume struct {
	Name    string         `json:"name"`
	State   State          `json:"state"`
	Mounted bool           `json:"mounted"`
	Users   map[string]int `json:"users,omitempty"` // the number of uses by each mount id
	Created time.Time      `json:"created"`
}

// Volumes returns all volumes.
func (s *Server) Volumes() ([]Volume, error) {
	table, err := s.config.table()
	if err != nil {
		return nil, err
	}
	mounted := s.mounted(table)
	s.mu.RLock()
	defer s.mu.RUnlock()
	all := make([]Volume, 0, len(s.records))
	for name, rec := range s.records {
		all = append(all, Volume{Name: name, State: rec.State, Mounted: mounted[name], Users: rec.Users,
			Created: rec.Created})
	}
	return all, nil
}

// mounted returns the names of the mounted volumes.
func (s *Server) mounted(table mounts.Table) map[string]bool {
	names := map[string]bool{}
	for _, m := range table {
		if name, here := strings.CutPrefix(m.Point, s.config.MountDir+"/"); here {
			names[name] = true
		}
	}
	return names
}

// Sweep unmounts, until its context ends, mounted volumes without users. A killed Mount leaves such
// volumes, and so does a failed unmount of the last user. Sweep ignores volumes with a recent
// request, because Docker repeats calls for half a minute.
func (s *Server) Sweep(ctx context.Context) {
	t := time.NewTicker(s.config.Grace / 2)
	defer t.Stop()
	began := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-t.C:
			s.sweep(ctx, began, now)
		}
	}
}

func (s *Server) sweep(ctx context.Context, began, now time.Time) {
	table, err := s.config.table()
	if err != nil {
		s.config.Log.Error("mounts without users are not looked for", "error", err)
		return
	}
	for name := range s.mounted(table) {
		s.mu.RLock()
		rec, known := s.records[name]
		last, asked := s.touched[name]
		s.mu.RUnlock()
		if !asked {
			last = began
		}
		if !known || rec.users() > 0 || now.Sub(last) < s.config.Grace || len(s.holders(table, name)) > 0 {
			continue
		}
		// Each volume has its own goroutine, so that a dead server does not delay the other
		// volumes.
		go func() {
			ctx, cancel := volume.WithDeadline(ctx, volume.Deadlines.Short)
			defer cancel()
			if err := s.sweepOne(ctx, name); err != nil && !errors.Is(err, volume.ErrInUse) {
				s.config.Log.Error("nobody has it, and it cannot be unmounted", "volume", name, "error", err)
			}
		}()
	}
}

func (s *Server) sweepOne(ctx context.Context, name string) error {
	unlock, err := s.locks.Lock(ctx, name, "sweep")
	if err != nil {
		return err
	}
	defer unlock()
	rec, known := s.get(name)
	if !known || rec.users() > 0 {
		return nil
	}
	s.touch(name)
	s.config.Log.Info("nobody has it: it is unmounted", "volume", name)
	return s.takeAway(ctx, name, rec)
}

// holders returns the processes in whose mount namespaces a volume is in use, above all processes
// of containers.
func (s *Server) holders(table mounts.Table, name string) (who []string) {
	stack := table.At(s.dir(name))
	if len(stack) == 0 {
		return nil
	}
	return mounts.Holders(stack[len(stack)-1], func(point string) bool {
		return strings.Contains(point, s.config.MountDir+"/")
	})
}
