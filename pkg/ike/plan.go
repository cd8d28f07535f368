package ike

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/lariat-net/lariat/pkg/ipsec"
)

// held is what the daemon has of one tunnel, as far as this process knows.
type held struct {
	tunnel ipsec.Tunnel
	conn   string // text of what was loaded; "": not known, or not loaded
	keys   []key  // in the order in which the daemon tries them
}

// wish is what it should have.
type wish struct {
	tunnel ipsec.Tunnel
	conn   section
	text   string
	keys   []key
}

// observed is what the daemon itself says that it has, of what is ours.
type observed struct {
	conns []string        // names of connections
	keys  []string        // ids, in the order in which they are tried
	traps map[string]bool // connection/child
	sas   map[string][]SA // by the connection's name
}

// step is one command.
type step struct {
	cmd    string
	args   section
	tunnel string // whose tunnel it is
	line   string // for the log
	soft   bool   // that there is nothing of that name is no error
}

func (s step) String() string {
	return fmt.Sprintf("%s\n%s", s.cmd, indent(s.args.String()))
}

func indent(text string) string {
	if text == "" {
		return ""
	}
	return "  " + strings.ReplaceAll(strings.TrimSuffix(text, "\n"), "\n", "\n  ") + "\n"
}

// steps lead from what is held to what is wished. What is unwanted goes first, for its selectors may be
// another's now; keys come before the connections that need them, and go after the connections that used
// them.
func steps(want map[string]wish, have map[string]held, seen *observed) []step {
	var out []step
	add := func(tunnel, line string, soft bool, cmd string, args section) {
		out = append(out, step{cmd: cmd, args: args, tunnel: tunnel, line: line, soft: soft})
	}
	// Of what is gone: the traps first, or the next packet would begin anew. They go with the connection.
	for _, name := range gone(want, have, seen) {
		add(name, "- tunnel "+name, true, "unload-conn", section{{"name", name}})
		add(name, "", true, "terminate", terminateIKE(name))
	}
	unwanted := unwantedKeys(want, have, seen)
	for _, name := range slices.Sorted(maps.Keys(want)) {
		w, h := want[name], have[name]
		for _, k := range keysToLoad(w.keys, h.keys) {
			line := "+ key " + k.id
			if slices.ContainsFunc(h.keys, func(x key) bool { return x.id == k.id && x.digest == k.digest }) {
				line = "~ key " + k.id + " goes before the others"
			}
			add(name, line, false, "load-shared", k.args)
		}
		if h.conn != w.text {
			sign := "+"
			if h.conn != "" {
				sign = "~"
			}
			add(name, fmt.Sprintf("%s tunnel %s %s to %s", sign, name, w.tunnel.Local, w.tunnel.Remote), false, "load-conn",
				w.conn)
		}
		out = append(out, refresh(w, h)...)
		if seen != nil {
			out = append(out, outdated(w, seen)...)
		}
		if seen != nil && h.conn == w.text {
			out = append(out, repair(w, seen)...)
		}
	}
	for _, id := range unwanted {
		add("", "- key "+id, true, "unload-shared", section{{"id", id}})
	}
	return out
}

// gone are the names of connections of ours that nobody wants, sorted.
func gone(want map[string]wish, have map[string]held, seen *observed) []string {
	names := map[string]struct{}{}
	for name := range have {
		names[name] = struct{}{}
	}
	if seen != nil {
		for _, name := range seen.conns {
			names[name] = struct{}{}
		}
		for name := range seen.sas {
			names[name] = struct{}{}
		}
	}
	maps.DeleteFunc(names, func(name string, _ struct{}) bool { _, wanted := want[name]; return wanted })
	return slices.Sorted(maps.Keys(names))
}

func unwantedKeys(want map[string]wish, have map[string]held, seen *observed) []string {
	ids := map[string]struct{}{}
	for _, h := range have {
		for _, k := range h.keys {
			ids[k.id] = struct{}{}
		}
	}
	if seen != nil {
		for _, id := range seen.keys {
			ids[id] = struct{}{}
		}
	}
	for _, w := range want {
		for _, k := range w.keys {
			delete(ids, k.id)
		}
	}
	return slices.Sorted(maps.Keys(ids))
}

// keysToLoad are the keys to load, in this order, so that the daemon tries them as wanted: it puts each that
// is loaded in front of all others, and replaces one of the same id in the same breath, so at no time is
// there one missing.
func keysToLoad(want, have []key) []key {
	have = slices.DeleteFunc(slices.Clone(have), func(h key) bool {
		return !slices.ContainsFunc(want, func(w key) bool { return w.id == h.id && w.digest == h.digest })
	})
	// The longest tail of want that is there in that order stays as it is.
	tail, i := 0, len(have)
	for ; tail < len(want); tail++ {
		i = slices.IndexFunc(have[:i], func(h key) bool { return h.id == want[len(want)-1-tail].id })
		if i < 0 {
			break
		}
	}
	load := slices.Clone(want[:len(want)-tail])
	slices.Reverse(load)
	return load
}

// refresh is what becomes of tunnels that are established under what has changed.
func refresh(w wish, h held) (out []step) {
	name := w.tunnel.Name
	if h.tunnel.Name == "" {
		return nil
	}
	again := func(line string, args section) {
		out = append(out, step{cmd: "terminate", args: args, tunnel: name, line: line, soft: true})
	}
	switch {
	case moved(h.tunnel, w.tunnel):
		again("- security associations of "+name+", which goes to another address or identity", terminateIKE(name))
		return out
	case h.tunnel.PeerBoot != "" && w.tunnel.PeerBoot != "" && h.tunnel.PeerBoot != w.tunnel.PeerBoot:
		again("- security associations of "+name+", whose peer was booted again", terminateIKE(name))
		return out
	case options(h.tunnel) != options(w.tunnel):
		// Those that are established live by their old settings for ever, rekeyed or not.
		again("- security associations of "+name+", which has other settings", section{{"ike", name}, {"timeout", "-1"}})
		return out
	}
	for _, c := range w.tunnel.Children {
		i := slices.IndexFunc(h.tunnel.Children, func(x ipsec.Child) bool { return x.Network == c.Network })
		if i >= 0 && childSection(h.tunnel.Children[i], leads(h.tunnel)).String() != childSection(c,
			leads(w.tunnel)).String() {
			again("- security associations of "+name+"/"+c.Network+", which has other settings",
				section{{"ike", name}, {"child", c.Network}, {"timeout", "-1"}})
		}
	}
	for _, c := range h.tunnel.Children {
		if !slices.ContainsFunc(w.tunnel.Children, func(x ipsec.Child) bool { return x.Network == c.Network }) {
			again("- security associations of "+name+"/"+c.Network,
				section{{"ike", name}, {"child", c.Network}, {"timeout", "-1"}})
		}
	}
	// One end does it, or both would at once.
	if first(h.tunnel.Keys) != "" && first(w.tunnel.Keys) != "" && first(h.tunnel.Keys) != first(w.tunnel.Keys) &&
		leads(w.tunnel) {
		out = append(out, step{cmd: "rekey", args: section{{"ike", name}, {"reauth", "yes"}}, tunnel: name, soft: true,
			line: "~ tunnel " + name + " authenticates anew with key " + first(w.tunnel.Keys)})
	}
	return out
}

// outdated ends what was established under settings of an earlier life of this process, as far as it shows:
// without UDP where that is wanted now.
func outdated(w wish, seen *observed) (out []step) {
	for _, sa := range seen.sas[w.tunnel.Name] {
		if sa.State != Established || sa.NAT || !w.tunnel.Encap {
			continue
		}
		out = append(out, step{cmd: "terminate", args: section{{"ike-id", fmt.Sprint(sa.ID)}, {"timeout", "-1"}},
			tunnel: w.tunnel.Name, soft: true,
			line: fmt.Sprintf("- IKE SA %d of %s, which is not in UDP", sa.ID, w.tunnel.Name)})
	}
	return out
}

func first(ids []string) string {
	if len(ids) == 0 {
		return ""
	}
	return ids[0]
}

// options is the text of what a tunnel is set to beside its ends, children and keys.
func options(t ipsec.Tunnel) string {
	t.Children, t.Keys = nil, nil
	return connection(t, Credentials{}).String()
}

// young is how long, in seconds, a second IKE SA may be on its way to replace the first.
const young = 15

// repair mends what others have taken away or made double.
func repair(w wish, seen *observed) (out []step) {
	name := w.tunnel.Name
	for _, c := range w.tunnel.Children {
		if !seen.traps[name+"/"+c.Network] {
			out = append(out, step{cmd: "install", args: section{{"child", c.Network}, {"ike", name}}, tunnel: name,
				line: "+ trap " + name + "/" + c.Network})
		}
	}
	for _, sa := range extra(w.tunnel, seen.sas[name]) {
		out = append(out, step{cmd: "terminate", args: section{{"ike-id", fmt.Sprint(sa.ID)}, {"timeout", "-1"}},
			tunnel: name, soft: true,
			line: fmt.Sprintf("- IKE SA %d of %s, which is there twice", sa.ID, name)})
	}
	return out
}

// extra are the IKE SAs to end when both hosts have set one up at the same time. Neither is wrong, so the
// daemons keep both for ever. One end decides, and keeps the one by which it sends: what it sends by another
// until the peer has agreed is lost, and what it is sent is not.
func extra(t ipsec.Tunnel, sas []SA) []SA {
	if !leads(t) {
		return nil
	}
	var full []SA
	for _, sa := range sas {
		if sa.State == Established && len(sa.Children) >= len(t.Children) {
			full = append(full, sa)
		}
	}
	if len(full) < 2 || slices.ContainsFunc(full, func(sa SA) bool { return sa.Age.Seconds() < young || !sa.settled() }) {
		return nil
	}
	slices.SortFunc(full, func(a, b SA) int { return cmp.Or(cmp.Compare(b.idle(), a.idle()), cmp.Compare(a.ID, b.ID)) })
	return full[:len(full)-1]
}

// terminateIKE ends all of a connection's IKE SAs at once: the peer is told, and not waited for.
func terminateIKE(name string) section {
	return section{{"ike", name}, {"force", "yes"}, {"timeout", "-1"}}
}
