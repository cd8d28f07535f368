package allocator

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/allocate"
	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
)

// cachedTable is one address table in memory.
type cachedTable struct {
	cidr     netip.Prefix
	own      bool // belongs to a block of this host
	table    *allocate.Table
	revision int64 // 0: not stored
	stale    bool  // must be read again before use
	seen     time.Time
	corrupt  error // why the stored table cannot be used; then nothing of it is allocated

	noneUnused bool // no address was left unused at generation gen
	gen        uint64

	usage      allocate.Usage // of table counted at generation countedGen
	counted    *allocate.Table
	countedGen uint64
}

// install makes a table that was written or read the current one. The caller holds mu.
func (a *Allocator) install(t *cachedTable, table *allocate.Table, revision int64) {
	old, now := a.attachmentsIn(t.table), a.attachmentsIn(table)
	for id := range old {
		if !now[id] {
			a.held[id] = slices.DeleteFunc(a.held[id], func(p netip.Prefix) bool { return p == t.cidr })
			if len(a.held[id]) == 0 {
				delete(a.held, id)
			}
		}
	}
	for id := range now {
		if !old[id] {
			a.held[id] = append(a.held[id], t.cidr)
		}
	}
	t.table, t.revision, t.stale, t.noneUnused, t.corrupt = table, revision, false, false, nil
}

// attachmentsIn returns this host's attachments that have entries in a table.
func (a *Allocator) attachmentsIn(table *allocate.Table) map[metadata.AttachmentID]bool {
	ids := map[metadata.AttachmentID]bool{}
	if table != nil {
		for _, e := range table.Entries {
			if e.Owner.Host == a.host {
				ids[e.ID] = true
			}
		}
	}
	return ids
}

// readAtOnce bounds how many tables are read at the same time.
const readAtOnce = 16

// read reads tables from the store, many at a time.
func (a *Allocator) read(ctx context.Context, list []*cachedTable) error {
	type answer struct {
		table    *allocate.Table
		revision int64
		err      error
	}
	answers := make([]answer, len(list))
	readOne := func(i int) {
		table, revision, err := entry.ReadTable(ctx, a.store, a.network, list[i].cidr)
		answers[i] = answer{table, revision, err}
	}
	if len(list) == 1 {
		readOne(0)
	} else {
		var wg sync.WaitGroup
		limit := make(chan struct{}, readAtOnce)
		for i := range list {
			limit <- struct{}{}
			wg.Go(func() {
				readOne(i)
				<-limit
			})
		}
		wg.Wait()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	var errs []error
	for i, r := range answers {
		t := list[i]
		var corrupt *entry.CorruptTable
		if errors.As(r.err, &corrupt) {
			a.log.Error("address table left out", "network", a.network, "error", corrupt)
			a.install(t, &allocate.Table{CIDR: t.cidr}, r.revision)
			t.seen, t.corrupt = a.now(), corrupt
			continue
		}
		if r.err != nil {
			t.stale, a.resyncPending = true, true
			errs = append(errs, r.err)
			continue
		}
		a.install(t, r.table, r.revision)
		t.seen = a.now()
		a.sequence = max(a.sequence, r.table.Next)
	}
	return errors.Join(errs...)
}

// addTable returns the table of a prefix. A table that is not in the cache is added there as stale. The caller holds
// mu.
func (a *Allocator) addTable(cidr netip.Prefix) *cachedTable {
	t := a.tables[cidr]
	if t == nil {
		t = &cachedTable{cidr: cidr, stale: true}
		a.tables[cidr] = t
	}
	return t
}

// staleTables returns the tables that must be read again.
func (a *Allocator) staleTables() (stale []*cachedTable) {
	for _, t := range a.tables {
		if t.stale {
			stale = append(stale, t)
		}
	}
	return stale
}

// markStale makes the next use of a table read it again, or else the next batch. Another host may have written it.
func (a *Allocator) markStale(t *cachedTable) { t.stale, a.resyncPending = true, true }

// cached returns the table of a prefix. It reads the table from the store unless the cache has it.
func (a *Allocator) cached(ctx context.Context, cidr netip.Prefix, own bool) (*cachedTable, error) {
	t := a.tables[cidr]
	if t == nil {
		a.mu.Lock()
		t = a.addTable(cidr)
		t.own = own
		a.mu.Unlock()
	}
	if t.stale {
		if err := a.read(ctx, []*cachedTable{t}); err != nil {
			return nil, err
		}
	}
	return t, nil
}

// Holds reports whether an attachment of this host has an address.
func (a *Allocator) Holds(id metadata.AttachmentID) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.held[id]) > 0
}

// EntriesOf returns the entries of this host's attachment, sorted by address.
func (a *Allocator) EntriesOf(id metadata.AttachmentID) (out []allocate.Entry) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, cidr := range a.held[id] {
		for _, e := range a.tables[cidr].table.Entries {
			if e.ID == id && e.Owner.Host == a.host {
				out = append(out, e)
			}
		}
	}
	slices.SortFunc(out, byAddress)
	return out
}

// Entries returns all entries of this host, in no order.
func (a *Allocator) Entries() (out []allocate.Entry) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, t := range a.tables {
		if t.table == nil {
			continue
		}
		for _, e := range t.table.Entries {
			if e.Owner.Host == a.host {
				out = append(out, e)
			}
		}
	}
	return out
}

// Usage counts the addresses of a subnet in this host's blocks, and the blocks of all hosts.
func (a *Allocator) Usage(n metadata.Network, subnet netip.Prefix) metadata.SubnetUsage {
	a.mu.Lock()
	defer a.mu.Unlock()
	rules := Rules(a.view, n, subnet)
	u := metadata.SubnetUsage{Subnet: subnet}
	_, gen, _ := a.view.Network(a.network)
	for _, t := range a.tables {
		if !t.own || t.table == nil || t.corrupt != nil || !subnet.Contains(t.cidr.Addr()) {
			continue
		}
		if t.counted != t.table || t.countedGen != gen {
			t.usage, t.counted, t.countedGen = t.table.Usage(rules.Usable), t.table, gen
		}
		u.Used += t.usage.Used
		u.Free += t.usage.Free()
	}
	u.Blocks, _ = a.view.BlockCount(a.network, subnet)
	u.BlocksFree = max(0, allocate.Blocks(subnet, n.BlockSize(subnet))-u.Blocks)
	return u
}
