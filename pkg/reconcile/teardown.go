package reconcile

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/kernel/iptables"
)

// Teardown removes everything that Lariat owns on this host. It removes veths, devices, addresses,
// routes and rules by the marks that planners know them by. It also removes the iptables chains,
// and the IKE daemon with its state in the kernel. It returns a line for each removal. With apply
// false it changes nothing, and returns the removals that it would do. No manager and no plugin may
// work on the host's network meanwhile.
func (m *Manager) Teardown(ctx context.Context, apply bool) (lines []string, err error) {
	ports, err := m.Kernel.Veths(ctx)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, p := range ports {
		names = append(names, p.Name)
		lines = append(lines, fmt.Sprintf("- port %s of container %s, network %s", p.Name, p.Alias.ContainerID,
			p.Alias.Network))
	}
	slices.Sort(lines)
	own := delta.NewState() // addresses of foreign devices are found by name
	if m.MetadataAddress.IsValid() {
		own.Addrs[delta.Addr{Dev: "lo", Prefix: netip.PrefixFrom(m.MetadataAddress, m.MetadataAddress.BitLen())}] = struct{}{}
	}
	have, err := m.Kernel.Observe(ctx, own)
	if err != nil {
		return nil, err
	}
	d := delta.Between(delta.NewState(), have)
	if !d.Empty() {
		lines = append(lines, strings.Split(strings.TrimRight(d.String(), "\n"), "\n")...)
	}
	var errs []error
	if apply {
		errs = append(errs, m.Kernel.DelEndpoints(ctx, names), m.Kernel.Apply(ctx, d))
	}
	chains, err := iptables.Remove(apply)
	lines, errs = append(lines, chains...), append(errs, err)
	if m.Tunnels != nil {
		tunnels, err := m.Tunnels.teardown(ctx, apply)
		lines, errs = append(lines, tunnels...), append(errs, err)
	}
	return lines, errors.Join(errs...)
}

// teardown stops the IKE daemon, and removes the tunnels' state from the kernel.
func (t *Tunnels) teardown(ctx context.Context, apply bool) (lines []string, err error) {
	if t.Charon != nil && t.Charon.Running() {
		lines = append(lines, fmt.Sprintf("- charon, process %d, with its connections", t.Charon.Pid()))
	}
	if !apply {
		return lines, nil
	}
	swept, err := t.disable(ctx)
	return append(lines, swept...), err
}
