package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/lariat-net/lariat/pkg/cni"
	"github.com/lariat-net/lariat/pkg/hostid"
	"github.com/lariat-net/lariat/pkg/journal"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// Client gives and takes addresses: through the metadata service when it answers, from the journal when it does not.
type Client struct {
	Service metadata.Client
	Journal journal.Journal
	Type    string // of the plugin, for the records
}

// Netns is where an attachment lives.
type Netns struct {
	Path  string
	Inode uint64
}

// Acquire gives the interface its addresses and notes them, before anything in the kernel holds them. Asked
// again for the same interface it gives the same. explicit holds lengths and gateways for the case that the
// service is away and the addresses were asked for by name: they are then used and the service is told later.
func (b Client) Acquire(ctx context.Context, network string, req metadata.AttachRequest, ns Netns,
	explicit *metadata.Attachment) (*metadata.Attachment, error) {
	id := metadata.AttachmentID{ContainerID: req.ContainerID, IfName: req.IfName}
	if err := b.refuseOtherNetns(network, id, ns); err != nil {
		return nil, err
	}
	req.StateDir = b.Journal.StateDir()
	if req.WaitSeconds > 0 {
		var cancel func()
		ctx, cancel = context.WithTimeout(ctx, time.Duration(req.WaitSeconds+10)*time.Second)
		defer cancel()
	}
	state := journal.Held
	a, err := b.attach(ctx, network, req)
	if errors.Is(err, metadata.ErrUnreachable) {
		if old, ok, _ := b.Journal.Get(network, id); ok && old.State != journal.Released && old.BootID == hostid.Boot() {
			a, state, err = &old.Attachment, old.State, nil
		} else if explicit != nil {
			a, state, err = explicit, journal.Unregistered, nil
		}
	}
	if err != nil {
		return nil, err
	}
	if a.BootID == "" {
		a.BootID = hostid.Boot()
	}
	old, known, _ := b.Journal.Get(network, id)
	known = known && old.State != journal.Released
	err = b.Journal.Put(journal.Record{AttachmentID: id, Attachment: *a, State: state, Type: b.Type, Netns: ns.Path,
		NetnsInode: ns.Inode,
		BootID:     a.BootID, Name: req.Name, UUID: req.UUID, Labels: req.Labels, Created: time.Now().UTC(),
		Terminating: known &&
			old.Terminating})
	if err != nil {
		if !known { // an earlier ADD's container may run with these addresses
			err = errors.Join(err, b.Service.Release(ctx, network, id, 0))
		}
		return nil, cni.Errorf(cni.ErrIO, "%w", err)
	}
	return a, nil
}

// Register tells the service which addresses an attachment holds: they were given while it was away, or its store
// has lost them since. It gives exactly these, or fails with who has one of them; the others are registered then.
// The caller holds the attachment's lock.
func (b Client) Register(ctx context.Context, network string, r journal.Record) error {
	// Foreign: whatever chose the addresses, nobody else is asked for others, and a strict affinity is no reason.
	req := metadata.AttachRequest{ContainerID: r.ContainerID, IfName: r.IfName, Foreign: true, MAC: r.Attachment.MAC,
		Name: r.Name, UUID: r.UUID, Labels: r.Labels, StateDir: b.Journal.StateDir()}
	for _, a := range r.Attachment.Addresses {
		req.Requested = append(req.Requested, a.Address)
	}
	a, err := b.Service.Attach(ctx, network, req)
	if metadata.IsCode(err, metadata.CodeHeld) && len(req.Requested) > 1 {
		// Another has one of them. The rest must not go the same way.
		for _, one := range r.Attachment.Addresses {
			req.Requested = []netip.Addr{one.Address}
			_, _ = b.Service.Attach(ctx, network, req)
		}
	}
	if err != nil {
		return err
	}
	r.State, r.Attachment = journal.Held, *a
	return b.Journal.Put(r)
}

// RegisterAll registers what lives on this host and the service does not know. It leaves out what a verb works at;
// the caller may hold one attachment's lock.
func (b Client) RegisterAll(ctx context.Context, network, bootID string) error {
	records, err := b.Journal.List(network)
	if err != nil {
		return err
	}
	known, err := b.Service.Allocations(ctx, network, false)
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range journal.Lost(records, known) {
		if r.BootID != bootID || r.Gone(bootID) {
			continue
		}
		unlock, err := b.Journal.TryLock(network, r.AttachmentID)
		if err != nil {
			continue
		}
		if now, ok, _ := b.Journal.Get(network, r.AttachmentID); ok && now.State == r.State && !now.Terminating {
			if err := b.Register(ctx, network, now); err != nil {
				errs = append(errs, fmt.Errorf("register %s: %w", r.AttachmentID, err))
			}
		}
		unlock()
	}
	return errors.Join(errs...)
}

// refuseOtherNetns fails when the attachment is that of another network namespace, which is there still:
// its container would share its addresses.
func (b Client) refuseOtherNetns(network string, id metadata.AttachmentID, ns Netns) error {
	old, known, err := b.Journal.Get(network, id)
	if err != nil || !known || old.State == journal.Released || old.Terminating || old.NetnsInode == ns.Inode {
		return nil
	}
	if inode, err := cni.NetnsInode(old.Netns); err != nil || inode != old.NetnsInode {
		return nil
	}
	return cni.Errorf(cni.ErrKernel, "%s is connected in the network namespace %s, which is in use", id, old.Netns).
		WithDetails("DEL the attachment first")
}

// attach asks the service, and while the caller is ready to wait, asks again when the service went away
// meanwhile: it may be restarting.
func (b Client) attach(ctx context.Context, network string, req metadata.AttachRequest) (*metadata.Attachment, error) {
	start, wait := time.Now(), time.Duration(req.WaitSeconds)*time.Second
	for {
		a, err := b.Service.Attach(ctx, network, req)
		left := wait - time.Since(start)
		if !errors.Is(err, metadata.ErrUnreachable) || left <= 0 {
			return a, err
		}
		t := time.NewTimer(min(200*time.Millisecond, left))
		select {
		case <-ctx.Done():
			t.Stop()
			return nil, err
		case <-t.C:
		}
		req.WaitSeconds = int((left + time.Second - 1) / time.Second)
	}
}

// Release gives the addresses back. With the service away it notes the release for the network manager to
// replay, and succeeds: a runtime must not be kept from removing a container. Only a journal that cannot be
// written either is an error.
func (b Client) Release(ctx context.Context, network string, id metadata.AttachmentID) error {
	old, known, _ := b.Journal.Get(network, id)
	if known && old.State == journal.Unregistered {
		return b.forget(network, id) // the service never knew
	}
	// The service itself answers within two seconds.
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	err := b.Service.Release(ctx, network, id, old.Sequence())
	if err == nil || metadata.IsCode(err, metadata.CodeNotFound) {
		return b.forget(network, id)
	}
	if !errors.Is(err, metadata.ErrUnreachable) {
		return err
	}
	if !known {
		old = journal.Record{AttachmentID: id, Attachment: metadata.Attachment{Network: network}, BootID: hostid.Boot(),
			Created: time.Now().UTC(), Type: b.Type}
	}
	old.State = journal.Released
	if jerr := b.Journal.Put(old); jerr != nil {
		return errors.Join(err, jerr)
	}
	return nil
}

func (b Client) forget(network string, id metadata.AttachmentID) error {
	if err := b.Journal.Remove(network, id); err != nil {
		return cni.Errorf(cni.ErrIO, "%w", err)
	}
	return nil
}

// Check compares what the service and the journal hold with the addresses that a result named. With the
// service away the journal alone decides.
func (b Client) Check(ctx context.Context, network string, id metadata.AttachmentID) (*metadata.Attachment, error) {
	rec, known, err := b.Journal.Get(network, id)
	if err != nil {
		return nil, err
	}
	if known && rec.State == journal.Released {
		known = false
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	a, err := b.Service.Attachment(ctx, network, id)
	switch {
	case errors.Is(err, metadata.ErrUnreachable) && known:
		return &rec.Attachment, nil
	case metadata.IsCode(err, metadata.CodeNotFound) && known && rec.State == journal.Unregistered:
		return &rec.Attachment, nil
	case err != nil:
		return nil, err
	}
	return a, nil
}

// Collect releases every attachment of the network on this host that valid does not list, those of the
// journal and those that the service alone knows. Their interfaces must be gone. It goes on after errors.
func (b Client) Collect(ctx context.Context, network string, valid []metadata.AttachmentID) error {
	keep := make(map[metadata.AttachmentID]bool, len(valid))
	for _, id := range valid {
		keep[id] = true
	}
	records, err := b.Journal.List(network)
	errs := []error{err}
	for _, r := range records {
		if keep[r.AttachmentID] {
			continue
		}
		unlock := b.Journal.LockIfPossible(network, r.AttachmentID)
		if err := b.Release(ctx, network, r.AttachmentID); err != nil {
			errs = append(errs, fmt.Errorf("release %s: %w", r.AttachmentID, err))
		}
		unlock()
	}
	// What a killed ADD allocated and did not come to note is known to the service alone. When it is away the manager will
	// find it later.
	if _, err := b.Service.GC(ctx, network, valid); err != nil && !errors.Is(err, metadata.ErrUnreachable) &&
		!metadata.IsCode(err, metadata.CodeNotFound) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
