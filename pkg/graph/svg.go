package graph

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/printable"
)

// Measures of the drawing, in pixels.
const (
	margin    = 28
	headTop   = 66 // title and counts
	chipH     = 30 // a network in the legend
	gap       = 22 // between cards
	cardW     = 292
	cardHead  = 58
	line      = 18
	partHead  = 26
	pad       = 12
	railGap   = 17 // between the rails of networks
	railTop   = 34 // from a row's top to its first rail, where the label of the rails stands
	trunkStep = 14
	frameHead = 34
	framePad  = 18
)

// palette holds colours that people with any colour vision tell apart (after Okabe and Ito), dark enough for text.
var palette = []string{"#0b6cb0", "#c2540a", "#0a7f5c", "#a3408a", "#8a6d00", "#4553b8", "#b3344a", "#3d7a8c"}

func (n *network) colour() string { return palette[n.index%len(palette)] }

// dashes of a line by how packets travel along it.
var dashes = map[string]string{"tunnel": ` stroke-dasharray="7 4"`, "direct": "",
	"flat": ` stroke-dasharray="1 4" stroke-linecap="round"`}

// SVG draws the snapshot. The text is complete in itself: no script, no font, no link to elsewhere.
func SVG(s *metadata.Snapshot, o Options) string {
	d := &drawing{p: build(s, o)}
	d.layout()
	return d.render()
}

type drawing struct {
	p       *picture
	columns int
	trunk   int // width at the left, for the lines that join the rows of a network
	width   int
	b       strings.Builder
	ends    []trunkEnd // where rails meet the trunk, from top to bottom
}

type trunkEnd struct {
	net   *network
	y     int
	frame int
}

func (d *drawing) layout() {
	most, rows := 1, 0
	for _, l := range d.p.links {
		most = max(most, len(l.hosts))
	}
	switch {
	case most <= 4:
		d.columns = most
	case most <= 12:
		d.columns = 4
	case most <= 40:
		d.columns = 6
	default:
		d.columns = 8
	}
	for _, l := range d.p.links {
		rows += (len(l.hosts) + d.columns - 1) / d.columns
	}
	if rows > 1 {
		d.trunk = 14 + trunkStep*len(d.p.networks)
	}
	d.width = max(2*margin+2*framePad+d.trunk+d.columns*cardW+(d.columns-1)*gap, 640)
}

func (d *drawing) f(format string, a ...any) { fmt.Fprintf(&d.b, format+"\n", a...) }

// text writes one run of text; class chooses the font.
func (d *drawing) text(x, y int, class, fill, s string) {
	if fill != "" {
		fill = ` fill="` + fill + `"`
	}
	d.f(`<text x="%d" y="%d" class="%s"%s>%s</text>`, x, y, class, fill, escape(s))
}

func (d *drawing) render() string {
	y := d.legend()
	for i, l := range d.p.links {
		y = d.frame(i, l, y)
	}
	if len(d.p.links) == 0 {
		d.text(margin, y+24, "note", "", "No host yet. Start lariat-metadata on one.")
		y += 48
	}
	d.drawTrunk()
	y = d.key(y)
	for i, n := range d.p.noted {
		if i == 5 {
			d.text(margin, y+14, "warn", "", fmt.Sprintf("… and %d more", len(d.p.noted)-i))
			y += line
			break
		}
		d.text(margin, y+14, "warn", "", "Not drawn: "+n)
		y += line
	}
	height := y + margin - 8
	body := d.b.String()
	d.b.Reset()
	d.f(`<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" role="img" font-family="Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif">`, d.width, height, d.width, height)
	d.f(`<title>%s</title>`, escape(d.summary()))
	d.f(`<style>
.title { font-size: 22px; font-weight: bold; fill: #1b2733 }
.sub { font-size: 13px; fill: #5b6b7a }
.name { font-size: 16px; font-weight: bold; fill: #1b2733 }
.chip { font-size: 13px; font-weight: bold }
.item { font-size: 12.5px; fill: #2b3947 }
.addr { font: 12px 'DejaVu Sans Mono', Menlo, Consolas, monospace; fill: #33424f }
.end { text-anchor: end }
.dim { fill: #768592 }
.note { font-size: 12.5px; fill: #5b6b7a }
.warn { font-size: 12.5px; fill: #b3261e }
.rail { font-size: 12px; font-weight: bold }
</style>`)
	d.f(`<rect width="100%%" height="100%%" fill="#ffffff"/>`)
	d.b.WriteString(body)
	d.f(`</svg>`)
	return d.b.String()
}

func (d *drawing) summary() string {
	return fmt.Sprintf("%s, %s, %s", plural(d.p.hosts, "host"), plural(len(d.p.networks), "network"),
		plural(d.p.containers, "container"))
}

// legend draws the title and one line for each network, and returns where the rest begins.
func (d *drawing) legend() int {
	d.text(margin, 42, "title", "", d.summary())
	d.f(`<text x="%d" y="42" class="sub end">lariat, revision %d</text>`, d.width-margin, d.p.revision)
	y := headTop
	for i := range d.p.networks {
		n := &d.p.networks[i]
		d.f(`<rect x="%d" y="%d" width="14" height="14" rx="3" fill="%s"/>`, margin, y, n.colour())
		facts := []string{n.subnets(), n.kind()}
		if n.Encapsulation == metadata.EncapVXLAN {
			facts = append(facts, fmt.Sprintf("UDP %d", n.UDPPort()))
		}
		if n.MTU != 0 {
			facts = append(facts, fmt.Sprintf("MTU %d", n.MTU))
		}
		if n.HostNAT && n.Encapsulation != metadata.EncapNone {
			facts = append(facts, "host NAT")
		}
		if n.Encapsulation != metadata.EncapNone {
			facts = append(facts, n.reached())
		}
		if n.DirectRouting && n.Encapsulation != metadata.EncapNone {
			facts = append(facts, "direct on one link")
		}
		d.f(`<text x="%d" y="%d" class="sub"><tspan class="chip" fill="%s">%s</tspan>  %s</text>`, margin+22, y+12,
			n.colour(), escape(n.Name), escape(strings.Join(facts, "  ·  ")))
		y += chipH - 6
	}
	if len(d.p.networks) == 0 {
		d.text(margin, y+12, "sub", "", "No network yet. Make one: lariat network create NAME --subnet PREFIX")
		y += chipH - 6
	}
	return y + 10
}

// frame draws the hosts of one link.
func (d *drawing) frame(index int, l link, y int) int {
	var body []func(y int)
	height := frameHead
	for start := 0; start < len(l.hosts); start += d.columns {
		row := l.hosts[start:min(start+d.columns, len(l.hosts))]
		nets := d.rowNetworks(row)
		if d.p.hosts < 2 {
			nets = nil // no one to connect to
		}
		rails := railTop + railGap*max(len(nets)-1, 0) + 20
		if len(nets) == 0 {
			rails = 8
		}
		cards := 0
		for _, h := range row {
			cards = max(cards, d.cardHeight(h))
		}
		top := height
		first := start == 0
		body = append(body, func(y int) { d.row(index, row, nets, y+top, rails, cards, first, len(l.hosts) > 1) })
		height += rails + cards + gap
	}
	d.f(`<rect x="%d" y="%d" width="%d" height="%d" rx="10" fill="#f5f7f9" stroke="#d4dbe1"/>`, margin, y,
		d.width-2*margin, height)
	what := "physical link " + l.prefix.String()
	if !l.prefix.IsValid() {
		what = "no underlay address: not reachable by any network"
	}
	d.text(margin+framePad+d.trunk, y+23, "sub", "", what)
	for _, draw := range body {
		draw(y)
	}
	return y + height + gap
}

// rowNetworks are the networks that a row of hosts takes part in, in order.
func (d *drawing) rowNetworks(row []host) []*network {
	var out []*network
	for i := range d.p.networks {
		n := &d.p.networks[i]
		for _, h := range row {
			if h.part(n) != nil {
				out = append(out, n)
				break
			}
		}
	}
	return out
}

func (h *host) part(n *network) *part {
	for i := range h.parts {
		if h.parts[i].net == n {
			return &h.parts[i]
		}
	}
	return nil
}

// row draws rails, the hosts below them, and what ties one to the other.
func (d *drawing) row(frame int, row []host, nets []*network, y, rails, cards int, label, company bool) {
	left := margin + framePad + d.trunk
	cardY := y + rails
	for i, n := range nets {
		railY := y + railTop + railGap*i
		first, last := -1, -1
		for j := range row {
			if row[j].part(n) == nil {
				continue
			}
			x := left + j*(cardW+gap) + d.tap(n)
			if first < 0 {
				first = x
			}
			last = x
		}
		start := first
		if d.trunk > 0 {
			start = d.trunkX(n)
			d.ends = append(d.ends, trunkEnd{net: n, y: railY, frame: frame})
		}
		dash := dashes[n.way(company)]
		d.f(`<path d="M%d %dH%d" stroke="%s" stroke-width="3" fill="none"%s/>`, start, railY, max(last, start), n.colour(),
			dash)
		for j := range row {
			if row[j].part(n) == nil {
				continue
			}
			x := left + j*(cardW+gap) + d.tap(n)
			opacity := ""
			if !row[j].Live {
				opacity = ` opacity="0.45"`
			}
			d.f(`<path d="M%d %dV%d" stroke="%s" stroke-width="2.5"%s/>`, x, railY, cardY, n.colour(), opacity)
			if n.encrypted() {
				d.lock(x, railY, tunnelColour(n, row[j].part(n).tunnel), opacity)
				continue
			}
			d.f(`<circle cx="%d" cy="%d" r="4.5" fill="%s"%s/>`, x, railY, n.colour(), opacity)
		}
	}
	if label && len(nets) > 0 {
		d.railLabel(left, y+railTop-14, nets, company)
	}
	for j := range row {
		d.card(left+j*(cardW+gap), cardY, cards, &row[j])
	}
}

// lock is a padlock in the place of the dot where a host hangs on a rail.
func (d *drawing) lock(x, y int, colour, opacity string) {
	d.f(`<g%s><path d="M%d %dv-2.5a3.2 3.2 0 0 1 6.4 0v2.5" stroke="%s" stroke-width="1.8" fill="#f5f7f9" transform="translate(-0.2 0)"/><rect x="%d" y="%d" width="12" height="9" rx="1.8" fill="%s"/></g>`, opacity, x-3, y-3, colour, x-6, y-3, colour)
}

// railLabel says once for a frame what the rails are. A host that is alone on its link has company only elsewhere.
func (d *drawing) railLabel(x, y int, nets []*network, company bool) {
	d.f(`<text x="%d" y="%d" class="rail">`, x, y)
	for i, n := range nets {
		sep := ""
		if i > 0 {
			sep = "   "
		}
		what := map[string]string{"tunnel": n.kind() + " tunnels", "direct": "plain routes",
			"flat": "the link itself"}[n.way(company)]
		d.f(`<tspan xml:space="preserve" fill="%s">%s%s: %s</tspan>`, n.colour(), sep, escape(n.Name), escape(what))
	}
	d.f(`</text>`)
}

// tap is where on a card a network's line ends.
func (d *drawing) tap(n *network) int { return min(26+18*n.index, cardW-20) }

func (d *drawing) trunkX(n *network) int { return margin + framePad + 4 + trunkStep*n.index }

// drawTrunk joins the rails of each network from row to row: as within a link inside of a frame, as between
// links across.
func (d *drawing) drawTrunk() {
	for i := range d.p.networks {
		n := &d.p.networks[i]
		var last *trunkEnd
		for k := range d.ends {
			e := &d.ends[k]
			if e.net != n {
				continue
			}
			if last != nil {
				way := n.way(last.frame == e.frame)
				if way != "flat" || last.frame == e.frame {
					d.f(`<path d="M%d %dV%d" stroke="%s" stroke-width="3" fill="none"%s/>`, d.trunkX(n), last.y, e.y, n.colour(),
						dashes[way])
				}
			}
			last = e
		}
	}
}

// rows of a part: at most fold containers, then how many more there are. One more is named rather than counted.
func (d *drawing) shown(list []metadata.Container) (named []metadata.Container, more int) {
	if len(list) <= d.p.fold+1 && d.p.fold > 0 {
		return list, 0
	}
	return list[:min(d.p.fold, len(list))], len(list) - min(d.p.fold, len(list))
}

func (d *drawing) listHeight(list []metadata.Container) int {
	named, more := d.shown(list)
	h := 0
	for _, c := range named {
		h += line * max(1, len(c.Addresses))
	}
	if more > 0 {
		h += line
	}
	return h
}

func (d *drawing) cardHeight(h host) int {
	height := cardHead
	for i := range h.parts {
		height += partHead + line*(len(blockLines(&h.parts[i]))+h.parts[i].tunnelLines()) +
			d.listHeight(h.parts[i].containers) + 8
	}
	if len(h.other) > 0 {
		height += partHead + d.listHeight(h.other) + 8
	}
	if len(h.parts)+len(h.other) == 0 {
		height += line + 8
	}
	return height + pad - 4
}

func (p *part) tunnelLines() int {
	if p.tunnel != nil {
		return 1
	}
	return 0
}

// blockLines are what a part says of its addresses: at most two blocks, then a number.
func blockLines(p *part) []string {
	var out []string
	for i, b := range p.blocks {
		if i == 2 && len(p.blocks) > 3 {
			out = append(out, fmt.Sprintf("and %d more blocks", len(p.blocks)-2))
			break
		}
		out = append(out, b.String())
	}
	if len(p.borrowed) > 2 {
		return append(out, fmt.Sprintf("%d borrowed addresses", len(p.borrowed)))
	}
	for _, a := range p.borrowed {
		out = append(out, a.String()+" borrowed")
	}
	return out
}

func (d *drawing) card(x, y, height int, h *host) {
	border, head := "#9fb0be", "#e8eef3"
	if !h.Live {
		border, head = "#d08c86", "#f8eae8"
	}
	d.f(`<g><title>%s</title>`, escape(hostTitle(h)...))
	d.f(`<rect x="%d" y="%d" width="%d" height="%d" rx="8" fill="#ffffff" stroke="%s" stroke-width="1.3"/>`, x, y, cardW,
		height, border)
	d.f(`<path d="M%d %dv-%dq0 -8 8 -8h%dq8 0 8 8v%dz" fill="%s"/>`, x, y+48, 40, cardW-16, 40, head)
	state, colour := "live", "#0a7f5c"
	if !h.Live {
		state, colour = "does not answer", "#b3261e"
	}
	d.text(x+pad, y+21, "name", "", clip(h.Name, cardW-130, 9.4))
	d.f(`<text x="%d" y="%d" class="sub end" fill="%s">%s</text>`, x+cardW-pad-12, y+21, colour, state)
	d.f(`<circle cx="%d" cy="%d" r="4.5" fill="%s"/>`, x+cardW-pad-2, y+16, colour)
	under := "no underlay address"
	if len(h.Underlay) > 0 {
		u := h.Underlay[0]
		under = u.Address.Addr().String()
		if u.Device != "" {
			under += "  " + u.Device
		}
	}
	d.text(x+pad, y+40, "addr dim", "", clip(under, cardW-2*pad-90, 7.3))
	d.f(`<text x="%d" y="%d" class="sub end">%s</text>`, x+cardW-pad, y+40, plural(h.count, "container"))
	cy := y + cardHead
	for i := range h.parts {
		p := &h.parts[i]
		bottom := cy + partHead + line*(len(blockLines(p))+p.tunnelLines()) + d.listHeight(p.containers)
		d.f(`<rect x="%d" y="%d" width="4" height="%d" rx="2" fill="%s"/>`, x+pad, cy, bottom-cy-2, p.net.colour())
		ix := x + pad + 12
		d.text(ix, cy+13, "chip", p.net.colour(), clip(p.net.Name, 110, 7.8))
		gateway := "no gateway"
		if len(p.gateways) > 0 {
			gateway = "gateway " + p.gateways[0].String()
		} else if p.net.Encapsulation == metadata.EncapNone {
			gateway = ""
		}
		d.f(`<text x="%d" y="%d" class="addr end">%s</text>`, x+cardW-pad, cy+13, escape(gateway))
		cy += partHead - 4
		if t := p.tunnel; t != nil {
			left, right, found := strings.Cut(t.short(), ", ")
			if !found {
				left, right = "tunnel", left
			}
			d.text(ix, cy+10, "item dim", "", left)
			d.f(`<text x="%d" y="%d" class="item end"%s>%s</text>`, x+cardW-pad, cy+10,
				map[bool]string{true: ` style="fill: ` + alarm + `"`}[t.bad()], escape(clip(right, cardW-2*pad-92, 7.8)))
			cy += line
		}
		for j, b := range blockLines(p) {
			if j == 0 {
				d.text(ix, cy+10, "item dim", "", "blocks")
			}
			d.f(`<text x="%d" y="%d" class="addr end dim">%s</text>`, x+cardW-pad, cy+10, escape(b))
			cy += line
		}
		d.list(ix, x+cardW-pad, cy+4, p.containers)
		cy = bottom + 8
	}
	if len(h.other) > 0 {
		d.text(x+pad+12, cy+13, "chip", "#5b6b7a", "on no network known here")
		d.list(x+pad+12, x+cardW-pad, cy+partHead, h.other)
	}
	if len(h.parts)+len(h.other) == 0 {
		d.text(x+pad, cy+12, "note", "", "nothing here yet")
	}
	d.f(`</g>`)
}

func (d *drawing) list(left, right, y int, list []metadata.Container) {
	named, more := d.shown(list)
	for _, c := range named {
		widest := 0
		for _, a := range c.Addresses {
			widest = max(widest, int(float64(len(a.String()))*7.3))
		}
		colour := ""
		if c.State != "" && c.State != "running" {
			colour = "#98a4ae"
		}
		d.text(left, y+10, "item", colour, clip(title(c), right-left-widest-10, 6.9))
		for i, a := range c.Addresses {
			d.f(`<text x="%d" y="%d" class="addr end">%s</text>`, right, y+10+i*line, escape(a.String()))
		}
		y += line * max(1, len(c.Addresses))
	}
	switch {
	case more > 0 && len(named) == 0:
		d.text(left, y+10, "item", "", plural(more, "container"))
	case more > 0:
		d.text(left, y+10, "item dim", "", fmt.Sprintf("and %d more", more))
	}
}

// key explains the lines, below the frames, as far as they occur.
func (d *drawing) key(y int) int {
	used := map[string]bool{}
	for i := range d.p.networks {
		n := &d.p.networks[i]
		used[n.way(true)] = true
		if len(d.p.links) > 1 {
			used[n.way(false)] = true
		}
	}
	if d.p.hosts < 2 {
		if d.p.hosts == 1 && len(d.p.networks) > 0 {
			d.text(margin, y+14, "note", "", "One host: nothing to tunnel to yet.")
			return y + line + 6
		}
		return y
	}
	x := margin
	for _, k := range []struct{ way, text string }{
		{"tunnel", "in tunnels, each host to each"},
		{"direct", "plain routes, each host to each"},
		{"flat", "on the physical link, nothing in between"},
	} {
		if !used[k.way] {
			continue
		}
		d.f(`<path d="M%d %dh34" stroke="#44525e" stroke-width="3" fill="none"%s/>`, x, y+10, dashes[k.way])
		d.text(x+42, y+14, "note", "", k.text)
		x += 42 + len(k.text)*7 + 22
	}
	if slices.ContainsFunc(d.p.networks, func(n network) bool { return n.encrypted() }) {
		d.lock(x+6, y+10, "#44525e", "")
		d.text(x+20, y+14, "note", "", "encrypted: in clear neither comes nor goes")
	}
	return y + line + 6
}

// hostTitle is what a browser shows when the pointer rests on a host: everything, unfolded but for its containers.
func hostTitle(h *host) []string {
	lines := []string{fmt.Sprintf("%s (%s)", h.Name, map[bool]string{true: "live", false: "does not answer"}[h.Live])}
	for _, u := range h.Underlay {
		lines = append(lines, fmt.Sprintf("%s %s MTU %d", u.Address, u.Device, u.MTU))
	}
	for i := range h.parts {
		p := &h.parts[i]
		l := fmt.Sprintf("%s: gateway %s, blocks %s, %s", p.net.Name, orNone(p.gateways), orNone(p.blocks),
			plural(len(p.containers), "container"))
		if len(p.borrowed) > 0 {
			l += ", borrowed " + joined(p.borrowed, " ")
		}
		if t := p.tunnel; t != nil {
			l += ", tunnel " + t.short()
			if t.err != "" {
				l += " (" + t.err + ")"
			}
		}
		lines = append(lines, l)
	}
	return lines
}

func orNone[T netip.Addr | netip.Prefix](list []T) string {
	if len(list) == 0 {
		return "none"
	}
	out := make([]string, len(list))
	for i, v := range list {
		out[i] = fmt.Sprint(v)
	}
	return strings.Join(out, " ")
}

// clip cuts a text to a width in pixels, estimated by the mean width of a character: fonts differ from viewer
// to viewer.
func clip(s string, width int, char float64) string {
	s = printable.Line(s) // a cut escape would be no harm, but a wide one is
	r := []rune(s)
	n := max(int(float64(width)/char), 1)
	if len(r) <= n {
		return s
	}
	return string(r[:max(n-1, 1)]) + "…"
}

// entities are what XML gives a meaning to, in an element or in an attribute.
var entities = strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;", `"`, "&quot;")

// escape makes lines of text safe inside of an element or attribute. What is not printable, which XML 1.0
// forbids in part, shows as an escape.
func escape(lines ...string) string {
	out := make([]string, len(lines))
	for i, l := range lines {
		out[i] = entities.Replace(printable.Line(l))
	}
	return strings.Join(out, "\n")
}
