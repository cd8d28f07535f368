package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// Locks serialise the work on one volume, or one directory, between processes. The kernel drops a
// lock when its process ends. Each key has a file of its own, so that a volume whose server hangs
// delays no other volume.
type Locks struct{ Dir string }

// LockAll takes the locks of several keys in their order: first the volume's lock, then the
// directory's.
func (l Locks) LockAll(ctx context.Context, purpose string, keys ...string) (unlock func(), err error) {
	var held []func()
	unlock = func() {
		for _, f := range slices.Backward(held) {
			f()
		}
	}
	for _, key := range keys {
		f, err := l.Lock(ctx, key, purpose)
		if err != nil {
			unlock()
			return nil, err
		}
		held = append(held, f)
	}
	return unlock, nil
}

// Lock waits until it has the lock of a key or the context ends. If the context ends, the error
// names the lock's holder and the holder's purpose.
func (l Locks) Lock(ctx context.Context, key, purpose string) (unlock func(), err error) {
	if err := os.MkdirAll(l.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("lock %s: %w", key, err)
	}
	path := filepath.Join(l.Dir, fileName(key)+".lock")
	type result struct {
		f   *os.File
		err error
	}
	release := func(f *os.File) {
		os.Remove(path) // while the lock is held: see lock
		f.Close()
	}
	// A signal cannot interrupt flock. If the caller no longer waits, release the lock as soon as
	// flock returns.
	got := make(chan result)
	go func() {
		f, err := lock(ctx, path)
		if f == nil && ctx.Err() != nil {
			return // Lock names the holder
		}
		select {
		case got <- result{f, err}:
		case <-ctx.Done():
			if f != nil {
				release(f)
			}
		}
	}()
	select {
	case r := <-got:
		if r.err != nil {
			return nil, fmt.Errorf("lock %s: %w", key, r.err)
		}
		// A waiter that times out reads this text. The lock does not depend on the text.
		_ = r.f.Truncate(0)
		_, _ = r.f.WriteAt(fmt.Appendf(nil, "process %d (%s)", os.Getpid(), purpose), 0)
		return func() { release(r.f) }, nil
	case <-ctx.Done():
		holder, _ := os.ReadFile(path)
		return nil, Errorf(ErrInUse, "%s of %s waited for %s: %w", purpose, key, strings.TrimSpace(string(holder)),
			context.Cause(ctx))
	}
}

// lock opens and locks the file at path. It repeats this until the locked file still has that name,
// or the context ends.
func lock(ctx context.Context, path string) (*os.File, error) {
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, err
		}
		for {
			err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX)
			if !errors.Is(err, syscall.EINTR) {
				break
			}
		}
		if err != nil {
			f.Close()
			return nil, err
		}
		mine, err := f.Stat()
		if err != nil {
			f.Close()
			return nil, err
		}
		if named, err := os.Stat(path); err == nil && os.SameFile(mine, named) {
			return f, nil
		}
		f.Close()
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
}
