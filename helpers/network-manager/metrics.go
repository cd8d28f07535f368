package main

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/lariat-net/lariat/pkg/reconcile"
)

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
