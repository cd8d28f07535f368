// Package entry gives the store's keys their meaning: where the entries of each kind lie, and how one is read.
package entry

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/allocate"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// Keys in the store. All that every host watches lies below one prefix, so that one watch delivers it in order.
// Address tables, volumes and other hosts' containers, of which there may be a million, lie elsewhere.
const (
	ViewPrefix      = "view/"
	HostPrefix      = "view/hosts/"
	LivePrefix      = "view/live/"
	NetworkPrefix   = "view/networks/"
	BlockPrefix     = "view/blocks/"
	HostRoutePrefix = "view/endpoints/"
	TablePrefix     = "addresses/"
	ContainerPrefix = "containers/"
	VolumePrefix    = "volumes/"
	VNIPrefix       = "vnis/"
	MACPrefix       = "macs/"
)

// BlockKey returns the key of a block of a network.
func BlockKey(network string, cidr netip.Prefix) string {
	return BlockPrefix + metadata.BlockKey(metadata.Block{Network: network, CIDR: cidr})
}

// HostRouteKey returns the key of a host route to an address of a network.
func HostRouteKey(network string, address netip.Addr) string {
	return HostRoutePrefix + metadata.HostRouteKey(metadata.HostRoute{Network: network, Address: address})
}

// TableKey returns the key of an address table of a network.
func TableKey(network string, cidr netip.Prefix) string {
	return TablePrefix + network + "/" + cidr.String()
}

// Decode reads an entry. It returns the zero value for a deleted one.
func Decode[T interface{ Check(key string) error }](key string, e store.Entry) (T, error) {
	if e.Deleted {
		var none T
		return none, nil
	}
	o, err := metadata.Decode[T](key, e.Value)
	if err != nil {
		return o, err
	}
	switch any(o).(type) {
	case metadata.Block, metadata.HostRoute:
		// A block or a host route is claimed once and released. Lariat never overwrites one, so that no host can take
		// over the addresses of another.
		if e.Created != e.Revision {
			err = errors.New("it was written over after it was claimed, which Lariat never does")
		}
	}
	return o, err
}

// DecodeTable reads the entry of an address table.
func DecodeTable(e store.Entry) (*allocate.Table, error) {
	network, text, _ := strings.Cut(strings.TrimPrefix(e.Key, TablePrefix), "/")
	cidr, err := netip.ParsePrefix(text)
	if err != nil || cidr != cidr.Masked() || cidr.Addr().Is4In6() ||
		cidr.Addr().BitLen()-cidr.Bits() > allocate.TableBits {
		return nil, fmt.Errorf("%.100q is not the prefix of an address table", text)
	}
	if err := metadata.ValidName(network); err != nil {
		return nil, err
	}
	return allocate.Decode(cidr, e.Value)
}

// CorruptTable is the error of a table that is stored and cannot be used.
type CorruptTable struct{ metadata.Problem }

// Error names the table, the problem and the remedy.
func (e *CorruptTable) Error() string { return e.String() + "; " + e.Remedy() }

// Getter reads one entry. Each store is one.
type Getter interface {
	Get(ctx context.Context, key string) (store.Entry, error)
}

// ReadTable reads one address table and its revision. A table that is not stored is empty and has revision 0. The
// error is a *CorruptTable when the stored table cannot be used.
func ReadTable(ctx context.Context, s Getter, network string, cidr netip.Prefix) (*allocate.Table, int64, error) {
	e, err := s.Get(ctx, TableKey(network, cidr))
	if errors.Is(err, store.ErrNotFound) {
		return &allocate.Table{CIDR: cidr}, 0, nil
	}
	if err != nil {
		return nil, 0, err
	}
	t, err := allocate.Decode(cidr, e.Value)
	if err != nil {
		return nil, e.Revision, &CorruptTable{metadata.NewProblem(TableKey(network, cidr), err)}
	}
	return t, e.Revision, nil
}
