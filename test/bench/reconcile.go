package main

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
)

// peersOf makes up a cluster: hosts on one large underlay, a block for each.
func peersOf(n int) []peer {
	out := make([]peer, n)
	for i := range out {
		u := netip.AddrFrom4([4]byte{172, 16 + byte((i+2)>>16), byte((i + 2) >> 8), byte(i + 2)})
		a := u.As4()
		out[i] = peer{Underlay: u, MAC: [6]byte{0x0e, 0, a[0], a[1], a[2], a[3]},
			Block: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 64 + byte((i+1)>>10), byte((i + 1) >> 2), byte((i + 1) << 6)}), 26)}
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
		ours := b.newReconciler(scenario)
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
	host, err := newNamespace(b.nsdir, fmt.Sprintf("r%d", b.hosts))
	if err != nil {
		return nil, err
	}
	b.cleanup(func() { host.Remove() })
	other, err := newNamespace(b.nsdir, host.Name+"w")
	if err != nil {
		return nil, err
	}
	b.cleanup(func() { other.Remove() })
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
		vtep := &netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: "vtep1042", MTU: 1450}, VxlanId: 1042, Port: 4789, SrcAddr: []byte{172, 16, 0, 1}}
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
