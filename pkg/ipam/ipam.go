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

// Client acquires and releases addresses. It uses the metadata service when it answers, and the
// journal when it does not.
type Client struct {
	Service metadata.Client
	Journal journal.Journal
	Type    string // of the plugin, for the records
}

// Netns identifies an attachment's network namespace.
type Netns struct {
	Path  string
	Inode uint64
}

// Acquire returns addresses for the interface and records them, before anything in the kernel holds
// them. It returns the same addresses for the same interface. explicit holds lengths and gateways
// of addresses that the caller named. Acquire uses them when the service is away, and they are
// registered later.
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
		if !known { // a container of an earlier ADD may run with these addresses
			err = errors.Join(err, b.Service.Release(ctx, network, id, 0))
		}
		return nil, cni.Errorf(cni.ErrIO, "%w", err)
	}
	return a, nil
}

// Register registers the addresses of an attachment with the service. They were allocated while the
// service was away, or its store has lost them since. The service allocates exactly these
// addresses, or Register fails with the holder of one of them. Then the others are registered. The
// caller holds the attachment's lock.
func (b Client) Register(ctx context.Context, network string, r journal.Record) error {
	// Foreign: no other addresses are allocated instead, and a strict affinity is no reason to
	// refuse.
	req := metadata.AttachRequest{ContainerID: r.ContainerID, IfName: r.IfName, Foreign: true, MAC: r.Attachment.MAC,
		Name: r.Name, UUID: r.UUID, Labels: r.Labels, StateDir: b.Journal.StateDir()}
	for _, a := range r.Attachment.Addresses {
		req.Requested = append(req.Requested, a.Address)
	}
	a, err := b.Service.Attach(ctx, network, req)
	if metadata.IsCode(err, metadata.CodeHeld) && len(req.Requested) > 1 {
		// Another attachment holds one of the addresses. Register the rest, so that they are not
		// lost too.
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

// RegisterAll registers this host's live attachments that the service does not know. It skips
// attachments with a verb in progress. The caller may hold one attachment's lock.
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

// refuseOtherNetns fails when the attachment belongs to another network namespace that still
// exists. Otherwise two containers would share the addresses.
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

// attach asks the service. While the wait of the request lasts, it retries when the service is
// unreachable: the service may be restarting.
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

// Release releases the addresses. With the service away it records the release for the network
// manager to replay, and succeeds. A runtime must not be kept from removing a container. With the
// service away, the only error is a journal that cannot be written.
func (b Client) Release(ctx context.Context, network string, id metadata.AttachmentID) error {
	old, known, _ := b.Journal.Get(network, id)
	if known && old.State == journal.Unregistered {
		return b.forget(network, id) // the service never knew the attachment
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

// Check returns the attachment as the service knows it. With the service away it returns the
// journal's attachment.
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

// Collect releases every attachment of the network on this host that valid does not list. It covers
// attachments of the journal and attachments that only the service knows. Their interfaces must
// have been removed. Collect continues after errors.
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
	// Only the service knows the allocations that a killed ADD did not record. When the service is
	// away, the manager finds them later.
	if _, err := b.Service.GC(ctx, network, valid); err != nil && !errors.Is(err, metadata.ErrUnreachable) &&
		!metadata.IsCode(err, metadata.CodeNotFound) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
