package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/lariat-net/lariat/pkg/attach"
	"github.com/lariat-net/lariat/pkg/doctor"
	"github.com/lariat-net/lariat/pkg/journal"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/metadata"
)

func snapshotFacts(s *metadata.Snapshot) *doctor.Facts {
	return &doctor.Facts{Self: s.Self, Metadata: &doctor.Metadata{Snapshot: s}, Unavailable: map[string]string{}}
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

func (a *app) ip() *cobra.Command {
	c := &cobra.Command{
		Use:     "ip",
		Aliases: []string{"ips", "address"},
		Short:   "List, show and release addresses",
		Example: `  lariat ip list --network overlay
  lariat ip show 10.42.0.5`,
		Args: cobra.NoArgs,
		RunE: help,
	}
	c.AddCommand(a.ipList(), a.ipShow(), a.ipRelease())
	return c
}

// ipRow is an address in use, with the container's name.
type ipRow struct {
	metadata.Allocation
	Name string `json:"name,omitempty"`
}

// allocations lists the addresses in use on the named network, or on all, in order.
func (a *app) allocations(ctx context.Context, network string) ([]ipRow, *metadata.Snapshot, error) {
	snap, err := a.client().Snapshot(ctx)
	if err != nil {
		return nil, nil, err
	}
	networks := snap.Networks
	if network != "" {
		n, err := findNetwork(snap, network)
		if err != nil {
			return nil, nil, err
		}
		networks = []metadata.Network{n}
	}
	title := map[string]string{}
	for _, c := range snap.Containers {
		title[metadata.ContainerKey(c)] = c.Name
	}
	out := []ipRow{}
	for _, n := range networks {
		list, err := a.client().Allocations(ctx, n.Name, true)
		if err != nil {
			return nil, nil, err
		}
		for _, al := range list {
			key := metadata.ContainerKey(metadata.Container{Host: al.Host, ID: al.ContainerID})
			out = append(out, ipRow{al, title[key]})
		}
	}
	slices.SortFunc(out, func(x, y ipRow) int {
		return cmp.Or(cmp.Compare(x.Network, y.Network), x.Address.Compare(y.Address))
	})
	return out, snap, nil
}

func writeIPs(w *writer, list []ipRow) {
	var rows [][]cell
	for _, r := range list {
		since := ""
		if !r.Created.IsZero() {
			since = r.Created.Local().Format(time.DateTime)
		}
		rows = append(rows, []cell{txt(r.Address.String()), txt(r.Network), txt(r.Host),
			txt(metadata.ShortID(r.ContainerID) + "/" + r.IfName), txt(r.Name), txt(since)})
	}
	w.columns([]string{"ADDRESS", "NETWORK", "HOST", "ATTACHMENT", "NAME", "SINCE"}, rows)
}

func (a *app) ipList() *cobra.Command {
	var network, host string
	c := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List addresses in use",
		Example: `  lariat ip list
  lariat ip list --network overlay --host h1 --output table`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx, cancel := a.bounded(c)
			defer cancel()
			list, snap, err := a.allocations(ctx, network)
			if err != nil {
				return err
			}
			if host != "" {
				if _, err := findHost(snap, host); err != nil {
					return err
				}
				list = slices.DeleteFunc(list, func(r ipRow) bool { return r.Host != host })
			}
			return a.print(list, func(w *writer) { writeIPs(w, list) })
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	c.Flags().StringVar(&network, "network", "", "only of network `NAME`")
	c.Flags().StringVar(&host, "host", "", "only of host `NAME`")
	_ = c.RegisterFlagCompletionFunc("network", a.completeFlag(networkNames))
	_ = c.RegisterFlagCompletionFunc("host", a.completeFlag(hostNames))
	return c
}

// ipDetails is "ip show".
type ipDetails struct {
	Address netip.Addr      `json:"address"`
	State   string          `json:"state"` // in use, gateway, excluded, free, reserved, outside
	Network string          `json:"network,omitempty"`
	Block   *metadata.Block `json:"block,omitempty"`
	Use     *ipRow          `json:"use,omitempty"`
	Note    string          `json:"note,omitempty"`
}

func (a *app) ipShow() *cobra.Command {
	return &cobra.Command{
		Use:     "show ADDRESS",
		Short:   "Say who has an address, or why nobody has it",
		Example: `  lariat ip show 10.42.0.5`,
		Args:    cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			addr, err := netip.ParseAddr(args[0])
			if err != nil {
				return fmt.Errorf("address %q: %w", args[0], err)
			}
			ctx, cancel := a.bounded(c)
			defer cancel()
			list, snap, err := a.allocations(ctx, "")
			if err != nil {
				return err
			}
			d := explain(addr, list, snap)
			return a.print(d, func(w *writer) { d.write(w) })
		},
		ValidArgsFunction: a.completeAddresses,
	}
}

// explain finds out what an address is.
func explain(addr netip.Addr, list []ipRow, snap *metadata.Snapshot) ipDetails {
	d := ipDetails{Address: addr, State: "outside", Note: "no network has it"}
	for _, n := range snap.Networks {
		for _, p := range n.Subnets {
			if !p.Contains(addr) {
				continue
			}
			d.Network, d.State, d.Note = n.Name, "free", "no host has claimed its block"
			for _, ex := range n.Exclude {
				if r, err := metadata.ParseRange(ex); err == nil && r.Contains(addr) {
					d.State, d.Note = "excluded", "network "+n.Name+" excludes "+ex
				}
			}
		}
	}
	for i := range snap.Blocks {
		b := &snap.Blocks[i]
		if b.Network != d.Network || !b.CIDR.Contains(addr) {
			continue
		}
		d.Block = b
		switch {
		case b.Gateway == addr:
			d.State, d.Note = "gateway", "of host "+b.Host
		case d.State == "free":
			d.Note = "in a block of host " + b.Host
		}
	}
	if i := slices.IndexFunc(list, func(r ipRow) bool { return r.Address == addr }); i >= 0 {
		d.State, d.Note, d.Use, d.Network = "in use", "", &list[i], list[i].Network
	}
	return d
}

func (d *ipDetails) write(w *writer) {
	field := func(name string, value any) {
		if fmt.Sprint(value) != "" {
			w.line("%-11s %s", name, value)
		}
	}
	field("address", w.paint(bold, d.Address.String()))
	field("state", d.State)
	field("", d.Note)
	field("network", d.Network)
	if d.Block != nil {
		field("block", fmt.Sprintf("%s of host %s", d.Block.CIDR, d.Block.Host))
	}
	if u := d.Use; u != nil {
		field("container", u.ContainerID)
		field("name", u.Name)
		field("interface", u.IfName)
		field("host", u.Host)
		field("boot id", u.BootID)
		if !u.Created.IsZero() {
			field("since", u.Created.Local().Format(time.DateTime))
		}
	}
}

func (a *app) completeAddresses(c *cobra.Command, args []string,
	_ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	list, _, err := a.allocations(ctx, "")
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var out []cobra.Completion
	for _, r := range list {
		out = append(out, cobra.CompletionWithDesc(r.Address.String(), cmp.Or(r.Name, metadata.ShortID(r.ContainerID))))
	}
	return safe(out), cobra.ShellCompDirectiveNoFileComp
}

func (a *app) ipRelease() *cobra.Command {
	var network string
	var sure bool
	c := &cobra.Command{
		Use:   "release ADDRESS|CONTAINER/INTERFACE",
		Short: "Free the addresses of an attachment that is gone",
		Long: `Frees the addresses that an interface of a container holds: all of them, for they were given
together. This is for attachments that are gone and were never told to be; a container that still
runs would share its address with the next one, so it is refused. The network manager finds such
leftovers by itself. Each host releases its own: for those of a host that is gone see host remove.

A container's id may be cut short as long as it is unambiguous.`,
		Example: `  lariat ip release 10.42.0.5
  lariat ip release c0ffee123456/eth0 --network overlay --yes`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			ctx, cancel := a.bounded(c)
			defer cancel()
			list, snap, err := a.allocations(ctx, network)
			if err != nil {
				return err
			}
			held, err := selectHeld(list, args[0])
			if err != nil {
				return err
			}
			first := held[0]
			who := metadata.ShortID(first.ContainerID) + "/" + first.IfName
			if first.Name != "" {
				who += " (" + first.Name + ")"
			}
			if first.Host != snap.Self {
				return fmt.Errorf("%s of %s is held by host %s; %s", first.Address, who, first.Host,
					elsewhere(snap, []metadata.Allocation{first.Allocation}))
			}
			id := metadata.AttachmentID{ContainerID: first.ContainerID, IfName: first.IfName}
			if err := inUse(first.Network, first.StateDir, id); err != nil {
				return err
			}
			addresses := strings.Join(names(held, func(r ipRow) string { return r.Address.String() }), " and ")
			if !sure {
				if err := a.confirm(fmt.Sprintf("Release %s of %s on host %s, network %s?", addresses, who, first.Host,
					first.Network)); err != nil {
					return err
				}
			}
			// The newest sequence: what was handed out since then stays.
			newest := slices.MaxFunc(held, func(x, y ipRow) int { return cmp.Compare(x.Sequence, y.Sequence) })
			if err := a.client().Release(ctx, first.Network, id, newest.Sequence); err != nil {
				return err
			}
			return a.print(held, func(w *writer) { w.line("released %s of %s", addresses, who) })
		},
		ValidArgsFunction: a.completeAddresses,
	}
	c.Flags().StringVar(&network, "network", "", "only of network `NAME`")
	c.Flags().BoolVar(&sure, "yes", false, "do not ask")
	_ = c.RegisterFlagCompletionFunc("network", a.completeFlag(networkNames))
	return c
}

// inUse reports that an attachment of this host lives: its port is there, or the namespace that the plugin noted.
func inUse(network, stateDir string, id metadata.AttachmentID) error {
	const remedy = "end the container, or have its runtime disconnect it"
	if name := attach.HostName(id); kernel.VethIndex(name) != 0 {
		return remedied{fmt.Errorf("%s is in use: its interface %s is on this host", id, name), remedy}
	}
	r, known, err := journal.New(stateDir).Get(network, id)
	if err != nil {
		return err
	}
	if known && r.State != journal.Released && !r.Gone("") {
		return remedied{fmt.Errorf("%s is in use: its network namespace %s is there", id, r.Netns), remedy}
	}
	return nil
}

// selectHeld finds all addresses of the one attachment that a person means.
func selectHeld(list []ipRow, what string) ([]ipRow, error) {
	same := func(x, y ipRow) bool {
		return x.Network == y.Network && x.ContainerID == y.ContainerID && x.IfName == y.IfName
	}
	var match func(ipRow) bool
	if addr, err := netip.ParseAddr(what); err == nil {
		match = func(r ipRow) bool { return r.Address == addr }
	} else if id, ifname, ok := strings.Cut(what, "/"); ok && id != "" && ifname != "" {
		match = func(r ipRow) bool { return strings.HasPrefix(r.ContainerID, id) && r.IfName == ifname }
	} else {
		return nil, fmt.Errorf("%q: want an address, or a container and its interface such as c0ffee12/eth0", what)
	}
	var held []ipRow
	for _, r := range list {
		if !match(r) {
			continue
		}
		if len(held) > 0 && !same(held[0], r) {
			return nil, fmt.Errorf("%q is ambiguous: %s/%s of network %s and %s/%s of network %s; give more of the id, or "+
				"--network", what,
				held[0].ContainerID, held[0].IfName, held[0].Network, r.ContainerID, r.IfName, r.Network)
		}
		held = append(held, r)
	}
	if len(held) == 0 {
		return nil, errors.New(what + " is not in use; see lariat ip list")
	}
	return slices.DeleteFunc(slices.Clone(list), func(r ipRow) bool { return !same(held[0], r) }), nil
}
