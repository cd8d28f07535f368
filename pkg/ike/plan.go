package ike

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/lariat-net/lariat/pkg/ipsec"
)

// held keeps the daemon's objects of one tunnel, as far as this process knows.
type held struct {
	tunnel ipsec.Tunnel
	conn   string // text of the loaded connection; "": unknown or not loaded
	keys   []key  // in the order in which the daemon tries them
}

// wish keeps the desired objects of one tunnel.
type wish struct {
	tunnel ipsec.Tunnel
	conn   section
	text   string
	keys   []key
}

// observed keeps Lariat's objects that the daemon lists.
type observed struct {
	conns []string        // names of connections
	keys  []string        // ids, in the order in which the daemon tries them
	traps map[string]bool // connection/child
	sas   map[string][]SA // by the connection's name
}

// A step is one command.
type step struct {
	cmd    string
	args   section
	tunnel string // name of the tunnel
	line   string // for the log
	soft   bool   // a missing object is no error
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

// steps returns the commands that lead from the held objects to the desired ones.
// Removals come first, because another connection may now have the same selectors.
// Keys are loaded before the connections that need them, and unloaded after those connections.
func steps(want map[string]wish, have map[string]held, seen *observed) []step {
	var out []step
	add := func(tunnel, line string, soft bool, cmd string, args section) {
		out = append(out, step{cmd: cmd, args: args, tunnel: tunnel, line: line, soft: soft})
	}
	// Unload an unwanted connection before its SAs end: this removes its traps.
	// Otherwise the next packet would set the tunnel up again.
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

// gone returns the names of Lariat's connections that are not desired, sorted.
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

// keysToLoad returns the keys to load, in the order of loading.
// The daemon puts each loaded key before all others, and thus tries the keys in the desired order.
// It atomically replaces a key of the same id, so no key is ever missing.
func keysToLoad(want, have []key) []key {
	have = slices.DeleteFunc(slices.Clone(have), func(h key) bool {
		return !slices.ContainsFunc(want, func(w key) bool { return w.id == h.id && w.digest == h.digest })
	})
	// The longest tail of want that the daemon has in that order remains loaded.
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

// refresh returns the commands for established SAs whose settings have changed.
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
		// Established SAs keep their old settings for ever, even after a rekey.
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
	// Only one end reauthenticates, so that both ends do not do so at the same time.
	if first(h.tunnel.Keys) != "" && first(w.tunnel.Keys) != "" && first(h.tunnel.Keys) != first(w.tunnel.Keys) &&
		leads(w.tunnel) {
		out = append(out, step{cmd: "rekey", args: section{{"ike", name}, {"reauth", "yes"}}, tunnel: name, soft: true,
			line: "~ tunnel " + name + " authenticates anew with key " + first(w.tunnel.Keys)})
	}
	return out
}

// outdated ends SAs with settings of an earlier process, as far as the SAs show them.
// These are SAs without UDP when the tunnel needs UDP.
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

// options returns the text of a tunnel's connection without children and keys.
func options(t ipsec.Tunnel) string {
	t.Children, t.Keys = nil, nil
	return connection(t, Credentials{}).String()
}

// young is the age in seconds below which a second IKE SA may be about to replace the first one.
const young = 15

// repair reinstalls missing traps and ends duplicate SAs.
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

// extra returns the IKE SAs to end when both hosts have set one up at the same time.
// Both SAs are valid, so the daemons keep both for ever.
// One end decides, and keeps the SA by which it sends.
// Packets that it sends by another SA are lost until the peer has agreed.
// Packets of the peer are not lost.
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

// terminateIKE returns arguments that end all IKE SAs of a connection at once.
// The daemon informs the peer and does not wait for an answer.
func terminateIKE(name string) section {
	return section{{"ike", name}, {"force", "yes"}, {"timeout", "-1"}}
}
