// Package kernel changes the machine: links, addresses, routes, neighbours, forwarding entries,
// nftables and sysctls of one network namespace. No other package does.
//
// The package reads objects with Lariat's mark, applies a difference, and never changes foreign
// objects. The planners decide the desired state, and they cannot import this package.
package kernel

import (
	"context"
	"errors"
	"net/netip"

	"github.com/lariat-net/lariat/pkg/delta"
)

// ErrExists is wrapped when a container already has an interface with the name of a new endpoint.
var ErrExists = errors.New("interface exists")

// ErrTaken is wrapped when an address of a new endpoint has a route that must not be replaced.
// That route leads to another running container, or it is foreign.
var ErrTaken = errors.New("the address is in use on this host")

// A Kernel is one network namespace. New returns the real one.
// Package fake has a Kernel that prints itself and fails on request.
type Kernel interface {
	// Observe reads the objects with Lariat's mark. It changes nothing, and want may be nil.
	// Sysctls, and addresses on foreign devices, carry no mark.
	// Of these Observe reads only the ones that want names.
	Observe(ctx context.Context, want *delta.State) (*delta.State, error)

	// Apply makes the changes, additions before removals.
	// Each change follows the changes that it needs.
	// Apply tries every change and joins the errors. Each error names its change.
	// Repeating an Apply is harmless.
	Apply(ctx context.Context, d *delta.Difference) error

	// VethFree reports why AddEndpoint would not create an endpoint with that host end.
	// A container uses the host end in another network namespace or on another network.
	// Or the container's end was renamed, and another interface has its name.
	// The error wraps ErrExists. VethFree changes nothing.
	VethFree(ctx context.Context, netns, hostName, ifName, network string) error

	// PortNetwork returns the network of a host end.
	// It returns an empty string when the host end does not exist or has no alias yet.
	PortNetwork(ctx context.Context, hostName string) (string, error)

	// AddEndpoint creates an endpoint, or rolls back completely.
	// It replaces a dangling host end of the same name, but no host end that VethFree reports.
	// An existing interface IfName in the container is an error that wraps ErrExists.
	// AddEndpoint replaces a route of the overlay to one of the addresses.
	// Any other route of an address that leads elsewhere is an error that wraps ErrTaken.
	AddEndpoint(ctx context.Context, netns string, p delta.Endpoint) error

	// DelEndpoint removes an endpoint by its host end.
	// The kernel removes both ends and all routes with it. A missing endpoint is no error.
	DelEndpoint(ctx context.Context, hostName string) error

	// DelEndpoints removes many endpoints in one request.
	// The removal of one link waits some 16 ms for RCU. The removal of a group takes hardly longer.
	DelEndpoints(ctx context.Context, hostNames []string) error

	// CheckEndpoint compares an endpoint with the desired endpoint and names every difference.
	CheckEndpoint(ctx context.Context, netns string, p delta.Endpoint) error

	// Joined reports whether Lariat's device exists and every address is local.
	// An ADD needs both before it relies on them. Joined requests single objects and dumps nothing.
	Joined(ctx context.Context, device string, addrs []netip.Addr) (bool, error)

	// Veths lists the host ends of endpoints.
	Veths(ctx context.Context) ([]delta.VethInfo, error)

	// RepairVeth makes a host end equal to want. It creates no host end: a missing one is no error.
	// RepairVeth replaces the same routes as AddEndpoint.
	RepairVeth(ctx context.Context, want delta.VethInfo) error

	// Close frees the sockets.
	Close() error
}

// Reconcile makes the kernel equal to want and returns its changes, even with an error.
// It writes nothing when the kernel is already equal.
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
