package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/delta"
)

// golang.org/x/sys/unix has the other numbers of include/uapi/linux/netfilter/nf_tables.h, with the
// names of that file.
const (
	nfprotoInet   = 1
	keyIPv4       = 7 // nft's numbers of its types ipv4_addr and ipv6_addr
	keyIPv6       = 8
	keyPort       = 13 // inet_service
	batchGenID    = 1  // NFNL_BATCH_GENID
	elemEnd       = unix.NFT_SET_ELEM_INTERVAL_END
	elementsOnce  = 1500 // elements of one message: an attribute holds 64 KiB
	generations   = 5    // tries of a transaction while other processes change the ruleset
	plainSetFlags = unix.NFT_SET_INTERVAL | unix.NFT_SET_CONSTANT
)

var hooks = []string{"prerouting", "input", "forward", "output", "postrouting"}

// nftables keeps Lariat's part of the kernel's ruleset.
//
// The ruleset has a generation number, and every change by any process increments it.
// nftables caches the ruleset together with this number.
// A pass over an unchanged ruleset therefore requests the number only.
type nftables struct {
	s      *socket
	read   bool
	gen    uint32
	exists bool // the table
	// dormant is set when somebody disabled the table with all its chains.
	dormant bool
	sets    map[string]delta.Set
	chains  map[string]delta.Chain
}

func (f *nftables) close() error { return f.s.close() }

func (n *Netns) nftables() (*nftables, error) {
	if n.nf != nil {
		return n.nf, nil
	}
	var s *socket
	err := n.do(func() (err error) {
		s, err = openSocket(unix.NETLINK_NETFILTER)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("this kernel lacks nftables (CONFIG_NF_TABLES_INET): %w", err)
	}
	n.nf = &nftables{s: s}
	return n.nf, nil
}

// nftMessage begins a message of the nftables subsystem, family inet.
func nftMessage(m *message, typ, flags uint16) {
	m.begin(unix.NFNL_SUBSYS_NFTABLES<<8|typ, flags)
	m.raw(nfprotoInet, 0, 0, 0)
}

func (f *nftables) generation() (gen uint32, err error) {
	err = f.s.get(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETGEN, func(m *message) { m.raw(0, 0, 0, 0) },
		func(_ uint16, body []byte) {
			for a := newAttrs(body[min(4, len(body)):]); a.next(); {
				if a.typ == unix.NFTA_GEN_ID {
					gen = a.u32be()
				}
			}
		})
	if err != nil {
		return 0, fmt.Errorf("this kernel lacks nftables (CONFIG_NF_TABLES_INET): %w", err)
	}
	return gen, nil
}

// refresh reads the table unless the generation number is unchanged.
func (f *nftables) refresh() error {
	for range generations {
		gen, err := f.generation()
		if err != nil {
			return err
		}
		if f.read && gen == f.gen {
			return nil
		}
		f.read = false
		loaded := f.load()
		switch after, err := f.generation(); {
		case err != nil:
			return err
		case after != gen, errors.Is(loaded, errInterrupted):
			// The ruleset changed during the read, so a listed object may have vanished: retry.
		case loaded != nil:
			return fmt.Errorf("read the nftables table inet %s: %w", delta.Table, loaded)
		default:
			f.read, f.gen = true, gen
			return nil
		}
	}
	return errors.New("the nftables ruleset changes faster than it can be read")
}

func (f *nftables) load() error {
	f.sets, f.chains = map[string]delta.Set{}, map[string]delta.Chain{}
	f.exists = true
	err := f.list(unix.NFT_MSG_GETSET, unix.NFTA_SET_TABLE, "", func(body []byte) {
		name, s, anonymous := parseSet(body)
		if !anonymous {
			f.sets[name] = s
		}
	})
	if errors.Is(err, unix.ENOENT) {
		f.exists = false
		return nil
	}
	if err != nil {
		return err
	}
	f.dormant = false
	err = f.list(unix.NFT_MSG_GETTABLE, 0, "", func(body []byte) {
		var name string
		var flags uint32
		for a := newAttrs(body); a.next(); {
			switch a.typ {
			case unix.NFTA_TABLE_NAME:
				name = cstring(a.value)
			case unix.NFTA_TABLE_FLAGS:
				flags = a.u32be()
			}
		}
		f.dormant = f.dormant || name == delta.Table && flags&tableDormant != 0
	})
	if err != nil {
		return err
	}
	for name, s := range f.sets {
		if s.Other != "" {
			continue
		}
		var elements []element
		err := f.list(unix.NFT_MSG_GETSETELEM, unix.NFTA_SET_ELEM_LIST_TABLE, name,
			func(body []byte) { elements = parseElements(elements, body) })
		if err != nil {
			return err
		}
		if s.Ports != nil {
			s.Ports, s.Other = toPorts(elements)
		} else {
			s.Elements, s.Other = fromElements(elements, s)
		}
		f.sets[name] = s
	}
	if err := f.list(unix.NFT_MSG_GETCHAIN, 0, "", func(body []byte) { parseChain(body, f.chains) }); err != nil {
		return err
	}
	if err := f.list(unix.NFT_MSG_GETRULE, unix.NFTA_RULE_TABLE, "",
		func(body []byte) { parseRule(body, f.chains) }); err != nil {
		return err
	}
	if f.dormant { // no chain of the table has an effect, so none equals its desired chain
		for name, c := range f.chains {
			c.Rules = append(c.Rules, delta.Rule{delta.Unknown("table dormant")})
			f.chains[name] = c
		}
	}
	return nil
}

const tableDormant = 1 // NFT_TABLE_F_DORMANT: its chains are not hooked

// list dumps objects of the table.
// With tableAttr 0 it dumps the objects of all tables of the family.
func (f *nftables) list(typ, tableAttr uint16, set string, each func(body []byte)) error {
	return f.s.dump(unix.NFNL_SUBSYS_NFTABLES<<8|typ, func(m *message) {
		m.raw(nfprotoInet, 0, 0, 0)
		if tableAttr != 0 {
			m.string(tableAttr, delta.Table)
		}
		if set != "" {
			m.string(unix.NFTA_SET_ELEM_LIST_SET, set)
		}
	}, func(_ uint16, body []byte) {
		if len(body) > 4 && body[0] == nfprotoInet {
			each(body[4:])
		}
	})
}

func parseSet(body []byte) (name string, s delta.Set, anonymous bool) {
	var flags, key uint32
	for a := newAttrs(body); a.next(); {
		switch a.typ {
		case unix.NFTA_SET_NAME:
			name = cstring(a.value)
		case unix.NFTA_SET_FLAGS:
			flags = a.u32be()
		case unix.NFTA_SET_KEY_TYPE:
			key = a.u32be()
		}
	}
	s.V6 = key == keyIPv6
	s.Interval = flags&unix.NFT_SET_INTERVAL != 0
	if key == keyPort {
		s.Ports = []uint16{}
	}
	if flags&^plainSetFlags != 0 || (key != keyIPv4 && key != keyIPv6 && key != keyPort) || key == keyPort && s.Interval {
		s.Other = "of another type"
	}
	return name, s, flags&unix.NFT_SET_ANONYMOUS != 0
}

// An element is one element of a set in the kernel's form.
// An interval has two elements: its first address, and the first address after the interval.
type element struct {
	addr netip.Addr
	port uint16
	end  bool
	odd  bool // carries more than a key
}

func parseElements(out []element, body []byte) []element {
	for a := newAttrs(body); a.next(); {
		if a.typ != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
			continue
		}
		for list := newAttrs(a.value); list.next(); {
			var e element
			for x := newAttrs(list.value); x.next(); {
				switch x.typ {
				case unix.NFTA_SET_ELEM_KEY:
					for v := newAttrs(x.value); v.next(); {
						if e.addr = v.addr(); len(v.value) == 2 {
							e.port = binary.BigEndian.Uint16(v.value)
						}
					}
				case unix.NFTA_SET_ELEM_FLAGS:
					e.end = x.u32be()&elemEnd != 0
				default:
					e.odd = e.odd || x.typ == unix.NFTA_SET_ELEM_DATA
				}
			}
			out = append(out, e)
		}
	}
	return out
}

// toPorts turns elements into sorted ports.
func toPorts(elements []element) (out []uint16, other string) {
	out = []uint16{}
	for _, e := range elements {
		if e.odd || e.end || e.port == 0 {
			return out, "of other elements"
		}
		out = append(out, e.port)
	}
	slices.Sort(out)
	return out, ""
}

// fromElements turns elements into sorted prefixes.
// When an element is no prefix, other makes the set differ from every desired set.
func fromElements(elements []element, s delta.Set) (out []netip.Prefix, other string) {
	out = make([]netip.Prefix, 0, len(elements))
	if !s.Interval {
		for _, e := range elements {
			if !e.addr.IsValid() || e.odd {
				return nil, "of other elements"
			}
			out = append(out, netip.PrefixFrom(e.addr, e.addr.BitLen()))
		}
		slices.SortFunc(out, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
		return out, ""
	}
	slices.SortFunc(elements, func(a, b element) int {
		if c := a.addr.Compare(b.addr); c != 0 || a.end == b.end {
			return c
		}
		if a.end {
			return -1
		}
		return 1
	})
	for i, e := range elements {
		if !e.addr.IsValid() || e.odd {
			return nil, "of other elements"
		}
		if e.end {
			continue // the end of the previous interval, or nft's marker at the first address
		}
		var end netip.Addr
		if i+1 < len(elements) && elements[i+1].end {
			end = elements[i+1].addr
		}
		p, ok := prefixBetween(e.addr, end)
		if !ok {
			return nil, "of ranges that are no prefixes"
		}
		out = append(out, p)
	}
	return out, ""
}

// prefixBetween returns the prefix of the addresses from first to end, without end.
// An invalid end means the end of all addresses.
func prefixBetween(first, end netip.Addr) (netip.Prefix, bool) {
	for bits := 0; bits <= first.BitLen(); bits++ {
		p := netip.PrefixFrom(first, bits)
		if p.Masked().Addr() == first && behind(p) == end {
			return p, true
		}
	}
	return netip.Prefix{}, false
}

// behind returns the first address after a prefix. It is invalid when there is none.
func behind(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := range b {
		switch keep := p.Bits() - 8*i; {
		case keep <= 0:
			b[i] = 0xff
		case keep < 8:
			b[i] |= 0xff >> keep
		}
	}
	last, _ := netip.AddrFromSlice(b)
	return last.Next()
}

func parseChain(body []byte, chains map[string]delta.Chain) {
	var c delta.Chain
	var name, table string
	policy := uint32(1)
	for a := newAttrs(body); a.next(); {
		switch a.typ {
		case unix.NFTA_CHAIN_TABLE:
			table = cstring(a.value)
		case unix.NFTA_CHAIN_NAME:
			name = cstring(a.value)
		case unix.NFTA_CHAIN_TYPE:
			c.Type = cstring(a.value)
		case unix.NFTA_CHAIN_POLICY:
			policy = a.u32be()
		case unix.NFTA_CHAIN_HOOK:
			for h := newAttrs(a.value); h.next(); {
				switch h.typ {
				case unix.NFTA_HOOK_HOOKNUM:
					if i := h.u32be(); i < uint32(len(hooks)) {
						c.Hook = hooks[i]
					}
				case unix.NFTA_HOOK_PRIORITY:
					c.Priority = int(int32(h.u32be()))
				}
			}
		}
	}
	if table != delta.Table {
		return
	}
	if policy != 1 {
		c.Rules = append(c.Rules, delta.Rule{delta.Unknown("policy drop")})
	}
	chains[name] = c
}

// observeNft adds the table's sets and chains to s.
func (n *Netns) observeNft(s, want *delta.State) error {
	f, err := n.nftables()
	if err == nil {
		err = f.refresh()
	}
	if err != nil {
		if len(want.Sets)+len(want.Chains) == 0 {
			return nil // a kernel without nftables holds no objects of Lariat
		}
		return err
	}
	s.Sets, s.Chains = maps.Clone(f.sets), maps.Clone(f.chains)
	return nil
}

// applyNft changes the table in one transaction. It compares the difference with the current table.
// Therefore it leaves out changes that the table already has, and makes no partial changes.
// With grow it removes nothing.
func (n *Netns) applyNft(d *delta.Difference, grow bool) error {
	if d.Sets.Len()+d.Chains.Len() == 0 || !grow && !shrinks(d) {
		return nil
	}
	f, err := n.nftables()
	if err != nil {
		return err
	}
	for range generations {
		if err = f.refresh(); err != nil {
			return err
		}
		if err = f.change(d, grow); !errors.Is(err, unix.ERESTART) && !errors.Is(err, unix.EAGAIN) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("change the nftables table inet %s: %w", delta.Table, f.explain(err, d))
	}
	return nil
}

// shrinks reports whether a difference removes anything from nftables.
func shrinks(d *delta.Difference) bool {
	return len(d.Sets.Remove)+len(d.Chains.Remove) > 0 ||
		slices.ContainsFunc(d.Sets.Set, func(e delta.Entry[string, delta.Set]) bool {
			_, gone := delta.ElementChanges(e.Value.Elements, e.Old.Elements)
			return len(gone) > 0
		}) || slices.ContainsFunc(d.Chains.Set, func(e delta.Entry[string, delta.Chain]) bool {
		return len(delta.MergeForTransition(e.Value, e.Old).Rules) > len(e.Value.Rules)
	})
}

// target returns the sets and chains of the current table with the difference applied.
// With grow the result keeps everything that the difference removes.
func (f *nftables) target(d *delta.Difference, grow bool) (sets map[string]delta.Set, chains map[string]delta.Chain) {
	sets, chains = maps.Clone(f.sets), maps.Clone(f.chains)
	if sets == nil {
		sets, chains = map[string]delta.Set{}, map[string]delta.Chain{}
	}
	if !grow {
		for _, e := range d.Sets.Remove {
			delete(sets, e.Key)
		}
		for _, e := range d.Chains.Remove {
			delete(chains, e.Key)
		}
	}
	for _, e := range d.Sets.Set {
		set := e.Value
		if have, ok := f.sets[e.Key]; grow && ok && set.SameType(have) {
			set.Elements = delta.Disjoint(slices.Concat(set.Elements, have.Elements))
		}
		sets[e.Key] = set
	}
	for _, e := range d.Chains.Set {
		chain := e.Value
		if have, ok := f.chains[e.Key]; grow && ok {
			chain = delta.MergeForTransition(chain, have)
		}
		chains[e.Key] = chain
	}
	return sets, chains
}

// An nftStep is one message of a transaction.
type nftStep struct {
	name  string
	build func(m *message) error
}

func (f *nftables) change(d *delta.Difference, grow bool) error {
	sets, chains := f.target(d, grow)
	steps, err := f.plan(sets, chains)
	if err != nil || len(steps) == 0 {
		return err
	}
	if err := f.transact(steps); err != nil {
		f.read = false
		return err
	}
	// Do not read the ruleset again.
	// The kernel refuses a transaction upon another generation, so the outcome is known.
	// Read the new generation, because another process may have changed the ruleset since.
	if gen, err := f.generation(); err == nil && gen == next(f.gen) {
		f.gen, f.sets, f.chains = gen, sets, chains
		f.exists, f.dormant = len(sets)+len(chains) > 0, false
	} else {
		f.read = false
	}
	return nil
}

// next returns the generation after gen. The kernel skips 0.
func next(gen uint32) uint32 {
	if gen++; gen == 0 {
		gen = 1
	}
	return gen
}

// plan returns the shortest transaction that leads to sets and chains.
// A transaction removes a rule before the set of that rule, and adds it after that set.
func (f *nftables) plan(sets map[string]delta.Set, chains map[string]delta.Chain) ([]nftStep, error) {
	var steps []nftStep
	add := func(name string, build func(m *message) error) { steps = append(steps, nftStep{name, build}) }
	if len(sets)+len(chains) == 0 {
		if f.exists {
			add("delete table", func(m *message) error { table(m, unix.NFT_MSG_DELTABLE, 0); return nil })
		}
		return steps, nil
	}
	if !f.exists {
		add("add table", func(m *message) error { table(m, unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE); return nil })
	} else if f.dormant {
		add("wake table", func(m *message) error { table(m, unix.NFT_MSG_NEWTABLE, 0); return nil })
	}
	remade := map[string]bool{}
	for name, s := range f.sets {
		if want, ok := sets[name]; ok && !want.SameType(s) {
			remade[name] = true
		}
	}
	changed := map[string]bool{}
	var gone []string
	for _, name := range slices.Sorted(maps.Keys(f.chains)) {
		have := f.chains[name]
		want, ok := chains[name]
		if ok && want.SameBase(have) && want.Equal(have) && len(remade) == 0 {
			continue
		}
		changed[name] = true
		if !ok || !want.SameBase(have) {
			gone = append(gone, name)
		}
		// Flush removed chains too: the kernel keeps a chain that is the target of a jump.
		add("flush chain "+name, func(m *message) error {
			nftMessage(m, unix.NFT_MSG_DELRULE, 0)
			m.string(unix.NFTA_RULE_TABLE, delta.Table)
			m.string(unix.NFTA_RULE_CHAIN, name)
			return nil
		})
	}
	for _, name := range gone {
		add("delete chain "+name, func(m *message) error { chainMessage(m, unix.NFT_MSG_DELCHAIN, 0, name); return nil })
	}
	for _, name := range slices.Sorted(maps.Keys(f.sets)) {
		if _, ok := sets[name]; !ok || remade[name] {
			add("delete set "+name, func(m *message) error { set(m, unix.NFT_MSG_DELSET, 0, name, nil); return nil })
		}
	}
	for _, name := range slices.Sorted(maps.Keys(sets)) {
		want := sets[name]
		have, ok := f.sets[name]
		if !ok || remade[name] {
			have = delta.Set{}
			add("add set "+name, func(m *message) error {
				set(m, unix.NFT_MSG_NEWSET, unix.NLM_F_CREATE, name, &want)
				return nil
			})
			if len(want.Ports) > 0 {
				add("add ports to set "+name, func(m *message) error { ports(m, name, want.Ports); return nil })
			}
		}
		more, less := delta.ElementChanges(want.Elements, have.Elements)
		for part := range slices.Chunk(less, elementsOnce) {
			add("delete elements of set "+name,
				func(m *message) error { elements(m, unix.NFT_MSG_DELSETELEM, 0, name, want, part); return nil })
		}
		for part := range slices.Chunk(more, elementsOnce) {
			add("add elements to set "+name, func(m *message) error {
				elements(m, unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, name, want, part)
				return nil
			})
		}
	}
	names := slices.DeleteFunc(slices.Sorted(maps.Keys(chains)), func(name string) bool {
		_, ok := f.chains[name]
		return ok && !changed[name]
	})
	for _, name := range names { // all chains, before a rule jumps to one
		want := chains[name]
		hook := slices.Index(hooks, want.Hook)
		if hook < 0 && want.Hook != "" {
			return nil, fmt.Errorf("chain %s: unknown hook %q", name, want.Hook)
		}
		add("add chain "+name, func(m *message) error {
			chainMessage(m, unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, name)
			if hook >= 0 {
				base(m, want, uint32(hook))
			}
			return nil
		})
	}
	for _, name := range names {
		for _, r := range chains[name].Rules {
			add("add rule to "+name+": "+r.String(), func(m *message) error { return rule(m, name, r) })
		}
	}
	return steps, nil
}

func table(m *message, typ, flags uint16) {
	nftMessage(m, typ, flags)
	m.string(unix.NFTA_TABLE_NAME, delta.Table)
	if typ == unix.NFT_MSG_NEWTABLE {
		m.u32be(unix.NFTA_TABLE_FLAGS, 0)
	}
}

func chainMessage(m *message, typ, flags uint16, name string) {
	nftMessage(m, typ, flags)
	m.string(unix.NFTA_CHAIN_TABLE, delta.Table)
	m.string(unix.NFTA_CHAIN_NAME, name)
}

func base(m *message, c delta.Chain, hook uint32) {
	h := m.nest(unix.NFTA_CHAIN_HOOK)
	m.u32be(unix.NFTA_HOOK_HOOKNUM, hook)
	m.u32be(unix.NFTA_HOOK_PRIORITY, uint32(int32(c.Priority)))
	m.end(h)
	m.u32be(unix.NFTA_CHAIN_POLICY, 1)
	m.string(unix.NFTA_CHAIN_TYPE, c.Type)
}

func set(m *message, typ, flags uint16, name string, s *delta.Set) {
	nftMessage(m, typ, flags)
	m.string(unix.NFTA_SET_TABLE, delta.Table)
	m.string(unix.NFTA_SET_NAME, name)
	if s == nil {
		return
	}
	key, length, setFlags := uint32(keyIPv4), uint32(4), uint32(0)
	switch {
	case s.Ports != nil:
		key, length = keyPort, 2
	case s.V6:
		key, length = keyIPv6, 16
	}
	if s.Interval {
		setFlags = unix.NFT_SET_INTERVAL
	}
	m.u32be(unix.NFTA_SET_FLAGS, setFlags)
	m.u32be(unix.NFTA_SET_KEY_TYPE, key)
	m.u32be(unix.NFTA_SET_KEY_LEN, length)
	m.u32be(unix.NFTA_SET_ID, 1) // the kernel requires an id, but finds sets by their names
	// nft's listing needs the byte order of keys (NFTNL_UDATA_SET_KEYBYTEORDER, big endian).
	// The bytes are type, length and value.
	m.bytes(unix.NFTA_SET_USERDATA, []byte{0, 4, 2, 0, 0, 0})
}

func ports(m *message, name string, list []uint16) {
	nftMessage(m, unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE)
	m.string(unix.NFTA_SET_ELEM_LIST_TABLE, delta.Table)
	m.string(unix.NFTA_SET_ELEM_LIST_SET, name)
	all := m.nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
	for _, p := range list {
		e := m.nest(unix.NFTA_LIST_ELEM)
		key := m.nest(unix.NFTA_SET_ELEM_KEY)
		m.bytes(unix.NFTA_DATA_VALUE, binary.BigEndian.AppendUint16(nil, p))
		m.end(key)
		m.end(e)
	}
	m.end(all)
}

func elements(m *message, typ, flags uint16, name string, s delta.Set, list []netip.Prefix) {
	nftMessage(m, typ, flags)
	m.string(unix.NFTA_SET_ELEM_LIST_TABLE, delta.Table)
	m.string(unix.NFTA_SET_ELEM_LIST_SET, name)
	all := m.nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
	one := func(a netip.Addr, end bool) {
		e := m.nest(unix.NFTA_LIST_ELEM)
		key := m.nest(unix.NFTA_SET_ELEM_KEY)
		m.addr(unix.NFTA_DATA_VALUE, a)
		m.end(key)
		if end {
			m.u32be(unix.NFTA_SET_ELEM_FLAGS, elemEnd)
		}
		m.end(e)
	}
	for _, p := range list {
		if !s.Interval {
			one(p.Addr(), false)
			continue
		}
		one(p.Masked().Addr(), false)
		if after := behind(p.Masked()); after.IsValid() {
			one(after, true)
		}
	}
	m.end(all)
}

// transact sends all steps as one transaction upon the cached generation.
func (f *nftables) transact(steps []nftStep) error {
	s, m := f.s, &f.s.out
	m.b = m.b[:0]
	first := s.seq + 1
	m.begin(unix.NFNL_MSG_BATCH_BEGIN, 0)
	m.raw(0, 0, unix.NFNL_SUBSYS_NFTABLES>>8, unix.NFNL_SUBSYS_NFTABLES)
	m.u32be(batchGenID, f.gen)
	m.finish(first)
	for i, st := range steps {
		if err := st.build(m); err != nil {
			return fmt.Errorf("%s: %w", st.name, err)
		}
		m.finish(first + uint32(i) + 1)
	}
	last := first + uint32(len(steps))
	m.askAck()
	m.begin(unix.NFNL_MSG_BATCH_END, 0)
	m.raw(0, 0, unix.NFNL_SUBSYS_NFTABLES>>8, unix.NFNL_SUBSYS_NFTABLES)
	s.seq = last + 1
	m.finish(s.seq)
	if len(m.b) > 200<<10 { // a transaction has to be sent in one piece
		if unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, len(m.b)) != nil {
			_ = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, len(m.b))
		}
	}
	if err := s.send(m.b); err != nil {
		return err
	}
	var refused []error
	err := s.acks(first, last, nil, func(seq uint32, err error) error {
		if seq == first {
			return err // the kernel did not begin the transaction and will send no other answer
		}
		if len(refused) < maxErrors {
			refused = append(refused, fmt.Errorf("%s: %w", steps[seq-first-1].name, err))
		}
		return nil
	})
	return errors.Join(append(refused, err)...)
}

// explain names the feature whose absence made the kernel refuse a rule or chain with ENOENT or EOPNOTSUPP.
func (f *nftables) explain(err error, d *delta.Difference) error {
	if !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	// The kernel does not name the rule that it refused.
	// Name every feature that the new rules need and the kernel may lack.
	lacks := map[string]bool{}
	for _, e := range d.Chains.Set {
		if e.Value.Type == "nat" {
			lacks["NAT in nftables (CONFIG_NFT_NAT, CONFIG_NFT_MASQ)"] = true
		}
		for _, r := range e.Value.Rules {
			for _, s := range r {
				switch s.(type) {
				case delta.NoReverse, delta.Reverse, delta.ToLocal:
					lacks["fib lookups in nftables (CONFIG_NFT_FIB_INET)"] = true
				case delta.Notrack, delta.CtReply, delta.CtDNAT:
					lacks["connection tracking in nftables (CONFIG_NFT_CT)"] = true
				}
			}
		}
	}
	if len(lacks) > 0 {
		return fmt.Errorf("%w; the kernel may lack %s; lariat doctor features tells", err,
			strings.Join(slices.Sorted(maps.Keys(lacks)), ", or "))
	}
	return err
}

func (m *message) u32be(typ uint16, v uint32) {
	m.attrHead(typ, 4)
	m.b = binary.BigEndian.AppendUint32(m.b, v)
}
