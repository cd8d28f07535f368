package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// containers keeps Container objects in memory: this host's, or those of others that somebody asks for (see asked).
type containers struct {
	self string

	mu      sync.RWMutex
	seen    time.Time       // when the store last proved to be there
	objects map[string]held // by host/id
	uuids   map[string]string
	changed chan struct{}
	updates uint64
	filled  bool
}

type held struct {
	metadata.Container
	revision int64
}

func newContainers(self string) *containers {
	return &containers{self: self, objects: map[string]held{}, uuids: map[string]string{}, changed: make(chan struct{})}
}

func (c *containers) load(entries []store.Entry) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.objects, c.uuids, c.filled, c.seen = map[string]held{}, map[string]string{}, true, time.Now()
	var errs []error
	for _, e := range entries {
		errs = append(errs, c.set(e))
	}
	c.wake()
	return errors.Join(errs...)
}

func (c *containers) apply(entries []store.Entry) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.seen = time.Now(); len(entries) == 0 {
		return nil
	}
	var errs []error
	for _, e := range entries {
		errs = append(errs, c.set(e))
	}
	c.wake()
	return errors.Join(errs...)
}

// age is how long ago the store last proved to be there; 0 before the first time.
func (c *containers) age(now time.Time) time.Duration {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if !c.filled {
		return 0
	}
	return now.Sub(c.seen)
}

func (c *containers) wake() {
	c.updates++
	close(c.changed)
	c.changed = make(chan struct{})
}

// set takes an object unless a newer state of it is known.
func (c *containers) set(e store.Entry) error {
	key := strings.TrimPrefix(e.Key, entry.ContainerPrefix)
	old, ok := c.objects[key]
	if ok && (old.revision > e.Revision || old.revision == e.Revision && !e.Deleted) {
		return nil
	}
	if ok && old.UUID != "" && c.uuids[old.UUID] == key {
		delete(c.uuids, old.UUID)
	}
	if e.Deleted {
		delete(c.objects, key)
		return nil
	}
	o, err := metadata.Decode[metadata.Container](key, e.Value)
	if err != nil { // what was known of it stays
		return fmt.Errorf("container %s: %w", key, err)
	}
	h := held{Container: o, revision: e.Revision}
	c.objects[key] = h
	// Only what a scheduler wrote is for whoever comes with the UUID. What an ADD made is its
	// attachment's alone: a pod may come back with its UUID before its old attachment is released.
	if h.UUID != "" && h.Host == c.self && h.IsWritten() && (h.PreAssigned || len(h.Interfaces) == 0) {
		c.uuids[h.UUID] = key
	}
	return nil
}

// find returns this host's container by id, or what a scheduler wrote for its UUID.
func (c *containers) find(id, uuid string) (held, bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if h, ok := c.objects[c.self+"/"+id]; ok {
		return h, true
	}
	for _, u := range []string{uuid, id} {
		if key, ok := c.uuids[u]; ok && u != "" {
			return c.objects[key], true
		}
	}
	return held{}, false
}

// attachments returns what this host's containers hold on a network, as their objects tell.
func (c *containers) attachments(network string) map[metadata.AttachmentID][]netip.Addr {
	c.mu.RLock()
	defer c.mu.RUnlock()
	out := map[metadata.AttachmentID][]netip.Addr{}
	for _, o := range c.objects {
		for _, i := range o.Interfaces {
			if o.Host == c.self && i.Network == network {
				out[metadata.AttachmentID{ContainerID: o.ID, IfName: i.IfName}] = i.Addresses
			}
		}
	}
	return out
}

func (c *containers) watch() <-chan struct{} {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.changed
}

func (c *containers) list() []metadata.Container {
	c.mu.RLock()
	defer c.mu.RUnlock()
	out := make([]metadata.Container, 0, len(c.objects))
	for _, k := range slices.Sorted(maps.Keys(c.objects)) {
		out = append(out, c.objects[k].Container)
	}
	return out
}

// assigned returns the addresses that the model gave the container before, for this network.
func (h held) assigned(n metadata.Network) []netip.Addr {
	if len(h.Interfaces) > 0 && !h.PreAssigned || !h.IsWritten() || h.Network != "" && h.Network != n.Name {
		return nil
	}
	return h.Addresses
}

// change reads, changes and writes one container until nobody interferes. change returns false to delete it.
func (s *Server) changeContainer(ctx context.Context, key string, change func(*metadata.Container) bool) error {
	for {
		e, err := s.store.Get(ctx, entry.ContainerPrefix+key)
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return err
		}
		var c metadata.Container
		if e.Value != nil {
			if c, err = metadata.Decode[metadata.Container](key, e.Value); err != nil {
				s.log.Warn("the entry of a container was spoilt and is written anew", "container", key, "error", err)
			}
		}
		next := store.Change{Key: entry.ContainerPrefix + key, Revision: e.Revision}
		if change(&c) {
			if next.Value, err = json.Marshal(c); err != nil {
				return err
			}
		} else if e.Value == nil {
			return nil
		}
		r, err := store.One(ctx, s.store, next)
		if errors.Is(err, store.ErrConflict) {
			continue
		}
		if err == nil {
			s.containers.wrote(next, r)
		}
		return err
	}
}

// cleanContainers takes back the addresses that earlier versions pinned to a UUID without anybody
// having assigned them: they moved an ADD's object to the next container with the UUID.
func (s *Server) cleanContainers(ctx context.Context) error {
	list, _, err := s.list(ctx, entry.ContainerPrefix+s.cfg.HostName+"/")
	if err != nil {
		return err
	}
	ctx, cancel := s.timeout(ctx)
	defer cancel()
	var changes []store.Change
	for _, e := range list {
		var c metadata.Container
		if json.Unmarshal(e.Value, &c) != nil || c.IsWritten() || !c.PreAssigned {
			continue
		}
		ch, stale := store.Change{Key: e.Key, Revision: e.Revision}, c.Addresses
		if c.Normalize() {
			if ch.Value, err = json.Marshal(c); err != nil {
				return err
			}
		}
		s.log.Info("assignment of an earlier version's ADD removed", "container", c.ID, "uuid", c.UUID, "addresses", stale)
		changes = append(changes, ch)
	}
	var errs []error
	for i, r := range s.store.Write(ctx, changes...) {
		if r.Err == nil {
			s.containers.wrote(changes[i], r.Revision)
		}
		errs = append(errs, r.Err)
	}
	return errors.Join(errs...)
}

// wrote tells the cache of a finished write before the watch does.
func (c *containers) wrote(ch store.Change, revision int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	//nolint:errcheck // our own encoding
	c.set(store.Entry{Key: ch.Key, Value: ch.Value, Revision: revision, Deleted: ch.Value == nil})
	c.wake()
}

// hostContainers gives allocators this host's containers. It implements allocator.Containers.
type hostContainers struct{ s *Server }

// Attachments implements allocator.Containers.
func (h hostContainers) Attachments(network string) map[metadata.AttachmentID][]netip.Addr {
	return h.s.containers.attachments(network)
}

// Find implements allocator.Containers.
func (h hostContainers) Find(id, uuid string) (metadata.Container, bool) {
	c, ok := h.s.containers.find(id, uuid)
	return c.Container, ok
}

// Get implements allocator.Containers.
func (h hostContainers) Get(key string) (*metadata.Container, int64) {
	h.s.containers.mu.RLock()
	defer h.s.containers.mu.RUnlock()
	if c, ok := h.s.containers.objects[key]; ok {
		return &c.Container, c.revision
	}
	return nil, 0
}

// Wrote implements allocator.Containers.
func (h hostContainers) Wrote(ch store.Change, revision int64) { h.s.containers.wrote(ch, revision) }

// Change implements allocator.Containers.
func (h hostContainers) Change(ctx context.Context, key string, change func(*metadata.Container) bool) error {
	return h.s.changeContainer(ctx, key, change)
}
