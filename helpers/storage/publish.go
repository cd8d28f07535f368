package main

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/volume/dockerapi"
)

// publisher tells the metadata service which volumes this host has of the driver. Docker's calls do not wait
// for it and do not fail by it: each pass compares all volumes with what the service has, so what could not
// be told is told later.
type publisher struct {
	client  metadata.Client
	driver  string // as Docker's users call it
	scope   string
	volumes func() ([]dockerapi.Volume, error)
	log     *slog.Logger
	wake    chan struct{} // of one place: something has changed since the last pass began
}

// Times of a publisher.
const (
	gatherTime = 200 * time.Millisecond // changes within it are told together
	askTime    = 10 * time.Second       // for one answer of the service
	retryFirst = time.Second            // after a pass that failed, and twice as long after each further one
	retryLast  = time.Minute
	// what the service has is read again: it may have been restored, or have forgotten this host
	checkEvery = 10 * time.Minute
)

// changed never waits.
func (p *publisher) changed() {
	select {
	case p.wake <- struct{}{}:
	default: // the pass to come sees this change, too
	}
}

// run publishes until its context ends.
func (p *publisher) run(ctx context.Context) {
	check := time.NewTicker(checkEvery)
	defer check.Stop()
	var told map[string]metadata.Volume // what the service has of ours; nil: it is to be asked
	var before error
	retry := retryFirst
	for {
		var err error
		if told, err = p.tell(ctx, told); ctx.Err() != nil {
			return
		}
		p.report(before, err)
		before = err
		if err != nil {
			told = nil
			pause(ctx, retry)
			retry = min(2*retry, retryLast)
			continue
		}
		retry = retryFirst
		select {
		case <-ctx.Done():
		case <-p.wake:
			pause(ctx, gatherTime)
		case <-check.C:
			told = nil
		}
	}
}

// report writes what is new. Where there is no service, nobody misses it.
func (p *publisher) report(before, now error) {
	switch {
	case now == nil && before != nil:
		p.log.Info("volumes are listed in the metadata")
	case now != nil && (before == nil || before.Error() != now.Error()):
		level := slog.LevelWarn
		if errors.Is(now, fs.ErrNotExist) {
			level = slog.LevelDebug
		}
		p.log.Log(context.Background(), level, "volumes are not listed in the metadata; it is tried again", "error", now)
	}
}

// tell is one pass. It returns what the service has after it.
func (p *publisher) tell(ctx context.Context, told map[string]metadata.Volume) (map[string]metadata.Volume, error) {
	ask := func(question func(context.Context) error) error {
		ctx, cancel := context.WithTimeout(ctx, askTime)
		defer cancel()
		return question(ctx)
	}
	if told == nil {
		told = map[string]metadata.Volume{}
		err := ask(func(ctx context.Context) error {
			list, err := p.client.Volumes(ctx, true)
			for _, v := range list {
				if v.Driver == p.driver {
					v.Host = "" // the service's to say
					told[v.Name] = v
				}
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	all, err := p.volumes()
	if err != nil {
		return nil, err
	}
	here := map[string]bool{}
	var errs []error
	for _, v := range all {
		here[v.Name] = true
		now := p.describe(v)
		if told[v.Name] == now {
			continue
		}
		if err := ask(func(ctx context.Context) error { return p.client.PutVolume(ctx, now) }); errors.Is(err,
			metadata.ErrUnreachable) {
			return nil, err
		} else if err != nil {
			errs = append(errs, err) // the others are told nevertheless
			continue
		}
		told[v.Name] = now
	}
	for name := range told {
		if here[name] {
			continue
		}
		if err := ask(func(ctx context.Context) error { return p.client.RemoveVolume(ctx, p.driver, name) }); err != nil {
			return nil, errors.Join(append(errs, err)...)
		}
		delete(told, name)
	}
	return told, errors.Join(errs...)
}

// describe is what others may know of a volume. Two are equal by == because the time is in whole seconds of
// UTC, as in JSON.
func (p *publisher) describe(v dockerapi.Volume) metadata.Volume {
	out := metadata.Volume{Driver: p.driver, Name: v.Name, Scope: p.scope, State: string(v.State),
		Created: v.Created.UTC().Truncate(time.Second)}
	for _, n := range v.Users {
		out.Users += n
	}
	return out
}

// pause waits, or until the context ends.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
