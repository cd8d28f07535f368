package main

import (
	"context"
	"log/slog"
	"net/netip"
	"time"

	"github.com/lariat-net/lariat/pkg/doctor/echo"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// responder answers "lariat doctor" of the cluster's other hosts on this host's underlay address, and moves with it.
type responder struct {
	ctx  context.Context
	view func() *metadata.Snapshot
	log  *slog.Logger
	addr netip.Addr
	stop context.CancelFunc
}

// follow is called with each new view, one at a time.
func (r *responder) follow(s *metadata.Snapshot) {
	me, _ := s.Host(s.Self)
	addr := me.UnderlayAddr()
	if addr == r.addr {
		return
	}
	if r.stop != nil {
		r.stop()
	}
	r.addr = addr
	if !addr.IsValid() {
		return
	}
	var ctx context.Context
	ctx, r.stop = context.WithCancel(r.ctx)
	go r.serve(ctx, addr)
}

func (r *responder) serve(ctx context.Context, addr netip.Addr) {
	const again = 5 * time.Second
	for {
		err := echo.Server{Allow: r.known}.Serve(ctx, netip.AddrPortFrom(addr, echo.Port).String())
		if ctx.Err() != nil {
			return
		}
		r.log.Debug("doctor's probes are not answered", "address", addr, "error", err)
		t := time.NewTimer(again)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
	}
}

// known reports whether an address is a host's of the cluster: nobody else is answered.
func (r *responder) known(a netip.Addr) bool {
	for _, h := range r.view().Hosts {
		for _, u := range h.Underlay {
			if u.Address.Addr() == a {
				return true
			}
		}
	}
	return false
}
