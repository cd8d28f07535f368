package allocator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/allocate"
	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// batch is the work between two writes. It changes copies of tables and containers; the cache gets the copies once
// they are written.
type batch struct {
	a          *Allocator
	net        metadata.Network
	now        time.Time
	work       map[netip.Prefix]*allocate.Table
	base       map[netip.Prefix]int64         // revision of the table that work was copied from; the write requires it
	containers map[string]*metadata.Container // nil value: delete
	revisions  map[string]int64               // of the objects that containers were copied from
	results    []*result
	pending    map[metadata.AttachmentID][]netip.Prefix // tables in which this batch took an address for it
}

// result is the plan of one request within a batch.
type result struct {
	request    *request
	touched    map[netip.Prefix]bool
	containers map[string]func(*metadata.Container) bool // by key: how the request changes the object
	announced  []netip.Addr                              // host routes that the request wrote already
	freed      map[netip.Prefix][]allocate.Entry         // by table
	failure    error                                     // the answer, after the roll back of an earlier try's half
}

// newBatch brings the tables up to date and returns an empty batch.
func (a *Allocator) newBatch(ctx context.Context) (*batch, error) {
	net, gen, ok := a.view.Network(a.network)
	if !ok {
		return nil, a.view.Unknown(a.network)
	}
	if err := a.sync(ctx, net, gen); err != nil {
		return nil, err
	}
	return &batch{a: a, net: net, now: a.now(), work: map[netip.Prefix]*allocate.Table{},
		base: map[netip.Prefix]int64{}, containers: map[string]*metadata.Container{}, revisions: map[string]int64{},
		pending: map[metadata.AttachmentID][]netip.Prefix{}}, nil
}

// add plans a request. It answers at once when there is nothing to write.
func (b *batch) add(ctx context.Context, r *request) {
	res := &result{request: r, touched: map[netip.Prefix]bool{},
		containers: map[string]func(*metadata.Container) bool{}, freed: map[netip.Prefix][]allocate.Entry{}}
	if err := b.plan(ctx, res); err != nil {
		b.a.deleteHostRoutes(ctx, res.announced)
		res.announced, res.failure = nil, err
		if r.kind == requestAttach { // all families or none: roll back what an earlier try wrote
			half := slices.DeleteFunc(b.entriesOf(r.id),
				func(e allocate.Entry) bool { return !slices.Contains(r.taken, e.Sequence) })
			b.release(res, r.id, half, 0)
		}
	}
	if len(res.touched) == 0 && len(res.containers) == 0 {
		r.finish(res.failure)
		return
	}
	b.results = append(b.results, res)
}

func (b *batch) plan(ctx context.Context, res *result) error {
	switch r := res.request; r.kind {
	case requestAttach:
		return b.attach(ctx, res)
	case requestRelease:
		b.release(res, r.id, b.entriesOf(r.id), r.sequence)
	case requestGC:
		b.collectGarbage(res)
	case requestClaimFirst:
		return b.claimFirst(ctx)
	case requestReleaseEmpty:
		return b.releaseEmptyBlocks(ctx, r.before)
	}
	return nil
}

// edit returns the batch's copy of a table, which may be changed.
func (b *batch) edit(t *cachedTable) *allocate.Table {
	table := b.work[t.cidr]
	if table == nil {
		table = t.table.Clone()
		b.work[t.cidr], b.base[t.cidr] = table, t.revision
	}
	return table
}

// peek returns the table as the batch has it so far. The caller must not change it.
func (b *batch) peek(t *cachedTable) *allocate.Table {
	if table := b.work[t.cidr]; table != nil {
		return table
	}
	return t.table
}

// entriesOf returns the entries of this host's attachment, sorted by address. It includes the changes of earlier
// requests of the batch.
func (b *batch) entriesOf(id metadata.AttachmentID) []allocate.Entry {
	tables := b.a.held[id]
	for _, cidr := range b.pending[id] {
		if !slices.Contains(tables, cidr) {
			tables = append(tables[:len(tables):len(tables)], cidr)
		}
	}
	var out []allocate.Entry
	for _, cidr := range tables {
		for _, e := range b.peek(b.a.tables[cidr]).Entries {
			if e.ID == id && e.Owner.Host == b.a.host {
				out = append(out, e)
			}
		}
	}
	slices.SortFunc(out, byAddress)
	return out
}

func byAddress(x, y allocate.Entry) int { return x.Address.Compare(y.Address) }

// inSubnets reports whether a subnet of the network holds the address.
func (b *batch) inSubnets(addr netip.Addr) bool {
	return slices.ContainsFunc(b.net.Subnets, func(s netip.Prefix) bool { return s.Contains(addr) })
}

func (b *batch) rules(subnet netip.Prefix) allocate.Rules { return Rules(b.a.view, b.net, subnet) }

// container returns a container's object as the batch has it so far, and the object's revision in the store. It
// returns nil when there is none.
func (b *batch) container(key string) (*metadata.Container, int64) {
	if c, seen := b.containers[key]; seen {
		return c, b.revisions[key]
	}
	return b.a.containers.Get(key)
}

// changeContainer changes a container's object within the batch, starting from the cached object.
func (b *batch) changeContainer(res *result, key string, change func(*metadata.Container) bool) {
	first := res.containers[key]
	res.containers[key] = change
	if first != nil { // the request changes another interface of the container too
		res.containers[key] = func(c *metadata.Container) bool { first(c); return change(c) }
	}
	c, revision := b.container(key)
	b.revisions[key] = revision
	had := c != nil
	if c == nil {
		c = &metadata.Container{}
	}
	if change(c) {
		b.containers[key] = c
	} else if had {
		b.containers[key] = nil
	}
}

// failures are the writes of a batch that failed.
type failures struct {
	tables     map[netip.Prefix]error
	containers map[string]error // by key
}

// commit writes the batch's tables and containers at once and answers each request. It returns the requests that
// must be planned again.
func (b *batch) commit(ctx context.Context) (again []*request) {
	failed := b.write(ctx)
	for _, res := range b.results {
		if b.settle(ctx, res, failed) {
			again = append(again, res.request)
		}
	}
	return again
}

// write writes the batch's tables and containers in one call of the store, and updates both caches.
func (b *batch) write(ctx context.Context) failures {
	a := b.a
	cidrs, changes := b.tableChanges()
	keys, containers := b.containerChanges()
	changes = append(changes, containers...)
	results := a.store.Write(ctx, changes...)

	failed := failures{map[netip.Prefix]error{}, map[string]error{}}
	a.mu.Lock()
	for i, cidr := range cidrs {
		t := a.tables[cidr]
		if err := results[i].Err; err != nil {
			failed.tables[cidr], t.stale, a.resyncPending = err, true, true
			continue
		}
		revision := results[i].Revision
		if changes[i].Value == nil {
			revision = 0
		}
		a.install(t, b.work[cidr], revision)
	}
	a.mu.Unlock()
	for i, key := range keys {
		r := results[len(cidrs)+i]
		if r.Err == nil {
			a.containers.Wrote(changes[len(cidrs)+i], r.Revision)
		} else {
			failed.containers[key] = r.Err
		}
	}
	return failed
}

// tableChanges returns the writes of the batch's tables. An empty table of a single address outside of the subnets is
// deleted.
func (b *batch) tableChanges() (cidrs []netip.Prefix, changes []store.Change) {
	for cidr, table := range b.work {
		ch := store.Change{Key: entry.TableKey(b.a.network, cidr), Revision: b.base[cidr]}
		if len(table.Entries) > 0 || !cidr.IsSingleIP() || b.inSubnets(cidr.Addr()) {
			ch.Value = mustMarshal(table)
		}
		cidrs, changes = append(cidrs, cidr), append(changes, ch)
	}
	return cidrs, changes
}

func (b *batch) containerChanges() (keys []string, changes []store.Change) {
	for key, c := range b.containers {
		ch := store.Change{Key: entry.ContainerPrefix + key, Revision: b.revisions[key]}
		if c != nil {
			ch.Value = mustMarshal(c)
		}
		keys, changes = append(keys, key), append(changes, ch)
	}
	return keys, changes
}

// mustMarshal encodes tables and containers, which hold strings and numbers only.
func mustMarshal(v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return data
}

// maxTries bounds how often a request is planned again because other hosts changed the same tables.
const maxTries = 100

// settle answers a request after the write. It returns true instead when the request must be planned again.
func (b *batch) settle(ctx context.Context, res *result, failed failures) (again bool) {
	a, r := b.a, res.request
	var conflict bool
	var err error
	for cidr := range res.touched {
		switch e := failed.tables[cidr]; {
		case errors.Is(e, store.ErrConflict):
			conflict = true
		case e != nil:
			err = e
		}
	}
	for cidr, entries := range res.freed {
		if failed.tables[cidr] == nil {
			r.released = append(r.released, entries...)
		}
	}
	a.deleteHostRoutes(ctx, b.needlessHostRoutes(res, failed))
	for key, change := range res.containers {
		// A conflict means that another writer changed the container's object. That is rare, so another write is
		// acceptable.
		e := failed.containers[key]
		if errors.Is(e, store.ErrConflict) && !conflict && err == nil {
			e = a.containers.Change(ctx, key, change)
		}
		if e != nil && err == nil && !errors.Is(e, store.ErrConflict) {
			err = e
		}
	}
	switch {
	case err != nil:
		r.finish(err)
	case conflict:
		if r.tries++; r.tries <= maxTries {
			return true
		}
		r.finish(fmt.Errorf("%w: network %s: other hosts keep changing the same addresses", store.ErrUnavailable,
			a.network))
	default:
		r.finish(res.failure)
	}
	return false
}

// needlessHostRoutes returns the addresses of host routes that have no entry after the write: of released borrowed
// addresses, and of addresses that another host took. Each table counts alone, because the write of one family may
// succeed while the other's fails.
func (b *batch) needlessHostRoutes(res *result, failed failures) (out []netip.Addr) {
	for cidr, entries := range res.freed {
		t := b.a.tables[cidr]
		if failed.tables[cidr] != nil || t.own {
			continue
		}
		for _, e := range entries {
			// Another request of this batch may have taken the address again.
			if now, ok := t.table.Entry(e.Address); !ok || now.Owner.Host != b.a.host {
				out = append(out, e.Address)
			}
		}
	}
	for _, addr := range res.announced {
		if errors.Is(failed.tables[allocate.TableFor(b.net, addr)], store.ErrConflict) {
			out = append(out, addr)
		}
	}
	return out
}
