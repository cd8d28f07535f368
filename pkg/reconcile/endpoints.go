package reconcile

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/lariat-net/lariat/pkg/attach"
	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/journal"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// EndpointFaults compares the host end of every endpoint with the result of its ADD. It uses the
// first journal that has a record of the endpoint. It finds endpoints in the kernel, because a
// missing host end cannot be repaired. It skips endpoints that are terminating or released.
func EndpointFaults(
	ctx context.Context, k kernel.Kernel, s *metadata.Snapshot, journals ...journal.Journal,
) (out []delta.EndpointFault, err error) {
	ports, err := k.Veths(ctx)
	if err != nil {
		return nil, err
	}
	var errs []error
	own := map[string][]netip.Addr{} // by network
	for _, p := range ports {
		id := metadata.AttachmentID{ContainerID: p.Alias.ContainerID, IfName: p.Alias.IfName}
		var r journal.Record
		known := false
		for _, j := range journals {
			var err error
			if r, known, err = j.Get(p.Alias.Network, id); err != nil {
				errs, known = append(errs, err), false
			}
			if known {
				break
			}
		}
		if known && (r.Terminating || r.State == journal.Released) {
			continue
		}
		if _, ok := own[p.Alias.Network]; !ok {
			own[p.Alias.Network] = s.Gateways(p.Alias.Network, s.Self)
		}
		want := wantedVeth(p, r, known, s, own[p.Alias.Network])
		if lacks := p.Faults(want); len(lacks) > 0 {
			out = append(out, delta.EndpointFault{Want: want, Lacks: lacks})
		}
	}
	return out, errors.Join(errs...)
}

// wantedVeth returns the desired host end of an endpoint. Without a record, the addresses are not
// known: the record may be in another runtime's state directory. Then wantedVeth wants only the
// settings that protect the host and other containers. own lists the host's current addresses on
// the network. They may differ from the addresses at the time of the ADD, and the host sends from
// the current ones.
func wantedVeth(have delta.VethInfo, r journal.Record, known bool, s *metadata.Snapshot,
	own []netip.Addr) delta.VethInfo {
	if known {
		a := r.Attachment
		a.Addresses = slices.Clone(a.Addresses)
		for i, x := range a.Addresses {
			if slices.Contains(own, x.Gateway) {
				continue
			}
			a.Addresses[i].Gateway = netip.Addr{}
			if j := slices.IndexFunc(own, func(o netip.Addr) bool { return o.BitLen() == x.Address.BitLen() }); j >= 0 {
				a.Addresses[i].Gateway = own[j]
			}
		}
		want := attach.Plan(&a, attach.Config{ID: r.AttachmentID}).Veth()
		want.MTU = 0 // the configuration of the ADD may set another MTU
		return want
	}
	want := have
	want.RPFilter, want.AcceptRA, want.Group = 1, 0, delta.OverlayLinkGroup
	if n, ok := s.Network(have.Alias.Network); ok && !n.HasIPv6() {
		want.NoIPv6 = true
	}
	return want
}

// ports repairs the host ends of endpoints. A foreign interface manager, a sysctl file or a flush
// removes settings that no later ADD restores. Without a repair the container stays cut off, or its
// addresses stay open to other containers.
func (m *Manager) ports(ctx context.Context) (changed []string, err error) {
	s := m.view.Load()
	if s == nil {
		return nil, errNoView
	}
	faults, err := EndpointFaults(ctx, m.Kernel, s, m.Journal)
	errs := []error{err}
	for _, f := range faults {
		if err := m.Kernel.RepairVeth(ctx, f.Want); err != nil {
			id := metadata.ShortID(f.Want.Alias.ContainerID)
			errs = append(errs, fmt.Errorf("mend the port %s of container %s: %w", f.Want.Name, id, err))
			continue
		}
		changed = append(changed, f.Lacks...)
	}
	return changed, errors.Join(errs...)
}
