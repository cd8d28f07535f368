// Package server answers for the metadata of one host: who may use which address, who is there, what has changed.
//
// A request takes this way: unix socket, net/http, one method of Server, then either the view in memory (reads) or the
// allocator of one network (addresses), and from there the store. The server changes nothing on the host; it knows no
// kernel.
//
// What is written where, and in which order, so that a kill at any point leaves nothing wrong:
//
//	block claimed  -> seen in the view      -> its table is used
//	endpoint made  -> entry in the table    (borrowed and foreign addresses; undone in reverse)
//	VNI, MAC reserved -> network, host written
//
// An interrupted sequence leaves a reservation or an endpoint too many, and the next start removes it.
package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/server/allocator"
	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// Config of a Server. Zero durations mean the defaults that the comments name.
type Config struct {
	HostName  string
	MachineID string
	BootID    string
	Underlay  []metadata.Underlay
	Foreign   []metadata.Foreign
	Labels    map[string]string
	Version   string

	// MTU is the MTU of containers' interfaces on a network at a host; it comes from outside because this package knows
	// no overheads.
	MTU func(metadata.Network, metadata.Host) int
	// Overhead is what the network's encapsulation takes of the underlay's MTU there; from outside likewise.
	Overhead func(metadata.Network, metadata.Host) int
	// Device is the device that carries a network on a host; from outside likewise.
	Device func(metadata.Network) string

	// TreeLabels are the names of containers' labels that the tree shows beside those of metadata.PublicLabels.
	TreeLabels []string
	// TreeOrigin is the tree's Access-Control-Allow-Origin; empty: none.
	TreeOrigin string

	// Kept is the file in which the last valid values of entries stay that cannot be used any more; empty: none,
	// and they are lost at the next start.
	Kept string

	Timeout    time.Duration // of one request's work in the store, and of each page of a list: 5 s
	Start      time.Duration // New gives up when the store was silent for so long; 0: when its context ends
	LeaseTTL   time.Duration // a silent host is dead after it: 30 s
	Bookmark   time.Duration // between signs of life on a watch: 10 s
	BlockGrace time.Duration // an empty block is given back after it: 10 min
	Forget     time.Duration // other hosts' containers are forgotten so long after the last question: 10 min

	// Progress, when not nil, is told of each page that New reads of the model.
	Progress func()

	// Now is the clock for what is recorded; nil: time.Now.
	Now func() time.Time
	Log *slog.Logger
}

// Server is the metadata service of one host.
type Server struct {
	cfg        Config
	store      *store.Breaker
	bootID     string
	started    time.Time
	log        *slog.Logger
	view       *view
	containers *containers
	asked      *asked
	tree       *treeView
	metrics    *metrics

	paged chan struct{} // gets a word with each page of a list that follow reads

	ctx      context.Context
	cancel   context.CancelFunc
	stopping context.Context // ends before ctx: watches and waits are over
	stop     context.CancelFunc
	wg       sync.WaitGroup

	mu         sync.Mutex
	allocators map[string]*allocator.Allocator
	left       map[string]*leftover
	lease      *store.Lease
	problem    error // why it is not ready
}

// New registers the host and loads its view. It fails when another live machine has the name, or the store does
// not answer within the context. A big view may take long to read when many hosts read it at the same time, so
// each page of it gives New Config.Start anew. The caller keeps the store and closes it after the server.
func New(ctx context.Context, cfg Config, st store.Store) (*Server, error) {
	if err := metadata.ValidName(cfg.HostName); err != nil {
		return nil, fmt.Errorf("--host-name: %w", err)
	}
	if cfg.MachineID == "" || cfg.BootID == "" {
		return nil, fmt.Errorf("host %s: machine id and boot id must be known", cfg.HostName)
	}
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&cfg.Timeout, 5*time.Second)
	def(&cfg.LeaseTTL, 30*time.Second)
	def(&cfg.Bookmark, 10*time.Second)
	def(&cfg.BlockGrace, 10*time.Minute)
	def(&cfg.Forget, 10*time.Minute)
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.MTU == nil {
		cfg.MTU = func(n metadata.Network, _ metadata.Host) int { return n.MTU }
	}
	if cfg.Overhead == nil {
		cfg.Overhead = func(metadata.Network, metadata.Host) int { return 0 }
	}
	if cfg.Device == nil {
		cfg.Device = func(metadata.Network) string { return "" }
	}
	s := &Server{cfg: cfg, store: store.NewBreaker(st, cfg.Timeout, cfg.Log), bootID: cfg.BootID, log: cfg.Log,
		view: newView(cfg.HostName), containers: newContainers(cfg.HostName),
		allocators: map[string]*allocator.Allocator{}, left: map[string]*leftover{}, paged: make(chan struct{}, 1)}
	s.asked, s.tree = &asked{s: s, parts: map[string]*part{}}, newTreeView(s)
	s.started = s.now().UTC().Round(0) // as it comes back from the store
	s.view.claim = s.hostLease()
	var err error
	if s.view.kept, err = loadKept(cfg.Kept); err != nil {
		s.log.Error("entries that cannot be used are left out", "error", err)
	}
	s.metrics = newMetrics(s)
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.stopping, s.stop = context.WithCancel(s.ctx)
	silent, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	patience := time.AfterFunc(cmp.Or(cfg.Start, math.MaxInt64), func() { cancel(context.DeadlineExceeded) })
	defer patience.Stop()
	if err := s.registerPatiently(silent); err != nil {
		s.cancel()
		s.store.Stop()
		return nil, err
	}
	viewReady, containersReady := make(chan struct{}), make(chan struct{})
	s.wg.Go(func() { s.follow(s.ctx, entry.ViewPrefix, s.view.load, s.view.apply, viewReady) })
	s.wg.Go(func() {
		s.followContainers(s.ctx, entry.ContainerPrefix+cfg.HostName+"/", s.containers, containersReady)
	})
	for _, ready := range []chan struct{}{viewReady, containersReady} {
		for read := false; !read; {
			select {
			case <-ready:
				read = true
			case <-s.paged:
				patience.Reset(cmp.Or(cfg.Start, math.MaxInt64))
				if cfg.Progress != nil {
					cfg.Progress()
				}
			case <-silent.Done():
				s.Close()
				return nil, fmt.Errorf("%w: reading the model: %w", store.ErrUnavailable, context.Cause(silent))
			}
		}
	}
	if cfg.Kept != "" {
		s.wg.Go(s.writeKept)
	}
	s.wg.Go(s.maintainHostLease)
	s.wg.Go(s.maintainHostEntry)
	// The first container after a start should not wait for a thousand tables to be read.
	s.wg.Go(func() {
		for _, name := range s.view.networkNames() {
			if _, _, err := s.loaded(s.stopping, name); err != nil {
				s.log.Debug("tables not read ahead", "network", name, "error", err)
			}
		}
	})
	s.wg.Go(s.housekeeping)
	s.wg.Go(s.asked.forget)
	return s, nil
}

// Stop ends watches and waits; requests for addresses are still served. Close does the rest.
func (s *Server) Stop() { s.stop() }

// Alive reports whether the server makes progress: its locks are free.
func (s *Server) Alive() bool {
	done := make(chan struct{})
	go func() {
		s.view.networkNames()
		s.mu.Lock()
		defer s.mu.Unlock()
		close(done)
	}()
	select {
	case <-done:
		return true
	case <-time.After(2 * time.Second):
		return false
	}
}

// Close gives the lease up, so that the host counts as gone at once, and ends all watches.
func (s *Server) Close() {
	s.cancel()
	s.mu.Lock()
	lease := s.lease
	s.mu.Unlock()
	s.wg.Wait()
	if lease != nil {
		lease.Close()
	}
	s.store.Stop()
}

// firstWait is the pause after a first failure of the store.
const firstWait = 50 * time.Millisecond

// jitter is a pause of half to one and a half of the given length: hosts that failed together do not come back
// together.
func jitter(d time.Duration) time.Duration { return d/2 + rand.N(d) }

// follow keeps a part of the store in memory: list, watch from there, and again from the start when history is
// gone. What is in memory stays in use while the store is away. A page that does not come is asked for again, with
// those before it kept: many hosts may read at the same time, and would never get to the end of it together. It
// ends with the context.
func (s *Server) follow(ctx context.Context, prefix string, load func([]store.Entry, int64) error,
	apply func(store.Update) error, ready chan struct{},
) {
	var revision, last int64
	list := store.Listing{Prefix: prefix}
	wait := firstWait
	for ctx.Err() == nil {
		var err error
		for revision == 0 && err == nil {
			if !list.Done {
				if err = store.NextPage(ctx, s.store, &list, s.cfg.Timeout); err == nil {
					wait = firstWait
					select {
					case s.paged <- struct{}{}:
					default:
					}
				}
				continue
			}
			if lerr := load(list.Entries, list.Revision); lerr != nil {
				s.log.Error("object not understood, left out", "error", lerr)
			}
			if list.Revision < last {
				s.log.Warn("the store was lost, and began anew", "revision", list.Revision, "before", last)
				s.forgetAllocators()
			}
			revision, last, list = list.Revision, list.Revision, store.Listing{Prefix: prefix}
			if ready != nil {
				close(ready)
				ready = nil
			}
		}
		if err == nil {
			wait = firstWait
			err = s.store.Watch(ctx, prefix, revision, func(u store.Update) error {
				wait = firstWait
				if aerr := apply(u); aerr != nil {
					s.log.Error("object not understood, left out", "revision", u.Revision, "error", aerr)
				}
				revision = max(revision, u.Revision)
				last = revision
				return nil
			})
		}
		if ctx.Err() != nil {
			return
		}
		if errors.Is(err, store.ErrCompacted) {
			revision, list = 0, store.Listing{Prefix: prefix}
			continue
		}
		s.log.Debug("following the store broke off", "prefix", prefix, "error", err)
		wait = s.pause(ctx, wait, 2*time.Second)
	}
}

// followContainers keeps the containers below a prefix in memory.
func (s *Server) followContainers(ctx context.Context, prefix string, c *containers, ready chan struct{}) {
	s.follow(ctx, prefix, func(e []store.Entry, _ int64) error { return c.load(e) },
		func(u store.Update) error { return c.apply(u.Entries) }, ready)
}

// pause waits before something is tried again, and returns how long the next pause is. While the store is away
// it waits for the store alone. It ends with the context.
func (s *Server) pause(ctx context.Context, wait, longest time.Duration) time.Duration {
	if lost, _ := s.store.Lost(); lost != nil {
		_ = s.store.Wait(ctx) // whoever tries again looks at the context
		return firstWait
	}
	t := time.NewTimer(jitter(wait))
	defer t.Stop()
	_, changed := s.store.Lost()
	select {
	case <-ctx.Done():
	case <-t.C:
	case <-changed:
	}
	return min(2*wait, longest)
}

// list reads all objects below a prefix at one revision. Each page may take the time of a request, for there may
// be many.
func (s *Server) list(ctx context.Context, prefix string) ([]store.Entry, int64, error) {
	return store.List(ctx, s.store, prefix, s.cfg.Timeout)
}

// housekeeping gives empty blocks back, and first of all cleans up after earlier versions.
func (s *Server) housekeeping() {
	t := time.NewTicker(s.cfg.BlockGrace / 4)
	defer t.Stop()
	for clean := false; ; {
		if !clean {
			err := s.cleanContainers(s.ctx)
			if clean = err == nil; !clean && s.ctx.Err() == nil {
				s.log.Warn("containers of earlier versions are not cleaned up yet", "error", err)
			}
		}
		select {
		case <-s.ctx.Done():
			return
		case <-t.C:
		}
		if err := s.releaseOrphans(s.ctx); err != nil && s.ctx.Err() == nil {
			s.log.Debug("claims of deleted networks kept", "error", err)
		}
		for _, n := range s.view.networkNames() {
			if err := s.ReleaseEmptyBlocks(s.ctx, n); err != nil && s.ctx.Err() == nil {
				s.log.Debug("empty blocks kept", "network", n, "error", err)
			}
		}
	}
}

// releaseOrphans deletes this host's blocks and host routes of networks that do not exist. A service that was killed
// while it deleted a network leaves them, and so does a claim that was under way.
func (s *Server) releaseOrphans(ctx context.Context) error {
	var errs []error
	for network, keys := range s.view.orphans() {
		errs = append(errs, s.deleteOrphans(ctx, network, keys))
	}
	return errors.Join(errs...)
}

func (s *Server) deleteOrphans(ctx context.Context, network string, keys []string) error {
	ctx, cancel := s.timeout(ctx)
	defer cancel()
	var changes []store.Change
	for _, key := range keys {
		e, err := s.store.Get(ctx, key)
		if err == nil {
			changes = append(changes, store.Change{Key: key, Revision: e.Revision})
		} else if !errors.Is(err, store.ErrNotFound) {
			return err
		}
	}
	// An entry that cannot be used makes its network undefined as well. Only the store knows the difference.
	if _, err := s.store.Get(ctx, entry.NetworkPrefix+network); !errors.Is(err, store.ErrNotFound) {
		return err
	}
	for _, r := range s.store.Write(ctx, changes...) {
		if r.Err != nil && !errors.Is(r.Err, store.ErrConflict) {
			return r.Err
		}
	}
	s.log.Info("blocks and host routes of a deleted network removed", "network", network, "entries", len(changes))
	return nil
}

// ReleaseEmptyBlocks gives back this host's blocks of a network that have been empty for the grace time.
func (s *Server) ReleaseEmptyBlocks(ctx context.Context, network string) error {
	ctx, cancel := s.timeout(ctx)
	defer cancel()
	return s.allocator(network).ReleaseEmpty(ctx, s.now().Add(-s.cfg.BlockGrace))
}

func (s *Server) now() time.Time { return s.cfg.Now() }

func (s *Server) timeout(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, s.cfg.Timeout)
}

// allocator returns a network's allocator.
func (s *Server) allocator(network string) *allocator.Allocator {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.allocators[network]
	if a == nil {
		a = allocator.New(allocator.Config{Network: network, Host: s.cfg.HostName, BootID: s.bootID, View: s.view,
			Store: s.store, Containers: hostContainers{s}, Now: s.now, Log: s.log})
		s.allocators[network] = a
	}
	return a
}

// forgetAllocator makes the next request for a network read its tables again.
func (s *Server) forgetAllocator(network string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.allocators, network)
}

// forgetAllocators forgets all tables: none of them is stored any more.
func (s *Server) forgetAllocators() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.allocators)
}

func (s *Server) setProblem(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil && (s.problem == nil || s.problem.Error() != err.Error()) {
		s.log.Error("not ready", "error", err)
	}
	s.problem = err
}

// unready says why an allocation could not be served now.
func (s *Server) unready(ctx context.Context) error {
	s.mu.Lock()
	problem := s.problem
	s.mu.Unlock()
	if problem != nil {
		return problem
	}
	if lost, _ := s.store.Lost(); lost != nil {
		return lost
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	st, err := s.store.Status(ctx)
	if err != nil {
		return err
	}
	if st.Problem != "" {
		return errors.New(st.Problem)
	}
	return nil
}
