package allocator

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/allocate"
	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// borrow finds an address in another host's block: an unused one or one whose cooldown has ended, and only in a
// second pass one in its cooldown. It returns a nil table when there is none.
func (b *batch) borrow(ctx context.Context, res *result, subnet netip.Prefix,
	usable func(netip.Addr) bool) (*cachedTable, netip.Addr, error) {
	a := b.a
	if b.now.Sub(a.othersFull) < 2*time.Second && b.now.After(a.othersFull) {
		return nil, netip.Addr{}, nil
	}
	blocks := a.view.Blocks(a.network, func(x metadata.Block) bool {
		return x.Host != a.host && subnet.Contains(x.CIDR.Addr())
	})
	for _, until := range []time.Time{b.now.Add(-b.net.Cooldown()), b.now.Add(time.Hour)} {
		for _, blk := range allocate.BorrowOrder(blocks, a.host) {
			for _, cidr := range allocate.TablesOf(blk.CIDR) {
				// The block's owner writes the table, so an older copy is of little use.
				if t := a.tables[cidr]; t != nil && b.work[cidr] == nil && b.now.Sub(t.seen) > time.Second {
					a.markStale(t)
				}
				t, err := a.cached(ctx, cidr, false)
				if err != nil {
					return nil, netip.Addr{}, err
				}
				for tries := 0; tries < 8 && t.corrupt == nil; tries++ {
					addr, ok := borrowable(b.peek(t), until, usable)
					if !ok {
						break
					}
					t, err := b.borrowAddress(ctx, res, addr, cidr)
					if metadata.IsCode(err, metadata.CodeHeld) {
						others := usable
						usable = func(x netip.Addr) bool { return x != addr && others(x) }
						continue
					}
					return t, addr, err
				}
			}
		}
	}
	a.othersFull = b.now
	return nil, netip.Addr{}, nil
}

// borrowable finds an unused address of a table, or one that was released before until.
func borrowable(table *allocate.Table, until time.Time, usable func(netip.Addr) bool) (netip.Addr, bool) {
	if addr, ok := table.Fresh(usable); ok {
		return addr, true
	}
	r, ok := table.Rested(until, usable)
	return r.Address, ok
}

// borrowAddress announces an address that no block of this host covers with a host route, and returns the address's
// table.
func (b *batch) borrowAddress(ctx context.Context, res *result, addr netip.Addr,
	cidr netip.Prefix) (*cachedTable, error) {
	a := b.a
	if t := a.tables[cidr]; t != nil && b.work[cidr] == nil {
		a.markStale(t) // other hosts write it
	}
	t, err := a.cached(ctx, cidr, false)
	if err != nil {
		return nil, err
	}
	if err := b.refusal(t, addr); err != nil {
		return nil, err
	}
	revision, err := store.One(ctx, a.store, a.hostRoute(addr))
	if errors.Is(err, store.ErrConflict) {
		e, err := a.store.Get(ctx, entry.HostRouteKey(a.network, addr))
		if err != nil {
			return nil, err
		}
		route, err := entry.Decode[metadata.HostRoute](a.network+"/"+addr.String(), e)
		if err != nil {
			return nil, a.heldBy(addr, "nobody: its entry cannot be used: "+err.Error())
		}
		if route.Host != a.host {
			return nil, a.heldBy(addr, "a container on host "+route.Host)
		}
		return t, nil
	}
	if err != nil {
		return nil, err
	}
	res.announced = append(res.announced, addr)
	return t, a.view.Wait(ctx, revision)
}

// hostRoute returns the change that announces an address. It conflicts when the address is announced already.
func (a *Allocator) hostRoute(addr netip.Addr) store.Change {
	data, _ := json.Marshal(metadata.HostRoute{Network: a.network, Address: addr, Host: a.host})
	return store.Change{Key: entry.HostRouteKey(a.network, addr), Value: data}
}

// deleteHostRoutes removes host routes. A failure is no error of the caller: repairHostRoutes removes them at the
// next start.
func (a *Allocator) deleteHostRoutes(ctx context.Context, addrs []netip.Addr) {
	if len(addrs) == 0 {
		return
	}
	var changes []store.Change
	for _, addr := range addrs {
		changes = append(changes, store.Change{Key: entry.HostRouteKey(a.network, addr), Revision: store.Any})
	}
	for i, r := range a.store.Write(ctx, changes...) {
		if r.Err != nil {
			a.log.Warn("endpoint left behind", "network", a.network, "address", addrs[i], "error", r.Err)
		}
	}
}
