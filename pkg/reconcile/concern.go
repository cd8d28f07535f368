// Package reconcile keeps a host's kernel equal to the metadata: one loop per concern, each of which
// observes, diffs and applies on an event, on a timer, and again with back-off after an error.
package reconcile

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"
)

// Concern is one thing that is kept true: run on a trigger, on a timer, and again with back-off after an error.
type Concern struct {
	Name  string
	Every time.Duration // the slow timer

	// Run observes and mends. It returns what it changed, as lines for the log; no lines means that all was well.
	Run func(ctx context.Context) (changed []string, err error)

	trigger chan struct{}
	ask     chan chan error
	mu      sync.Mutex
	health  Health
	breaks  uint64 // how often it was seen to break
}

// Health is how a concern fares.
type Health struct {
	Concern     string        `json:"concern"`
	OK          bool          `json:"ok"`
	Error       string        `json:"error,omitempty"`
	LastSuccess time.Time     `json:"lastSuccess,omitzero"`
	Passes      uint64        `json:"passes"`
	Failures    uint64        `json:"failures"`
	Changes     uint64        `json:"changes"`
	Took        time.Duration `json:"tookNanoseconds"` // by the last pass
}

// NewConcern makes a concern that has not run yet, and so is not healthy yet.
func NewConcern(name string, every time.Duration, run func(ctx context.Context) ([]string, error)) *Concern {
	return &Concern{Name: name, Every: every, Run: run, trigger: make(chan struct{}, 1), ask: make(chan chan error),
		health: Health{Concern: name, Error: "has not run yet"}}
}

// Trigger asks for a pass soon. Triggers that come while a pass runs, or shortly after, are folded into the next one.
func (c *Concern) Trigger() {
	select {
	case c.trigger <- struct{}{}:
	default:
	}
}

// Broken says that what was kept true has been seen to break, and asks for a pass: until one that began after
// that is through the concern is not healthy.
func (c *Concern) Broken(err error) {
	c.mu.Lock()
	c.breaks++
	c.health.OK, c.health.Error = false, err.Error()
	c.mu.Unlock()
	c.Trigger()
}

// Repairing says, in a pass, what the pass found broken: until it is through the concern is not healthy.
func (c *Concern) Repairing(err error) {
	c.mu.Lock()
	c.health.OK, c.health.Error = false, err.Error()
	c.mu.Unlock()
}

// Do runs a pass that begins after the call, and returns what came of it.
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

// Health reports how the last pass went.
func (c *Concern) Health() Health {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.health
}

// Loop runs the concern until the context ends. The first pass is at once.
func (c *Concern) Loop(ctx context.Context, log *slog.Logger) {
	const firstRetry, lastRetry = 250 * time.Millisecond, 30 * time.Second
	// After a pass triggers wait for four times as long as it took: a storm of them has a fifth of a processor, and
	// one that comes at rest is served at once. What others break is mended within a second all the same.
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
			// Hosts that failed together, as when the store was away, do not try again together.
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

// note takes down how a pass went. breaks is c.breaks from when it began.
func (c *Concern) note(breaks uint64, changes int, took time.Duration, err error, log *slog.Logger) {
	c.mu.Lock()
	defer c.mu.Unlock()
	before := c.health
	c.health.Passes++
	c.health.Changes += uint64(changes)
	c.health.Took = took
	switch {
	case errors.Is(err, errNoView): // at every start; the watch tells when that does not end
		c.health.OK, c.health.Error = false, err.Error()
		return
	case err != nil:
		c.health.OK, c.health.Error = false, err.Error()
		c.health.Failures++
	case c.breaks != breaks: // it may have looked before it broke
		c.health.OK, c.health.Error = false, before.Error
	default:
		c.health.OK, c.health.Error, c.health.LastSuccess = true, "", time.Now().UTC()
	}
	// A quiet log is how flapping is found: say what is new, and nothing twice.
	switch {
	case err != nil && before.Error != err.Error():
		log.Error("failed, will be tried again", "concern", c.Name, "error", err)
	case c.health.OK && !before.OK && before.Failures > 0:
		log.Info("recovered", "concern", c.Name, "failures", before.Failures)
	}
}
