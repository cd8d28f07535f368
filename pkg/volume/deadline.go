package volume

import (
	"context"
	"time"
)

// Deadlines of verbs whose caller sets none. kubelet waits for ever, dockerd for two minutes at Create and
// Mount and for one at the others; an answer must be out before, because what comes later is thrown away.
var Deadlines = struct{ Long, Short time.Duration }{Long: 110 * time.Second, Short: 50 * time.Second}

// WithDeadline gives a context a deadline unless it has one.
func WithDeadline(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeoutCause(ctx, d, Timeout(d))
}

// WithReserve ends a while before the deadline of a context, so that there is time left to say why. The
// context has one: see WithDeadline.
func WithReserve(ctx context.Context) (context.Context, context.CancelFunc) {
	end, _ := ctx.Deadline()
	left := time.Until(end)
	left -= min(left/5, 3*time.Second)
	return context.WithTimeoutCause(ctx, left, Timeout(left))
}

// Timeout is the cause to give to a context with a deadline. It is context.DeadlineExceeded with the time.
func Timeout(d time.Duration) error { return timeout(d) }

type timeout time.Duration

func (t timeout) Error() string {
	return "no end after " + time.Duration(t).Round(100*time.Millisecond).String()
}
func (t timeout) Is(target error) bool { return target == context.DeadlineExceeded }
