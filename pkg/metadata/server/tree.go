package server

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
	"github.com/lariat-net/lariat/pkg/metadata/tree"
	"github.com/lariat-net/lariat/pkg/service"
)

// Tree returns the read-only tree for containers, each known by its source address. X-Forwarded-For is not looked at: a
// container could write anything into it.
func (s *Server) Tree() service.Guests { return service.Guests{Handler: s.tree, Known: s.tree.known} }

func newTreeView(s *Server) *treeView {
	return &treeView{s: s, render: make(chan struct{}, max(1, runtime.GOMAXPROCS(0)/2)),
		own: &scope{containers: s.containers}}
}

// treeView keeps trees of the model as it was a moment ago: one of this host's containers, which answers nearly
// everything, and others while somebody asks for what they show.
type treeView struct {
	s *Server
	// has a place for each answer that may be made at a time: the other processors are for root's requests
	render chan struct{}
	own    *scope

	mu       sync.Mutex
	base     *tree.Base
	revision int64
}

// scope is some hosts' containers with the tree of them.
type scope struct {
	containers *containers
	all        bool // of all hosts

	built atomic.Pointer[tree.Tree]

	mu       sync.Mutex // that of all containers takes long to build: nobody else waits for it
	revision int64
	updates  uint64
	when     time.Time
}

// rebuildEvery folds a burst of changes: a tree of 10 000 containers takes tens of milliseconds to build.
const rebuildEvery = 200 * time.Millisecond

// position is the state of the model; ok is false before all of it has been read.
func (t *treeView) position(c *containers) (revision int64, updates uint64, ok bool) {
	v := t.s.view
	v.mu.RLock()
	revision, ok = v.revision, v.loaded
	v.mu.RUnlock()
	for _, x := range []*containers{t.s.containers, c} {
		x.mu.RLock()
		updates, ok = updates+x.updates, ok && x.filled // sums of what only grows
		x.mu.RUnlock()
	}
	return revision, updates, ok
}

// list returns a scope's containers, sorted. Of this host they are those that it knows itself, which no watch is
// ahead of.
func (t *treeView) list(c *scope) []metadata.Container {
	list := c.containers.list()
	if !c.all {
		return list
	}
	self := t.s.cfg.HostName
	list = slices.DeleteFunc(list, func(c metadata.Container) bool { return c.Host == self })
	at, _ := slices.BinarySearchFunc(list, self+"/", func(c metadata.Container, key string) int {
		return strings.Compare(metadata.ContainerKey(c), key)
	})
	return slices.Insert(list, at, t.s.containers.list()...)
}

// current returns a scope's tree, built anew when it is older than the model and than rebuildEvery; nil before
// the model has been read. wait is how long it must be waited until a newer one can be had; 0: there is none.
func (t *treeView) current(c *scope) (built *tree.Tree, wait time.Duration) {
	revision, updates, ok := t.position(c.containers)
	if !ok {
		return nil, 0
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	built = c.built.Load()
	if built != nil && revision == c.revision && updates == c.updates {
		return built, 0
	}
	if wait = rebuildEvery - time.Since(c.when); built != nil && wait > 0 {
		return built, wait
	}
	built = t.baseAt(revision).Tree(t.list(c), c.all)
	c.built.Store(built)
	c.revision, c.updates, c.when = revision, updates, time.Now()
	return built, 0
}

// baseAt returns what trees share, as of a revision or later.
func (t *treeView) baseAt(revision int64) *tree.Base {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.base == nil || t.revision < revision {
		t.base, t.revision = tree.NewBase(t.s.view.snapshot().Sane(), t.s.cfg.TreeLabels...), revision
	}
	return t.base
}

// knowing is current for a caller: one that may be new is not refused by an old tree.
func (t *treeView) knowing(ctx context.Context, c *scope, caller netip.Addr) *tree.Tree {
	built, wait := t.current(c)
	if built == nil || wait == 0 || built.Known(caller) {
		return built
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
		built, _ = t.current(c)
	}
	return built
}

// known is of the trees as they are: for a connection nothing is built.
func (t *treeView) known(a netip.Addr) bool {
	scopes := []*scope{t.own}
	for _, p := range t.s.asked.all() {
		scopes = append(scopes, &p.scope)
	}
	return slices.ContainsFunc(scopes, func(c *scope) bool {
		built := c.built.Load()
		return built != nil && built.Known(a)
	})
}

// ServeHTTP implements http.Handler.
func (t *treeView) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var a tree.Answer
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		a = tree.Problem(http.StatusMethodNotAllowed, "Method not allowed", false)
	} else {
		var age time.Duration
		if a, age = t.answer(r, callerOf(r)); a.Status == http.StatusServiceUnavailable {
			w.Header().Set("Retry-After", "1")
		} else {
			w.Header().Set("Age", strconv.Itoa(int(age.Seconds())))
		}
	}
	if origin := t.s.cfg.TreeOrigin; origin != "" {
		w.Header().Set("Access-Control-Allow-Origin", origin)
	}
	w.Header().Set("Content-Type", a.ContentType)
	w.WriteHeader(a.Status)
	if r.Method != http.MethodHead {
		w.Write(a.Body) //nolint:errcheck // the caller hung up
	}
}

// answer returns the answer to a request, and how long ago the store last confirmed what it tells.
func (t *treeView) answer(r *http.Request, caller netip.Addr) (tree.Answer, time.Duration) {
	path, accept := r.URL.EscapedPath(), r.Header.Get("Accept")
	from, built := t.own, t.knowing(r.Context(), t.own, caller)
	if built == nil {
		return tree.Problem(http.StatusServiceUnavailable, "Not loaded yet", false), 0
	}
	var err error
	if host := built.HostOf(caller); host != "" { // it is a container of that host, or nobody
		if from, err = t.others(r.Context(), entry.ContainerPrefix+host+"/"); err != nil {
			return unread(err), 0
		}
		if built = t.knowing(r.Context(), from, caller); built == nil {
			return unread(errUnread), 0
		}
	}
	if reach := built.Reach(path, accept, caller); reach != tree.Own {
		all, err := t.others(r.Context(), entry.ContainerPrefix)
		switch {
		case err == nil:
			if whole := t.knowing(r.Context(), all, caller); whole != nil {
				from, built = all, whole
			}
		case reach == tree.All:
			return unread(err), 0
		}
	}
	t.render <- struct{}{}
	defer func() { <-t.render }()
	return built.Get(path, accept, caller), max(t.s.view.age(), from.containers.age(time.Now()))
}

// others returns containers of other hosts, out of those of all hosts when they are there.
func (t *treeView) others(ctx context.Context, prefix string) (*scope, error) {
	p := t.s.asked.have(entry.ContainerPrefix)
	if p == nil {
		var err error
		if p, err = t.s.asked.get(ctx, prefix); err != nil {
			return nil, err
		}
	}
	return &p.scope, nil
}

func unread(err error) tree.Answer {
	return tree.Problem(http.StatusServiceUnavailable, err.Error(), false)
}

// callerOf is the address that a request came from. Who speaks to an address of this host from that address
// is the host itself: the kernel takes no such packet from elsewhere.
func callerOf(r *http.Request) netip.Addr {
	caller, _ := netip.ParseAddrPort(r.RemoteAddr)
	if local, ok := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr); ok &&
		local.AddrPort().Addr().Unmap() == caller.Addr().Unmap() {
		return netip.IPv6Loopback()
	}
	return caller.Addr()
}
