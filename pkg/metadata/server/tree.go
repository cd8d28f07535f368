package server

import (
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata/tree"
)

// TreeHandler serves the read-only tree to containers, each known by its source address. X-Forwarded-For is not looked at: a
// container could write anything into it.
func (s *Server) TreeHandler() http.Handler {
	var mu sync.Mutex
	var built *tree.Tree
	var revision int64
	var updates uint64
	var when time.Time
	current := func() *tree.Tree {
		s.view.mu.RLock()
		loaded, now := s.view.loaded, s.view.revision
		s.view.mu.RUnlock()
		s.containers.mu.RLock()
		seen, filled := s.containers.updates, s.containers.filled
		s.containers.mu.RUnlock()
		if !loaded || !filled {
			return nil
		}
		mu.Lock()
		defer mu.Unlock()
		// A tree of 10 000 containers takes tens of milliseconds to build, so a burst of changes is folded.
		if built == nil || (now != revision || seen != updates) && time.Since(when) > 200*time.Millisecond {
			snap := s.view.snapshot().Sane()
			snap.Containers = s.containers.list()
			built, revision, updates, when = tree.Build(snap), now, seen, time.Now()
		}
		return built
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var a tree.Answer
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			a = tree.Problem(http.StatusMethodNotAllowed, "Method not allowed", false)
		} else if t := current(); t == nil {
			w.Header().Set("Retry-After", "1")
			a = tree.Problem(http.StatusServiceUnavailable, "Not loaded yet", false)
		} else {
			caller, _ := netip.ParseAddrPort(r.RemoteAddr)
			a = t.Get(r.URL.EscapedPath(), r.Header.Get("Accept"), caller.Addr())
		}
		w.Header().Set("Access-Control-Allow-Origin", "*")
		w.Header().Set("Content-Type", a.ContentType)
		w.WriteHeader(a.Status)
		if r.Method != http.MethodHead {
			w.Write(a.Body) //nolint:errcheck // the caller hung up
		}
	})
}
