package allocator

import (
	"context"
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

// candidate is an address that was chosen for a request and is not taken yet.
type candidate struct {
	table *cachedTable
	addr  netip.Addr
}

// attach plans a request for addresses. It completes the half that an earlier try left (one of two families).
func (b *batch) attach(ctx context.Context, res *result) error {
	r, a := res.request, b.a
	have := b.entriesOf(r.id)
	candidates, err := b.choose(ctx, res, have)
	if err != nil {
		return err
	}
	owner := allocate.Owner{Host: a.host, BootID: a.bootID, StateDir: r.attach.StateDir}
	if len(candidates) > 0 || slices.ContainsFunc(have, func(e allocate.Entry) bool { return e.Owner != owner }) {
		a.sequence++
	}
	for _, e := range have {
		if e.Owner != owner { // the same container after a reboot
			t := a.tables[allocate.TableFor(b.net, e.Address)]
			b.edit(t).Renew(e.Address, owner, a.sequence)
			res.touched[t.cidr] = true
		}
	}
	for _, c := range candidates {
		b.edit(c.table).Take(allocate.Entry{Address: c.addr, ID: r.id, Owner: owner, Sequence: a.sequence,
			Created: b.now.UTC().Truncate(time.Second)})
		res.touched[c.table.cidr] = true
		b.pending[r.id] = append(b.pending[r.id], c.table.cidr)
	}
	if len(candidates) > 0 {
		r.taken = append(r.taken, a.sequence)
	}
	r.entries = b.entriesOf(r.id)
	b.recordAttachment(res)
	return nil
}

// choose finds the addresses that an attachment lacks: those that it must get, and one of each other family.
func (b *batch) choose(ctx context.Context, res *result, have []allocate.Entry) (out []candidate, err error) {
	r := res.request
	has := func(addr netip.Addr) bool {
		return slices.ContainsFunc(have, func(e allocate.Entry) bool { return e.Address == addr })
	}
	for _, want := range r.attach.Want {
		for _, e := range have {
			if want.BitLen() == e.Address.BitLen() && !has(want) {
				return nil, metadata.Errorf(metadata.CodeConflict,
					"%s has %s on network %s already, %s was requested; release it first", r.id, e.Address, b.a.network, want)
			}
		}
	}
	chosen := map[netip.Addr]bool{}
	family := map[int]bool{} // by length of the address in bits
	for _, e := range have {
		family[e.Address.BitLen()] = true
	}
	for _, want := range r.attach.Want {
		if has(want) {
			continue
		}
		t, err := b.allocateRequested(ctx, res, want)
		if err != nil {
			return nil, err
		}
		out, chosen[want], family[want.BitLen()] = append(out, candidate{t, want}), true, true
	}
	if r.attach.Foreign {
		return out, nil
	}
	for _, subnet := range b.net.Subnets {
		if family[subnet.Addr().BitLen()] {
			continue
		}
		t, addr, err := b.allocate(ctx, res, subnet, chosen)
		if err != nil {
			return nil, err
		}
		out, chosen[addr] = append(out, candidate{t, addr}), true
	}
	return out, nil
}

// recordAttachment adds the attachment to the container's object, unless the object lists it already.
func (b *batch) recordAttachment(res *result) {
	r, a := res.request, b.a
	found, known := a.containers.Find(r.attach.ContainerID, r.attach.UUID)
	same := found.ID == r.attach.ContainerID
	if known && same && len(res.touched) == 0 && found.Attached(a.network, r.id.IfName) {
		return
	}
	var addresses []netip.Addr
	for _, e := range r.entries {
		addresses = append(addresses, e.Address)
	}
	base := metadata.Container{ID: r.attach.ContainerID, Created: b.now.UTC().Truncate(time.Second)}
	from := metadata.ContainerKey(found)
	if c, _ := b.container(from); known && !same && c != nil && len(c.Interfaces) == 0 {
		// A scheduler wrote the object for the UUID before the container had an id: the object moves. An object with
		// attachments stays with them.
		base = *c
		base.ID, base.Written = r.attach.ContainerID, true
		b.changeContainer(res, from, func(c *metadata.Container) bool { return len(c.Interfaces) > 0 })
	}
	b.changeContainer(res, a.host+"/"+r.attach.ContainerID, func(c *metadata.Container) bool {
		if c.ID == "" {
			*c = base
		} else {
			c.Normalize()
		}
		c.Attach(a.host, a.network, r.attach.AttachRequest, addresses)
		return true
	})
}

// heldBy returns the refusal of an address.
func (a *Allocator) heldBy(addr netip.Addr, holder string) error {
	return metadata.Errorf(metadata.CodeHeld, "address %s on network %s is held by %s", addr, a.network, holder)
}

// heldByEntry returns the refusal of an address that a table lists.
func (a *Allocator) heldByEntry(e allocate.Entry) error { return a.heldBy(e.Address, holderOf(e)) }

func holderOf(e allocate.Entry) string { return fmt.Sprintf("%s on host %s", e.ID, e.Owner.Host) }

// refusal returns why an address of a table cannot be taken, or nil.
func (b *batch) refusal(t *cachedTable, addr netip.Addr) error {
	if t.corrupt != nil {
		return b.a.heldBy(addr, "nobody knows whom: "+t.corrupt.Error())
	}
	if e, used := b.peek(t).Entry(addr); used {
		return b.a.heldByEntry(e)
	}
	return nil
}

// allocateRequested finds the table of an address that the request must get.
func (b *batch) allocateRequested(ctx context.Context, res *result, addr netip.Addr) (*cachedTable, error) {
	a := b.a
	if holder := a.view.Holder(a.network, addr); holder != "" {
		// A host route of another host names the host only. The address's table, if there is one, names the attachment.
		if t, _, err := entry.ReadTable(ctx, a.store, a.network, allocate.TableFor(b.net, addr)); err == nil {
			if e, ok := t.Entry(addr); ok {
				holder = holderOf(e)
			}
		}
		return nil, a.heldBy(addr, holder)
	}
	// Foreign and assigned addresses may lie in other hosts' blocks and outside of the subnets.
	anywhere := res.request.attach.Foreign || res.request.attach.Assigned
	subnet := b.subnetOf(addr)
	if !subnet.IsValid() {
		if !anywhere {
			return nil, metadata.Errorf(metadata.CodeInvalid, "address %s is outside of network %s, which has %v", addr,
				a.network, b.net.Subnets)
		}
		if err := a.view.Announceable(addr); err != nil {
			return nil, metadata.Errorf(metadata.CodeInvalid, "%s", err)
		}
		return b.borrowAddress(ctx, res, addr, allocate.TableFor(b.net, addr))
	}
	if allocate.Edge(subnet, addr) {
		return nil, metadata.Errorf(metadata.CodeInvalid, "address %s is the first or last of subnet %s, which no "+
			"container may have", addr, subnet)
	}
	cidr := allocate.BlockOf(addr, b.net.BlockSize(subnet))
	blk, err := b.blockOrClaim(ctx, subnet, cidr, addr)
	if err != nil {
		return nil, err
	}
	if blk.Host != a.host {
		if b.net.StrictAffinity && !anywhere {
			return nil, metadata.Errorf(metadata.CodeHeld, "address %s lies in block %s of host %s, and network %s has "+
				"strictAffinity: a host uses its own blocks only",
				addr, blk.CIDR, blk.Host, a.network)
		}
		return b.borrowAddress(ctx, res, addr, allocate.TableOf(cidr, addr))
	}
	t, err := a.cached(ctx, allocate.TableOf(cidr, addr), true)
	if err != nil {
		return nil, err
	}
	if holder := a.view.Holder(a.network, addr); holder != "" { // the claim may have made it the gateway
		return nil, a.heldBy(addr, holder)
	}
	return t, b.refusal(t, addr)
}

func (b *batch) subnetOf(addr netip.Addr) (subnet netip.Prefix) {
	for _, s := range b.net.Subnets {
		if s.Contains(addr) {
			subnet = s
		}
	}
	return subnet
}

// blockOrClaim returns the block that some host has, and claims the block for this host when no host has it. It does
// not make addr the gateway.
func (b *batch) blockOrClaim(ctx context.Context, subnet, cidr netip.Prefix, addr netip.Addr) (metadata.Block, error) {
	for {
		if blk, claimed := b.a.view.Block(b.a.network, cidr); claimed {
			return blk, nil
		}
		blk, err := b.claim(ctx, subnet, cidr, []netip.Addr{addr})
		if !errors.Is(err, store.ErrConflict) {
			return blk, err
		}
		// The view has learnt which host was faster.
	}
}

// allocate finds an address of a subnet. It prefers, in this order: an unused address of an own block, an own address
// whose cooldown has ended, a new block, an address of another host's block, an own address in its cooldown.
func (b *batch) allocate(ctx context.Context, res *result, subnet netip.Prefix,
	chosen map[netip.Addr]bool) (*cachedTable, netip.Addr, error) {
	a, rules := b.a, b.rules(subnet)
	usable := func(addr netip.Addr) bool { return !chosen[addr] && rules.Usable(addr) }
	if t, addr, ok := b.unusedInOwnBlocks(subnet, usable); ok {
		return t, addr, nil
	}
	if t, addr, ok := b.oldestReleased(subnet, usable, b.now.Add(-b.net.Cooldown())); ok {
		return t, addr, nil
	}
	cidr, err := b.claimFreeBlock(ctx, subnet)
	if err != nil {
		return nil, netip.Addr{}, err
	}
	if cidr.IsValid() {
		for _, c := range allocate.TablesOf(cidr) {
			if t := a.tables[c]; t != nil {
				if addr, ok := b.unused(t, subnet, usable); ok {
					a.hint[subnet.Addr().Is4()] = t
					return t, addr, nil
				}
			}
		}
	}
	if !b.net.StrictAffinity {
		if t, addr, err := b.borrow(ctx, res, subnet, usable); err != nil || t != nil {
			return t, addr, err
		}
	}
	// An address in its cooldown is better than a container that cannot start.
	if t, addr, ok := b.oldestReleased(subnet, usable, b.now.Add(time.Hour)); ok {
		a.log.Warn("address reused before its cooldown ended: no other is left", "network", a.network, "address", addr)
		return t, addr, nil
	}
	u := a.Usage(b.net, subnet)
	return nil, netip.Addr{}, metadata.Errorf(metadata.CodeExhausted,
		"no address left in subnet %s of network %s for host %s: %d used and %d free in its blocks, %d of %d blocks "+
			"claimed by all hosts; widen the network, release what is unused (`lariat ip list`), or remove hosts that are gone",
		subnet, a.network, a.host, u.Used, u.Free, u.Blocks, allocate.Blocks(subnet, b.net.BlockSize(subnet)))
}

// unusedInOwnBlocks finds an unused address in the table of the last success, or else in the first table that has one.
func (b *batch) unusedInOwnBlocks(subnet netip.Prefix,
	usable func(netip.Addr) bool) (best *cachedTable, address netip.Addr, ok bool) {
	a, is4 := b.a, subnet.Addr().Is4()
	if t := a.hint[is4]; t != nil {
		if addr, ok := b.unused(t, subnet, usable); ok {
			return t, addr, true
		}
	}
	for _, t := range a.tables {
		if best != nil && best.cidr.Addr().Less(t.cidr.Addr()) {
			continue
		}
		if addr, ok := b.unused(t, subnet, usable); ok {
			best, address = t, addr
		}
	}
	if best != nil {
		a.hint[is4] = best
	}
	return best, address, best != nil
}

// unused finds an address that was never allocated in a table of an own block. A table without one is not searched
// again until the view changes.
func (b *batch) unused(t *cachedTable, subnet netip.Prefix, usable func(netip.Addr) bool) (netip.Addr, bool) {
	if !t.own || t.corrupt != nil || !subnet.Contains(t.cidr.Addr()) || t.noneUnused && t.gen == b.a.gen {
		return netip.Addr{}, false
	}
	table := b.peek(t)
	if 1<<min(t.cidr.Addr().BitLen()-t.cidr.Bits(), 30) <= len(table.Entries)+len(table.Resting) {
		return netip.Addr{}, false
	}
	addr, ok := table.Fresh(usable)
	if !ok {
		t.noneUnused, t.gen = true, b.a.gen
	}
	return addr, ok
}

// oldestReleased finds the address of this host's blocks that was released longest ago, and not after until.
func (b *batch) oldestReleased(subnet netip.Prefix, usable func(netip.Addr) bool,
	until time.Time) (best *cachedTable, address netip.Addr, ok bool) {
	var since time.Time // when best's address was released
	better := func(t *cachedTable, r allocate.Rest) bool {
		return best == nil || r.Since.Before(since) ||
			r.Since.Equal(since) && t.cidr.Addr().Less(best.cidr.Addr())
	}
	for _, t := range b.a.tables {
		if !t.own || !subnet.Contains(t.cidr.Addr()) {
			continue
		}
		table := b.peek(t)
		if len(table.Resting) == 0 || !better(t, table.Resting[0]) {
			continue
		}
		if r, ok := table.Rested(until, usable); ok && better(t, r) {
			best, address, since = t, r.Address, r.Since
		}
	}
	return best, address, best != nil
}
