package volume

import (
	"context"
	"time"
)

// Deadlines of verbs whose caller sets none. kubelet waits for ever, dockerd for two minutes at Create and Mount and for one at the others;
// an answer must be out before, because what comes later is thrown away.
var Deadlines = struct{ Long, Short time.Duration }{Long: 110 * time.Second, Short: 50 * time.Second}

// WithDeadline gives a context a deadline unless it has one.
func WithDeadline(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeoutCause(ctx, d, Timeout(d))
}

// Timeout is the cause to give to a context with a deadline. It is context.DeadlineExceeded with the time.
func Timeout(d time.Duration) error { return timeout(d) }

type timeout time.Duration

func (t timeout) Error() string {
	return "no end after " + time.Duration(t).Round(100*time.Millisecond).String()
}
func (t timeout) Is(target error) bool { return target == context.DeadlineExceeded }
