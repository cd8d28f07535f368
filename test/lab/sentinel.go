package lab

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/metadata"
)

// Sentinel listens where packets of a cluster's networks must never come: on a machine of the underlay that
// is no host, and in containers, for what belongs to another network. Tests run beside it; what it heard is
// asked at the end.
type Sentinel struct {
	Neighbour Netns
	cluster   *Cluster
	mu        sync.Mutex
	networks  map[string][]netip.Prefix
	leaks     map[string]int
	wires     []*Wire
}

// NewSentinel puts a machine with a name and an address on the underlay that is no host, and listens there.
func NewSentinel(ctx context.Context, c *Cluster, name string, addr netip.Addr) (*Sentinel, error) {
	s := &Sentinel{cluster: c, leaks: map[string]int{}}
	var err error
	if s.Neighbour, err = c.NewNeighbour(name, netip.PrefixFrom(addr, c.Hosts[0].Addr.Bits())); err != nil {
		return nil, err
	}
	if err := s.Refresh(ctx); err != nil {
		return nil, err
	}
	wire, err := s.Neighbour.Listen("eth0", func(p Packet) string {
		if p.Way != unix.PACKET_OTHERHOST { // what a switch floods is not sent to it
			s.judge("the unlisted neighbour", "", p)
		}
		return ""
	})
	if err == nil {
		s.wires = append(s.wires, wire)
	}
	return s, err
}

// Refresh learns the networks of now.
func (s *Sentinel) Refresh(ctx context.Context) error {
	v, err := s.cluster.Hosts[0].Client().View(ctx)
	if err != nil {
		return err
	}
	networks := map[string][]netip.Prefix{}
	for _, n := range v.Networks {
		if n.Encapsulation != metadata.EncapNone {
			networks[n.Name] = n.Subnets
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.networks = networks
	return nil
}

// Watch listens on a device of a network's container, until stop is called. The container's namespace lives so long.
func (s *Sentinel) Watch(ctx context.Context, c *Container, dev, network string) (stop func(), err error) {
	if err := s.Refresh(ctx); err != nil {
		return nil, err
	}
	wire, err := c.Listen(dev, func(p Packet) string { s.judge(c.Name+" of "+network, network, p); return "" })
	if err != nil {
		return nil, err
	}
	return wire.Close, nil
}

// judge notes a packet that came to who, a container of the network or nobody's.
func (s *Sentinel) judge(who, network string, p Packet) {
	if p.Way == unix.PACKET_OUTGOING {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	what := s.foreign(network, p)
	if vni, inner, ok := p.Inner(); ok && what == "" {
		if what = s.foreign("", inner); what != "" { // the own network's are no better: they are not for containers
			what = fmt.Sprintf("a tunnel datagram of VNI %d from %s with %s", vni, p.Src, what)
		}
	}
	if what == "" && p.Proto == unix.IPPROTO_ESP {
		what = fmt.Sprintf("an ESP packet from %s", p.Src)
	}
	if what != "" {
		s.leaks[who+" received "+what]++
	}
}

// foreign describes a packet that has an address of another network; empty of any other packet.
func (s *Sentinel) foreign(own string, p Packet) string {
	for name, subnets := range s.networks {
		if name == own {
			continue
		}
		for _, subnet := range subnets {
			if p.Src.IsValid() && (subnet.Contains(p.Src) || subnet.Contains(p.Dst)) {
				return fmt.Sprintf("a packet of network %s: %s to %s, protocol %d", name, p.Src, p.Dst, p.Proto)
			}
		}
	}
	return ""
}

// Leaks returns an error that names all packets that came where they must not, so far.
func (s *Sentinel) Leaks() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var lines []string
	for _, what := range slices.Sorted(maps.Keys(s.leaks)) {
		lines = append(lines, fmt.Sprintf("%s (%d)", what, s.leaks[what]))
	}
	if len(lines) == 0 {
		return nil
	}
	return fmt.Errorf("%d kinds of packets came where they must not:\n%s", len(lines),
		strings.Join(lines[:min(len(lines), 30)], "\n"))
}

// Close ends the listening on the underlay, and returns what Leaks does.
func (s *Sentinel) Close() error {
	for _, w := range s.wires {
		w.Close()
	}
	return errors.Join(s.Leaks(), s.Neighbour.Remove())
}
