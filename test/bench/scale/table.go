package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"text/tabwriter"
)

// figure is one number of the table.
type figure struct {
	Hosts int     `json:"hosts"`
	Phase string  `json:"phase"`
	What  string  `json:"what"`
	Unit  string  `json:"unit"`
	Value float64 `json:"value"`
}

type table struct {
	figures, before []figure
}

func (t *table) add(hosts int, phase, what, unit string, value float64) {
	t.figures = append(t.figures, figure{hosts, phase, what, unit, value})
}

// print writes a line for each figure and a column for each number of hosts, and the figures of
// before in front of each.
func (t *table) print(w io.Writer) {
	var sizes []int
	type row struct{ phase, what, unit string }
	var rows []row
	values := map[row]map[int][2]float64{}
	take := func(list []figure, column int) {
		for _, f := range list {
			r := row{f.Phase, f.What, f.Unit}
			if values[r] == nil {
				values[r] = map[int][2]float64{}
				rows = append(rows, r)
			}
			v, ok := values[r][f.Hosts]
			if !ok {
				v = [2]float64{math.NaN(), math.NaN()}
			}
			v[column] = f.Value
			values[r][f.Hosts] = v
			if column == 1 && !slices.Contains(sizes, f.Hosts) {
				sizes = append(sizes, f.Hosts)
			}
		}
	}
	take(t.figures, 1)
	take(t.before, 0)
	slices.Sort(sizes)
	out := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(out, "phase\twhat\tunit\t")
	for _, n := range sizes {
		if t.before != nil {
			fmt.Fprintf(out, "%d before\t", n)
		}
		fmt.Fprintf(out, "%d\t", n)
	}
	fmt.Fprintln(out)
	for _, r := range rows {
		fmt.Fprintf(out, "%s\t%s\t%s\t", r.phase, r.what, r.unit)
		for _, n := range sizes {
			v, ok := values[r][n]
			if !ok {
				v = [2]float64{math.NaN(), math.NaN()}
			}
			if t.before != nil {
				fmt.Fprintf(out, "%s\t", number(v[0]))
			}
			fmt.Fprintf(out, "%s\t", number(v[1]))
		}
		fmt.Fprintln(out)
	}
	out.Flush()
}

// number shows three digits that count.
func number(v float64) string {
	switch {
	case math.IsNaN(v):
		return "-"
	case v == math.Trunc(v) || math.Abs(v) >= 100:
		return fmt.Sprintf("%.0f", v)
	case math.Abs(v) >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

// quantile of sorted samples.
func quantile(sorted []float64, q float64) float64 {
	if len(sorted) == 0 {
		return math.NaN()
	}
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}
