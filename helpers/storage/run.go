package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/printable"
	"github.com/lariat-net/lariat/pkg/service"
	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/dockerapi"
)

func run(args []string, stdout, stderr io.Writer) int {
	conf, err := parse(args, stdout)
	if errors.Is(err, errHelp) {
		return 0
	}
	if err == nil {
		err = serve(conf, slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: conf.logLevel})))
	}
	if err != nil {
		fmt.Fprintln(stderr, "lariat-storage:", printable.Joined(err.Error()))
		return 1
	}
	return 0
}

// patience is how long calls that run may take to end when the process is asked to. Docker repeats those that did not.
const patience = 20 * time.Second

func serve(conf config, log *slog.Logger) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	driver, err := conf.open(log)
	if err != nil {
		return err
	}
	m := newMeter()
	publish := &publisher{client: metadata.Client{Socket: conf.metadata}, driver: conf.name, scope: conf.scope, log: log,
		wake: make(chan struct{}, 1)}
	docker, err := dockerapi.New(dockerapi.Config{
		Driver: driver, Name: conf.name, Scope: conf.scope, Log: log, Observe: m.observe, Changed: publish.changed,
		DetachDevice: conf.dialect == "rancher",
		StateDir:     filepath.Join(conf.stateDir, conf.name), MountDir: filepath.Join(conf.mountDir, conf.name),
	})
	if err != nil {
		return err
	}
	defer docker.Close()
	publish.volumes = docker.Volumes
	registry := prometheus.NewRegistry()
	registry.MustRegister(m.calls, m.took, collector{docker})
	api := handler(docker, driver, registry, log)
	socket, err := service.Listen(conf.socket)
	if err != nil {
		return err
	}
	defer socket.Close()
	if err := api.ListenMetrics(conf.listen); err != nil {
		return err
	}
	api.Serve(socket)
	go docker.Sweep(ctx)
	if conf.metadata != "" {
		go publish.run(ctx)
	}
	service.Ready(ctx, nil)
	log.Info("started", "socket", conf.socket, "driver", conf.driver, "scope", conf.scope)
	select {
	case err = <-api.Failed():
	case <-ctx.Done():
		err = nil
	}
	service.Stopping()
	if serr := api.Stop(patience); serr != nil {
		log.Warn("calls were cut short; they can be repeated", "error", serr)
	}
	log.Info("stopped; volumes stay mounted")
	return err
}

// handler returns Docker's protocol, and what people and monitors ask.
func handler(docker *dockerapi.Server, driver volume.Driver, registry *prometheus.Registry,
	log *slog.Logger) *service.Server {
	api := service.New(log, service.Health{Metrics: registry, Ready: func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		_, err := driver.Init(ctx)
		if err == nil {
			_, err = docker.Volumes()
		}
		return err
	}})
	for _, path := range dockerapi.Paths() {
		api.Handle("POST "+path, docker)
	}
	api.Handle("/", docker) // says what is wrong with the call
	api.HandleFunc("GET /v1/volumes", func(w http.ResponseWriter, _ *http.Request) {
		all, err := docker.Volumes()
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		service.WriteJSON(w, all)
	})
	return api
}

// meter counts calls.
type meter struct {
	calls *prometheus.CounterVec
	took  *prometheus.HistogramVec
}

func newMeter() meter {
	return meter{
		prometheus.NewCounterVec(prometheus.CounterOpts{Name: "lariat_storage_calls_total",
			Help: "Calls of Docker by their result: ok, final or error, which may pass by itself."}, []string{"call", "result"}),
		prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "lariat_storage_call_duration_seconds",
			Help: "How long calls took.", Buckets: []float64{.001, .005, .02, .1, .5, 2, 10, 60}}, []string{"call"}),
	}
}

func (m meter) observe(call string, took time.Duration, err error) {
	result := "ok"
	switch {
	case volume.IsFinal(err):
		result = "final"
	case err != nil:
		result = "error"
	}
	m.calls.WithLabelValues(call, result).Inc()
	m.took.WithLabelValues(call).Observe(took.Seconds())
}

// collector tells of the volumes.
type collector struct{ docker *dockerapi.Server }

var (
	descVolumes = prometheus.NewDesc("lariat_storage_volumes", "Volumes in the journal, by state.", []string{"state"}, nil)
	descMounted = prometheus.NewDesc("lariat_storage_mounted", "Volumes that are mounted.", nil, nil)
	descUsers   = prometheus.NewDesc("lariat_storage_users", "Users of all volumes, by Docker's mount ids.", nil, nil)
)

// Describe implements prometheus.Collector.
func (c collector) Describe(ch chan<- *prometheus.Desc) {
	ch <- descVolumes
	ch <- descMounted
	ch <- descUsers
}

// Collect implements prometheus.Collector.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	all, err := c.docker.Volumes()
	if err != nil {
		ch <- prometheus.NewInvalidMetric(descVolumes, err)
		return
	}
	states := map[dockerapi.State]int{dockerapi.Creating: 0, dockerapi.Ready: 0, dockerapi.Removing: 0,
		dockerapi.Recovered: 0}
	mounted, users := 0, 0
	for _, v := range all {
		states[v.State]++
		if v.Mounted {
			mounted++
		}
		for _, n := range v.Users {
			users += n
		}
	}
	for state, n := range states {
		ch <- prometheus.MustNewConstMetric(descVolumes, prometheus.GaugeValue, float64(n), string(state))
	}
	ch <- prometheus.MustNewConstMetric(descMounted, prometheus.GaugeValue, float64(mounted))
	ch <- prometheus.MustNewConstMetric(descUsers, prometheus.GaugeValue, float64(users))
}
