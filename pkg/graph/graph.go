// Package graph draws a cluster: hosts, what runs on them, and how they reach each other, as SVG and as DOT.
//
// Hosts stand in the frame of the link (the physical subnet) that their underlay address is on, for that is
// what decides between a tunnel and a plain route. Each network is a rail that its hosts hang on: dashed
// where packets travel in tunnels, solid where they travel plain. A rail stands for a full mesh, which at
// thirty hosts would be 435 lines.
//
// Pure: the same snapshot gives the same bytes. No program is run and nothing is fetched, neither here nor by
// who looks.
package graph

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/lariat-net/lariat/pkg/ipsec"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// Options of a picture. The zero value suits most.
type Options struct {
	// Containers that are named on each host; the rest is a number. 0 chooses by the number of hosts; below 0 names none.
	Containers int

	// Tunnels is how the tunnels of encrypted networks fare on the host whose snapshot it is; nil: not known.
	Tunnels *ipsec.Report
}

// picture is the snapshot in drawing order.
type picture struct {
	self       string // the host that knows of its tunnels
	revision   int64
	networks   []network
	links      []link
	hosts      int
	containers int
	fold       int
	noted      []string // what is in the model and cannot be drawn
}

type network struct {
	metadata.Network
	index int
}

// link is a physical subnet and the hosts on it.
type link struct {
	prefix netip.Prefix // invalid: hosts without an underlay address
	hosts  []host
}

type host struct {
	metadata.Host
	parts []part // in the order of networks
	other []metadata.Container
	count int
}

// part is a host's share of one network.
type part struct {
	net        *network
	gateways   []netip.Addr
	blocks     []netip.Prefix
	borrowed   []netip.Addr
	containers []metadata.Container
	tunnel     *tunnel
}

// tunnel is what the host whose snapshot it is knows of its tunnel for one network to another one.
type tunnel struct {
	state, suite, err string
}

func (t *tunnel) bad() bool { return t.err != "" || t.state == ipsec.StateDown }

// short is the state, and the suite or that there is an error.
func (t *tunnel) short() string {
	switch {
	case t.err != "":
		return t.state + ", with an error"
	case t.suite != "":
		return t.state + ", " + t.suite
	}
	return t.state
}

func build(s *metadata.Snapshot, o Options) *picture {
	p := &picture{self: s.Self, revision: s.Revision, hosts: len(s.Hosts), containers: len(s.Containers),
		fold: o.Containers}
	switch {
	case p.fold < 0:
		p.fold = 0
	case p.fold > 0:
	case p.hosts <= 4:
		p.fold = 12
	case p.hosts <= 12:
		p.fold = 6
	case p.hosts <= 40:
		p.fold = 3
	}
	nets := slices.Clone(s.Networks)
	slices.SortFunc(nets, func(a, b metadata.Network) int { return CompareNames(a.Name, b.Name) })
	p.networks = make([]network, len(nets))
	byName := map[string]*network{}
	for i, n := range nets {
		p.networks[i] = network{Network: n, index: i}
		byName[n.Name] = &p.networks[i]
	}
	hosts := map[string]*host{}
	parts := map[[2]string]*part{}
	gateways := s.AllGateways()
	share := func(hostName, netName string) *part {
		key := [2]string{hostName, netName}
		if parts[key] == nil && hosts[hostName] != nil && byName[netName] != nil {
			parts[key] = &part{net: byName[netName], gateways: gateways[hostName][netName]}
		}
		return parts[key]
	}
	for _, h := range s.Hosts {
		hosts[h.Name] = &host{Host: h}
	}
	for _, problem := range s.Problems {
		p.note("%s", problem)
	}
	for _, b := range s.Blocks {
		if pt := share(b.Host, b.Network); pt != nil {
			pt.blocks = append(pt.blocks, b.CIDR)
		} else {
			p.note("block %s of network %s belongs to host %s: one of them is not in the metadata", b.CIDR, b.Network, b.Host)
		}
	}
	for _, e := range s.HostRoutes {
		if pt := share(e.Host, e.Network); pt != nil {
			pt.borrowed = append(pt.borrowed, e.Address)
		}
	}
	for _, c := range s.Containers {
		h := hosts[c.Host]
		if h == nil {
			p.note("container %s is on host %s, which is not in the metadata", title(c), c.Host)
			continue
		}
		h.count++
		for _, c := range onNetworks(c) {
			if pt := share(c.Host, c.Network); pt != nil {
				pt.containers = append(pt.containers, c)
			} else {
				h.other = append(h.other, c)
			}
		}
	}
	if o.Tunnels != nil {
		for _, t := range o.Tunnels.Tunnels {
			for _, c := range t.Children {
				if pt := parts[[2]string{t.Peer, c.Network}]; pt != nil && t.Peer != s.Self {
					pt.tunnel = &tunnel{c.State, c.Suite, t.LastError}
				}
			}
		}
	}
	links := map[netip.Prefix]*link{}
	var order []netip.Prefix
	for _, name := range sortedNames(s.Hosts) {
		h := hosts[name]
		for i := range p.networks {
			if pt := parts[[2]string{name, p.networks[i].Name}]; pt != nil {
				slices.SortFunc(pt.blocks, comparePrefix)
				slices.SortFunc(pt.borrowed, netip.Addr.Compare)
				slices.SortFunc(pt.containers, compareContainers)
				h.parts = append(h.parts, *pt)
			}
		}
		slices.SortFunc(h.other, compareContainers)
		var on netip.Prefix
		if len(h.Underlay) > 0 {
			on = h.Underlay[0].Address.Masked()
		}
		if links[on] == nil {
			links[on] = &link{prefix: on}
			order = append(order, on)
		}
		links[on].hosts = append(links[on].hosts, *h)
	}
	slices.SortFunc(order, comparePrefix)
	for _, on := range order {
		p.links = append(p.links, *links[on])
	}
	slices.Sort(p.noted)
	return p
}

func (p *picture) note(format string, a ...any) { p.noted = append(p.noted, fmt.Sprintf(format, a...)) }

// onNetworks is the container once for each network that it is on, with its addresses there.
func onNetworks(c metadata.Container) []metadata.Container {
	if len(c.Interfaces) == 0 {
		return []metadata.Container{c}
	}
	var out []metadata.Container
	for _, i := range c.Interfaces {
		if k := slices.IndexFunc(out, func(o metadata.Container) bool { return o.Network == i.Network }); k >= 0 {
			out[k].Addresses = append(out[k].Addresses, i.Addresses...)
			continue
		}
		c.Network, c.Addresses = i.Network, slices.Clone(i.Addresses)
		out = append(out, c)
	}
	return out
}

// way says how the packets of a network travel between two hosts of the same link, or of different ones.
func (n *network) way(sameLink bool) string {
	switch {
	case n.Encapsulation == metadata.EncapNone:
		return "flat"
	case n.encrypted():
		return "tunnel"
	case sameLink && n.DirectRouting:
		return "direct"
	}
	return "tunnel"
}

func (n *network) encrypted() bool { return n.Encapsulation == metadata.EncapIPsec }

func (n *network) kind() string {
	switch n.Encapsulation {
	case metadata.EncapVXLAN:
		return fmt.Sprintf("VXLAN %d", n.VNI)
	case metadata.EncapIPsec:
		return "IPsec"
	case metadata.EncapNone:
		return "flat, no tunnel"
	}
	return n.Encapsulation
}

// reached says who else may reach the network's containers.
func (n *network) reached() string {
	if len(n.AllowFrom) == 0 {
		return "isolated"
	}
	return "open to " + strings.Join(n.AllowFrom, ", ")
}

func (n *network) subnets() string { return joined(n.Subnets, ", ") }

// title is a container's name for people.
func title(c metadata.Container) string {
	return cmp.Or(c.Name, metadata.ShortID(c.ID))
}

func joined[T fmt.Stringer](list []T, sep string) string {
	out := make([]string, len(list))
	for i, v := range list {
		out[i] = v.String()
	}
	return strings.Join(out, sep)
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func sortedNames(hosts []metadata.Host) []string {
	out := make([]string, 0, len(hosts))
	for _, h := range hosts {
		out = append(out, h.Name)
	}
	slices.SortFunc(out, CompareNames)
	return slices.Compact(out)
}

func comparePrefix(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), a.Bits()-b.Bits())
}

func compareContainers(a, b metadata.Container) int {
	return cmp.Or(CompareNames(title(a), title(b)), cmp.Compare(a.ID, b.ID))
}

// CompareNames orders names as people do: h2 before h10.
func CompareNames(a, b string) int {
	x, y := a, b
	for x != "" && y != "" {
		nx, ny := digits(x), digits(y)
		if nx > 0 && ny > 0 {
			dx, dy := strings.TrimLeft(x[:nx], "0"), strings.TrimLeft(y[:ny], "0")
			if c := cmp.Or(cmp.Compare(len(dx), len(dy)), cmp.Compare(dx, dy)); c != 0 {
				return c
			}
			x, y = x[nx:], y[ny:]
			continue
		}
		if x[0] != y[0] {
			return cmp.Compare(x[0], y[0])
		}
		x, y = x[1:], y[1:]
	}
	return cmp.Or(cmp.Compare(len(x), len(y)), cmp.Compare(a, b))
}

func digits(s string) int {
	i := 0
	for i < len(s) && s[i] >= '0' && s[i] <= '9' {
		i++
	}
	return i
}
