// Package plan puts the planners together: all that Lariat wants of one host, as a pure function of the metadata.
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

// Desired is all that Lariat wants of host self's kernel, apart from containers' ports, which their own ADD
// makes. It is a pure function of the snapshot and of one fact of the host, whether its settings make a port's
// reverse-path check loose (see guard.Plan). "lariat plan" prints it, and the network manager applies it.
// Whatever the snapshot holds, it plans from what is sane of it; the rest is told in Problems.
func Desired(snap *metadata.Snapshot, self string, loose bool) *delta.State {
	snap = snap.Sane()
	left := &delta.State{}
	for _, p := range snap.Problems {
		left.Problemf("%s; %s", p, p.Remedy())
	}
	return delta.Merge(left, vxlan.Plan(snap, self), ipsec.Plan(snap, self), guard.Plan(snap, self, loose), nat.Plan(snap))
}

// Device is the device that carries a network's addresses on each host, empty of a network that needs none.
func Device(n metadata.Network) string {
	switch n.Encapsulation {
	case metadata.EncapVXLAN:
		return vxlan.Device(n.VNI)
	case metadata.EncapIPsec:
		return ipsec.GatewayDevice(n.Name)
	}
	return ""
}

// Same reports whether nothing that planners read differs between two views: of both the same is planned, for
// the kernel and for tunnels. It costs little where the views share their lists, as those of one watch do where
// nothing changed.
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

// sameHosts compares all of hosts but what planners do not read. Of foreign routes they read the planned host's
// own. Whether a host lives is read where two claim the same address or MAC: see metadata.Senior.
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
