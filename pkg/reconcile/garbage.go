package reconcile

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/lariat-net/lariat/pkg/attach"
	"github.com/lariat-net/lariat/pkg/ipam"
	"github.com/lariat-net/lariat/pkg/journal"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// GarbageCollector releases resources that no live container owns. These are attachments of an
// earlier boot and attachments whose runtime died between two steps or never sends GC. Allocations
// that a killed ADD did not record are released too. The collector also replays releases that the
// metadata service missed while it was away. It registers attachments that the service has lost.
//
// It never touches the attachment of a live container. The proof of life is the container's network
// namespace. While the namespace exists, so do both ends of the veth pair.
type GarbageCollector struct {
	Client  metadata.Client
	Journal journal.Journal
	Kernel  kernel.Kernel
	BootID  string

	// Grace is how long something must look dead, at every pass, before it is garbage-collected. An
	// ADD in progress must have time to finish. Things of an earlier boot need no grace.
	Grace time.Duration

	suspects map[string]time.Time // first time seen dead, by key; monotonic

	settled atomic.Pointer[map[string]bool] // networks that the last pass settled, by incarnation
}

// Run makes one pass.
func (l *GarbageCollector) Run(ctx context.Context) (changed []string, err error) {
	ports, err := l.Kernel.Veths(ctx)
	if err != nil {
		return nil, err
	}
	alive := make(map[metadata.AttachmentID]bool, len(ports))
	for _, p := range ports {
		alive[metadata.AttachmentID{ContainerID: p.Alias.ContainerID, IfName: p.Alias.IfName}] = true
	}
	networks, err := l.Journal.Networks()
	errs := []error{err}
	records := map[string][]journal.Record{}
	for _, network := range networks {
		records[network], err = l.Journal.List(network)
		errs = append(errs, err)
	}
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
	view, err := l.Client.View(ctx)
	if err == nil {
		// Live attachments come first: until the service knows their addresses it may allocate
		// these to other containers.
		changed, err = l.allocations(ctx, view, records, alive, suspect)
	}
	errs = append(errs, err)
	waiting := 0 // records that wait because the service was unreachable for the first
	for _, network := range networks {
		for _, r := range records[network] {
			if waiting > 0 && r.State != journal.Held {
				waiting++
				continue
			}
			line, err := l.record(ctx, network, r, alive, suspect)
			if r.State != journal.Held && errors.Is(err, metadata.ErrUnreachable) {
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
	for _, network := range networks {
		if view == nil {
			break
		}
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

func (l *GarbageCollector) record(ctx context.Context, network string, r journal.Record,
	alive map[metadata.AttachmentID]bool, suspect func(string, time.Duration) bool) (string, error) {
	what := fmt.Sprintf("attachment %s of network %s", r.AttachmentID, network)
	switch r.State {
	case journal.Released:
		return l.locked(network, r, func(now journal.Record) (string, error) {
			err := l.Client.Release(ctx, network, r.AttachmentID, r.Sequence())
			if err != nil && !metadata.IsCode(err, metadata.CodeNotFound) {
				return "", fmt.Errorf("replay the release of %s: %w", what, err)
			}
			return "replayed the release of " + what, l.Journal.Remove(network, r.AttachmentID)
		})
	case journal.Unregistered:
		return "", nil // register handles it
	}
	if alive[r.AttachmentID] || !r.Gone(l.BootID) {
		return "", nil
	}
	grace := l.Grace
	if r.BootID != l.BootID {
		grace = 0
	}
	if !suspect("record\x00"+what, grace) {
		return "", nil
	}
	return l.locked(network, r, func(now journal.Record) (string, error) {
		if !now.Gone(l.BootID) {
			return "", nil
		}
		if err := l.Kernel.DelEndpoint(ctx, attach.HostName(r.AttachmentID)); err != nil {
			return "", err
		}
		book := ipam.Client{Service: l.Client, Journal: l.Journal, Type: r.Type}
		if err := book.Release(ctx, network, r.AttachmentID); err != nil {
			return "", fmt.Errorf("release %s: %w", what, err)
		}
		return fmt.Sprintf("released %s: its network namespace %s is gone", what, r.Netns), nil
	})
}

// locked takes the record's lock and calls do, unless the record has changed meanwhile.
func (l *GarbageCollector) locked(network string, r journal.Record,
	do func(now journal.Record) (string, error)) (string, error) {
	unlock, err := l.Journal.Lock(network, r.AttachmentID)
	if err != nil {
		return "", err
	}
	defer unlock()
	now, ok, err := l.Journal.Get(network, r.AttachmentID)
	if err != nil {
		return "", err
	}
	if !ok { // removed meanwhile, or corrupt: then only r is known
		now = r
	}
	if ok && (now.State != r.State || !now.Created.Equal(r.Created)) {
		return "", nil
	}
	return do(now)
}

// allocations compares the journal with the service, network by network. It releases addresses
// without a record and without a veth. It considers only addresses whose record would be in this
// journal. It registers live attachments that the service does not know.
func (l *GarbageCollector) allocations(ctx context.Context, view *metadata.Snapshot,
	records map[string][]journal.Record,
	alive map[metadata.AttachmentID]bool, suspect func(string, time.Duration) bool,
) (changed []string, err error) {
	var errs []error
	settled := map[string]bool{}
	me, _ := view.Host(view.Self)
	for _, n := range view.Networks {
		held, err := l.Client.Allocations(ctx, n.Name, false)
		if metadata.IsCode(err, metadata.CodeNotFound) {
			continue // the network has been deleted since
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		lines, err := l.register(ctx, n.Name, journal.Lost(records[n.Name], held), alive)
		changed, errs = append(changed, lines...), append(errs, err)
		settled[incarnation(me, n)] = true
		lines, err = l.unfinished(ctx, n.Name, view.Self, held, records[n.Name], alive, suspect)
		changed, errs = append(changed, lines...), append(errs, err)
	}
	for _, network := range slices.Sorted(maps.Keys(records)) {
		if _, known := view.Network(network); !known {
			errs = append(errs, l.homeless(network, records[network], alive))
		}
	}
	l.settled.Store(&settled)
	return changed, errors.Join(errs...)
}

// incarnation returns a key that differs from the key of an earlier network of the same name. It
// differs too when this host was removed and joined again. The store may have been lost in between.
func incarnation(me metadata.Host, n metadata.Network) string {
	return fmt.Sprint(n.Name, "\x00", n.Created.Unix(), "\x00", me.Joined.Unix())
}

// Settled reports whether a pass has registered the live attachments of the network, as far as
// possible. Before that, this host must not take part in allocating the network's addresses. me is
// this host.
func (l *GarbageCollector) Settled(me metadata.Host, n metadata.Network) bool {
	settled := l.settled.Load()
	return settled != nil && (*settled)[incarnation(me, n)]
}

// lives reports whether an attachment has a running container.
func (l *GarbageCollector) lives(r journal.Record, alive map[metadata.AttachmentID]bool) bool {
	return alive[r.AttachmentID] || r.BootID == l.BootID && !r.Gone(l.BootID)
}

// register registers live attachments that the service does not know. The service may have been
// away when their addresses were allocated, or its store was lost. Or this host was removed while
// it was suspended. When another container holds the address by now, that container keeps it. The
// error names both containers, because only a person can decide which of the two must go.
func (l *GarbageCollector) register(ctx context.Context, network string, lost []journal.Record,
	alive map[metadata.AttachmentID]bool) (changed []string, err error) {
	book := ipam.Client{Service: l.Client, Journal: l.Journal}
	var errs []error
	for _, r := range lost {
		if r.State == journal.Held && !l.lives(r, alive) {
			continue
		}
		what := fmt.Sprintf("attachment %s of network %s", r.AttachmentID, network)
		line, err := l.locked(network, r, func(now journal.Record) (string, error) {
			if now.Terminating {
				return "", nil
			}
			if err := book.Register(ctx, network, now); err != nil {
				return "", fmt.Errorf("register %s, which has %s and which the metadata service does not know: %w",
					what, addresses(now), err)
			}
			return "registered " + what, nil
		})
		if line != "" {
			changed = append(changed, line)
		}
		errs = append(errs, err)
	}
	return changed, few(errs)
}

// homeless returns an error when containers run on a network that does not exist.
func (l *GarbageCollector) homeless(network string, records []journal.Record,
	alive map[metadata.AttachmentID]bool) error {
	n := 0
	for _, r := range records {
		if r.State != journal.Released && !r.Terminating && l.lives(r, alive) {
			n++
		}
	}
	if n == 0 {
		return nil
	}
	return fmt.Errorf("%d attachments of this host are on network %s, which the metadata service does not know: make "+
		"it anew "+
		"under the same name and with the same subnets, or remove their containers", n, network)
}

// few joins errors. It keeps the first five and counts the rest.
func few(errs []error) error {
	errs = slices.DeleteFunc(errs, func(err error) bool { return err == nil })
	const most = 5
	if len(errs) > most {
		errs = append(errs[:most:most], fmt.Errorf("and %d more", len(errs)-most))
	}
	return errors.Join(errs...)
}

func addresses(r journal.Record) string {
	var list []string
	for _, a := range r.Attachment.Addresses {
		list = append(list, a.Address.String())
	}
	return strings.Join(list, " and ")
}

// unfinished releases addresses that the service holds for this host and that have neither a record
// nor a veth.
func (l *GarbageCollector) unfinished(ctx context.Context, network, self string, held []metadata.Allocation,
	records []journal.Record,
	alive map[metadata.AttachmentID]bool, suspect func(string, time.Duration) bool) (changed []string, err error) {
	known := make(map[metadata.AttachmentID]bool, len(records))
	for _, r := range records {
		known[r.AttachmentID] = true
	}
	var errs []error
	for _, a := range held {
		id := metadata.AttachmentID{ContainerID: a.ContainerID, IfName: a.IfName}
		if known[id] || alive[id] || a.Host != self {
			continue
		}
		grace := l.Grace
		switch {
		case a.BootID != l.BootID:
			grace = 0
		case a.StateDir != l.Journal.StateDir():
			continue // the record may be in another journal: a bridge's container may well be alive
		}
		if !suspect(fmt.Sprintf("allocation\x00%s\x00%s\x00%d", network, a.Address, a.Sequence), grace) {
			continue
		}
		line, err := l.locked(network, journal.Record{AttachmentID: id}, func(now journal.Record) (string, error) {
			if now.State != "" { // an ADD came in between
				return "", nil
			}
			if err := l.Client.Release(ctx, network, id, a.Sequence); err != nil {
				return "", fmt.Errorf("release %s of network %s: %w", a.Address, network, err)
			}
			return fmt.Sprintf("released %s of network %s: attachment %s was never finished", a.Address, network, id), nil
		})
		if line != "" {
			changed = append(changed, line)
		}
		errs = append(errs, err)
	}
	return changed, errors.Join(errs...)
}
