// Package allocate decides which address comes next. It is pure: it turns tables and rules into
// tables. It uses no store, no clock, and no randomness unless the caller supplies it.
//
// A network's subnets are cut into blocks, with one owner host each. Tables of at most 64 addresses
// record the use of a block's addresses. So one allocation rewrites a few KiB for any size of
// block. With the default block sizes a block has exactly one table.
//
// An address has this cycle:
//
//	fresh ── Take ──> entry ── Release ──> resting (FIFO, with time) ── after cooldown ──> Take …
//
// Fresh addresses are used first, then rested ones, the longest-rested first. An address that still
// cools down is the last resort. A stale neighbour entry does less harm than a container that
// cannot start.
package allocate

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
)

// TableBits gives the size of a table: 2^TableBits addresses, or the whole block when that is
// smaller.
const TableBits = 6

// Owner of an entry: the host, its boot, and the state directory of its plugin.
type Owner struct {
	Host     string
	BootID   string
	StateDir string // empty: metadata.DefaultStateDir
}

// Entry is one address in use.
type Entry struct {
	Address  netip.Addr
	ID       metadata.AttachmentID
	Owner    Owner
	Sequence uint64
	Created  time.Time // whole seconds
}

// Rest is one released address.
type Rest struct {
	Address netip.Addr
	Since   time.Time // whole seconds
}

// Table records the use of a run of addresses. Methods that change it do so in place, so Clone it
// first.
type Table struct {
	CIDR    netip.Prefix
	Next    uint64  // above every sequence number in the table
	Entries []Entry // by address
	Resting []Rest  // longest first
}

// TableOf returns the prefix of the table that records an address of a block.
func TableOf(block netip.Prefix, a netip.Addr) netip.Prefix {
	bits := max(block.Bits(), a.BitLen()-TableBits)
	p, _ := a.Prefix(bits)
	return p
}

// TablesOf lists the tables of a block.
func TablesOf(block netip.Prefix) []netip.Prefix {
	var out []netip.Prefix
	for a, last := block.Masked().Addr(), metadata.LastAddr(block); ; {
		p := TableOf(block, a)
		out = append(out, p)
		end := metadata.LastAddr(p)
		if end == last {
			return out
		}
		a = end.Next()
	}
}

// Clone returns a copy of the table.
func (t *Table) Clone() *Table {
	return &Table{CIDR: t.CIDR, Next: t.Next, Entries: slices.Clone(t.Entries), Resting: slices.Clone(t.Resting)}
}

func (t *Table) find(a netip.Addr) (int, bool) {
	return slices.BinarySearchFunc(t.Entries, a, func(e Entry, a netip.Addr) int { return e.Address.Compare(a) })
}

// Entry returns the entry of an address.
func (t *Table) Entry(a netip.Addr) (Entry, bool) {
	if i, ok := t.find(a); ok {
		return t.Entries[i], true
	}
	return Entry{}, false
}

// Take records the use of an address. It returns false when the address is already in use or
// outside the table.
func (t *Table) Take(e Entry) bool {
	i, used := t.find(e.Address)
	if used || !t.CIDR.Contains(e.Address) {
		return false
	}
	t.Entries = slices.Insert(t.Entries, i, e)
	t.Resting = slices.DeleteFunc(t.Resting, func(r Rest) bool { return r.Address == e.Address })
	t.Next = max(t.Next, e.Sequence+1)
	return true
}

// Renew replaces the owner and sequence number of an entry that the same attachment asked for again.
func (t *Table) Renew(a netip.Addr, owner Owner, sequence uint64) {
	if i, ok := t.find(a); ok {
		t.Entries[i].Owner, t.Entries[i].Sequence = owner, sequence
		t.Next = max(t.Next, sequence+1)
	}
}

// Release removes every entry that matches, and returns those entries.
func (t *Table) Release(now time.Time, match func(Entry) bool) []Entry {
	var out []Entry
	t.Entries = slices.DeleteFunc(t.Entries, func(e Entry) bool {
		if !match(e) {
			return false
		}
		out = append(out, e)
		return true
	})
	for _, e := range out {
		t.Resting = append(t.Resting, Rest{Address: e.Address, Since: now.Truncate(time.Second)})
	}
	return out
}

// Fresh returns the lowest address that was never used.
func (t *Table) Fresh(usable func(netip.Addr) bool) (netip.Addr, bool) {
	resting := map[netip.Addr]bool{}
	for _, r := range t.Resting {
		resting[r.Address] = true
	}
	i := 0
	for a := t.CIDR.Addr(); a.IsValid() && t.CIDR.Contains(a); a = a.Next() {
		if i < len(t.Entries) && t.Entries[i].Address == a {
			i++
			continue
		}
		if !resting[a] && usable(a) {
			return a, true
		}
	}
	return netip.Addr{}, false
}

// Rested returns the address that was released longest ago, if not after the given time.
func (t *Table) Rested(until time.Time, usable func(netip.Addr) bool) (Rest, bool) {
	for _, r := range t.Resting {
		if r.Since.After(until) {
			break
		}
		if usable(r.Address) {
			return r, true
		}
	}
	return Rest{}, false
}

// Usage has the counts of a table's addresses.
type Usage struct {
	Used    int
	Fresh   int
	Resting int
	Oldest  time.Time // of the resting
}

// Free returns the number of addresses that could be allocated, including cooling ones.
func (u Usage) Free() int { return u.Fresh + u.Resting }

// Usage returns the counts. Addresses that are not usable count as neither fresh nor resting.
func (t *Table) Usage(usable func(netip.Addr) bool) Usage {
	u := Usage{Used: len(t.Entries)}
	for _, r := range t.Resting {
		if usable(r.Address) {
			if u.Resting == 0 {
				u.Oldest = r.Since
			}
			u.Resting++
		}
	}
	i := 0
	for a := t.CIDR.Addr(); a.IsValid() && t.CIDR.Contains(a); a = a.Next() {
		if i < len(t.Entries) && t.Entries[i].Address == a {
			i++
		} else if usable(a) {
			u.Fresh++
		}
	}
	u.Fresh -= u.Resting
	return u
}

// The stored form lists each host and boot id once, because container ids are long enough.
type wireTable struct {
	Next    uint64      `json:"next"`
	Owners  [][]string  `json:"owners,omitempty"` // host, boot id, and the state directory unless it is the default
	Entries []wireEntry `json:"entries,omitempty"`
	Resting []wireRest  `json:"resting,omitempty"`
}

type wireEntry struct {
	Address  netip.Addr `json:"a"`
	ID       string     `json:"id"`
	IfName   string     `json:"if"`
	Owner    int        `json:"o"`
	Sequence uint64     `json:"s"`
	Created  int64      `json:"c,omitempty"` // Unix seconds
}

type wireRest struct {
	Address netip.Addr `json:"a"`
	Since   int64      `json:"t"` // Unix seconds
}

// MarshalJSON writes the stored form.
func (t *Table) MarshalJSON() ([]byte, error) {
	w := wireTable{Next: t.Next, Entries: make([]wireEntry, 0, len(t.Entries)),
		Resting: make([]wireRest, 0, len(t.Resting))}
	var owners []Owner
	for _, e := range t.Entries {
		at := slices.Index(owners, e.Owner)
		if at < 0 {
			at, owners = len(owners), append(owners, e.Owner)
			o := []string{e.Owner.Host, e.Owner.BootID}
			if e.Owner.StateDir != "" {
				o = append(o, e.Owner.StateDir)
			}
			w.Owners = append(w.Owners, o)
		}
		w.Entries = append(w.Entries, wireEntry{e.Address, e.ID.ContainerID, e.ID.IfName, at, e.Sequence, unix(e.Created)})
	}
	for _, r := range t.Resting {
		w.Resting = append(w.Resting, wireRest{r.Address, unix(r.Since)})
	}
	return json.Marshal(w)
}

// Decode reads the stored form of the table with that prefix. It refuses tables that MarshalJSON
// would not have written: entries outside the prefix, twice, or without an owner.
func Decode(cidr netip.Prefix, data []byte) (*Table, error) {
	var w wireTable
	if err := json.Unmarshal(data, &w); err != nil {
		return nil, fmt.Errorf("address table %s: %w", cidr, err)
	}
	t := &Table{CIDR: cidr, Next: w.Next, Entries: make([]Entry, 0, len(w.Entries))}
	for _, e := range w.Entries {
		if e.Owner < 0 || e.Owner >= len(w.Owners) || len(w.Owners[e.Owner]) < 2 {
			return nil, fmt.Errorf("address table %s: %s has no owner", cidr, e.Address)
		}
		o := w.Owners[e.Owner]
		owner := Owner{Host: o[0], BootID: o[1]}
		if len(o) > 2 {
			owner.StateDir = o[2]
		}
		if !t.Take(Entry{e.Address, metadata.AttachmentID{ContainerID: e.ID, IfName: e.IfName}, owner, e.Sequence,
			moment(e.Created)}) {
			return nil, fmt.Errorf("address table %s: %s is outside or listed twice", cidr, e.Address)
		}
	}
	for _, r := range w.Resting {
		_, used := t.find(r.Address)
		if used || !cidr.Contains(r.Address) ||
			slices.ContainsFunc(t.Resting, func(x Rest) bool { return x.Address == r.Address }) {
			return nil, fmt.Errorf("address table %s: resting %s is outside, in use, or listed twice", cidr, r.Address)
		}
		t.Resting = append(t.Resting, Rest{r.Address, moment(r.Since)})
	}
	return t, nil
}

func unix(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

func moment(s int64) time.Time {
	if s == 0 {
		return time.Time{}
	}
	return time.Unix(s, 0).UTC()
}
