package server

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"sync"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata/tree"
	"github.com/lariat-net/lariat/pkg/service"
)

// Tree returns the read-only tree for containers, each known by its source address. X-Forwarded-For is not looked at: a
// container could write anything into it.
func (s *Server) Tree() service.Guests {
	t := &treeView{s: s, render: make(chan struct{}, max(1, runtime.GOMAXPROCS(0)/2))}
	return service.Guests{Handler: t, Known: t.known}
}

// treeView keeps the tree of the model as it was a moment ago.
type treeView struct {
	s      *Server
	render chan struct{} // has a place for each answer that may be made at a time: the other processors are for root's requests

	mu       sync.RWMutex
	built    *tree.Tree
	revision int64
	updates  uint64
	when     time.Time
}

// rebuildEvery folds a burst of changes: a tree of 10 000 containers takes tens of milliseconds to build.
const rebuildEvery = 200 * time.Millisecond

// position is the state of the model; ok is false before all of it has been read.
func (t *treeView) position() (revision int64, updates uint64, ok bool) {
	v, c := t.s.view, t.s.containers
	v.mu.RLock()
	defer v.mu.RUnlock()
	c.mu.RLock()
	defer c.mu.RUnlock()
	return v.revision, c.updates, v.loaded && c.filled
}

// current returns the tree, built anew when it is older than the model and than rebuildEvery; nil before the model has been read. wait is how
// long it must be waited until a newer one can be had; 0: there is none.
func (t *treeView) current() (built *tree.Tree, wait time.Duration) {
	revision, updates, ok := t.position()
	if !ok {
		return nil, 0
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.built != nil && revision == t.revision && updates == t.updates {
		return t.built, 0
	}
	if wait = rebuildEvery - time.Since(t.when); t.built != nil && wait > 0 {
		return t.built, wait
	}
	snap := t.s.view.snapshot().Sane()
	snap.Containers = t.s.containers.list()
	t.built, t.revision, t.updates, t.when = tree.Build(snap, t.s.cfg.TreeLabels...), revision, updates, time.Now()
	return t.built, 0
}

// knowing is current for a caller: one that may be new is not refused by an old tree.
func (t *treeView) knowing(ctx context.Context, caller netip.Addr) *tree.Tree {
	built, wait := t.current()
	if built == nil || wait == 0 || built.Known(caller) {
		return built
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
		built, _ = t.current()
	}
	return built
}

// known is of the tree as it is: for a connection nothing is built.
func (t *treeView) known(a netip.Addr) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.built != nil && t.built.Known(a)
}

// ServeHTTP implements http.Handler.
func (t *treeView) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var a tree.Answer
	caller := callerOf(r)
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		a = tree.Problem(http.StatusMethodNotAllowed, "Method not allowed", false)
	} else if built := t.knowing(r.Context(), caller); built == nil {
		w.Header().Set("Retry-After", "1")
		a = tree.Problem(http.StatusServiceUnavailable, "Not loaded yet", false)
	} else {
		a = t.get(built, r, caller)
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

func (t *treeView) get(built *tree.Tree, r *http.Request, caller netip.Addr) tree.Answer {
	t.render <- struct{}{}
	defer func() { <-t.render }()
	return built.Get(r.URL.EscapedPath(), r.Header.Get("Accept"), caller)
}

// callerOf is the address that a request came from. Who speaks to an address of this host from that address is the host itself: the kernel
// takes no such packet from elsewhere.
func callerOf(r *http.Request) netip.Addr {
	caller, _ := netip.ParseAddrPort(r.RemoteAddr)
	if local, ok := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr); ok && local.AddrPort().Addr().Unmap() == caller.Addr().Unmap() {
		return netip.IPv6Loopback()
	}
	return caller.Addr()
}
