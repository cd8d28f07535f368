package cloud

import (
	"context"
	"math/rand/v2"
	"time"
)

// Pauses sets the pauses between polls of an object that AWS is about to change.
type Pauses struct {
	First time.Duration // the time of most changes
	Most  time.Duration // the upper limit of pauses
}

// Poll calls look until it reports the end or an error, or the context ends. If the context ends,
// Poll returns a *Late, even in the middle of a look, unless that look was the first.
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
		// Add a random time, so that pollers that began together do not return together.
		t := time.NewTimer(pause + rand.N(pause/2))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return &Late{seen, context.Cause(ctx)}
		}
	}
}

// Late is the error of a Poll whose time ended. It holds the last observed state.
type Late struct {
	Seen  string
	Cause error
}

func (l *Late) Error() string { return l.Seen + ": " + l.Cause.Error() }
func (l *Late) Unwrap() error { return l.Cause }
