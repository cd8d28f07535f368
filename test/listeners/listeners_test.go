// Package listeners_test holds the helpers, as they are built, to who may call what, and to answering root
// whatever the others do.
package listeners_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/probe"
	"github.com/lariat-net/lariat/pkg/service"
	"github.com/lariat-net/lariat/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }

const treeAddress = "169.254.169.250:80"

// monitors is what a helper answers on --listen-metrics.
var monitors = []string{"GET /healthz", "GET /metrics", "GET /readyz"}

// helpers are all of them, with the routes that only root may call, by the unix socket.
var helpers = []struct {
	name    string
	metrics string
	private []string
	tree    bool // it answers containers, too
}{
	{"lariat-metadata", ":9475", []string{
		"/", // not found
		"DELETE /v1/containers/{host}/{id}", "DELETE /v1/hosts/{host}", "DELETE /v1/networks/{network}",
		"DELETE /v1/networks/{network}/attachments/{id}/{ifname}", "DELETE /v1/problems",
		"DELETE /v1/volumes/{driver}/{name}",
		"GET /v1/backup", "GET /v1/blocks", "GET /v1/containers", "GET /v1/containers/{host}",
		"GET /v1/containers/{host}/{id}",
		"GET /v1/endpoints", "GET /v1/hosts", "GET /v1/hosts/{host}", "GET /v1/networks", "GET /v1/networks/{network}",
		"GET /v1/networks/{network}/attachments", "GET /v1/networks/{network}/attachments/{id}/{ifname}",
		"GET /v1/networks/{network}/status", "GET /v1/problems", "GET /v1/routes", "GET /v1/snapshot", "GET /v1/volumes",
		"GET /v1/watch",
		"POST /v1/networks/{network}/attachments", "POST /v1/networks/{network}/gc", "POST /v1/networks/{network}/join",
		"PUT /v1/containers/{host}/{id}", "PUT /v1/hosts/{host}", "PUT /v1/networks/{network}",
		"PUT /v1/volumes/{driver}/{name}",
	}, true},
	{"lariat-network-manager", ":9476", []string{
		"DELETE /v1/ports/{name}", "GET /ping", "GET /v1/log-level", "GET /v1/routes", "GET /v1/state", "GET /v1/tunnels",
		"POST /v1/reload", "POST /v1/tunnels/reauth", "PUT /v1/log-level",
	}, false},
	{"lariat-storage", ":9477", []string{
		"/", // says what is wrong with a call
		"GET /v1/routes", "GET /v1/volumes",
		"POST /Plugin.Activate", "POST /VolumeDriver.Capabilities", "POST /VolumeDriver.Create", "POST /VolumeDriver.Get",
		"POST /VolumeDriver.List",
		"POST /VolumeDriver.Mount", "POST /VolumeDriver.Path", "POST /VolumeDriver.Remove", "POST /VolumeDriver.Unmount",
	}, false},
}

// host is one with all helpers on it, and a container.
type host struct {
	*lab.Host
	cluster   *lab.Cluster
	container *lab.Container
	sockets   map[string]string // by helper
}

func up(t *testing.T) *host {
	t.Helper()
	probe.Need(t, probe.UserNS, probe.Veth, probe.Bridge, probe.VXLAN, probe.NexthopObjects, probe.Nft, probe.NftFib,
		probe.NftNAT, probe.IPv6)
	c, err := lab.New(lab.Options{Hosts: 1, Metadata: []string{"--listen-metrics", ":9475"},
		Manager: []string{"--listen-metrics", ":9476"}})
	if err != nil {
		t.Fatal(err)
	}
	h := c.Hosts[0]
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%s\n%s", h.Metadata.Log(), h.Manager.Log())
		}
	})
	if err := c.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	network := metadata.Network{Name: "overlay", Subnets: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")},
		Encapsulation: metadata.EncapVXLAN, VNI: 1042, HostNAT: true}
	if err := h.Client().Put(t.Context(), metadata.KindNetwork, network.Name, network); err != nil {
		t.Fatal(err)
	}
	shell := filepath.Join(h.Dir, "shell")
	if err := os.WriteFile(shell, []byte("#!/bin/sh\necho "+
		"'{\"status\":\"Success\",\"capabilities\":{\"attach\":false}}'\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(h.Dir, "storage.sock")
	p, err := h.Start(t.Context(), h.Dir, nil, filepath.Join(c.Bin, "lariat-storage"), "--driver", shell, "--socket",
		socket, "--metadata-socket", "",
		"--state-dir", h.Dir+"/volumes", "--mount-dir", h.Dir+"/mounts", "--listen-metrics", ":9477")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Stop(); err != nil {
			t.Error(err)
		}
	})
	return &host{h, c, connected(t, h, "c0"), map[string]string{"lariat-metadata": h.Socket(),
		"lariat-network-manager": h.ManagerSocket(), "lariat-storage": socket}}
}

func connected(t *testing.T, h *lab.Host, name string) *lab.Container {
	t.Helper()
	conf, err := h.Conf("overlay", nil)
	if err != nil {
		t.Fatal(err)
	}
	c, err := h.NewContainer(name)
	if err == nil {
		err = c.AddPatiently(t.Context(), lab.Call{Conf: conf})
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(c.Del(context.Background(), lab.Call{Conf: conf}), c.Remove()); err != nil {
			t.Error(err)
		}
	})
	return c
}

// dial connects from inside of a namespace.
func dial(from lab.Netns, address string) (conn net.Conn, err error) {
	err = from.Do(func() error {
		conn, err = net.DialTimeout("tcp", address, 10*time.Second)
		return err
	})
	return conn, err
}

// ask sends one request and returns the status and the body.
func ask(t *testing.T, dial func() (net.Conn, error), method, path string) (int, []byte) {
	t.Helper()
	client := http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(context.Context, string, string) (net.Conn, error) { return dial() }}}
	req, err := http.NewRequest(method, "http://x"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	r, err := client.Do(req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	return r.StatusCode, body
}

func unixSocket(path string) func() (net.Conn, error) {
	return func() (net.Conn, error) { return net.Dial("unix", path) }
}

func TestListeners(t *testing.T) {
	h := up(t)
	t.Run("WhoMayCall", h.whoMayCall)
	t.Run("AttacksOnTheTree", h.attacks)
}

// whoMayCall: what a container, a neighbour on the underlay and the host itself get by TCP, for every route
// of every helper; and that the table above has all that the helpers say they answer.
func (h *host) whoMayCall(t *testing.T) {
	neighbour, err := lab.NewNetns("neighbour")
	if err != nil {
		t.Fatal(err)
	}
	if err := h.cluster.Switch.Plug(neighbour, "eth0", 1500, netip.MustParsePrefix("192.0.2.99/24")); err != nil {
		t.Fatal(err)
	}
	if err := neighbour.Do(func() error { // it sends what is for the tree to the host
		_, dst, _ := net.ParseCIDR("169.254.169.250/32")
		return netlink.RouteAdd(&netlink.Route{Dst: dst, Gw: h.Addr.Addr().AsSlice()})
	}); err != nil {
		t.Fatal(err)
	}
	fill := strings.NewReplacer("{host}", "a", "{network}", "overlay", "{ifname}", "eth0", "{id}", "x", "{driver}", "d",
		"{name}", "lrtnone")
	for _, helper := range helpers {
		for who, from := range map[string]lab.Netns{"container": h.container.Netns, "neighbour": neighbour, "host": h.Netns} {
			metrics := func() (net.Conn, error) { return dial(from, h.Addr.Addr().String()+helper.metrics) }
			tree := func() (net.Conn, error) { return dial(from, treeAddress) }
			for _, pattern := range monitors {
				method, path, _ := strings.Cut(pattern, " ")
				if status, _ := ask(t, metrics, method, path); status != 200 && !(path == "/readyz" && status == 503) {
					t.Errorf("%s, %s: %s: %d", helper.name, who, pattern, status)
				}
			}
			for _, pattern := range helper.private {
				method, path, ok := strings.Cut(fill.Replace(pattern), " ")
				if !ok {
					method, path = "GET", "/"
				}
				if status, _ := ask(t, metrics, method, path); status != 404 {
					t.Errorf("%s, %s: %s on --listen-metrics: %d, want 404", helper.name, who, pattern, status)
				}
				if !helper.tree || path == "/" {
					continue
				}
				want := map[bool]int{true: 404, false: 405}[method == "GET"]
				if who == "neighbour" && method == "GET" {
					want = 403
				}
				if status, _ := ask(t, tree, method, path); status != want {
					t.Errorf("%s, %s: %s on --listen-tree: %d, want %d", helper.name, who, pattern, status, want)
				}
			}
			if helper.tree {
				want := map[bool]int{true: 200, false: 403}[who != "neighbour"]
				if status, body := ask(t, tree, "GET", "/latest/self/host/name"); status != want {
					t.Errorf("%s: the tree: %d %s, want %d", who, status, body, want)
				}
			}
		}
		status, body := ask(t, unixSocket(h.sockets[helper.name]), "GET", "/v1/routes")
		var got []service.Listener
		if err := json.Unmarshal(body, &got); status != 200 || err != nil {
			t.Errorf("%s lists no routes: %d %s", helper.name, status, body)
			continue
		}
		all := append(slices.Clone(helper.private), monitors...)
		slices.Sort(all)
		want := []string{service.Root + fmt.Sprint(all), service.Everybody + fmt.Sprint(monitors)}
		if helper.tree {
			want = append(want, service.Known+fmt.Sprint([]string{"GET /"}))
		}
		var have []string
		for _, l := range got {
			slices.Sort(l.Routes)
			have = append(have, l.Callers+fmt.Sprint(l.Routes))
		}
		slices.Sort(want)
		slices.Sort(have)
		if !slices.Equal(have, want) {
			t.Errorf("%s answers\n%q, want\n%q", helper.name, have, want)
		}
	}
}

// attacks: twenty containers do what they can to take the metadata service's descriptors and memory. Root is
// answered all the while, and so is another container.
func (h *host) attacks(t *testing.T) {
	const attackers, connections = 20, 175
	if err := unix.Prlimit(h.Metadata.Pid(), unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3000, Max: 3000}, nil); err != nil {
		t.Fatal(err)
	}
	// So that the tree is 3 MB.
	for i := range 50 {
		c := metadata.Container{ID: fmt.Sprint("big", i), Host: "a",
			Links: map[string]string{"x": strings.Repeat("x", 60<<10)}}
		if err := h.Client().Put(t.Context(), metadata.KindContainer, "a/"+c.ID, c); err != nil {
			t.Fatal(err)
		}
	}
	var sources []*lab.Container
	for i := range attackers {
		sources = append(sources, connected(t, h.Host, fmt.Sprint("attacker", i)))
	}
	before := resident(t, h.Metadata.Pid())
	for _, attack := range []struct {
		name, request string
		each          int
		readFirst     bool
	}{
		{"idle keep-alive connections", "GET /latest/version HTTP/1.1\r\nHost: x\r\n\r\n", connections, true},
		{"unread answers", "GET /latest HTTP/1.1\r\nHost: x\r\nAccept: application/json\r\n\r\n", 20, false},
		{"announced bodies", "GET /latest/version HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n", connections, false},
		{"heads without an end", "GET /latest/version HTTP/1.1\r\n", connections, false},
	} {
		var open []net.Conn
		for _, s := range sources {
			err := s.Do(func() error {
				for range attack.each {
					c, err := net.DialTimeout("tcp", treeAddress, 2*time.Second)
					if err != nil {
						if errors.Is(err, syscall.ECONNRESET) {
							continue
						}
						break // the service takes no more: that is for the measurement to tell
					}
					open = append(open, c)
					fmt.Fprint(c, attack.request)
					if attack.readFirst {
						c.SetReadDeadline(time.Now().Add(2 * time.Second))
						if r, err := http.ReadResponse(bufio.NewReader(c), nil); err == nil {
							io.Copy(io.Discard, r.Body)
						}
					}
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		var slowest time.Duration
		for range 20 {
			began := time.Now()
			c := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
				DialContext: func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", h.Socket()) }}}
			r, err := c.Get("http://x/readyz")
			if err != nil {
				t.Errorf("%s: /readyz: %v", attack.name, err)
				slowest = time.Since(began)
				break
			}
			r.Body.Close()
			if r.StatusCode != 200 {
				t.Errorf("%s: /readyz: %s", attack.name, r.Status)
			}
			slowest = max(slowest, time.Since(began))
		}
		files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", h.Metadata.Pid()))
		if err != nil {
			t.Fatal(err)
		}
		grown := resident(t, h.Metadata.Pid()) - before
		t.Logf("%s: /readyz took %s at most; the service has %d descriptors and %d MB more than before", attack.name,
			slowest.Round(100*time.Microsecond), len(files), grown>>20)
		if slowest > 2*time.Second {
			t.Errorf("%s: /readyz took %s", attack.name, slowest)
		}
		if len(files) > 1500 {
			t.Errorf("%s: %d descriptors", attack.name, len(files))
		}
		if grown > 700<<20 {
			t.Errorf("%s: %d MB more than before", attack.name, grown>>20)
		}
		if !t.Failed() { // another container waits for nobody
			if status, body := ask(t, func() (net.Conn, error) { return dial(h.container.Netns, treeAddress) }, "GET",
				"/latest/self/container/primary_ip"); status != 200 || string(body) != h.container.Addr(false).String() {
				t.Errorf("%s: another container: %d %s", attack.name, status, body)
			}
		}
		for _, c := range open {
			c.Close()
		}
	}
}

// resident is the memory of the metadata service.
func resident(t *testing.T, pid int) (bytes int64) {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(data), "VmRSS:")
	if _, err := fmt.Sscan(rest, &bytes); err != nil {
		t.Fatal(err)
	}
	return bytes << 10
}
