package unixhttp

import (
	"context"
	"io"
	"os"
	"sync"
	"syscall"
	"time"
)

// conn is a blocking unix socket. Package net would do, but for its poller: a process that asks one question
// and ends spends more on setting that up, and on the threads that it wakes, than on the question.
type conn struct {
	mu     sync.Mutex // guards against a shutdown of a descriptor that is closed, and maybe someone else's by then
	fd     int
	closed bool
	ctx    context.Context
	stop   func() bool
}

// dial connects within the context's deadline; Read and Write keep to it as well, and end when it is cancelled.
func dial(ctx context.Context, path string) (*conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	c := &conn{fd: fd, ctx: ctx}
	if deadline, ok := ctx.Deadline(); ok {
		left := syscall.NsecToTimeval(max(int64(time.Until(deadline)), int64(time.Millisecond)))
		_ = syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &left)
		_ = syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_SNDTIMEO, &left)
	}
	for {
		if err = syscall.Connect(fd, &syscall.SockaddrUnix{Name: path}); err != syscall.EINTR {
			break
		}
	}
	if err != nil {
		_ = syscall.Close(fd)
		if err == syscall.EAGAIN { // the time to send is over
			err = context.DeadlineExceeded
		}
		return nil, &os.PathError{Op: "connect", Path: path, Err: err}
	}
	c.stop = context.AfterFunc(ctx, c.shutdown)
	return c, nil
}

func (c *conn) shutdown() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		_ = syscall.Shutdown(c.fd, syscall.SHUT_RDWR)
	}
}

// Read implements io.Reader.
func (c *conn) Read(p []byte) (int, error) {
	for {
		n, err := syscall.Read(c.fd, p)
		switch {
		case err == syscall.EINTR:
			continue
		case c.ctx.Err() != nil:
			return max(n, 0), c.ctx.Err()
		case err == syscall.EAGAIN:
			return 0, context.DeadlineExceeded
		case err != nil:
			return 0, os.NewSyscallError("read", err)
		case n == 0:
			return 0, io.EOF
		}
		return n, nil
	}
}

// Write implements io.Writer.
func (c *conn) Write(p []byte) (written int, err error) {
	for written < len(p) {
		n, err := syscall.Write(c.fd, p[written:])
		switch {
		case err == syscall.EINTR:
			continue
		case c.ctx.Err() != nil:
			return written, c.ctx.Err()
		case err == syscall.EAGAIN:
			return written, context.DeadlineExceeded
		case err != nil:
			return written, os.NewSyscallError("write", err)
		}
		written += n
	}
	return written, nil
}

// Close implements io.Closer.
func (c *conn) Close() error {
	c.stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	return syscall.Close(c.fd)
}
