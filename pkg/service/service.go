// Package service is the skeleton of every long-running helper: flags, logging, signals, one process for a socket,
// who may ask what, systemd's protocol, and an end in good order. See Run.
package service

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
)

// Listen listens on a unix socket that only its owner may open. What a killed process left there is replaced;
// a socket that somebody serves is not, and the error says who. A file beside it (path + ".lock") decides, so
// that of two processes which start at once one gives up. Closing takes both away.
func Listen(path string) (*Socket, error) {
	l, err := listen(path)
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	return l, nil
}

func listen(path string) (_ *Socket, err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	lock, err := hold(path + ".lock")
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, release(lock))
		}
	}()
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, errors.New("another program serves it; stop that one, or give this one another --socket")
	}
	if lock.Truncate(0) == nil { // a full disk is no reason to refuse the service
		fmt.Fprintf(lock, "%s with process id %d", filepath.Base(os.Args[0]), os.Getpid()) //nolint:errcheck // see above
	}
	// Made under another name, so that nobody meets a socket that refuses him or that everybody may open.
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	if err = os.Chmod(tmp, 0o600); err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		return nil, errors.Join(err, l.Close(), os.Remove(tmp))
	}
	return &Socket{Listener: l, path: path, lock: lock}, nil
}

// hold locks a file, which the holder before may just have removed: then it is made anew.
func hold(path string) (*os.File, error) {
	for {
		lock, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
			holder, _ := io.ReadAll(io.LimitReader(lock, 200)) // only for the message
			lock.Close()
			if len(holder) == 0 {
				holder = []byte("another process")
			}
			return nil, fmt.Errorf("%s serves it already; stop that one, or give this one another --socket", holder)
		} else if err != nil {
			lock.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		mine, err := lock.Stat()
		if err != nil {
			lock.Close()
			return nil, err
		}
		if named, err := os.Stat(path); err == nil && os.SameFile(mine, named) {
			return lock, nil
		}
		lock.Close()
	}
}

// release removes the lock's file while it is held, so that no process holds a file without a name.
func release(lock *os.File) error { return errors.Join(os.Remove(lock.Name()), lock.Close()) }

// Socket is a unix socket that only its owner may open. It holds the lock for as long as it listens.
type Socket struct {
	net.Listener
	path string
	lock *os.File
	once sync.Once // a second Close would take away the socket of who came next
	err  error
}

// Close implements net.Listener.
func (l *Socket) Close() error {
	l.once.Do(func() { l.err = errors.Join(os.Remove(l.path), l.Listener.Close(), release(l.lock)) })
	return l.err
}

// ready tells systemd that the service can be asked, and from then on, if the unit wants it (WatchdogSec=),
// that it is alive: for as long as ctx lives and alive says so; nil means always. Without systemd it does
// nothing.
func ready(ctx context.Context, alive func() bool) {
	notify(daemon.SdNotifyReady)
	every, err := daemon.SdWatchdogEnabled(false)
	if err != nil || every == 0 {
		return
	}
	go func() {
		t := time.NewTicker(every / 2)
		defer t.Stop()
		for {
			if alive == nil || alive() {
				notify(daemon.SdNotifyWatchdog)
			}
			select {
			case <-ctx.Done():
				return
			case <-t.C:
			}
		}
	}()
}

// Starting tells systemd that the start goes on, and that it must wait for at least so long from now.
func Starting(patience time.Duration) {
	notify(fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d", patience.Microseconds()))
}

// stopping tells systemd that the service ends in good order.
func stopping() { notify(daemon.SdNotifyStopping) }

// notify ignores errors: without systemd there is nobody to notify.
func notify(state string) { daemon.SdNotify(false, state) }
