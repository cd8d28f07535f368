package service

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/metadata"
)

// Health is what a helper tells monitors.
type Health struct {
	Ready   func(context.Context) error // why the helper cannot do its work now; nil: it can
	Metrics prometheus.Gatherer
}

// Guests are the containers that a helper answers on a TCP address.
type Guests struct {
	http.Handler

	// Address may come to the host later. An empty one means nowhere.
	Address string

	// Known reports whether an address is a container's, or this host's. All others share the limits of one source.
	Known func(netip.Addr) bool
}

// Server answers a helper's requests. Each listener has its own routes:
//
//	Serve         every route, on a unix socket of Listen
//	listenMetrics /metrics, /healthz and /readyz, on TCP
//	listenGuests  one handler for containers, on TCP
//
// Only Run opens those on TCP. No other package of a helper serves HTTP; a test holds them to it.
type Server struct {
	log     *slog.Logger
	private *http.ServeMux
	public  *http.ServeMux
	failed  chan error // a listener that broke

	routes   []string // of private
	monitors []string // of public

	mu        sync.Mutex
	listeners []Listener
	running   []running
}

// Listener is where a Server answers, whom, and what.
type Listener struct {
	Address string   `json:"address"`
	Callers string   `json:"callers"`
	Routes  []string `json:"routes"` // patterns of http.ServeMux
}

// Callers of a Listener.
const (
	Root      = "root of this host"
	Everybody = "everybody who reaches the address"
	Known     = "containers of the cluster, and this host"
)

type running struct {
	*http.Server
	private bool
}

// New returns a Server with the routes of monitors, of which /metrics has the figures of the process beside those
// of h, and with GET /v1/routes, which lists the listeners.
func New(log *slog.Logger, h Health) *Server {
	process := prometheus.NewRegistry()
	process.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	s := &Server{log: log, private: http.NewServeMux(), public: http.NewServeMux(), failed: make(chan error, 8)}
	for _, r := range []struct {
		pattern string
		handler http.Handler
	}{
		{"GET /healthz", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })},
		{"GET /metrics", promhttp.HandlerFor(prometheus.Gatherers{h.Metrics, process}, promhttp.HandlerOpts{})},
		{"GET /readyz", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if err := h.Ready(r.Context()); err != nil {
				http.Error(w, err.Error(), http.StatusServiceUnavailable)
				return
			}
			fmt.Fprintln(w, "ok")
		})},
	} {
		s.public.Handle(r.pattern, r.handler)
		s.Handle(r.pattern, r.handler)
	}
	s.monitors = slices.Clone(s.routes)
	s.HandleFunc("GET /v1/routes", func(w http.ResponseWriter, _ *http.Request) { WriteJSON(w, s.Listeners()) })
	return s
}

// WriteJSON answers with an indented object.
func WriteJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	_ = enc.Encode(v) // the caller hung up
}

// Handle adds a route that is answered on the unix socket alone. Add all routes before Serve.
func (s *Server) Handle(pattern string, h http.Handler) {
	s.routes = append(s.routes, pattern)
	s.private.Handle(pattern, h)
}

// HandleFunc is Handle for a function.
func (s *Server) HandleFunc(pattern string, h http.HandlerFunc) { s.Handle(pattern, h) }

// ServeHTTP answers as on the unix socket. The socket's mode keeps others out; when somebody has opened it to
// them, they can read.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead && !Privileged(r) {
		Forbid(w, fmt.Sprintf("%s %s: only root may write, and the caller is not root", r.Method, r.URL.Path))
		return
	}
	s.private.ServeHTTP(w, r)
}

// Forbid answers 403 with an error object.
func Forbid(w http.ResponseWriter, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusForbidden)
	_ = json.NewEncoder(w).Encode(metadata.Errorf(metadata.CodeInvalid, "%s", message)) // the caller hung up
}

// Peer keys the credentials of a unix connection's other end, a unix.Ucred, in its requests' contexts.
type Peer struct{}

// Privileged reports whether root sent the request, or who the helper itself runs as (a test in a user namespace).
func Privileged(r *http.Request) bool {
	cred, ok := r.Context().Value(Peer{}).(unix.Ucred)
	return ok && (cred.Uid == 0 || int(cred.Uid) == os.Geteuid())
}

// withPeer notes who is at the other end of a unix connection; for http.Server.
func withPeer(ctx context.Context, c net.Conn) context.Context {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return ctx
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return ctx
	}
	var cred *unix.Ucred
	if err := raw.Control(func(fd uintptr) {
		cred, _ = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET,
			unix.SO_PEERCRED)
	}); err != nil || cred == nil {
		return ctx
	}
	return context.WithValue(ctx, Peer{}, *cred)
}

// Serve answers every route on a unix socket. An answer may take any time: watches, waits and mounts do.
func (s *Server) Serve(l *Socket) {
	s.serve(l, Listener{"unix:" + l.path, Root, s.routes},
		running{private: true, Server: &http.Server{Handler: s, ConnContext: withPeer,
			ReadHeaderTimeout: headTime, MaxHeaderBytes: 64 << 10}})
}

// listenMetrics answers the routes of monitors on a TCP address, and nothing else. An empty address means nowhere.
func (s *Server) listenMetrics(address string) error {
	if address == "" {
		return nil
	}
	l, err := listenTCP(address, false, network)
	if err != nil {
		return fmt.Errorf("--listen-metrics: %w", err)
	}
	s.serve(l, Listener{l.Addr().String(), Everybody, s.monitors}, running{Server: l.server(s.public)})
	return nil
}

// listenGuests answers containers on their TCP address.
func (s *Server) listenGuests(g Guests) error {
	if g.Address == "" {
		return nil
	}
	l, err := listenTCP(g.Address, true, func(a netip.Addr) netip.Addr {
		if g.Known(a) {
			return a
		}
		return netip.Addr{}
	})
	if err != nil {
		return fmt.Errorf("--listen-tree: %w", err)
	}
	s.serve(l, Listener{l.Addr().String(), Known, []string{"GET /"}}, running{Server: l.server(g)})
	return nil
}

func (s *Server) serve(l net.Listener, where Listener, r running) {
	r.ErrorLog = slog.NewLogLogger(s.log.Handler(), slog.LevelDebug)
	s.mu.Lock()
	s.listeners, s.running = append(s.listeners, where), append(s.running, r)
	s.mu.Unlock()
	go func() {
		if err := r.Server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			s.failed <- fmt.Errorf("%s: %w", where.Address, err)
		}
	}()
}

// Listeners returns where the server answers, in the order in which it began to.
func (s *Server) Listeners() []Listener {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Listener{}, s.listeners...)
}

// Stop ends all listeners. Requests on the unix socket may take until patience is over; then they are cut
// off, and an error says so.
func (s *Server) Stop(patience time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s.mu.Lock()
	all := s.running
	s.mu.Unlock()
	var errs []error
	for _, r := range all {
		if !r.private {
			_ = r.Close() // monitors and containers ask again
		} else if err := r.Shutdown(ctx); err != nil {
			errs = append(errs, err, r.Close())
		}
	}
	return errors.Join(errs...)
}
