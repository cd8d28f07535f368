package allocate

import (
	"encoding/binary"
	"hash/fnv"
	"math"
	"net/netip"
	"slices"

	"github.com/lariat-net/lariat/pkg/metadata"
)

// Rules say which addresses of a subnet may be allocated.
type Rules struct {
	Subnet  netip.Prefix
	Exclude []metadata.Range
	// Holder returns the holder of an address that no table lists: a host's gateway, a host's own
	// address, the LAN's router, a host route of another host. Empty: no holder.
	Holder func(netip.Addr) string
}

// Edge reports whether the address can never be allocated. These are the first and last address of
// an IPv4 subnet, and the subnet-router anycast address of an IPv6 subnet (RFC 4291 §2.6.1). Links
// of two addresses or one have no such edges (RFC 3021, RFC 6164).
func Edge(subnet netip.Prefix, a netip.Addr) bool {
	if subnet.Addr().BitLen()-subnet.Bits() < 2 {
		return false
	}
	return a == subnet.Masked().Addr() || a.Is4() && a == metadata.LastAddr(subnet)
}

// Usable reports whether the address may be allocated without a request for it.
func (r Rules) Usable(a netip.Addr) bool {
	if !r.Subnet.Contains(a) || Edge(r.Subnet, a) {
		return false
	}
	for _, x := range r.Exclude {
		if x.Contains(a) {
			return false
		}
	}
	return r.Holder == nil || r.Holder(a) == ""
}

// FirstUsable returns the lowest usable address of a block that is not in the list.
func (r Rules) FirstUsable(block netip.Prefix, not []netip.Addr) (netip.Addr, bool) {
	for a := block.Addr(); a.IsValid() && block.Contains(a); a = a.Next() {
		if r.Usable(a) && !slices.Contains(not, a) {
			return a, true
		}
	}
	return netip.Addr{}, false
}

// BlockOf returns the block of a subnet that contains the address.
func BlockOf(a netip.Addr, bits int) netip.Prefix {
	p, _ := a.Prefix(bits)
	return p
}

// Blocks returns the number of blocks of a subnet, or math.MaxInt when there are more.
func Blocks(subnet netip.Prefix, bits int) int {
	if n := bits - subnet.Bits(); n < 62 {
		return 1 << max(n, 0)
	}
	return math.MaxInt
}

// Place returns the first address of the subnet's block with that number, modulo the number of
// blocks.
func Place(subnet netip.Prefix, bits int, number uint64) netip.Addr {
	if n := bits - subnet.Bits(); n < 64 {
		number &= 1<<max(n, 0) - 1
	}
	shift := subnet.Addr().BitLen() - bits // at most 16, as a block is
	hi, low := number>>(64-shift), number<<shift
	b := subnet.Masked().Addr().As16()
	binary.BigEndian.PutUint64(b[8:], binary.BigEndian.Uint64(b[8:])|low)
	if subnet.Addr().Is4() {
		return netip.AddrFrom16(b).Unmap()
	}
	binary.BigEndian.PutUint64(b[:8], binary.BigEndian.Uint64(b[:8])|hi)
	return netip.AddrFrom16(b)
}

// FreeBlock returns an unclaimed block that has a usable address. It searches from a Place of the
// subnet to the end, and then from the start. Hosts that claim at the same time must not all begin
// at the same place.
func (r Rules) FreeBlock(bits int, from netip.Addr, claimed func(netip.Prefix) bool) (netip.Prefix, bool) {
	p, ok := r.freeBlock(bits, from, metadata.LastAddr(r.Subnet), claimed)
	if first := r.Subnet.Masked().Addr(); !ok && first != from {
		p, ok = r.freeBlock(bits, first, from.Prev(), claimed)
	}
	return p, ok
}

// freeBlock is FreeBlock for the blocks that begin between two addresses, both included.
func (r Rules) freeBlock(bits int, first, last netip.Addr, claimed func(netip.Prefix) bool) (netip.Prefix, bool) {
	for a := first; a.IsValid() && a.Compare(last) <= 0; {
		p := BlockOf(a, bits)
		end := metadata.LastAddr(p)
		if x := slices.IndexFunc(r.Exclude, func(x metadata.Range) bool {
			return x.Contains(p.Addr()) &&
				x.Contains(end)
		}); x >= 0 {
			// Skip the whole exclusion at once: it may be half the subnet.
			if tail := BlockOf(r.Exclude[x].Last, bits); metadata.LastAddr(tail) == r.Exclude[x].Last {
				end = r.Exclude[x].Last
			} else {
				end = tail.Addr().Prev()
			}
		} else if !claimed(p) {
			if _, ok := r.FirstUsable(p, nil); ok {
				return p, true
			}
		}
		a = end.Next()
	}
	return netip.Prefix{}, false
}

// BorrowOrder sorts other hosts' blocks in the order in which a host should try to borrow a single
// address. The order differs between hosts. So hosts that borrow at the same time do not all
// compare and swap the same table.
func BorrowOrder(blocks []metadata.Block, self string) []metadata.Block {
	type ranked struct {
		rank uint64
		b    metadata.Block
	}
	var list []ranked
	for _, b := range blocks {
		if b.Host == self {
			continue
		}
		h := fnv.New64a()
		h.Write([]byte(self + " " + b.CIDR.String()))
		list = append(list, ranked{h.Sum64(), b})
	}
	slices.SortFunc(list, func(x, y ranked) int {
		if x.rank < y.rank {
			return -1
		}
		if x.rank > y.rank {
			return 1
		}
		return x.b.CIDR.Addr().Compare(y.b.CIDR.Addr())
	})
	out := make([]metadata.Block, len(list))
	for i, x := range list {
		out[i] = x.b
	}
	return out
}

// TableFor returns the table of an address. It is a table of the address's block, or a table for
// this address alone when no subnet of the network contains it.
func TableFor(n metadata.Network, a netip.Addr) netip.Prefix {
	for _, p := range n.Subnets {
		if p.Contains(a) {
			return TableOf(BlockOf(a, n.BlockSize(p)), a)
		}
	}
	return netip.PrefixFrom(a, a.BitLen())
}
