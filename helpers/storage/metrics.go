package main

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/dockerapi"
)

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
