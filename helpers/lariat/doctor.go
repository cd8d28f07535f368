package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/lariat-net/lariat/pkg/doctor"
)

func (a *app) doctor() *cobra.Command {
	var noProbe bool
	var within time.Duration
	known := doctor.Names()
	checkNames := names(known, func(p doctor.Passed) string { return p.Check })
	var list strings.Builder
	for _, p := range known {
		fmt.Fprintf(&list, "  %-15s %s\n", p.Check, p.What)
	}
	c := &cobra.Command{
		Use:   "doctor [CHECK...]",
		Short: "Find out what is wrong, and say what helps",
		Long: `Looks at the metadata, at this host's kernel, and at the other hosts, which it probes: by a small
question on UDP 4788, by questions of full size that must not be fragmented, and by echo requests
through the tunnels. It asks this host's containers, and sends a packet through this host's forward
path, between two ports that it makes for that and that vanish with it. It changes nothing else.
What it finds it looks for again a second later: containers that start, and changes of the model
that are being applied, are no faults. It looks from this host; run it on the other one too when the
two of them do not reach each other. It wants to be root.

The status is 1 when it found an error, else 2 when something could not be checked, else 0. Checks:

` + list.String(),
		Example: `  lariat doctor
  lariat doctor mtu clock
  lariat doctor --output json | jq '.findings[].remedy'`,
		Args:      cobra.OnlyValidArgs,
		ValidArgs: checkNames,
		RunE: func(c *cobra.Command, args []string) error {
			ctx, cancel := a.bounded(c)
			defer cancel()
			g := doctor.Gatherer{Client: a.client(), ManagerSocket: a.managerSocket,
				Want: desired, Observe: observe, EndpointFaults: a.portFaults, Living: living,
				Features: features, Timeout: within,
				Probe: !noProbe && (len(args) == 0 || slices.ContainsFunc(args, func(s string) bool {
					return slices.Contains([]string{"reach", "tunnel", "mtu", "clock", "forward-policy", "containers", "agreement"}, s)
				}))}
			r := g.CheckUp(ctx, args...)
			if err := a.print(r, func(w *writer) { writeReport(w, r) }); err != nil {
				return err
			}
			if s := r.ExitStatus(); s != 0 {
				return exitStatus(s)
			}
			return nil
		},
	}
	c.Flags().BoolVar(&noProbe, "no-probe", false, "send nothing: to other hosts, to containers, through the forward path")
	c.Flags().DurationVar(&within, "answer-within", 400*time.Millisecond,
		"how long another host may take to answer; three tries are made")
	return c
}

func writeReport(w *writer, r *doctor.Report) {
	if w.plain {
		var rows [][]cell
		for _, f := range r.Findings {
			rows = append(rows, []cell{txt(f.Check), txt(string(f.Severity)), txt(f.Where), txt(f.What)})
		}
		for _, s := range r.Skipped {
			rows = append(rows, []cell{txt(s.Check), txt("skipped"), txt(""), txt(s.Why)})
		}
		for _, p := range r.Passed {
			rows = append(rows, []cell{txt(p.Check), txt("ok"), txt(""), txt(p.What)})
		}
		w.columns([]string{"CHECK", "RESULT", "WHERE", "WHAT"}, rows)
		return
	}
	for _, p := range r.Passed {
		w.line("%s       %s", w.paint(good, "ok"), p.What)
	}
	var reasons []string
	skipped := map[string][]string{}
	for _, s := range r.Skipped {
		if skipped[s.Why] == nil {
			reasons = append(reasons, s.Why)
		}
		skipped[s.Why] = append(skipped[s.Why], s.Check)
	}
	for _, why := range reasons {
		w.line("%s  not checked: %s (%s)", w.paint(dim, "skipped"), strings.Join(skipped[why], ", "), why)
	}
	findings(w, r.Findings)
	errs := 0
	for _, f := range r.Findings {
		if f.Severity == doctor.Error {
			errs++
		}
	}
	switch {
	case len(r.Findings) > 0:
		w.line("\n%s, %s; %s fine.", count(errs, "error"), count(len(r.Findings)-errs, "warning"),
			count(len(r.Passed), "check"))
	case len(r.Skipped) > 0:
		w.line("\nNothing found, but %s could not be made.", count(len(r.Skipped), "check"))
	default:
		w.line("\nAll is well, as far as this looks. It does not look at %s.", doctor.NotLookedAt)
	}
}
