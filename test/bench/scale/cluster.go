package main

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/lariat-net/lariat/pkg/certs"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/store"
	"github.com/lariat-net/lariat/test/lab"
)

// maxHosts have an address each in the underlay.
const maxHosts = 1000

// base is the underlay, of which the first address is the store's.
var base = netip.MustParsePrefix("172.31.0.0/16")

// host is one lariat-metadata.
type host struct {
	name   string
	dir    string
	args   []string
	client metadata.Client
	http   *http.Client
	p      *lab.Process
}

// cluster is a store and the hosts that use it.
type cluster struct {
	ctx   context.Context
	o     options
	t     *table
	ns    lab.Netns
	store *host
	hosts []*host // without the store's
	etcd  *store.Etcd
}

func newCluster(ctx context.Context, o options, n int, work string) (*cluster, error) {
	// All run in the namespace of this process.
	c := &cluster{ctx: ctx, o: o, ns: lab.Netns{Name: "scale", Path: "/proc/self/ns/net"}}
	if err := underlay(n + 1); err != nil {
		return nil, err
	}
	certDir := filepath.Join(work, "pki")
	if _, err := certs.Init(certDir, "scale", time.Now()); err != nil {
		return nil, err
	}
	for i := range n + 1 {
		h, err := c.newHost(i, work, certDir)
		if err != nil {
			return nil, err
		}
		if i == 0 {
			c.store = h
		} else {
			c.hosts = append(c.hosts, h)
		}
	}
	if err := c.start(c.store); err != nil {
		return nil, err
	}
	if err := c.dial(certDir); err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

// underlay gives the namespace an address for each host.
func underlay(n int) error {
	l, err := netlink.LinkByName("u0")
	if err != nil {
		veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "u0", MTU: 1500}, PeerName: "u1"}
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("underlay: %w", err)
		}
		if l, err = netlink.LinkByName("u0"); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(l); err != nil {
			return err
		}
	}
	for i := range n {
		a := &netlink.Addr{IPNet: &net.IPNet{IP: address(i).AsSlice(), Mask: net.CIDRMask(base.Bits(), 32)}}
		if err := netlink.AddrReplace(l, a); err != nil {
			return fmt.Errorf("underlay address %s: %w", a, err)
		}
	}
	return nil
}

func address(i int) netip.Addr {
	b := base.Addr().As4()
	i++
	b[2], b[3] = byte(i>>8), byte(i)
	return netip.AddrFrom4(b)
}

func (c *cluster) newHost(i int, work, certDir string) (*host, error) {
	h := &host{name: fmt.Sprintf("h%04d", i)}
	h.dir = filepath.Join(work, h.name)
	if err := os.MkdirAll(h.dir, 0o700); err != nil {
		return nil, err
	}
	id := sha256.Sum256([]byte(h.name))
	machine := filepath.Join(h.dir, "machine-id")
	if err := os.WriteFile(machine, []byte(hex.EncodeToString(id[:16])+"\n"), 0o600); err != nil {
		return nil, err
	}
	if _, err := certs.Host(certDir, certs.Request{Name: h.name, IPs: []netip.Addr{address(i)}}, time.Now()); err != nil {
		return nil, err
	}
	h.client.Socket = filepath.Join(h.dir, "s")
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", h.client.Socket)
	}
	h.http = &http.Client{Transport: &http.Transport{DialContext: dial}}
	h.args = []string{filepath.Join(c.o.bin, "lariat-metadata"), "--host-name", h.name,
		"--socket", h.client.Socket, "--machine-id-file", machine,
		"--underlay", netip.PrefixFrom(address(i), base.Bits()).String(), "--etcd-ca", filepath.Join(certDir, certs.CACert),
		"--etcd-cert", filepath.Join(certDir, h.name+".crt"), "--etcd-key", filepath.Join(certDir, h.name+".key")}
	if i == 0 {
		h.args = append(h.args, "--data-dir", filepath.Join(h.dir, "etcd"), "--listen-client", endpoint)
	} else {
		// The store stands for a machine of its own: hundreds of hosts must not take its processors.
		h.args = append([]string{"nice", "-n", "10"}, append(h.args, "--etcd-endpoints", endpoint)...)
	}
	return h, nil
}

var endpoint = "https://" + netip.AddrPortFrom(address(0), 2379).String()

// dial reaches the store itself, to count its revisions and to fill it.
func (c *cluster) dial(certDir string) error {
	pem, err := os.ReadFile(filepath.Join(certDir, certs.CACert))
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	own := filepath.Join(certDir, c.store.name)
	pair, err := tls.LoadX509KeyPair(own+".crt", own+".key")
	if err != nil {
		return err
	}
	c.etcd, err = store.Dial(c.ctx, store.External{Endpoints: []string{endpoint}, Prefix: "/lariat/v1/",
		Log: slog.New(slog.DiscardHandler),
		TLS: &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}})
	return err
}

// start waits until the host says that it is ready.
func (c *cluster) start(h *host) (err error) {
	ctx, cancel := context.WithTimeout(c.ctx, 4*time.Minute)
	defer cancel()
	h.p, err = c.ns.Start(ctx, h.dir, nil, h.args...)
	return err
}

func (c *cluster) close() {
	if c.etcd != nil {
		_ = c.etcd.Close()
	}
	for _, h := range append(c.hosts, c.store) {
		h.p.Kill()
	}
}

// each does something at all hosts at once, and returns how many failed, the seconds until the last was
// done, and the first error.
func (c *cluster) each(do func(*host) error) (failed int, took float64, first error) {
	start := time.Now()
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, h := range c.hosts {
		wg.Go(func() {
			if err := do(h); err != nil {
				mu.Lock()
				defer mu.Unlock()
				failed++
				if first == nil {
					first = fmt.Errorf("host %s: %w", h.name, err)
				}
			}
		})
	}
	wg.Wait()
	return failed, time.Since(start).Seconds(), first
}

// metric reads the sum of a metric's samples whose line begins with the name.
func (h *host) metric(ctx context.Context, name string) (sum float64, err error) {
	data, _, err := h.get(ctx, "/metrics")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, name); ok {
			v, err := strconv.ParseFloat(strings.TrimSpace(rest[strings.LastIndexByte(rest, ' '):]), 64)
			if err != nil {
				return 0, err
			}
			sum += v
		}
	}
	return sum, nil
}

// get reads an answer of the control API, and says how long that took.
func (h *host) get(ctx context.Context, path string) (_ []byte, took time.Duration, err error) {
	start := time.Now()
	req, err := http.NewRequestWithContext(ctx, "GET", "http://lariat"+path, nil)
	if err != nil {
		return nil, 0, err
	}
	r, err := h.http.Do(req)
	if err != nil {
		return nil, 0, err
	}
	defer r.Body.Close()
	data, err := io.ReadAll(r.Body)
	if err == nil && r.StatusCode/100 != 2 {
		err = fmt.Errorf("GET %s: %s: %s", path, r.Status, data)
	}
	return data, time.Since(start), err
}

// writes is how often the hosts asked the store to write something since they serve, and revision
// is how often the store did.
func (c *cluster) counts() (writes, revision float64, err error) {
	var mu sync.Mutex
	_, _, err = c.each(func(h *host) error {
		n, err := h.metric(c.ctx, `lariat_store_seconds_count{op="write"}`)
		mu.Lock()
		defer mu.Unlock()
		writes += n
		return err
	})
	if err != nil {
		return 0, 0, err
	}
	st, err := c.etcd.Status(c.ctx)
	return writes, float64(st.Revision), err
}

// cpu is the processor time that a process has used, in seconds, and its resident memory in MiB.
func (h *host) cpu() (seconds, resident float64, err error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", h.p.Pid()))
	if err != nil {
		return 0, 0, err
	}
	f := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	var n [3]float64
	for i, at := range []int{11, 12, 21} {
		if n[i], err = strconv.ParseFloat(f[at], 64); err != nil {
			return 0, 0, err
		}
	}
	return (n[0] + n[1]) / 100, n[2] * float64(os.Getpagesize()) / (1 << 20), nil
}

// load is what processes have used so far: processor time of all hosts and of the store, in seconds, and the
// hosts' mean resident memory in MiB.
type load struct{ hosts, store, resident float64 }

func (c *cluster) load() (l load, err error) {
	for _, h := range c.hosts {
		s, r, err := h.cpu()
		if err != nil {
			return l, err
		}
		l.hosts += s
		l.resident += r / float64(len(c.hosts))
	}
	l.store, _, err = c.store.cpu()
	return l, err
}

// until asks again and again until there is no error or the time is over. It returns how often it
// asked in vain.
func until(ctx context.Context, limit time.Duration, check func(context.Context) error) (failures int, err error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	// Runtimes try a container again after a second or more. Hundreds of hosts that try more often measure themselves.
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for {
		if err = check(ctx); err == nil {
			return failures, nil
		}
		failures++
		select {
		case <-tick.C:
		case <-ctx.Done():
			return failures, errors.Join(err, ctx.Err())
		}
	}
}
