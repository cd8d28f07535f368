package reconcile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/journal"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/kernel/iptables"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/plan"
)

// Manager keeps one host's kernel equal to the metadata.
type Manager struct {
	Client  metadata.Client
	Journal journal.Journal
	Kernel  kernel.Kernel
	BootID  string
	Log     *slog.Logger

	// Every is the slow timer of the overlay pass; Grace is GarbageCollector.Grace.
	Every, Grace time.Duration

	// MetadataAddress is added to the loopback device. Containers and host processes reach the
	// metadata tree by it. With the zero Addr no address is added.
	MetadataAddress netip.Addr

	// Tunnels keeps the tunnels of encrypted networks. With nil no tunnels are kept.
	Tunnels *Tunnels

	// OnView, when not nil, is called with each view that comes into force.
	OnView func(*metadata.Snapshot)

	view      atomic.Pointer[metadata.Snapshot]
	leftovers *GarbageCollector
	home      map[netip.Addr]netip.Addr // underlay: from a stand-in address to the address it replaces
	mu        sync.Mutex
	concerns  []*Concern
	metadata  Health // health of the watch
	turns     turns  // of the overlay pass
	again     func() // asks for an overlay pass
}

// settle is the wait after a change of a host end. A container that ends loses its veth altogether,
// which then needs no repair. The wait is longer than the removal of a device takes. It is far
// shorter than the second within which an endpoint should be whole again.
const settle = 100 * time.Millisecond

// errNoView is returned until the metadata service has answered once. Nothing is changed before
// that, because an empty view would remove everything.
var errNoView = errors.New("the metadata service has not answered yet")

// Run reconciles until the context ends. It removes nothing at the end: the kernel carries the
// containers' packets without the manager.
func (m *Manager) Run(ctx context.Context, events <-chan kernel.Event) error {
	overlay := NewConcern("overlay", m.Every, m.overlay)
	m.home = map[netip.Addr]netip.Addr{}
	underlay := NewConcern("underlay", m.Every, m.underlay)
	m.again = overlay.Trigger
	m.leftovers = &GarbageCollector{Client: m.Client, Journal: m.Journal, Kernel: m.Kernel, BootID: m.BootID,
		Grace: m.Grace}
	gc := NewConcern("leftovers", m.Every, func(ctx context.Context) ([]string, error) {
		waiting := m.waiting()
		changed, err := m.leftovers.Run(ctx)
		if waiting && !m.waiting() {
			overlay.Trigger() // the overlay pass could not join the network before
		}
		return changed, err
	})
	forward := NewConcern("forward", m.Every, m.forward)
	ports := NewConcern("ports", m.Every, m.ports)
	m.mu.Lock()
	m.concerns = []*Concern{overlay, underlay, gc, forward, ports}
	tunnels := &Concern{}
	if m.Tunnels != nil {
		tunnels = NewConcern("tunnels", m.Every, m.Tunnels.Run)
		m.Tunnels.notify(tunnels)
		m.concerns = append(m.concerns, tunnels)
	}
	m.metadata = Health{Concern: "metadata", Error: errNoView.Error()}
	m.mu.Unlock()

	var wg sync.WaitGroup
	for _, c := range m.concerns {
		wg.Go(func() { c.Loop(ctx, m.Log) })
	}
	wg.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case ev, ok := <-events:
				if !ok {
					return
				}
				m.Log.Debug("kernel event", "event", ev)
				switch ev.Kind {
				case kernel.EventPort:
					time.AfterFunc(settle, func() {
						if kernel.VethIndex(ev.Name) != 0 {
							ports.Trigger()
						}
					})
					continue
				case kernel.EventAddr:
					// When an address is removed, the kernel removes container routes that use it
					// as their source. Repair the address first.
					time.AfterFunc(settle, ports.Trigger)
				case kernel.EventResync:
					ports.Trigger()
				}
				overlay.Trigger()
				if ev.Kind == kernel.EventLink || ev.Kind == kernel.EventAddr || ev.Kind == kernel.EventResync {
					underlay.Trigger()
				}
				if ev.Kind == kernel.EventNft || ev.Kind == kernel.EventBridge || ev.Kind == kernel.EventResync {
					forward.Trigger()
				}
			}
		}
	})
	err := m.Client.Watch(ctx, func(s *metadata.Snapshot) error {
		first, back := m.viewed(s, overlay, forward, tunnels)
		if first {
			underlay.Trigger()
			ports.Trigger()
		}
		if first || back || s.Anew || m.waiting() {
			gc.Trigger()
		}
		return nil
	}, func(err error) { m.watched(err) })
	wg.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// viewed puts a view into force. It triggers the planning concerns when something that planners
// read has changed. first reports whether the view is the first. back reports whether the service
// or its store is back, or a network was deleted. Then releases that DELs could not send, and the
// remains of the network, can be removed.
func (m *Manager) viewed(s *metadata.Snapshot, planning ...*Concern) (first, back bool) {
	before := m.view.Swap(s)
	began := m.watched(nil)
	if m.OnView != nil {
		m.OnView(s)
	}
	first = before == nil
	if first || !plan.Same(before, s) {
		for _, c := range planning {
			c.Trigger()
		}
	}
	return first, began || !first && (before.Away != "" && s.Away == "" || lost(before, s))
}

// lost reports whether a network has been deleted.
func lost(before, now *metadata.Snapshot) bool {
	return slices.ContainsFunc(before.Networks, func(n metadata.Network) bool { _, ok := now.Network(n.Name); return !ok })
}

// waiting reports whether some network of the view is not settled.
func (m *Manager) waiting() bool {
	s := m.view.Load()
	if s == nil {
		return false
	}
	me, _ := s.Host(s.Self)
	return slices.ContainsFunc(s.Networks, func(n metadata.Network) bool { return !m.leftovers.Settled(me, n) })
}

// watched records the state of the watch, and reports whether the watch has begun to work. The last
// view stays in force while the watch is broken.
func (m *Manager) watched(err error) (began bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case err == nil:
		if began = !m.metadata.OK; began {
			m.Log.Info("metadata service answers", "socket", m.Client.Socket)
		}
		m.metadata.OK, m.metadata.Error, m.metadata.LastSuccess = true, "", time.Now().UTC()
	default:
		switch {
		case m.metadata.OK:
			m.Log.Error("metadata service lost; the network stays as it is", "error", err)
		case m.metadata.Failures == 0: // both services were started a moment ago
			m.Log.Info("waiting for the metadata service", "error", err)
		}
		m.metadata.OK, m.metadata.Error = false, err.Error()
		m.metadata.Failures++
	}
	m.metadata.Passes++
	return began
}

// Reload runs a pass of every concern, which reads its files again. It returns the errors of the
// passes.
func (m *Manager) Reload(ctx context.Context) error {
	m.mu.Lock()
	concerns := slices.Clone(m.concerns)
	m.mu.Unlock()
	var errs []error
	for _, c := range concerns {
		if err := c.Do(ctx); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", c.Name, err))
		}
	}
	return errors.Join(errs...)
}

// Health lists every concern.
func (m *Manager) Health() []Health {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := []Health{m.metadata}
	for _, c := range m.concerns {
		out = append(out, c.Health())
	}
	return out
}

// View returns the view that is in force, or nil before the first.
func (m *Manager) View() *metadata.Snapshot { return m.view.Load() }

// Desired returns the desired state of the overlay pass, with the manager's own additions.
func (m *Manager) Desired(s *metadata.Snapshot) *delta.State {
	own := delta.NewState()
	if m.MetadataAddress.IsValid() {
		own.Addrs[delta.Addr{Dev: "lo", Prefix: netip.PrefixFrom(m.MetadataAddress, m.MetadataAddress.BitLen())}] = struct{}{}
	}
	return delta.Merge(plan.Desired(s, s.Self, kernel.LooseReversePath()), own)
}

// overlay runs one pass over everything that the planners want.
func (m *Manager) overlay(ctx context.Context) ([]string, error) {
	s := m.view.Load()
	if s == nil {
		return nil, errNoView
	}
	want := m.Desired(s)
	d, err := kernel.Reconcile(ctx, m.Kernel, want)
	var changed []string
	if d != nil && !d.Empty() {
		changed = strings.Split(strings.TrimRight(d.String(), "\n"), "\n")
		const most = 50
		if len(changed) > most {
			changed = append(changed[:most:most], fmt.Sprintf("and %d more", len(changed)-most))
		}
	}
	for _, p := range want.Problems {
		err = errors.Join(err, errors.New(p))
	}
	// Join last: it waits for the store, and its result arrives as a new view.
	return changed, errors.Join(err, m.join(ctx, s))
}

// join claims this host's first block of every overlay network, while there are enough blocks for
// every host. The block gives the host its own overlay address. With it, the host's processes can
// reach containers on other hosts before the host runs any container.
func (m *Manager) join(ctx context.Context, s *metadata.Snapshot) error {
	var errs []error
	me, _ := s.Host(s.Self)
	for _, n := range s.Networks {
		if n.Encapsulation == metadata.EncapNone || len(s.Gateways(n.Name, s.Self)) > 0 {
			continue
		}
		if !m.leftovers.Settled(me, n) {
			continue // live attachments get the blocks of their addresses first
		}
		if !blocksForAll(s, n) {
			continue // containers need the blocks more
		}
		if wait := m.turns.wait(time.Now(), n.Name, without(s, n)); wait > 0 {
			time.AfterFunc(wait, m.again)
			continue
		}
		// A network that is not found was deleted since the snapshot. The next snapshot is on its
		// way.
		if err := m.Client.Join(ctx, n.Name); err != nil && !metadata.IsCode(err, metadata.CodeNotFound) {
			errs = append(errs, fmt.Errorf("join network %s: %w", n.Name, err))
		}
	}
	return errors.Join(errs...)
}

// All hosts need their first block of a network when it is created. They claim one after the other.
// Every host hears of each claim, so simultaneous claims exceed what a store can send within a
// request's deadline. A container that starts meanwhile does not wait: its host claims the block
// then.
const (
	atOnce  = 8                    // up to this many hosts claim together
	eachFor = 5 * time.Millisecond // average interval between claims
)

// turns maps each network to the time when this host claims its first block.
type turns map[string]time.Time

// wait returns how long this host must still wait. without is the number of hosts that have no
// block of the network, including this one.
func (t *turns) wait(now time.Time, network string, without int) time.Duration {
	if without <= atOnce {
		return 0
	}
	if *t == nil {
		*t = turns{}
	}
	due, ok := (*t)[network]
	if !ok {
		due = now.Add(rand.N(time.Duration(without) * eachFor))
		(*t)[network] = due
	}
	return due.Sub(now)
}

// without counts the live hosts that have no block of the network.
func without(s *metadata.Snapshot, n metadata.Network) int {
	have := map[string]bool{}
	for _, b := range s.Blocks {
		if b.Network == n.Name {
			have[b.Host] = true
		}
	}
	count := 0
	for _, h := range s.Hosts {
		if h.Live && !have[h.Name] {
			count++
		}
	}
	return count
}

// blocksForAll reports whether every host that has no block yet could get one in each of the
// network's subnets.
func blocksForAll(s *metadata.Snapshot, n metadata.Network) bool {
	for _, subnet := range n.Subnets {
		hosts := map[string]bool{}
		claimed := 0
		for _, b := range s.Blocks {
			if b.Network == n.Name && subnet.Contains(b.CIDR.Addr()) {
				hosts[b.Host] = true
				claimed++
			}
		}
		total := float64(uint64(1) << min(63, n.BlockSize(subnet)-subnet.Bits()))
		if total-float64(claimed) < float64(len(s.Hosts)-len(hosts)) {
			return false
		}
	}
	return true
}

// underlay updates this host's entry in the metadata. It records a new MTU or address of the link
// that carries the tunnels. It also records new foreign links and routes, whose addresses no
// network should use.
func (m *Manager) underlay(ctx context.Context) ([]string, error) {
	s := m.view.Load()
	if s == nil {
		return nil, errNoView
	}
	me, ok := s.Host(s.Self)
	if !ok {
		return nil, fmt.Errorf("host %s is not in the metadata", s.Self)
	}
	links, err := kernel.Underlays()
	if err != nil {
		return nil, err
	}
	now, changed := follow(me.Underlay, links, m.home)
	foreign, err := kernel.Foreign(now)
	if err != nil {
		return nil, err
	}
	if !slices.Equal(foreign, me.Foreign) {
		changed = append(changed, fmt.Sprintf("foreign routes %v are now %v", me.Foreign, foreign))
	}
	if len(changed) == 0 {
		return nil, nil
	}
	me.Underlay, me.Foreign, me.Live = now, foreign, false
	if err := m.Client.Put(ctx, metadata.KindHost, me.Name, me); err != nil {
		return nil, fmt.Errorf("tell the metadata about the underlay: %w", err)
	}
	return changed, nil
}

// follow returns the current underlay, with the MTU of each address's device. A missing address is
// replaced by the only other address of its family on the device. The gap may be due to DHCP, and
// the remaining address may be a virtual one (VRRP), which moves between machines. So an address
// that stands alone, a /32 or /128, does not replace one with a subnet. home remembers the original
// of each replacement. follow uses the original again as soon as it is back.
func follow(registered, links []metadata.Underlay, home map[netip.Addr]netip.Addr) (
	now []metadata.Underlay, changed []string) {
	at := func(a netip.Addr) int {
		return slices.IndexFunc(links, func(l metadata.Underlay) bool { return l.Address.Addr() == a })
	}
	for _, u := range registered {
		next, addr := u, u.Address.Addr()
		first, away := home[addr]
		if i := at(first); away && i >= 0 {
			next = links[i]
			delete(home, addr)
		} else if i := at(addr); i >= 0 {
			next = links[i]
		} else {
			var same []metadata.Underlay
			for _, l := range links {
				alone := l.Address.IsSingleIP() && !u.Address.IsSingleIP()
				if l.Device == u.Device && l.Address.Addr().Is4() == addr.Is4() && !alone {
					same = append(same, l)
				}
			}
			if len(same) == 1 {
				next = same[0]
				delete(home, addr)
				if !away {
					first = addr
				}
				home[next.Address.Addr()] = first
			}
		}
		if next != u {
			changed = append(changed, fmt.Sprintf("underlay %s dev %s mtu %d is now %s dev %s mtu %d", u.Address, u.Device,
				u.MTU, next.Address, next.Device, next.MTU))
		}
		now = append(now, next)
	}
	return now, changed
}

// overlaySubnets returns the subnets whose packets the host forwards.
func overlaySubnets(s *metadata.Snapshot) []netip.Prefix {
	var out []netip.Prefix
	for _, n := range s.Networks {
		if n.Encapsulation != metadata.EncapNone {
			out = append(out, n.Subnets...)
		}
	}
	slices.SortFunc(out, func(a, b netip.Prefix) int { return strings.Compare(a.String(), b.String()) })
	return out
}

// forward accepts the networks' packets where another program's FORWARD policy is to drop.
func (m *Manager) forward(context.Context) ([]string, error) {
	s := m.view.Load()
	if s == nil {
		return nil, errNoView
	}
	var underlay []netip.Addr
	if me, ok := s.Host(s.Self); ok {
		for _, u := range me.Underlay {
			underlay = append(underlay, u.Address.Addr())
		}
	}
	return iptables.AcceptForward(overlaySubnets(s), underlay)
}
