package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/graph"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/plan"
)

func (a *app) plan() *cobra.Command {
	var file, host string
	var diff bool
	c := &cobra.Command{
		Use:   "plan",
		Short: "Print what a host's kernel should hold",
		Long: `Prints what the kernel of this host, or of another, should hold of Lariat's: devices, addresses, neighbours, forwarding
entries, routes, nftables, each as an operator would type it. It changes nothing. Containers' own ports are not part of it.

With --diff it compares with this host's kernel and prints what the network manager would change: "+" is added, "~"
replaced, "-" removed. It then ends with status 1 when something is to change, as diff(1) does.`,
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
				return fmt.Errorf("plan: host %s is not in the metadata; there are: %s", self, strings.Join(names(snap.Hosts, func(h metadata.Host) string { return h.Name }), " "))
			}
			want := plan.Desired(snap, self)
			if !diff {
				_, err := io.WriteString(a.stdout, want.String())
				return err
			}
			have, err := observe(ctx, want)
			if err != nil {
				return err
			}
			for _, p := range want.Problems {
				fmt.Fprintln(a.stderr, "lariat: problem:", p)
			}
			d := delta.Between(want, have)
			if d.Empty() {
				return nil
			}
			fmt.Fprint(a.stdout, d)
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

// observe reads this host's kernel.
func observe(ctx context.Context, want *delta.State) (*delta.State, error) {
	k, err := kernel.New()
	if err != nil {
		return nil, err
	}
	defer k.Close()
	return k.Observe(ctx, want)
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
		Long: `Draws hosts, what runs on them, and how they reach each other. Hosts stand in the frame of their physical link, each network is
a rail that its hosts hang on: dashed where packets travel in tunnels, solid where they travel plain.

SVG opens in every browser, no other program is needed. DOT is for graphviz. To look at it while it changes, run it again.`,
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
			_, err = io.WriteString(a.stdout, draw(snap, o))
			return err
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	f := c.Flags()
	f.StringVar(&kind, "format", "svg", "svg or dot")
	f.StringVar(&file, "metadata", "", "read a snapshot from `FILE` (-: standard input) instead of asking the service")
	f.IntVar(&o.Containers, "containers", 0, "name at most `N` containers of each host and network; -1: none, 0: as suits the number of hosts")
	_ = c.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{"svg", "dot"}, cobra.ShellCompDirectiveNoFileComp))
	return c
}
