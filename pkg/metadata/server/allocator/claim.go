package allocator

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/allocate"
	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// inOrder is the largest number of hosts for which blocks are claimed from the start of the subnet, so that they read
// like a list. In a larger cluster each host begins at a place of its own. Otherwise all hosts of a new network would
// compete for the same block, and all but one of them for the next.
const inOrder = 8

// claimFreeBlock claims a free block of a subnet. It returns the zero Prefix when there is none.
func (b *batch) claimFreeBlock(ctx context.Context, subnet netip.Prefix) (netip.Prefix, error) {
	a, rules, bits := b.a, b.rules(subnet), b.net.BlockSize(subnet)
	// The view names the owners of blocks, except for blocks whose entries cannot be used.
	lost := map[netip.Prefix]bool{}
	for try := 0; ; try++ {
		from := subnet.Masked().Addr()
		if a.view.HostCount() > inOrder {
			h := sha256.Sum256(fmt.Appendf(nil, "%s %s %d", a.host, subnet, try))
			from = allocate.Place(subnet, bits, binary.BigEndian.Uint64(h[:]))
		}
		cidr, ok := rules.FreeBlock(bits, from, func(c netip.Prefix) bool {
			_, claimed := a.view.Block(a.network, c)
			return claimed || lost[c]
		})
		if !ok {
			return cidr, nil
		}
		if _, err := b.claim(ctx, subnet, cidr, nil); !errors.Is(err, store.ErrConflict) || ctx.Err() != nil {
			return cidr, err
		}
		lost[cidr] = true
	}
}

// claimFirst claims a first block of each subnet, for the gateway address in it.
func (b *batch) claimFirst(ctx context.Context) error {
	if b.net.Encapsulation == metadata.EncapNone {
		return nil // the LAN's router is the gateway
	}
	for _, subnet := range b.net.Subnets {
		if b.a.view.Gateway(b.a.network, subnet).IsValid() {
			continue
		}
		cidr, err := b.claimFreeBlock(ctx, subnet)
		if err != nil {
			return err
		}
		if !cidr.IsValid() {
			return metadata.Errorf(metadata.CodeExhausted, "no free block left in subnet %s of network %s: host %s gets no "+
				"overlay address of its own; widen the network, or remove hosts that are gone",
				subnet, b.a.network, b.a.host)
		}
	}
	return nil
}

// claim makes a block this host's own. The first block of a subnet gets a gateway, which is none of the addresses not.
// When another host was faster, claim returns store.ErrConflict once the view shows the other host's block.
func (b *batch) claim(ctx context.Context, subnet, cidr netip.Prefix, not []netip.Addr) (metadata.Block, error) {
	a := b.a
	blk := metadata.Block{Network: a.network, CIDR: cidr, Host: a.host}
	if b.net.Encapsulation != metadata.EncapNone && !a.view.Gateway(a.network, subnet).IsValid() {
		blk.Gateway = b.newGateway(ctx, subnet, cidr, not)
	}
	data, err := json.Marshal(blk)
	if err != nil {
		return blk, err
	}
	key := entry.BlockKey(a.network, cidr)
	revision, err := store.One(ctx, a.store, store.Change{Key: key, Value: data})
	if errors.Is(err, store.ErrConflict) {
		if e, gerr := a.store.Get(ctx, key); gerr == nil {
			if werr := a.view.Wait(ctx, e.Revision); werr != nil {
				return blk, fmt.Errorf("%w: %w", store.ErrUnavailable, werr)
			}
		}
		return blk, err
	}
	if err != nil {
		return blk, err
	}
	if err := a.view.Wait(ctx, revision); err != nil {
		return blk, fmt.Errorf("%w: %w", store.ErrUnavailable, err)
	}
	a.log.Info("block claimed", "network", a.network, "block", cidr, "gateway", blk.Gateway)
	var unread []*cachedTable
	a.mu.Lock()
	for _, c := range allocate.TablesOf(cidr) {
		t := a.addTable(c)
		t.own = true
		if b.work[c] == nil {
			unread = append(unread, t)
		}
	}
	a.mu.Unlock()
	return blk, a.read(ctx, unread)
}

// newGateway returns the first usable address of a block. It passes over addresses that another host borrowed from
// the block before the block was free.
func (b *batch) newGateway(ctx context.Context, subnet, cidr netip.Prefix, not []netip.Addr) netip.Addr {
	rules := b.rules(subnet)
	for _, c := range allocate.TablesOf(cidr)[:1] {
		if t, _, err := entry.ReadTable(ctx, b.a.store, b.a.network, c); err == nil {
			for _, e := range t.Entries {
				not = append(not, e.Address)
			}
		}
	}
	addr, _ := rules.FirstUsable(cidr, not)
	return addr
}

// releaseEmptyBlocks releases this host's blocks that have been empty since before the given time.
func (b *batch) releaseEmptyBlocks(ctx context.Context, before time.Time) error {
	a := b.a
	for _, blk := range a.view.OwnBlocks(a.network) {
		if blk.Gateway.IsValid() {
			continue
		}
		empty := b.emptyTables(blk, before)
		if empty == nil {
			continue
		}
		// The tables go first. A host that borrowed meanwhile makes this write fail, and the block stays.
		var changes []store.Change
		for _, t := range empty {
			if t.revision != 0 {
				changes = append(changes, store.Change{Key: entry.TableKey(a.network, t.cidr), Revision: t.revision})
			}
			a.markStale(t)
		}
		if len(changes) > 0 {
			ok := true
			for _, r := range a.store.Write(ctx, changes...) {
				ok = ok && r.Err == nil
			}
			if !ok {
				continue
			}
		}
		revision, err := store.One(ctx, a.store, store.Change{Key: entry.BlockKey(a.network, blk.CIDR),
			Revision: store.Any})
		if err != nil {
			return err
		}
		if err := a.view.Wait(ctx, revision); err != nil {
			return err
		}
		a.mu.Lock()
		for _, t := range empty {
			delete(a.tables, t.cidr)
		}
		a.mu.Unlock()
		a.hint = map[bool]*cachedTable{}
		a.log.Info("empty block given back", "network", a.network, "block", blk.CIDR)
	}
	return nil
}

// emptyTables returns the tables of a block, or nil unless all have been empty since before the given time.
func (b *batch) emptyTables(blk metadata.Block, before time.Time) (empty []*cachedTable) {
	for _, c := range allocate.TablesOf(blk.CIDR) {
		t := b.a.tables[c]
		if t == nil || t.table == nil || t.corrupt != nil || b.work[c] != nil || len(t.table.Entries) > 0 {
			return nil
		}
		if n := len(t.table.Resting); n > 0 && t.table.Resting[n-1].Since.After(before) {
			return nil
		}
		empty = append(empty, t)
	}
	return empty
}
