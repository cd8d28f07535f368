package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/lariat-net/lariat/pkg/doctor/echo"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/mtu"
)

// Bounds for findings.
const (
	skewWarning   = 2 * time.Second
	skewError     = time.Minute // new certificates are refused, logs cannot be put in order
	usageWarning  = 0.90
	storeWarning  = 0.80
	storeError    = 0.95 // at 1 the store refuses every write
	oneFindingFor = 5    // maximum number of peers that are named one by one
)

var checks = []struct {
	name, good string
	run        func(*checkContext)
}{
	{"metadata", "the metadata service answers", (*checkContext).metadata},
	{"store", "the store is healthy and has room", (*checkContext).store},
	{"entries", "every entry of the store that was read can be used", (*checkContext).entries},
	{"manager", "the network manager runs, and all that it keeps is true", (*checkContext).manager},
	{"journal", "the network manager looks where the plugins keep their records", (*checkContext).journal},
	{"attachments", "the metadata service knows every address that a container of this host has",
		(*checkContext).attachments},
	{"hosts", "all hosts are live", (*checkContext).hosts},
	{"duplicates", "no two hosts share an identity, an address or a MAC", (*checkContext).duplicates},
	{"networks", "networks are well defined and do not overlap", (*checkContext).networks},
	{"addresses", "networks have addresses left", (*checkContext).addresses},
	{"features", "the kernel can do all that is needed", (*checkContext).features},
	{"forwarding", "the host forwards packets", (*checkContext).forwarding},
	{"rp-filter", "the reverse path check is not loosened", (*checkContext).rpFilter},
	{"forward-policy", "no firewall stops the networks' packets from port to port", (*checkContext).forwardPolicy},
	{"underlay", "the underlay is as the metadata says, and large enough", (*checkContext).underlay},
	{"devices", "tunnel devices are as they should be", (*checkContext).devices},
	{"ports", "the ports of containers refuse forged sources and router advertisements", (*checkContext).ports},
	{"containers", "every container of this host answers", (*checkContext).containers},
	{"agreement", "journal, kernel and metadata service agree about this host's containers", (*checkContext).agreement},
	{"ipsec", "encrypted networks, where there are any, have their daemon and their tunnels", (*checkContext).ipsec},
	{"secret", "hosts of encrypted networks share their secret, and nobody else can read it", (*checkContext).secret},
	{"rules", "containers, networks and the underlay are kept apart", (*checkContext).rules},
	{"fail-closed", "nothing of an encrypted network can travel in clear", (*checkContext).failClosed},
	{"reach", "every live host answers over the underlay", (*checkContext).reach},
	{"tunnel", "every live host answers through the tunnels", (*checkContext).tunnel},
	{"mtu", "full packets reach every live host", (*checkContext).pathMTU},
	{"clock", "clocks agree", (*checkContext).clock},
}

func (e *checkContext) metadata() {
	if !e.needs("metadata", e.Metadata != nil) || e.Metadata.Err == nil {
		return
	}
	what, remedy := Unreachable(e.Metadata.Err, e.Metadata.Socket)
	e.add(Error, e.Metadata.Socket, remedy, "%s", what)
}

// Unreachable returns the reason why the metadata service did not answer, and a remedy.
func Unreachable(err error, socket string) (what, remedy string) {
	start := "start it: systemctl start lariat-metadata; if it ends at once: journalctl -u lariat-metadata"
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Sprintf("the metadata service is not running: there is no socket %s", socket), start +
			". When it listens elsewhere, give --socket"
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Sprintf("the metadata service has died: nobody answers on its socket %s", socket), start
	case errors.Is(err, fs.ErrPermission):
		return fmt.Sprintf("the metadata service's socket %s is not open to this user", socket), "run this as root"
	case errors.Is(err, syscall.ENOTSOCK):
		return fmt.Sprintf("%s is not a socket", socket),
			"remove the file and restart lariat-metadata, or give the right --socket"
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Sprintf("the metadata service on %s does not answer in time", socket),
			"look at journalctl -u lariat-metadata; a store that lost its majority answers nobody"
	case metadata.IsCode(err, metadata.CodeUnavailable):
		return fmt.Sprintf("the metadata service has no store: %v", err), storeRemedy
	}
	return fmt.Sprintf("the metadata service gave no proper answer: %v", err), "look at journalctl -u lariat-metadata"
}

// storeRemedy is the remedy when the store does not answer, or refuses.
const storeRemedy = "on the store's host: systemctl status lariat-metadata; with external etcd: etcdctl endpoint " +
	"health; here: journalctl -u lariat-metadata"

func (e *checkContext) store() {
	if e.Metadata == nil || e.Metadata.Err != nil || e.Metadata.Store == nil {
		e.needs("store", false)
		return
	}
	s := e.Metadata.Store
	if s.Reason != "" {
		e.add(Error, e.Metadata.Socket, storeRemedy, "the store is not healthy: %s", s.Reason)
	}
	if s.Quota <= 0 {
		return
	}
	used := float64(s.Size) / float64(s.Quota)
	remedy := "defragment it (etcdctl defrag), look for what fills it, or restart lariat-metadata with a larger quota"
	switch {
	case used >= storeError:
		e.add(Error, e.Metadata.Socket, remedy, "the store is %.0f %% full (%s of %s); when it is full it takes no write",
			used*100, size(s.Size), size(s.Quota))
	case used >= storeWarning:
		e.add(Warning, e.Metadata.Socket, remedy, "the store is %.0f %% full (%s of %s)", used*100, size(s.Size),
			size(s.Quota))
	}
}

func (e *checkContext) entries() {
	if !e.needsSnapshot() {
		return
	}
	if why := e.Unavailable["entries"]; why != "" {
		e.skip("%s", why)
	}
	told := map[string]bool{}
	for _, p := range slices.Concat(e.Metadata.Problems, e.Metadata.Snapshot.Problems) {
		if !told[p.Key] {
			told[p.Key] = true
			e.add(Error, "entry "+p.Name(), p.Remedy(), "%s", p)
		}
	}
}

func size(n int64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.0f MiB", float64(n)/(1<<20))
	}
	return fmt.Sprintf("%d KiB", n>>10)
}

const startManager = "start it: systemctl start lariat-network-manager. Until then running containers keep their " +
	"network, but nothing follows changes"

// ManagerUnreachable returns the reason why the network manager did not answer, and a remedy.
func ManagerUnreachable(err error, socket string) (what, remedy string) {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Sprintf("the network manager's socket %s is not open to this user", socket), "run this as root"
	case errors.Is(err, fs.ErrNotExist):
		return "the network manager is not running: there is no socket " + socket, startManager
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Sprintf("the network manager on %s does not answer in time", socket),
			"look at journalctl -u lariat-network-manager"
	}
	return fmt.Sprintf("the network manager is not running: %v", err), startManager
}

func (e *checkContext) manager() {
	if !e.needs("manager", e.Manager != nil) {
		return
	}
	where := "host " + e.Self
	if err := e.Manager.Err; err != nil {
		what, remedy := ManagerUnreachable(err, e.Manager.Socket)
		if errors.Is(err, fs.ErrPermission) {
			e.skip("%s; %s", what, remedy)
		} else {
			e.add(Error, where, remedy, "%s", what)
		}
	}
	for _, c := range e.Manager.Concerns {
		if !c.OK {
			e.add(Error, where, "it is tried again by itself; the message says what is in the way. More: journalctl -u "+
				"lariat-network-manager", "the network manager cannot keep %s true: %s", c.Name, c.Error)
		}
	}
}

func (e *checkContext) journal() {
	if !e.needs("journal", e.Own != nil && e.Manager != nil && e.Manager.StateDir != "") {
		return
	}
	elsewhere := map[string]int{}
	for _, a := range e.Own {
		if a.StateDir != e.Manager.StateDir {
			elsewhere[a.StateDir]++
		}
	}
	for _, dir := range slices.Sorted(maps.Keys(elsewhere)) {
		e.add(Warning, "host "+e.Self, "set the plugins' \"stateDir\" and lariat-network-manager's --state-dir to the "+
			"same folder",
			"plugins with the stateDir %s gave %d of this host's addresses, and the network manager looks in %s alone: it "+
				"does not give back what a killed one leaves there before the next boot",
			dir, elsewhere[dir], e.Manager.StateDir)
	}
}

// attachments reports running containers that the service does not know. Their addresses can be
// allocated to others, and no other host finds them.
func (e *checkContext) attachments() {
	if !e.needs("journal", e.Own != nil) || !e.needs("attachments", e.Living != nil) || !e.needsSnapshot() {
		return
	}
	type claim struct {
		network, container, ifname string
		address                    netip.Addr
	}
	of := func(a metadata.Allocation) claim { return claim{a.Network, a.ContainerID, a.IfName, a.Address} }
	known := map[claim]bool{}
	for _, a := range e.Own {
		known[of(a)] = true
	}
	s := e.Metadata.Snapshot
	holders := metadata.Holders(s.Containers, s.LeadsTo())
	var lost []string
	for _, a := range e.Living {
		if known[of(a)] {
			continue
		}
		has := fmt.Sprintf("container %s has %s of network %s", metadata.ShortID(a.ContainerID), a.Address, a.Network)
		where := "container " + metadata.ShortID(a.ContainerID)
		_, defined := s.Network(a.Network)
		switch i, held := holders[a.Address]; {
		case !defined:
			e.add(Error, where, "make the network anew with the same subnets: lariat network create "+a.Network+
				". Or restart the container on another network", "%s, which is not in the metadata", has)
		case held:
			other := s.Containers[i]
			e.add(Error, where, "restart one of the two: it gets another address", "%s, and so has container %s of host %s",
				has, metadata.ShortID(other.ID), other.Host)
		default:
			lost = append(lost, has)
		}
	}
	if len(lost) > 0 {
		e.add(Error, "host "+e.Self,
			"start lariat-network-manager, which registers them; if it runs, it tells what is in the way: lariat doctor manager",
			"the metadata service does not know %s of this host, and may give them to others: %s",
			plural(len(lost), "address", "addresses"), strings.Join(lost[:min(len(lost), oneFindingFor)], "; "))
	}
}

func (e *checkContext) hosts() {
	if !e.needsSnapshot() {
		return
	}
	s := e.Metadata.Snapshot
	if e.Self != "" {
		if _, ok := s.Host(e.Self); !ok {
			e.add(Error, "host "+e.Self, "restart lariat-metadata on this host; it registers itself",
				"this host is not in the metadata")
		}
	}
	blocks, containers := map[string]int{}, map[string]int{}
	for _, b := range s.Blocks {
		blocks[b.Host]++
	}
	for _, c := range s.Containers {
		containers[c.Host]++
	}
	for _, h := range s.Hosts {
		if h.Live {
			continue
		}
		e.add(Warning, "host "+h.Name, fmt.Sprintf("on %s: systemctl status lariat-metadata. When the host is gone for "+
			"good: lariat host remove %s", h.Name, h.Name),
			"host %s does not answer: its metadata service has not been heard of%s", h.Name,
			holds(blocks[h.Name], containers[h.Name]))
	}
}

// holds describes the resources of a host that others wait for.
func holds(blocks, containers int) string {
	switch {
	case containers > 0:
		return fmt.Sprintf("; it has %s and %s", count(blocks, "block"), count(containers, "container"))
	case blocks > 0:
		return fmt.Sprintf("; it has %s", count(blocks, "block"))
	}
	return ""
}

func count(n int, what string) string { return plural(n, what, what+"s") }

func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

func (e *checkContext) duplicates() {
	if !e.needsSnapshot() {
		return
	}
	s := e.Metadata.Snapshot
	twice := func(what, remedy string, of func(metadata.Host) []string) {
		users := map[string][]string{}
		for _, h := range s.Hosts {
			for _, v := range of(h) {
				if v != "" && !slices.Contains(users[v], h.Name) {
					users[v] = append(users[v], h.Name)
				}
			}
		}
		for _, v := range slices.Sorted(maps.Keys(users)) {
			if len(users[v]) > 1 {
				slices.Sort(users[v])
				e.add(Error, "hosts "+strings.Join(users[v], ", "), remedy, "hosts %s have the same %s %s",
					strings.Join(users[v], " and "), what, v)
			}
		}
	}
	twice("machine id", "one machine under two names: lariat host remove the old name. Two machines from one image: "+
		"on one of them rm /etc/machine-id; systemd-machine-id-setup; restart lariat-metadata",
		func(h metadata.Host) []string { return []string{h.MachineID} })
	twice("underlay address", "give one of them another address and restart its lariat-metadata, or remove the host "+
		"that is gone: lariat host remove NAME",
		func(h metadata.Host) (out []string) {
			for _, u := range h.Underlay {
				out = append(out, u.Address.Addr().String())
			}
			return out
		})
	twice("overlay MAC", "restart lariat-metadata on one of them; it derives its MAC from its underlay address",
		func(h metadata.Host) []string {
			if h.MAC.IsZero() {
				return nil
			}
			return []string{h.MAC.String()}
		})
	type claim struct{ network, what string }
	claims := map[claim][]string{}
	for _, b := range s.Blocks {
		claims[claim{b.Network, b.CIDR.String()}] = append(claims[claim{b.Network, b.CIDR.String()}], b.Host)
		if b.Gateway.IsValid() {
			k := claim{b.Network, b.Gateway.String()}
			claims[k] = append(claims[k], b.Host)
		}
	}
	for _, en := range s.HostRoutes {
		k := claim{en.Network, en.Address.String()}
		claims[k] = append(claims[k], en.Host)
	}
	keys := slices.SortedFunc(maps.Keys(claims), func(a, b claim) int {
		if a.network != b.network {
			return strings.Compare(a.network, b.network)
		}
		return strings.Compare(a.what, b.what)
	})
	for _, k := range keys {
		if who := claims[k]; len(who) > 1 {
			slices.Sort(who)
			e.add(Error, "network "+k.network, "this should not be possible: keep a backup (lariat-metadata backup FILE), "+
				"report it, and remove the host that does not use it",
				"%s is claimed by hosts %s", k.what, strings.Join(slices.Compact(who), " and "))
		}
	}
}

func (e *checkContext) networks() {
	if !e.needsSnapshot() {
		return
	}
	s := e.Metadata.Snapshot
	for i, n := range s.Networks {
		where := "network " + n.Name
		if err := n.Validate(); err != nil {
			e.add(Error, where, "correct it: lariat network update "+n.Name, "%s", strings.ReplaceAll(err.Error(), "\n", "; "))
		}
		for _, o := range s.Networks[i+1:] {
			if n.SharesVNI(&o) {
				e.add(Error, where, "give one of them another: lariat network update NAME --vni N",
					"networks %s and %s have the same VNI %d", n.Name, o.Name, n.VNI)
			}
			for _, pair := range n.Overlaps(&o) {
				e.add(Error, where, "make one of them anew with another subnet",
					"subnet %s of network %s and subnet %s of network %s overlap", pair[0], n.Name, pair[1], o.Name)
			}
		}
		for _, from := range n.AllowFrom {
			_, there := s.Network(from)
			if _, err := netip.ParsePrefix(from); err != nil && from != metadata.AllowAll && !there {
				e.add(Warning, where, "create it, or: lariat network update "+n.Name+" --allow-from …",
					"network %s allows network %s, which does not exist", n.Name, from)
			}
		}
		if n.Encapsulation == metadata.EncapNone {
			continue
		}
		e.crossed(n)
		for _, h := range s.Hosts {
			for _, pair := range n.OverlapsUnderlay(&h) {
				e.add(Error, where, "make the network anew with another subnet: packets of the tunnels would be sent into "+
					"the tunnels",
					"subnet %s overlaps the underlay %s of host %s", pair[0], pair[1], h.Name)
			}
		}
	}
}

// crossed reports hosts with a foreign route to addresses of a network.
func (e *checkContext) crossed(n metadata.Network) {
	hosts := map[metadata.Foreign][]string{}
	for _, h := range e.Metadata.Snapshot.Hosts {
		for _, f := range n.Crosses(h) {
			hosts[f] = append(hosts[f], h.Name)
		}
	}
	for _, f := range slices.SortedFunc(maps.Keys(hosts),
		func(a, b metadata.Foreign) int { return strings.Compare(a.String(), b.String()) }) {
		names := hosts[f]
		slices.Sort(names)
		if len(names) > oneFindingFor {
			names = append(names[:oneFindingFor:oneFindingFor], fmt.Sprintf("and %d more", len(names)-oneFindingFor))
		}
		severity, what := Error, "is a link"
		if f.Via.IsValid() {
			severity, what = Warning, "is a route"
		}
		e.add(severity, "network "+n.Name, fmt.Sprintf("give the link or route other addresses (ip route show %s), or "+
			"make the network anew with another subnet", f.Prefix),
			"%s %s of host %s, and network %s has its addresses, too: who is there does not reach those containers, or "+
				"they do not reach it",
			f, what, strings.Join(names, ", "), n.Name)
	}
}

func (e *checkContext) addresses() {
	if e.Metadata == nil || e.Metadata.Err != nil || e.Metadata.Status == nil {
		e.needs("usage", false)
		return
	}
	for _, st := range e.Metadata.Status {
		where := "network " + st.Network
		full := false
		for _, u := range st.Usage {
			total := u.Used + u.Free
			used := 0.0
			if total > 0 {
				used = float64(u.Used) / float64(total)
			}
			remedy := "look for containers that are gone and hold addresses: lariat ip list --network " + st.Network +
				"; or make a wider network"
			switch {
			case u.Free <= 0:
				full = true
				e.add(Error, where, remedy, "subnet %s has no address left for this host", u.Subnet)
			case used >= usageWarning && u.BlocksFree == 0:
				e.add(Warning, where, remedy, "subnet %s is %.0f %% full for this host: %d of %d addresses are left", u.Subnet,
					used*100, u.Free, total)
			case u.BlocksFree == 0:
				e.add(Warning, where, "a host that joins now must borrow addresses one by one; make a wider network, or "+
					"smaller blocks in a new one", "subnet %s has no free block left", u.Subnet)
			}
		}
		// The check "store" reports that reason.
		if !st.Ready && !full && (e.Metadata.Snapshot == nil || st.Reason != e.Metadata.Snapshot.Away) {
			e.add(Error, where, "see the reason", "no container can be attached to network %s on this host: %s", st.Network,
				st.Reason)
		}
	}
}

func (e *checkContext) features() {
	if !e.needs("features", e.Features != nil) {
		return
	}
	var s *metadata.Snapshot
	if e.Metadata != nil {
		s = e.Metadata.Snapshot
	}
	for _, f := range e.Features {
		if severity := Error; !f.OK && f.Needed(s) {
			if f.Fallback {
				severity = Warning
			}
			e.add(severity, "kernel of host "+e.Self, f.Remedy, "the kernel cannot do %s (%s), without which %s", f.Name,
				f.Detail, f.Need)
		}
	}
}

// overlays reports, by family, whether there are networks that Lariat routes.
func (e *checkContext) overlays() (v4, v6 bool) {
	for _, n := range e.Metadata.Snapshot.Networks {
		if n.Encapsulation == metadata.EncapNone {
			continue
		}
		for _, p := range n.Subnets {
			v4, v6 = v4 || p.Addr().Is4(), v6 || p.Addr().Is6()
		}
	}
	return v4, v6
}

func (e *checkContext) forwarding() {
	if !e.needs("kernel", e.Kernel != nil) || !e.needsSnapshot() {
		return
	}
	v4, v6 := e.overlays()
	for _, f := range []struct {
		key, family string
		wanted      bool
	}{{"net/ipv4/ip_forward", "IPv4", v4}, {"net/ipv6/conf/all/forwarding", "IPv6", v6}} {
		if value, known := e.Kernel.Sysctls[f.key]; f.wanted && known && value == "0" {
			dotted := strings.ReplaceAll(f.key, "/", ".")
			e.add(Error, "sysctl "+dotted, fmt.Sprintf("sysctl -w %s=1, and look in /etc/sysctl.d for what turns it off; "+
				"the network manager turns it on at its next pass", dotted),
				"the host does not forward %s: containers reach nobody", f.family)
		}
	}
}

// rpFilter checks the reverse path filter. The kernel takes the larger of
// net.ipv4.conf.all.rp_filter and the device's own value. So "loose" (2) for all makes a strict
// filter (1) on a container's device loose as well.
func (e *checkContext) rpFilter() {
	if !e.needs("kernel", e.Kernel != nil) {
		return
	}
	if e.Kernel.Sysctls["net/ipv4/conf/all/rp_filter"] != "2" {
		return
	}
	const key = "sysctl net.ipv4.conf.all.rp_filter"
	remedy := "sysctl -w net.ipv4.conf.all.rp_filter=0 (each device's own value then counts), and look in " +
		"/etc/sysctl.d for what sets it"
	e.add(Warning, key, remedy, "the reverse path check is loose (2) for all devices, which overrides the ports' "+
		"strict one; "+
		"only Lariat's own nftables rule keeps containers from using each other's IPv4 addresses")
}

// forwardPolicy uses the results of packets where some could be sent. Otherwise it uses the chains.
func (e *checkContext) forwardPolicy() {
	if e.Kernel != nil && e.Kernel.Passages != nil {
		for _, p := range e.Kernel.Passages {
			if !p.Passed {
				e.stopped(p)
			}
		}
		if why := e.Unavailable["passages"]; why != "" {
			e.skip("%s", why)
		}
		return
	}
	if e.Kernel == nil || e.Unavailable["forward"] != "" {
		e.needs("forward", false)
		return
	}
	if !e.needsSnapshot() {
		return
	}
	v4, v6 := e.overlays()
	for _, c := range e.Kernel.Forward {
		if c.Passes || !c.Both && (c.V6 && !v6 || !c.V6 && !v4) {
			continue
		}
		remedy := "start lariat-network-manager, which lets the networks' packets through"
		if !strings.HasPrefix(c.Name, "iptables") && !strings.HasPrefix(c.Name, "ip6tables") {
			remedy = "add accept rules for the networks' subnets to this chain where it is made; an accept elsewhere does " +
				"not help, for a packet must pass every chain"
		}
		e.add(Error, c.Name, remedy, "forwarded packets are dropped by the policy of %s: containers reach nobody", c.Name)
	}
}

// stopped reports a packet that did not pass between endpoints, the cause, and a remedy.
func (e *checkContext) stopped(p Passage) {
	family, v6 := "IPv4", p.Subnet.Addr().Is6()
	if v6 {
		family = "IPv6"
	}
	if key := map[bool]string{false: "net/ipv4/ip_forward",
		true: "net/ipv6/conf/all/forwarding"}[v6]; e.Kernel.Sysctls[key] == "0" {
		return // the check forwarding tells
	}
	if p.Chain == "" {
		e.add(Warning, "network "+p.Network, "look at nft list ruleset and iptables-save for rules that drop or reject "+
			"what is forwarded",
			"%s packets of network %s do not pass from one container's port to another on this host; what stops them was "+
				"not found", family, p.Network)
		return
	}
	words := strings.Fields(p.Chain)
	last := words[len(words)-1]
	ipt := strings.HasPrefix(p.Chain, "ip")
	var remedy string
	switch {
	case ipt && last == "LARIAT-USER":
		remedy = "rules in LARIAT-USER are the administrator's, and come first; remove the rule if it is not meant"
	case ipt:
		remedy = "start lariat-network-manager, which lets the networks' packets through in front of such rules"
	case strings.Contains(p.Chain, " lariat "):
		remedy = "lariat plan --diff shows what is not as it should be; start lariat-network-manager"
	case strings.Contains(p.Chain, " firewalld "):
		remedy = fmt.Sprintf("firewall-cmd --permanent --zone=trusted --add-source=%s; firewall-cmd --reload", p.Subnet)
	default:
		ip := map[bool]string{false: "ip", true: "ip6"}[v6]
		remedy = fmt.Sprintf("put accept rules in front of it, where the chain is made (now: nft insert rule %[1]s "+
			"%[2]s daddr %[3]s accept; the same for saddr); "+
			"an accept elsewhere does not help, for a packet must pass every chain", strings.TrimPrefix(p.Chain, "nft chain "),
			ip, p.Subnet)
	}
	by := "the policy of " + p.Chain
	if p.Rule != "" {
		by = fmt.Sprintf("a rule of %s: %s", p.Chain, p.Rule)
	}
	e.add(Error, p.Chain, remedy, "forwarded packets are dropped by %s; containers of network %s do not reach each "+
		"other by %s", by, p.Network, family)
}

func (e *checkContext) underlay() {
	if !e.needs("kernel", e.Kernel != nil) || !e.needsSnapshot() {
		return
	}
	me, ok := e.Metadata.Snapshot.Host(e.Self)
	if !ok {
		e.skip("this host is not in the metadata")
		return
	}
	if len(me.Underlay) == 0 {
		e.add(Error, "host "+e.Self, "give lariat-metadata --underlay ADDRESS/LENGTH",
			"this host has no underlay address: no other host can reach it")
	}
	for i, u := range me.Underlay {
		dev := ""
		for _, name := range slices.Sorted(maps.Keys(e.Kernel.Links)) {
			if slices.ContainsFunc(e.Kernel.Links[name].Addrs,
				func(p netip.Prefix) bool { return p.Addr() == u.Address.Addr() }) {
				dev = name
				break
			}
		}
		where := "interface " + u.Device
		link := e.Kernel.Links[dev]
		switch {
		case dev == "":
			e.add(Error, where, "put the address back, or restart lariat-metadata so that it registers the present one",
				"the underlay address %s of this host is on none of its interfaces", u.Address.Addr())
			continue
		case dev != u.Device && u.Device != "":
			e.add(Warning, where, "restart lariat-metadata; it registers what is there",
				"the underlay address %s is on %s, the metadata says %s", u.Address.Addr(), dev, u.Device)
		case !link.Up:
			e.add(Error, where, "ip link set "+dev+" up", "the underlay's interface %s is down", dev)
		case u.MTU != 0 && link.MTU != u.MTU:
			e.add(Warning, where, "the network manager tells the metadata; is it running?",
				"the MTU of %s is %d, the metadata says %d", dev, link.MTU, u.MTU)
		}
		if i > 0 {
			continue
		}
		for _, n := range e.Metadata.Snapshot.Networks {
			if need := mtu.Container(n, me) + mtu.Overhead(n, me); n.Encapsulation == metadata.EncapVXLAN && need > link.MTU {
				e.add(Error, where, fmt.Sprintf("lariat network update %s --mtu %d, or raise the MTU of %s to %d", n.Name,
					link.MTU-mtu.Overhead(n, me), dev, need),
					"network %s has an MTU of %d, which with %d octets of encapsulation does not fit the %d of %s: large packets "+
						"are lost", n.Name, mtu.Container(n, me), mtu.Overhead(n, me), link.MTU, dev)
			}
			if fits := inner(link.MTU, me.UnderlayAddr().Is6()); n.Encapsulation == metadata.EncapIPsec &&
				mtu.Container(n, me) > fits {
				e.add(Error, where, fmt.Sprintf("lariat network update %s --mtu %d, or raise the MTU of %s to %d", n.Name, fits,
					dev, outer(n, me)),
					"network %s has an MTU of %d; encrypted, such packets can have %d octets, which do not fit the %d of %s: "+
						"large packets are lost", n.Name, mtu.Container(n, me), outer(n, me), link.MTU, dev)
			}
		}
	}
}

func (e *checkContext) devices() {
	if !e.needs("kernel", e.Kernel != nil) {
		return
	}
	if why := e.Unavailable["devices"]; why != "" {
		e.skip("%s", why)
		return
	}
	remedy := "start lariat-network-manager, which mends it; if it runs, lariat plan --diff shows what is left to do"
	// An encrypted network has a device for each host. Many that are missing for one reason are one
	// finding.
	var missing []string
	for _, d := range e.Kernel.Devices {
		if d.Have == "" {
			missing = append(missing, d.Name)
		}
	}
	if len(missing) > oneFindingFor {
		e.add(Error, "devices "+strings.Join(missing, ", "), remedy, "%d devices are missing", len(missing))
	}
	for _, d := range e.Kernel.Devices {
		where := "device " + d.Name
		switch {
		case d.Have == "" && len(missing) > oneFindingFor:
		case d.Want == "":
			e.add(Error, where, "start lariat-network-manager, which removes it; or by hand: ip link del "+d.Name,
				"device %s is left over: no network wants it (%s)", d.Name, d.Have)
		case d.Have == "":
			e.add(Error, where, remedy, "device %s is missing (it should be: %s)", d.Name, d.Want)
		case d.Want != d.Have:
			e.add(Error, where, remedy, "device %s is not as it should be: it is %q, it should be %q", d.Name, d.Have, d.Want)
		}
	}
}

// ports reports endpoints that lost settings on the host. Only the network manager restores these.
// Without its routes a container is cut off. Other settings keep it from using foreign addresses
// and from giving its host routes (CVE-2020-10749).
func (e *checkContext) ports() {
	if !e.needs("kernel", e.Kernel != nil) || !e.needsSnapshot() {
		return
	}
	if why := e.Unavailable["ports"]; why != "" {
		e.skip("%s", why)
		return
	}
	const remedy = "start lariat-network-manager, which mends it, and look for what took it away: " +
		"a file in /etc/sysctl.d, or an interface manager that does not leave lrt* alone (NetworkManager, networkd, dhcpcd)"
	wrong := e.Kernel.Endpoints
	if len(wrong) > oneFindingFor {
		e.add(Error, "port "+wrong[0].Want.Name, remedy,
			"%d containers' ports are not what they should be: the first lacks %s", len(wrong), wrong[0].Lacks[0])
		return
	}
	for _, p := range wrong {
		e.add(Error, "port "+p.Want.Name, remedy,
			"the port of container %s lacks %s", metadata.ShortID(p.Want.Alias.ContainerID), strings.Join(p.Lacks, "; "))
	}
}

// each reports one finding per peer for a few peers. For many peers it reports one finding with
// their number.
func (e *checkContext) each(list []Peer, s Severity, remedy string, one func(Peer) string, many string) {
	if len(list) <= oneFindingFor {
		for _, p := range list {
			e.add(s, fmt.Sprintf("host %s (%s)", p.Host, p.Addr), remedy, "%s", one(p))
		}
		return
	}
	names := make([]string, len(list))
	for i, p := range list {
		names[i] = p.Host
	}
	e.add(s, "hosts "+strings.Join(names, ", "), remedy, "%s", fmt.Sprintf(many, len(list)))
}

// tunnelAnswers reports whether some tunnel to the peer works, and whether one does not.
func tunnelAnswers(p Peer) (some, broken bool) {
	for _, o := range p.Overlay {
		if o.Err == nil {
			some = true
		} else {
			broken = true
		}
	}
	return some, broken
}

func (e *checkContext) reach() {
	if !e.needs("peers", e.Peers != nil) {
		return
	}
	var refused, silent, odd []Peer
	for _, p := range e.Peers {
		some, _ := tunnelAnswers(p)
		switch {
		case p.Echo == nil:
		case errors.Is(p.Echo, echo.ErrRefused):
			refused = append(refused, p)
		case errors.Is(p.Echo, echo.ErrSilent) && some:
			odd = append(odd, p)
		default:
			silent = append(silent, p)
		}
	}
	e.each(silent, Error, fmt.Sprintf("ping the address; open UDP %d (probes) and the networks' ports between the "+
		"hosts in every firewall on the way", echo.Port),
		func(p Peer) string {
			return fmt.Sprintf("host %s does not answer over the underlay: %v", p.Host, p.Echo)
		},
		"%d hosts do not answer over the underlay")
	e.each(refused, Warning, "start lariat-network-manager there", func(p Peer) string {
		return fmt.Sprintf("host %s is reached, but its network manager does not answer probes on UDP %d", p.Host, echo.Port)
	}, "%d hosts are reached, but their network managers do not answer probes")
	e.each(odd, Warning, fmt.Sprintf("open UDP %d between the hosts; without it packet size and clock cannot be checked",
		echo.Port), func(p Peer) string {
		return fmt.Sprintf("host %s is reached through the tunnel, but not on UDP %d", p.Host, echo.Port)
	}, "%d hosts are reached through the tunnel, but not on the port of probes")
}

func (e *checkContext) tunnel() {
	if !e.needs("peers", e.Peers != nil) || !e.needs("tunnel", e.Unavailable["tunnel"] == "") {
		return
	}
	type key struct {
		network string
		port    uint16
	}
	blocked, routeless := map[key][]Peer{}, map[key][]Peer{}
	for _, p := range e.Peers {
		for _, o := range p.Overlay {
			k := key{o.Network, o.Port}
			switch {
			case o.Err == nil:
			case o.Source != o.Ours:
				routeless[k] = append(routeless[k], p)
			case errors.Is(p.Echo, echo.ErrSilent):
				// Nothing at all arrives, which is already reported.
			case o.Port == 0 && e.toldOfTunnel(p.Host):
			default:
				blocked[k] = append(blocked[k], p)
			}
		}
	}
	order := func(m map[key][]Peer) []key {
		return slices.SortedFunc(maps.Keys(m), func(a, b key) int { return strings.Compare(a.network, b.network) })
	}
	for _, k := range order(routeless) {
		e.each(routeless[k], Error, "lariat plan --diff shows what is missing; start lariat-network-manager, which adds it",
			func(p Peer) string {
				return fmt.Sprintf("there is no route of network %s to host %s", k.network, p.Host)
			}, "there is no route of network "+k.network+" to %d hosts")
	}
	for _, k := range order(blocked) {
		if k.port == 0 {
			e.each(blocked[k], Error, "lariat ipsec status, on both hosts, tells how their tunnel fares; when it is "+
				"established, open ESP (IP protocol 50) and UDP 4500 between the hosts in every firewall on the way, or let "+
				"the network managers use UDP always (--ipsec-encap)",
				func(p Peer) string {
					return fmt.Sprintf("host %s answers over the underlay, but not through the encrypted network %s", p.Host,
						k.network)
				}, "%d hosts answer over the underlay, but not through the encrypted network "+k.network)
			continue
		}
		e.each(blocked[k], Error, fmt.Sprintf("open UDP %d between the hosts in every firewall on the way and on both "+
			"ends; if it is open, look on the other host: lariat doctor", k.port), func(p Peer) string {
			return fmt.Sprintf("UDP %d is blocked to or from host %s: it answers over the underlay, but not through network %s",
				k.port, p.Host, k.network)
		}, fmt.Sprintf("UDP %d is blocked to or from %%d hosts: they answer over the underlay, but not through network %s",
			k.port, k.network))
	}
}

func (e *checkContext) pathMTU() {
	if !e.needs("peers", e.Peers != nil) {
		return
	}
	asked, measured := 0, 0
	for _, p := range e.Peers {
		if p.WantMTU == 0 || p.Echo != nil {
			continue
		}
		asked++
		if p.MTUErr != nil {
			continue
		}
		measured++
		if p.MTU >= p.WantMTU {
			continue
		}
		overhead := mtu.VXLANOverIPv4
		if p.Addr.Is6() {
			overhead = mtu.VXLANOverIPv6
		}
		remedy := fmt.Sprintf("raise the MTU on the way, or lower the networks': lariat network update NAME --mtu %d",
			p.MTU-overhead)
		encrypted := func(o Overlay) bool { return o.Port == 0 }
		if slices.ContainsFunc(p.Overlay, encrypted) {
			fits := fmt.Sprintf("%d", inner(p.MTU, p.Addr.Is6()))
			if slices.ContainsFunc(p.Overlay, func(o Overlay) bool { return !encrypted(o) }) {
				fits += fmt.Sprintf(" (encrypted), --mtu %d (VXLAN)", p.MTU-overhead)
			}
			remedy = "raise the MTU on the way, or lower the networks': lariat network update NAME --mtu " + fits
		}
		e.add(Error, fmt.Sprintf("way to host %s (%s)", p.Host, p.Addr), remedy,
			"packets of %d octets, as the tunnels make them, do not come through to host %s and back; the largest that do "+
				"have %d", p.WantMTU, p.Host, p.MTU)
	}
	if measured < asked {
		e.skip("%d of %d hosts could not be measured", asked-measured, asked)
	}
}

func (e *checkContext) clock() {
	if !e.needs("peers", e.Peers != nil) {
		return
	}
	var off []Peer
	answered := 0
	for _, p := range e.Peers {
		if p.Echo != nil {
			continue
		}
		answered++
		// Only the part beyond the uncertainty of the measurement counts.
		if p.Skew.Abs()-p.RTT/2 > skewWarning {
			off = append(off, p)
		}
	}
	if answered == 0 && len(e.Peers) > 0 {
		e.skip("no host answered probes")
		return
	}
	remedy := "look at timedatectl on both hosts; run chrony or systemd-timesyncd"
	if len(off) > 1 && len(off) == answered {
		e.add(severity(off[0].Skew), "host "+e.Self, remedy, "this host's clock is off by %s against every other host",
			rough(off[0].Skew))
		return
	}
	for _, p := range off {
		direction := "ahead of"
		if p.Skew < 0 {
			direction = "behind"
		}
		e.add(severity(p.Skew), "host "+p.Host, remedy, "the clock of host %s is %s %s this host's", p.Host, rough(p.Skew),
			direction)
	}
}

// rough returns a clock's offset, with the precision that a busy machine can measure.
func rough(skew time.Duration) time.Duration {
	if skew.Abs() < 10*time.Second {
		return skew.Abs().Round(100 * time.Millisecond)
	}
	return skew.Abs().Round(time.Second)
}

func severity(skew time.Duration) Severity {
	if skew.Abs() >= skewError {
		return Error
	}
	return Warning
}
