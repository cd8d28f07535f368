package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/lariat-net/lariat/pkg/metadata"
)

func (a *app) network() *cobra.Command {
	c := &cobra.Command{
		Use:     "network",
		Aliases: []string{"networks", "net"},
		Short:   "Make, list, change and delete networks",
		Example: `  lariat network list
  lariat network create overlay --subnet 10.42.0.0/16`,
		Args: cobra.NoArgs,
		RunE: help,
	}
	c.AddCommand(a.networkCreate(), a.networkList(), a.networkShow(), a.networkUpdate(), a.networkDelete())
	return c
}

// help is what a command that only groups others does.
func help(c *cobra.Command, _ []string) error { return c.Help() }

// networkFlags hold a network as flags say it.
type networkFlags struct {
	metadata.Network
	subnets, exempt, gateways []string
	cooldown                  time.Duration
	cniConfig                 []string
}

func (n *networkFlags) register(f *pflag.FlagSet) {
	f.StringSliceVar(&n.subnets, "subnet", nil, "`PREFIX` of the network's addresses; one of IPv4, one of IPv6, or both")
	f.IntVar(&n.BlockSizeV4, "block-size-v4", 0, "prefix `LENGTH` of the IPv4 blocks that hosts claim (default 26)")
	f.IntVar(&n.BlockSizeV6, "block-size-v6", 0, "prefix `LENGTH` of the IPv6 blocks that hosts claim (default 122)")
	f.StringVar(&n.Encapsulation, "encapsulation", metadata.EncapVXLAN, "vxlan, ipsec or none")
	f.Uint32Var(&n.VNI, "vni", 0, "VXLAN `id` (default: the next free one from 1042)")
	f.Uint16Var(&n.Port, "port", 0, "UDP `port` of the tunnels (default 4789)")
	f.IntVar(&n.MTU, "mtu", 0, "`octets` of containers' interfaces; 0: the underlay's less the encapsulation")
	f.BoolVar(&n.HostNAT, "host-nat", true, "masquerade what leaves the network by a host")
	f.StringSliceVar(&n.exempt, "host-nat-exempt", nil, "`PREFIX` that is reached without masquerading")
	f.StringSliceVar(&n.AllowFrom, "allow-from", nil, "other `NETWORK` whose containers may reach this one's, or "+
		"\"all\" of them, or a prefix outside from which they may be reached directly")
	f.BoolVar(&n.HostPorts, "host-ports", false, "publish containers' ports on their hosts")
	f.BoolVar(&n.DirectRouting, "direct-routing", false, "plain routes, no tunnel, between hosts on the same link")
	f.BoolVar(&n.StrictAffinity, "strict-affinity", false, "no host borrows addresses from another one's blocks")
	f.DurationVar(&n.cooldown, "cooldown", 0, "how long a released address rests before it is used again (default 1m0s)")
	f.StringSliceVar(&n.Exclude, "exclude", nil, "`ADDRESS`, prefix or FIRST-LAST that is never handed out")
	f.StringSliceVar(&n.gateways, "gateway", nil, "router's `ADDRESS`, of a flat network (--encapsulation none)")
	f.BoolVar(&n.IsDefault, "default", false, "the network of who names none")
	f.StringSliceVar(&n.cniConfig, "cni-config", nil, "`FILE` that every host puts into its CNI folder, under its "+
		"own name")
}

// apply takes over into net what was said; flags that were not given leave it as it is.
func (n *networkFlags) apply(net *metadata.Network, f *pflag.FlagSet) error {
	var errs []error
	set := func(flag string, do func() error) {
		if f.Changed(flag) {
			if err := do(); err != nil {
				errs = append(errs, fmt.Errorf("--%s: %w", flag, err))
			}
		}
	}
	value := func(flag string, do func()) { set(flag, func() error { do(); return nil }) }
	set("subnet", func() (err error) { net.Subnets, err = parsed(n.subnets, netip.ParsePrefix); return err })
	value("block-size-v4", func() { net.BlockSizeV4 = n.BlockSizeV4 })
	value("block-size-v6", func() { net.BlockSizeV6 = n.BlockSizeV6 })
	value("encapsulation", func() { net.Encapsulation = n.Encapsulation })
	value("vni", func() { net.VNI = n.VNI })
	value("port", func() { net.Port = n.Port })
	value("mtu", func() { net.MTU = n.MTU })
	value("host-nat", func() { net.HostNAT = n.HostNAT })
	set("host-nat-exempt", func() (err error) { net.HostNATExempt, err = parsed(n.exempt, netip.ParsePrefix); return err })
	value("allow-from", func() { net.AllowFrom = slices.DeleteFunc(n.AllowFrom, func(s string) bool { return s == "" }) })
	value("host-ports", func() { net.HostPorts = n.HostPorts })
	value("direct-routing", func() { net.DirectRouting = n.DirectRouting })
	value("strict-affinity", func() { net.StrictAffinity = n.StrictAffinity })
	set("cooldown", func() error {
		if n.cooldown < time.Second || n.cooldown%time.Second != 0 {
			return fmt.Errorf("%s: want whole seconds, at least one", n.cooldown)
		}
		net.CooldownSeconds = int(n.cooldown / time.Second)
		return nil
	})
	value("exclude", func() { net.Exclude = n.Exclude })
	set("gateway", func() (err error) { net.Gateways, err = parsed(n.gateways, netip.ParseAddr); return err })
	value("default", func() { net.IsDefault = n.IsDefault })
	set("cni-config", func() error {
		net.CNIConfig = map[string]json.RawMessage{}
		for _, file := range n.cniConfig {
			b, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			if !json.Valid(b) {
				return fmt.Errorf("%s is not JSON", file)
			}
			net.CNIConfig[filepath.Base(file)] = b
		}
		return nil
	})
	return errors.Join(errs...)
}

func parsed[T any](list []string, parse func(string) (T, error)) ([]T, error) {
	var out []T
	for _, s := range list {
		v, err := parse(s)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", s, err)
		}
		out = append(out, v)
	}
	return out, nil
}

// conflicts names what a network would get in the way of.
func conflicts(n metadata.Network, s *metadata.Snapshot) error {
	var errs []error
	for _, o := range s.Networks {
		if o.Name == n.Name {
			continue
		}
		if n.SharesVNI(&o) {
			errs = append(errs, fmt.Errorf("network %s: vni %d is network %s's; leave --vni away for a free one", n.Name, n.VNI,
				o.Name))
		}
		for _, pair := range n.Overlaps(&o) {
			errs = append(errs, fmt.Errorf("network %s: subnet %s overlaps subnet %s of network %s", n.Name, pair[0], pair[1],
				o.Name))
		}
	}
	for _, h := range s.Hosts {
		for _, pair := range n.OverlapsUnderlay(&h) {
			errs = append(errs, fmt.Errorf("network %s: subnet %s overlaps the underlay %s of host %s; tunnels would run "+
				"into themselves", n.Name, pair[0], pair[1], h.Name))
		}
	}
	return errors.Join(errs...)
}

// freeVNI is the first one from the default up that no network uses.
func freeVNI(s *metadata.Snapshot) uint32 {
	for vni := uint32(metadata.DefaultVNI); ; vni++ {
		if !slices.ContainsFunc(s.Networks, func(n metadata.Network) bool { return n.VNI == vni }) {
			return vni
		}
	}
}

func (a *app) networkCreate() *cobra.Command {
	var flags networkFlags
	var force bool
	c := &cobra.Command{
		Use:   "create NAME --subnet PREFIX",
		Short: "Make a network",
		Long: `Makes a network. Hosts take part as soon as their network managers hear of it, within a second; CNI
configurations name it. A network that is there already is not touched: see network update. It
refuses addresses to which a host has another way: a link of its own, such as Docker's bridge, or a
route.`,
		Example: `  lariat network create overlay --subnet 10.42.0.0/16
  lariat network create backend --subnet 10.43.0.0/16,fd43::/48 --mtu 1400 --direct-routing
  lariat network create shop --subnet 10.44.0.0/16 --allow-from backend,192.0.2.0/24
  lariat network create lan --encapsulation none --subnet 192.0.2.0/24 --gateway 192.0.2.1 --exclude 192.0.2.1-192.0.2.99`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			ctx, cancel := a.bounded(c)
			defer cancel()
			n := metadata.Network{Name: args[0], Encapsulation: metadata.EncapVXLAN, HostNAT: true}
			if err := flags.apply(&n, c.Flags()); err != nil {
				return err
			}
			if n.Encapsulation == metadata.EncapNone && !c.Flags().Changed("host-nat") {
				n.HostNAT = false // the LAN's router does what is to be done
			}
			snap, err := a.client().View(ctx)
			if err != nil {
				return err
			}
			if _, ok := snap.Network(n.Name); ok {
				return fmt.Errorf("network %s is there already; change it with: lariat network update %s", n.Name, n.Name)
			}
			check := n
			if n.Encapsulation == metadata.EncapVXLAN && !c.Flags().Changed("vni") {
				check.VNI = freeVNI(snap) // which one it gets is the service's choice: two who ask at once get two
			}
			if err := errors.Join(check.Validate(), conflicts(check, snap)); err != nil {
				return err
			}
			made, err := a.put(ctx, n, fmt.Sprintf("?create=true&force=%t", force))
			if err != nil {
				return err
			}
			if !slices.Equal(made.Subnets, n.Subnets) { // somebody was faster
				return fmt.Errorf("network %s is there already, with subnet %s; change it with: lariat network update %s", n.Name,
					joined(made.Subnets, " "), n.Name)
			}
			n = made
			return a.print(n, func(w *writer) { w.line("network %s made: %s", n.Name, describe(n)) })
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	flags.register(c.Flags())
	c.Flags().BoolVar(&force, "force", false, "take addresses to which hosts have other ways")
	a.completeNetworkFlags(c)
	return c
}

// put writes a network and returns it as the service completed it. With the query "?create=true" the service
// leaves one that is there as it is and returns that: this host's view, which is asked before, may be a
// moment old.
func (a *app) put(ctx context.Context, n metadata.Network, query string) (out metadata.Network, err error) {
	err = a.client().Do(ctx, "PUT", "/v1/networks/"+url.PathEscape(n.Name)+query, n, &out)
	return out, err
}

func (a *app) completeNetworkFlags(c *cobra.Command) {
	_ = c.RegisterFlagCompletionFunc("encapsulation", cobra.FixedCompletions([]string{metadata.EncapVXLAN,
		metadata.EncapIPsec, metadata.EncapNone}, cobra.ShellCompDirectiveNoFileComp))
	_ = c.MarkFlagFilename("cni-config", "conflist", "conf", "json")
}

func (a *app) networkUpdate() *cobra.Command {
	var flags networkFlags
	c := &cobra.Command{
		Use:   "update NAME",
		Short: "Change a network",
		Long: `Changes what the given flags name, and leaves the rest. Devices and new containers follow at once;
containers that run keep the interface they have. An empty list (--exclude '') clears the list.`,
		Example: `  lariat network update overlay --mtu 1400
  lariat network update overlay --direct-routing=false`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			ctx, cancel := a.bounded(c)
			defer cancel()
			snap, err := a.client().View(ctx)
			if err != nil {
				return err
			}
			n, err := findNetwork(snap, args[0])
			if err != nil {
				return err
			}
			before := n
			if err := flags.apply(&n, c.Flags()); err != nil {
				return err
			}
			if err := errors.Join(n.Validate(), conflicts(n, snap)); err != nil {
				return err
			}
			if !slices.Equal(before.Subnets, n.Subnets) || before.BlockSizeV4 != n.BlockSizeV4 ||
				before.BlockSizeV6 != n.BlockSizeV6 {
				if i := slices.IndexFunc(snap.Blocks, func(b metadata.Block) bool { return b.Network == n.Name }); i >= 0 {
					return fmt.Errorf("network %s: host %s has the block %s; subnets and block sizes can be changed only before "+
						"hosts take part", n.Name, snap.Blocks[i].Host, snap.Blocks[i].CIDR)
				}
			}
			if n, err = a.put(ctx, n, ""); err != nil {
				return err
			}
			return a.print(n, func(w *writer) { w.line("network %s changed: %s", n.Name, describe(n)) })
		},
		ValidArgsFunction: a.complete(networkNames),
	}
	flags.register(c.Flags())
	a.completeNetworkFlags(c)
	return c
}

// describe is a network in one line.
func describe(n metadata.Network) string {
	out := []string{joined(n.Subnets, " "), n.Encapsulation}
	if n.Encapsulation == metadata.EncapVXLAN {
		out = append(out, fmt.Sprintf("vni %d", n.VNI), fmt.Sprintf("udp %d", n.UDPPort()))
	}
	if n.MTU != 0 {
		out = append(out, fmt.Sprintf("mtu %d", n.MTU))
	}
	return strings.Join(out, ", ")
}

func findNetwork(s *metadata.Snapshot, name string) (metadata.Network, error) {
	if n, ok := s.Network(name); ok {
		return n, nil
	}
	return metadata.Network{}, fmt.Errorf("there is no network %s; there are: %s", name,
		orNone(names(s.Networks, func(n metadata.Network) string { return n.Name })))
}

func orNone(list []string) string {
	if len(list) == 0 {
		return "none"
	}
	return strings.Join(list, " ")
}

func (a *app) networkList() *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List networks",
		Example: `  lariat network list
  lariat network list --output json`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx, cancel := a.bounded(c)
			defer cancel()
			snap, err := a.client().View(ctx)
			if err != nil {
				return err
			}
			return a.print(snap.Networks, func(w *writer) { writeNetworks(w, snap) })
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
}

func writeNetworks(w *writer, snap *metadata.Snapshot) {
	var rows [][]cell
	members := map[string]map[string]bool{}
	for _, b := range snap.Blocks {
		if members[b.Network] == nil {
			members[b.Network] = map[string]bool{}
		}
		members[b.Network][b.Host] = true
	}
	for _, n := range snap.Networks {
		vni, mtu := "", "auto"
		if n.VNI != 0 {
			vni = fmt.Sprint(n.VNI)
		}
		if n.MTU != 0 {
			mtu = fmt.Sprint(n.MTU)
		}
		rows = append(rows, []cell{txt(n.Name), txt(joined(n.Subnets, ",")), txt(n.Encapsulation), {text: vni, right: true},
			{text: mtu, right: true}, num(len(members[n.Name])), txt(yes(n.IsDefault)), txt(yes(n.HostNAT)),
			txt(yes(n.DirectRouting))})
	}
	w.columns([]string{"NAME", "SUBNETS", "ENCAP", "VNI", "MTU", "HOSTS", "DEFAULT", "HOST-NAT", "DIRECT"}, rows)
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// networkDetails is "network show".
type networkDetails struct {
	metadata.Network
	Status *metadata.NetworkStatus `json:"status,omitempty"`
	Blocks []metadata.Block        `json:"blocks"`
}

func (a *app) networkShow() *cobra.Command {
	return &cobra.Command{
		Use:   "show NAME",
		Short: "Show a network with its blocks and what is left of it",
		Example: `  lariat network show overlay
  lariat network show overlay --output yaml`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			ctx, cancel := a.bounded(c)
			defer cancel()
			snap, err := a.client().View(ctx)
			if err != nil {
				return err
			}
			n, err := findNetwork(snap, args[0])
			if err != nil {
				return err
			}
			d := networkDetails{Network: n, Blocks: []metadata.Block{}}
			if d.Status, err = a.client().Status(ctx, n.Name); err != nil {
				return err
			}
			for _, b := range snap.Blocks {
				if b.Network == n.Name {
					d.Blocks = append(d.Blocks, b)
				}
			}
			return a.print(d, func(w *writer) { d.write(w) })
		},
		ValidArgsFunction: a.complete(networkNames),
	}
}

func (d *networkDetails) write(w *writer) {
	if !w.plain {
		field := func(name string, value any) {
			if fmt.Sprint(value) != "" {
				w.line("%-16s %s", name, value)
			}
		}
		field("name", w.paint(bold, d.Name))
		field("subnets", joined(d.Subnets, " "))
		field("encapsulation", d.Encapsulation)
		if d.Encapsulation == metadata.EncapVXLAN {
			field("vni", fmt.Sprint(d.VNI))
			field("udp port", fmt.Sprint(d.UDPPort()))
		}
		field("mtu", map[bool]string{true: "the underlay's less the encapsulation", false: fmt.Sprint(d.MTU)}[d.MTU == 0])
		field("host nat", yes(d.HostNAT))
		field("without nat", joined(d.HostNATExempt, " "))
		if d.Encapsulation != metadata.EncapNone {
			field("reached from", cmp.Or(strings.Join(d.AllowFrom, " "), "its own containers, and hosts"))
		}
		field("host ports", yes(d.HostPorts))
		field("direct routing", yes(d.DirectRouting))
		field("strict affinity", yes(d.StrictAffinity))
		field("cooldown", d.Cooldown().String())
		field("excluded", strings.Join(d.Exclude, " "))
		field("gateways", joined(d.Gateways, " "))
		field("default", yes(d.IsDefault))
		for _, name := range slices.Sorted(mapsKeys(d.CNIConfig)) {
			field("cni config", name)
		}
		if d.Status.Ready {
			field("on this host", w.paint(good, "ready"))
		} else {
			field("on this host", w.paint(bad, d.Status.Reason))
		}
		for _, u := range d.Status.Usage {
			field("left in "+u.Subnet.String(), fmt.Sprintf("%s for this host, %s claimed, %s free", count(u.Free, "address"),
				count(u.Blocks, "block"), amount(int64(u.BlocksFree))))
		}
		w.line("")
	}
	var rows [][]cell
	for _, b := range d.Blocks {
		gateway := ""
		if b.Gateway.IsValid() {
			gateway = b.Gateway.String()
		}
		rows = append(rows, []cell{txt(b.CIDR.String()), txt(b.Host), txt(gateway)})
	}
	w.columns([]string{"BLOCK", "HOST", "GATEWAY"}, rows)
}

func (a *app) networkDelete() *cobra.Command {
	var force, sure bool
	c := &cobra.Command{
		Use:     "delete NAME",
		Aliases: []string{"rm"},
		Short:   "Delete a network",
		Long: `Deletes a network. It refuses while addresses are in use, and says by whom. With --force it releases
those of this host: the containers keep their interfaces but reach nobody any more. Addresses are
released on the host that holds them, so where other hosts hold some it names these hosts. It asks
first, unless --yes is given.`,
		Example: `  lariat network delete overlay
  lariat network delete overlay --force --yes`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			ctx, cancel := a.bounded(c)
			defer cancel()
			snap, err := a.client().View(ctx)
			if err != nil {
				return err
			}
			n, err := findNetwork(snap, args[0])
			if err != nil {
				return err
			}
			held, err := a.client().Allocations(ctx, n.Name, true)
			if err != nil {
				return err
			}
			if len(held) > 0 && !force {
				return fmt.Errorf("network %s is in use by %s: %s; stop these containers, or give --force", n.Name,
					count(len(held), "address"), holders(held))
			}
			others := slices.DeleteFunc(slices.Clone(held), func(al metadata.Allocation) bool { return al.Host == snap.Self })
			if len(others) > 0 {
				return fmt.Errorf("network %s is in use on other hosts by %s: %s; %s", n.Name, count(len(others), "address"),
					holders(others), elsewhere(snap, others))
			}
			if !sure {
				question := fmt.Sprintf("Delete network %s, %s?", n.Name, describe(n))
				if len(held) > 0 {
					question = fmt.Sprintf("Delete network %s, %s, and release %s: %s?", n.Name, describe(n),
						count(len(held), "address"), holders(held))
				}
				if err := a.confirm(question); err != nil {
					return err
				}
			}
			ctx, cancel = a.bounded(c) // a person may have taken long
			defer cancel()
			if err := a.releaseAll(ctx, held); err != nil {
				return err
			}
			if err := a.client().Delete(ctx, metadata.KindNetwork, n.Name); err != nil {
				return err
			}
			return a.print(n, func(w *writer) { w.line("network %s deleted", n.Name) })
		},
		ValidArgsFunction: a.complete(networkNames),
	}
	c.Flags().BoolVar(&force, "force", false, "release addresses that are in use on this host")
	c.Flags().BoolVar(&sure, "yes", false, "do not ask")
	return c
}

// holders names some of those who hold addresses.
func holders(list []metadata.Allocation) string {
	var out []string
	for _, al := range list {
		if len(out) == 5 {
			return strings.Join(out, ", ") + fmt.Sprintf(" and %d more", len(list)-5)
		}
		out = append(out, fmt.Sprintf("%s by %s/%s on %s", al.Address, metadata.ShortID(al.ContainerID), al.IfName, al.Host))
	}
	return strings.Join(out, ", ")
}

// elsewhere says what to do about addresses that other hosts hold: each host releases its own.
func elsewhere(snap *metadata.Snapshot, list []metadata.Allocation) string {
	var live, gone []string
	for _, al := range list {
		h, _ := snap.Host(al.Host)
		if set := map[bool]*[]string{true: &live, false: &gone}[h.Live]; !slices.Contains(*set, al.Host) {
			*set = append(*set, al.Host)
		}
	}
	var out []string
	if len(live) > 0 {
		out = append(out, "run this on "+strings.Join(live, ", "))
	}
	if len(gone) > 0 {
		out = append(out, "if it is gone for good: lariat host remove "+strings.Join(gone, ", "))
	}
	return strings.Join(out, "; ")
}

func (a *app) releaseAll(ctx context.Context, list []metadata.Allocation) error {
	var errs []error
	for _, al := range list {
		id := metadata.AttachmentID{ContainerID: al.ContainerID, IfName: al.IfName}
		if err := a.client().Release(ctx, al.Network, id, al.Sequence); err != nil {
			errs = append(errs, fmt.Errorf("release %s of %s: %w", al.Address, id, err))
		}
	}
	return errors.Join(errs...)
}
