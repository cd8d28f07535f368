package graph

import (
	"fmt"
	"strings"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/printable"
)

// meshLimit is the number of hosts up to which DOT draws each pair of hosts; beyond it, each network is a
// node of its own.
const meshLimit = 8

// DOT writes the snapshot in the language of graphviz, for who wants to draw it differently:
//
//	lariat graph --format dot | dot -Tpng > cluster.png
func DOT(s *metadata.Snapshot, o Options) string {
	p := build(s, o)
	var b strings.Builder
	f := func(format string, a ...any) { fmt.Fprintf(&b, format+"\n", a...) }
	f("graph lariat {")
	f("  label=%s; labelloc=t; fontname=\"Helvetica\"; fontsize=18;",
		quote(fmt.Sprintf("%s, %s, %s", plural(p.hosts, "host"), plural(len(p.networks), "network"),
			plural(p.containers, "container"))))
	f("  node [shape=plain, fontname=\"Helvetica\", fontsize=11];")
	f("  edge [fontname=\"Helvetica\", fontsize=10];")
	for i, l := range p.links {
		f("  subgraph cluster_%d {", i)
		name := "physical link " + l.prefix.String()
		if !l.prefix.IsValid() {
			name = "no underlay address"
		}
		f("    label=%s; fontsize=12; color=\"#d4dbe1\"; style=rounded;", quote(name))
		for j := range l.hosts {
			h := &l.hosts[j]
			f("    %s [label=<%s>];", quote("host "+h.Name), table(p, h))
		}
		f("  }")
	}
	var all []*host
	at := map[*host]int{}
	for i := range p.links {
		for j := range p.links[i].hosts {
			h := &p.links[i].hosts[j]
			all = append(all, h)
			at[h] = i
		}
	}
	for i := range p.networks {
		n := &p.networks[i]
		var members []*host
		for _, h := range all {
			if h.part(n) != nil {
				members = append(members, h)
			}
		}
		if len(members) > meshLimit {
			f("  %s [shape=ellipse, color=%s, label=%s];", quote("network "+n.Name), quote(n.colour()),
				quote(n.Name, n.subnets(), n.kind()+", each host to each", n.reached()))
			for _, h := range members {
				more := ""
				if t := h.part(n).tunnel; t != nil {
					more = fmt.Sprintf(", label=%s, fontcolor=%s", quote(t.short()), quote(tunnelColour(n, t)))
				}
				f("  %s -- %s [color=%s, style=%s%s];", quote("network "+n.Name), quote("host "+h.Name), quote(n.colour()),
					style(n.way(true)), more)
			}
			continue
		}
		for j, h := range members {
			for _, peer := range members[j+1:] {
				way := n.way(at[h] == at[peer])
				if way == "flat" && at[h] != at[peer] {
					continue
				}
				label := []string{n.Name + " " + way}
				if way == "tunnel" {
					label[0] = n.Name + " " + n.kind()
				}
				colour := n.colour()
				// What is known of a tunnel stands with the peer of the host that knows it.
				for from, to := range map[*host]*host{h: peer, peer: h} {
					if t := to.part(n).tunnel; from.Name == p.self && t != nil {
						label = append(label, t.short())
						colour = tunnelColour(n, t)
					}
				}
				f("  %s -- %s [color=%s, fontcolor=%s, style=%s, label=%s];", quote("host "+h.Name), quote("host "+peer.Name),
					quote(n.colour()), quote(colour), style(way), quote(label...))
			}
		}
	}
	for _, n := range p.noted {
		f("  // not drawn: %s", printable.Line(n))
	}
	f("}")
	return b.String()
}

const alarm = "#b3261e"

func tunnelColour(n *network, t *tunnel) string {
	if t != nil && t.bad() {
		return alarm
	}
	return n.colour()
}

func style(way string) string {
	return map[string]string{"tunnel": "dashed", "direct": "solid", "flat": "dotted"}[way]
}

// table is a host as graphviz draws it: a table with a section for each network.
func table(p *picture, h *host) string {
	d := &drawing{p: p}
	var b strings.Builder
	head, state := "#e8eef3", "live"
	if !h.Live {
		head, state = "#f8eae8", "does not answer"
	}
	under := "no underlay address"
	if len(h.Underlay) > 0 {
		under = h.Underlay[0].Address.Addr().String()
	}
	fmt.Fprintf(&b, `<table border="1" cellborder="0" cellspacing="0" cellpadding="4" color="#9fb0be">`)
	fmt.Fprintf(&b, `<tr><td bgcolor="%s" align="left"><b>%s</b></td><td bgcolor="%s" align="right">%s, %s</td></tr>`,
		head, escape(h.Name), head, escape(under), state)
	for i := range h.parts {
		pt := &h.parts[i]
		gateway := ""
		if len(pt.gateways) > 0 {
			gateway = "gateway " + joined(pt.gateways, " ")
		}
		fmt.Fprintf(&b, `<tr><td align="left"><font color="%s"><b>%s</b></font></td><td align="right">%s</td></tr>`,
			pt.net.colour(), escape(pt.net.Name), orSpace(escape(gateway)))
		for _, l := range blockLines(pt) {
			fmt.Fprintf(&b, `<tr><td align="left"><font color="#768592">block</font></td><td align="right"><font color="#768592">%s</font></td></tr>`, escape(l))
		}
		rows(&b, d, pt.containers)
	}
	rows(&b, d, h.other)
	b.WriteString(`</table>`)
	return b.String()
}

func rows(b *strings.Builder, d *drawing, list []metadata.Container) {
	named, more := d.shown(list)
	for _, c := range named {
		fmt.Fprintf(b, `<tr><td align="left">%s</td><td align="right">%s</td></tr>`, escape(title(c)),
			orSpace(escape(joined(c.Addresses, " "))))
	}
	if more > 0 {
		fmt.Fprintf(b, `<tr><td align="left" colspan="2">and %s more</td></tr>`, plural(more, "container"))
	}
}

// orSpace: graphviz refuses an empty cell in some versions.
func orSpace(s string) string {
	if s == "" {
		return " "
	}
	return s
}

// quote writes lines of text as one string of DOT.
func quote(lines ...string) string {
	out := make([]string, len(lines))
	for i, l := range lines {
		out[i] = strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(printable.Line(l))
	}
	return `"` + strings.Join(out, `\n`) + `"`
}
