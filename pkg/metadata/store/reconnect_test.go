package store

import (
	"context"
	"log/slog"
	"net"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
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

// TestALeaseOutlivesAnOutage: the store gives every lease its time anew when it is back, so a host that lives has
// written nothing once more, however long the store was away.
func TestALeaseOutlivesAnOutage(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := "http://" + l.Addr().String()
	l.Close()
	dir := t.TempDir()
	start := func() *Etcd {
		s, err := Open(t.Context(), Embedded{Dir: dir, Prefix: "/lariat/v1/", ListenClient: at})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := start()
	host, err := Dial(t.Context(), External{Endpoints: []string{at}, Prefix: "/lariat/v1/",
		Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	const ttl = 8 * time.Second
	lease, err := host.Hold(t.Context(), ttl)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := One(t.Context(), host, Change{Key: "live", Value: []byte("1"), Lease: lease}); err != nil {
		t.Fatal(err)
	}
	s.Close()
	select {
	case <-lease.Lost():
		t.Fatal("the lease is given up while the store is away")
	case <-time.After(ttl + ttl/2): // nothing but time lets etcd's client give it up
	}
	s = start()
	defer s.Close()
	// The last word about it: it is renewed, or it is lost.
	left := int64(0)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		r, err := host.client.TimeToLive(t.Context(), clientv3.LeaseID(lease.id))
		if err == nil && r.TTL > left && left > 0 {
			break
		} else if err == nil {
			left = r.TTL
		}
		select {
		case <-lease.Lost():
			t.Fatal("the lease is lost, and the host must write its claims once more")
		case <-tick.C:
		}
	}
	if e, err := host.Get(t.Context(), "live"); err != nil || !e.Held {
		t.Errorf("what the lease held: %+v %v", e, err)
	}
}
