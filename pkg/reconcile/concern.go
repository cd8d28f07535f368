// Package reconcile keeps a host's kernel equal to the metadata. It runs one loop per concern. Each
// loop observes, diffs and applies on an event, on a timer, and with back-off after an error.
package reconcile

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"
)

// A Concern is one reconcile loop. It runs on a trigger, on a timer, and with back-off after an
// error.
type Concern struct {
	Name  string
	Every time.Duration // the slow timer

	// Run observes and repairs. It returns its changes, as lines for the log. No lines means that
	// no change was needed.
	Run func(ctx context.Context) (changed []string, err error)

	trigger chan struct{}
	ask     chan chan error
	mu      sync.Mutex
	health  Health
	breaks  uint64 // how many times Broken was called
}

// Health describes the state of a concern.
type Health struct {
	Concern     string        `json:"concern"`
	OK          bool          `json:"ok"`
	Error       string        `json:"error,omitempty"`
	LastSuccess time.Time     `json:"lastSuccess,omitzero"`
	Passes      uint64        `json:"passes"`
	Failures    uint64        `json:"failures"`
	Changes     uint64        `json:"changes"`
	Took        time.Duration `json:"tookNanoseconds"` // duration of the last pass
}

// NewConcern returns a concern that has not run yet. It is not healthy before its first pass.
func NewConcern(name string, every time.Duration, run func(ctx context.Context) ([]string, error)) *Concern {
	return &Concern{Name: name, Every: every, Run: run, trigger: make(chan struct{}, 1), ask: make(chan chan error),
		health: Health{Concern: name, Error: "has not run yet"}}
}

// Trigger asks for a pass soon. Triggers that come during a pass, or shortly after it, are folded
// into the next pass.
func (c *Concern) Trigger() {
	select {
	case c.trigger <- struct{}{}:
	default:
	}
}

// Broken marks the concern as not healthy and triggers a pass. The concern stays not healthy until
// a pass that began after the call succeeds.
func (c *Concern) Broken(err error) {
	c.mu.Lock()
	c.breaks++
	c.health.OK, c.health.Error = false, err.Error()
	c.mu.Unlock()
	c.Trigger()
}

// Repairing marks the concern as not healthy until the running pass ends. A pass calls it with the
// fault that it found.
func (c *Concern) Repairing(err error) {
	c.mu.Lock()
	c.health.OK, c.health.Error = false, err.Error()
	c.mu.Unlock()
}

// Do runs a pass that begins after the call, and returns the error of the pass.
func (c *Concern) Do(ctx context.Context) error {
	answer := make(chan error, 1)
	select {
	case c.ask <- answer:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-answer:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Health returns the result of the last pass.
func (c *Concern) Health() Health {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.health
}

// Loop runs the concern until the context ends. The first pass starts at once.
func (c *Concern) Loop(ctx context.Context, log *slog.Logger) {
	const firstRetry, lastRetry = 250 * time.Millisecond, 30 * time.Second
	// After a pass, triggers wait for four times the duration of the pass, at most longestRest. So
	// a storm of triggers uses a fifth of a processor. A trigger at rest is served at once. Foreign
	// changes are still repaired within a second.
	const restFactor, longestRest = 4, 250 * time.Millisecond
	retry := firstRetry
	var asked chan error
	for {
		c.mu.Lock()
		breaks := c.breaks
		c.mu.Unlock()
		start := time.Now()
		changed, err := c.Run(ctx)
		if ctx.Err() != nil {
			return
		}
		took := time.Since(start)
		rested := time.NewTimer(min(restFactor*took, longestRest))
		c.note(breaks, len(changed), took, err, log)
		if asked != nil {
			asked <- err
			asked = nil
		}
		for _, line := range changed {
			log.Info("changed", "concern", c.Name, "change", line)
		}
		wait := c.Every
		if err != nil {
			// Hosts that failed together, as when the store was away, must not retry together.
			wait, retry = min(retry/2+rand.N(retry), c.Every), min(2*retry, lastRetry)
		} else {
			retry = firstRetry
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-timer.C:
		case <-c.trigger:
			select {
			case <-ctx.Done():
			case <-rested.C:
			case asked = <-c.ask:
			}
		case asked = <-c.ask:
		}
		timer.Stop()
		rested.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}

// note records the result of a pass. breaks is the value of c.breaks when the pass began.
func (c *Concern) note(breaks uint64, changes int, took time.Duration, err error, log *slog.Logger) {
	c.mu.Lock()
	defer c.mu.Unlock()
	before := c.health
	c.health.Passes++
	c.health.Changes += uint64(changes)
	c.health.Took = took
	switch {
	case errors.Is(err, errNoView): // happens at every start; the watch reports a service that stays away
		c.health.OK, c.health.Error = false, err.Error()
		return
	case err != nil:
		c.health.OK, c.health.Error = false, err.Error()
		c.health.Failures++
	case c.breaks != breaks: // the pass may have observed before the break
		c.health.OK, c.health.Error = false, before.Error
	default:
		c.health.OK, c.health.Error, c.health.LastSuccess = true, "", time.Now().UTC()
	}
	// A quiet log makes flapping visible. So note logs each change of state once.
	switch {
	case err != nil && before.Error != err.Error():
		log.Error("failed, will be tried again", "concern", c.Name, "error", err)
	case c.health.OK && !before.OK && before.Failures > 0:
		log.Info("recovered", "concern", c.Name, "failures", before.Failures)
	}
}
