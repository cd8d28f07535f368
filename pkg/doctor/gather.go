package doctor

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/doctor/echo"
	"github.com/lariat-net/lariat/pkg/kernel/iptables"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/unixhttp"
)

// Gatherer collects facts. It changes no configuration on this host or elsewhere.
type Gatherer struct {
	Client        metadata.Client
	ManagerSocket string

	// Want plans this host. Observe reads the kernel. When one is nil or fails, devices are not
	// checked.
	Want    func(*metadata.Snapshot, string) *delta.State
	Observe func(context.Context, *delta.State) (*delta.State, error)

	// EndpointFaults compares endpoints with the plugins' journals, and returns their faults. With
	// nil they are not checked.
	EndpointFaults func(context.Context, *metadata.Snapshot) ([]delta.EndpointFault, error)

	// Living lists the addresses of running containers, according to the journals in these state
	// directories. With nil they are not checked.
	Living func(stateDirs []string) ([]metadata.Allocation, error)

	// Features tests the kernel for the features that the model needs. The snapshot is nil when it
	// is not known.
	Features func(*metadata.Snapshot) ([]Feature, error)

	SecretFile string // empty: ipsec.DefaultSecretFile

	Probe    bool          // the other hosts
	EchoPort uint16        // 0: echo.Port
	Timeout  time.Duration // for one answer of another host; 0: 400 ms
}

// MetadataFacts asks only the metadata service, as "lariat status" needs.
func (g Gatherer) MetadataFacts(ctx context.Context, f *Facts) {
	socket := cmp.Or(g.Client.Socket, metadata.DefaultSocket)
	f.Metadata = &Metadata{Socket: socket}
	snap, err := g.Client.Snapshot(ctx)
	if err != nil {
		f.Metadata.Err = err
		for _, group := range []string{"metadata", "store", "usage", "peers"} {
			f.Unavailable[group] = "the metadata service did not answer"
		}
		f.Unavailable["devices"] = "the metadata service did not answer"
		return
	}
	f.Metadata.Snapshot, f.Self = snap, snap.Self
	f.Metadata.Status = []metadata.NetworkStatus{}
	for _, n := range snap.Networks {
		st, err := g.Client.Status(ctx, n.Name)
		if err != nil {
			f.Metadata.Status, f.Unavailable["usage"] = nil, fmt.Sprintf("status of network %s: %v", n.Name, err)
			break
		}
		f.Metadata.Status = append(f.Metadata.Status, *st)
	}
	f.Metadata.Problems, err = g.Client.Problems(ctx)
	if err != nil {
		f.Metadata.Problems = nil
		if !metadata.IsCode(err, metadata.CodeNotFound) { // an older service does not have this request
			f.Unavailable["entries"] = err.Error()
		}
	}
	f.Metadata.Store, err = storeFacts(ctx, socket)
	if err != nil {
		f.Unavailable["store"] = err.Error()
	}
}

// ManagerFacts asks this host's network manager.
func (g Gatherer) ManagerFacts(ctx context.Context, f *Facts) {
	f.Manager = &Manager{Socket: g.ManagerSocket}
	var state struct {
		Health   []Concern `json:"health"`
		StateDir string    `json:"stateDir"`
	}
	if _, f.Manager.Err = getUnix(ctx, g.ManagerSocket, "/v1/state",
		func(b []byte) error { return json.Unmarshal(b, &state) }); f.Manager.Err == nil {
		f.Manager.Concerns, f.Manager.StateDir = state.Health, state.StateDir
		g.tunnelFacts(ctx, f)
	}
}

// journalFacts compares the plugins' state directories with the network manager's.
func (g Gatherer) journalFacts(ctx context.Context, f *Facts) {
	switch {
	case f.Metadata.Snapshot == nil:
		f.Unavailable["journal"] = "the metadata service did not answer"
		return
	case f.Manager.Err != nil:
		f.Unavailable["journal"] = "the network manager did not answer"
		return
	case f.Manager.StateDir == "":
		f.Unavailable["journal"] = "the network manager is older than this program: update and restart it"
		return
	}
	own := []metadata.Allocation{}
	for _, n := range f.Metadata.Snapshot.Networks {
		list, err := g.Client.Allocations(ctx, n.Name, false)
		if err != nil {
			f.Unavailable["journal"] = fmt.Sprintf("addresses of network %s: %v", n.Name, err)
			return
		}
		own = append(own, list...)
	}
	f.Own = own
	if g.Living == nil {
		f.Unavailable["attachments"] = "this build cannot read the plugins' journal"
		return
	}
	dirs := []string{f.Manager.StateDir}
	for _, a := range own {
		if !slices.Contains(dirs, a.StateDir) {
			dirs = append(dirs, a.StateDir)
		}
	}
	var err error
	if f.Living, err = g.Living(dirs); err != nil {
		f.Living, f.Unavailable["attachments"] = nil, err.Error()
	}
}

// Gather collects everything.
func (g Gatherer) Gather(ctx context.Context) *Facts {
	f := &Facts{Unavailable: map[string]string{}}
	g.MetadataFacts(ctx, f)
	g.ManagerFacts(ctx, f)
	g.journalFacts(ctx, f)
	if g.Features != nil {
		var err error
		if f.Features, err = g.Features(f.Metadata.Snapshot); err != nil {
			f.Unavailable["features"] = err.Error()
		}
	}
	g.secretFacts(f)
	g.kernelFacts(ctx, f)
	switch {
	case f.Metadata.Snapshot == nil:
		f.Unavailable["containers"], f.Unavailable["agreement"] = f.Unavailable["metadata"], f.Unavailable["metadata"]
	case !g.Probe:
		f.Unavailable["containers"], f.Unavailable["agreement"] = "containers were not asked (--no-probe)",
			"containers were not asked (--no-probe)"
	case os.Geteuid() != 0:
		f.Unavailable["containers"], f.Unavailable["agreement"] = "only root may ask containers",
			"only root may read the plugins' records"
	default:
		g.containerFacts(ctx, f)
	}
	switch {
	case !g.Probe:
		f.Unavailable["peers"] = "other hosts were not probed (--no-probe)"
	case f.Metadata.Snapshot != nil:
		f.Peers = g.peers(ctx, f.Metadata.Snapshot)
		if f.Manager.Tunnels != nil {
			// Ask again: to an idle host, the probes were the first packets that needed a tunnel.
			g.tunnelFacts(ctx, f)
		}
		if os.Geteuid() != 0 {
			f.Unavailable["tunnel"] = "only root may ping through the tunnels"
		}
	}
	return f
}

func (g Gatherer) kernelFacts(ctx context.Context, f *Facts) {
	k := &Kernel{Sysctls: map[string]string{}, Links: map[string]Link{}}
	keys := []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding", "net/ipv4/conf/all/rp_filter"}
	if s := f.Metadata.Snapshot; s != nil && len(encrypted(s)) > 0 {
		keys = append(keys, switches()...)
	}
	for _, key := range keys {
		if b, err := os.ReadFile(filepath.Join("/proc/sys", key)); err == nil {
			k.Sysctls[key] = string(bytes.TrimSpace(b))
		}
	}
	ifaces, err := net.Interfaces()
	if err != nil {
		f.Unavailable["kernel"] = err.Error()
		return
	}
	f.Kernel = k
	for _, i := range ifaces {
		l := Link{MTU: i.MTU, Up: i.Flags&net.FlagUp != 0}
		addrs, err := i.Addrs()
		if err != nil {
			continue // removed meanwhile
		}
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil {
				l.Addrs = append(l.Addrs, p)
			}
		}
		k.Links[i.Name] = l
	}
	var subnets []netip.Prefix
	if f.Metadata.Snapshot != nil {
		for _, n := range f.Metadata.Snapshot.Networks {
			subnets = append(subnets, n.Subnets...)
		}
	}
	if k.Forward, err = forwardChains(ctx, subnets); err != nil {
		f.Unavailable["forward"] = err.Error()
	}
	if f.Metadata.Snapshot == nil {
		return
	}
	switch {
	case !g.Probe:
		f.Unavailable["passages"] = "no packet was sent (--no-probe)"
	case os.Geteuid() != 0:
		f.Unavailable["passages"] = "only root may send a packet from port to port"
	default:
		var why string
		if k.Passages, why = g.passages(ctx, f.Metadata.Snapshot); why != "" {
			f.Unavailable["passages"] = why
		}
	}
	if g.EndpointFaults == nil {
		f.Unavailable["ports"] = "this build cannot observe the kernel"
	} else if k.Endpoints, err = g.EndpointFaults(ctx, f.Metadata.Snapshot); err != nil {
		f.Unavailable["ports"] = err.Error()
	}
	if g.Want == nil || g.Observe == nil {
		f.Unavailable["devices"] = "this build cannot observe the kernel"
		return
	}
	want := g.Want(f.Metadata.Snapshot, f.Self)
	have, err := g.Observe(ctx, want)
	if err != nil {
		f.Unavailable["devices"] = err.Error()
		return
	}
	text := func(links map[string]delta.Link, name string) string {
		l, ok := links[name]
		if !ok {
			return ""
		}
		_, rest, _ := strings.Cut(delta.LinkString(name, l), name+" ")
		return rest
	}
	names := slices.Collect(maps.Keys(want.Links))
	names = slices.AppendSeq(names, maps.Keys(have.Links))
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		k.Devices = append(k.Devices, Device{Name: name, Want: text(want.Links, name), Have: text(have.Links, name)})
	}
	k.Chains = chains(want, have)
}

// forwardChains lists the chains that drop forwarded packets by policy. It covers nftables' own
// chains, chains that iptables makes in nftables, and chains of the older iptables.
func forwardChains(ctx context.Context, subnets []netip.Prefix) ([]ForwardChain, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("read nftables: %w", err)
	}
	chains, err := c.ListChains()
	if err != nil {
		return nil, fmt.Errorf("read nftables: %w", err)
	}
	var out []ForwardChain
	for _, ch := range chains {
		if ch.Hooknum == nil || *ch.Hooknum != *nftables.ChainHookForward || ch.Policy == nil ||
			*ch.Policy != nftables.ChainPolicyDrop {
			continue
		}
		fc := ForwardChain{V6: ch.Table.Family == nftables.TableFamilyIPv6, Both: ch.Table.Family == nftables.TableFamilyINet}
		switch {
		case ch.Table.Family != nftables.TableFamilyIPv4 && ch.Table.Family != nftables.TableFamilyIPv6 &&
			ch.Table.Family != nftables.TableFamilyINet:
			continue // a bridge's chain: containers use no bridge
		case ch.Name == "FORWARD" && ch.Table.Name == "filter":
			fc.Name = map[bool]string{false: "iptables", true: "ip6tables"}[fc.V6] + " filter FORWARD"
		default:
			family := map[nftables.TableFamily]string{nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6",
				nftables.TableFamilyINet: "inet"}
			fc.Name = fmt.Sprintf("nft chain %s %s %s", family[ch.Table.Family], ch.Table.Name, ch.Name)
		}
		for _, other := range chains {
			if fc.Passes || other.Table.Name != ch.Table.Name || other.Table.Family != ch.Table.Family {
				continue
			}
			rules, err := c.GetRules(other.Table, other)
			if err != nil {
				return nil, fmt.Errorf("read nftables: chain %s: %w", other.Name, err)
			}
			fc.Passes = slices.ContainsFunc(rules, func(r *nftables.Rule) bool { return accepts(r, subnets) })
		}
		out = append(out, fc)
	}
	legacy, err := legacyChains(ctx)
	return append(out, legacy...), err
}

// accepts reports whether a rule accepts our packets. Such a rule jumps to our chain, or accepts
// and names one of our interfaces or subnets. accepts does not understand rules that accept
// everything from elsewhere, and does not read sets.
func accepts(r *nftables.Rule, subnets []netip.Prefix) bool {
	ours, accept := false, false
	for _, e := range r.Exprs {
		switch v := e.(type) {
		case *expr.Verdict:
			if v.Chain == iptables.ForwardChain {
				return true
			}
			accept = accept || v.Kind == expr.VerdictAccept
		case *expr.Cmp:
			ours = ours || bytes.HasPrefix(v.Data, []byte(delta.VethPrefix)) || bytes.HasPrefix(v.Data, []byte("vtep")) ||
				bytes.HasPrefix(v.Data, []byte(delta.TunnelPrefix))
			for _, s := range subnets {
				a := s.Addr().AsSlice()
				ours = ours || len(v.Data) <= len(a) && len(v.Data)*8 >= s.Bits() && bytes.Equal(v.Data, a[:len(v.Data)])
			}
		}
	}
	return ours && accept
}

func legacyChains(ctx context.Context) (out []ForwardChain, err error) {
	for _, f := range []struct {
		names, command, show string
		v6                   bool
	}{{"/proc/net/ip_tables_names", "iptables-legacy", "iptables", false},
		{"/proc/net/ip6_tables_names", "ip6tables-legacy", "ip6tables", true}} {
		b, rerr := os.ReadFile(f.names)
		if rerr != nil || !slices.Contains(strings.Fields(string(b)), "filter") {
			continue // the older iptables is not in use
		}
		rules, cerr := exec.CommandContext(ctx, f.command, "-w", "5", "-S", "FORWARD").Output()
		if cerr != nil {
			err = fmt.Errorf("the older iptables is in use, and its rules cannot be read: %w", cerr)
			continue
		}
		if lines := strings.Split(string(rules), "\n"); slices.Contains(lines, "-P FORWARD DROP") {
			out = append(out, ForwardChain{Name: f.show + " (legacy) filter FORWARD", V6: f.v6,
				Passes: slices.Contains(lines, "-A FORWARD -j "+iptables.ForwardChain)})
		}
	}
	return out, err
}

// peers probes every other live host. A dead host is already a finding.
func (g Gatherer) peers(ctx context.Context, s *metadata.Snapshot) []Peer {
	me, ok := s.Host(s.Self)
	out := []Peer{}
	if !ok || !me.UnderlayAddr().IsValid() {
		return out
	}
	gateways := s.AllGateways()
	for _, h := range s.Hosts {
		i := slices.IndexFunc(h.Underlay,
			func(u metadata.Underlay) bool { return u.Address.Addr().Is4() == me.UnderlayAddr().Is4() })
		if h.Name == s.Self || !h.Live || i < 0 {
			continue
		}
		p := Peer{Host: h.Name, Addr: h.Underlay[i].Address.Addr()}
		for _, n := range s.Networks {
			port := n.UDPPort()
			switch {
			case n.Encapsulation == metadata.EncapIPsec:
				port = 0
			case n.Encapsulation != metadata.EncapVXLAN || n.DirectRouting && me.Underlay[0].Address.Masked().Contains(p.Addr):
				continue
			}
			own, other := gateways[me.Name][n.Name], gateways[h.Name][n.Name]
			if len(other) > 0 {
				p.WantMTU = max(p.WantMTU, outer(n, me))
			}
			for _, a := range own {
				if j := slices.IndexFunc(other, func(b netip.Addr) bool { return a.Is4() == b.Is4() }); j >= 0 {
					p.Overlay = append(p.Overlay, Overlay{Network: n.Name, Port: port, Gateway: other[j], Ours: a})
					break
				}
			}
		}
		out = append(out, p)
	}
	// A host answers this many probes at once without dropping any.
	const atOnce = 16
	var wg sync.WaitGroup
	slots := make(chan struct{}, atOnce)
	for i := range out {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			g.probe(ctx, me.UnderlayAddr(), &out[i])
		})
	}
	wg.Wait()
	return out
}

func (g Gatherer) probe(ctx context.Context, local netip.Addr, p *Peer) {
	timeout := cmp.Or(g.Timeout, 400*time.Millisecond)
	if os.Geteuid() != 0 {
		p.Overlay = nil // only root may use raw sockets; Gather has recorded it
	}
	for i := range p.Overlay {
		o := &p.Overlay[i]
		o.Source = source(o.Gateway)
		o.Err = ping(ctx, o.Ours, o.Gateway, 3, timeout)
	}
	prober := echo.Prober{Local: local, Peer: netip.AddrPortFrom(p.Addr, cmp.Or(g.EchoPort, echo.Port)), Timeout: timeout}
	a, err := prober.Ask(ctx, echo.MinSize, false)
	if p.Echo = err; err != nil {
		return
	}
	p.RTT, p.Skew = a.RTT, a.Skew
	if p.WantMTU > 0 {
		p.MTU, p.MTUErr = prober.PathMTU(ctx, p.WantMTU)
	}
}

// source returns the kernel's source address for packets to a. It sends nothing.
func source(a netip.Addr) netip.Addr {
	c, err := net.Dial("udp", netip.AddrPortFrom(a, 9).String())
	if err != nil {
		return netip.Addr{}
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap()
}

// getUnix reads one page from a helper's unix socket.
func getUnix(ctx context.Context, socket, path string, parse func([]byte) error) (status int, err error) {
	if socket == "" {
		return 0, fmt.Errorf("no socket given: %w", fs.ErrNotExist)
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	status, b, err := unixhttp.Page(ctx, socket, "GET", path, nil)
	if err != nil {
		return status, err
	}
	return status, parse(b)
}

// storeFacts reads the store's health and size from the metadata service's own pages.
func storeFacts(ctx context.Context, socket string) (*Store, error) {
	s := &Store{}
	status, err := getUnix(ctx, socket, "/readyz",
		func(b []byte) error { s.Reason = strings.TrimSpace(string(b)); return nil })
	if err != nil {
		return nil, fmt.Errorf("readiness of the metadata service: %w", err)
	}
	if status == http.StatusOK {
		s.Reason = ""
	} else if s.Reason == "" {
		s.Reason = fmt.Sprintf("/readyz answers %d", status)
	}
	_, err = getUnix(ctx, socket, "/metrics", func(b []byte) error {
		for line := range strings.SplitSeq(string(b), "\n") {
			name, value, _ := strings.Cut(line, " ")
			v, err := strconv.ParseFloat(value, 64)
			if err != nil {
				continue
			}
			switch name {
			case "lariat_store_size_bytes":
				s.Size = int64(v)
			case "lariat_store_quota_bytes":
				s.Quota = int64(v)
			}
		}
		return nil
	})
	if err != nil {
		return s, nil // the size stays unknown, but the health is known
	}
	return s, nil
}
