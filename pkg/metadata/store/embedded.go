package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
)

// Embedded configures an etcd member in this process.
type Embedded struct {
	Dir    string // of the data; made with mode 0700
	Prefix string // of all keys, with a trailing slash
	Name   string // of this member

	// ListenClient lets other hosts use this store: https://IP:port with client certificates, or plain http on loopback,
	// or unix:///path. Empty: a socket in Dir.
	ListenClient string
	ListenPeer   string // https://IP:port, for clusters of several members
	// Advertise is this member's URL as InitialCluster lists it; empty: ListenPeer.
	AdvertisePeer  string
	InitialCluster string // name=URL,name=URL,name=URL; empty: this member alone
	Existing       bool   // join a cluster that runs already
	CA, Cert, Key  string // files, for both listeners

	NoListen bool // not even the socket in Dir

	Quota int64 // octets that the data may take; 0: DefaultQuota
	Log   *slog.Logger

	// Fatal is told of an error after which nothing more can be stored (disk full, disk broken). It must not return. nil:
	// panic.
	Fatal func(error)
}

// DefaultQuota holds the tables of about ten million addresses.
const DefaultQuota = 4 << 30

// Space that the folder's file system must have left, in octets. etcd makes its log in pieces of 64 MiB ahead
// of time; with less than one piece left the process would die in the middle of a write, so writes are
// refused before.
const (
	minFree      = 80 << 20
	minFreeStart = 160 << 20
)

type member struct {
	etcd *embed.Etcd
	dir  string
	new  bool

	closing atomic.Bool
}

// Open starts a member in this process and waits until it can write, or the context ends.
func Open(ctx context.Context, c Embedded) (_ *Etcd, err error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("data folder %s: %w", c.Dir, err)
	}
	if err := os.Chmod(c.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("data folder %s: %w", c.Dir, err)
	}
	m := &member{dir: c.Dir}
	if _, err := os.Stat(filepath.Join(c.Dir, "member", "wal")); errors.Is(err, os.ErrNotExist) {
		m.new = true
	}
	if free, err := m.free(); err == nil && m.new && free < minFreeStart {
		return nil, fmt.Errorf("data folder %s: only %d MiB free, a new store needs %d MiB; free some space, or give "+
			"another folder with --data-dir",
			c.Dir, free>>20, minFreeStart>>20)
	}
	cfg, err := c.etcd()
	if err != nil {
		return nil, err
	}
	var started atomic.Bool
	log := zapTo(c.Log, &m.closing, func(err error) {
		err = m.explain(err)
		if started.Load() && c.Fatal != nil {
			c.Fatal(err)
		}
		panic(err)
	})
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(log)

	// A second process on the folder would wait for its lock without a word.
	stopWaiting := time.AfterFunc(2*time.Second, func() {
		if !started.Load() {
			c.Log.Warn("still opening the data folder; does another lariat-metadata use it?", "folder", c.Dir)
		}
	})
	defer stopWaiting.Stop()
	type opened struct {
		etcd *embed.Etcd
		err  error
	}
	ch := make(chan opened, 1)
	go func() {
		var o opened
		defer func() {
			if p := recover(); p != nil {
				if err, ok := p.(error); ok {
					o.err = err
				} else {
					o.err = fmt.Errorf("%v", p)
				}
			}
			ch <- o
		}()
		o.etcd, o.err = embed.StartEtcd(cfg)
	}()
	select {
	case o := <-ch:
		if o.err != nil {
			return nil, m.explain(o.err)
		}
		m.etcd = o.etcd
		if err := m.private(cfg); err != nil {
			m.etcd.Close()
			return nil, err
		}
	case <-ctx.Done():
		return nil, fmt.Errorf("data folder %s: not open yet: %w; another lariat-metadata may be using it", c.Dir, ctx.Err())
	}
	select {
	case <-m.etcd.Server.ReadyNotify():
	case err := <-m.etcd.Err():
		m.etcd.Close()
		return nil, m.explain(err)
	case <-m.etcd.Server.StopNotify():
		m.etcd.Close()
		return nil, fmt.Errorf("data folder %s: the store stopped while starting", c.Dir)
	case <-ctx.Done():
		m.etcd.Server.HardStop()
		m.etcd.Close()
		return nil, fmt.Errorf("%w: member %s found no quorum: %w; are the other members of --initial-cluster up?",
			ErrUnavailable, c.Name, ctx.Err())
	}
	started.Store(true)
	e := newEtcd(v3client.New(m.etcd.Server), c.Prefix, c.Dir, c.Log)
	e.member = m
	e.wg.Go(e.maintain)
	return e, nil
}

// private closes the client socket to others. etcd makes it as the umask says; the one in Dir was never open,
// for nobody gets into Dir.
func (m *member) private(cfg *embed.Config) error {
	for _, u := range cfg.ListenClientUrls {
		if u.Scheme != "unix" {
			continue
		}
		if err := os.Chmod(u.Host+u.Path, 0o600); err != nil {
			return fmt.Errorf("socket of the store: %w", err)
		}
	}
	return nil
}

func (c Embedded) etcd() (*embed.Config, error) {
	cfg := embed.NewConfig()
	cfg.Dir, cfg.Name = c.Dir, c.Name
	if cfg.Name == "" {
		cfg.Name = "lariat"
	}
	cfg.QuotaBackendBytes = c.Quota
	if c.Quota == 0 {
		cfg.QuotaBackendBytes = DefaultQuota
	}
	cfg.PreVote, cfg.StrictReconfigCheck = true, true
	cfg.WatchProgressNotifyInterval = 10 * time.Second
	cfg.InitialClusterToken = "lariat"
	// Members compare hashes: silent corruption of one disk is found.
	cfg.CompactHashCheckTime = time.Minute
	cfg.LogLevel = "info"
	cfg.AutoCompactionMode, cfg.AutoCompactionRetention = "periodic", "0" // maintain does it, by count

	tls := transport.TLSInfo{TrustedCAFile: c.CA, CertFile: c.Cert, KeyFile: c.Key, ClientCertAuth: true,
		// Whom the authority signed belongs; that a host of several addresses comes by one that is in its
		// certificate cannot be had.
		SkipClientSANVerify: true}
	client := c.ListenClient
	if client == "" && !c.NoListen {
		if s := filepath.Join(c.Dir, "client.sock"); len(s) < 100 {
			client = "unix://" + s
		}
	}
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = nil, nil
	if client != "" {
		u, err := c.listenURL("--listen-client", client)
		if err != nil {
			return nil, err
		}
		cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{u}, []url.URL{u}
		if u.Scheme == "https" {
			cfg.ClientTLSInfo = tls
		}
	}

	// A member alone has a peer URL by name only: nothing listens on it.
	peer := url.URL{Scheme: "http", Host: "127.0.0.1:2380"}
	cfg.ListenPeerUrls = nil
	if c.ListenPeer != "" {
		u, err := c.listenURL("--listen-peer", c.ListenPeer)
		if err != nil {
			return nil, err
		}
		cfg.ListenPeerUrls, peer = []url.URL{u}, u
		if u.Scheme == "https" {
			cfg.PeerTLSInfo = tls
		}
	}
	if c.AdvertisePeer != "" {
		u, err := url.Parse(c.AdvertisePeer)
		if err != nil {
			return nil, fmt.Errorf("--advertise-peer %s: %w", c.AdvertisePeer, err)
		}
		peer = *u
	}
	cfg.AdvertisePeerUrls = []url.URL{peer}
	cfg.InitialCluster = c.InitialCluster
	switch {
	case c.InitialCluster == "":
		cfg.InitialCluster = cfg.Name + "=" + peer.String()
	case c.ListenPeer == "":
		return nil, errors.New("--initial-cluster without --listen-peer: other members could not reach this one")
	case !strings.Contains(","+c.InitialCluster, ","+cfg.Name+"="):
		return nil, fmt.Errorf("--initial-cluster %s does not list this member, %s; its name comes from --name",
			c.InitialCluster, cfg.Name)
	}
	if c.Existing {
		cfg.ClusterState = embed.ClusterStateFlagExisting
	}
	return cfg, nil
}

// listenURL refuses to listen beyond this machine without certificates: whoever reaches the store owns the network.
func (c Embedded) listenURL(flag, s string) (url.URL, error) {
	u, err := url.Parse(s)
	if err != nil {
		return url.URL{}, fmt.Errorf("%s %s: %w", flag, s, err)
	}
	switch u.Scheme {
	case "unix":
		return *u, nil
	case "https":
		if c.CA == "" || c.Cert == "" || c.Key == "" {
			return url.URL{}, fmt.Errorf("%s %s: needs --etcd-ca, --etcd-cert and --etcd-key; `lariat certs` makes them", flag,
				s)
		}
	case "http":
		host, _, err := net.SplitHostPort(u.Host)
		if err != nil {
			return url.URL{}, fmt.Errorf("%s %s: %w", flag, s, err)
		}
		if ip := net.ParseIP(host); host != "localhost" && !ip.IsLoopback() {
			return url.URL{}, fmt.Errorf("%s %s: plain http beyond this machine is refused: whoever reaches the store owns "+
				"the network; use https with --etcd-ca, --etcd-cert and --etcd-key (`lariat certs` makes them)", flag, s)
		}
	default:
		return url.URL{}, fmt.Errorf("%s %s: want https://IP:port, http://127.0.0.1:port or unix:///path", flag, s)
	}
	return *u, nil
}

// explain names the folder and what a person can do about it.
func (m *member) explain(err error) error {
	var remedy string
	text := err.Error()
	switch {
	case errors.Is(err, syscall.ENOSPC), strings.Contains(text, "no space left"):
		remedy = "the disk is full: free some space and start again; nothing that was acknowledged is lost"
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM), errors.Is(err, syscall.EROFS):
		remedy = "it must be writable by this user"
	case errors.Is(err, syscall.EADDRINUSE):
		remedy = "another process listens there"
		return fmt.Errorf("store: %w; %s", err, remedy)
	case errors.Is(err, syscall.EIO):
		remedy = "the disk fails: restore the last backup on another one with `lariat-metadata restore`"
	default:
		remedy = "if its files are damaged, move the folder away and bring back the last backup with `lariat-metadata " +
			"restore FILE`, " +
			"or, in a cluster, remove this member and add it again empty"
	}
	return fmt.Errorf("data folder %s: %w; %s", m.dir, err, remedy)
}

func (m *member) free() (int64, error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(m.dir, &st); err != nil {
		return 0, err
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// room says why nothing may be written, if so.
func (m *member) room() error {
	if free, err := m.free(); err == nil && free < minFree {
		return fmt.Errorf("data folder %s: only %d MiB free, %d MiB are needed to go on safely; free some space: writes "+
			"go on by themselves then",
			m.dir, free>>20, minFree>>20)
	}
	return nil
}

func (m *member) status(st *Status) {
	s := m.etcd.Server
	st.Leader = s.Leader() == s.MemberID()
	st.Size, st.InUse, st.Quota = s.Backend().Size(), s.Backend().SizeInUse(), s.Cfg.QuotaBackendBytes
	st.Revision = s.KV().Rev()
	if st.Problem == "" && s.Leader() == 0 {
		st.Problem = noLeader
	}
}

// noLeader is why nothing can be written, whichever member says so.
const noLeader = "the cluster has no leader: a majority of its members must be up and reach each other"

// close ends the member: what was answered is on disk, and the leadership is handed over where there are
// others. etcd then waits 7 s for the watches of other hosts, which never end by themselves. They end with the
// process, and their hosts look for the store again.
func (m *member) close() error {
	m.closing.Store(true)
	m.etcd.Server.Stop()
	done := make(chan struct{})
	go func() {
		m.etcd.Close()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(500 * time.Millisecond):
	}
	return nil
}
