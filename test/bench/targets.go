package main

import (
	"fmt"
	"slices"
)

// oursName is how our own contender is called in every scenario.
const oursName = "lariat"

// oursEmpty is our own contender without the reservations that the scenario otherwise has.
const oursEmpty = oursName + " empty"

// Fields of a series that a target compares.
const (
	p50  = "p50"
	rate = "rate"
	// the median of the rounds' ratios: throughput follows what else the machine does, neighbours in time do so alike
	paired = "paired"
)

// target is one promise: a ratio of ours to theirs, or, without theirs, a plain figure of ours.
type target struct {
	What    string
	Ours    seriesKey
	Theirs  []seriesKey // the best of them counts
	Field   string
	AtMost  float64 // either this
	AtLeast float64 // or this
}

// verdict is a target with what was measured.
type verdict struct {
	What     string  `json:"what"`
	Wanted   string  `json:"wanted"`
	Measured string  `json:"measured"`
	Ratio    float64 `json:"ratio,omitempty"`
	Ours     string  `json:"ours,omitempty"`
	Theirs   string  `json:"theirs,omitempty"`
	Verdict  string  `json:"verdict"` // met, missed, or not measured
}

func cniKey(scenario, who, op string) seriesKey { return seriesKey{"cni", scenario, who, op} }

// keys of several contenders in one scenario.
func cniKeys(scenario, op string, who ...string) (out []seriesKey) {
	for _, w := range who {
		out = append(out, cniKey(scenario, w, op))
	}
	return out
}

// targets is the list of promises, in the order in which they are read.
func targets() []target {
	bridgeMasq := []string{"bridge ipt", "bridge nft"}
	ptpMasq := []string{"ptp ipt", "ptp nft"}
	plain := func(op, who string, limit float64) target {
		return target{op + " of " + who + "+host-local", cniKey("plain", oursName, op), cniKeys("plain", op, who), p50, limit,
			0}
	}
	masq := func(op, name string, who []string, limit float64) target {
		return target{op + " with masquerade of " + name, cniKey("masq", oursName, op), cniKeys("masq", op, who...), p50,
			limit, 0}
	}
	list := []target{
		plain("ADD", "bridge", 0.5),
		plain("ADD", "ptp", 0.6),
		masq("ADD", "bridge", bridgeMasq, 0.2),
		masq("ADD", "ptp", ptpMasq, 0.2),
		{"ADD dual stack of ptp", cniKey("dual stack", oursName, "ADD"), cniKeys("dual stack", "ADD", "ptp"), p50, 0.05, 0},
		plain("DEL", "bridge", 0.9),
		plain("DEL", "ptp", 0.9),
		masq("DEL", "bridge", bridgeMasq, 0.35),
		masq("DEL", "ptp", ptpMasq, 0.35),
		{"ADD at 10000 existing of bridge", cniKey("10000 existing", oursName, "ADD"),
			cniKeys("10000 existing", "ADD", "bridge"), p50, 0.05, 0},
		{"ADD at 60000 existing of empty", cniKey("60000 existing", oursName, "ADD"),
			cniKeys("60000 existing", "ADD", oursEmpty), p50, 1.1, 0},
		{"40 parallel ADD rate of bridge", cniKey("40 parallel", oursName, "ADD"), cniKeys("40 parallel", "ADD", "bridge"),
			rate, 0, 1.5},
		{"40 parallel ADD rate of ptp", cniKey("40 parallel", oursName, "ADD"), cniKeys("40 parallel", "ADD", "ptp"), rate, 0,
			1.5},
		{"40 parallel ADD rate with masquerade of bridge", cniKey("40 parallel masq", oursName, "ADD"),
			cniKeys("40 parallel masq", "ADD", bridgeMasq...), rate, 0, 4},
		{"settled reconcile of 1000 peers, ms", seriesKey{"reconcile", "1000 peers", oursName, "settled"}, nil, p50, 5, 0},
		{"settled reconcile of 1000 peers, writes", seriesKey{"reconcile", "1000 peers", oursName, "writes when settled"},
			nil, p50, 0, 0},
		{"10000 peers from nothing of the batched floor", seriesKey{"reconcile", "10000 peers", oursName, "from nothing"},
			[]seriesKey{{"reconcile", "10000 peers", "batched floor", "from nothing"}}, p50, 2, 0},
	}
	for _, load := range []string{"TCP 1 stream", "TCP 4 streams", "UDP 64 B", "TCP_RR"} {
		list = append(list, target{load + " of VXLAN by hand", seriesKey{"datapath", load, oursName, "throughput"},
			[]seriesKey{{"datapath", load, "by hand", "throughput"}}, paired, 0, 0.98})
	}
	for _, name := range []string{"lariat-vxlan", "lariat-ipam"} {
		list = append(list, target{name + " VERSION of an empty program", seriesKey{"start", "VERSION", name, "start"},
			[]seriesKey{{"start", "VERSION", "empty program", "start"}}, p50, 1.3, 0})
	}
	return list
}

// judge compares what was measured with the targets.
func (r *report) judge() {
	for _, t := range targets() {
		v := verdict{What: t.What, Wanted: fmt.Sprintf("at most %g", t.AtMost), Verdict: "not measured"}
		if t.AtLeast > 0 {
			v.Wanted = fmt.Sprintf("at least %g", t.AtLeast)
		}
		ours := r.find(t.Ours)
		var theirs *series
		for _, k := range t.Theirs {
			s := r.find(k)
			if s != nil && (theirs == nil || better(field(s, t.Field), field(theirs, t.Field), t.AtLeast > 0)) {
				theirs = s
			}
		}
		if ours != nil {
			v.Ours = figure(ours, t.Field)
		}
		if theirs != nil {
			v.Theirs = theirs.Who + " " + figure(theirs, t.Field)
		}
		if ours == nil || len(t.Theirs) > 0 && theirs == nil {
			r.Targets = append(r.Targets, v)
			continue
		}
		v.Ratio = field(ours, t.Field)
		switch {
		case theirs == nil:
		case t.Field == paired && len(ours.inOrder) == len(theirs.inOrder):
			v.Ratio = pairedRatio(ours.inOrder, theirs.inOrder)
		default:
			v.Ratio /= field(theirs, t.Field)
		}
		v.Measured = number(v.Ratio)
		v.Verdict = "missed"
		if t.AtLeast > 0 && v.Ratio >= t.AtLeast || t.AtLeast == 0 && v.Ratio <= t.AtMost {
			v.Verdict = "met"
		}
		if ours.Errors > 0 || theirs != nil && theirs.Errors > 0 {
			v.Verdict += ", with errors"
		}
		r.Targets = append(r.Targets, v)
	}
}

func pairedRatio(a, b []float64) float64 {
	ratios := make([]float64, len(a))
	for i := range a {
		ratios[i] = a[i] / b[i]
	}
	slices.Sort(ratios)
	return quantile(ratios, 0.5)
}

func better(a, b float64, more bool) bool {
	if more {
		return a > b
	}
	return a < b
}

func field(s *series, name string) float64 {
	if name == rate {
		return s.Rate
	}
	return s.P50
}

func figure(s *series, name string) string {
	if name == rate {
		return number(s.Rate) + "/s"
	}
	return number(s.P50) + " " + s.Unit
}
