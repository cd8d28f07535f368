package reconcile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// In a bubble of synctest the clock stands still until everybody waits, so the times below are exact.

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

func TestConcernBacksOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		begin := time.Now()
		var at []time.Duration
		c := NewConcern("test", time.Minute, func(context.Context) ([]string, error) {
			at = append(at, time.Since(begin))
			if n := len(at); n <= 10 || n == 12 {
				return nil, errors.New("no such luck")
			}
			return nil, nil
		})
		if h := c.Health(); h.OK || h.Error == "" {
			t.Errorf("healthy before the first pass: %+v", h)
		}
		go c.Loop(ctx, discard())
		time.Sleep(10 * time.Minute) //nolint:forbidigo // the bubble's clock
		synctest.Wait()
		cancel()
		synctest.Wait()
		// 0.25 s, doubled up to 30 s, give or take half; after a success the slow timer, and after the next
		// failure from the start.
		want := []time.Duration{250, 500, 1000, 2000, 4000, 8000, 16000, 30000, 30000, 30000, 60000, 250, 60000}
		if len(at) <= len(want) {
			t.Fatalf("passes at %v", at)
		}
		different := false
		for i, w := range want {
			w *= time.Millisecond
			got := at[i+1] - at[i]
			if exact := w == time.Minute; exact && got != w || got < w/2 || got >= w+w/2 {
				t.Errorf("pass %d came after %s, want %s", i+1, got, w)
			}
			different = different || got != w && w != time.Minute
		}
		if !different {
			t.Error("hosts that failed together try again together")
		}
		if h := c.Health(); !h.OK || h.Failures != 11 || h.Error != "" {
			t.Errorf("%+v", h)
		}
	})
}

// TestConcernNeverWaitsLongerThanItsTimer, however often it failed.
func TestConcernNeverWaitsLongerThanItsTimer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		passes := 0
		c := NewConcern("test", time.Second, func(context.Context) ([]string, error) {
			passes++
			return nil,
				errors.New("no")
		})
		go c.Loop(ctx, discard())
		time.Sleep(10*time.Second + 1) //nolint:forbidigo // the bubble's clock
		synctest.Wait()
		if passes < 10 {
			t.Errorf("%d passes in 10 s", passes)
		}
	})
}

func TestConcernFoldsTriggers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var passes atomic.Int32
		c := NewConcern("test", time.Hour, func(context.Context) ([]string, error) {
			passes.Add(1)
			time.Sleep(time.Second) //nolint:forbidigo // a pass takes its time, by the bubble's clock
			return nil, nil
		})
		go c.Loop(ctx, discard())
		time.Sleep(500 * time.Millisecond) //nolint:forbidigo // the bubble's clock
		for range 100 {                    // all while the first pass runs
			c.Trigger()
		}
		time.Sleep(time.Minute) //nolint:forbidigo // the bubble's clock
		if n := passes.Load(); n != 2 {
			t.Errorf("100 triggers during a pass made %d passes, want one more", n-1)
		}
		c.Trigger()
		time.Sleep(time.Minute) //nolint:forbidigo // the bubble's clock
		if n := passes.Load(); n != 3 {
			t.Errorf("a trigger at rest: %d passes", n)
		}
	})
}

// TestConcernRestsInAStorm: a burst of changes does not keep a processor busy, and a change at rest waits for nothing.
func TestConcernRestsInAStorm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var passes atomic.Int32
		var last atomic.Int64
		c := NewConcern("test", time.Hour, func(context.Context) ([]string, error) {
			passes.Add(1)
			last.Store(time.Now().UnixNano())
			time.Sleep(50 * time.Millisecond) //nolint:forbidigo // a pass takes its time, by the bubble's clock
			return nil, nil
		})
		go c.Loop(ctx, discard())
		for range 1000 { // ten seconds
			c.Trigger()
			time.Sleep(10 * time.Millisecond) //nolint:forbidigo // the bubble's clock
		}
		if n := passes.Load(); n > 41 || n < 39 {
			t.Errorf("%d passes of 50 ms in 10 s, want one each 250 ms", n)
		}
		time.Sleep(time.Minute) //nolint:forbidigo // the bubble's clock
		before := passes.Load()
		now := time.Now()
		c.Trigger()
		synctest.Wait()
		if passes.Load() != before+1 || last.Load() != now.UnixNano() {
			t.Errorf("a trigger at rest: %d passes", passes.Load()-before)
		}
		// Whoever waits for the answer does not wait for the rest.
		time.Sleep(51 * time.Millisecond) //nolint:forbidigo // the bubble's clock
		c.Trigger()
		synctest.Wait()
		now = time.Now()
		if err := c.Do(ctx); err != nil || last.Load() != now.UnixNano() {
			t.Errorf("an order waited %s: %v", time.Unix(0, last.Load()).Sub(now), err)
		}
	})
}

// TestConcernTriggerCutsTheBackOffShort: what just changed may be what was missing.
func TestConcernTriggerCutsTheBackOffShort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		broken, last := true, time.Time{}
		c := NewConcern("test", time.Minute, func(context.Context) ([]string, error) {
			last = time.Now()
			if broken {
				return nil, errors.New("no")
			}
			return []string{"mended"}, nil
		})
		go c.Loop(ctx, discard())
		time.Sleep(20 * time.Second) //nolint:forbidigo // in the middle of a long wait
		synctest.Wait()
		broken = false
		now := time.Now()
		c.Trigger()
		synctest.Wait()
		if last != now || !c.Health().OK || c.Health().Changes != 1 {
			t.Errorf("the trigger waited for the back-off: %+v", c.Health())
		}
	})
}

// TestConcernWaitsForTheFirstViewInSilence: a manager is mostly started beside the metadata service; that is
// no failure.
func TestConcernWaitsForTheFirstViewInSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		ready := false
		c := NewConcern("test", time.Minute, func(context.Context) ([]string, error) {
			if !ready {
				return nil, errNoView
			}
			return nil, nil
		})
		var log bytes.Buffer
		go c.Loop(ctx, slog.New(slog.NewTextHandler(&log, nil)))
		synctest.Wait()
		if h := c.Health(); h.OK || h.Failures > 0 || h.Error == "" {
			t.Errorf("before the first view: %+v", h)
		}
		ready = true
		c.Trigger()
		synctest.Wait()
		if h := c.Health(); !h.OK || h.Failures > 0 || log.Len() > 0 {
			t.Errorf("after it: %+v, log %q", h, log.String())
		}
		cancel()
		synctest.Wait()
	})
}

// TestConcernLogsOnce: a failure, each new one, the recovery, every change; nothing twice, and nothing when
// nothing happens.
func TestConcernLogsOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var log bytes.Buffer
		n := 0
		c := NewConcern("test", time.Second, func(context.Context) ([]string, error) {
			n++
			switch {
			case n <= 5:
				return nil, errors.New("first")
			case n <= 8:
				return []string{"+ one", "- two"}, errors.New("second")
			}
			return nil, nil
		})
		go c.Loop(ctx, slog.New(slog.NewTextHandler(&log, nil)))
		time.Sleep(time.Minute) //nolint:forbidigo // the bubble's clock
		synctest.Wait()
		cancel()
		synctest.Wait()
		for words, want := range map[string]int{"error=first": 1, "error=second": 1, "msg=recovered": 1, "failures=8": 1,
			`change="+ one"`: 3, `change="- two"`: 3} {
			if got := strings.Count(log.String(), words); got != want {
				t.Errorf("%q is said %d times, want %d", words, got, want)
			}
		}
		if lines := strings.Count(log.String(), "\n"); lines != 9 {
			t.Errorf("%d lines:\n%s", lines, &log)
		}
	})
}

// TestConcernEndsInTheMiddleOfAPass without a word: its error is only that it was told to stop.
func TestConcernEndsInTheMiddleOfAPass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var log bytes.Buffer
		c := NewConcern("test", time.Second, func(ctx context.Context) ([]string, error) {
			<-ctx.Done()
			return nil,
				ctx.Err()
		})
		done := make(chan struct{})
		go func() { c.Loop(ctx, slog.New(slog.NewTextHandler(&log, nil))); close(done) }()
		synctest.Wait()
		cancel()
		<-done
		if log.Len() > 0 || c.Health().Failures > 0 {
			t.Errorf("%s %+v", &log, c.Health())
		}
	})
}

// TestF47_DoAnswersForItsOwnPass: a pass that was under way when it was asked has seen the old files, and is
// not the one that counts.
func TestF47_DoAnswersForItsOwnPass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var passes atomic.Int32
		c := NewConcern("test", time.Hour, func(context.Context) ([]string, error) {
			n := passes.Add(1)
			time.Sleep(time.Second) //nolint:forbidigo // a pass takes its time, by the bubble's clock
			return nil, fmt.Errorf("pass %d", n)
		})
		go c.Loop(ctx, discard())
		synctest.Wait() // the first is under way
		if err := c.Do(ctx); err == nil || err.Error() != "pass 2" {
			t.Errorf("answered by %v", err)
		}
		short, stop := context.WithTimeout(ctx, 500*time.Millisecond)
		defer stop()
		if err := c.Do(short); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a pass that takes too long: %v", err)
		}
		time.Sleep(time.Minute) //nolint:forbidigo // until that pass is over
	})
}

// TestF44_MendingIsRedUntilTheEndOfThePass: what a pass finds broken is told while it mends, and is no reason
// for another pass.
func TestF44_MendingIsRedUntilTheEndOfThePass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var c *Concern
		passes := 0
		c = NewConcern("test", time.Hour, func(context.Context) ([]string, error) {
			if passes++; passes > 1 {
				c.Repairing(errors.New("not there"))
				time.Sleep(time.Second) //nolint:forbidigo // a pass takes its time, by the bubble's clock
			}
			return nil, nil
		})
		go c.Loop(ctx, discard())
		time.Sleep(time.Minute) //nolint:forbidigo // the bubble's clock
		c.Trigger()
		synctest.Wait()
		if h := c.Health(); h.OK || h.Error != "not there" {
			t.Errorf("while it is mended: %+v", h)
		}
		time.Sleep(time.Minute) //nolint:forbidigo // the bubble's clock
		if h := c.Health(); !h.OK || h.Error != "" || passes != 2 {
			t.Errorf("mended: %+v, %d passes", h, passes)
		}
	})
}

// TestF44_BrokenIsRedUntilThePass: what was seen to break is told at once, and what mended it too.
func TestF44_BrokenIsRedUntilThePass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		c := NewConcern("test", time.Hour, func(context.Context) ([]string, error) {
			time.Sleep(time.Second) //nolint:forbidigo // a pass takes its time, by the bubble's clock
			return nil, nil
		})
		go c.Loop(ctx, discard())
		time.Sleep(time.Minute) //nolint:forbidigo // the bubble's clock
		if !c.Health().OK {
			t.Fatal("not healthy to begin with")
		}
		c.Broken(errors.New("gone"))
		synctest.Wait()
		if h := c.Health(); h.OK || h.Error != "gone" {
			t.Errorf("while it is mended: %+v", h)
		}
		time.Sleep(500 * time.Millisecond) //nolint:forbidigo // in the middle of the pass
		c.Broken(errors.New("gone again"))
		time.Sleep(time.Second) //nolint:forbidigo // in the middle of the next
		if h := c.Health(); h.OK || h.Error != "gone again" {
			t.Errorf("a pass that began before it broke is through: %+v", h)
		}
		time.Sleep(time.Second) //nolint:forbidigo // the bubble's clock
		if h := c.Health(); !h.OK || h.Error != "" || h.Failures != 0 {
			t.Errorf("mended: %+v", h)
		}
	})
}
