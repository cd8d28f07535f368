// Package allocator allocates the addresses of one network on one host.
//
// An Allocator keeps the address tables that concern its host in memory. Each file holds one subject:
//
//	allocator.go  what the server calls, and what the allocator needs from the server
//	queue.go      requests wait in a queue; those that wait together share one write
//	batch.go      the plan of one write, the write, and the answers
//	cache.go      tables in memory, and questions that they answer
//	attach.go     which addresses an attachment gets
//	release.go    release of an attachment, and garbage collection
//	claim.go      blocks: claimed when addresses are needed, released when empty
//	borrow.go     addresses of other hosts' blocks, and host routes to them
//	recover.go    tables after a start, after lost blocks, and after a killed process
//
// Package allocate holds the rules of one table and one subnet, without a store.
package allocator

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/allocate"
	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// View is the host's copy of networks, hosts, blocks and host routes, which follows the store.
type View interface {
	// Network returns a network that is in force. The generation grows with each change of the network, its blocks or
	// its host routes.
	Network(name string) (n metadata.Network, generation uint64, ok bool)
	// Unknown returns the error for a network that is not in force.
	Unknown(network string) error
	// Revision returns the store's revision that the view has reached.
	Revision() int64
	// Wait returns when the view has reached a revision, or the context's error.
	Wait(ctx context.Context, revision int64) error
	// HostCount returns the number of hosts of the cluster.
	HostCount() int

	// OwnBlocks returns this host's blocks of a network, sorted.
	OwnBlocks(network string) []metadata.Block
	// Block returns a claimed block of any host.
	Block(network string, cidr netip.Prefix) (metadata.Block, bool)
	// Blocks returns the blocks of a network that match, sorted.
	Blocks(network string, match func(metadata.Block) bool) []metadata.Block
	// BlockCount returns how many blocks of a subnet all hosts have, and how many this host has.
	BlockCount(network string, subnet netip.Prefix) (all, own int)
	// Gateway returns this host's own address in a subnet; the zero Addr when it has none.
	Gateway(network string, subnet netip.Prefix) netip.Addr

	// OwnHostRoutes returns the addresses that this host announces with host routes.
	OwnHostRoutes(network string) []netip.Addr
	// Holder names the holder of an address that no table lists: a gateway, a host, a router, another host's container.
	Holder(network string, address netip.Addr) string
	// Announceable returns why no host route may lead to an address outside of the subnets, or nil.
	Announceable(address netip.Addr) error
}

// Store reads and writes single entries.
type Store interface {
	entry.Getter
	store.Writer
	// Where names the store in errors.
	Where() string
}

// Containers is the server's cache of container objects. A key is HOST/ID.
type Containers interface {
	// Attachments returns the addresses of this host's attachments on a network, as the objects list them.
	Attachments(network string) map[metadata.AttachmentID][]netip.Addr
	// Find returns this host's object with an id, or else the object that a scheduler wrote for a UUID.
	Find(id, uuid string) (metadata.Container, bool)
	// Get returns an object and its revision in the store; nil and 0 when there is none.
	Get(key string) (*metadata.Container, int64)
	// Wrote records a finished write before the watch delivers it.
	Wrote(ch store.Change, revision int64)
	// Change reads, changes and writes an object until no other writer interferes. change returns false to delete it.
	Change(ctx context.Context, key string, change func(*metadata.Container) bool) error
}

// Config of an Allocator. All fields are required.
type Config struct {
	Network string
	Host    string // name of this host
	BootID  string // of this host; each allocation records it

	View       View
	Store      Store
	Containers Containers

	Now func() time.Time // the clock for recorded times
	Log *slog.Logger
}

// Allocator keeps this host's address tables of one network. All changes of the tables go through its queue. While
// one write is under way, further requests wait and share the next write. So a burst of requests costs few durable
// writes, and no two requests of this host compete for a table. Other hosts may compete, because they borrow. Then the
// write's condition fails, the table is read again, and the requests are planned again.
type Allocator struct {
	network, host, bootID string

	view       View
	store      Store
	containers Containers
	now        func() time.Time
	log        *slog.Logger

	// mu guards the queue. It also guards tables, held, loaded and gen: the runner alone writes them, with mu held, so
	// only other goroutines need mu to read them.
	mu      sync.Mutex
	queue   []*request
	running bool
	tables  map[netip.Prefix]*cachedTable
	held    map[metadata.AttachmentID][]netip.Prefix // tables with entries of this host's attachment
	loaded  bool
	gen     uint64 // the view's generation at the last sync

	// Only the runner uses the following fields.
	resyncPending bool // some table is stale
	sequence      uint64
	othersFull    time.Time             // when all blocks of other hosts were last found full
	hint          map[bool]*cachedTable // table with unused addresses; the key is true for IPv4
}

// New returns an Allocator. It reads its tables with the first request.
func New(cfg Config) *Allocator {
	return &Allocator{network: cfg.Network, host: cfg.Host, bootID: cfg.BootID, view: cfg.View, store: cfg.Store,
		containers: cfg.Containers, now: cfg.Now, log: cfg.Log, tables: map[netip.Prefix]*cachedTable{},
		held: map[metadata.AttachmentID][]netip.Prefix{}, hint: map[bool]*cachedTable{}}
}

// Attachment is a request for addresses.
type Attachment struct {
	*metadata.AttachRequest
	// Want lists the addresses that the attachment must get.
	Want []netip.Addr
	// Assigned says that the model assigned Want. The model may assign addresses outside of the subnets.
	Assigned bool
}

func (at Attachment) id() metadata.AttachmentID {
	return metadata.AttachmentID{ContainerID: at.ContainerID, IfName: at.IfName}
}

// Attach gives an attachment an address of each family, and returns all its entries, sorted by address. The
// contexts of this and all other methods must have deadlines.
func (a *Allocator) Attach(ctx context.Context, at Attachment) ([]allocate.Entry, error) {
	r := &request{ctx: ctx, kind: requestAttach, id: at.id(), attach: at}
	if err := a.do(r); err != nil {
		return nil, err // the request may still be under way
	}
	return r.entries, nil
}

// Release frees the addresses of an attachment. A sequence number other than 0 spares the entries with later numbers.
func (a *Allocator) Release(ctx context.Context, id metadata.AttachmentID, sequence uint64) error {
	return a.do(&request{ctx: ctx, kind: requestRelease, id: id, sequence: sequence})
}

// GC releases all attachments of this host that are not valid, and returns their entries.
func (a *Allocator) GC(ctx context.Context, valid []metadata.AttachmentID) ([]allocate.Entry, error) {
	r := &request{ctx: ctx, kind: requestGC, valid: map[metadata.AttachmentID]bool{}}
	for _, id := range valid {
		r.valid[id] = true
	}
	if err := a.do(r); err != nil {
		return nil, err
	}
	return r.released, nil
}

// ClaimFirst claims a first block of each subnet, so that this host has a gateway address in each.
func (a *Allocator) ClaimFirst(ctx context.Context) error {
	return a.do(&request{ctx: ctx, kind: requestClaimFirst})
}

// ReleaseEmpty releases the blocks that have been empty since before the given time. Blocks with a gateway stay.
func (a *Allocator) ReleaseEmpty(ctx context.Context, before time.Time) error {
	if !slices.ContainsFunc(a.view.OwnBlocks(a.network), func(b metadata.Block) bool { return !b.Gateway.IsValid() }) {
		return nil
	}
	return a.do(&request{ctx: ctx, kind: requestReleaseEmpty, before: before})
}

// Load reads the tables, or brings them up to date with the view.
func (a *Allocator) Load(ctx context.Context) error {
	return a.Release(ctx, metadata.AttachmentID{}, 0) // no attachment has the zero id
}

// Loaded reports whether the tables have been read.
func (a *Allocator) Loaded() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.loaded
}

// Current reports whether the tables have been read, and follow the view at a generation. Tables of an earlier
// generation may belong to blocks that this host has lost.
func (a *Allocator) Current(generation uint64) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.loaded && a.gen == generation
}

// Rules returns which addresses of a subnet may be allocated without a request for them.
func Rules(v View, n metadata.Network, subnet netip.Prefix) allocate.Rules {
	r := allocate.Rules{Subnet: subnet, Holder: func(a netip.Addr) string { return v.Holder(n.Name, a) }}
	for _, s := range n.Exclude {
		if x, err := metadata.ParseRange(s); err == nil {
			r.Exclude = append(r.Exclude, x)
		}
	}
	return r
}
