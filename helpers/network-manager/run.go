package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/lariat-net/lariat/pkg/doctor/echo"
	"github.com/lariat-net/lariat/pkg/ike"
	"github.com/lariat-net/lariat/pkg/journal"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/printable"
	"github.com/lariat-net/lariat/pkg/reconcile"
	"github.com/lariat-net/lariat/pkg/service"
)

func run(args []string, stdout, stderr io.Writer) int {
	conf, err := parse(args, stdout)
	if errors.Is(err, errHelp) {
		return 0
	}
	if err == nil {
		work := manage
		if conf.teardown {
			work = func(conf config, log *slog.Logger) error { return teardown(conf, log, stdout) }
		}
		err = work(conf, slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: conf.logLevel})))
	}
	if err != nil {
		fmt.Fprintln(stderr, "lariat-network-manager:", printable.Joined(err.Error()))
		return 1
	}
	return 0
}

func manage(conf config, log *slog.Logger) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	boot, err := os.ReadFile(conf.bootIDFile)
	if err != nil {
		return fmt.Errorf("boot id: %w", err)
	}
	k, err := kernel.New()
	if err != nil {
		return err
	}
	defer k.Close()
	events, err := kernel.Watch(ctx)
	if err != nil {
		return err
	}
	m := &reconcile.Manager{
		Client: metadata.Client{Socket: conf.metadataSocket}, Journal: journal.New(conf.stateDir), Kernel: k,
		BootID: strings.TrimSpace(string(boot)), Log: log, Every: conf.every, Grace: conf.grace,
		MetadataAddress: conf.metadataAddress,
	}
	m.Tunnels = tunnels(conf, k, m, log)
	defer m.Tunnels.Daemon.Close()
	remover, err := kernel.NewLinkReaper(ctx)
	if err != nil {
		return err
	}
	api := handler(m, remover, log, conf.logLevel)
	socket, err := service.Listen(conf.socket)
	if err != nil {
		return err
	}
	defer socket.Close()
	if err := api.ListenMetrics(conf.listen); err != nil {
		return err
	}
	api.Serve(socket)
	if conf.probe {
		m.OnView = (&responder{ctx: ctx, view: m.View, log: log}).follow
	}
	service.Ready(ctx, nil)
	log.Info("started", "socket", conf.socket, "metadata", conf.metadataSocket, "state", conf.stateDir)
	err = m.Run(ctx, events)
	service.Stopping()
	if serr := api.Stop(patience); serr != nil {
		log.Warn("requests were cut short; they can be repeated", "error", serr)
	}
	log.Info("stopped; the network stays as it is")
	return err
}

// teardown prints what Lariat owns on this host, and with --yes removes it.
func teardown(conf config, log *slog.Logger, stdout io.Writer) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if conf.yes { // whoever holds the socket would make everything anew
		socket, err := service.Listen(conf.socket)
		if err != nil {
			return err
		}
		defer socket.Close()
	}
	k, err := kernel.New()
	if err != nil {
		return err
	}
	defer k.Close()
	m := &reconcile.Manager{Kernel: k, Log: log, MetadataAddress: conf.metadataAddress}
	m.Tunnels = tunnels(conf, k, m, log)
	defer m.Tunnels.Daemon.Close()
	lines, err := m.Teardown(ctx, conf.yes)
	for _, l := range lines {
		fmt.Fprintln(stdout, printable.Line(l))
	}
	switch {
	case err != nil:
		return err
	case len(lines) == 0:
		fmt.Fprintln(stdout, "Lariat owns nothing in the network of this host")
	case !conf.yes:
		fmt.Fprintln(stdout, "nothing was removed; teardown --yes removes it, and cuts these containers off")
	}
	return nil
}

// tunnels sets up what keeps encrypted networks' tunnels. Nothing is started before there is such a network.
func tunnels(conf config, k *kernel.Netns, m *reconcile.Manager, log *slog.Logger) *reconcile.Tunnels {
	t := &reconcile.Tunnels{
		View: m.View, Client: m.Client, Kernel: k, Log: log, SecretFile: conf.secretFile, CertDir: conf.certDir,
		Encap: conf.encap, Rekey: conf.rekey, Every: conf.every,
	}
	socket := conf.vici
	if conf.charon != "none" {
		t.Charon = &ike.Charon{Dir: conf.ikeDir, Log: log}
		if conf.charon != "auto" {
			t.Charon.Path = conf.charon
		}
		socket = t.Charon.Socket()
	}
	t.Daemon = &ike.Daemon{Socket: socket, Log: log}
	return t
}

// responder answers "lariat doctor" of the cluster's other hosts on this host's underlay address, and moves with it.
type responder struct {
	ctx  context.Context
	view func() *metadata.Snapshot
	log  *slog.Logger
	addr netip.Addr
	stop context.CancelFunc
}

// follow is called with each new view, one at a time.
func (r *responder) follow(s *metadata.Snapshot) {
	me, _ := s.Host(s.Self)
	addr := me.UnderlayAddr()
	if addr == r.addr {
		return
	}
	if r.stop != nil {
		r.stop()
	}
	r.addr = addr
	if !addr.IsValid() {
		return
	}
	var ctx context.Context
	ctx, r.stop = context.WithCancel(r.ctx)
	go r.serve(ctx, addr)
}

func (r *responder) serve(ctx context.Context, addr netip.Addr) {
	const again = 5 * time.Second
	for {
		err := echo.Server{Allow: r.known}.Serve(ctx, netip.AddrPortFrom(addr, echo.Port).String())
		if ctx.Err() != nil {
			return
		}
		r.log.Debug("doctor's probes are not answered", "address", addr, "error", err)
		t := time.NewTimer(again)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
	}
}

// known reports whether an address is a host's of the cluster: nobody else is answered.
func (r *responder) known(a netip.Addr) bool {
	for _, h := range r.view().Hosts {
		for _, u := range h.Underlay {
			if u.Address.Addr() == a {
				return true
			}
		}
	}
	return false
}

// patience is how long requests that run may take to end when the process is asked to.
const patience = 5 * time.Second

// handler returns what root may ask: health, metrics, the state that is wanted, and some orders.
func handler(m *reconcile.Manager, remover *kernel.LinkReaper, log *slog.Logger, level *slog.LevelVar) *service.Server {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collector{m})
	api := service.New(log, service.Health{Metrics: registry, Ready: func(context.Context) error {
		var bad []error
		for _, h := range m.Health() {
			if !h.OK {
				bad = append(bad, errors.New(h.Concern+": "+h.Error))
			}
		}
		return errors.Join(bad...)
	}})
	api.HandleFunc("GET /ping", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "OK") })
	// The CNI plugins' DEL asks for this: the manager waits for the kernel in their place.
	api.HandleFunc("DELETE /v1/ports/{name}", func(w http.ResponseWriter, r *http.Request) {
		index, _ := strconv.ParseUint(r.URL.Query().Get("index"), 10, 32)
		if err := remover.Remove(r.Context(), r.PathValue("name"), uint32(index)); err != nil {
			w.WriteHeader(http.StatusInternalServerError)
			_ = json.NewEncoder(w).Encode(metadata.Errorf(metadata.CodeInternal, "%v", err))
		}
	})
	api.HandleFunc("GET /v1/tunnels", func(w http.ResponseWriter, r *http.Request) {
		service.WriteJSON(w, m.Tunnels.Report(r.Context(), !r.URL.Query().Has("summary")))
	})
	api.HandleFunc("POST /v1/tunnels/reauth", func(w http.ResponseWriter, r *http.Request) {
		if err := m.Tunnels.Reauth(r.Context()); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		fmt.Fprintln(w, "OK")
	})
	api.HandleFunc("POST /v1/reload", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), reloadTimeout)
		defer cancel()
		if err := m.Reload(ctx); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		fmt.Fprintln(w, "OK")
	})
	api.HandleFunc("GET /v1/log-level", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, level.Level()) })
	api.HandleFunc("PUT /v1/log-level", func(w http.ResponseWriter, r *http.Request) {
		text, err := io.ReadAll(io.LimitReader(r.Body, 100))
		if err == nil {
			err = level.UnmarshalText(bytes.TrimSpace(text))
		}
		if err != nil {
			http.Error(w, fmt.Sprintf("log level %q: want debug, info, warn or error", text), http.StatusBadRequest)
			return
		}
		fmt.Fprintln(w, level.Level())
	})
	api.HandleFunc("GET /v1/state", func(w http.ResponseWriter, _ *http.Request) {
		out := struct {
			Host     string             `json:"host,omitempty"`
			StateDir string             `json:"stateDir"`
			Revision int64              `json:"revision"`
			Health   []reconcile.Health `json:"health"`
			Desired  []string           `json:"desired"`
		}{Health: m.Health(), StateDir: m.Journal.StateDir()}
		if s := m.View(); s != nil {
			out.Host, out.Revision = s.Self, s.Revision
			out.Desired = strings.Split(strings.TrimRight(m.Desired(s).String(), "\n"), "\n")
		}
		service.WriteJSON(w, out)
	})
	return api
}

// reloadTimeout is what POST /v1/reload waits for.
const reloadTimeout = 30 * time.Second

// collector turns the concerns' health into metrics.
type collector struct{ m *reconcile.Manager }

var (
	descUp = prometheus.NewDesc("lariat_concern_ok", "1 when the concern's last pass succeeded.",
		[]string{"concern"}, nil)
	descPasses   = prometheus.NewDesc("lariat_concern_passes_total", "Passes of the concern.", []string{"concern"}, nil)
	descFailures = prometheus.NewDesc("lariat_concern_failures_total", "Passes of the concern that failed.",
		[]string{"concern"}, nil)
	descChanges = prometheus.NewDesc("lariat_concern_changes_total", "Changes that the concern made to the host.",
		[]string{"concern"}, nil)
	descTook = prometheus.NewDesc("lariat_concern_duration_seconds", "How long the concern's last pass took.",
		[]string{"concern"}, nil)
	descRevision = prometheus.NewDesc("lariat_metadata_revision", "Revision of the metadata that is in force.", nil, nil)
)

func (c collector) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(c, ch) }

func (c collector) Collect(ch chan<- prometheus.Metric) {
	for _, h := range c.m.Health() {
		up := 0.0
		if h.OK {
			up = 1
		}
		ch <- prometheus.MustNewConstMetric(descUp, prometheus.GaugeValue, up, h.Concern)
		ch <- prometheus.MustNewConstMetric(descPasses, prometheus.CounterValue, float64(h.Passes), h.Concern)
		ch <- prometheus.MustNewConstMetric(descFailures, prometheus.CounterValue, float64(h.Failures), h.Concern)
		ch <- prometheus.MustNewConstMetric(descChanges, prometheus.CounterValue, float64(h.Changes), h.Concern)
		ch <- prometheus.MustNewConstMetric(descTook, prometheus.GaugeValue, h.Took.Seconds(), h.Concern)
	}
	revision := 0.0
	if s := c.m.View(); s != nil {
		revision = float64(s.Revision)
	}
	ch <- prometheus.MustNewConstMetric(descRevision, prometheus.GaugeValue, revision)
}
