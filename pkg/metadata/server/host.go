package server

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/allocate"
	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// registerPatiently registers this host at its start. A store that is away, or too busy to answer in time, is waited
// for until the context ends.
func (s *Server) registerPatiently(ctx context.Context) error {
	for wait := firstWait; ; {
		err := s.register(ctx)
		if err == nil || ctx.Err() != nil || !errors.Is(err, store.ErrUnavailable) {
			return err
		}
		s.log.Debug("this host is not registered yet", "error", err)
		wait = s.pause(ctx, wait, time.Second)
	}
}

// register writes this host's object and takes the lease that makes it live.
func (s *Server) register(ctx context.Context) error {
	name := s.cfg.HostName
	if err := s.nameFree(ctx); err != nil {
		return err
	}
	mac, err := s.overlayMAC(ctx)
	if err != nil {
		return err
	}
	for named := false; ; {
		e, err := s.store.Get(ctx, entry.HostPrefix+name)
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return err
		}
		h := metadata.Host{Name: name, Joined: s.now().UTC().Truncate(time.Second)}
		if e.Value != nil {
			old, err := metadata.Decode[metadata.Host](name, e.Value)
			if err == nil {
				h = old
			} else {
				s.log.Error("this host's entry was spoilt and is written anew", "host", name, "error", err)
			}
			if err == nil && h.MachineID != s.cfg.MachineID {
				s.log.Warn("host was another machine before", "host", name, "before", h.MachineID, "now", s.cfg.MachineID)
			}
		}
		h.Underlay, h.MachineID, h.BootID, h.MAC = s.cfg.Underlay, s.cfg.MachineID, s.bootID, mac
		h.Foreign, h.AgentVersion, h.Live = s.cfg.Foreign, s.cfg.Version, false
		labels := maps.Clone(h.Labels)
		if labels == nil {
			labels = map[string]string{}
		}
		maps.Copy(labels, s.cfg.Labels)
		if h.Labels = labels; len(labels) == 0 {
			h.Labels = nil
		}
		if err := h.Check(name); err != nil {
			return fmt.Errorf("host %s: %w", name, err) // no host would use it
		}
		data, err := json.Marshal(h)
		if err != nil {
			return err
		}
		change := store.Change{Key: entry.HostPrefix + name, Value: data, Revision: e.Revision}
		switch {
		case !named && e.Value == nil:
			// A new host: one write, of which the others hear once. Whoever registers the name meanwhile makes both fail.
			err = s.takeName(ctx, change)
		case !named:
			if err = s.takeName(ctx); err == nil && string(data) != string(e.Value) {
				_, err = store.One(ctx, s.store, change)
			}
		case string(data) != string(e.Value):
			_, err = store.One(ctx, s.store, change)
		}
		if errors.Is(err, store.ErrConflict) {
			named = true
			continue
		}
		if err == nil && string(data) != string(e.Value) {
			s.log.Info("host registered", "host", name, "machine", s.cfg.MachineID, "boot", s.bootID, "underlay",
				fmt.Sprint(addresses(s.cfg.Underlay)), "mac", mac)
		}
		return err
	}
}

func addresses(list []metadata.Underlay) []string {
	var out []string
	for _, u := range list {
		out = append(out, u.Address.String())
	}
	return out
}

// nameHolder returns the claim of this host's name, which may be none, or says which other machine has it.
func (s *Server) nameHolder(ctx context.Context) (store.Entry, error) {
	name := s.cfg.HostName
	e, err := s.store.Get(ctx, entry.LivePrefix+name)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return e, err
	}
	if e.Value == nil {
		return e, nil
	}
	me := s.hostLease()
	other, err := metadata.Decode[hostLease](name, e.Value)
	switch {
	case err != nil:
		s.log.Error("the claim of this host's name was spoilt and is written anew", "host", name, "error", err)
	case other.MachineID != me.MachineID:
		return e, fmt.Errorf("host name %s is taken: a live machine with id %s at %s has it, this machine is %s at %s; "+
			"give this one another --host-name, "+
			"or, when its machine id is a copy of a cloned disk image, a new /etc/machine-id", name, other.MachineID,
			other.Address, me.MachineID, me.Address)
	case other.BootID != me.BootID && other.Address != me.Address:
		// The same machine after a reboot, with another address; or its clone, which must not take the blocks of a host
		// that runs.
		live, err := s.lives(ctx, entry.LivePrefix+name)
		if err == nil && live {
			err = s.twin(other)
		}
		return e, err
	}
	// The same machine: its former process's lease has not run out yet. The key can be taken over at once.
	return e, nil
}

// nameFree says which other machine has this host's name, before anything is written.
func (s *Server) nameFree(ctx context.Context) error {
	_, err := s.nameHolder(ctx)
	return err
}

// hostLease is what this process writes under its host's name while it lives.
func (s *Server) hostLease() hostLease {
	me := hostLease{Host: s.cfg.HostName, MachineID: s.cfg.MachineID, BootID: s.bootID, Since: s.started}
	if len(s.cfg.Underlay) > 0 {
		me.Address = s.cfg.Underlay[0].Address.Addr().String()
	}
	return me
}

// takeName makes this machine the holder of its host's name, or says who is. What shall be written with it is
// written in the same transaction when nothing is in the way of either; ErrConflict: the name is this machine's,
// and that was not written.
func (s *Server) takeName(ctx context.Context, with ...store.Change) error {
	data, err := json.Marshal(s.hostLease())
	if err != nil {
		return err
	}
	lease, err := s.store.Hold(ctx, s.cfg.LeaseTTL)
	if err != nil {
		return err
	}
	for {
		e, err := s.nameHolder(ctx)
		if err != nil {
			lease.Close()
			return err
		}
		results := s.store.Write(ctx,
			append([]store.Change{{Key: entry.LivePrefix + s.cfg.HostName, Value: data, Revision: e.Revision, Lease: lease}},
				with...)...)
		if errors.Is(results[0].Err, store.ErrConflict) {
			continue
		}
		if results[0].Err != nil {
			lease.Close()
			return results[0].Err
		}
		s.mu.Lock()
		old := s.lease
		s.lease = lease
		s.mu.Unlock()
		if old != nil {
			old.Close()
		}
		for _, r := range results[1:] {
			err = cmp.Or(err, r.Err)
		}
		return err
	}
}

// twin is the error of a machine that has the name of another one that lives, with the same machine id.
func (s *Server) twin(other hostLease) error {
	me := s.hostLease()
	return fmt.Errorf("host name %s is taken: the machine at %s (boot id %s) has it and is live, and this one at %s "+
		"(boot id %s) has the same machine id %s. One is a clone of the other: give the clone a new /etc/machine-id "+
		"(rm /etc/machine-id; systemd-machine-id-setup) and another --host-name",
		me.Host, other.Address, other.BootID, me.Address, me.BootID, me.MachineID)
}

// lives reports whether the process that holds a key is alive: its lease is renewed every third of its time. One
// that died leaves a lease that is not.
func (s *Server) lives(ctx context.Context, key string) (bool, error) {
	start, before := time.Now(), time.Duration(-1)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		idle, ttl, err := s.store.Idle(ctx, key)
		switch {
		case errors.Is(err, store.ErrNotFound):
			return false, nil
		case err != nil:
			return false, err
		case idle < before:
			return true, nil
		case idle > ttl/2+time.Second:
			return false, nil
		case time.Since(start) > ttl/2+2*time.Second:
			return true, nil // without a renewal it would have been idle for longer by now
		}
		before = idle
		select {
		case <-ctx.Done():
			return false, fmt.Errorf("%w: who has the name %s: %w", store.ErrUnavailable, s.cfg.HostName, ctx.Err())
		case <-tick.C:
		}
	}
}

// deposed returns why the name is this process' no more although it holds its lease: somebody wrote over its key, as a
// clone with a service of an earlier version does. A key that was removed is written anew.
func (s *Server) deposed(ctx context.Context) error {
	e, err := s.store.Get(ctx, entry.LivePrefix+s.cfg.HostName)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	if e.Value == nil {
		s.log.Warn("somebody removed the key that says that this host is live; it is written anew", "host", s.cfg.HostName)
		return s.takeBack(ctx)
	}
	other, err := metadata.Decode[hostLease](s.cfg.HostName, e.Value)
	if err != nil || other == s.hostLease() {
		return nil // maintainHostEntry writes one that cannot be used
	}
	return s.twin(other)
}

// takeBack takes the name, and writes the host's object anew when it is gone or another machine's.
func (s *Server) takeBack(ctx context.Context) error {
	if err := s.takeName(ctx); err != nil {
		return err
	}
	// Removed by an operator while it was away: it is a new host. Otherwise its object is as it was, or newer than
	// what this process knew at its start; unless a clone wrote it.
	e, err := s.store.Get(ctx, entry.HostPrefix+s.cfg.HostName)
	if err == nil {
		h, derr := metadata.Decode[metadata.Host](s.cfg.HostName, e.Value)
		if derr == nil && h.BootID == s.bootID {
			return nil
		}
	} else if !errors.Is(err, store.ErrNotFound) {
		return err
	}
	return s.register(ctx)
}

// maintainHostLease takes the name again whenever the lease was lost, which means that the store was away for
// longer than the lease; and says so when another process took it.
func (s *Server) maintainHostLease() {
	for {
		s.mu.Lock()
		lease := s.lease
		s.mu.Unlock()
		select {
		case <-s.ctx.Done():
			return
		case <-s.view.renamed:
			select {
			case <-lease.Lost(): // that is why
				continue
			default:
			}
			ctx, cancel := s.timeout(s.ctx)
			err := s.deposed(ctx)
			cancel()
			if s.ctx.Err() == nil {
				s.setProblem(err)
			}
			if err != nil { // the other may end, or the store may have been away
				time.AfterFunc(5*time.Second, s.view.rename)
			}
			continue
		case <-lease.Lost():
		}
		for wait := 100 * time.Millisecond; s.ctx.Err() == nil; {
			// To find out whether another one lives takes a part of its lease.
			ctx, cancel := context.WithTimeout(s.ctx, s.cfg.Timeout+s.cfg.LeaseTTL)
			err := s.takeBack(ctx)
			cancel()
			if err == nil {
				s.setProblem(nil)
				s.log.Info("lease taken again", "host", s.cfg.HostName)
				break
			}
			if !errors.Is(err, store.ErrUnavailable) { // a store that is away is known already, and no fault of this host's
				s.setProblem(err)
			}
			wait = s.pause(s.ctx, wait, 5*time.Second)
		}
	}
}

// maintainHostEntry writes this host's entries anew when somebody spoilt them: nobody else can, and other
// hosts reach its containers by them.
func (s *Server) maintainHostEntry() {
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-s.view.spoilt:
		}
		ctx, cancel := s.timeout(s.ctx)
		err := s.register(ctx)
		cancel()
		if err != nil && s.ctx.Err() == nil {
			s.log.Error("this host's entries stay spoilt until the next start", "error", err)
		}
	}
}

// overlayMAC derives the MAC of this host's overlay devices and reserves it, so that no two hosts have the same.
func (s *Server) overlayMAC(ctx context.Context) (metadata.MAC, error) {
	if len(s.cfg.Underlay) == 0 {
		return metadata.MAC{}, nil
	}
	a := s.cfg.Underlay[0].Address.Addr()
	data, err := json.Marshal(s.cfg.HostName)
	if err != nil {
		return metadata.MAC{}, err
	}
	for round := 0; round < 100; round++ {
		mac := OverlayMAC(a, round)
		ch := store.Change{Key: entry.MACPrefix + mac.String(), Value: data}
		for taken := false; !taken; {
			e, err := s.store.Get(ctx, ch.Key)
			if err != nil && !errors.Is(err, store.ErrNotFound) {
				return mac, err
			}
			if ch.Revision = e.Revision; e.Value != nil {
				var holder string
				if err := json.Unmarshal(e.Value, &holder); err != nil {
					holder = "" // nobody's
				}
				if holder == s.cfg.HostName {
					return mac, nil
				}
				// A reservation whose host has moved to another MAC, or is gone, is free.
				if o, err := s.store.Get(ctx, entry.HostPrefix+holder); err == nil {
					h, err := metadata.Decode[metadata.Host](holder, o.Value)
					if taken = err == nil && h.MAC == mac; taken {
						if round == 0 && h.UnderlayAddr() == a {
							s.log.Error("another host has the same underlay address; tunnels to both cannot work", "address", a, "host",
								holder)
						}
						continue
					}
				}
			}
			if _, err := store.One(ctx, s.store, ch); !errors.Is(err, store.ErrConflict) {
				return mac, err
			}
		}
	}
	return metadata.MAC{}, fmt.Errorf("host %s: no overlay MAC is free", s.cfg.HostName)
}

// OverlayMAC is the MAC of a host's overlay devices, derived from its first underlay address so that it survives a
// reinstallation: 0e:00 and the IPv4 address, or 32 bits of a hash. Each round above 0 gives another one, for hosts
// whose MAC is taken.
func OverlayMAC(a netip.Addr, round int) metadata.MAC {
	m := metadata.MAC{0x0e, 0x00}
	a = a.Unmap()
	if a.Is4() && round == 0 {
		b := a.As4()
		copy(m[2:], b[:])
		return m
	}
	text := a.String()
	if round > 0 {
		text = fmt.Sprintf("%s#%d", text, round)
	}
	h := sha256.Sum256([]byte(text))
	copy(m[2:], h[:4])
	return m
}

// PutHost writes what an operator may change of a host; what its own service keeps stays as it is.
func (s *Server) PutHost(ctx context.Context, h metadata.Host) error {
	if err := h.Check(h.Name); err != nil {
		return metadata.Errorf(metadata.CodeInvalid, "host %s: %s", h.Name, err)
	}
	ctx, cancel := s.timeout(ctx)
	defer cancel()
	h.Live = false
	for {
		e, err := s.store.Get(ctx, entry.HostPrefix+h.Name)
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return err
		}
		data, err := json.Marshal(h)
		if err != nil {
			return err
		}
		revision, err := store.One(ctx, s.store,
			store.Change{Key: entry.HostPrefix + h.Name, Value: data, Revision: e.Revision})
		if errors.Is(err, store.ErrConflict) {
			continue
		}
		if err != nil {
			return err
		}
		return s.seen(ctx, revision)
	}
}

// DeleteHost removes a host that is gone, and everything it held. Its own object goes last: when this is
// interrupted, asking again does the rest. A live host is removed by force only; it comes back when its
// service starts anew.
func (s *Server) DeleteHost(ctx context.Context, name string, force bool) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if _, err := s.store.Get(ctx, entry.LivePrefix+name); err == nil && !force {
		return metadata.Errorf(metadata.CodeConflict, "host %s is live; stop its lariat-metadata first (its lease runs "+
			"out %s after a crash)", name, s.cfg.LeaseTTL)
	} else if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	e, err := s.store.Get(ctx, entry.HostPrefix+name)
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	h, err := metadata.Decode[metadata.Host](name, e.Value)
	if err != nil {
		s.log.Warn("the entry of the host that is removed was spoilt", "host", name, "error", err)
	}
	entries, _, err := s.list(ctx, entry.ViewPrefix)
	if err != nil {
		return err
	}
	networks := map[string]metadata.Network{}
	blocks := map[string][]netip.Prefix{}
	endpoints := map[string][]netip.Addr{}
	for _, e := range entries {
		kind, key, _ := strings.Cut(strings.TrimPrefix(e.Key, entry.ViewPrefix), "/")
		switch kind { // what cannot be used is nobody's
		case metadata.KindNetwork:
			if n, err := metadata.Decode[metadata.Network](key, e.Value); err == nil {
				networks[n.Name] = n
			}
		case metadata.KindBlock:
			if b, err := entry.Decode[metadata.Block](key, e); err == nil && b.Host == name {
				blocks[b.Network] = append(blocks[b.Network], b.CIDR)
			}
		case metadata.KindHostRoute:
			if p, err := entry.Decode[metadata.HostRoute](key, e); err == nil && p.Host == name {
				endpoints[p.Network] = append(endpoints[p.Network], p.Address)
			}
		}
	}
	containers, _, err := s.list(ctx, entry.ContainerPrefix+name+"/")
	if err != nil {
		return err
	}
	volumes, _, err := s.list(ctx, entry.VolumePrefix+name+"/")
	if err != nil {
		return err
	}
	var changes []store.Change
	for _, e := range slices.Concat(containers, volumes) {
		changes = append(changes, store.Change{Key: e.Key, Revision: store.Any})
	}
	// Tables before blocks and endpoints, which are how the next try finds them.
	for network, n := range networks {
		tables := map[netip.Prefix]bool{}
		for _, b := range blocks[network] {
			if n.Admits(metadata.Block{CIDR: b}) != nil {
				continue // it was never in force, so it has no tables
			}
			for _, cidr := range allocate.TablesOf(b) {
				tables[cidr] = true
			}
		}
		for _, a := range endpoints[network] {
			tables[allocate.TableFor(n, a)] = true
		}
		for cidr := range tables {
			if err := s.strip(ctx, network, cidr, name); err != nil {
				return err
			}
		}
		for _, b := range blocks[network] {
			changes = append(changes, store.Change{Key: entry.BlockKey(network, b), Revision: store.Any})
		}
		for _, a := range endpoints[network] {
			changes = append(changes, store.Change{Key: entry.HostRouteKey(network, a), Revision: store.Any})
		}
	}
	if !h.MAC.IsZero() {
		changes = append(changes, store.Change{Key: entry.MACPrefix + h.MAC.String(), Revision: store.Any})
	}
	for _, r := range s.store.Write(ctx, changes...) {
		if r.Err != nil {
			return r.Err
		}
	}
	revision, err := store.One(ctx, s.store, store.Change{Key: entry.HostPrefix + name, Revision: e.Revision})
	if err != nil {
		return err
	}
	s.log.Info("host removed", "host", name, "blocks", len(slices.Concat(slices.Collect(maps.Values(blocks))...)),
		"containers", len(containers), "volumes", len(volumes))
	return s.seen(ctx, revision)
}

// strip removes a host's entries from a table, and the table when nothing is left in it.
func (s *Server) strip(ctx context.Context, network string, cidr netip.Prefix, host string) error {
	for {
		t, revision, err := entry.ReadTable(ctx, s.store, network, cidr)
		if err != nil || revision == 0 {
			return err
		}
		t.Release(s.now(), func(e allocate.Entry) bool { return e.Owner.Host == host })
		ch := store.Change{Key: entry.TableKey(network, cidr), Revision: revision}
		if len(t.Entries) > 0 {
			if ch.Value, err = json.Marshal(t); err != nil {
				return err
			}
		}
		if _, err := store.One(ctx, s.store, ch); !errors.Is(err, store.ErrConflict) {
			return err
		}
	}
}
