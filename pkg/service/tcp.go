package service

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// What callers of one TCP listener may take of the process, which has a store to run. A source is a caller's
// address, or its network: see the key of listenTCP.
const (
	maxConns      = 1024 // in all, and never more than a quarter of the process' descriptors
	maxConnsEach  = 32   // of one source
	maxAnswers    = 64   // being made or sent, in all: what is in memory is at most so many answers
	maxAnswerEach = 2    // of one source
	maxHead       = 8 << 10
	sendBuffer    = 64 << 10 // bytes that the kernel keeps for a caller that does not read

	headTime = 5 * time.Second  // until the head of a request is there
	turnTime = 5 * time.Second  // that a request waits for those before it
	readTime = 10 * time.Second // until all of a request is there
	sendTime = 15 * time.Second // from then on until the caller has its answer
	idleTime = 15 * time.Second // that a connection may stay without a request
)

// limiter is a listener that keeps its callers within the limits.
type limiter struct {
	net.Listener
	key     func(netip.Addr) netip.Addr
	conns   int // allowed in all
	answers chan struct{}

	mu      sync.Mutex
	open    int
	sources map[netip.Addr]*source
}

// source is one caller, for as long as it has connections.
type source struct {
	open    int
	answers chan struct{}
}

// network is the key of a caller that nothing is known of: its IPv4 address, or its IPv6 network, of which it
// may have all addresses.
func network(a netip.Addr) netip.Addr {
	if a.Is6() {
		p, _ := a.Prefix(64) // of a length that IPv6 has
		return p.Addr()
	}
	return a
}

// listenTCP listens on an address; freely means also on one that the host does not have yet. key returns by
// what a caller's connections are counted.
func listenTCP(address string, freely bool, key func(netip.Addr) netip.Addr) (*limiter, error) {
	lc := net.ListenConfig{Control: func(net, _ string, raw syscall.RawConn) error {
		var errs []error
		err := raw.Control(func(fd uintptr) {
			set := func(level, option, value int) { errs = append(errs, unix.SetsockoptInt(int(fd), level, option, value)) }
			// Connections have these from their listener. The time limit holds also for what is left to send after a close.
			set(unix.SOL_SOCKET, unix.SO_SNDBUF, sendBuffer)
			set(unix.SOL_TCP, unix.TCP_USER_TIMEOUT, int(sendTime.Milliseconds()))
			switch {
			case freely && net == "tcp6":
				set(unix.SOL_IPV6, unix.IPV6_FREEBIND, 1)
			case freely:
				set(unix.SOL_IP, unix.IP_FREEBIND, 1)
			}
		})
		return errors.Join(append(errs, err)...)
	}}
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(context.Background(), "tcp", address)
	if err != nil {
		return nil, err
	}
	conns := maxConns
	var files unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &files) == nil && files.Cur/4 < maxConns {
		conns = int(files.Cur / 4)
	}
	return &limiter{Listener: l, key: key, conns: conns, answers: make(chan struct{}, maxAnswers),
		sources: map[netip.Addr]*source{}}, nil
}

// Accept implements net.Listener. A connection above the limits is reset at once.
func (l *limiter) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if own := l.admit(c); own != nil {
			return own, nil
		}
		if t, ok := c.(*net.TCPConn); ok {
			_ = t.SetLinger(0) // else the kernel would keep it for a minute
		}
		c.Close()
	}
}

// admit counts a connection; it returns nil when its source, or all together, have enough.
func (l *limiter) admit(c net.Conn) net.Conn {
	caller, _ := netip.ParseAddrPort(c.RemoteAddr().String())
	key := l.key(caller.Addr().Unmap())
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.sources[key]
	if l.open >= l.conns || s != nil && s.open >= min(maxConnsEach, max(1, l.conns/4)) {
		return nil
	}
	if s == nil {
		s = &source{answers: make(chan struct{}, maxAnswerEach)}
		l.sources[key] = s
	}
	l.open++
	s.open++
	return &guest{Conn: c, source: s, leave: sync.OnceFunc(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.open--
		if s.open--; s.open == 0 {
			delete(l.sources, key)
		}
	})}
}

// guest is a connection that is counted until it is closed.
type guest struct {
	net.Conn
	source *source
	leave  func()
}

// Close implements net.Conn.
func (g *guest) Close() error {
	defer g.leave()
	return g.Conn.Close()
}

// CloseWrite lets net/http tell the caller that there is no more, while it waits for the caller's last words.
func (g *guest) CloseWrite() error {
	if c, ok := g.Conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return nil
}

type sourceKey struct{}

// server returns a server of the listener's connections.
func (l *limiter) server(h http.Handler) *http.Server {
	return &http.Server{
		Handler: l.inTurn(h),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, sourceKey{}, c.(*guest).source)
		},

		ReadHeaderTimeout: headTime, ReadTimeout: readTime, WriteTimeout: sendTime, IdleTimeout: idleTime,
		MaxHeaderBytes:               maxHead,
		DisableGeneralOptionsHandler: true,
	}
}

// inTurn lets so many answers be made and sent at a time as the limits say. Further requests wait. A request
// with a body is refused: no route on TCP has a use for one.
func (l *limiter) inTurn(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength != 0 {
			w.Header().Set("Connection", "close")
			http.Error(w, "No request here has a body", http.StatusRequestEntityTooLarge)
			return
		}
		own := r.Context().Value(sourceKey{}).(*source)
		t := time.NewTimer(turnTime)
		defer t.Stop()
		for _, answers := range []chan struct{}{own.answers, l.answers} {
			select {
			case answers <- struct{}{}:
				defer func() { <-answers }()
			case <-r.Context().Done():
				return
			case <-t.C:
				w.Header().Set("Retry-After", "1")
				http.Error(w, "Too many answers are waiting to be read", http.StatusServiceUnavailable)
				return
			}
		}
		h.ServeHTTP(w, r)
	})
}
