// Package plan puts the planners together: all that Lariat wants of one host, as a pure function of the metadata.
package plan

import (
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
		return ipsec.HomeDevice(n.Name)
	}
	return ""
}
