package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/lariat-net/lariat/pkg/doctor"
	"github.com/lariat-net/lariat/pkg/graph"
	"github.com/lariat-net/lariat/pkg/ipsec"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/mtu"
	"github.com/lariat-net/lariat/pkg/printable"
)

// statusReport is what "lariat status" knows. Its JSON is for scripts, so fields are added, never changed.
type statusReport struct {
	Self     string           `json:"self,omitempty"`
	Revision int64            `json:"revision"`
	Store    string           `json:"store"`   // healthy, unknown, or what is wrong
	Manager  string           `json:"manager"` // of this host: running, unknown, or what is wrong
	Problems []doctor.Finding `json:"problems"`
	Hosts    []hostRow        `json:"hosts"`
	Networks []networkRow     `json:"networks"`
	Tunnels  *ipsec.Report    `json:"tunnels,omitempty"` // of this host's encrypted networks
	took     time.Duration
	socket   string
}

type hostRow struct {
	Name         string                  `json:"name"`
	Self         bool                    `json:"self,omitempty"`
	Live         bool                    `json:"live"`
	Underlay     []metadata.Underlay     `json:"underlay"`
	BootID       string                  `json:"bootID"`
	MachineID    string                  `json:"machineID"`
	AgentVersion string                  `json:"agentVersion,omitempty"`
	Blocks       int                     `json:"blocks"`
	Containers   int                     `json:"containers"`
	Gateways     map[string][]netip.Addr `json:"gateways"` // by network
	Joined       time.Time               `json:"joined,omitzero"`
}

type networkRow struct {
	Name          string      `json:"name"`
	Encapsulation string      `json:"encapsulation"`
	VNI           uint32      `json:"vni,omitempty"`
	MTU           int         `json:"mtu"`               // of containers on this host
	MTUFixed      bool        `json:"mtuFixed"`          // by the network; else it follows the underlay
	Default       bool        `json:"default,omitempty"` // for who names no network
	Hosts         int         `json:"hosts"`             // that take part
	Subnets       []subnetRow `json:"subnets"`
}

type subnetRow struct {
	Subnet     netip.Prefix `json:"subnet"`
	Used       int64        `json:"used"` // by all hosts
	Free       int64        `json:"free"` // that this host could hand out; -1: not known
	Blocks     int64        `json:"blocks"`
	BlocksFree int64        `json:"blocksFree"` // -1: not known
}

func (a *app) status() *cobra.Command {
	var file string
	var raw bool
	c := &cobra.Command{
		Use:   "status",
		Short: "Show hosts, networks, and what is wrong",
		Long: `Shows the cluster as this host's metadata service knows it, problems and their remedies first.
It asks no other host; lariat doctor does.

With --snapshot it prints the model itself as JSON: what --metadata of this command, of plan and of
graph reads, and what belongs into a bug report. It holds no secrets, but names and addresses.`,
		Example: `  lariat status
  lariat status --output json | jq .problems
  lariat status --snapshot > cluster.json
  lariat status --metadata testdata/three.json`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx, cancel := a.bounded(c)
			defer cancel()
			if raw {
				s, err := a.snapshot(ctx, file)
				if err != nil {
					return err
				}
				b, err := json.MarshalIndent(s, "", " ")
				if err != nil {
					return err
				}
				_, err = fmt.Fprintln(a.stdout, printable.JSON(string(b)))
				return err
			}
			facts, used, took, err := a.statusFacts(ctx, file)
			if err != nil {
				return err
			}
			r := newStatus(facts, used)
			r.took, r.socket = took, a.client().Socket
			if err := a.print(r, r.write); err != nil {
				return err
			}
			if facts.Metadata.Err != nil {
				return exitStatus(1)
			}
			return nil
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	c.Flags().StringVar(&file, "metadata", "", "read a snapshot from `FILE` (-: standard input) instead of asking "+
		"the service")
	c.Flags().BoolVar(&raw, "snapshot", false, "print the model itself, as JSON")
	return c
}

// statusFacts gathers what status shows, and counts addresses in use by subnet.
func (a *app) statusFacts(ctx context.Context, file string) (*doctor.Facts, map[netip.Prefix]int64, time.Duration,
	error) {
	f := &doctor.Facts{Unavailable: map[string]string{}}
	used := map[netip.Prefix]int64{}
	if file != "" {
		s, err := a.snapshot(ctx, file)
		if err != nil {
			return nil, nil, 0, err
		}
		f.Self, f.Metadata = s.Self, &doctor.Metadata{Snapshot: s}
		for _, n := range s.Networks {
			countUsed(used, s, n)
		}
		return f, used, 0, nil
	}
	g := doctor.Gatherer{Client: a.client(), ManagerSocket: a.managerSocket}
	start := time.Now()
	g.MetadataFacts(ctx, f)
	took := time.Since(start)
	g.ManagerFacts(ctx, f)
	if f.Metadata.Snapshot == nil {
		return f, used, took, nil
	}
	for _, n := range f.Metadata.Snapshot.Networks {
		list, err := a.client().Allocations(ctx, n.Name, true)
		if errors.Is(err, metadata.ErrUnreachable) && f.Metadata.Snapshot.Away != "" {
			countUsed(used, f.Metadata.Snapshot, n)
			continue
		}
		if err != nil {
			return nil, nil, 0, fmt.Errorf("addresses of network %s: %w", n.Name, err)
		}
		for _, p := range n.Subnets {
			used[p] = 0
			for _, al := range list {
				if p.Contains(al.Address) {
					used[p]++
				}
			}
		}
	}
	return f, used, took, nil
}

// countUsed counts a network's addresses in use as the known containers tell.
func countUsed(used map[netip.Prefix]int64, s *metadata.Snapshot, n metadata.Network) {
	for _, p := range n.Subnets {
		used[p] = 0
		for _, c := range s.Containers {
			for _, i := range interfaces(c) {
				for _, addr := range i.Addresses {
					if i.Network == n.Name && p.Contains(addr) {
						used[p]++
					}
				}
			}
		}
	}
}

// interfaces of a container; one that was written by someone else than the service has addresses alone.
func interfaces(c metadata.Container) []metadata.ContainerInterface {
	if len(c.Interfaces) == 0 {
		return []metadata.ContainerInterface{{Network: c.Network, Addresses: c.Addresses}}
	}
	return c.Interfaces
}

// localChecks are the checks that need no look at the kernel or at other hosts.
var localChecks = []string{"metadata", "store", "entries", "manager", "hosts", "duplicates", "networks", "addresses",
	"ipsec", "secret"}

func newStatus(f *doctor.Facts, used map[netip.Prefix]int64) *statusReport {
	r := &statusReport{Self: f.Self, Store: "unknown", Manager: "unknown", Problems: doctor.Check(f,
		localChecks...).Findings, Hosts: []hostRow{}, Networks: []networkRow{}}
	if st := f.Metadata.Store; st != nil {
		r.Store = "healthy"
		if st.Reason != "" {
			r.Store = st.Reason
		}
	}
	if m := f.Manager; m != nil {
		r.Manager = "running"
		if m.Err != nil {
			r.Manager = m.Err.Error()
		}
		if m.Tunnels != nil && len(m.Tunnels.Networks) > 0 {
			r.Tunnels = m.Tunnels
		}
	}
	s := f.Metadata.Snapshot
	if s == nil {
		return r
	}
	r.Revision = s.Revision
	// One look at each block: hosts × networks × blocks would be billions.
	type subnet struct {
		network string
		prefix  netip.Prefix
	}
	subnets := map[string][]netip.Prefix{}
	for _, n := range s.Networks {
		subnets[n.Name] = n.Subnets
	}
	usage := map[subnet]metadata.SubnetUsage{}
	for _, st := range f.Metadata.Status {
		for _, u := range st.Usage {
			usage[subnet{st.Network, u.Subnet}] = u
		}
	}
	blocks, containers := map[string]int{}, map[string]int{}
	inSubnet := map[subnet]int64{}
	gateways := s.AllGateways()
	members := map[string]map[string]bool{}
	for _, b := range s.Blocks {
		blocks[b.Host]++
		if members[b.Network] == nil {
			members[b.Network] = map[string]bool{}
		}
		members[b.Network][b.Host] = true
		for _, p := range subnets[b.Network] {
			if p.Contains(b.CIDR.Addr()) {
				inSubnet[subnet{b.Network, p}]++
			}
		}
	}
	for _, c := range s.Containers {
		containers[c.Host]++
	}
	for _, h := range s.Hosts {
		row := hostRow{Name: h.Name, Self: h.Name == s.Self, Live: h.Live, Underlay: h.Underlay, BootID: h.BootID,
			MachineID:    h.MachineID,
			AgentVersion: h.AgentVersion, Blocks: blocks[h.Name], Containers: containers[h.Name],
			Gateways: map[string][]netip.Addr{}, Joined: h.Joined}
		for network, g := range gateways[h.Name] {
			row.Gateways[network] = g
		}
		r.Hosts = append(r.Hosts, row)
	}
	slices.SortFunc(r.Hosts, func(a, b hostRow) int { return graph.CompareNames(a.Name, b.Name) })
	me, _ := s.Host(s.Self)
	for _, n := range s.Networks {
		row := networkRow{Name: n.Name, Encapsulation: n.Encapsulation, VNI: n.VNI, MTU: mtu.Container(n, me),
			MTUFixed: n.MTU != 0, Default: n.IsDefault, Hosts: len(members[n.Name])}
		for _, p := range n.Subnets {
			sub := subnetRow{Subnet: p, Used: used[p], Blocks: inSubnet[subnet{n.Name, p}], Free: -1, BlocksFree: -1}
			if u, ok := usage[subnet{n.Name, p}]; ok {
				sub.Free, sub.BlocksFree = int64(u.Free), int64(u.BlocksFree)
			}
			row.Subnets = append(row.Subnets, sub)
		}
		r.Networks = append(r.Networks, row)
	}
	return r
}

func (r *statusReport) write(w *writer) {
	if !w.plain {
		r.head(w)
		r.problems(w)
	}
	if len(r.Hosts) > 0 {
		if !w.plain {
			w.line("\n%s", w.paint(bold, "HOSTS"))
		}
		r.hosts(w)
	}
	if len(r.Networks) > 0 {
		w.line("")
		if !w.plain {
			w.line("%s", w.paint(bold, "NETWORKS"))
		}
		r.networks(w)
	} else if len(r.Hosts) > 0 && !w.plain {
		w.line("\nNo network yet. Make one: lariat network create overlay --subnet 10.42.0.0/16")
	}
}

func (r *statusReport) head(w *writer) {
	if len(r.Hosts) == 0 {
		return // the problems say it
	}
	live, containers := 0, 0
	for _, h := range r.Hosts {
		if h.Live {
			live++
		}
		containers += h.Containers
	}
	hosts := markup(count(len(r.Hosts), "host"))
	switch {
	case live < len(r.Hosts):
		hosts += w.paint(bad, fmt.Sprintf(" (%d live)", live))
	case live > 1:
		hosts += w.paint(good, " (all live)")
	}
	w.line("%s  %s, %s, %s", w.paint(bold, "CLUSTER"), hosts, count(len(r.Networks), "network"),
		count(containers, "container"))
	w.line("%s    %s, revision %d", w.paint(bold, "STORE"), w.paint(health(r.Store, "healthy"), r.Store), r.Revision)
	self := "a file"
	if r.took > 0 {
		self = fmt.Sprintf("%s over %s in %s", r.Self, r.socket, r.took.Round(100*time.Microsecond))
	}
	w.line("%s    %s", w.paint(bold, "ASKED"), self)
	if r.Manager != "unknown" {
		w.line("%s  %s on this host", w.paint(bold, "MANAGER"), w.paint(health(r.Manager, "running"),
			map[bool]string{true: "running", false: "not running"}[r.Manager == "running"]))
	}
	if r.Tunnels != nil {
		r.tunnels(w)
	}
}

// tunnels counts this host's tunnels. What is wrong with them stands among the problems.
func (r *statusReport) tunnels(w *writer) {
	t := r.Tunnels
	if t.Missing != "" || t.Problem != "" {
		w.line("%s  %s", w.paint(bold, "TUNNELS"), w.paint(bad, "not kept on this host"))
		return
	}
	n := map[string]int{}
	var failed []string
	for _, x := range sortedTunnels(t) {
		n[x.State]++
		if x.LastError != "" {
			failed = append(failed, x.Peer)
		}
	}
	words := sprintf("%d of %d established", n[ipsec.StateEstablished], len(t.Tunnels))
	for _, state := range []string{ipsec.StateIdle, ipsec.StateConnecting, ipsec.StateDown} {
		if n[state] > 0 {
			words += sprintf(", %d %s", n[state], state)
		}
	}
	if len(failed) > 0 {
		words += "; " + w.paint(bad, "with an error: "+strings.Join(failed, " "))
	}
	w.line("%s  %s; more: lariat ipsec status", w.paint(bold, "TUNNELS"), words)
}

func health(s, fine string) style {
	switch s {
	case fine:
		return good
	case "unknown":
		return dim
	}
	return bad
}

func (r *statusReport) problems(w *writer) {
	if len(r.Problems) == 0 {
		return
	}
	if len(r.Hosts) > 0 {
		w.line("")
	}
	w.line("%s", w.paint(bold, "PROBLEMS"))
	findings(w, r.Problems)
}

// findings writes what is wrong and what helps.
func findings(w *writer, list []doctor.Finding) {
	for _, f := range list {
		s := uneasy
		if f.Severity == doctor.Error {
			s = bad
		}
		w.line("%s  %s", w.paint(s, fmt.Sprintf("%-7s", f.Severity)), printable.Joined(f.What))
		w.line("         %s", w.paint(dim, "remedy: "+printable.Joined(f.Remedy)))
	}
}

func (r *statusReport) hosts(w *writer) {
	head := []string{"NAME", "LIVE", "UNDERLAY", "BOOT", "BLOCKS", "CONTAINERS"}
	var networks []string
	for _, n := range r.Networks {
		if slices.ContainsFunc(r.Hosts, func(h hostRow) bool { return len(h.Gateways[n.Name]) > 0 }) {
			networks = append(networks, n.Name)
		}
	}
	each := len(networks) <= 3 // a column for each network, as long as lines stay readable
	if each {
		for _, n := range networks {
			head = append(head, "GATEWAY:"+n)
		}
	} else {
		head = append(head, "GATEWAYS")
	}
	var rows [][]cell
	for _, h := range r.Hosts {
		name := txt(h.Name)
		if h.Self {
			name.text += "*"
		}
		live := styled(good, "yes")
		if !h.Live {
			live = styled(bad, "no")
		}
		var under []string
		for _, u := range h.Underlay {
			under = append(under, u.Address.Addr().String())
		}
		row := []cell{name, live, txt(strings.Join(under, ",")), styled(dim, short(h.BootID)), num(h.Blocks),
			num(h.Containers)}
		if each {
			for _, n := range networks {
				row = append(row, txt(joined(h.Gateways[n], ",")))
			}
		} else {
			var all []string
			for _, n := range networks {
				if g := h.Gateways[n]; len(g) > 0 {
					all = append(all, n+"="+joined(g, ","))
				}
			}
			row = append(row, txt(strings.Join(all, " ")))
		}
		rows = append(rows, row)
	}
	w.columns(head, rows)
}

// short is as much of an id as tells one from another.
func short(id string) string {
	if len(id) > 8 {
		return id[:8]
	}
	return id
}

func (r *statusReport) networks(w *writer) {
	head := []string{"NAME", "SUBNET", "ENCAP", "VNI", "MTU", "HOSTS", "USED", "FREE", "BLOCKS"}
	var rows [][]cell
	for _, n := range r.Networks {
		for _, s := range n.Subnets {
			name, vni := n.Name, ""
			if n.Default && !w.plain {
				name += " (default)"
			}
			if n.VNI != 0 {
				vni = fmt.Sprint(n.VNI)
			}
			free, blocks := txt("?"), amount(s.Blocks)
			free.right = true
			if s.Free >= 0 {
				free = num(s.Free)
				if total := s.Used + s.Free; total > 0 && float64(s.Used)/float64(total) >= 0.9 {
					free.style = bad
				}
			}
			if s.BlocksFree >= 0 {
				blocks += "/" + amount(s.Blocks+s.BlocksFree)
			}
			rows = append(rows, []cell{txt(name), txt(s.Subnet.String()), txt(n.Encapsulation), {text: vni, right: true},
				num(n.MTU), num(n.Hosts), num(s.Used), free, {text: blocks, right: true}})
		}
	}
	w.columns(head, rows)
}
