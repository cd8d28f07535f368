package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/graph"
	"github.com/lariat-net/lariat/pkg/ipsec"
	"github.com/lariat-net/lariat/pkg/journal"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/plan"
	"github.com/lariat-net/lariat/pkg/printable"
	"github.com/lariat-net/lariat/pkg/reconcile"
)

func (a *app) plan() *cobra.Command {
	var file, host string
	var diff bool
	c := &cobra.Command{
		Use:   "plan",
		Short: "Print what a host's kernel should hold",
		Long: `Prints what the kernel of this host, or of another, should hold of Lariat's: devices, addresses,
neighbours, forwarding entries, routes, nftables, each as an operator would type it. It changes
nothing. Containers' own ports are not part of it. Behind it stand the tunnels of encrypted networks
as IKE has to keep them, with the ids of secrets, never a secret.

With --diff it compares with this host's kernel and prints what the network manager would change: "+" is added, "~"
replaced, "-" removed. That includes what the ports of this host's containers lack. It then ends with status 1 when
something is to change, as diff(1) does.`,
		Example: `  lariat plan
  lariat plan --diff
  lariat plan --metadata testdata/three.json --host h2`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx, cancel := a.bounded(c)
			defer cancel()
			snap, err := a.snapshot(ctx, file)
			if err != nil {
				return err
			}
			self := cmp.Or(host, snap.Self)
			if self == "" {
				return errors.New("plan: the snapshot does not say whose it is; give --host")
			}
			if _, ok := snap.Host(self); !ok {
				return fmt.Errorf("plan: host %s is not in the metadata; there are: %s", self,
					strings.Join(names(snap.Hosts, func(h metadata.Host) string { return h.Name }), " "))
			}
			here := file == "" && self == snap.Self
			want := desired(snap, self)
			if !here && !diff {
				want = plan.Desired(snap, self, false)
			}
			if !diff {
				text := want.String()
				if here {
					text += a.tunnelPlan(ctx, snap, self)
				} else {
					text += defaultTunnelPlan(snap, self)
				}
				_, err := io.WriteString(a.stdout, printable.Text(text))
				return err
			}
			have, err := observe(ctx, want)
			if err != nil {
				return err
			}
			for _, p := range want.Problems {
				a.say("lariat: problem: %s", p)
			}
			d := delta.Between(want, have)
			text := d.String()
			if file == "" {
				faults, err := a.portFaults(ctx, snap)
				if err != nil {
					return err
				}
				for _, f := range faults {
					text += "+ " + strings.Join(f.Lacks, "\n+ ") + "\n"
				}
			}
			if text == "" {
				return nil
			}
			if _, err := io.WriteString(a.stdout, printable.Text(text)); err != nil {
				return err
			}
			return exitStatus(1)
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	f := c.Flags()
	f.StringVar(&file, "metadata", "", "read a snapshot from `FILE` (-: standard input) instead of asking the service")
	f.StringVar(&host, "host", "", "plan for host `NAME` (default: the one that is asked)")
	f.BoolVar(&diff, "diff", false, "compare with this host's kernel")
	_ = c.RegisterFlagCompletionFunc("host", a.completeFlag(hostNames))
	return c
}

// tunnelPlan is what IKE has to keep on this host, by the options that its network manager has.
func (a *app) tunnelPlan(ctx context.Context, snap *metadata.Snapshot, self string) string {
	if !encrypted(snap) {
		return ""
	}
	r, err := a.tunnels(ctx)
	if err != nil || r.Auth == "" { // it has not made a pass yet
		return defaultTunnelPlan(snap, self)
	}
	o := ipsec.Options{Auth: r.Auth, Keys: r.Keys}
	o.NoGCM = len(r.Suites) > 0 && !slices.ContainsFunc(r.Suites, func(s string) bool {
		return strings.Contains(s,
			"gcm")
	})
	return tunnelText(snap, self, o)
}

// encrypted reports whether a network is.
func encrypted(s *metadata.Snapshot) bool {
	return slices.ContainsFunc(s.Networks, func(n metadata.Network) bool { return n.Encapsulation == metadata.EncapIPsec })
}

// defaultTunnelPlan is the same where nobody tells the options: the keys are those that the host has announced.
func defaultTunnelPlan(snap *metadata.Snapshot, self string) string {
	me, _ := snap.Host(self)
	text := tunnelText(snap, self, ipsec.Options{Keys: me.IKEKeys})
	if text != "" {
		text = "# tunnels, with the defaults of lariat-network-manager; it was not asked, or did not say, which options " +
			"it has on host " + printable.Line(self) + "\n" + text
	}
	return text
}

func tunnelText(snap *metadata.Snapshot, self string, o ipsec.Options) string {
	var b strings.Builder
	for _, t := range ipsec.Tunnels(snap, self, o) {
		b.WriteString(t.String())
	}
	return b.String()
}

// desired is the plan of the host that this runs on.
func desired(snap *metadata.Snapshot, self string) *delta.State {
	return plan.Desired(snap, self, kernel.LooseReversePath())
}

// observe reads this host's kernel.
func observe(ctx context.Context, want *delta.State) (*delta.State, error) {
	k, err := kernel.New()
	if err != nil {
		return nil, err
	}
	defer k.Close()
	return k.Observe(ctx, want)
}

// portFaults compares the ports of this host's containers with the journals that the metadata service knows of.
func (a *app) portFaults(ctx context.Context, snap *metadata.Snapshot) ([]delta.EndpointFault, error) {
	k, err := kernel.New()
	if err != nil {
		return nil, err
	}
	defer k.Close()
	dirs := map[string]bool{metadata.DefaultStateDir: true}
	for _, n := range snap.Networks {
		held, err := a.client().Allocations(ctx, n.Name, false)
		if err != nil {
			return nil, err
		}
		for _, h := range held {
			if h.Host == snap.Self && h.StateDir != "" {
				dirs[h.StateDir] = true
			}
		}
	}
	var journals []journal.Journal
	for dir := range dirs {
		journals = append(journals, journal.New(dir))
	}
	return reconcile.EndpointFaults(ctx, k, snap, journals...)
}

// living lists what containers that run have, by the plugins' journals.
func living(stateDirs []string) ([]metadata.Allocation, error) {
	out := []metadata.Allocation{}
	var errs []error
	for _, dir := range stateDirs {
		j := journal.New(dir)
		networks, err := j.Networks()
		errs = append(errs, err)
		for _, network := range networks {
			records, err := j.List(network)
			errs = append(errs, err)
			for _, r := range records {
				if r.State == journal.Released || r.Terminating || r.Gone("") {
					continue
				}
				for _, a := range r.Attachment.Addresses {
					out = append(out, metadata.Allocation{Address: a.Address, Network: network, ContainerID: r.ContainerID,
						IfName: r.IfName, BootID: r.BootID, StateDir: dir, Created: r.Created})
				}
			}
		}
	}
	return out, errors.Join(errs...)
}

func names[T any](list []T, name func(T) string) []string {
	out := make([]string, len(list))
	for i, v := range list {
		out[i] = name(v)
	}
	return out
}

func (a *app) graph() *cobra.Command {
	var file, kind string
	var o graph.Options
	c := &cobra.Command{
		Use:   "graph",
		Short: "Draw the cluster as SVG or DOT",
		Long: `Draws hosts, what runs on them, and how they reach each other. Hosts stand in the frame of their
physical link, each network is a rail that its hosts hang on: dashed where packets travel in
tunnels, solid where they travel plain, by a lock where they are encrypted. How this host's tunnels
fare stands with the other hosts, when the network manager tells.

SVG opens in every browser, no other program is needed. DOT is for graphviz. To look at it while it
changes, run it again.`,
		Example: `  lariat graph > cluster.svg
  lariat graph --metadata testdata/three.json --containers 3 > three.svg
  lariat graph --format dot | dot -Tpng > cluster.png`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			draw := map[string]func(*metadata.Snapshot, graph.Options) string{"svg": graph.SVG, "dot": graph.DOT}[kind]
			if draw == nil {
				return fmt.Errorf("graph: format %q: want svg or dot", kind)
			}
			ctx, cancel := a.bounded(c)
			defer cancel()
			snap, err := a.snapshot(ctx, file)
			if err != nil {
				return err
			}
			if file == "" && encrypted(snap) {
				o.Tunnels, _ = a.tunnels(ctx) // without, the picture lacks their state
			}
			_, err = io.WriteString(a.stdout, draw(snap, o))
			return err
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	f := c.Flags()
	f.StringVar(&kind, "format", "svg", "svg or dot")
	f.StringVar(&file, "metadata", "", "read a snapshot from `FILE` (-: standard input) instead of asking the service")
	f.IntVar(&o.Containers, "containers", 0, "name at most `N` containers of each host and network; -1: none, 0: as "+
		"suits the number of hosts")
	_ = c.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{"svg", "dot"},
		cobra.ShellCompDirectiveNoFileComp))
	return c
}
