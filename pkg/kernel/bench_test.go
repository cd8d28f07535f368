package kernel_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/kernel"
)

// A pass without changes takes at most 5 ms for 1 000 peers.
func BenchmarkSettled(b *testing.B) {
	for _, n := range []int{100, 1000, 10000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			_, k := newKernel(b)
			want := overlay(n)
			reconcile(b, k, want)
			b.ReportAllocs()
			for b.Loop() {
				if d := reconcile(b, k, want); !d.Empty() {
					b.Fatalf("not settled:\n%s", d)
				}
			}
		})
	}
}

// The first pass takes at most 0.2 s for 10 000 peers, and its cost is not quadratic.
func BenchmarkFromNothing(b *testing.B) {
	for _, n := range []int{1000, 10000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			_, k := newKernel(b)
			want := overlay(n)
			for b.Loop() {
				reconcile(b, k, want)
				b.StopTimer()
				reconcile(b, k, delta.NewState())
				b.StartTimer()
			}
		})
	}
}

// This benchmark shows the parts of a pass's time.
func BenchmarkObserve1000(b *testing.B) {
	_, k := newKernel(b)
	want := overlay(1000)
	reconcile(b, k, want)
	var have *delta.State
	var observing time.Duration
	for b.Loop() {
		start := time.Now()
		have, _ = k.Observe(context.Background(), want)
		observing += time.Since(start)
		delta.Between(want, have)
	}
	b.ReportMetric(float64(observing.Microseconds())/float64(b.N), "observe-µs/op")
}

var _ kernel.Kernel = (*kernel.Netns)(nil)
