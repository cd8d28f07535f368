// Package store keeps the model's objects: small values under keys, each with a revision of its own.
//
// What it asks of a store is little, so that another one can be added beside etcd: read one, list a prefix at one
// revision, write on condition of a revision, watch from a revision, and keys that vanish with their writer. No
// operation needs two objects to change together. The package knows neither networks nor hosts; package server
// gives the keys their meaning.
package store

import (
	"context"
	"errors"
	"time"
)

// Errors that callers tell apart with errors.Is.
var (
	ErrNotFound    = errors.New("not found")
	ErrConflict    = errors.New("changed by somebody else meanwhile")
	ErrCompacted   = errors.New("history is gone, read everything again")
	ErrUnavailable = errors.New("the store does not answer")
	ErrNoSpace     = errors.New("the store is full")
)

// Any as a Change's Revision sets no condition.
const Any int64 = -1

// Entry is one object.
type Entry struct {
	Key      string // without the store's prefix
	Value    []byte
	Revision int64 // of its last change: what a conditional write names
	Created  int64 // revision of its first write; equal to Revision while it was written once
	Deleted  bool  // in an Update only
	Held     bool  // vanishes with its writer's lease
}

// Change is one write. It is atomic alone.
type Change struct {
	Key      string
	Value    []byte // nil deletes
	Revision int64  // that the object must have; 0: it must not exist; Any: no condition
	Lease    *Lease // nil: stays until deleted
}

// Result of one Change: its revision, or ErrConflict (not written), or ErrUnavailable (unknown whether written).
type Result struct {
	Revision int64
	Err      error
}

// Update is what changed at one revision.
type Update struct {
	Revision int64
	Entries  []Entry
}

// Listing is a list under way: what came stays when the next page does not.
type Listing struct {
	Prefix   string
	Entries  []Entry // so far, sorted by key
	Revision int64   // of all of them; 0: no page came yet
	Done     bool    // that is all

	from  string // key of the next page in the store
	limit int64  // objects of the next page
}

// Lease keeps the keys written with it alive for as long as its holder renews it, which it does by itself.
type Lease struct {
	id    int64
	lost  chan struct{}
	close func()
}

// Lost is closed when the lease ran out although its holder lives: the store was away for longer than its duration.
func (l *Lease) Lost() <-chan struct{} { return l.lost }

// Close gives the lease up; its keys vanish.
func (l *Lease) Close() { l.close() }

// Status describes a store for health and metrics.
type Status struct {
	Leader   bool  // this member leads (an external store: false)
	Size     int64 // octets of the data file
	InUse    int64 // octets of it that hold data
	Quota    int64 // octets that it may grow to; 0: not known (an external store)
	Revision int64
	Problem  string // why writes are refused, with the remedy; empty: they are not
}

// Writer makes changes. Each Store is one.
type Writer interface {
	// Write makes changes; results come in the same order. Changes of one call have distinct keys and cost one durable
	// write together when no condition fails; a failed condition stops no other change.
	Write(ctx context.Context, changes ...Change) []Result
}

// Store is what package server needs.
type Store interface {
	Writer
	// Get reads one object, as of now: never an older state than a finished write. ErrNotFound, ErrUnavailable.
	Get(ctx context.Context, key string) (Entry, error)
	// Page reads the next page of a list. When it fails the list stays as it was, and the page can be asked for again.
	// ErrCompacted: the list's revision is history, begin anew.
	Page(ctx context.Context, l *Listing) error
	// Watch calls fn for each revision after the given one that touched the prefix, in order. It returns ErrCompacted,
	// ErrUnavailable, fn's error, or the context's.
	Watch(ctx context.Context, prefix string, after int64, fn func(Update) error) error
	// Hold grants a lease.
	Hold(ctx context.Context, ttl time.Duration) (*Lease, error)
	// Idle returns how long the holder of a key has not renewed its lease, in whole seconds, and what the lease lasts.
	// ErrNotFound: nobody holds the key.
	Idle(ctx context.Context, key string) (idle, ttl time.Duration, err error)
	// Status asks this member. It is cheap and answers without a quorum.
	Status(ctx context.Context) (Status, error)
	// Close stops it; what was acknowledged is on disk already.
	Close() error
}

// List reads all objects below a prefix at one revision, sorted by key. Each page may take as long as perPage
// says; 0: as the context says.
func List(ctx context.Context, s Store, prefix string, perPage time.Duration) ([]Entry, int64, error) {
	l := Listing{Prefix: prefix}
	for !l.Done {
		if err := NextPage(ctx, s, &l, perPage); err != nil {
			return nil, 0, err
		}
	}
	return l.Entries, l.Revision, nil
}

// NextPage reads a page that may take as long as perPage says.
func NextPage(ctx context.Context, s Store, l *Listing, perPage time.Duration) error {
	if perPage > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, perPage)
		defer cancel()
	}
	return s.Page(ctx, l)
}

// One makes a single change.
func One(ctx context.Context, s Writer, c Change) (int64, error) {
	r := s.Write(ctx, c)[0]
	return r.Revision, r.Err
}
