package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/allocate"
	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// PutNetwork creates or replaces a network. With onlyCreate an existing one is left as it is and returned. With
// force it may have addresses to which hosts have other ways.
func (s *Server) PutNetwork(ctx context.Context, n metadata.Network, onlyCreate, force bool) (metadata.Network, error) {
	ctx, cancel := s.timeout(ctx)
	defer cancel()
	for {
		e, err := s.store.Get(ctx, entry.NetworkPrefix+n.Name)
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return n, err
		}
		var old *metadata.Network
		if e.Value != nil {
			o, err := metadata.Decode[metadata.Network](n.Name, e.Value)
			if err != nil {
				p := metadata.NewProblem(metadata.KindNetwork+"/"+n.Name, err)
				return n, metadata.Errorf(metadata.CodeConflict, "%s; %s", p, p.Remedy())
			}
			old = &o
			if onlyCreate {
				return *old, s.seen(ctx, e.Revision)
			}
		}
		next, reserved, err := s.prepareNetwork(ctx, n, old, force)
		if err != nil {
			return n, err
		}
		if old != nil && reflect.DeepEqual(*old, next) {
			return next, nil
		}
		data, err := json.Marshal(next)
		if err != nil {
			return n, err
		}
		revision, err := store.One(ctx, s.store,
			store.Change{Key: entry.NetworkPrefix + n.Name, Value: data, Revision: e.Revision})
		if reserved && err != nil && !errors.Is(err, store.ErrUnavailable) {
			s.freeVNI(ctx, next.VNI, n.Name)
		}
		if errors.Is(err, store.ErrConflict) {
			continue
		}
		if err != nil {
			return n, err
		}
		if old != nil && old.VNI != 0 && old.VNI != next.VNI {
			s.freeVNI(ctx, old.VNI, n.Name)
		}
		s.log.Info("network written", "network", next.Name, "subnets", fmt.Sprint(next.Subnets), "encapsulation",
			next.Encapsulation, "vni", next.VNI)
		return next, s.seen(ctx, revision)
	}
}

// seen waits until this host's view shows a write, so that whoever asks next through this socket reads it.
func (s *Server) seen(ctx context.Context, revision int64) error {
	if err := s.view.Wait(ctx, revision); err != nil {
		return fmt.Errorf("%w: %w", store.ErrUnavailable, err)
	}
	return nil
}

// crossed returns an error that names the hosts' own ways to addresses of the network.
func (s *Server) crossed(n metadata.Network) error {
	var ways []string
	for _, h := range s.view.hostList() {
		for _, f := range n.Crosses(h) {
			ways = append(ways, fmt.Sprintf("%s on host %s", f, h.Name))
		}
	}
	if len(ways) == 0 {
		return nil
	}
	const most = 5
	if len(ways) > most {
		ways = append(ways[:most], fmt.Sprintf("and %d more", len(ways)-most))
	}
	return metadata.Errorf(metadata.CodeConflict, "network %s: hosts have other ways to its addresses: %s; take "+
		"another subnet, or, if containers shall have these addresses all the same: lariat network create %s --force",
		n.Name, strings.Join(ways, ", "), n.Name)
}

// prepareNetwork fills in defaults, checks, and reserves the VNI.
func (s *Server) prepareNetwork(ctx context.Context, n metadata.Network, old *metadata.Network,
	force bool) (_ metadata.Network, reserved bool, err error) {
	if n.Encapsulation == "" {
		n.Encapsulation = metadata.EncapVXLAN
	}
	n.Created = s.now().UTC().Truncate(time.Second)
	vni := n.VNI
	if old != nil {
		n.Created = old.Created
		if vni == 0 && n.Encapsulation == old.Encapsulation {
			vni = old.VNI
		}
	}
	check := n
	if n.Encapsulation == metadata.EncapVXLAN && vni == 0 {
		check.VNI = metadata.DefaultVNI
	} else {
		check.VNI = vni
	}
	if err := check.Validate(); err != nil {
		return n, false, metadata.Errorf(metadata.CodeInvalid, "%s", err)
	}
	defined := s.view.definitions() // those too that are not in force
	for _, other := range defined {
		if other.Name == n.Name {
			continue
		}
		for _, pair := range n.Overlaps(&other) {
			return n, false, metadata.Errorf(metadata.CodeConflict,
				"subnet %s overlaps %s of network %s: a host could not tell which of them an address belongs to", pair[0],
				pair[1], other.Name)
		}
	}
	if !force && (old == nil || !slices.Equal(old.Subnets, n.Subnets)) {
		if err := s.crossed(n); err != nil {
			return n, false, err
		}
	}
	if old != nil && old.Encapsulation == metadata.EncapIPsec && n.Encapsulation != old.Encapsulation {
		return n, false, metadata.Errorf(metadata.CodeConflict,
			"network %s is encrypted, and what its containers say would leave in clear; delete it, and create it anew with "+
				"encapsulation %s", n.Name, n.Encapsulation)
	}
	if old != nil {
		for _, b := range s.view.Blocks(n.Name, func(metadata.Block) bool { return true }) {
			if !slices.ContainsFunc(n.Subnets, func(p netip.Prefix) bool {
				return p.Overlaps(b.CIDR) && p.Bits() <= b.CIDR.Bits() && n.BlockSize(p) == b.CIDR.Bits()
			}) {
				return n, false, metadata.Errorf(metadata.CodeConflict,
					"network %s: block %s of host %s does not fit the new subnets and block sizes; remove its containers first, "+
						"or make another network", n.Name, b.CIDR, b.Host)
			}
		}
	}
	switch {
	case n.Encapsulation != metadata.EncapVXLAN:
		n.VNI = 0
		return n, false, nil
	case old != nil && old.VNI == vni && vni != 0:
		n.VNI = vni
		return n, false, nil
	case vni != 0:
		n.VNI = vni
		holder, err := s.reserveVNI(ctx, vni, n.Name)
		if err == nil && holder != "" {
			return n, false, metadata.Errorf(metadata.CodeConflict, "VNI %d is used by network %s", vni, holder)
		}
		return n, err == nil, err
	}
	used := make(map[uint32]bool, len(defined))
	for _, other := range defined {
		used[other.VNI] = true
	}
	for vni, try := uint32(metadata.DefaultVNI), 1; vni < 1<<24; vni++ {
		if used[vni] {
			continue
		}
		holder, err := s.reserveVNI(ctx, vni, n.Name)
		if err != nil {
			return n, false, err
		}
		if holder == "" {
			n.VNI = vni
			return n, true, nil
		}
		// Others create networks too, and all begin at the same number.
		vni += rand.Uint32N(1 << min(try, 8))
		try++
	}
	return n, false, metadata.Errorf(metadata.CodeExhausted, "no VNI left")
}

type reservation struct {
	Network string    `json:"network"`
	Since   time.Time `json:"since"`
}

func vniKey(vni uint32) string { return entry.VNIPrefix + strconv.FormatUint(uint64(vni), 10) }

// reserveVNI takes a VNI for a network before the network is written: the object's creation is what two hosts compete
// for. It returns who has it, if not this network. One that a killed process reserved for a network that never came to
// be is free again after a minute.
func (s *Server) reserveVNI(ctx context.Context, vni uint32, network string) (holder string, err error) {
	data, err := json.Marshal(reservation{network, s.now().UTC()})
	if err != nil {
		return "", err
	}
	ch := store.Change{Key: vniKey(vni), Value: data}
	for {
		_, err = store.One(ctx, s.store, ch)
		if !errors.Is(err, store.ErrConflict) {
			return "", err
		}
		e, err := s.store.Get(ctx, ch.Key)
		if errors.Is(err, store.ErrNotFound) {
			ch.Revision = 0
			continue
		}
		if err != nil {
			return "", err
		}
		var r reservation
		if err := json.Unmarshal(e.Value, &r); err != nil {
			r = reservation{} // nobody's
		}
		if r.Network == network {
			return "", nil
		}
		if s.now().Sub(r.Since) < time.Minute {
			return r.Network, nil
		}
		if o, err := s.store.Get(ctx, entry.NetworkPrefix+r.Network); err == nil {
			var other metadata.Network
			if json.Unmarshal(o.Value, &other) != nil || other.VNI == vni {
				return r.Network, nil
			}
		} else if !errors.Is(err, store.ErrNotFound) {
			return "", err
		}
		ch.Revision = e.Revision
	}
}

func (s *Server) freeVNI(ctx context.Context, vni uint32, network string) {
	e, err := s.store.Get(ctx, vniKey(vni))
	if err != nil {
		return
	}
	var r reservation
	if json.Unmarshal(e.Value, &r) == nil && r.Network == network {
		if o, err := s.store.Get(ctx, entry.NetworkPrefix+network); err == nil {
			var n metadata.Network
			if json.Unmarshal(o.Value, &n) == nil && n.VNI == vni {
				return // another host made the same network with it meanwhile
			}
		}
		if _, err := store.One(ctx, s.store, store.Change{Key: vniKey(vni), Revision: e.Revision}); err != nil {
			s.log.Warn("VNI stays reserved for a minute", "vni", vni, "error", err)
		}
	}
}

// DeleteNetwork removes a network that nothing uses.
func (s *Server) DeleteNetwork(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute) // it may have many tables
	defer cancel()
	first, cancelFirst := s.timeout(ctx)
	defer cancelFirst()
	e, err := s.store.Get(first, entry.NetworkPrefix+name)
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	n, err := metadata.Decode[metadata.Network](name, e.Value)
	if err != nil {
		s.log.Warn("the entry of the network that is removed was spoilt", "network", name, "error", err)
	}
	used := 0
	var user allocate.Entry
	var changes []store.Change
	bad, err := s.eachTable(ctx, name, func(t *allocate.Table, revision int64) error {
		if used == 0 && len(t.Entries) > 0 {
			user = t.Entries[0]
		}
		used += len(t.Entries)
		changes = append(changes, store.Change{Key: entry.TableKey(name, t.CIDR), Revision: revision})
		return nil
	})
	if err != nil {
		return err
	}
	if len(bad) > 0 {
		return metadata.Errorf(metadata.CodeConflict, "whether network %s is in use is not known: %s; %s", name, bad[0],
			bad[0].Remedy())
	}
	if used > 0 {
		return metadata.Errorf(metadata.CodeConflict, "network %s has %d addresses in use, among them %s by %s on host "+
			"%s; stop those containers first",
			name, used, user.Address, user.ID, user.Owner.Host)
	}
	// Tables on condition of their revisions: an address given out meanwhile keeps the network.
	for _, r := range s.store.Write(ctx, changes...) {
		if errors.Is(r.Err, store.ErrConflict) {
			return metadata.Errorf(metadata.CodeConflict, "network %s came into use just now", name)
		} else if r.Err != nil {
			return r.Err
		}
	}
	revision, err := store.One(ctx, s.store, store.Change{Key: entry.NetworkPrefix + name, Revision: e.Revision})
	if err != nil {
		return err
	}
	changes = nil
	for _, prefix := range []string{entry.BlockPrefix, entry.HostRoutePrefix} {
		list, _, err := s.list(ctx, prefix+name+"/")
		if err != nil {
			return err
		}
		for _, e := range list {
			changes = append(changes, store.Change{Key: e.Key, Revision: store.Any})
		}
	}
	for _, r := range s.store.Write(ctx, changes...) {
		if r.Err != nil {
			return r.Err
		}
		revision = max(revision, r.Revision)
	}
	if n.VNI != 0 {
		s.freeVNI(ctx, n.VNI, name)
	}
	s.forgetAllocator(name)
	s.log.Info("network removed", "network", name)
	return s.seen(ctx, revision)
}
