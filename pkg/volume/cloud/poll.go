package cloud

import (
	"context"
	"math/rand/v2"
	"time"
)

// Pauses between looks at something that AWS is about to change.
type Pauses struct {
	First time.Duration // what most changes take
	Most  time.Duration // what pauses grow to
}

// Poll looks until there is an end, an error, or no time left. Then it returns a *Late, also when the time
// ended in the middle of a look, unless that was the first.
func (p Pauses) Poll(ctx context.Context, look func() (done bool, seen string, err error)) error {
	last, looked := "", false
	for pause := p.First; ; pause = min(pause*8/5, p.Most) {
		done, seen, err := look()
		switch {
		case err != nil && looked && ctx.Err() != nil:
			return &Late{last, context.Cause(ctx)}
		case done || err != nil:
			return err
		}
		last, looked = seen, true
		// Those who began at the same time do not all come back at the same time.
		t := time.NewTimer(pause + rand.N(pause/2))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return &Late{seen, context.Cause(ctx)}
		}
	}
}

// Late is what was seen when the time was over.
type Late struct {
	Seen  string
	Cause error
}

func (l *Late) Error() string { return l.Seen + ": " + l.Cause.Error() }
func (l *Late) Unwrap() error { return l.Cause }
