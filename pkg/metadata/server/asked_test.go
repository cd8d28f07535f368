package server

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
	"github.com/lariat-net/lariat/pkg/metadata/store"
	"github.com/lariat-net/lariat/pkg/metadata/tree"
)

// counted is a store that counts what a host receives of containers.
type counted struct {
	store.Store
	objects, bytes, events atomic.Int64
}

func (c *counted) count(entries []store.Entry) {
	for _, e := range entries {
		if strings.HasPrefix(e.Key, entry.ContainerPrefix) {
			c.objects.Add(1)
			c.bytes.Add(int64(len(e.Key) + len(e.Value)))
		}
	}
}

func (c *counted) Page(ctx context.Context, l *store.Listing) error {
	before := len(l.Entries)
	err := c.Store.Page(ctx, l)
	c.count(l.Entries[before:])
	return err
}

func (c *counted) Watch(ctx context.Context, prefix string, after int64, fn func(store.Update) error) error {
	return c.Store.Watch(ctx, prefix, after, func(u store.Update) error {
		c.count(u.Entries)
		if strings.HasPrefix(prefix, entry.ContainerPrefix) && len(u.Entries) > 0 {
			c.events.Add(1)
		}
		return fn(u)
	})
}

// ask asks a host's tree as a caller would.
func ask(n *node, path, accept, from string) *httptest.ResponseRecorder {
	r := httptest.NewRequest("GET", path, nil)
	r.RemoteAddr = netip.AddrPortFrom(netip.MustParseAddr(from), 999).String()
	r.Header.Set("Accept", accept)
	w := httptest.NewRecorder()
	n.Tree().ServeHTTP(w, r)
	return w
}

// until asks again until the answer is right; the limit is for what never becomes so.
func until(t testing.TB, what string, right func() bool) {
	t.Helper()
	deadline := time.After(time.Minute)
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	for !right() {
		select {
		case <-again.C:
		case <-deadline:
			t.Fatalf("%s: not within a minute", what)
		}
	}
}

// TestHostsHearNothingOfEachOthersContainers, whatever their number, unless somebody asks; then each change
// comes, until nobody asks any more.
func TestHostsHearNothingOfEachOthersContainers(t *testing.T) {
	st := openStore(t, t.TempDir())
	defer st.Close()
	b := startNode(t, st, hostConfig("b", "192.0.2.2/24"))
	define(t, b, "lan", overlay("10.42.0.0/16"))
	for i := range 100 {
		attach(t, b, "lan", req(fmt.Sprint("before", i)))
	}
	heard := &counted{Store: st}
	a := startNode(t, heard, hostConfig("a", "192.0.2.1/24"))
	own := attach(t, a, "lan", req("own")).Addresses[0].Address.String()
	for i := range 100 {
		attach(t, b, "lan", req(fmt.Sprint("while", i)))
	}
	// What a hears of b's containers comes before what it hears of its own later one.
	attach(t, a, "lan", req("last"))
	until(t, "a hears of its own container", func() bool { return heard.events.Load() >= 2 })
	if w := ask(a, "/latest/self/container/name", "", own); w.Code != 200 || w.Body.String() != "own" {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	if n := heard.objects.Load(); n != 2 {
		t.Errorf("a host received %d containers (%d bytes), of which 2 are its own", n, heard.bytes.Load())
	}
	// One container of another host that asks here costs that host's containers and no more.
	c := startNode(t, st, hostConfig("c", "192.0.2.3/24"))
	foreign := attach(t, c, "lan", req("foreign")).Addresses[0].Address.String()
	until(t, "c's container is known", func() bool {
		return ask(a, "/latest/self/container/name", "",
			foreign).Body.String() == "foreign"
	})
	if n := heard.objects.Load(); n != 3 {
		t.Errorf("to know a container of c cost %d objects", n-2)
	}
	// Strangers cost nothing.
	if w := ask(a, "/latest/containers", "", "198.51.100.1"); w.Code != 403 || heard.objects.Load() != 3 {
		t.Errorf("a stranger: %d, and %d objects were read", w.Code, heard.objects.Load()-3)
	}
	if w := ask(a, "/latest/containers", "", own); w.Code != 200 || strings.Count(w.Body.String(), "\n") != 203 {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	before := heard.events.Load()
	attach(t, b, "lan", req("asked"))
	until(t, "a hears of a container of b", func() bool { return heard.events.Load() > before })
	until(t, "a shows it", func() bool { return ask(a, "/latest/containers/asked/name", "", own).Code == 200 })

	a.asked.sweep(time.Now().Add(a.cfg.Forget / 2))
	if len(a.asked.all()) != 2 {
		t.Error("what was asked for a moment ago is forgotten")
	}
	a.asked.sweep(time.Now().Add(2 * a.cfg.Forget)) // the store seems to be away at that time
	if len(a.asked.all()) != 2 {
		t.Error("what cannot be read again is forgotten")
	}
	later := time.Now().Add(2 * a.cfg.Forget)
	for _, p := range a.asked.all() {
		p.containers.mu.Lock()
		p.containers.seen = later
		p.containers.mu.Unlock()
	}
	a.asked.sweep(later)
	if len(a.asked.all()) != 0 {
		t.Error("what nobody asks for is kept")
	}
	if w := ask(a, "/latest/containers", "", own); w.Code != 200 || !strings.Contains(w.Body.String(), "=asked\n") {
		t.Errorf("asked again: %d %s", w.Code, w.Body)
	}
}

// TestTreeIsThatOfTheWholeModel: whoever asks whichever host for whatever, the answer is the one that the whole
// model gives.
func TestTreeIsThatOfTheWholeModel(t *testing.T) {
	st := openStore(t, t.TempDir())
	defer st.Close()
	nodes := []*node{startNode(t, st, hostConfig("b", "192.0.2.2/24")), startNode(t, st, hostConfig("a", "192.0.2.1/24")),
		startNode(t, st, hostConfig("c", "192.0.2.3/24"))}
	define(t, nodes[0], "lan", overlay("10.42.0.0/16", "fd42::/64"))
	r := rand.New(rand.NewPCG(1, 2))
	paths := []string{"/", "/latest", "/latest/version/x", "/latest/hosts", "/latest/networks",
		"/latest/networks/lan/subnets", "/latest/self", "/latest/self/container",
		"/latest/self/container/name", "/latest/self/container/service_index", "/latest/self/container/labels",
		"/latest/SELF/Container/SERVICE_INDEX", "/latest/self/container/ips",
		"/latest/self/host", "/latest/self/host/name", "/latest/containers", "/latest/CONTAINERS", "/latest/containers/0",
		"/latest/containers/3/service_index", "/latest/containers/c7/ips",
		"/2016-07-29/containers/1/primary_ip", "/1999-01-01/containers", "/latest/self/nothing"}
	callers := map[string]bool{"127.0.0.1": true, "192.0.2.1": true, "192.0.2.2": true, "198.51.100.1": true,
		"10.42.0.1": true, "10.42.200.9": true, "fd42::1": true}
	attached := map[string]*node{}
	for round := range 12 {
		for range 6 {
			n, id := nodes[r.IntN(3)], fmt.Sprint("c", r.IntN(30))
			switch at := attached[id]; {
			case at != nil && r.IntN(2) == 0:
				if err := at.Client.Release(t.Context(), "lan", aid(id), 0); err != nil {
					t.Fatal(err)
				}
				delete(attached, id)
			case at == nil && r.IntN(5) == 0: // a scheduler's word, which may contradict what is attached
				c := metadata.Container{Name: "planned-" + id, Addresses: []netip.Addr{addr(fmt.Sprint("10.42.0.",
					2+r.IntN(200)))}, Labels: map[string]string{"lariat.service": "x"}}
				if err := n.Client.Put(t.Context(), "containers", n.cfg.HostName+"/planned-"+id, c); err != nil {
					t.Fatal(err)
				}
				callers[c.Addresses[0].String()] = true
			case at == nil:
				q := req(id)
				q.Name = strings.ToUpper(id)
				if r.IntN(3) > 0 {
					q.Labels = map[string]string{"lariat.stack": "s", "lariat.service": []string{"x", "y"}[r.IntN(2)],
						"secret": "hunter2"}
				}
				for _, x := range attach(t, n, "lan", q).Addresses {
					callers[x.Address.String()] = true
				}
				attached[id] = n
			}
		}
		for _, n := range nodes {
			list, err := n.listContainers(t.Context(), "")
			if err != nil {
				t.Fatal(err)
			}
			whole := func() *tree.Tree {
				s := n.view.snapshot().Sane()
				s.Containers = list
				return tree.Build(s)
			}
			leadsTo := n.view.snapshot().LeadsTo()
			holders := metadata.Holders(list, leadsTo)
			for caller := range callers {
				// An address that an object names, but which leads to another host, is nobody's where only that host is asked.
				if i, held := holders[addr(caller)]; held && leadsTo(addr(caller)) != list[i].Host {
					continue
				}
				for range 6 {
					path, accept := paths[r.IntN(len(paths))], []string{"", "application/json"}[r.IntN(2)]
					var got *httptest.ResponseRecorder
					var want tree.Answer
					until(t, fmt.Sprintf("round %d: %s asks %s for %s (%s)", round, caller, n.cfg.HostName, path, accept),
						func() bool {
							got, want = ask(n, path, accept, caller), whole().Get(path, accept, addr(caller))
							return got.Code == want.Status && bytes.Equal(unversioned(got.Body.Bytes()), unversioned(want.Body)) &&
								got.Header().Get("Content-Type") == want.ContentType
						})
				}
			}
		}
	}
}

// unversioned is an answer without the version, which each host sees move in its own time.
func unversioned(body []byte) []byte {
	var root map[string]any
	if json.Unmarshal(body, &root) != nil || root["version"] == nil {
		return body
	}
	delete(root, "version")
	out, _ := json.Marshal(root)
	return out
}

// TestTreeWhileTheStoreIsAway: what is known is answered, with its age, and nothing is made up.
func TestTreeWhileTheStoreIsAway(t *testing.T) {
	st := openStore(t, t.TempDir())
	defer st.Close()
	b := startNode(t, st, hostConfig("b", "192.0.2.2/24"))
	define(t, b, "lan", overlay("10.42.0.0/16"))
	gone := &silent{Store: st}
	a := startNode(t, gone, hostConfig("a", "192.0.2.1/24"))
	labels := map[string]string{"lariat.service": "web"}
	q := req("here")
	q.Labels = labels
	here := attach(t, a, "lan", q).Addresses[0].Address.String()
	q = req("there")
	q.Labels = labels
	there := attach(t, b, "lan", q).Addresses[0].Address.String()
	const hour = 3600
	away := func(on bool) {
		gone.away.Store(on)
		for _, c := range append(a.asked.all(), &part{scope: scope{containers: a.containers}}) {
			c.containers.mu.Lock()
			c.containers.seen = time.Now().Add(-hour * time.Second)
			c.containers.mu.Unlock()
		}
		a.view.mu.Lock()
		a.view.updated = time.Now().Add(-hour * time.Second)
		a.view.mu.Unlock()
	}
	away(true)
	for _, tc := range []struct {
		path, accept, from string
		status             int
		want               string
	}{
		{"/latest/self/container/name", "", here, 200, "here"},
		{"/latest/self/host/name", "", here, 200, "a"},
		{"/latest/self/container/service_name", "", here, 200, "web"},
		{"/latest/self/container", "application/json", here, 200, `"service_index":null`},
		{"/latest/self/container/service_index", "", here, 503, "does not answer"},
		{"/latest/containers", "", here, 503, "does not answer"},
		{"/latest", "application/json", here, 503, "does not answer"},
		{"/latest", "", here, 200, "containers/"},
		{"/latest/self/container/name", "", there, 503, "does not answer"},
	} {
		w := ask(a, tc.path, tc.accept, tc.from)
		if w.Code != tc.status || !strings.Contains(w.Body.String(), tc.want) {
			t.Errorf("%s from %s: %d %s, want %d %q", tc.path, tc.from, w.Code, w.Body, tc.status, tc.want)
		}
		age, _ := strconv.Atoi(w.Header().Get("Age"))
		if (age >= hour) != (tc.status == 200) || (w.Header().Get("Retry-After") != "") != (tc.status == 503) {
			t.Errorf("%s: %v", tc.path, w.Header())
		}
	}
	gone.away.Store(false)
	until(t, "all is read", func() bool { return ask(a, "/latest/containers", "", here).Code == http.StatusOK })
	away(true)
	if w := ask(a, "/latest/containers", "", here); w.Code != 200 || w.Body.String() != "0=here\n1=there\n" ||
		w.Header().Get("Age") < "3600" {
		t.Errorf("%d %s %v", w.Code, w.Body, w.Header())
	}
	if w := ask(a, "/latest/self/container/service_index", "", there); w.Code != 200 || w.Body.String() != "2" {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}

// silent is a store that can be away: it reads nothing then.
type silent struct {
	store.Store
	away atomic.Bool
}

func (s *silent) Page(ctx context.Context, l *store.Listing) error {
	if s.away.Load() {
		return store.ErrUnavailable
	}
	return s.Store.Page(ctx, l)
}

// BenchmarkAttachBesideHosts is an attach at one host while others are there, each of which watches its own
// containers, or all. It reports what one host received at its start beside so many containers of others, and
// for each attach of another.
func BenchmarkAttachBesideHosts(b *testing.B) {
	for _, all := range []bool{false, true} {
		b.Run(map[bool]string{false: "own", true: "all"}[all], func(b *testing.B) {
			st := openStore(b, b.TempDir())
			defer st.Close()
			n := startNode(b, st, hostConfig("h", "192.0.2.1/24"))
			define(b, n, "lan", overlay("10.0.0.0/8"))
			const hosts, containers = 30, 3000
			for from := range slices.Chunk(make([]struct{}, containers), 100) {
				done := make(chan error)
				for range from {
					go func() {
						_, err := n.Server.Attach(b.Context(), "lan", req(fmt.Sprintf("%064x", rand.Uint64())))
						done <- err
					}()
				}
				for range from {
					if err := <-done; err != nil {
						b.Fatal(err)
					}
				}
			}
			var received []*counted
			for i := range hosts {
				c := &counted{Store: st}
				h := startNode(b, c, hostConfig(fmt.Sprint("x", i), fmt.Sprintf("192.0.2.%d/24", 10+i)))
				if all {
					if w := ask(h, "/latest/containers", "", "127.0.0.1"); w.Code != 200 {
						b.Fatal(w.Code)
					}
				}
				received = append(received, c)
			}
			atStart := received[0].bytes.Load()
			b.SetParallelism(32)
			b.ResetTimer()
			b.RunParallel(func(p *testing.PB) {
				for p.Next() {
					if _, err := n.Server.Attach(b.Context(), "lan", req(fmt.Sprintf("%064x", rand.Uint64()))); err != nil {
						b.Error(err)
					}
				}
			})
			b.StopTimer()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "attaches/s")
			b.ReportMetric(float64(atStart), "start-B/host")
			b.ReportMetric(float64(received[0].bytes.Load()-atStart)/float64(b.N), "B/attach/host")
		})
	}
}
