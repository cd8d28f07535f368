package server

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/allocate"
	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// maxBatch bounds how long a request waits for those it shares a write with.
const maxBatch = 512

// allocator keeps this host's address tables of one network. All that changes them goes through its queue:
// while one write is under way, whatever arrives waits and shares the next one, so a burst of requests costs
// a few durable writes, and no two requests of this host ever compete for a table. Other hosts may (they
// borrow); then the write's condition fails, the table is read again, and those requests are planned once
// more.
type allocator struct {
	s       *Server
	network string

	// queue, running; the runner writes tables, held, loaded and gen under it, others read them under it
	mu      sync.Mutex
	queue   []*request
	running bool
	tables  map[netip.Prefix]*cachedTable
	held    map[metadata.AttachmentID][]netip.Prefix // tables with entries of this host's attachment
	loaded  bool
	gen     uint64 // of the view that it followed last

	// Of the runner alone.
	resyncPending bool // some table is stale
	sequence      uint64
	full          time.Time // other hosts' blocks were all looked through and found full
	hint          map[bool]*cachedTable
}

// cached is one table and what is known about it.
type cachedTable struct {
	cidr     netip.Prefix
	own      bool // of a block of this host
	table    *allocate.Table
	revision int64 // 0: not stored
	stale    bool  // must be read again before use
	seen     time.Time
	corrupt  error // the stored table cannot be used, so nothing of it is given out

	noneUnused bool // no fresh address at generation gen
	gen        uint64

	usage      allocate.Usage // of counted at countedGen
	counted    *allocate.Table
	countedGen uint64
}

type requestKind int

const (
	requestAttach requestKind = iota
	requestRelease
	requestGC
	requestTidy
	requestJoin
)

// request is one request in the queue.
type request struct {
	ctx      context.Context
	kind     requestKind
	req      *metadata.AttachRequest
	want     []netip.Addr // addresses that must be given
	assigned bool         // by the model, which may name addresses outside of the subnets
	id       metadata.AttachmentID
	sequence uint64
	valid    map[metadata.AttachmentID]bool
	empty    time.Time // requestTidy: blocks empty since before it are given back

	tries int
	taken []uint64 // attach: sequence numbers it used
	done  chan struct{}

	entries  []allocate.Entry // attach: what it holds now
	released []allocate.Entry
	err      error
}

// plan of one op within a batch: applied to memory only once its tables are written.
type result struct {
	request    *request
	touched    map[netip.Prefix]bool
	containers map[string]func(*metadata.Container) bool // by key: how it changes the object
	announced  []netip.Addr
	freed      map[netip.Prefix][]allocate.Entry // by table
	failure    error                             // the op fails with it once its earlier half is undone
}

// batch is the work between two writes.
type batch struct {
	b          *allocator
	net        metadata.Network
	now        time.Time
	work       map[netip.Prefix]*allocate.Table
	base       map[netip.Prefix]int64         // revision of the table that work was copied from: what its write depends on
	containers map[string]*metadata.Container // nil value: delete
	revisions  map[string]int64
	results    []*result
	pending    map[metadata.AttachmentID][]netip.Prefix // tables in which this batch took something for it
}

func newAllocator(s *Server, network string) *allocator {
	return &allocator{s: s, network: network, tables: map[netip.Prefix]*cachedTable{},
		held: map[metadata.AttachmentID][]netip.Prefix{}, hint: map[bool]*cachedTable{}}
}

// do queues a request and waits for its end. When the context ends first, whether it was done is unknown; asking again
// tells.
func (b *allocator) do(o *request) error {
	o.done = make(chan struct{})
	b.mu.Lock()
	b.queue = append(b.queue, o)
	if !b.running {
		b.running = true
		go b.run()
	}
	b.mu.Unlock()
	select {
	case <-o.done:
		return o.err
	case <-o.ctx.Done():
		return fmt.Errorf("%w: network %s in %s: %w", store.ErrUnavailable, b.network, b.s.store.Where(),
			context.Cause(o.ctx))
	}
}

func (b *allocator) run() {
	for {
		b.mu.Lock()
		ops := b.queue[:min(len(b.queue), maxBatch)]
		b.queue = b.queue[len(ops):]
		if len(ops) == 0 {
			b.running = false
			b.mu.Unlock()
			return
		}
		b.mu.Unlock()
		again := b.batch(ops)
		b.mu.Lock()
		b.queue = append(again, b.queue...)
		b.mu.Unlock()
	}
}

func (o *request) finish(err error) {
	o.err = err
	close(o.done)
}

// batch plans, writes, and answers. It returns what must be planned once more.
func (b *allocator) batch(ops []*request) (again []*request) {
	ops = slices.DeleteFunc(ops, func(o *request) bool {
		if o.ctx.Err() != nil {
			o.finish(o.ctx.Err())
			return true
		}
		return false
	})
	if len(ops) == 0 {
		return nil
	}
	// The store's work is bounded by the request that has the longest to go; the others answer by their own deadlines.
	var deadline time.Time
	for _, o := range ops {
		if d, ok := o.ctx.Deadline(); ok && d.After(deadline) {
			deadline = d
		}
	}
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()

	fail := func(err error) []*request {
		for _, o := range ops {
			o.finish(err)
		}
		return nil
	}
	net, gen, ok := b.s.view.network(b.network)
	if !ok {
		return fail(b.s.unknownNetwork(b.network))
	}
	if err := b.sync(ctx, net, gen); err != nil {
		return fail(err)
	}
	p := &batch{b: b, net: net, now: b.s.now(), work: map[netip.Prefix]*allocate.Table{},
		base: map[netip.Prefix]int64{}, containers: map[string]*metadata.Container{}, revisions: map[string]int64{},
		pending: map[metadata.AttachmentID][]netip.Prefix{}}
	for _, o := range ops {
		out := &result{request: o, touched: map[netip.Prefix]bool{}, containers: map[string]func(*metadata.Container) bool{},
			freed: map[netip.Prefix][]allocate.Entry{}}
		if err := p.plan(ctx, out); err != nil {
			b.deleteHostRoutes(ctx, out.announced)
			out.announced, out.failure = nil, err
			if o.kind == requestAttach { // all families or none: what an earlier try wrote goes back
				half := slices.DeleteFunc(p.mine(o.id),
					func(e allocate.Entry) bool { return !slices.Contains(o.taken, e.Sequence) })
				p.planRelease(out, o.id, half, 0)
			}
		}
		if len(out.touched) == 0 && len(out.containers) == 0 {
			o.finish(out.failure)
			continue
		}
		p.results = append(p.results, out)
	}
	if len(p.results) == 0 {
		return nil
	}
	return p.commit(ctx)
}

// commit writes the batch's tables and containers at once and tells each op how it went.
func (p *batch) commit(ctx context.Context) (again []*request) {
	b := p.b
	var changes []store.Change
	var order []netip.Prefix
	for cidr, t := range p.work {
		order = append(order, cidr)
		ch := store.Change{Key: entry.TableKey(b.network, cidr), Revision: p.base[cidr]}
		if len(t.Entries) > 0 || !cidr.IsSingleIP() || p.inside(cidr.Addr()) {
			data, err := json.Marshal(t)
			if err != nil {
				panic(err) // strings and numbers only
			}
			ch.Value = data
		}
		changes = append(changes, ch)
	}
	var keys []string
	for key, c := range p.containers {
		ch := store.Change{Key: entry.ContainerPrefix + key, Revision: p.revisions[key]}
		if c != nil {
			data, err := json.Marshal(c)
			if err != nil {
				panic(err)
			}
			ch.Value = data
		}
		keys = append(keys, key)
		changes = append(changes, ch)
	}
	results := b.s.store.Write(ctx, changes...)

	failed := map[netip.Prefix]error{}
	b.mu.Lock()
	for i, cidr := range order {
		l := b.tables[cidr]
		if err := results[i].Err; err != nil {
			failed[cidr], l.stale, b.resyncPending = err, true, true
			continue
		}
		revision := results[i].Revision
		if changes[i].Value == nil {
			revision = 0
		}
		b.install(l, p.work[cidr], revision)
	}
	b.mu.Unlock()
	behind := map[string]error{}
	for i, key := range keys {
		r := results[len(order)+i]
		if r.Err == nil {
			b.s.containers.wrote(changes[len(order)+i], r.Revision)
		} else {
			behind[key] = r.Err
		}
	}
	for _, out := range p.results {
		o := out.request
		var conflict bool
		var err error
		for cidr := range out.touched {
			switch e := failed[cidr]; {
			case errors.Is(e, store.ErrConflict):
				conflict = true
			case e != nil:
				err = e
			}
		}
		// Endpoints follow what was written, table by table: of two families one may have been, and the other not.
		var gone []netip.Addr
		for cidr, entries := range out.freed {
			if failed[cidr] != nil {
				continue
			}
			o.released = append(o.released, entries...)
			for _, e := range entries {
				if l := b.tables[cidr]; !l.own {
					// not taken again in this batch
					if now, ok := l.table.Entry(e.Address); !ok || now.Owner.Host != b.s.cfg.HostName {
						gone = append(gone, e.Address)
					}
				}
			}
		}
		for _, a := range out.announced {
			if errors.Is(failed[allocate.TableFor(p.net, a)], store.ErrConflict) {
				gone = append(gone, a)
			}
		}
		b.deleteHostRoutes(ctx, gone)
		for key, change := range out.containers {
			// Somebody else changed the container's object: rare, so it may cost another write.
			e := behind[key]
			if errors.Is(e, store.ErrConflict) && !conflict && err == nil {
				e = b.s.changeContainer(ctx, key, change)
			}
			if e != nil && err == nil && !errors.Is(e, store.ErrConflict) {
				err = e
			}
		}
		switch {
		case err != nil:
			o.finish(err)
		case conflict:
			if o.tries++; o.tries > 100 {
				o.finish(fmt.Errorf("%w: network %s: other hosts keep changing the same addresses", store.ErrUnavailable,
					b.network))
				continue
			}
			again = append(again, o)
		default:
			o.finish(out.failure)
		}
	}
	return again
}

// install makes a written or read table the current one. The caller holds mu.
func (b *allocator) install(l *cachedTable, t *allocate.Table, revision int64) {
	mine := func(t *allocate.Table) map[metadata.AttachmentID]bool {
		ids := map[metadata.AttachmentID]bool{}
		if t != nil {
			for _, e := range t.Entries {
				if e.Owner.Host == b.s.cfg.HostName {
					ids[e.ID] = true
				}
			}
		}
		return ids
	}
	old, now := mine(l.table), mine(t)
	for id := range old {
		if !now[id] {
			b.held[id] = slices.DeleteFunc(b.held[id], func(p netip.Prefix) bool { return p == l.cidr })
			if len(b.held[id]) == 0 {
				delete(b.held, id)
			}
		}
	}
	for id := range now {
		if !old[id] {
			b.held[id] = append(b.held[id], l.cidr)
		}
	}
	l.table, l.revision, l.stale, l.noneUnused, l.corrupt = t, revision, false, false, nil
}

// read brings ledgers up to date, many at a time.
func (b *allocator) read(ctx context.Context, list []*cachedTable) error {
	type result struct {
		l        *cachedTable
		t        *allocate.Table
		revision int64
		err      error
	}
	results := make([]result, len(list))
	var wg sync.WaitGroup
	limit := make(chan struct{}, 16)
	for i, l := range list {
		if len(list) == 1 {
			t, rev, err := entry.ReadTable(ctx, b.s.store, b.network, l.cidr)
			results[i] = result{l, t, rev, err}
			break
		}
		limit <- struct{}{}
		wg.Go(func() {
			t, rev, err := entry.ReadTable(ctx, b.s.store, b.network, l.cidr)
			results[i] = result{l, t, rev, err}
			<-limit
		})
	}
	wg.Wait()
	b.mu.Lock()
	defer b.mu.Unlock()
	var errs []error
	for _, r := range results {
		var spoilt *entry.CorruptTable
		if errors.As(r.err, &spoilt) {
			b.s.log.Error("address table left out", "network", b.network, "error", spoilt)
			b.install(r.l, &allocate.Table{CIDR: r.l.cidr}, r.revision)
			r.l.seen, r.l.corrupt = b.s.now(), spoilt
			continue
		}
		if r.err != nil {
			r.l.stale, b.resyncPending = true, true
			errs = append(errs, r.err)
			continue
		}
		b.install(r.l, r.t, r.revision)
		r.l.seen = b.s.now()
		b.sequence = max(b.sequence, r.t.Next)
	}
	return errors.Join(errs...)
}

// cached returns a table, read from the store when it is not cached.
func (b *allocator) cached(ctx context.Context, cidr netip.Prefix, own bool) (*cachedTable, error) {
	l := b.tables[cidr]
	if l == nil {
		l = &cachedTable{cidr: cidr, own: own, stale: true}
		b.mu.Lock()
		b.tables[cidr] = l
		b.mu.Unlock()
	}
	if l.stale {
		if err := b.read(ctx, []*cachedTable{l}); err != nil {
			return nil, err
		}
	}
	return l, nil
}

// sync follows the view: blocks that this host won or lost. The first call reads all tables, and mends what a killed
// process left half done.
func (b *allocator) sync(ctx context.Context, net metadata.Network, gen uint64) error {
	if b.loaded && gen == b.gen {
		if !b.resyncPending {
			return nil
		}
		b.resyncPending = false
		var stale []*cachedTable
		for _, l := range b.tables {
			if l.stale {
				stale = append(stale, l)
			}
		}
		if len(stale) == 0 {
			return nil
		}
		return b.read(ctx, stale)
	}
	b.s.view.mu.RLock()
	revision := b.s.view.revision
	b.s.view.mu.RUnlock()
	want := map[netip.Prefix]bool{}
	for _, blk := range b.s.view.ownBlocks(b.network) {
		for _, cidr := range allocate.TablesOf(blk.CIDR) {
			want[cidr] = true
		}
	}
	var missing []*cachedTable
	b.mu.Lock()
	for cidr := range want {
		l := b.tables[cidr]
		if l == nil {
			l = &cachedTable{cidr: cidr, stale: true}
			b.tables[cidr] = l
		}
		l.own = true
		if l.stale {
			missing = append(missing, l)
		}
	}
	lost := false
	for cidr, l := range b.tables {
		if !want[cidr] && l.own {
			l.own, l.stale, lost = false, true, true // somebody removed the block; its entries may be gone with it
			missing = append(missing, l)
		}
	}
	b.mu.Unlock()
	b.hint = map[bool]*cachedTable{}

	if !b.loaded {
		// Sequence numbers never come back, not even after a block was given back and its table with them: each stored
		// revision covers fewer than 256 of them.
		b.sequence = max(b.sequence, uint64(revision)<<8)
		single := map[netip.Addr]bool{}
		for _, a := range b.s.view.endpointsOf(b.network, b.s.cfg.HostName) {
			single[a] = true
		}
		for _, addrs := range b.s.containers.attachments(b.network) {
			for _, a := range addrs {
				single[a] = true
			}
		}
		for a := range single {
			cidr := allocate.TableFor(net, a)
			l := b.tables[cidr]
			if l == nil {
				l = &cachedTable{cidr: cidr, stale: true}
				b.mu.Lock()
				b.tables[cidr] = l
				b.mu.Unlock()
			}
			if l.stale && !slices.Contains(missing, l) {
				missing = append(missing, l)
			}
		}
	}
	for _, l := range b.tables {
		if l.stale && !slices.Contains(missing, l) {
			missing = append(missing, l)
		}
	}
	b.resyncPending = false
	if err := b.read(ctx, missing); err != nil {
		return err
	}
	if !b.loaded || lost {
		if err := b.repairHostRoutes(ctx, net); err != nil {
			return err
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.loaded, b.gen = true, gen
	return nil
}

// repairHostRoutes makes endpoints agree with tables: an address is announced before it is recorded and
// withdrawn after it is released, so what a killed process leaves is an endpoint too many, never one too few.
// One that somebody removed by hand is published again. Containers' objects lose the interfaces of which no
// table knows any more.
func (b *allocator) repairHostRoutes(ctx context.Context, net metadata.Network) error {
	announced := map[netip.Addr]bool{}
	for _, a := range b.s.view.endpointsOf(b.network, b.s.cfg.HostName) {
		announced[a] = true
	}
	var changes []store.Change
	for _, l := range b.tables {
		for _, e := range l.table.Entries {
			if e.Owner.Host == b.s.cfg.HostName && !l.own && !announced[e.Address] {
				changes = append(changes, b.hostRoute(e.Address))
			}
		}
	}
	for a := range announced {
		if l := b.tables[allocate.TableFor(net, a)]; l != nil && !l.own && l.corrupt == nil {
			if e, ok := l.table.Entry(a); !ok || e.Owner.Host != b.s.cfg.HostName {
				changes = append(changes, store.Change{Key: entry.HostRouteKey(b.network, a), Revision: store.Any})
			}
		}
	}
	for _, r := range b.s.store.Write(ctx, changes...) {
		if r.Err != nil && !errors.Is(r.Err, store.ErrConflict) {
			return r.Err
		}
	}
	for id, addrs := range b.s.containers.attachments(b.network) {
		unread := func(a netip.Addr) bool { l := b.tables[allocate.TableFor(net, a)]; return l == nil || l.corrupt != nil }
		if slices.ContainsFunc(addrs, unread) || len(b.held[id]) > 0 {
			continue
		}
		b.s.log.Info("attachment removed: no address table has it", "network", b.network, "attachment", id)
		err := b.s.changeContainer(ctx, b.s.cfg.HostName+"/"+id.ContainerID, func(c *metadata.Container) bool {
			return c.Detach(b.network, id.IfName)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (b *allocator) hostRoute(a netip.Addr) store.Change {
	data, _ := json.Marshal(metadata.HostRoute{Network: b.network, Address: a, Host: b.s.cfg.HostName})
	return store.Change{Key: entry.HostRouteKey(b.network, a), Value: data}
}

// deleteHostRoutes removes endpoints. A failure is no error of the caller: mend does it at the next start.
func (b *allocator) deleteHostRoutes(ctx context.Context, addrs []netip.Addr) {
	if len(addrs) == 0 {
		return
	}
	var changes []store.Change
	for _, a := range addrs {
		changes = append(changes, store.Change{Key: entry.HostRouteKey(b.network, a), Revision: store.Any})
	}
	for i, r := range b.s.store.Write(ctx, changes...) {
		if r.Err != nil {
			b.s.log.Warn("endpoint left behind", "network", b.network, "address", addrs[i], "error", r.Err)
		}
	}
}

// table returns the working copy of a table.
func (p *batch) table(l *cachedTable) *allocate.Table {
	t := p.work[l.cidr]
	if t == nil {
		t = l.table.Clone()
		p.work[l.cidr], p.base[l.cidr] = t, l.revision
	}
	return t
}

// peek returns the table as the batch has it so far, not to be changed.
func (p *batch) peek(l *cachedTable) *allocate.Table {
	if t := p.work[l.cidr]; t != nil {
		return t
	}
	return l.table
}

// mine lists the entries of this host's attachment, those of earlier ops in the batch included.
func (p *batch) mine(id metadata.AttachmentID) []allocate.Entry {
	var out []allocate.Entry
	collect := func(t *allocate.Table) {
		for _, e := range t.Entries {
			if e.ID == id && e.Owner.Host == p.b.s.cfg.HostName {
				out = append(out, e)
			}
		}
	}
	tables := p.b.held[id]
	for _, cidr := range p.pending[id] {
		if !slices.Contains(tables, cidr) {
			tables = append(tables[:len(tables):len(tables)], cidr)
		}
	}
	for _, cidr := range tables {
		collect(p.peek(p.b.tables[cidr]))
	}
	slices.SortFunc(out, func(a, b allocate.Entry) int { return a.Address.Compare(b.Address) })
	return out
}

// inside reports whether a subnet of the network holds the address.
func (p *batch) inside(a netip.Addr) bool {
	return slices.ContainsFunc(p.net.Subnets, func(s netip.Prefix) bool { return s.Contains(a) })
}

func (p *batch) rules(subnet netip.Prefix) allocate.Rules {
	r := allocate.Rules{Subnet: subnet, Holder: func(a netip.Addr) string { return p.b.s.view.holder(p.b.network, a) }}
	for _, s := range p.net.Exclude {
		if x, err := metadata.ParseRange(s); err == nil {
			r.Exclude = append(r.Exclude, x)
		}
	}
	return r
}

func (p *batch) plan(ctx context.Context, out *result) error {
	switch out.request.kind {
	case requestAttach:
		return p.planAttach(ctx, out)
	case requestRelease:
		p.planRelease(out, out.request.id, p.mine(out.request.id), out.request.sequence)
	case requestGC:
		for id := range p.b.held {
			if !out.request.valid[id] {
				p.planRelease(out, id, p.mine(id), 0)
			}
		}
		for id := range p.b.s.containers.attachments(p.b.network) {
			if !out.request.valid[id] {
				p.planRelease(out, id, nil, 0)
			}
		}
	case requestJoin:
		return p.join(ctx)
	case requestTidy:
		return p.b.releaseEmptyBlocks(ctx, p.net, out.request.empty, p)
	}
	return nil
}

// planRelease frees entries of an attachment. With its last one the container's object loses the
// interface, also when a kill kept an earlier release from writing both.
func (p *batch) planRelease(out *result, id metadata.AttachmentID, entries []allocate.Entry, sequence uint64) {
	for _, e := range entries {
		if sequence != 0 && e.Sequence > sequence {
			continue
		}
		l := p.b.tables[allocate.TableFor(p.net, e.Address)]
		t := p.table(l)
		out.touched[l.cidr] = true
		out.freed[l.cidr] = append(out.freed[l.cidr],
			t.Release(p.now, func(x allocate.Entry) bool { return x.Address == e.Address && x.ID == e.ID })...)
	}
	key := p.b.s.cfg.HostName + "/" + id.ContainerID
	if c, _ := p.container(key); c == nil || !c.Attached(p.b.network, id.IfName) || len(p.mine(id)) > 0 {
		return
	}
	p.changeContainer(out, key, func(c *metadata.Container) bool { return c.Detach(p.b.network, id.IfName) })
}

// container returns a container's object as the batch has it so far, nil when there is none, and
// its revision in the store.
func (p *batch) container(key string) (*metadata.Container, int64) {
	if c, seen := p.containers[key]; seen {
		return c, p.revisions[key]
	}
	p.b.s.containers.mu.RLock()
	defer p.b.s.containers.mu.RUnlock()
	if h, ok := p.b.s.containers.objects[key]; ok {
		return &h.Container, h.revision
	}
	return nil, 0
}

// changeContainer changes a container's object within the batch, from what the cache knows of it.
func (p *batch) changeContainer(out *result, key string, change func(*metadata.Container) bool) {
	first := out.containers[key]
	out.containers[key] = change
	if first != nil { // of another interface
		out.containers[key] = func(c *metadata.Container) bool { first(c); return change(c) }
	}
	c, revision := p.container(key)
	p.revisions[key] = revision
	had := c != nil
	if c == nil {
		c = &metadata.Container{}
	}
	if change(c) {
		p.containers[key] = c
	} else if had {
		p.containers[key] = nil
	}
}

// candidate is an address chosen for an op, not yet taken.
type candidate struct {
	l *cachedTable
	a netip.Addr
}

func (p *batch) planAttach(ctx context.Context, out *result) error {
	o, b := out.request, p.b
	owner := allocate.Owner{Host: b.s.cfg.HostName, BootID: b.s.bootID, StateDir: o.req.StateDir}
	have := p.mine(o.id)
	for _, w := range o.want {
		for _, e := range have {
			if w.BitLen() == e.Address.BitLen() &&
				!slices.ContainsFunc(have, func(e allocate.Entry) bool { return e.Address == w }) {
				return metadata.Errorf(metadata.CodeConflict, "%s has %s on network %s already, %s was requested; release it first",
					o.id, e.Address, b.network, w)
			}
		}
	}
	// A half that an earlier try left (one of two families) is completed.
	var picks []candidate
	chosen := map[netip.Addr]bool{}
	family := map[int]bool{}
	for _, e := range have {
		family[e.Address.BitLen()] = true
	}
	for _, a := range o.want {
		if slices.ContainsFunc(have, func(e allocate.Entry) bool { return e.Address == a }) {
			continue
		}
		l, err := p.allocateRequested(ctx, out, a)
		if err != nil {
			return err
		}
		picks, chosen[a], family[a.BitLen()] = append(picks, candidate{l, a}), true, true
	}
	if !o.req.Foreign {
		for _, subnet := range p.net.Subnets {
			if family[subnet.Addr().BitLen()] {
				continue
			}
			l, a, err := p.allocate(ctx, out, subnet, chosen)
			if err != nil {
				return err
			}
			picks, chosen[a] = append(picks, candidate{l, a}), true
		}
	}
	if len(picks) > 0 || slices.ContainsFunc(have, func(e allocate.Entry) bool { return e.Owner != owner }) {
		b.sequence++
	}
	for _, e := range have {
		if e.Owner != owner { // the same container after a reboot
			l := b.tables[allocate.TableFor(p.net, e.Address)]
			p.table(l).Renew(e.Address, owner, b.sequence)
			out.touched[l.cidr] = true
		}
	}
	for _, x := range picks {
		p.table(x.l).Take(allocate.Entry{Address: x.a, ID: o.id, Owner: owner, Sequence: b.sequence,
			Created: p.now.UTC().Truncate(time.Second)})
		out.touched[x.l.cidr] = true
		p.pending[o.id] = append(p.pending[o.id], x.l.cidr)
	}
	if len(picks) > 0 {
		o.taken = append(o.taken, b.sequence)
	}
	o.entries = p.mine(o.id)

	h, known := b.s.containers.find(o.req.ContainerID, o.req.UUID)
	if known && h.ID == o.req.ContainerID && len(out.touched) == 0 && h.Attached(b.network, o.id.IfName) {
		return nil
	}
	var addresses []netip.Addr
	for _, e := range o.entries {
		addresses = append(addresses, e.Address)
	}
	base := metadata.Container{ID: o.req.ContainerID, Created: p.now.UTC().Truncate(time.Second)}
	from := metadata.ContainerKey(h.Container)
	if c, _ := p.container(from); known && h.ID != o.req.ContainerID && c != nil && len(c.Interfaces) == 0 {
		// A scheduler wrote the object for the UUID, before the container had an id: it moves. One
		// with attachments stays with them.
		base = *c
		base.ID, base.Written = o.req.ContainerID, true
		p.changeContainer(out, from, func(c *metadata.Container) bool { return len(c.Interfaces) > 0 })
	}
	p.changeContainer(out, b.s.cfg.HostName+"/"+o.req.ContainerID, func(c *metadata.Container) bool {
		if c.ID == "" {
			*c = base
		} else {
			c.Normalize()
		}
		c.Attach(b.s.cfg.HostName, b.network, o.req, addresses)
		return true
	})
	return nil
}

// heldBy is the refusal of an address.
func heldBy(network string, a netip.Addr, holder string) error {
	return metadata.Errorf(metadata.CodeHeld, "address %s on network %s is held by %s", a, network, holder)
}

// allocateRequested finds the table for an address that must be this one.
func (p *batch) allocateRequested(ctx context.Context, out *result, a netip.Addr) (*cachedTable, error) {
	o, b := out.request, p.b
	if holder := b.s.view.holder(b.network, a); holder != "" {
		// Another host's endpoint says no more than the host; its table, if any, names the attachment.
		if t, _, err := entry.ReadTable(ctx, b.s.store, b.network, allocate.TableFor(p.net, a)); err == nil {
			if e, ok := t.Entry(a); ok {
				holder = fmt.Sprintf("%s on host %s", e.ID, e.Owner.Host)
			}
		}
		return nil, heldBy(b.network, a, holder)
	}
	var subnet netip.Prefix
	for _, s := range p.net.Subnets {
		if s.Contains(a) {
			subnet = s
		}
	}
	if !subnet.IsValid() {
		if !o.req.Foreign && !o.assigned {
			return nil, metadata.Errorf(metadata.CodeInvalid, "address %s is outside of network %s, which has %v", a, b.network,
				p.net.Subnets)
		}
		if err := b.s.view.announceable(a); err != nil {
			return nil, metadata.Errorf(metadata.CodeInvalid, "%s", err)
		}
		return p.allocateBorrowed(ctx, out, a, allocate.TableFor(p.net, a))
	}
	if allocate.Edge(subnet, a) {
		return nil, metadata.Errorf(metadata.CodeInvalid, "address %s is the first or last of subnet %s, which no "+
			"container may have", a, subnet)
	}
	cidr := allocate.BlockOf(a, p.net.BlockSize(subnet))
	for {
		blk, claimed := b.s.view.block(b.network, cidr)
		if !claimed {
			var err error
			if blk, err = b.claim(ctx, p, subnet, cidr, []netip.Addr{a}); errors.Is(err, store.ErrConflict) {
				continue // the view knows by now whose it is
			} else if err != nil {
				return nil, err
			}
		}
		if blk.Host != b.s.cfg.HostName {
			if p.net.StrictAffinity && !o.req.Foreign && !o.assigned {
				return nil, metadata.Errorf(metadata.CodeHeld, "address %s lies in block %s of host %s, and network %s has "+
					"strictAffinity: a host uses its own blocks only",
					a, blk.CIDR, blk.Host, b.network)
			}
			return p.allocateBorrowed(ctx, out, a, allocate.TableOf(cidr, a))
		}
		l, err := b.cached(ctx, allocate.TableOf(cidr, a), true)
		if err != nil {
			return nil, err
		}
		if holder := b.s.view.holder(b.network, a); holder != "" {
			return nil, heldBy(b.network, a, holder)
		}
		if l.corrupt != nil {
			return nil, heldBy(b.network, a, "nobody knows whom: "+l.corrupt.Error())
		}
		if e, used := p.peek(l).Entry(a); used {
			return nil, heldBy(b.network, a, fmt.Sprintf("%s on host %s", e.ID, e.Owner.Host))
		}
		return l, nil
	}
}

// allocateBorrowed announces one address that no block of this host covers, and returns its table.
func (p *batch) allocateBorrowed(ctx context.Context, out *result, a netip.Addr,
	cidr netip.Prefix) (*cachedTable, error) {
	b := p.b
	if l := b.tables[cidr]; l != nil && p.work[cidr] == nil {
		l.stale, b.resyncPending = true, true // others write it
	}
	l, err := b.cached(ctx, cidr, false)
	if err != nil {
		return nil, err
	}
	if l.corrupt != nil {
		return nil, heldBy(b.network, a, "nobody knows whom: "+l.corrupt.Error())
	}
	if e, used := p.peek(l).Entry(a); used {
		return nil, heldBy(b.network, a, fmt.Sprintf("%s on host %s", e.ID, e.Owner.Host))
	}
	revision, err := store.One(ctx, b.s.store, b.hostRoute(a))
	if errors.Is(err, store.ErrConflict) {
		e, err := b.s.store.Get(ctx, entry.HostRouteKey(b.network, a))
		if err != nil {
			return nil, err
		}
		ep, err := entry.Decode[metadata.HostRoute](b.network+"/"+a.String(), e)
		if err != nil {
			return nil, heldBy(b.network, a, "nobody: its entry cannot be used: "+err.Error())
		}
		if ep.Host != b.s.cfg.HostName {
			return nil, heldBy(b.network, a, "a container on host "+ep.Host)
		}
		return l, nil
	}
	if err != nil {
		return nil, err
	}
	out.announced = append(out.announced, a)
	return l, b.s.view.wait(ctx, revision)
}

// allocate finds an address of a subnet.
func (p *batch) allocate(ctx context.Context, out *result, subnet netip.Prefix,
	chosen map[netip.Addr]bool) (*cachedTable, netip.Addr, error) {
	b, rules := p.b, p.rules(subnet)
	usable := func(a netip.Addr) bool { return !chosen[a] && rules.Usable(a) }
	// Own blocks, fresh.
	is4 := subnet.Addr().Is4()
	fresh := func(l *cachedTable) (netip.Addr, bool) {
		if !l.own || l.corrupt != nil || !subnet.Contains(l.cidr.Addr()) || l.noneUnused && l.gen == b.gen {
			return netip.Addr{}, false
		}
		t := p.peek(l)
		if 1<<min(l.cidr.Addr().BitLen()-l.cidr.Bits(), 30) <= len(t.Entries)+len(t.Resting) {
			return netip.Addr{}, false
		}
		a, ok := t.Fresh(usable)
		if !ok {
			l.noneUnused, l.gen = true, b.gen
		}
		return a, ok
	}
	if l := b.hint[is4]; l != nil {
		if a, ok := fresh(l); ok {
			return l, a, nil
		}
	}
	var best *cachedTable
	var address netip.Addr
	for _, l := range b.tables {
		if best != nil && best.cidr.Addr().Less(l.cidr.Addr()) {
			continue
		}
		if a, ok := fresh(l); ok {
			best, address = l, a
		}
	}
	if best != nil {
		b.hint[is4] = best
		return best, address, nil
	}
	// Own blocks, rested.
	if l, a, ok := p.oldestReleased(subnet, usable, p.now.Add(-p.net.Cooldown()), true); ok {
		return l, a, nil
	}
	// A new block.
	cidr, err := p.claimFreeBlock(ctx, subnet)
	if err != nil {
		return nil, netip.Addr{}, err
	}
	if cidr.IsValid() {
		for _, c := range allocate.TablesOf(cidr) {
			if l := b.tables[c]; l != nil {
				if a, ok := fresh(l); ok {
					b.hint[is4] = l
					return l, a, nil
				}
			}
		}
	}
	// Other hosts' blocks.
	if !p.net.StrictAffinity {
		if l, a, err := p.borrow(ctx, out, subnet, usable); err != nil || l != nil {
			return l, a, err
		}
	}
	// Cooling ones: better than a container that cannot start.
	if l, a, ok := p.oldestReleased(subnet, usable, p.now.Add(time.Hour), true); ok {
		b.s.log.Warn("address reused before its cooldown ended: no other is left", "network", b.network, "address", a)
		return l, a, nil
	}
	u := b.usage(p.net, subnet)
	return nil, netip.Addr{}, metadata.Errorf(metadata.CodeExhausted,
		"no address left in subnet %s of network %s for host %s: %d used and %d free in its blocks, %d of %d blocks "+
			"claimed by all hosts; widen the network, release what is unused (`lariat ip list`), or remove hosts that are gone",
		subnet, b.network, b.s.cfg.HostName, u.Used, u.Free, u.Blocks, allocate.Blocks(subnet, p.net.BlockSize(subnet)))
}

// inOrder is how many hosts a cluster may have for its blocks to be claimed from the start of the subnet on, so
// that they read like a list. Of more hosts each begins at a place of its own: when all claim at once, as on a new
// network, they would all compete for the same block, and each but one for the next.
const inOrder = 8

// claimFreeBlock claims a free block of a subnet; the zero Prefix when there is none.
func (p *batch) claimFreeBlock(ctx context.Context, subnet netip.Prefix) (netip.Prefix, error) {
	rules, bits := p.rules(subnet), p.net.BlockSize(subnet)
	// Who has them the view says, unless their entries cannot be used.
	lost := map[netip.Prefix]bool{}
	for try := 0; ; try++ {
		from := subnet.Masked().Addr()
		if p.b.s.view.hostCount() > inOrder {
			h := sha256.Sum256(fmt.Appendf(nil, "%s %s %d", p.b.s.cfg.HostName, subnet, try))
			from = allocate.Place(subnet, bits, binary.BigEndian.Uint64(h[:]))
		}
		cidr, ok := rules.FreeBlock(bits, from, func(c netip.Prefix) bool {
			_, claimed := p.b.s.view.block(p.b.network, c)
			return claimed || lost[c]
		})
		if !ok {
			return cidr, nil
		}
		if _, err := p.b.claim(ctx, p, subnet, cidr, nil); !errors.Is(err, store.ErrConflict) || ctx.Err() != nil {
			return cidr, err
		}
		lost[cidr] = true
	}
}

// join claims a first block of each subnet, for the sake of the gateway address in it.
func (p *batch) join(ctx context.Context) error {
	if p.net.Encapsulation == metadata.EncapNone {
		return nil // the LAN's router is the gateway
	}
	for _, subnet := range p.net.Subnets {
		if p.b.s.view.gateway(p.b.network, subnet).IsValid() {
			continue
		}
		cidr, err := p.claimFreeBlock(ctx, subnet)
		if err != nil {
			return err
		}
		if !cidr.IsValid() {
			return metadata.Errorf(metadata.CodeExhausted, "no free block left in subnet %s of network %s: host %s gets no "+
				"overlay address of its own; widen the network, or remove hosts that are gone",
				subnet, p.b.network, p.b.s.cfg.HostName)
		}
	}
	return nil
}

// oldestReleased finds the address that was released longest ago, not after until.
func (p *batch) oldestReleased(subnet netip.Prefix, usable func(netip.Addr) bool, until time.Time,
	own bool) (*cachedTable, netip.Addr, bool) {
	var best *cachedTable
	var rest allocate.Rest
	for _, l := range p.b.tables {
		if l.own != own || !subnet.Contains(l.cidr.Addr()) {
			continue
		}
		t := p.peek(l)
		if len(t.Resting) == 0 || best != nil && !t.Resting[0].Since.Before(rest.Since) &&
			!(t.Resting[0].Since.Equal(rest.Since) && l.cidr.Addr().Less(best.cidr.Addr())) {
			continue
		}
		if r, ok := t.Rested(until, usable); ok && (best == nil || r.Since.Before(rest.Since) || r.Since.Equal(rest.Since) &&
			l.cidr.Addr().Less(best.cidr.Addr())) {
			best, rest = l, r
		}
	}
	return best, rest.Address, best != nil
}

// claim makes a block this host's own.
func (b *allocator) claim(ctx context.Context, p *batch, subnet, cidr netip.Prefix,
	not []netip.Addr) (metadata.Block, error) {
	blk := metadata.Block{Network: b.network, CIDR: cidr, Host: b.s.cfg.HostName}
	if p.net.Encapsulation != metadata.EncapNone && !b.s.view.gateway(b.network, subnet).IsValid() {
		// An address that another host borrowed from the block before it was free is not taken for it.
		rules := p.rules(subnet)
		for _, c := range allocate.TablesOf(cidr)[:1] {
			if t, _, err := entry.ReadTable(ctx, b.s.store, b.network, c); err == nil {
				for _, e := range t.Entries {
					not = append(not, e.Address)
				}
			}
		}
		blk.Gateway, _ = rules.FirstUsable(cidr, not)
	}
	data, err := json.Marshal(blk)
	if err != nil {
		return blk, err
	}
	key := entry.BlockKey(b.network, blk.CIDR)
	revision, err := store.One(ctx, b.s.store, store.Change{Key: key, Value: data})
	if errors.Is(err, store.ErrConflict) {
		// Let the view learn who was faster.
		if e, gerr := b.s.store.Get(ctx, key); gerr == nil {
			if werr := b.s.view.wait(ctx, e.Revision); werr != nil {
				return blk, fmt.Errorf("%w: %w", store.ErrUnavailable, werr)
			}
		}
		return blk, err
	}
	if err != nil {
		return blk, err
	}
	if err := b.s.view.wait(ctx, revision); err != nil {
		return blk, fmt.Errorf("%w: %w", store.ErrUnavailable, err)
	}
	b.s.log.Info("block claimed", "network", b.network, "block", cidr, "gateway", blk.Gateway)
	var fresh []*cachedTable
	b.mu.Lock()
	for _, c := range allocate.TablesOf(cidr) {
		l := b.tables[c]
		if l == nil {
			l = &cachedTable{cidr: c}
			b.tables[c] = l
		}
		l.own = true
		if p.work[c] == nil {
			fresh = append(fresh, l)
		}
	}
	b.mu.Unlock()
	return blk, b.read(ctx, fresh)
}

// borrow finds a single address in another host's block.
func (p *batch) borrow(ctx context.Context, out *result, subnet netip.Prefix,
	usable func(netip.Addr) bool) (*cachedTable, netip.Addr, error) {
	b := p.b
	if p.now.Sub(b.full) < 2*time.Second && p.now.After(b.full) {
		return nil, netip.Addr{}, nil
	}
	blocks := b.s.view.blocksOf(b.network, func(x metadata.Block) bool {
		return x.Host != b.s.cfg.HostName &&
			subnet.Contains(x.CIDR.Addr())
	})
	cooled := p.now.Add(-p.net.Cooldown())
	for _, last := range []bool{false, true} {
		for _, blk := range allocate.BorrowOrder(blocks, b.s.cfg.HostName) {
			for _, cidr := range allocate.TablesOf(blk.CIDR) {
				if l := b.tables[cidr]; l != nil && p.work[cidr] == nil && p.now.Sub(l.seen) > time.Second {
					l.stale, b.resyncPending = true, true // its owner writes it
				}
				l, err := b.cached(ctx, cidr, false)
				if err != nil {
					return nil, netip.Addr{}, err
				}
				for tries := 0; tries < 8 && l.corrupt == nil; tries++ {
					a, ok := p.peek(l).Fresh(usable)
					if !ok {
						until := cooled
						if last {
							until = p.now.Add(time.Hour)
						}
						var r allocate.Rest
						if r, ok = p.peek(l).Rested(until, usable); ok {
							a = r.Address
						}
					}
					if !ok {
						break
					}
					l, err := p.allocateBorrowed(ctx, out, a, cidr)
					if metadata.IsCode(err, metadata.CodeHeld) {
						old := usable
						usable = func(x netip.Addr) bool { return x != a && old(x) }
						continue
					}
					return l, a, err
				}
			}
		}
	}
	b.full = p.now
	return nil, netip.Addr{}, nil
}

// usage counts a subnet's addresses.
func (b *allocator) usage(net metadata.Network, subnet netip.Prefix) metadata.SubnetUsage {
	b.mu.Lock()
	defer b.mu.Unlock()
	rules := (&batch{b: b, net: net}).rules(subnet)
	u := metadata.SubnetUsage{Subnet: subnet}
	_, gen, _ := b.s.view.network(b.network)
	for _, l := range b.tables {
		if !l.own || l.table == nil || l.corrupt != nil || !subnet.Contains(l.cidr.Addr()) {
			continue
		}
		if l.counted != l.table || l.countedGen != gen {
			l.usage, l.counted, l.countedGen = l.table.Usage(rules.Usable), l.table, gen
		}
		u.Used += l.usage.Used
		u.Free += l.usage.Free()
	}
	u.Blocks, _ = b.s.view.blockCount(b.network, subnet)
	u.BlocksFree = max(0, allocate.Blocks(subnet, net.BlockSize(subnet))-u.Blocks)
	return u
}

// releaseEmptyBlocks gives empty blocks back.
func (b *allocator) releaseEmptyBlocks(ctx context.Context, net metadata.Network, before time.Time, p *batch) error {
	for _, blk := range b.s.view.ownBlocks(b.network) {
		if blk.Gateway.IsValid() {
			continue
		}
		var empty []*cachedTable
		for _, c := range allocate.TablesOf(blk.CIDR) {
			l := b.tables[c]
			if l == nil || l.table == nil || l.corrupt != nil || p.work[c] != nil || len(l.table.Entries) > 0 {
				empty = nil
				break
			}
			if n := len(l.table.Resting); n > 0 && l.table.Resting[n-1].Since.After(before) {
				empty = nil
				break
			}
			empty = append(empty, l)
		}
		if empty == nil {
			continue
		}
		// The tables go first: a host that borrowed meanwhile makes this fail, and the block stays.
		var changes []store.Change
		for _, l := range empty {
			if l.revision != 0 {
				changes = append(changes, store.Change{Key: entry.TableKey(b.network, l.cidr), Revision: l.revision})
			}
			l.stale, b.resyncPending = true, true
		}
		if len(changes) > 0 {
			ok := true
			for _, r := range b.s.store.Write(ctx, changes...) {
				ok = ok && r.Err == nil
			}
			if !ok {
				continue
			}
		}
		revision, err := store.One(ctx, b.s.store, store.Change{Key: entry.BlockKey(b.network, blk.CIDR),
			Revision: store.Any})
		if err != nil {
			return err
		}
		if err := b.s.view.wait(ctx, revision); err != nil {
			return err
		}
		b.mu.Lock()
		for _, l := range empty {
			delete(b.tables, l.cidr)
		}
		b.mu.Unlock()
		b.hint = map[bool]*cachedTable{}
		b.s.log.Info("empty block given back", "network", b.network, "block", blk.CIDR)
	}
	return nil
}
