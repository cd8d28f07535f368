package store

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

// Memory is a Store in this process, for tests that need no etcd. It keeps all history until Compact, and loses
// everything with the process. Its leases never expire, because their holders live as long as the store.
type Memory struct {
	mu        sync.Mutex
	revision  int64
	compacted int64 // history up to this revision is lost
	entries   map[string]Entry
	leases    map[string]*Lease // of held keys
	durations map[*Lease]time.Duration
	history   []Update
	changed   chan struct{} // closed at the next write
	closed    chan struct{}
}

// NewMemory returns an empty store.
func NewMemory() *Memory {
	return &Memory{revision: 1, entries: map[string]Entry{}, leases: map[string]*Lease{},
		durations: map[*Lease]time.Duration{}, changed: make(chan struct{}), closed: make(chan struct{})}
}

// Where names the store in errors.
func (m *Memory) Where() string { return "this process's memory" }

// begin locks the store. It fails when the context has ended, or the store is closed.
func (m *Memory) begin(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	m.mu.Lock()
	select {
	case <-m.closed:
		m.mu.Unlock()
		return fmt.Errorf("%w: it is closed", ErrUnavailable)
	default:
		return nil
	}
}

// Get implements Store.
func (m *Memory) Get(ctx context.Context, key string) (Entry, error) {
	if err := m.begin(ctx); err != nil {
		return Entry{}, err
	}
	defer m.mu.Unlock()
	e, ok := m.entries[key]
	if !ok {
		return Entry{Key: key}, fmt.Errorf("%s: %w", key, ErrNotFound)
	}
	return e, nil
}

// Page implements Store. Its first page is the whole list.
func (m *Memory) Page(ctx context.Context, l *Listing) error {
	if err := m.begin(ctx); err != nil {
		return err
	}
	defer m.mu.Unlock()
	for _, key := range slices.Sorted(maps.Keys(m.entries)) {
		if strings.HasPrefix(key, l.Prefix) {
			l.Entries = append(l.Entries, m.entries[key])
		}
	}
	l.Revision, l.Done = m.revision, true
	return nil
}

// Write implements Store. All changes whose conditions hold get one revision.
func (m *Memory) Write(ctx context.Context, changes ...Change) []Result {
	results := make([]Result, len(changes))
	if err := m.begin(ctx); err != nil {
		for i := range results {
			results[i].Err = err
		}
		return results
	}
	defer m.mu.Unlock()
	u := Update{Revision: m.revision + 1}
	for i, ch := range changes {
		if ch.Revision != Any && ch.Revision != m.entries[ch.Key].Revision {
			results[i].Err = fmt.Errorf("%s: %w", ch.Key, ErrConflict)
			continue
		}
		results[i].Revision = u.Revision
		if e, changed := m.set(ch, u.Revision); changed {
			u.Entries = append(u.Entries, e)
		}
	}
	m.publish(u)
	for i, r := range results {
		if r.Err == nil { // a deletion of what does not exist makes no revision
			results[i].Revision = min(r.Revision, m.revision)
		}
	}
	return results
}

// set makes one change at a revision. It returns the entry for an Update, and false when nothing changed.
func (m *Memory) set(ch Change, revision int64) (Entry, bool) {
	old, exists := m.entries[ch.Key]
	delete(m.leases, ch.Key)
	if ch.Value == nil {
		delete(m.entries, ch.Key)
		return Entry{Key: ch.Key, Revision: revision, Deleted: true}, exists
	}
	e := Entry{Key: ch.Key, Value: slices.Clone(ch.Value), Revision: revision, Created: revision, Held: ch.Lease != nil}
	if exists {
		e.Created = old.Created
	}
	if ch.Lease != nil {
		m.leases[ch.Key] = ch.Lease
	}
	m.entries[ch.Key] = e
	return e, true
}

// publish makes an update the newest history, unless it is empty.
func (m *Memory) publish(u Update) {
	if len(u.Entries) == 0 {
		return
	}
	m.revision = u.Revision
	m.history = append(m.history, u)
	close(m.changed)
	m.changed = make(chan struct{})
}

// Watch implements Store.
func (m *Memory) Watch(ctx context.Context, prefix string, after int64, fn func(Update) error) error {
	for {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := m.begin(ctx); err != nil {
			return err
		}
		updates, changed := m.after(prefix, after), m.changed
		compacted := after < m.compacted || after > m.revision
		after = max(after, m.revision)
		m.mu.Unlock()
		if compacted {
			return fmt.Errorf("watch %s: %w", prefix, ErrCompacted)
		}
		for _, u := range updates {
			if err := fn(u); err != nil {
				return err
			}
		}
		select {
		case <-changed:
		case <-m.closed:
			return fmt.Errorf("%w: watch %s: it is closed", ErrUnavailable, prefix)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// after returns the updates after a revision that touch a prefix.
func (m *Memory) after(prefix string, revision int64) (out []Update) {
	from, _ := slices.BinarySearchFunc(m.history, revision+1, func(u Update, r int64) int { return int(u.Revision - r) })
	for _, u := range m.history[from:] {
		var entries []Entry
		for _, e := range u.Entries {
			if strings.HasPrefix(e.Key, prefix) {
				entries = append(entries, e)
			}
		}
		if len(entries) > 0 {
			out = append(out, Update{Revision: u.Revision, Entries: entries})
		}
	}
	return out
}

// Compact forgets the history up to a revision.
func (m *Memory) Compact(revision int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.compacted = revision
	m.history = slices.DeleteFunc(m.history, func(u Update) bool { return u.Revision <= revision })
}

// Hold implements Store.
func (m *Memory) Hold(ctx context.Context, ttl time.Duration) (*Lease, error) {
	if err := m.begin(ctx); err != nil {
		return nil, err
	}
	defer m.mu.Unlock()
	l := &Lease{lost: make(chan struct{})}
	l.close = func() { m.revoke(l) }
	m.durations[l] = ttl
	return l, nil
}

// revoke deletes the keys of a lease at one revision.
func (m *Memory) revoke(l *Lease) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, held := m.durations[l]; !held {
		return
	}
	delete(m.durations, l)
	close(l.lost)
	u := Update{Revision: m.revision + 1}
	for _, key := range slices.Sorted(maps.Keys(m.leases)) {
		if m.leases[key] == l {
			e, _ := m.set(Change{Key: key}, u.Revision)
			u.Entries = append(u.Entries, e)
		}
	}
	m.publish(u)
}

// Idle implements Store. A holder never misses a renewal.
func (m *Memory) Idle(ctx context.Context, key string) (idle, ttl time.Duration, err error) {
	if err := m.begin(ctx); err != nil {
		return 0, 0, err
	}
	defer m.mu.Unlock()
	l := m.leases[key]
	if l == nil {
		return 0, 0, fmt.Errorf("lease of %s: %w", key, ErrNotFound)
	}
	return 0, m.durations[l], nil
}

// Status implements Store.
func (m *Memory) Status(ctx context.Context) (Status, error) {
	if err := m.begin(ctx); err != nil {
		return Status{}, err
	}
	defer m.mu.Unlock()
	return Status{Leader: true, Revision: m.revision}, nil
}

// Close implements Store.
func (m *Memory) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	select {
	case <-m.closed:
	default:
		close(m.closed)
	}
	return nil
}
