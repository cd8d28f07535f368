package fake

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/kernel"
)

// AddEndpoint implements kernel.Kernel. Its steps are those of the real one.
func (k *Kernel) AddEndpoint(ctx context.Context, netns string, p delta.Endpoint) (err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.dead() {
		return ErrKilled
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	alias, _ := delta.ParseEndpointAlias(p.Alias)
	if err := k.portFree(netns, p.HostName, alias.Network); err != nil {
		return err
	}
	if old, ok := k.ports[p.HostName]; ok {
		if err := k.deletePort(old.p.HostName); err != nil {
			return fmt.Errorf("replace the dangling %s: %w", p.HostName, err)
		}
	}
	if k.taken(netns, p.IfName) {
		return fmt.Errorf("interface %s in the container: %w", p.IfName, kernel.ErrExists)
	}
	for name, o := range k.ports {
		for _, a := range p.Addrs {
			if slices.Contains(o.p.Addrs, a) {
				return fmt.Errorf("%s leads to %s: %w", a, name, kernel.ErrTaken)
			}
		}
	}
	made := &port{p: p, netns: netns}
	plan := made.plan()
	if err := k.step(plan[0].line); err != nil {
		return fmt.Errorf("%s: %w", plan[0].line, err)
	}
	k.ports[p.HostName] = made
	plan[0].do()
	defer func() {
		if err != nil {
			err = errors.Join(err, k.deletePort(p.HostName))
		}
	}()
	for _, s := range plan[1:] {
		if err := k.step(s.line); err != nil {
			return fmt.Errorf("%s: %w", s.line, err)
		}
		s.do()
	}
	return nil
}

// VethFree implements kernel.Kernel.
func (k *Kernel) VethFree(ctx context.Context, netns, hostName, _, network string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.dead() {
		return ErrKilled
	}
	return cmp.Or(ctx.Err(), k.portFree(netns, hostName, network))
}

// PortNetwork implements kernel.Kernel.
func (k *Kernel) PortNetwork(ctx context.Context, hostName string) (string, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.dead() {
		return "", ErrKilled
	}
	if p, ok := k.ports[hostName]; ok {
		alias, _ := delta.ParseEndpointAlias(p.alias)
		return alias.Network, ctx.Err()
	}
	return "", ctx.Err()
}

func (k *Kernel) portFree(netns, hostName, network string) error {
	old, ok := k.ports[hostName]
	if !ok {
		return nil
	}
	if alias, ok := delta.ParseEndpointAlias(old.alias); old.netns != netns || ok && alias.Network != network {
		return fmt.Errorf("the port %s leads to %s in %s: %w", hostName, old.p.IfName, old.netns, kernel.ErrExists)
	}
	return nil
}

func (k *Kernel) taken(netns, ifname string) bool {
	for _, o := range k.ports {
		if o.netns == netns && o.p.IfName == ifname {
			return true
		}
	}
	return k.netns[netns][ifname]
}

type portStep struct {
	line string
	do   func()
}

// plan is what AddEndpoint does, step by step.
func (m *port) plan() []portStep {
	p := m.p
	var steps []portStep
	host := func(line string) {
		steps = append(steps, portStep{line, func() { m.host = append(m.host, line) }})
	}
	inside := func(line string) {
		steps = append(steps, portStep{line + " in " + m.netns, func() { m.inside = append(m.inside, line) }})
	}
	link := fmt.Sprintf("link  %s type veth mtu %d address %s", p.HostName, p.MTU, p.HostMAC)
	peer := fmt.Sprintf("link  %s type veth mtu %d address %s", p.IfName, p.MTU, p.MAC)
	steps = append(steps, portStep{link, func() { m.host, m.inside = []string{link}, []string{peer} }})
	up := "link  set " + p.HostName + " up alias " + p.Alias
	steps = append(steps, portStep{up, func() { m.host, m.alias = append(m.host, up), p.Alias }})
	if slices.ContainsFunc(p.Addrs, netip.Addr.Is6) {
		host("addr  fe80::1/64 dev " + p.HostName)
	}
	for _, a := range p.Addrs {
		host(delta.RouteString(delta.To(netip.PrefixFrom(a, a.BitLen())), delta.Route{Dev: p.HostName}))
	}
	for _, a := range p.Addrs {
		inside(delta.Addr{Dev: p.IfName, Prefix: netip.PrefixFrom(a, a.BitLen())}.String())
	}
	inside("link  set " + p.IfName + " up")
	for _, g := range p.Gateways {
		inside(delta.NeighString(delta.Neigh{Dev: p.IfName, Addr: g}, p.HostMAC))
		if g.Is4() {
			inside(fmt.Sprintf("route %s/32 dev %s", g, p.IfName))
		}
	}
	for _, r := range p.Routes {
		line := fmt.Sprintf("route %s via %s dev %s onlink", r.Dst, r.Via, p.IfName)
		for _, x := range []struct {
			word  string
			value int
		}{{"mtu", r.MTU}, {"advmss", r.AdvMSS}, {"metric", r.Priority}, {"table", r.Table}} {
			if x.value != 0 {
				line += fmt.Sprintf(" %s %d", x.word, x.value)
			}
		}
		inside(line)
	}
	return steps
}

// DelEndpoint implements kernel.Kernel.
func (k *Kernel) DelEndpoint(ctx context.Context, hostName string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.dead() {
		return ErrKilled
	}
	return k.deletePort(hostName)
}

func (k *Kernel) deletePort(name string) error {
	if _, ok := k.ports[name]; !ok {
		return nil
	}
	if err := k.step("remove link " + name); err != nil {
		return fmt.Errorf("remove %s: %w", name, err)
	}
	delete(k.ports, name)
	return nil
}

// DelEndpoints implements kernel.Kernel: one step for all.
func (k *Kernel) DelEndpoints(ctx context.Context, hostNames []string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.dead() {
		return ErrKilled
	}
	var there []string
	for _, name := range hostNames {
		if _, ok := k.ports[name]; ok {
			there = append(there, name)
		}
	}
	if len(there) == 0 {
		return nil
	}
	if err := k.step(fmt.Sprintf("remove links %v", there)); err != nil {
		return fmt.Errorf("remove %d ports: %w", len(there), err)
	}
	for _, name := range there {
		delete(k.ports, name)
	}
	return nil
}

// CheckEndpoint implements kernel.Kernel.
func (k *Kernel) CheckEndpoint(ctx context.Context, netns string, p delta.Endpoint) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	have, ok := k.ports[p.HostName]
	if !ok {
		return fmt.Errorf("the host's end %s is missing", p.HostName)
	}
	if have.netns != netns {
		return fmt.Errorf("%s ends in %s, not in %s", p.HostName, have.netns, netns)
	}
	if p.MTU == 0 { // not compared, as by the real one
		p.MTU = have.p.MTU
	}
	whole := &port{p: p, netns: netns}
	for _, s := range whole.plan() {
		s.do()
	}
	var errs []error
	for _, l := range whole.host {
		if !slices.Contains(have.host, l) {
			errs = append(errs, fmt.Errorf("missing on the host: %s", l))
		}
	}
	for _, l := range whole.inside {
		if !slices.Contains(have.inside, l) {
			errs = append(errs, fmt.Errorf("missing in the container: %s", l))
		}
	}
	return errors.Join(errs...)
}

// Spoil removes a line of String from a port, as an administrator or another program may. It says whether the
// line was there.
func (k *Kernel) Spoil(hostName, line string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	p, ok := k.ports[hostName]
	if !ok {
		return false
	}
	before := len(p.host) + len(p.inside)
	same := func(l string) bool { return l == line }
	p.host, p.inside = slices.DeleteFunc(p.host, same), slices.DeleteFunc(p.inside, same)
	return len(p.host)+len(p.inside) < before
}

// Joined implements kernel.Kernel.
func (k *Kernel) Joined(ctx context.Context, device string, addrs []netip.Addr) (bool, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if device != "" {
		if l, ok := k.world.Links[device]; !ok || l.Down || l.Alias == "" {
			return false, nil
		}
	}
	for _, a := range addrs {
		if !k.local(a) {
			return false, nil
		}
	}
	return true, nil
}

// Veths implements kernel.Kernel.
func (k *Kernel) Veths(ctx context.Context) ([]delta.VethInfo, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.dead() {
		return nil, ErrKilled
	}
	var out []delta.VethInfo
	for i, name := range slices.Sorted(maps.Keys(k.ports)) {
		p := k.ports[name]
		alias, ok := delta.ParseEndpointAlias(p.alias)
		if !ok {
			continue
		}
		port := p.p.Veth()
		port.Index, port.Alias, port.Routes = i+2, alias, map[netip.Prefix]delta.Route{}
		for dst, r := range p.p.Veth().Routes {
			if slices.Contains(p.host, delta.RouteString(delta.To(dst), delta.Route{Dev: name})) {
				port.Routes[dst] = r
			}
		}
		out = append(out, port)
	}
	return out, nil
}

// RepairVeth implements kernel.Kernel. Ports are as they should be in this world, so there is nothing to do.
func (k *Kernel) RepairVeth(ctx context.Context, want delta.VethInfo) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.step("mend " + want.Name)
}
