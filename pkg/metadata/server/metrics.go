package server

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are computed when they are asked for; only latencies are counted along the way.
type metrics struct {
	s        *Server
	registry *prometheus.Registry
	latency  *prometheus.HistogramVec
	failures *prometheus.CounterVec
	watchers prometheus.Gauge
}

var (
	descUsed = prometheus.NewDesc("lariat_addresses_used", "Addresses in use in this host's blocks.",
		[]string{"network", "subnet"}, nil)
	descFree = prometheus.NewDesc("lariat_addresses_free",
		"Addresses that this host's blocks and unclaimed blocks have left.", []string{"network", "subnet"}, nil)
	descBlocks = prometheus.NewDesc("lariat_blocks", "Blocks claimed by all hosts.", []string{"network", "subnet"}, nil)
	descHosts  = prometheus.NewDesc("lariat_hosts", "Hosts known, by whether they are live.", []string{"live"}, nil)
	descLag    = prometheus.NewDesc("lariat_watch_lag_seconds",
		"Since the store last proved to be there; it does at least every ten seconds.", nil, nil)
	descRevision = prometheus.NewDesc("lariat_view_revision", "Revision of the network view.", nil, nil)
	descLeader   = prometheus.NewDesc("lariat_store_leader", "1 where the embedded store leads its cluster.", nil, nil)
	descSize     = prometheus.NewDesc("lariat_store_size_bytes", "Size of the store's data file.", nil, nil)
	descInUse    = prometheus.NewDesc("lariat_store_in_use_bytes", "Of it, what holds data.", nil, nil)
	descQuota    = prometheus.NewDesc("lariat_store_quota_bytes", "What the embedded store may grow to.", nil, nil)
	descStoreUp  = prometheus.NewDesc("lariat_store_up", "0 while the store does not answer this host.", nil, nil)
	descReady    = prometheus.NewDesc("lariat_ready", "1 when allocations can be served.", nil, nil)
)

func newMetrics(s *Server) *metrics {
	m := &metrics{s: s, registry: prometheus.NewRegistry(),
		latency: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "lariat_store_seconds",
			Help:    "How long calls of the store took.",
			Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .1, 1, 5}}, []string{"op"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "lariat_store_failures_total",
			Help: "Calls of the store that failed."}, []string{"op"}),
		watchers: prometheus.NewGauge(prometheus.GaugeOpts{Name: "lariat_watchers", Help: "Open watches."})}
	m.registry.MustRegister(m.latency, m.failures, m.watchers, m)
	return m
}

// ObserveStore counts a call of the store; give it to the store as its Observe.
func (s *Server) ObserveStore(op string, took time.Duration, err error) {
	s.metrics.latency.WithLabelValues(op).Observe(took.Seconds())
	if err != nil {
		s.metrics.failures.WithLabelValues(op).Inc()
	}
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descUsed, descFree, descBlocks, descHosts, descLag, descRevision, descLeader,
		descSize, descInUse, descQuota, descStoreUp, descReady} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	truth := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	s := m.s
	ctx, cancel := context.WithTimeout(s.ctx, 2*time.Second)
	defer cancel()
	for _, name := range s.view.networkNames() {
		a, n, err := s.loaded(ctx, name)
		if err != nil {
			continue
		}
		for _, p := range n.Subnets {
			u := a.Usage(n, p)
			perBlock := float64(int(1) << min(p.Addr().BitLen()-n.BlockSize(p), 30))
			gauge(descUsed, float64(u.Used), name, p.String())
			gauge(descFree, float64(u.Free)+float64(u.BlocksFree)*perBlock, name, p.String())
			gauge(descBlocks, float64(u.Blocks), name, p.String())
		}
	}
	live, all := s.view.liveCount()
	gauge(descHosts, float64(live), "true")
	gauge(descHosts, float64(all-live), "false")
	s.view.mu.RLock()
	lag, revision := time.Since(s.view.updated), s.view.revision
	s.view.mu.RUnlock()
	gauge(descLag, lag.Seconds())
	gauge(descRevision, float64(revision))
	lost, _ := s.store.Lost()
	if lost != nil {
		// It would not answer.
	} else if st, err := s.store.Status(ctx); err == nil {
		gauge(descLeader, truth(st.Leader))
		gauge(descSize, float64(st.Size))
		gauge(descInUse, float64(st.InUse))
		if st.Quota > 0 {
			gauge(descQuota, float64(st.Quota))
		}
	}
	gauge(descStoreUp, truth(lost == nil))
	gauge(descReady, truth(s.unready(ctx) == nil))
}
