package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/allocate"
	"github.com/lariat-net/lariat/pkg/metadata/server/allocator"
	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// Attach gives an interface its addresses. See Client.Attach for what it promises.
func (s *Server) Attach(ctx context.Context, network string, req metadata.AttachRequest) (*metadata.Attachment, error) {
	id := metadata.AttachmentID{ContainerID: req.ContainerID, IfName: req.IfName}
	if err := validAttach(id, &req); err != nil {
		return nil, err
	}
	n, err := s.networkOrCreate(ctx, network, req.Create)
	if err != nil {
		return nil, err
	}
	if req.WaitSeconds > 0 { // one that holds an address already does not wait for it
		if _, _, err := s.loaded(ctx, network); err != nil {
			return nil, err
		}
	}
	object, want, err := s.assigned(ctx, n, &req)
	if err != nil {
		return nil, err
	}
	at := allocator.Attachment{AttachRequest: &req, Want: req.Requested}
	if len(want) > 0 {
		for _, r := range req.Requested {
			if !slices.Contains(want, r) {
				return nil, metadata.Errorf(metadata.CodeConflict, "the model assigned %v to container %s on network %s, so "+
					"it cannot have the requested %s",
					want, req.ContainerID, network, r)
			}
		}
		at.Want, at.Assigned = want, true
	}
	ctx, cancel := s.timeout(ctx)
	defer cancel()
	entries, err := s.allocator(network).Attach(ctx, at)
	if err != nil {
		return nil, err
	}
	a := s.attachment(n, entries)
	a.PreAssigned = at.Assigned
	// The model's MAC is that of the container's first interface.
	if first := object.Interfaces; at.Assigned || len(first) == 0 || first[0].Network == network &&
		first[0].IfName == req.IfName {
		a.MAC = object.MAC
	}
	return a, nil
}

func validAttach(id metadata.AttachmentID, req *metadata.AttachRequest) error {
	switch {
	case metadata.ValidContainerID(id.ContainerID) != nil:
		return metadata.Errorf(metadata.CodeInvalid, "%s", metadata.ValidContainerID(id.ContainerID))
	case id.IfName == "" || len(id.IfName) > 15 || strings.ContainsAny(id.IfName, "/ :\t\n"):
		return metadata.Errorf(metadata.CodeInvalid, "ifname %q: want 1 to 15 characters, none of them space, : or /",
			id.IfName)
	case req.Foreign && len(req.Requested) == 0:
		return metadata.Errorf(metadata.CodeInvalid, "foreign without requested addresses: there is nothing to record")
	case req.StateDir != "" && !filepath.IsAbs(req.StateDir):
		return metadata.Errorf(metadata.CodeInvalid, "stateDir %q: want the absolute path of a folder", req.StateDir)
	case req.WaitSeconds < 0 || req.WaitSeconds > 3600:
		return metadata.Errorf(metadata.CodeInvalid, "waitSeconds %d: want 0 to 3600", req.WaitSeconds)
	}
	seen := map[netip.Addr]bool{}
	for i, a := range req.Requested {
		a = a.Unmap()
		if !metadata.ValidAddress(a) {
			return metadata.Errorf(metadata.CodeInvalid, "requested address %s is not one that a container can have", a)
		}
		if seen[a] {
			return metadata.Errorf(metadata.CodeInvalid, "requested address %s is listed twice", a)
		}
		seen[a] = true
		req.Requested[i] = a
	}
	return nil
}

// assigned returns the container's object and the addresses that the model assigned, waiting for them as long as the
// request says. It wakes up with each change of the model, never by a timer of its own.
func (s *Server) assigned(ctx context.Context, n metadata.Network,
	req *metadata.AttachRequest) (held, []netip.Addr, error) {
	start := time.Now()
	deadline := time.NewTimer(time.Duration(req.WaitSeconds) * time.Second)
	defer deadline.Stop()
	id := metadata.AttachmentID{ContainerID: req.ContainerID, IfName: req.IfName}
	for {
		changed := s.containers.watch()
		h, ok := s.containers.find(req.ContainerID, req.UUID)
		if ok {
			// An address that another interface of the container has is not this one's.
			want := slices.DeleteFunc(slices.Clone(h.assigned(n)), func(a netip.Addr) bool {
				return slices.ContainsFunc(h.Interfaces, func(i metadata.ContainerInterface) bool {
					return (i.Network != n.Name || i.IfName != req.IfName) && slices.Contains(i.Addresses, a)
				})
			})
			if len(want) > 0 {
				return h, want, nil
			}
		}
		if req.WaitSeconds == 0 || s.allocator(n.Name).Holds(id) {
			return h, nil, nil
		}
		select {
		case <-changed:
		case <-s.stopping.Done():
			return h, nil, metadata.Errorf(metadata.CodeUnavailable, "the metadata service is stopping; ask again")
		case <-ctx.Done():
			return h, nil, ctx.Err()
		case <-deadline.C:
			e := metadata.Errorf(metadata.CodeNotYet, "the model lists no address for container %s after %s", req.ContainerID,
				time.Since(start).Round(100*time.Millisecond))
			what := "containers/" + s.cfg.HostName + "/" + req.ContainerID
			if req.UUID != "" {
				what += ", or a container of this host with UUID " + req.UUID + ","
			}
			e.Details = "whoever schedules it has not written " + what + " with addresses"
			return h, nil, e
		}
	}
}

// attachment is the answer for recorded entries.
func (s *Server) attachment(n metadata.Network, entries []allocate.Entry) *metadata.Attachment {
	self, _ := s.view.host(s.cfg.HostName)
	a := &metadata.Attachment{Network: n.Name, Encapsulation: n.Encapsulation, Device: s.cfg.Device(n), Subnets: n.Subnets,
		Host: s.cfg.HostName, MTU: s.cfg.MTU(n, self), Overhead: s.cfg.Overhead(n, self),
		Addresses: []metadata.AttachmentAddress{}}
	for _, e := range entries { // sorted: IPv4 first
		x := metadata.AttachmentAddress{Address: e.Address, Sequence: e.Sequence}
		a.BootID = e.Owner.BootID
		for _, p := range n.Subnets {
			if !p.Contains(e.Address) {
				continue
			}
			x.Subnet = p
			x.Gateway = s.view.Gateway(n.Name, p)
			for _, g := range n.Gateways {
				if n.Encapsulation == metadata.EncapNone && p.Contains(g) {
					x.Gateway = g
				}
			}
		}
		a.Addresses = append(a.Addresses, x)
	}
	return a
}

// Release frees an interface's addresses. See Client.Release.
func (s *Server) Release(ctx context.Context, network string, id metadata.AttachmentID, sequence uint64) error {
	if _, _, ok := s.view.Network(network); !ok {
		return nil // its addresses went with it
	}
	// A DEL waits less than an ADD: what it could not tell, the network manager tells later.
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Timeout*2/5)
	defer cancel()
	return s.allocator(network).Release(ctx, id, sequence)
}

// Join claims this host's first blocks of a network. See Client.Join.
func (s *Server) Join(ctx context.Context, network string) error {
	if _, err := s.networkOrCreate(ctx, network, nil); err != nil {
		return err
	}
	ctx, cancel := s.timeout(ctx)
	defer cancel()
	return s.allocator(network).ClaimFirst(ctx)
}

// GC releases what this host holds and valid does not list. See Client.GC.
func (s *Server) GC(ctx context.Context, network string, valid []metadata.AttachmentID) (*metadata.GCResult, error) {
	if _, _, ok := s.view.Network(network); !ok {
		return nil, s.view.Unknown(network)
	}
	ctx, cancel := s.timeout(ctx)
	defer cancel()
	released, err := s.allocator(network).GC(ctx, valid)
	if err != nil {
		return nil, err
	}
	r := &metadata.GCResult{Released: allocations(network, released)}
	if len(r.Released) > 0 {
		s.log.Info("released what nothing uses", "network", network, "addresses", len(r.Released))
	}
	return r, nil
}

func allocations(network string, entries []allocate.Entry) []metadata.Allocation {
	out := make([]metadata.Allocation, 0, len(entries))
	for _, e := range entries {
		out = append(out, metadata.Allocation{Address: e.Address, Network: network, ContainerID: e.ID.ContainerID,
			IfName: e.ID.IfName,
			Host:   e.Owner.Host, BootID: e.Owner.BootID, StateDir: cmp.Or(e.Owner.StateDir, metadata.DefaultStateDir),
			Sequence: e.Sequence, Created: e.Created})
	}
	slices.SortFunc(out, func(a, b metadata.Allocation) int { return a.Address.Compare(b.Address) })
	return out
}

// loaded returns a network's allocator with its tables in memory.
func (s *Server) loaded(ctx context.Context, network string) (*allocator.Allocator, metadata.Network, error) {
	n, _, ok := s.view.Network(network)
	if !ok {
		return nil, n, s.view.Unknown(network)
	}
	a := s.allocator(network)
	if a.Loaded() {
		return a, n, nil
	}
	return a, n, s.load(ctx, a)
}

// current returns a network's allocator with tables that follow the view. Callers whose answer must not contain
// removed entries use it: blocks that this host has lost since took their tables with them.
func (s *Server) current(ctx context.Context, network string) (*allocator.Allocator, metadata.Network, error) {
	n, gen, ok := s.view.Network(network)
	if !ok {
		return nil, n, s.view.Unknown(network)
	}
	a := s.allocator(network)
	if a.Current(gen) {
		return a, n, nil
	}
	return a, n, s.load(ctx, a)
}

func (s *Server) load(ctx context.Context, a *allocator.Allocator) error {
	ctx, cancel := s.timeout(ctx)
	defer cancel()
	return a.Load(ctx)
}

// Attachment returns what an interface holds.
func (s *Server) Attachment(ctx context.Context, network string,
	id metadata.AttachmentID) (*metadata.Attachment, error) {
	held, n, err := s.current(ctx, network)
	if err != nil {
		return nil, err
	}
	entries := held.EntriesOf(id)
	if len(entries) == 0 {
		return nil, metadata.Errorf(metadata.CodeNotFound, "%s holds no address on network %s at host %s", id, network,
			s.cfg.HostName)
	}
	a := s.attachment(n, entries)
	if h, ok := s.containers.find(id.ContainerID, ""); ok && h.PreAssigned {
		a.PreAssigned = slices.ContainsFunc(entries,
			func(e allocate.Entry) bool { return slices.Contains(h.assigned(n), e.Address) })
		if a.PreAssigned {
			a.MAC = h.MAC
		}
	}
	return a, nil
}

// Allocations lists addresses in use: this host's, or all hosts' by reading every table of the network.
func (s *Server) Allocations(ctx context.Context, network string, all bool) ([]metadata.Allocation, error) {
	a, _, err := s.current(ctx, network)
	if err != nil {
		return nil, err
	}
	if !all {
		return allocations(network, a.Entries()), nil
	}
	var entries []allocate.Entry
	_, err = s.eachTable(ctx, network, func(t *allocate.Table, _ int64) error {
		entries = append(entries, t.Entries...)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return allocations(network, entries), nil
}

// eachTable reads all tables of a network. It returns those that cannot be used as problems.
func (s *Server) eachTable(ctx context.Context, network string,
	fn func(*allocate.Table, int64) error) ([]metadata.Problem, error) {
	list, _, err := s.list(ctx, entry.TablePrefix+network+"/")
	if err != nil {
		return nil, err
	}
	var bad []metadata.Problem
	for _, e := range list {
		t, err := entry.DecodeTable(e)
		if err != nil {
			bad = append(bad, metadata.NewProblem(e.Key, err))
			s.log.Warn("address table left out", "entry", bad[len(bad)-1].Name(), "error", err)
			continue
		}
		if err := fn(t, e.Revision); err != nil {
			return bad, err
		}
	}
	return bad, nil
}

// Status says whether an ADD could be served now. It answers from memory: what it must ask the store for, it
// does without when the store is away or slow.
func (s *Server) Status(ctx context.Context, network string) (*metadata.NetworkStatus, error) {
	n, _, ok := s.view.Network(network)
	if !ok {
		return nil, s.view.Unknown(network)
	}
	st := &metadata.NetworkStatus{Network: network, Ready: true, Usage: []metadata.SubnetUsage{},
		Device: s.cfg.Device(n), Revision: s.view.Revision()}
	lost, _ := s.store.Lost()
	refuse := func(reason string, local bool) {
		if st.Ready || local && !st.Local {
			st.Ready, st.Reason, st.Local = false, reason, local
		}
	}
	if lost != nil {
		refuse(lost.Error(), false)
	}
	s.mu.Lock()
	problem := s.problem
	s.mu.Unlock()
	if problem != nil {
		refuse(problem.Error(), true)
	}
	if m, ok := s.store.Store.(interface{ Problem() string }); ok && m.Problem() != "" {
		refuse(m.Problem(), true)
	}
	ctx, cancel := context.WithTimeout(ctx, statusPatience)
	defer cancel()
	a := s.allocator(network)
	if !a.Loaded() {
		if lost != nil {
			return st, nil
		}
		if _, _, err := s.loaded(ctx, network); errors.Is(err, store.ErrUnavailable) || ctx.Err() != nil {
			return st, nil
		} else if err != nil {
			return nil, err
		}
	}
	for _, p := range n.Subnets {
		u := a.Usage(n, p)
		perBlock := 1 << min(p.Addr().BitLen()-n.BlockSize(p), 30)
		if u.BlocksFree > (1<<50)/perBlock {
			u.Free = 1 << 50
		} else {
			u.Free += u.BlocksFree * perBlock
		}
		sure := true
		if !n.StrictAffinity {
			// What others have left is worth reading only where it is few, or all there is.
			if all, own := s.view.BlockCount(network, p); all > own && (u.Free == 0 || all-own <= 64) {
				left, known := s.leftWithOthers(ctx, n, p)
				u.Free, sure = u.Free+left, known
			}
		}
		st.Usage = append(st.Usage, u)
		if u.Free == 0 && sure {
			refuse(fmt.Sprintf("no address left in subnet %s: %d used in this host's blocks, %d blocks claimed by all "+
				"hosts, 0 free; widen the network or release what is unused (`lariat ip list`)",
				p, u.Used, u.Blocks), false)
		}
	}
	return st, nil
}

// statusPatience bounds what the status of a network waits for the store, where that is not known to be away.
const statusPatience = time.Second

// leftWithOthers returns how many free addresses other hosts' blocks have, as they were counted some seconds ago,
// or longer ago while the store does not answer. It returns false when nothing was counted yet.
func (s *Server) leftWithOthers(ctx context.Context, n metadata.Network, subnet netip.Prefix) (int, bool) {
	key := n.Name + " " + subnet.String()
	lost, _ := s.store.Lost()
	s.mu.Lock()
	c := s.left[key]
	if c == nil {
		c = &leftover{}
		s.left[key] = c
	}
	counting := c.counting
	if counting == nil && lost == nil && time.Since(c.when) >= leftoverAge && s.ctx.Err() == nil {
		counting = make(chan struct{})
		c.counting = counting
		s.wg.Go(func() {
			free, err := s.countLeft(s.ctx, n, subnet)
			s.mu.Lock()
			defer s.mu.Unlock()
			if err == nil {
				c.free, c.when = free, time.Now()
			}
			c.counting = nil
			close(counting)
		})
	}
	s.mu.Unlock()
	if counting != nil {
		select {
		case <-counting:
		case <-ctx.Done():
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return c.free, !c.when.IsZero()
}

func (s *Server) countLeft(ctx context.Context, n metadata.Network, subnet netip.Prefix) (int, error) {
	rules := allocator.Rules(s.view, n, subnet)
	unread := map[netip.Prefix]bool{} // tables of others' blocks
	for _, blk := range s.view.Blocks(n.Name, func(x metadata.Block) bool {
		return x.Host != s.cfg.HostName &&
			subnet.Contains(x.CIDR.Addr())
	}) {
		for _, cidr := range allocate.TablesOf(blk.CIDR) {
			unread[cidr] = true
		}
	}
	free := 0
	bad, err := s.eachTable(ctx, n.Name, func(t *allocate.Table, _ int64) error {
		if unread[t.CIDR] {
			delete(unread, t.CIDR)
			free += t.Usage(rules.Usable).Free()
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	for _, p := range bad {
		if cidr, err := netip.ParsePrefix(strings.TrimPrefix(p.Key, entry.TablePrefix+n.Name+"/")); err == nil {
			delete(unread, cidr) // nothing of it can be handed out
		}
	}
	for cidr := range unread { // nothing was handed out of it yet
		t := allocate.Table{CIDR: cidr}
		free += t.Usage(rules.Usable).Free()
	}
	return free, nil
}

// leftoverAge bounds how stale the count of other hosts' free addresses is; a runtime asks for the status
// every five seconds.
const leftoverAge = 2 * time.Second

type leftover struct {
	free     int
	when     time.Time     // zero: never counted
	counting chan struct{} // closed when it is counted anew; nil: it is not
}

// networkOrCreate finds a network, or makes it as the request defines it.
func (s *Server) networkOrCreate(ctx context.Context, name string, create *metadata.Network) (metadata.Network, error) {
	n, _, ok := s.view.Network(name)
	if ok {
		return n, nil
	}
	ctx, cancel := s.timeout(ctx)
	defer cancel()
	// Another host may have made it a moment ago.
	e, err := s.store.Get(ctx, entry.NetworkPrefix+name)
	switch {
	case err == nil:
		if err := s.view.Wait(ctx, e.Revision); err != nil {
			return n, fmt.Errorf("%w: %w", store.ErrUnavailable, err)
		}
		if n, _, ok = s.view.Network(name); !ok {
			return n, s.view.Unknown(name)
		}
		return n, nil
	case !errors.Is(err, store.ErrNotFound):
		return n, err
	case create == nil:
		return n, s.view.Unknown(name)
	}
	if create.Name != "" && create.Name != name {
		return n, metadata.Errorf(metadata.CodeInvalid, "create defines network %s, the request is for %s", create.Name, name)
	}
	n = *create
	n.Name = name
	return s.PutNetwork(ctx, n, true, false)
}
