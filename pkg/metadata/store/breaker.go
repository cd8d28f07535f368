package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

// Away is the error of a store that is known not to answer. It is an ErrUnavailable.
type Away struct {
	Where string    // the store's endpoints, or its directory
	Since time.Time // since when nothing has been heard of it
	Cause error
}

func (e *Away) Error() string {
	return fmt.Sprintf("the store at %s has not answered since %s: %v", e.Where, e.Since.Format(time.TimeOnly), e.Cause)
}

// Unwrap makes it an ErrUnavailable.
func (e *Away) Unwrap() []error { return []error{ErrUnavailable, e.Cause} }

// Breaker is a circuit breaker in front of a Store: while the store is away, one caller waits for it, and the
// others fail at once.
//
// A slow or failed call, or a lost connection, makes the Breaker ask the store until it answers. One question
// without an answer means that the store is away: Lost says so. From the first call on that waited in vain,
// and from the end of the patience on in any case, new calls fail with the error of Lost. Until then they
// wait: a store that restarts within the patience costs nobody an error.
type Breaker struct {
	Store
	where    string
	patience time.Duration
	log      *slog.Logger
	ctx      context.Context
	stop     context.CancelFunc
	wg       sync.WaitGroup

	mu      sync.Mutex
	lost    *Away
	waited  bool // a call has waited in vain since the store last answered
	asking  bool
	changed chan struct{} // closed at the next change of lost
}

const (
	slow     = time.Second            // a call that takes so long makes the Breaker ask
	question = 2 * time.Second        // how long the store has for an answer
	pause    = 100 * time.Millisecond // between two questions
)

// NewBreaker guards a store. patience is for how long after the store was lost calls still wait for it.
func NewBreaker(s Store, patience time.Duration, log *slog.Logger) *Breaker {
	b := &Breaker{Store: s, where: "an unknown place", patience: patience, log: log, changed: make(chan struct{})}
	if w, ok := s.(interface{ Where() string }); ok {
		b.where = w.Where()
	}
	b.ctx, b.stop = context.WithCancel(context.Background())
	if c, ok := s.(interface {
		Connected(ctx context.Context, fn func(bool))
	}); ok {
		b.wg.Go(func() {
			c.Connected(b.ctx, func(up bool) {
				if !up {
					b.suspect(time.Now())
				}
			})
		})
	}
	return b
}

// Stop ends what the Breaker does by itself. The store stays open.
func (b *Breaker) Stop() {
	b.mu.Lock()
	b.stop()
	b.mu.Unlock()
	b.wg.Wait()
}

// Where names the store in messages.
func (b *Breaker) Where() string { return b.where }

// Lost returns why the store is away, an *Away, or nil while it answers. The channel is closed at the next change.
// The error is the subject, and not a failure of Lost.
//
//nolint:revive,staticcheck // see above
func (b *Breaker) Lost() (error, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.lost == nil {
		return nil, b.changed
	}
	return b.lost, b.changed
}

// Wait returns when the store is not known to be away, or with the context's error.
func (b *Breaker) Wait(ctx context.Context) error {
	for {
		err, changed := b.Lost()
		if err == nil {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// begin returns the error of a call that must not wait, or what the call's end must be reported to.
func (b *Breaker) begin(ctx context.Context) (end func(error), err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.lost != nil && (b.waited || time.Since(b.lost.Since) >= b.patience) {
		return nil, b.lost
	}
	start := time.Now()
	t := time.AfterFunc(slow, func() { b.suspect(start) })
	return func(err error) {
		t.Stop()
		switch {
		case !errors.Is(err, ErrUnavailable), errors.Is(ctx.Err(), context.Canceled):
		case ctx.Err() != nil && time.Since(start) < slow: // its caller was in a hurry, which tells nothing of the store
		default:
			b.mu.Lock()
			b.waited = true
			b.mu.Unlock()
			b.suspect(start)
		}
	}, nil
}

// suspect asks the store until it answers.
func (b *Breaker) suspect(since time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.asking || b.ctx.Err() != nil {
		return
	}
	b.asking = true
	b.wg.Go(func() {
		for !b.ask(since) {
			t := time.NewTimer(pause)
			select {
			case <-t.C:
			case <-b.ctx.Done():
				t.Stop()
				return
			}
		}
	})
}

// ask reports whether the store answered.
func (b *Breaker) ask(since time.Time) bool {
	ctx, cancel := context.WithTimeout(b.ctx, question)
	defer cancel()
	_, err := b.Store.Get(ctx, "version")
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.ctx.Err() != nil:
		return false
	case errors.Is(err, ErrUnavailable):
		if b.lost == nil {
			b.lost = &Away{Where: b.where, Since: since, Cause: err}
			b.log.Warn("store lost; what is known stays in force", "store", b.where, "error", err)
			b.wake()
		}
		return false
	}
	if b.lost != nil {
		b.log.Info("store answers again", "store", b.where, "after", time.Since(b.lost.Since).Round(100*time.Millisecond))
		b.lost = nil
		b.wake()
	}
	b.waited, b.asking = false, false
	return true
}

func (b *Breaker) wake() {
	close(b.changed)
	b.changed = make(chan struct{})
}

// Get implements Store.
func (b *Breaker) Get(ctx context.Context, key string) (Entry, error) {
	end, err := b.begin(ctx)
	if err != nil {
		return Entry{}, err
	}
	e, err := b.Store.Get(ctx, key)
	end(err)
	return e, err
}

// Page implements Store.
func (b *Breaker) Page(ctx context.Context, l *Listing) error {
	end, err := b.begin(ctx)
	if err != nil {
		return err
	}
	err = b.Store.Page(ctx, l)
	end(err)
	return err
}

// Write implements Store.
func (b *Breaker) Write(ctx context.Context, changes ...Change) []Result {
	if len(changes) == 0 {
		return nil
	}
	end, err := b.begin(ctx)
	if err != nil {
		results := make([]Result, len(changes))
		for i := range results {
			results[i].Err = err
		}
		return results
	}
	results := b.Store.Write(ctx, changes...)
	for _, r := range results {
		if err = r.Err; errors.Is(err, ErrUnavailable) {
			break
		}
	}
	end(err)
	return results
}

// Watch implements Store. It waits for a store that is away.
func (b *Breaker) Watch(ctx context.Context, prefix string, after int64, fn func(Update) error) error {
	err := b.Store.Watch(ctx, prefix, after, fn)
	if errors.Is(err, ErrUnavailable) && ctx.Err() == nil {
		b.suspect(time.Now())
	}
	return err
}

// Hold implements Store.
func (b *Breaker) Hold(ctx context.Context, ttl time.Duration) (*Lease, error) {
	end, err := b.begin(ctx)
	if err != nil {
		return nil, err
	}
	l, err := b.Store.Hold(ctx, ttl)
	end(err)
	return l, err
}
