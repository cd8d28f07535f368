package main

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/plan"
)

// peersOf makes up a cluster: hosts on one large underlay, a block for each.
func peersOf(n int) []peer {
	out := make([]peer, n)
	for i := range out {
		u := netip.AddrFrom4([4]byte{172, 16 + byte((i+2)>>16), byte((i + 2) >> 8), byte(i + 2)})
		a := u.As4()
		out[i] = peer{Underlay: u, MAC: [6]byte{0x0e, 0, a[0], a[1], a[2], a[3]},
			Block: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 64 + byte((i+1)>>10), byte((i + 1) >> 2), byte((i + 1) << 6)}),
				26)}
	}
	return out
}

// reconciles measures how long the kernel takes to become what the plan says, and to be found so.
func (b *bench) reconciles() error {
	sizes, rounds := []int{1000, 10000}, b.opt.rounds
	if b.opt.quick {
		sizes, rounds = []int{100}, 1
	}
	for _, n := range sizes {
		if err := b.ctx.Err(); err != nil {
			return err
		}
		b.logf("reconcile: %d peers, %d rounds", n, rounds)
		scenario := fmt.Sprintf("%d peers", n)
		ours := newReconciler(scenario)
		least := &series{Section: "reconcile", Scenario: scenario, Who: "batched floor", Op: "from nothing", Unit: "ms"}
		for range rounds {
			if err := b.scope(func() error { return b.floorOnce(peersOf(n), least) }); err != nil {
				return err
			}
			if err := b.scope(func() error { return b.reconcileOnce(peersOf(n), ours) }); err != nil {
				return err
			}
		}
		b.rep.add(append(ours.all(), least)...)
	}
	return nil
}

// host makes a namespace with an underlay device that holds the first address of the made-up cluster.
func (b *bench) underlay() (*namespace, error) {
	b.hosts++
	host, err := newNamespace(fmt.Sprintf("r%d", b.hosts))
	if err != nil {
		return nil, err
	}
	b.cleanup(func() { host.Remove() })
	other, err := newNamespace(host.Name + "w")
	if err != nil {
		return nil, err
	}
	b.cleanup(func() { other.Remove() })
	// A namespace that goes takes its routes along in the background, under the lock that the next round needs. So the
	// device goes first, which waits.
	b.cleanup(func() {
		host.Do(func() error { return netlink.LinkDel(&netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: "vtep1042"}}) })
	})
	return host, wire(host, other, "up0", "up1", "172.16.0.1/12", "172.31.255.254/12")
}

// floorOnce programs the peers with nothing but batched netlink messages.
func (b *bench) floorOnce(peers []peer, s *series) error {
	host, err := b.underlay()
	if err != nil {
		return err
	}
	return host.Do(func() error {
		start := time.Now()
		vtep := &netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: "vtep1042", MTU: 1450}, VxlanId: 1042, Port: 4789,
			SrcAddr: []byte{172, 16, 0, 1}}
		if err := netlink.LinkAdd(vtep); err != nil {
			return fmt.Errorf("vxlan device: %w", err)
		}
		if err := netlink.AddrAdd(vtep, &netlink.Addr{IPNet: ipNet([]byte{10, 64, 0, 1}, 32)}); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(vtep); err != nil {
			return err
		}
		nl, err := newBatcher()
		if err != nil {
			return err
		}
		defer nl.Close()
		if err := nl.program(vtep.Index, peers); err != nil {
			return fmt.Errorf("batched floor: %w", err)
		}
		s.addTime(time.Since(start))
		return nil
	})
}

// reconciler holds what is measured of ours in one scenario.
type reconciler struct {
	plan, nothing, settled, writes *series
}

func newReconciler(scenario string) *reconciler {
	s := func(op, unit string) *series {
		return &series{Section: "reconcile", Scenario: scenario, Who: oursName, Op: op, Unit: unit}
	}
	return &reconciler{s("plan", "ms"), s("from nothing", "ms"), s("settled", "ms"), s("writes when settled", "")}
}

func (r *reconciler) all() []*series {
	return []*series{r.plan, r.nothing, r.settled, r.writes}
}

// reconcileOnce plans the cluster and makes an empty kernel so; then again, when there is nothing to do.
func (b *bench) reconcileOnce(peers []peer, r *reconciler) error {
	host, err := b.underlay()
	if err != nil {
		return err
	}
	snap := snapshotOf(peers)
	start := time.Now()
	want := plan.Desired(snap, "self", false)
	r.plan.addTime(time.Since(start))
	if len(want.Problems) > 0 {
		return fmt.Errorf("plan: %s", want.Problems[0])
	}
	k, err := kernel.NewAt(host.Path)
	if err != nil {
		return err
	}
	defer k.Close()
	start = time.Now()
	d, err := kernel.Reconcile(b.ctx, k, want)
	if err != nil {
		return fmt.Errorf("from nothing: %w", err)
	}
	r.nothing.addTime(time.Since(start))
	if d.Len() < 4*len(peers) {
		return fmt.Errorf("from nothing: %d changes for %d peers", d.Len(), len(peers))
	}
	for range 5 {
		start = time.Now()
		d, err := kernel.Reconcile(b.ctx, k, want)
		if err != nil {
			return fmt.Errorf("settled: %w", err)
		}
		r.settled.addTime(time.Since(start))
		r.writes.add(float64(d.Len()))
	}
	return nil
}

// snapshotOf is the cluster of the peers as metadata tells it to host self.
func snapshotOf(peers []peer) *metadata.Snapshot {
	s := &metadata.Snapshot{Revision: 1, Self: "self", Networks: []metadata.Network{{
		Name: networkName, Subnets: []netip.Prefix{netip.MustParsePrefix("10.64.0.0/12")}, Encapsulation: metadata.EncapVXLAN,
		VNI: metadata.DefaultVNI, HostNAT: true,
	}}}
	add := func(name string, underlay netip.Addr, mac [6]byte, block netip.Prefix) {
		s.Hosts = append(s.Hosts, metadata.Host{Name: name, MAC: mac, Live: true,
			Underlay: []metadata.Underlay{{Address: netip.PrefixFrom(underlay, 12), Device: "up0", MTU: 1500}}})
		s.Blocks = append(s.Blocks, metadata.Block{Network: networkName, CIDR: block, Host: name,
			Gateway: block.Addr().Next()})
	}
	add("self", netip.MustParseAddr("172.16.0.1"), [6]byte{0x0e, 0, 172, 16, 0, 1}, netip.MustParsePrefix("10.64.0.0/26"))
	for i, p := range peers {
		add(fmt.Sprintf("peer%05d", i), p.Underlay, p.MAC, p.Block)
	}
	return s
}
