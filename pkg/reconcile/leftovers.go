package reconcile

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/lariat-net/lariat/pkg/attach"
	"github.com/lariat-net/lariat/pkg/cni"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/lease"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// Leftovers gives back what nobody uses any more: attachments of an earlier boot, of containers whose runtime died
// between two steps or never sends GC, and allocations that a killed ADD did not come to note. It also tells the metadata
// service what could not be told when it was away.
//
// A live container's attachment is never touched. The proof of life is the container's network namespace: while it exists, so
// does its end of the port, and the host's end with it.
type Leftovers struct {
	Client  metadata.Client
	Journal lease.Journal
	Kernel  kernel.Kernel
	BootID  string

	// Grace is how long something must look dead, at every pass, before it is taken for dead; an ADD under way must have the time
	// to finish. Things of an earlier boot need none.
	Grace time.Duration

	suspects map[string]time.Time // by what, since when; monotonic
}

// Run makes one pass.
func (l *Leftovers) Run(ctx context.Context) (changed []string, err error) {
	ports, err := l.Kernel.Ports(ctx)
	if err != nil {
		return nil, err
	}
	alive := make(map[metadata.AttachmentID]bool, len(ports))
	for _, p := range ports {
		alive[metadata.AttachmentID{ContainerID: p.Alias.ContainerID, IfName: p.Alias.IfName}] = true
	}
	networks, err := l.Journal.Networks()
	errs := []error{err}
	before := l.suspects
	l.suspects = map[string]time.Time{}
	suspect := func(key string, grace time.Duration) bool {
		since, ok := before[key]
		if !ok {
			since = time.Now()
		}
		l.suspects[key] = since
		return time.Since(since) >= grace
	}
	known := map[string]map[metadata.AttachmentID]bool{}
	waiting := 0 // for a service that could not do the first of them
	for _, network := range networks {
		known[network] = map[metadata.AttachmentID]bool{}
		records, err := l.Journal.List(network)
		errs = append(errs, err)
		for _, r := range records {
			known[network][r.AttachmentID] = true
			if waiting > 0 && r.State != lease.Held {
				waiting++
				continue
			}
			line, err := l.record(ctx, network, r, alive, suspect)
			if r.State != lease.Held && errors.Is(err, metadata.ErrUnreachable) {
				waiting = 1
			}
			if line != "" {
				changed = append(changed, line)
			}
			errs = append(errs, err)
		}
	}
	if waiting > 1 {
		errs = append(errs, fmt.Errorf("%d more wait for it", waiting-1))
	}
	view, err := l.Client.View(ctx)
	if err != nil {
		return changed, errors.Join(append(errs, err)...)
	}
	lines, err := l.allocations(ctx, view, known, alive, suspect)
	changed, errs = append(changed, lines...), append(errs, err)
	for _, network := range networks {
		if _, ok := view.Network(network); ok {
			continue
		}
		removed, err := l.Journal.RemoveNetwork(network)
		if removed {
			changed = append(changed, "removed the journal of network "+network+", which is deleted")
		}
		errs = append(errs, err)
	}
	return changed, errors.Join(errs...)
}

func (l *Leftovers) record(ctx context.Context, network string, r lease.Record, alive map[metadata.AttachmentID]bool, suspect func(string, time.Duration) bool) (string, error) {
	what := fmt.Sprintf("attachment %s of network %s", r.AttachmentID, network)
	switch r.State {
	case lease.Released:
		return l.locked(network, r, func(now lease.Record) (string, error) {
			err := l.Client.Release(ctx, network, r.AttachmentID, r.Sequence())
			if err != nil && !metadata.IsCode(err, metadata.CodeNotFound) {
				return "", fmt.Errorf("replay the release of %s: %w", what, err)
			}
			return "replayed the release of " + what, l.Journal.Remove(network, r.AttachmentID)
		})
	case lease.Unregistered:
		return l.locked(network, r, func(now lease.Record) (string, error) {
			req := metadata.AttachRequest{ContainerID: r.ContainerID, IfName: r.IfName, Foreign: true, Name: r.Name, UUID: r.UUID, Labels: r.Labels, StateDir: l.Journal.StateDir()}
			for _, a := range r.Attachment.Addresses {
				req.Requested = append(req.Requested, a.Address)
			}
			a, err := l.Client.Attach(ctx, network, req)
			if err != nil {
				return "", fmt.Errorf("register %s, which got its address while the metadata service was away: %w", what, err)
			}
			now.State, now.Attachment = lease.Held, *a
			return "registered " + what, l.Journal.Put(now)
		})
	}
	if alive[r.AttachmentID] || !l.gone(r) {
		return "", nil
	}
	grace := l.Grace
	if r.BootID != l.BootID {
		grace = 0
	}
	if !suspect("record\x00"+what, grace) {
		return "", nil
	}
	return l.locked(network, r, func(now lease.Record) (string, error) {
		if !l.gone(now) {
			return "", nil
		}
		if err := l.Kernel.DelPort(ctx, attach.HostName(r.AttachmentID)); err != nil {
			return "", err
		}
		book := lease.Book{Client: l.Client, Journal: l.Journal, Type: r.Type}
		if err := book.Release(ctx, network, r.AttachmentID); err != nil {
			return "", fmt.Errorf("release %s: %w", what, err)
		}
		return fmt.Sprintf("released %s: its network namespace %s is gone", what, r.Netns), nil
	})
}

// gone reports whether the record's namespace exists no more. Without a path there is no proof of death.
func (l *Leftovers) gone(r lease.Record) bool {
	if r.Netns == "" {
		return r.BootID != l.BootID
	}
	inode, err := cni.NetnsInode(r.Netns)
	if err != nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	return inode != r.NetnsInode
}

// locked does something about a record that is still the same once its lock is held.
func (l *Leftovers) locked(network string, r lease.Record, do func(now lease.Record) (string, error)) (string, error) {
	unlock, err := l.Journal.Lock(network, r.AttachmentID)
	if err != nil {
		return "", err
	}
	defer unlock()
	now, ok, err := l.Journal.Get(network, r.AttachmentID)
	if err != nil {
		return "", err
	}
	if !ok { // removed meanwhile, or torn: then r is all there is
		now = r
	}
	if ok && (now.State != r.State || !now.Created.Equal(r.Created)) {
		return "", nil
	}
	return do(now)
}

// allocations finds addresses that the service holds for this host and no record and no port vouches for. Only those count whose record
// would be in this journal.
func (l *Leftovers) allocations(ctx context.Context, view *metadata.Snapshot, known map[string]map[metadata.AttachmentID]bool, alive map[metadata.AttachmentID]bool,
	suspect func(string, time.Duration) bool,
) (changed []string, err error) {
	var errs []error
	for _, n := range view.Networks {
		held, err := l.Client.Allocations(ctx, n.Name, false)
		errs = append(errs, err)
		for _, a := range held {
			id := metadata.AttachmentID{ContainerID: a.ContainerID, IfName: a.IfName}
			if known[n.Name][id] || alive[id] || a.Host != view.Self {
				continue
			}
			grace := l.Grace
			switch {
			case a.BootID != l.BootID:
				grace = 0
			case a.StateDir != l.Journal.StateDir():
				continue // its record, if there is one, is in a journal that is not ours: a bridge's container may well be alive
			}
			if !suspect(fmt.Sprintf("allocation\x00%s\x00%s\x00%d", n.Name, a.Address, a.Sequence), grace) {
				continue
			}
			line, err := l.locked(n.Name, lease.Record{AttachmentID: id}, func(now lease.Record) (string, error) {
				if now.State != "" { // an ADD came in between
					return "", nil
				}
				if err := l.Client.Release(ctx, n.Name, id, a.Sequence); err != nil {
					return "", fmt.Errorf("release %s of network %s: %w", a.Address, n.Name, err)
				}
				return fmt.Sprintf("released %s of network %s: attachment %s was never finished", a.Address, n.Name, id), nil
			})
			if line != "" {
				changed = append(changed, line)
			}
			errs = append(errs, err)
		}
	}
	return changed, errors.Join(errs...)
}
