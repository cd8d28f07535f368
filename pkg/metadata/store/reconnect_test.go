package store

import (
	"context"
	"log/slog"
	"net"
	"testing"
	"time"
)

// TestALostStoreIsLookedForAgainAndAgain: however long it was away, the next try is seconds off. gRPC's own
// pauses are two minutes long by the time of the tenth.
func TestALostStoreIsLookedForAgainAndAgain(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	const tries = 10
	enough := make(chan struct{})
	go func() {
		for n := 1; ; n++ {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conn.Close() // no store
			if n == tries {
				close(enough)
			}
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	go func() {
		_, _ = Dial(ctx, External{Endpoints: []string{"http://" + l.Addr().String()}, Log: slog.New(slog.DiscardHandler)})
	}()
	select {
	case <-enough:
	case <-ctx.Done():
		t.Errorf("fewer than %d tries in a minute", tries)
	}
}
