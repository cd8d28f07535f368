package service

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

func server(t *testing.T) *Server {
	t.Helper()
	s := New(slog.New(slog.DiscardHandler),
		Health{Metrics: prometheus.NewRegistry(), Ready: func(context.Context) error { return errors.New("a cause") }})
	t.Cleanup(func() { s.Stop(0) })
	return s
}

// from returns a client that sends from an address of the loopback device.
func from(source string) *http.Client {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}
	return &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DialContext: d.DialContext,
		DisableKeepAlives: true}}
}

func get(t *testing.T, c *http.Client, url string) (int, string) {
	t.Helper()
	r, err := c.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	data, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, string(data)
}

// open sends a request by a connection of its own and reads nothing. nil: it was reset before dial returned.
func open(t *testing.T, source, address, request string) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}
	c, err := d.Dial("tcp", address)
	if errors.Is(err, syscall.ECONNRESET) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	fmt.Fprint(c, request)
	return c
}

// alive reports whether the server has kept a connection: that it answers there.
func alive(c net.Conn) bool {
	if c == nil {
		return false
	}
	c.SetDeadline(time.Now().Add(20 * time.Second))
	fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	r, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err == nil {
		io.Copy(io.Discard, r.Body)
	}
	return err == nil
}

// TestListenersAnswerTheirOwn: what was added by Handle is on the unix socket and nowhere else, and the
// listeners are listed there.
func TestListenersAnswerTheirOwn(t *testing.T) {
	s := server(t)
	s.HandleFunc("POST /v1/order", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "done") })
	path := filepath.Join(folder(t), "s")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	s.Serve(l)
	guests := Guests{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "guest") }),
		Address: "127.0.0.1:0", Known: func(netip.Addr) bool { return true }}
	if err := errors.Join(s.listenMetrics("127.0.0.1:0"), s.listenGuests(guests), s.listenMetrics(""),
		s.listenGuests(Guests{})); err != nil {
		t.Fatal(err)
	}
	list := s.Listeners()
	if len(list) != 3 || list[0].Callers != Root || list[1].Callers != Everybody || list[2].Callers != Known ||
		list[0].Address != "unix:"+path ||
		!slices.Equal(list[0].Routes, []string{"GET /healthz", "GET /metrics", "GET /readyz", "GET /v1/routes",
			"POST /v1/order"}) ||
		!slices.Equal(list[1].Routes, []string{"GET /healthz", "GET /metrics", "GET /readyz"}) ||
		!slices.Equal(list[2].Routes, []string{"GET /"}) {
		t.Fatalf("%+v", list)
	}
	root := &http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", path) }}}
	tcp := from("127.0.0.1")
	for _, tc := range []struct {
		client      *http.Client
		base        string
		method, url string
		status      int
	}{
		{root, "x", "POST", "/v1/order", 200}, {root, "x", "GET", "/v1/routes", 200}, {root, "x", "GET", "/readyz", 503},
		{tcp, list[1].Address, "POST", "/v1/order", 404}, {tcp, list[1].Address, "GET", "/v1/routes", 404},
		{tcp, list[1].Address, "GET", "/readyz", 503},
		{tcp, list[1].Address, "GET", "/healthz", 200}, {tcp, list[1].Address, "GET", "/metrics", 200},
		{tcp, list[1].Address, "POST", "/metrics", 405},
		{tcp, list[2].Address, "GET", "/readyz", 200},
	} {
		req, _ := http.NewRequest(tc.method, "http://"+tc.base+tc.url, nil)
		r, err := tc.client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		data, _ := io.ReadAll(r.Body)
		r.Body.Close()
		if r.StatusCode != tc.status || tc.url == "/readyz" && tc.status == 503 && string(data) != "a cause\n" {
			t.Errorf("%s %s at %s: %d %q, want %d", tc.method, tc.url, tc.base, r.StatusCode, data, tc.status)
		}
	}
}

// TestConnectionsAreLimited: a source has no more connections than its share, strangers have one share
// together, and others are served.
func TestConnectionsAreLimited(t *testing.T) {
	s := server(t)
	known := netip.MustParseAddr("127.0.0.2")
	err := s.listenGuests(Guests{Address: "127.0.0.1:0",
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "ok") }),
		Known:   func(a netip.Addr) bool { return a == known }})
	if err != nil {
		t.Fatal(err)
	}
	address := s.Listeners()[0].Address
	var theirs, strangers []net.Conn
	for i := range 3 * maxConnsEach {
		theirs = append(theirs, open(t, known.String(), address, ""))
		strangers = append(strangers, open(t, fmt.Sprint("127.0.1.", i+1), address, ""))
	}
	count := func(list []net.Conn) (n int) {
		for _, c := range list {
			if alive(c) {
				n++
			}
		}
		return n
	}
	if n := count(theirs); n != maxConnsEach {
		t.Errorf("a source has %d connections, want %d", n, maxConnsEach)
	}
	if n := count(strangers); n != maxConnsEach {
		t.Errorf("strangers have %d connections, want %d", n, maxConnsEach)
	}
	for _, c := range theirs {
		if c != nil {
			c.Close()
		}
	}
	// The place comes back when the server has seen the end.
	for deadline := time.Now().Add(20 * time.Second); ; {
		c := open(t, known.String(), address, "")
		if alive(c) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("closed connections are counted for ever")
		}
	}
}

// TestAllConnectionsAreLimited: sources have no more connections together than there are.
func TestAllConnectionsAreLimited(t *testing.T) {
	l, err := listenTCP("127.0.0.1:0", false, network)
	if err != nil {
		t.Fatal(err)
	}
	l.conns = 12
	hs := l.server(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "ok") }))
	go hs.Serve(l)
	defer hs.Close()
	var list []net.Conn
	for i := range 40 {
		list = append(list, open(t, fmt.Sprint("127.0.0.", 2+i), l.Addr().String(), ""))
	}
	n := 0
	for _, c := range list {
		if alive(c) {
			n++
		}
	}
	if n != l.conns {
		t.Errorf("%d connections, want %d", n, l.conns)
	}
}

// TestUnreadAnswersAreLimited: a source that reads nothing has few answers made for it, and others are answered.
func TestUnreadAnswersAreLimited(t *testing.T) {
	s := server(t)
	var making, most atomic.Int64
	full := make(chan struct{}, 100)
	big := make([]byte, 16<<20)
	err := s.listenGuests(Guests{Address: "127.0.0.1:0",
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			n := making.Add(1)
			defer making.Add(-1)
			for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
			}
			if strings.HasPrefix(r.RemoteAddr, "127.0.0.2:") {
				full <- struct{}{}
				w.Write(big)
			}
		}), Known: func(netip.Addr) bool { return true }})
	if err != nil {
		t.Fatal(err)
	}
	address := s.Listeners()[0].Address
	for range maxConnsEach - 1 {
		open(t, "127.0.0.2", address, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	}
	for range maxAnswerEach {
		<-full
	}
	for i := range 10 {
		if status, _ := get(t, from(fmt.Sprint("127.0.0.", 3+i)), "http://"+address); status != 200 {
			t.Errorf("another source: %d", status)
		}
	}
	if n := most.Load(); n > maxAnswerEach+1 {
		t.Errorf("%d answers were made at a time, want %d and one of another source", n, maxAnswerEach)
	}
	// What waits longer than its turn is refused, unless those before it have been cut off meanwhile.
	if status, body := get(t, from("127.0.0.2"), "http://"+address); status != http.StatusServiceUnavailable &&
		len(body) != len(big) {
		t.Errorf("%d %q", status, body)
	}
}

// TestBodiesAreRefused: a body that is announced is not waited for.
func TestBodiesAreRefused(t *testing.T) {
	s := server(t)
	if err := s.listenMetrics("127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	for _, head := range []string{"Content-Length: 200000", "Transfer-Encoding: chunked"} {
		c := open(t, "127.0.0.1", s.Listeners()[0].Address, "GET /healthz HTTP/1.1\r\nHost: x\r\n"+head+"\r\n\r\n")
		c.SetDeadline(time.Now().Add(20 * time.Second))
		r, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil || r.StatusCode != http.StatusRequestEntityTooLarge || !r.Close {
			t.Errorf("%s: %+v %v", head, r, err)
		}
	}
}

// TestEveryWaitEnds: no caller on TCP keeps a connection by doing nothing.
func TestEveryWaitEnds(t *testing.T) {
	hs := (&limiter{}).server(nil)
	for what, d := range map[string]time.Duration{"head": hs.ReadHeaderTimeout, "request": hs.ReadTimeout,
		"answer": hs.WriteTimeout, "idle": hs.IdleTimeout} {
		if d <= 0 || d > 30*time.Second {
			t.Errorf("%s: %s", what, d)
		}
	}
}

func TestNetworkOfACaller(t *testing.T) {
	for in, want := range map[string]string{"192.0.2.1": "192.0.2.1", "2001:db8::1": "2001:db8::",
		"2001:db8:0:0:ffff::1": "2001:db8::"} {
		if got := network(netip.MustParseAddr(in)); got.String() != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
}
