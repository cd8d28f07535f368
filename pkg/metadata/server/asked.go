package server

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// asked keeps containers of other hosts in memory, of all hosts or of one, for as long as somebody asks for
// them. A host hears nothing of what nobody on it asks for: with all hosts' containers on each host, an attach
// would cost every host of the cluster something.
type asked struct {
	s *Server

	mu    sync.Mutex
	parts map[string]*part // by prefix
}

// part is what lies below one prefix of the store.
type part struct {
	scope
	ready  chan struct{}
	cancel context.CancelFunc
	used   time.Time
}

// errUnread is the answer when what was asked for is not in memory, and cannot be read now.
var errUnread = fmt.Errorf("%w, and containers of other hosts were not asked for before: ask again when it is back",
	store.ErrUnavailable)

// get returns the containers below a prefix. The first that asks waits until they are read, unless the store is away.
func (a *asked) get(ctx context.Context, prefix string) (*part, error) {
	if a.s.ctx.Err() != nil {
		return nil, errUnread
	}
	a.mu.Lock()
	p := a.parts[prefix]
	if p == nil {
		p = &part{scope: scope{containers: newContainers(a.s.cfg.HostName), all: prefix == entry.ContainerPrefix},
			ready: make(chan struct{})}
		var follow context.Context
		follow, p.cancel = context.WithCancel(a.s.ctx)
		a.parts[prefix] = p
		a.s.log.Info("somebody asks for containers of other hosts; they are watched until nobody does", "prefix", prefix)
		a.s.wg.Go(func() { a.s.followContainers(follow, prefix, p.containers, p.ready) })
	}
	p.used = time.Now()
	a.mu.Unlock()
	ctx, cancel := a.s.timeout(ctx)
	defer cancel()
	if a.s.view.age() > silence {
		cancel()
	}
	select {
	case <-p.ready:
		return p, nil
	default:
	}
	select {
	case <-p.ready:
		return p, nil
	case <-ctx.Done():
		return nil, errUnread
	}
}

// have returns what is in memory below a prefix, nil when nothing is.
func (a *asked) have(prefix string) *part {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.parts[prefix]
	if p == nil {
		return nil
	}
	select {
	case <-p.ready:
		p.used = time.Now()
		return p
	default:
		return nil
	}
}

// all returns what is in memory.
func (a *asked) all() (out []*part) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, p := range a.parts {
		out = append(out, p)
	}
	return out
}

// forget ends what nobody has asked for in a while, until the server stops.
func (a *asked) forget() {
	t := time.NewTicker(a.s.cfg.Forget / 4)
	defer t.Stop()
	for {
		select {
		case <-a.s.ctx.Done():
			return
		case <-t.C:
			a.sweep(time.Now())
		}
	}
}

// silence is how long the store is silent at most when it is there: a watch tells every ten seconds.
const silence = 30 * time.Second

// sweep forgets, but for what could not be read again because the store is away.
func (a *asked) sweep(now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for prefix, p := range a.parts {
		if p.containers.age(now) > silence || now.Sub(p.used) <= a.s.cfg.Forget {
			continue
		}
		p.cancel()
		delete(a.parts, prefix)
		a.s.log.Info("nobody asks for containers of other hosts any more", "prefix", prefix)
	}
}
