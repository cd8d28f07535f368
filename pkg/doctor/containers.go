package doctor

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/attach"
	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/journal"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// A Resident is an address of a container of this host.
type Resident struct {
	ID      metadata.AttachmentID
	Network string
	Veth    string // host end
	Address netip.Addr
	Answers bool
}

// containerFacts probes every container of this host. It also compares journal, kernel and service.
func (g Gatherer) containerFacts(ctx context.Context, f *Facts) {
	k, err := kernel.New()
	if err != nil {
		f.Unavailable["containers"], f.Unavailable["agreement"] = err.Error(), err.Error()
		return
	}
	defer k.Close()
	ports, err := k.Veths(ctx)
	if err != nil {
		f.Unavailable["containers"], f.Unavailable["agreement"] = err.Error(), err.Error()
		return
	}
	f.Residents = g.residents(ctx, ports)
	f.Disagreements, err = g.disagreements(ctx, ports, f.Metadata.Snapshot,
		cmp.Or(f.Manager.StateDir, metadata.DefaultStateDir))
	if err != nil {
		f.Disagreements, f.Unavailable["agreement"] = nil, err.Error()
	}
}

// residents probes 16 containers at once. It uses three methods, because a container may drop any
// packet.
func (g Gatherer) residents(ctx context.Context, ports []delta.VethInfo) []Resident {
	out := []Resident{}
	index := map[string]int{}
	for _, p := range ports {
		index[p.Name] = p.Index
		for dst := range p.Routes {
			if dst.IsSingleIP() {
				out = append(out, Resident{Network: p.Alias.Network, Veth: p.Name, Address: dst.Addr(),
					ID: metadata.AttachmentID{ContainerID: p.Alias.ContainerID, IfName: p.Alias.IfName}})
			}
		}
	}
	slices.SortFunc(out, func(a, b Resident) int { return a.Address.Compare(b.Address) })
	const atOnce = 16
	var wg sync.WaitGroup
	slots := make(chan struct{}, atOnce)
	for i := range out {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			r := &out[i]
			r.Answers = answersAt(ctx, r.Address, index[r.Veth], max(g.Timeout, 200*time.Millisecond))
		})
	}
	wg.Wait()
	return out
}

// answersAt reports whether an address behind a host end answers. It tries an echo, a TCP
// connection (made or refused), and a request for the MAC. No firewall inside the container blocks
// the last one.
func answersAt(ctx context.Context, a netip.Addr, index int, timeout time.Duration) bool {
	if ping(ctx, source(a), a, 1, timeout) == nil {
		return true
	}
	const discard = 9
	conn, err := (&net.Dialer{Timeout: timeout}).DialContext(ctx, "tcp", netip.AddrPortFrom(a, discard).String())
	if err == nil {
		conn.Close()
	}
	if err == nil || errors.Is(err, syscall.ECONNREFUSED) {
		return true
	}
	if a.Is6() {
		return kernel.Neighbour(index, a)
	}
	for range 2 {
		if arp(index, source(a), a, timeout) == nil {
			return true
		}
	}
	return false
}

// arp requests the MAC of an address on a link (RFC 826), and waits for the answer.
func arp(index int, from, to netip.Addr, timeout time.Duration) error {
	proto := binary.NativeEndian.Uint16([]byte{unix.ETH_P_ARP >> 8, unix.ETH_P_ARP & 0xff})
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(proto))
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	link := unix.SockaddrLinklayer{Protocol: proto, Ifindex: index, Halen: 6}
	if err := unix.Bind(fd, &link); err != nil {
		return err
	}
	deadline := time.Now().Add(timeout)
	link.Addr = [8]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	request := slices.Concat([]byte{0, 1, 8, 0, 6, 4, 0, 1}, attach.HostMAC[:], from.AsSlice(), make([]byte, 6),
		to.AsSlice())
	if err := unix.Sendto(fd, request, 0, &link); err != nil {
		return err
	}
	for buf := make([]byte, 64); ; {
		left := time.Until(deadline)
		if left <= 0 {
			return errNoEcho
		}
		tv := unix.NsecToTimeval(int64(left))
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
			return err
		}
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if n >= 28 && buf[7] == 2 && string(buf[14:18]) == string(to.AsSlice()) {
			return nil
		}
	}
}

// disagreements compares veths, the plugins' records and the service's allocations.
func (g Gatherer) disagreements(ctx context.Context, ports []delta.VethInfo, s *metadata.Snapshot,
	stateDir string) ([]string, error) {
	var held []metadata.Allocation
	for _, n := range s.Networks {
		list, err := g.Client.Allocations(ctx, n.Name, false)
		if err != nil {
			return nil, err
		}
		held = append(held, list...)
	}
	return compare(s, ports, held, stateDir)
}

// compare returns the differences between veths, the plugins' records of this boot and the
// service's allocations.
func compare(s *metadata.Snapshot, ports []delta.VethInfo, held []metadata.Allocation,
	stateDir string) ([]string, error) {
	me, _ := s.Host(s.Self)
	type key struct {
		network string
		id      metadata.AttachmentID
	}
	known, recorded, connected := map[key]string{}, map[key]journal.Record{}, map[key]bool{}
	add := func(m map[key]string, k key, a netip.Addr) {
		m[k] = strings.Join(slices.Sorted(slices.Values(append(strings.Fields(m[k]), a.String()))), " ")
	}
	dirs := map[string]bool{stateDir: true}
	for _, a := range held {
		if a.Host == s.Self && a.BootID == me.BootID {
			add(known, key{a.Network, metadata.AttachmentID{ContainerID: a.ContainerID, IfName: a.IfName}}, a.Address)
			dirs[a.StateDir] = true
		}
	}
	for dir := range dirs {
		for _, n := range s.Networks {
			records, err := journal.New(dir).List(n.Name)
			if err != nil {
				return nil, err
			}
			for _, r := range records {
				if r.BootID == me.BootID && r.State == journal.Held && !r.Terminating {
					recorded[key{n.Name, r.AttachmentID}] = r
				}
			}
		}
	}
	out := []string{}
	say := func(k key, format string, a ...any) {
		out = append(out, fmt.Sprintf("container %s/%s of network %s ", metadata.ShortID(k.id.ContainerID), k.id.IfName,
			k.network)+fmt.Sprintf(format, a...))
	}
	for _, p := range ports {
		k := key{p.Alias.Network, metadata.AttachmentID{ContainerID: p.Alias.ContainerID, IfName: p.Alias.IfName}}
		connected[k] = true
		if known[k] == "" {
			say(k, "is connected by %s, and the metadata service knows no address of it", p.Name)
		}
	}
	for k, r := range recorded {
		of := map[key]string{}
		for _, a := range r.Attachment.Addresses {
			add(of, k, a.Address)
		}
		if known[k] != "" && known[k] != of[k] {
			say(k, "has %s in the plugin's record, and %s in the metadata service", of[k], known[k])
		}
		if !connected[k] && r.Attachment.Device != "" && r.Type != "lariat-ipam" {
			say(k, "holds %s by the plugin's record, and has no port", of[k])
		}
	}
	for k := range known {
		if _, ok := recorded[k]; !ok {
			say(k, "holds %s in the metadata service, and no plugin has a record of it", known[k])
		}
	}
	slices.Sort(out)
	return out, nil
}

func (e *checkContext) containers() {
	if !e.needs("containers", e.Residents != nil) {
		return
	}
	const remedy = "look inside: is the interface up, and has it the address? lariat ip show ADDRESS tells whose it " +
		"is; its runtime makes the interface anew when it restarts the container"
	silent := slices.DeleteFunc(slices.Clone(e.Residents), func(r Resident) bool { return r.Answers })
	if len(silent) > oneFindingFor {
		e.add(Error, "port "+silent[0].Veth, remedy, "%d of %d addresses of containers of this host do not answer, the "+
			"first is %s",
			len(silent), len(e.Residents), silent[0].Address)
		return
	}
	for _, r := range silent {
		e.add(Error, "port "+r.Veth, remedy, "container %s does not answer at its address %s: no echo, no connection, no MAC",
			metadata.ShortID(r.ID.ContainerID), r.Address)
	}
}

func (e *checkContext) agreement() {
	if !e.needs("agreement", e.Disagreements != nil) {
		return
	}
	const remedy = "the network manager brings them together: is it running? lariat ip show ADDRESS tells who has an " +
		"address; a DEL of the container, or its runtime's GC, ends what is left over"
	list := e.Disagreements
	if len(list) > oneFindingFor {
		e.add(Error, "host "+e.Self, remedy, "journal, kernel and metadata service differ in %d containers, the first: %s",
			len(list), list[0])
		return
	}
	for _, d := range list {
		e.add(Error, "host "+e.Self, remedy, "%s", d)
	}
}

// NotLookedAt lists the areas that no check covers. It is shown when nothing was found.
const NotLookedAt = "what containers themselves do with packets (their firewalls, their services), other hosts' " +
	"containers and firewalls " +
	"(run lariat doctor there), ways from containers to the outside, names, and volumes"
