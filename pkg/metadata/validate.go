package metadata

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// What an entry of the store must be to be used. The service checks it where it reads the store, the client
// where it receives a view, and the planners before they plan: whoever wrote an entry may have had another
// version, a mistake, or bad intentions. An entry that fails becomes a Problem and is left out; all others
// stand.

// Problem is an entry that is left out because it cannot be used.
type Problem struct {
	Key  string `json:"key"`  // of the entry, with its kind in front, as in the API's paths: blocks/red/10.42.0.0/26
	What string `json:"what"` // is wrong with it
}

// maxShown bounds what is shown of a key, in bytes; nobody bounds what stands in the store.
const maxShown = 256

// Name is the key for people: in one line, without control characters, and not longer than a line or two.
func (p Problem) Name() string { return show(p.Key) }

func (p Problem) String() string { return fmt.Sprintf("entry %s is left out: %s", p.Name(), p.What) }

// Remedy says how the entry goes away.
func (p Problem) Remedy() string {
	remove := "remove it: lariat entry remove " + p.Name()
	if strings.HasPrefix(p.Key, KindTable+"/") {
		return "restore a backup, or first stop all containers with an address in it, and then " + remove
	}
	return remove
}

// show returns s as it may stand in a message: quoted when it has anything but printable characters, and cut
// when it is long.
func show(s string) string {
	cut := ""
	if len(s) > maxShown {
		s, cut = strings.ToValidUTF8(s[:maxShown], ""), "…"
	}
	if strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) || r == unicode.ReplacementChar }) {
		s = strconv.Quote(s)
	}
	return s + cut
}

// maxWhat bounds what is said of an entry, in bytes.
const maxWhat = 1000

// NewProblem returns the Problem of an entry that failed with err. What it says stands in one line and holds no control
// characters, whatever the entry does.
func NewProblem(key string, err error) Problem {
	what := strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, strings.ReplaceAll(err.Error(), "\n", "; "))
	if len(what) > maxWhat {
		what = strings.ToValidUTF8(what[:maxWhat], "") + "…"
	}
	return Problem{Key: key, What: what}
}

func problem(kind, key string, err error) Problem { return NewProblem(kind+"/"+key, err) }

// Decode reads the entry of that key. It fails when the entry is not JSON, or not one that its kind can be.
// It returns the zero value then.
func Decode[T interface{ Check(key string) error }](key string, data []byte) (T, error) {
	var o, none T
	if err := json.Unmarshal(data, &o); err != nil {
		return none, fmt.Errorf("%s is not understood: %w", show(string(data)), err)
	}
	if err := o.Check(key); err != nil {
		return none, err
	}
	return o, nil
}

// named fails when an object belongs under another key than it stands under.
func named(key, own string) error {
	if key != own {
		return fmt.Errorf("it says that it is %s", show(own))
	}
	return nil
}

// Check reports the first reason why no host may be so. key is its name.
func (h Host) Check(key string) error {
	if err := cmp.Or(ValidName(h.Name), named(key, h.Name)); err != nil {
		return err
	}
	for _, u := range h.Underlay {
		switch a := u.Address.Addr(); {
		case !u.Address.IsValid() || a.Is4In6() || a.IsUnspecified() || a.IsMulticast():
			return fmt.Errorf("underlay address %s is not one that a host can have", u.Address)
		case u.Address.Bits() < minPrefix:
			return fmt.Errorf("underlay address %s: no link is that wide", u.Address)
		case !validDevice(u.Device):
			return fmt.Errorf("underlay device %s: want at most 15 printable characters", show(u.Device))
		case u.MTU != 0 && (u.MTU < minMTU || u.MTU > 1<<16):
			return fmt.Errorf("underlay mtu %d: want %d to 65536, or 0 for the default", u.MTU, minMTU)
		}
	}
	for _, f := range h.Foreign {
		if !f.Prefix.IsValid() || f.Prefix != f.Prefix.Masked() || f.Prefix.Bits() < minPrefix || !validDevice(f.Device) {
			return fmt.Errorf("foreign route %s is not one", show(f.String()))
		}
	}
	switch {
	case len(h.Foreign) > MaxForeign:
		return fmt.Errorf("%d foreign routes: want at most %d", len(h.Foreign), MaxForeign)
	case h.MAC[0]&1 != 0:
		return fmt.Errorf("mac %s is that of a group", h.MAC)
	case !plain(h.IKEIdentity):
		return fmt.Errorf("ikeIdentity %s: want at most 253 printable characters", show(h.IKEIdentity))
	case !plain(h.MachineID) || !plain(h.BootID) || !plain(h.AgentVersion):
		return errors.New("machineID, bootID, agentVersion: want at most 253 printable characters")
	case len(h.IKEKeys) > 64 || slices.ContainsFunc(h.IKEKeys, func(k string) bool { return !plain(k) }):
		return errors.New("ikeKeys: want at most 64, each of at most 253 printable characters")
	}
	return nil
}

// Check reports every mistake in a network definition, as Validate does. key is its name.
func (n Network) Check(key string) error {
	return cmp.Or(ValidName(n.Name), named(key, n.Name), n.Validate())
}

// Check reports the first reason why no block may be so, whatever its network is. key is its BlockKey.
func (b Block) Check(key string) error {
	switch {
	case !b.CIDR.IsValid() || b.CIDR.Addr().Is4In6() || b.CIDR != b.CIDR.Masked():
		return fmt.Errorf("cidr %s is not a prefix", b.CIDR)
	case b.Gateway.IsValid() && !b.CIDR.Contains(b.Gateway):
		return fmt.Errorf("gateway %s lies outside of block %s", b.Gateway, b.CIDR)
	}
	return cmp.Or(ValidName(b.Network), ValidName(b.Host), named(key, BlockKey(b)))
}

// Check reports the first reason why no endpoint may be so, whatever its network is. key is its HostRouteKey.
func (e HostRoute) Check(key string) error {
	if !ValidAddress(e.Address) {
		return fmt.Errorf("address %s is not one that a container can have", e.Address)
	}
	return cmp.Or(ValidName(e.Network), ValidName(e.Host), named(key, HostRouteKey(e)))
}

// Check reports the first reason why no container may be so. key is its ContainerKey.
func (c Container) Check(key string) error {
	bad := func(a netip.Addr) bool { return !ValidAddress(a) }
	for _, i := range c.Interfaces {
		if err := ValidName(i.Network); err != nil {
			return fmt.Errorf("interface %s: network %w", show(i.IfName), err)
		}
		if slices.ContainsFunc(i.Addresses, bad) {
			return fmt.Errorf("interface %s has an address that no container can have", show(i.IfName))
		}
	}
	switch {
	case slices.ContainsFunc(c.Addresses, bad):
		return errors.New("it has an address that no container can have")
	case c.Network != "" && ValidName(c.Network) != nil:
		return ValidName(c.Network)
	case len(c.Interfaces) == 0 && !c.IsWritten():
		return errors.New("an ADD of an earlier version left it: it has no attachment and no assigned address")
	}
	return cmp.Or(ValidName(c.Host), ValidContainerID(c.ID), named(key, ContainerKey(c)))
}

// Check reports the first mistake in a volume. key is its VolumeKey.
func (v Volume) Check(key string) error {
	return cmp.Or(v.Validate(), ValidName(v.Host), named(key, VolumeKey(v)))
}

// Limits of what an entry may say.
const (
	minPrefix   = 8                  // the length of the widest subnet or link
	minMTU      = 576                // RFC 791
	MaxForeign  = 64                 // of a host: more come from a routing daemon, and change all the time
	maxCooldown = 365 * 24 * 60 * 60 // a year
)

// ValidAddress reports whether a container can have the address.
func ValidAddress(a netip.Addr) bool {
	return a.IsValid() && !a.Is4In6() && a.Zone() == "" && !a.IsUnspecified() && !a.IsMulticast() && !a.IsLoopback()
}

// ValidContainerID checks the id of a container, as a runtime gives it.
func ValidContainerID(id string) error {
	if id == "" || len(id) > 256 ||
		strings.ContainsFunc(id, func(r rune) bool { return r <= ' ' || r == 0x7f || r == '/' }) {
		return fmt.Errorf("containerID %s: want 1 to 256 characters, none of them space or /",
			strconv.Quote(id[:min(len(id), maxShown)]))
	}
	return nil
}

// plain reports whether a word of an entry may stand in the configuration of other programs, and in the output of ours.
func plain(s string) bool {
	return len(s) <= 253 && !strings.ContainsFunc(s, func(r rune) bool {
		return !unicode.IsPrint(r) ||
			r == unicode.ReplacementChar
	})
}

// validDevice reports whether an interface may have the name. A host need not name the device of its underlay.
func validDevice(s string) bool {
	return len(s) <= 15 && plain(s) && s != "." && s != ".." && !strings.ContainsAny(s, "/: ")
}

// reserved are the addresses that mean something to every host; a network that holds one of them would take it away.
var reserved = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("224.0.0.0/3"),
	netip.MustParsePrefix("::/8"), netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("ff00::/8"),
}

// unsafe lists what a network says that could harm hosts which follow it.
func (n Network) unsafe() (errs []error) {
	for _, p := range n.Subnets {
		if !p.IsValid() {
			continue // Validate says so
		}
		if i := slices.IndexFunc(reserved, p.Overlaps); i >= 0 {
			errs = append(errs, fmt.Errorf("subnet %s holds addresses of %s, which every host needs for itself", p, reserved[i]))
		} else if p.Bits() < minPrefix {
			errs = append(errs, fmt.Errorf("subnet %s is wider than /%d", p, minPrefix))
		}
	}
	for _, p := range n.HostNATExempt {
		if !p.IsValid() || p.Addr().Is4In6() {
			errs = append(errs, fmt.Errorf("hostNATExempt: %s is not a prefix", p))
		}
	}
	for _, a := range n.Gateways {
		if !ValidAddress(a) {
			errs = append(errs, fmt.Errorf("gateways: %s is not an address of a router", a))
		}
	}
	if n.CooldownSeconds > maxCooldown {
		errs = append(errs, fmt.Errorf("cooldownSeconds %d: want at most %d", n.CooldownSeconds, maxCooldown))
	}
	return errs
}

// Admits returns why a block cannot be one of the network's, or nil. Blocks that a network admits overlap
// nowhere: they are of one size.
func (n Network) Admits(b Block) error {
	for _, p := range n.Subnets {
		if !p.Contains(b.CIDR.Addr()) || b.CIDR.Bits() < p.Bits() {
			continue
		}
		if size := n.BlockSize(p); size != b.CIDR.Bits() {
			return fmt.Errorf("block %s is not a /%d, as the blocks of network %s are", b.CIDR, size, n.Name)
		}
		return nil
	}
	return fmt.Errorf("block %s lies outside of network %s, which has %s", b.CIDR, n.Name, joined(n.Subnets))
}

// Outside reports whether no subnet of the network holds the address.
func (n Network) Outside(a netip.Addr) bool {
	return !slices.ContainsFunc(n.Subnets, func(p netip.Prefix) bool { return p.Contains(a) })
}

// announces returns why one of the network's endpoints cannot be announced, or nil.
func (n Network) announces(e HostRoute, networks []Network, links []netip.Prefix) error {
	if !n.Outside(e.Address) {
		return nil
	}
	return Announceable(e.Address, networks, links)
}

func joined(list []netip.Prefix) string {
	words := make([]string, len(list))
	for i, p := range list {
		words[i] = p.String()
	}
	return strings.Join(words, " ")
}

// Announceable returns why a container's address outside of its network's subnets cannot be announced to
// other hosts, or nil. Hosts send to it by the network what they would have sent elsewhere. So it must be a
// private address (RFC 1918, RFC 4193), of no other network and of no link between hosts.
func Announceable(a netip.Addr, networks []Network, links []netip.Prefix) error {
	if !a.IsPrivate() {
		return fmt.Errorf("address %s lies outside of the network's subnets and is not a private one", a)
	}
	for _, n := range networks {
		if n.Encapsulation != EncapNone && !n.Outside(a) {
			return fmt.Errorf("address %s is one of network %s", a, n.Name)
		}
	}
	for _, p := range links {
		if p.Contains(a) {
			return fmt.Errorf("address %s lies on the underlay %s", a, p)
		}
	}
	return nil
}

// Links returns the prefixes of the hosts' underlay addresses, each once.
func Links(hosts []Host) []netip.Prefix {
	seen := map[netip.Prefix]struct{}{}
	var out []netip.Prefix
	for _, h := range hosts {
		for _, u := range h.Underlay {
			p := u.Address.Masked()
			if _, ok := seen[p]; !ok {
				seen[p] = struct{}{}
				out = append(out, p)
			}
		}
	}
	return out
}

// first orders by age, and puts those last that do not tell theirs. Names decide between equals.
func first(a, b time.Time, nameA, nameB string) int {
	if a.IsZero() != b.IsZero() {
		return -a.Compare(b) // the zero time is before all others
	}
	return cmp.Or(a.Compare(b), cmp.Compare(nameA, nameB))
}

// Senior orders hosts that claim the same address: the one that is live first, then the one that joined first.
func Senior(a, b Host) int {
	if a.Live != b.Live {
		return map[bool]int{true: -1, false: 1}[a.Live]
	}
	return first(a.Joined, b.Joined, a.Name, b.Name)
}

// SharesVNI reports whether tunnels of both networks would carry the same VNI.
func (n *Network) SharesVNI(o *Network) bool {
	return n.Encapsulation == EncapVXLAN && o.Encapsulation == EncapVXLAN && n.VNI == o.VNI
}

// Overlaps returns the pairs of subnets, one of n and one of o, that overlap: a host could not tell which network an
// address belongs to. Flat networks may overlap anything.
func (n *Network) Overlaps(o *Network) (pairs [][2]netip.Prefix) {
	if n.Encapsulation == EncapNone || o.Encapsulation == EncapNone {
		return nil
	}
	for _, p := range n.Subnets {
		for _, q := range o.Subnets {
			if p.Overlaps(q) {
				pairs = append(pairs, [2]netip.Prefix{p, q})
			}
		}
	}
	return pairs
}

// OverlapsUnderlay returns the pairs of a subnet and an underlay address of the host whose link overlaps it: packets of
// tunnels would be sent into the tunnels. A flat network has no tunnels.
func (n *Network) OverlapsUnderlay(h *Host) (pairs [][2]netip.Prefix) {
	if n.Encapsulation == EncapNone {
		return nil
	}
	for _, u := range h.Underlay {
		for _, p := range n.Subnets {
			if p.Overlaps(u.Address.Masked()) {
				pairs = append(pairs, [2]netip.Prefix{p, u.Address})
			}
		}
	}
	return pairs
}

// Compatible returns the networks that can be used together, in their order, and a Problem for each of the
// others. Of two that overlap or share a VNI, the one that was created first is used. Flat networks may
// overlap anything.
func Compatible(all []Network) ([]Network, []Problem) {
	if len(all) < 2 {
		return all, nil
	}
	order := make([]int, len(all))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(i, j int) int {
		return first(all[i].Created, all[j].Created, all[i].Name, all[j].Name)
	})
	var used []*Network // in their order of creation
	clash := func(n *Network) error {
		for _, o := range used {
			switch {
			case n.Name == o.Name:
				return errors.New("there are two of that name")
			case n.SharesVNI(o):
				return fmt.Errorf("its VNI %d is that of network %s, which was first", n.VNI, o.Name)
			}
			for _, pair := range n.Overlaps(o) {
				return fmt.Errorf("its subnet %s overlaps %s of network %s, which was first", pair[0], pair[1], o.Name)
			}
		}
		return nil
	}
	out := make(map[int]bool)
	var problems []Problem
	for _, i := range order {
		n := &all[i]
		if err := clash(n); err != nil {
			out[i] = true
			problems = append(problems, problem(KindNetwork, n.Name, err))
			continue
		}
		used = append(used, n)
	}
	if len(out) == 0 {
		return all, nil
	}
	kept := make([]Network, 0, len(all)-len(out))
	for i, n := range all {
		if !out[i] {
			kept = append(kept, n)
		}
	}
	return kept, problems
}

// apart returns the hosts and encapsulated networks of which no host has an underlay address in a network,
// with a Problem for each of the others. Hosts drop what comes from the underlay and claims an address of a
// network: with both, they would cut each other off. The one that was there first is kept, and the host where
// that is not known.
func apart(hosts []Host, networks []Network) ([]Host, []Network, []Problem) {
	// Networks that can be used together overlap nowhere, so an address lies in one of them at most.
	in, lengths := map[netip.Prefix]int{}, map[int]bool{}
	for i, n := range networks {
		for _, p := range n.Subnets {
			if n.Encapsulation != EncapNone {
				in[p], lengths[p.Bits()] = i, true
			}
		}
	}
	type clash struct {
		h, n int
		a    netip.Addr
	}
	var clashes []clash
	for i, h := range hosts {
		from := len(clashes)
		for _, u := range h.Underlay {
			for bits := range lengths {
				p, err := u.Address.Addr().Prefix(bits)
				n, ok := in[p]
				if err == nil && ok && !slices.ContainsFunc(clashes[from:], func(c clash) bool { return c.n == n }) {
					clashes = append(clashes, clash{i, n, u.Address.Addr()})
				}
			}
		}
		slices.SortFunc(clashes[from:], func(a, b clash) int { return cmp.Compare(a.n, b.n) })
	}
	var problems []Problem
	late, bad := map[string]bool{}, map[string]bool{}
	after := func(h Host, n Network) bool { return !n.Created.IsZero() && h.Joined.After(n.Created) }
	for _, c := range clashes {
		if h, n := hosts[c.h], networks[c.n]; !bad[n.Name] && !after(h, n) {
			bad[n.Name] = true
			problems = append(problems, problem(KindNetwork, n.Name, fmt.Errorf("host %s has the address %s of it on its "+
				"underlay", h.Name, c.a)))
		}
	}
	for _, c := range clashes {
		if h, n := hosts[c.h], networks[c.n]; !bad[n.Name] && !late[h.Name] {
			late[h.Name] = true
			problems = append(problems, problem(KindHost, h.Name, fmt.Errorf("its underlay address %s is one of network "+
				"%s, which was first", c.a, n.Name)))
		}
	}
	if len(problems) == 0 {
		return hosts, networks, nil
	}
	return slices.DeleteFunc(slices.Clone(hosts), func(h Host) bool { return late[h.Name] }),
		slices.DeleteFunc(slices.Clone(networks), func(n Network) bool { return bad[n.Name] }), problems
}

// Sane returns what of a snapshot can be planned from, with a Problem for everything else. The snapshot
// itself stays as it is. Sane costs nothing for a snapshot that comes from Sane.
//
// The same entries give the same result on every host. Blocks and endpoints of a network that is not there
// are left out without a word: a network that is removed goes before they do.
func (s *Snapshot) Sane() *Snapshot {
	if s.sane {
		return s
	}
	out := *s
	out.sane = true
	out.Problems = slices.Clone(s.Problems)
	told := make(map[string]bool, len(s.Problems))
	for _, p := range s.Problems {
		told[p.Key] = true
	}
	tell := func(list ...Problem) {
		for _, p := range list {
			if !told[p.Key] {
				told[p.Key] = true
				out.Problems = append(out.Problems, p)
			}
		}
	}
	out.Hosts = keep(s.Hosts, KindHost, func(h Host) string { return h.Name }, tell, nil)
	networks := keep(s.Networks, KindNetwork, func(n Network) string { return n.Name }, tell, nil)
	networks, problems := Compatible(networks)
	tell(problems...)
	out.Hosts, networks, problems = apart(out.Hosts, networks)
	tell(problems...)
	out.Networks = networks
	byName := make(map[string]*Network, len(networks))
	for i := range networks {
		byName[networks[i].Name] = &networks[i]
	}
	out.Blocks = keep(s.Blocks, KindBlock, BlockKey, tell, func(b Block) (bool, error) {
		n := byName[b.Network]
		if n == nil {
			return false, nil
		}
		return true, n.Admits(b)
	})
	links := Links(out.Hosts)
	out.HostRoutes = keep(s.HostRoutes, KindHostRoute, HostRouteKey, tell, func(e HostRoute) (bool, error) {
		n := byName[e.Network]
		if n == nil {
			return false, nil
		}
		return true, n.announces(e, networks, links)
	})
	out.Containers = keep(s.Containers, KindContainer, ContainerKey, tell, nil)
	return &out
}

// keep returns the objects that pass their own check and fits, each key once. It returns the list itself when all do.
func keep[T interface{ Check(key string) error }](list []T, kind string, key func(T) string, tell func(...Problem),
	fits func(T) (bool, error)) []T {
	out := list
	seen := make(map[string]struct{}, len(list))
	drop := false
	for i, o := range list {
		k := key(o)
		err := o.Check(k)
		if _, twice := seen[k]; err == nil && twice {
			err = errors.New("it is there twice")
		}
		ok := err == nil
		if ok && fits != nil {
			ok, err = fits(o)
			ok = ok && err == nil
		}
		if err != nil {
			tell(problem(kind, k, err))
		}
		if ok {
			seen[k] = struct{}{}
		}
		if !ok && !drop {
			out, drop = slices.Clone(list[:i]), true
		} else if ok && drop {
			out = append(out, o)
		}
	}
	return out
}

// UnmarshalJSON reads a snapshot. An object in it that is not understood becomes a Problem.
func (s *Snapshot) UnmarshalJSON(data []byte) error {
	type plain Snapshot
	var p plain
	if err := json.Unmarshal(data, &p); err == nil {
		*s = Snapshot(p)
		return nil
	}
	var raw struct {
		Revision   int64             `json:"revision"`
		Self       string            `json:"self"`
		Hosts      []json.RawMessage `json:"hosts"`
		Networks   []json.RawMessage `json:"networks"`
		Blocks     []json.RawMessage `json:"blocks"`
		Endpoints  []json.RawMessage `json:"endpoints"`
		Containers []json.RawMessage `json:"containers"`
		Problems   []json.RawMessage `json:"problems"`
	}
	if err := json.Unmarshal(data, &raw); err != nil {
		return err
	}
	*s = Snapshot{Revision: raw.Revision, Self: raw.Self, Problems: understood[Problem](nil, "problems", raw.Problems)}
	s.Hosts = understood[Host](s, KindHost, raw.Hosts)
	s.Networks = understood[Network](s, KindNetwork, raw.Networks)
	s.Blocks = understood[Block](s, KindBlock, raw.Blocks)
	s.HostRoutes = understood[HostRoute](s, KindHostRoute, raw.Endpoints)
	s.Containers = understood[Container](s, KindContainer, raw.Containers)
	return nil
}

// understood decodes a list one by one. What is not understood is told in the snapshot, unless there is none.
func understood[T any](s *Snapshot, kind string, list []json.RawMessage) []T {
	out := make([]T, 0, len(list))
	for i, data := range list {
		var o T
		if err := json.Unmarshal(data, &o); err == nil {
			out = append(out, o)
		} else if s != nil {
			s.Problems = append(s.Problems,
				problem(kind, "#"+strconv.Itoa(i), fmt.Errorf("%s is not understood: %w", show(string(data)), err)))
		}
	}
	return out
}
