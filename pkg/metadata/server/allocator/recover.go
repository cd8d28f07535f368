package allocator

import (
	"context"
	"errors"
	"net/netip"
	"slices"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/allocate"
	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// sync makes the cache follow the view: blocks that this host won or lost. The first call reads all tables and
// repairs what a killed process left half done. Each call reads the stale tables again.
func (a *Allocator) sync(ctx context.Context, net metadata.Network, gen uint64) error {
	if a.loaded && gen == a.gen {
		if !a.resyncPending {
			return nil
		}
		a.resyncPending = false
		return a.read(ctx, a.staleTables())
	}
	revision := a.view.Revision()
	lost := a.followBlocks()
	if !a.loaded {
		// Sequence numbers never repeat, not even after a block and its tables were removed: each stored revision covers
		// fewer than 256 of them.
		a.sequence = max(a.sequence, uint64(revision)<<8)
		a.addTablesOutside(net)
	}
	a.resyncPending = false
	if err := a.read(ctx, a.staleTables()); err != nil {
		return err
	}
	if !a.loaded || lost {
		if err := a.repairHostRoutes(ctx, net); err != nil {
			return err
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.loaded, a.gen = true, gen
	return nil
}

// followBlocks adds the tables of blocks that this host has won, and disowns the tables of blocks that it has lost. It
// reports whether there are any of the latter.
func (a *Allocator) followBlocks() (lost bool) {
	own := map[netip.Prefix]bool{}
	for _, blk := range a.view.OwnBlocks(a.network) {
		for _, cidr := range allocate.TablesOf(blk.CIDR) {
			own[cidr] = true
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for cidr := range own {
		a.addTable(cidr).own = true
	}
	for cidr, t := range a.tables {
		if !own[cidr] && t.own {
			t.own, t.stale, lost = false, true, true // its entries may have been removed with the block
		}
	}
	a.hint = map[bool]*cachedTable{}
	return lost
}

// addTablesOutside adds the tables of this host's addresses outside of its blocks. Host routes and containers' objects
// name these addresses.
func (a *Allocator) addTablesOutside(net metadata.Network) {
	addrs := a.view.OwnHostRoutes(a.network)
	for _, of := range a.containers.Attachments(a.network) {
		addrs = append(addrs, of...)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, addr := range addrs {
		a.addTable(allocate.TableFor(net, addr))
	}
}

// repairHostRoutes makes host routes and containers' objects agree with the tables. An address is announced before it
// is recorded, and its host route is deleted after it is released. So a killed process leaves a host route too many,
// never one too few. A host route that somebody removed by hand is written again. A container's object loses the
// interfaces that no table lists.
func (a *Allocator) repairHostRoutes(ctx context.Context, net metadata.Network) error {
	announced := map[netip.Addr]bool{}
	for _, addr := range a.view.OwnHostRoutes(a.network) {
		announced[addr] = true
	}
	var changes []store.Change
	for _, t := range a.tables {
		for _, e := range t.table.Entries {
			if e.Owner.Host == a.host && !t.own && !announced[e.Address] {
				changes = append(changes, a.hostRoute(e.Address))
			}
		}
	}
	for addr := range announced {
		if t := a.tables[allocate.TableFor(net, addr)]; t != nil && !t.own && t.corrupt == nil {
			if e, ok := t.table.Entry(addr); !ok || e.Owner.Host != a.host {
				changes = append(changes, store.Change{Key: entry.HostRouteKey(a.network, addr), Revision: store.Any})
			}
		}
	}
	for _, r := range a.store.Write(ctx, changes...) {
		if r.Err != nil && !errors.Is(r.Err, store.ErrConflict) {
			return r.Err
		}
	}
	for id, addrs := range a.containers.Attachments(a.network) {
		unread := func(addr netip.Addr) bool {
			t := a.tables[allocate.TableFor(net, addr)]
			return t == nil || t.corrupt != nil
		}
		if slices.ContainsFunc(addrs, unread) || len(a.held[id]) > 0 {
			continue
		}
		a.log.Info("attachment removed: no address table has it", "network", a.network, "attachment", id)
		err := a.containers.Change(ctx, a.host+"/"+id.ContainerID, func(c *metadata.Container) bool {
			return c.Detach(a.network, id.IfName)
		})
		if err != nil {
			return err
		}
	}
	return nil
}
