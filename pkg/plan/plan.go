// Package plan combines the planners into the desired state of one host.
// The desired state is a pure function of the metadata.
package plan

import (
	"reflect"
	"slices"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/guard"
	"github.com/lariat-net/lariat/pkg/ipsec"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/nat"
	"github.com/lariat-net/lariat/pkg/vxlan"
)

// Desired returns the desired state of host self's kernel, without endpoints.
// ADD creates endpoints.
// Desired is a pure function of the snapshot and of loose.
// loose says that the host's settings loosen the reverse-path check of host ends (see guard.Plan).
// "lariat plan" prints the desired state, and the network manager applies it.
// Desired plans from the sane entries of the snapshot. Problems name the other entries.
func Desired(snap *metadata.Snapshot, self string, loose bool) *delta.State {
	snap = snap.Sane()
	left := &delta.State{}
	for _, p := range snap.Problems {
		left.Problemf("%s; %s", p, p.Remedy())
	}
	return delta.Merge(left, vxlan.Plan(snap, self), ipsec.Plan(snap, self), guard.Plan(snap, self, loose), nat.Plan(snap))
}

// Device returns the device that carries a network's addresses on each host.
// It returns an empty string for a network without such a device.
func Device(n metadata.Network) string {
	switch n.Encapsulation {
	case metadata.EncapVXLAN:
		return vxlan.Device(n.VNI)
	case metadata.EncapIPsec:
		return ipsec.GatewayDevice(n.Name)
	}
	return ""
}

// Same reports whether two views are equal in everything that planners read.
// Equal views have the same plan for the kernel and for tunnels.
// Same costs little when the views share lists. Views of one watch share unchanged lists.
func Same(a, b *metadata.Snapshot) bool {
	return a.Self == b.Self && sameHosts(a.Hosts, b.Hosts, a.Self) &&
		same(a.Blocks, b.Blocks, func(x, y metadata.Block) bool { return x == y }) &&
		same(a.HostRoutes, b.HostRoutes, func(x, y metadata.HostRoute) bool { return x == y }) &&
		same(a.Networks, b.Networks, func(x, y metadata.Network) bool { return reflect.DeepEqual(x, y) }) &&
		slices.Equal(a.Problems, b.Problems)
}

func same[T any](a, b []T, equal func(x, y T) bool) bool {
	if len(a) > 0 && len(a) == len(b) && &a[0] == &b[0] {
		return true
	}
	return slices.EqualFunc(a, b, equal)
}

// sameHosts compares the properties of hosts that planners read.
// Planners read only the foreign routes of the planned host.
// Planners read Live only when two hosts claim the same address or MAC (see metadata.Senior).
func sameHosts(a, b []metadata.Host, self string) bool {
	flipped := false
	if !same(a, b, func(x, y metadata.Host) bool {
		flipped = flipped || x.Live != y.Live
		return x.Name == y.Name && slices.Equal(x.Underlay, y.Underlay) && x.BootID == y.BootID && x.MAC == y.MAC &&
			x.IKEIdentity == y.IKEIdentity && slices.Equal(x.IKEKeys, y.IKEKeys) && x.Joined.Equal(y.Joined) &&
			(x.Name != self || slices.Equal(x.Foreign, y.Foreign))
	}) {
		return false
	}
	return !flipped || !contested(b)
}

// contested reports whether two hosts claim the same address or MAC.
func contested(hosts []metadata.Host) bool {
	claims := make(map[any]struct{}, 2*len(hosts))
	for _, h := range hosts {
		var own []any
		if !h.MAC.IsZero() {
			own = append(own, h.MAC)
		}
		for _, u := range h.Underlay {
			own = append(own, u.Address.Addr())
		}
		for _, c := range own {
			if _, taken := claims[c]; taken {
				return true
			}
			claims[c] = struct{}{}
		}
	}
	return false
}
