// Package kernel is the only one that changes the machine: links, addresses, routes, neighbours, forwarding entries,
// nftables and sysctls of one network namespace.
//
// It reads what carries Lariat's mark, applies a difference, and never touches anything else. What should be there is
// decided elsewhere, by planners that cannot import this package.
package kernel

import (
	"context"
	"errors"
	"net/netip"

	"github.com/lariat-net/lariat/pkg/delta"
)

// ErrExists is wrapped when a container already has an interface of the name that a port is to get.
var ErrExists = errors.New("interface exists")

// ErrTaken is wrapped when an address that a port is to get has a route that is not to be replaced: to another
// container that runs, or to something that is not Lariat's.
var ErrTaken = errors.New("the address is in use on this host")

// Kernel is one network namespace. New gives the real one; package fake has one that prints itself and fails
// on request.
type Kernel interface {
	// Observe reads what carries Lariat's mark. Sysctls and addresses on devices of others carry no mark: of them it
	// reads those that want names, and no other. want may be nil. Nothing is changed.
	Observe(ctx context.Context, want *delta.State) (*delta.State, error)

	// Apply makes the changes, additions before removals, in an order in which each finds what it needs. It tries
	// every change, and joins the errors; each names its change. Repeating an Apply is harmless.
	Apply(ctx context.Context, d *delta.Difference) error

	// VethFree reports why AddEndpoint would not make a port of that host end: a container runs with it
	// in another network namespace or on another network, or the other end was renamed and its name
	// is taken. The error wraps ErrExists. Nothing is changed.
	VethFree(ctx context.Context, netns, hostName, ifName, network string) error

	// PortNetwork returns the network of a host end; empty when there is no such port, or it has no
	// alias yet.
	PortNetwork(ctx context.Context, hostName string) (string, error)

	// AddEndpoint makes a container's port, or leaves nothing of it behind. A host end of the same name
	// that is left over is replaced, one that VethFree objects to is not; an interface IfName
	// inside of the container that already exists is an error that wraps ErrExists. A route that leads
	// one of the addresses elsewhere is not replaced, unless it is the overlay's: the error wraps ErrTaken.
	AddEndpoint(ctx context.Context, netns string, p delta.Endpoint) error

	// DelEndpoint removes a port by its host end. Both ends and all routes go with it. It is no error when it is gone.
	DelEndpoint(ctx context.Context, hostName string) error

	// DelEndpoints removes many in one request: a link removal alone waits some 16 ms for RCU, a group hardly longer.
	DelEndpoints(ctx context.Context, hostNames []string) error

	// CheckEndpoint compares a port with what it should be and names everything that differs.
	CheckEndpoint(ctx context.Context, netns string, p delta.Endpoint) error

	// Joined reports whether a device of ours is there and every address is one of this host's own: what an ADD needs to
	// know before it relies on them. It asks for single objects and dumps nothing.
	Joined(ctx context.Context, device string, addrs []netip.Addr) (bool, error)

	// Veths lists the host ends of ports.
	Veths(ctx context.Context) ([]delta.VethInfo, error)

	// RepairVeth makes a port's host end what it should be. It makes no port: one that is gone is no error.
	// Routes are replaced as by AddEndpoint.
	RepairVeth(ctx context.Context, want delta.VethInfo) error

	// Close frees the sockets.
	Close() error
}

// Reconcile makes the kernel equal to want and returns what it changed, also beside an error. A kernel that already is
// equal is not written to.
func Reconcile(ctx context.Context, k Kernel, want *delta.State) (*delta.Difference, error) {
	have, err := k.Observe(ctx, want)
	if err != nil {
		return nil, err
	}
	d := delta.Between(want, have)
	if d.Empty() {
		return d, nil
	}
	return d, k.Apply(ctx, d)
}
