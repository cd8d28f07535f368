package volume

import (
	"context"
	"time"
)

// Deadlines apply to verbs whose caller sets no deadline. kubelet waits for ever. dockerd waits two
// minutes for Create and Mount, and one minute for the other verbs. A driver must answer before
// that, because dockerd discards a later answer.
var Deadlines = struct{ Long, Short time.Duration }{Long: 110 * time.Second, Short: 50 * time.Second}

// WithDeadline gives a context a deadline unless it has one.
func WithDeadline(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeoutCause(ctx, d, Timeout(d))
}

// WithReserve returns a context that ends a little before the deadline of ctx. The reserve leaves
// time to report why a call failed. ctx must have a deadline: see WithDeadline.
func WithReserve(ctx context.Context) (context.Context, context.CancelFunc) {
	end, _ := ctx.Deadline()
	left := time.Until(end)
	left -= min(left/5, 3*time.Second)
	return context.WithTimeoutCause(ctx, left, Timeout(left))
}

// Timeout returns the cause of a context with the deadline d. The cause matches
// context.DeadlineExceeded and its text shows d.
func Timeout(d time.Duration) error { return timeout(d) }

type timeout time.Duration

func (t timeout) Error() string {
	return "no end after " + time.Duration(t).Round(100*time.Millisecond).String()
}
func (t timeout) Is(target error) bool { return target == context.DeadlineExceeded }
