package main

import (
	"fmt"
	"iter"
	"maps"
	"net/url"

	"github.com/spf13/cobra"

	"github.com/lariat-net/lariat/pkg/metadata"
)

func mapsKeys[V any](m map[string]V) iter.Seq[string] { return maps.Keys(m) }

func (a *app) host() *cobra.Command {
	c := &cobra.Command{
		Use:     "host",
		Aliases: []string{"hosts"},
		Short:   "List, show and remove hosts",
		Long:    "Hosts register themselves when their lariat-metadata starts; there is nothing to create.",
		Example: `  lariat host list
  lariat host remove h3`,
		Args: cobra.NoArgs,
		RunE: help,
	}
	c.AddCommand(a.hostList(), a.hostShow(), a.hostRemove())
	return c
}

func (a *app) hostList() *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List hosts",
		Example: `  lariat host list
  lariat host list --output json | jq -r '.[] | select(.live | not).name'`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			r, err := a.hostRows(c)
			if err != nil {
				return err
			}
			return a.print(r.Hosts, r.hosts)
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
}

// hostRows is the part of the status that tells about hosts.
func (a *app) hostRows(c *cobra.Command) (*statusReport, error) {
	ctx, cancel := a.bounded(c)
	defer cancel()
	snap, err := a.client().Snapshot(ctx)
	if err != nil {
		return nil, err
	}
	return newStatus(snapshotFacts(snap), nil), nil
}

// hostDetails is "host show".
type hostDetails struct {
	hostRow
	MAC        metadata.MAC         `json:"mac,omitzero"`
	Labels     map[string]string    `json:"labels,omitempty"`
	BlockList  []metadata.Block     `json:"blockList"`
	Endpoints  []metadata.HostRoute `json:"endpoints,omitempty"`
	Containing []metadata.Container `json:"containerList"`
}

func (a *app) hostShow() *cobra.Command {
	return &cobra.Command{
		Use:   "show NAME",
		Short: "Show a host with its blocks and containers",
		Example: `  lariat host show h1
  lariat host show h1 --output yaml`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			ctx, cancel := a.bounded(c)
			defer cancel()
			snap, err := a.client().Snapshot(ctx)
			if err != nil {
				return err
			}
			h, err := findHost(snap, args[0])
			if err != nil {
				return err
			}
			d := hostDetails{MAC: h.MAC, Labels: h.Labels, BlockList: []metadata.Block{}, Containing: []metadata.Container{}}
			for _, row := range newStatus(snapshotFacts(snap), nil).Hosts {
				if row.Name == h.Name {
					d.hostRow = row
				}
			}
			for _, b := range snap.Blocks {
				if b.Host == h.Name {
					d.BlockList = append(d.BlockList, b)
				}
			}
			for _, e := range snap.HostRoutes {
				if e.Host == h.Name {
					d.Endpoints = append(d.Endpoints, e)
				}
			}
			for _, ct := range snap.Containers {
				if ct.Host == h.Name {
					d.Containing = append(d.Containing, ct)
				}
			}
			return a.print(d, func(w *writer) { d.write(w) })
		},
		ValidArgsFunction: a.complete(hostNames),
	}
}

func (d *hostDetails) write(w *writer) {
	if !w.plain {
		live := w.paint(good, "yes")
		if !d.Live {
			live = w.paint(bad, "no")
		}
		w.line("%-13s %s", "name", w.paint(bold, d.Name))
		w.line("%-13s %s", "live", live)
		for _, u := range d.Underlay {
			w.line("%-13s %s %s, MTU %d", "underlay", u.Address, u.Device, u.MTU)
		}
		w.line("%-13s %s", "overlay MAC", d.MAC)
		w.line("%-13s %s", "machine id", d.MachineID)
		w.line("%-13s %s", "boot id", d.BootID)
		if d.AgentVersion != "" {
			w.line("%-13s %s", "version", d.AgentVersion)
		}
		for _, k := range sortedKeys(d.Labels) {
			w.line("%-13s %s=%s", "label", k, d.Labels[k])
		}
		for _, e := range d.Endpoints {
			w.line("%-13s %s of network %s", "borrowed", e.Address, e.Network)
		}
		w.line("")
	}
	var rows [][]cell
	for _, b := range d.BlockList {
		gateway := ""
		if b.Gateway.IsValid() {
			gateway = b.Gateway.String()
		}
		rows = append(rows, []cell{txt(b.Network), txt(b.CIDR.String()), txt(gateway)})
	}
	w.columns([]string{"NETWORK", "BLOCK", "GATEWAY"}, rows)
	w.line("")
	rows = nil
	for _, c := range d.Containing {
		for _, i := range interfaces(c) {
			rows = append(rows, []cell{txt(metadata.ShortID(c.ID)), txt(c.Name), txt(i.Network),
				txt(joined(i.Addresses, ",")), txt(c.State)})
		}
	}
	w.columns([]string{"CONTAINER", "NAME", "NETWORK", "ADDRESSES", "STATE"}, rows)
}

func findHost(s *metadata.Snapshot, name string) (metadata.Host, error) {
	if h, ok := s.Host(name); ok {
		return h, nil
	}
	return metadata.Host{}, fmt.Errorf("there is no host %s; there are: %s", name,
		orNone(names(s.Hosts, func(h metadata.Host) string { return h.Name })))
}

func (a *app) hostRemove() *cobra.Command {
	var force bool
	c := &cobra.Command{
		Use:     "remove NAME",
		Aliases: []string{"rm"},
		Short:   "Remove a host that is gone for good",
		Long: `Removes a host from the metadata: the other hosts drop their ways to it, its blocks and addresses
become free, and its volumes are no longer listed, which takes nothing of them away. A live host is
refused unless --force is given; it comes back when its lariat-metadata starts anew.`,
		Example: `  lariat host remove h3`,
		Args:    cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			ctx, cancel := a.bounded(c)
			defer cancel()
			snap, err := a.client().Snapshot(ctx)
			if err != nil {
				return err
			}
			h, err := findHost(snap, args[0])
			if err != nil {
				return err
			}
			if h.Live && !force {
				return fmt.Errorf("host %s is live: its metadata service answers; stop lariat-metadata there first, or give "+
					"--force", h.Name)
			}
			if err := a.client().Do(ctx, "DELETE", fmt.Sprintf("/v1/hosts/%s?force=%t", url.PathEscape(h.Name), force), nil,
				nil); err != nil {
				return err
			}
			return a.print(h, func(w *writer) { w.line("host %s removed", h.Name) })
		},
		ValidArgsFunction: a.complete(hostNames),
	}
	c.Flags().BoolVar(&force, "force", false, "remove a live host")
	return c
}
