package allocator_test

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/allocate"
	"github.com/lariat-net/lariat/pkg/metadata/server/allocator"
	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

const lan = "lan"

// cluster is a store with one network.
type cluster struct {
	*testing.T
	*store.Memory
	now   time.Time
	hosts map[string]*host
}

// host is one host's allocator with its view and its containers.
type host struct {
	*allocator.Allocator
	c    *cluster
	ctx  context.Context
	name string

	mu         sync.Mutex
	last       []store.Entry // of the view
	generation uint64
	objects    map[string]object
	before     func([]store.Change) // is called before each write
	writes     int
}

type object struct {
	metadata.Container
	revision int64
}

// newCluster defines the network.
func newCluster(t *testing.T, n metadata.Network) *cluster {
	c := &cluster{T: t, Memory: store.NewMemory(), now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC),
		hosts: map[string]*host{}}
	n.Name, n.Encapsulation, n.VNI = lan, metadata.EncapVXLAN, metadata.DefaultVNI
	c.put(entry.NetworkPrefix+lan, n)
	return c
}

func (c *cluster) put(key string, o any) {
	c.Helper()
	data, err := json.Marshal(o)
	if err != nil {
		c.Fatal(err)
	}
	if _, err := store.One(c.Context(), c.Memory, store.Change{Key: key, Value: data, Revision: store.Any}); err != nil {
		c.Fatal(err)
	}
}

// keys returns the keys of the store below a prefix, without the prefix.
func (c *cluster) keys(prefix string) (out []string) {
	c.Helper()
	list, _, err := store.List(context.Background(), c.Memory, prefix, 0)
	if err != nil {
		c.Fatal(err)
	}
	for _, e := range list {
		out = append(out, strings.TrimPrefix(e.Key, prefix))
	}
	return out
}

func (c *cluster) wantKeys(prefix string, want ...string) {
	c.Helper()
	if got := c.keys(prefix); !slices.Equal(got, want) {
		c.Errorf("below %s are %q, want %q", prefix, got, want)
	}
}

// start starts a host's allocator. A second start is that of another process.
func (c *cluster) start(name string) *host {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	c.Cleanup(cancel)
	h := &host{c: c, ctx: ctx, name: name, objects: map[string]object{}}
	list, _, err := store.List(ctx, c.Memory, entry.ContainerPrefix, 0)
	if err != nil {
		c.Fatal(err)
	}
	for _, e := range list {
		containers{h}.Wrote(store.Change{Key: e.Key, Value: e.Value}, e.Revision)
	}
	h.Allocator = allocator.New(allocator.Config{Network: lan, Host: name, BootID: "boot-" + name, View: h,
		Store: disk{h}, Containers: containers{h}, Now: func() time.Time { return c.now },
		Log: slog.New(slog.DiscardHandler)})
	c.hosts[name] = h
	return h
}

func (h *host) ask(id string, want ...string) ([]allocate.Entry, error) {
	at := allocator.Attachment{AttachRequest: &metadata.AttachRequest{ContainerID: id, IfName: "eth0"}}
	for _, w := range want {
		at.Want = append(at.Want, netip.MustParseAddr(w))
	}
	return h.Attach(h.ctx, at)
}

// attach gives a container its first address.
func (h *host) attach(id string, want ...string) allocate.Entry {
	h.c.Helper()
	entries, err := h.ask(id, want...)
	if err != nil {
		h.c.Fatal(err)
	}
	return entries[0]
}

func (h *host) release(id string, sequence uint64) {
	h.c.Helper()
	if err := h.Release(h.ctx, aid(id), sequence); err != nil {
		h.c.Fatal(err)
	}
}

func aid(id string) metadata.AttachmentID {
	return metadata.AttachmentID{ContainerID: id, IfName: "eth0"}
}

// disk is a host's way to the cluster's store.
type disk struct{ h *host }

func (d disk) Get(ctx context.Context, key string) (store.Entry, error) { return d.h.c.Get(ctx, key) }

func (d disk) Where() string { return d.h.c.Where() }

func (d disk) Write(ctx context.Context, changes ...store.Change) []store.Result {
	if len(changes) == 0 {
		return nil
	}
	if d.h.before != nil {
		d.h.before(changes)
	}
	d.h.writes++
	return d.h.c.Write(ctx, changes...)
}

// The host implements allocator.View by reading the store.

func read[T interface{ Check(string) error }](h *host, prefix string) (out []T) {
	list, _, err := store.List(context.Background(), h.c.Memory, prefix, 0)
	if err != nil {
		h.c.Error(err)
	}
	for _, e := range list {
		key := strings.TrimPrefix(e.Key, entry.ViewPrefix)
		_, key, _ = strings.Cut(key, "/")
		o, err := entry.Decode[T](key, e)
		if err != nil {
			h.c.Error(err)
		}
		out = append(out, o)
	}
	return out
}

func (h *host) Network(name string) (metadata.Network, uint64, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	list, _, err := store.List(context.Background(), h.c.Memory, entry.ViewPrefix, 0)
	if err != nil {
		h.c.Error(err)
	}
	if !reflect.DeepEqual(list, h.last) {
		h.last = list
		h.generation++
	}
	all := read[metadata.Network](h, entry.NetworkPrefix+name)
	if len(all) == 0 {
		return metadata.Network{}, 0, false
	}
	return all[0], h.generation, true
}

func (h *host) Unknown(network string) error { return errors.New("there is no network " + network) }

func (h *host) Revision() int64 {
	st, err := h.c.Status(context.Background())
	if err != nil {
		h.c.Error(err)
	}
	return st.Revision
}

func (h *host) Wait(context.Context, int64) error { return nil }

func (h *host) HostCount() int { return len(h.c.hosts) }

func (h *host) Blocks(network string, match func(metadata.Block) bool) []metadata.Block {
	return slices.DeleteFunc(read[metadata.Block](h, entry.BlockPrefix+network+"/"),
		func(b metadata.Block) bool { return !match(b) })
}

func (h *host) OwnBlocks(network string) []metadata.Block {
	return h.Blocks(network, func(b metadata.Block) bool { return b.Host == h.name })
}

func (h *host) Block(network string, cidr netip.Prefix) (metadata.Block, bool) {
	all := h.Blocks(network, func(b metadata.Block) bool { return b.CIDR == cidr })
	if len(all) == 0 {
		return metadata.Block{}, false
	}
	return all[0], true
}

func (h *host) BlockCount(network string, subnet netip.Prefix) (all, own int) {
	for _, b := range h.Blocks(network, func(b metadata.Block) bool { return subnet.Contains(b.CIDR.Addr()) }) {
		all++
		if b.Host == h.name {
			own++
		}
	}
	return all, own
}

func (h *host) Gateway(network string, subnet netip.Prefix) netip.Addr {
	for _, b := range h.OwnBlocks(network) {
		if b.Gateway.IsValid() && subnet.Contains(b.Gateway) {
			return b.Gateway
		}
	}
	return netip.Addr{}
}

func (h *host) OwnHostRoutes(network string) (out []netip.Addr) {
	for _, r := range read[metadata.HostRoute](h, entry.HostRoutePrefix+network+"/") {
		if r.Host == h.name {
			out = append(out, r.Address)
		}
	}
	return out
}

func (h *host) Holder(network string, a netip.Addr) string {
	for _, b := range h.Blocks(network, func(b metadata.Block) bool { return b.Gateway == a }) {
		return "host " + b.Host
	}
	for _, r := range read[metadata.HostRoute](h, entry.HostRoutePrefix+network+"/") {
		if r.Address == a && r.Host != h.name {
			return "a container on host " + r.Host
		}
	}
	return ""
}

func (h *host) Announceable(netip.Addr) error { return nil }

// containers is the cache of a host's container objects.
type containers struct{ *host }

func (h containers) Attachments(network string) map[metadata.AttachmentID][]netip.Addr {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := map[metadata.AttachmentID][]netip.Addr{}
	for _, o := range h.objects {
		for _, i := range o.Interfaces {
			if o.Host == h.name && i.Network == network {
				out[metadata.AttachmentID{ContainerID: o.ID, IfName: i.IfName}] = i.Addresses
			}
		}
	}
	return out
}

func (h containers) Find(id, _ string) (metadata.Container, bool) {
	c, _ := h.Get(h.name + "/" + id)
	if c == nil {
		return metadata.Container{}, false
	}
	return *c, true
}

func (h containers) Get(key string) (*metadata.Container, int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if o, ok := h.objects[key]; ok {
		return &o.Container, o.revision
	}
	return nil, 0
}

func (h containers) Wrote(ch store.Change, revision int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	key := strings.TrimPrefix(ch.Key, entry.ContainerPrefix)
	if ch.Value == nil {
		delete(h.objects, key)
		return
	}
	o := object{revision: revision}
	if err := json.Unmarshal(ch.Value, &o.Container); err != nil {
		h.c.Error(err)
	}
	h.objects[key] = o
}

func (h containers) Change(ctx context.Context, key string, change func(*metadata.Container) bool) error {
	c, _ := h.Get(key)
	if c == nil {
		c = &metadata.Container{}
	}
	ch := store.Change{Key: entry.ContainerPrefix + key, Revision: store.Any}
	if change(c) {
		data, err := json.Marshal(c)
		if err != nil {
			return err
		}
		ch.Value = data
	}
	revision, err := store.One(ctx, h.c.Memory, ch)
	if err == nil {
		h.Wrote(ch, revision)
	}
	return err
}
