package doctor

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/doctor/echo"
	"github.com/lariat-net/lariat/pkg/guard"
	"github.com/lariat-net/lariat/pkg/ipsec"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/kernel/netnstest"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/vxlan"
)

// asPatient makes the test's own executable examine the namespace that it runs in, and print the report:
// facts are gathered by many goroutines, which all must be there.
const asPatient = "LARIAT_TEST_PATIENT"

func TestMain(m *testing.M) {
	if file := os.Getenv(asPatient); file != "" {
		if err := examine(file); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	netnstest.Main(m)
}

func want(s *metadata.Snapshot, self string) *delta.State {
	// Of encrypted networks the rules that block: not every kernel that runs this has XFRM interfaces.
	rules, planned := delta.NewState(), ipsec.Plan(s, self)
	rules.Chains, rules.Sets = planned.Chains, planned.Sets
	return delta.Merge(vxlan.Plan(s, self), guard.Plan(s, self, kernel.LooseReversePath()), rules)
}

func examine(file string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	f := &Facts{Unavailable: map[string]string{}, Metadata: &Metadata{Snapshot: &metadata.Snapshot{}}}
	if err := json.Unmarshal(b, f.Metadata.Snapshot); err != nil {
		return err
	}
	f.Self = f.Metadata.Snapshot.Self
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	g := Gatherer{Want: want, Probe: true, Timeout: 300 * time.Millisecond,
		Observe: func(ctx context.Context, s *delta.State) (*delta.State, error) {
			k, err := kernel.New()
			if err != nil {
				return nil, err
			}
			defer k.Close()
			return k.Observe(ctx, s)
		}}
	g.kernelFacts(ctx, f)
	f.Peers = g.peers(ctx, f.Metadata.Snapshot)
	return json.NewEncoder(os.Stdout).Encode(Check(f, "forwarding", "rp-filter", "forward-policy", "underlay", "devices",
		"rules", "fail-closed", "reach", "tunnel", "mtu", "clock"))
}

// pair is two hosts in namespaces, with one network between them as the network manager makes it.
type pair struct {
	a, b       *netnstest.NS
	devA, devB string
	snap       *metadata.Snapshot
}

func newPair(t *testing.T) *pair {
	t.Helper()
	p := &pair{a: netnstest.New(t), b: netnstest.New(t)}
	p.devA, p.devB = netnstest.Veth(t, p.a, "192.0.2.1/24", p.b, "192.0.2.2/24")
	pfx := netip.MustParsePrefix
	host := func(name, addr, dev string, last byte) metadata.Host {
		return metadata.Host{Name: name, Live: true, MachineID: name, BootID: name,
			MAC:      metadata.MAC{0x0e, 0, 192, 0, 2, last},
			Underlay: []metadata.Underlay{{Address: pfx(addr), Device: dev, MTU: 1500}}}
	}
	p.snap = &metadata.Snapshot{Self: "a", Hosts: []metadata.Host{host("a", "192.0.2.1/24", p.devA, 1),
		host("b", "192.0.2.2/24", p.devB, 2)},
		Networks: []metadata.Network{{Name: "overlay", Subnets: []netip.Prefix{pfx("10.42.0.0/16")}, Encapsulation: "vxlan",
			VNI: 1042}},
		Blocks: []metadata.Block{{Network: "overlay", CIDR: pfx("10.42.1.0/26"), Host: "a",
			Gateway: netip.MustParseAddr("10.42.1.1")},
			{Network: "overlay", CIDR: pfx("10.42.2.0/26"), Host: "b", Gateway: netip.MustParseAddr("10.42.2.1")}}}
	for name, ns := range map[string]*netnstest.NS{"a": p.a, "b": p.b} {
		k, err := kernel.NewAt(ns.Path())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := kernel.Reconcile(t.Context(), k, want(p.snap, name)); err != nil {
			t.Skipf("this kernel cannot do it: %v", err)
		}
		k.Close()
	}
	return p
}

// respond lets b answer probes, as its network manager does.
func (p *pair) respond(t *testing.T, s echo.Server) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var conn *net.UDPConn
	var err error
	p.b.Do(t, func() { conn, err = s.Listen(ctx, fmt.Sprintf("192.0.2.2:%d", echo.Port)) })
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { defer close(done); s.ServeConn(ctx, conn) }()
	t.Cleanup(func() { cancel(); <-done })
}

// examine runs the check-up in a, and checks that it found what is wanted and nothing else.
func (p *pair) examine(t *testing.T, wanted ...string) *Report {
	t.Helper()
	file := filepath.Join(t.TempDir(), "snapshot.json")
	b, err := json.Marshal(p.snap)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	p.a.Do(t, func() {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), asPatient+"="+file)
		cmd.Stdout, cmd.Stderr = &out, &errs
		err = cmd.Run()
	})
	if err != nil {
		t.Fatalf("%v: %s", err, errs.String())
	}
	var r Report
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		t.Fatalf("%v: %s", err, out.String())
	}
	var got []string
	for _, f := range r.Findings {
		got = append(got, fmt.Sprintf("%s %s: %s", f.Check, f.Severity, f.What))
	}
	slices.Sort(got)
	ok := len(got) == len(wanted)
	for i := range got {
		ok = ok && strings.HasPrefix(got[i], wanted[i])
	}
	// Without any answer there is nothing to compare clocks with.
	r.Skipped = slices.DeleteFunc(r.Skipped, func(s Skipped) bool {
		return s.Check == "clock" &&
			strings.Contains(fmt.Sprint(got), "reach ")
	})
	if !ok || len(r.Skipped) > 0 {
		t.Errorf("found\n\t%s\nwanted\n\t%s\nskipped %v", strings.Join(got, "\n\t"), strings.Join(wanted, "\n\t"), r.Skipped)
	}
	return &r
}

func (p *pair) sysctl(t *testing.T, key, value string) {
	t.Helper()
	p.a.Do(t, func() {
		if err := os.WriteFile("/proc/sys/"+key, []byte(value), 0o644); err != nil {
			t.Skipf("sysctl %s: %v", key, err)
		}
	})
}

func TestF137RealHostsThatAreWell(t *testing.T) {
	p := newPair(t)
	p.respond(t, echo.Server{})
	p.examine(t)
}

func TestF137RealUDPPortBlocked(t *testing.T) {
	p := newPair(t)
	p.respond(t, echo.Server{})
	p.b.Command(t, "nft", "add table inet firewall; add chain inet firewall in { type filter hook input priority 0; "+
		"}; add rule inet firewall in udp dport 4789 drop")
	p.examine(t, "tunnel error: UDP 4789 is blocked to or from host b")
}

func TestF137RealHostUnreachable(t *testing.T) {
	p := newPair(t)
	p.respond(t, echo.Server{})
	p.b.Command(t, "nft", "add table inet firewall; add chain inet firewall in { type filter hook input priority 0; "+
		"}; add rule inet firewall in meta l4proto udp drop")
	p.examine(t, "reach error: host b does not answer over the underlay")
}

func TestF137RealManagerOfThePeerStopped(t *testing.T) {
	newPair(t).examine(t, "reach warning: host b is reached, but its network manager does not answer")
}

func TestF137RealMTUTooSmall(t *testing.T) {
	p := newPair(t)
	p.respond(t, echo.Server{})
	// A veth drops what is larger than the MTU of its peer (and the Ethernet header): a switch on the way
	// without jumbo frames.
	p.b.Command(t, "ip", "link", "set", p.devB, "mtu", "1396")
	r := p.examine(t, "mtu error: packets of 1500 octets, as the tunnels make them, do not come through to host b "+
		"and back; the largest that do have 1396")
	if len(r.Findings) == 1 && !strings.Contains(r.Findings[0].Remedy, "--mtu 1346") {
		t.Error(r.Findings[0].Remedy)
	}
}

func TestF137RealForwardDrop(t *testing.T) {
	p := newPair(t)
	p.respond(t, echo.Server{})
	p.a.Command(t, "iptables", "-w", "-P", "FORWARD", "DROP")
	p.examine(t, "forward-policy error: forwarded packets are dropped by the policy of iptables")
	// What the network manager does about it is enough.
	p.a.Command(t, "iptables", "-w", "-N", "LARIAT-FORWARD")
	p.a.Command(t, "iptables", "-w", "-A", "FORWARD", "-j", "LARIAT-FORWARD")
	for _, way := range []string{"-i", "-o"} {
		p.a.Command(t, "iptables", "-w", "-A", "LARIAT-FORWARD", way, "lrt+", "-j", "ACCEPT")
	}
	p.examine(t)
	// Another firewall drops all the same, until it knows the subnet.
	p.a.Command(t, "nft", "add table inet firewall; add chain inet firewall through { type filter hook forward "+
		"priority 0; policy drop; }")
	p.examine(t, "forward-policy error: forwarded packets are dropped by the policy of nft chain inet firewall through")
	p.a.Command(t, "nft", "add rule inet firewall through ip saddr 10.42.0.0/16 accept")
	p.examine(t)
	// Rules that reject, in each of the places where firewalls have them.
	const dropped = "forward-policy error: forwarded packets are dropped by a rule of "
	p.a.Command(t, "iptables", "-w", "-I", "FORWARD", "-j", "REJECT")
	p.examine(t, dropped+"iptables filter FORWARD: ")
	p.a.Command(t, "iptables", "-w", "-D", "FORWARD", "1")
	p.a.Command(t, "iptables", "-w", "-N", "LARIAT-USER")
	p.a.Command(t, "iptables", "-w", "-I", "FORWARD", "-j", "LARIAT-USER")
	p.a.Command(t, "iptables", "-w", "-A", "LARIAT-USER", "-s", "10.42.0.0/16", "-j", "DROP")
	p.examine(t, dropped+"iptables filter LARIAT-USER: ")
	p.a.Command(t, "iptables", "-w", "-F", "LARIAT-USER")
	// As firewalld has it.
	p.a.Command(t, "nft", `add table inet firewalld
add chain inet firewalld filter_FWD_public
add chain inet firewalld filter_FORWARD { type filter hook forward priority 10; policy accept; }
add rule inet firewalld filter_FORWARD ct state established,related accept
add rule inet firewalld filter_FORWARD jump filter_FWD_public
add rule inet firewalld filter_FORWARD reject with icmpx admin-prohibited`)
	r := p.examine(t, dropped+"nft chain inet firewalld filter_FORWARD: reject with icmpx admin-prohibited")
	if len(r.Findings) == 1 && !strings.Contains(r.Findings[0].Remedy,
		"firewall-cmd --permanent --zone=trusted --add-source=10.42.0.0/16") {
		t.Error(r.Findings[0].Remedy)
	}
	p.a.Command(t, "nft", "delete table inet firewalld")
	p.examine(t)
	if out := p.a.Command(t, "sh", "-c", "nft list tables; ip -o link"); strings.Contains(out, "lariat-doctor") ||
		strings.Contains(out, "lrtp") {
		t.Errorf("the check-up left something behind:\n%s", out)
	}
	// The older iptables, beside the newer.
	if _, err := exec.LookPath("iptables-legacy"); err != nil {
		t.Skip(err)
	}
	p.a.Command(t, "iptables-legacy", "-w", "-P", "FORWARD", "DROP")
	p.examine(t, "forward-policy error: forwarded packets are dropped by the policy of iptables (legacy) filter FORWARD")
	p.a.Command(t, "iptables-legacy", "-w", "-P", "FORWARD", "ACCEPT")
	p.a.Command(t, "iptables-legacy", "-w", "-A", "FORWARD", "-j", "REJECT")
	p.examine(t, dropped+"iptables (legacy) filter FORWARD: -A FORWARD -j REJECT")
}

func TestF137RealSysctls(t *testing.T) {
	p := newPair(t)
	p.respond(t, echo.Server{})
	p.sysctl(t, "net/ipv4/conf/all/rp_filter", "2")
	p.examine(t, "rp-filter warning: the reverse path check is loose (2)",
		// No manager runs here.
		"rules error: rules that keep containers, networks and the underlay apart are not as they should be: chain from-port")
	p.sysctl(t, "net/ipv4/conf/all/rp_filter", "0")
	p.sysctl(t, "net/ipv4/ip_forward", "0")
	p.examine(t, "forwarding error: the host does not forward IPv4")
}

func TestF137RealStaleDevice(t *testing.T) {
	p := newPair(t)
	p.respond(t, echo.Server{})
	p.a.Command(t, "ip", "link", "add", "vtep9", "type", "vxlan", "id", "9", "dstport", "4789", "local", "192.0.2.1",
		"nolearning")
	p.a.Command(t, "ip", "link", "set", "vtep9", "alias", "lariat:vxlan:gone")
	// somebody else's
	p.a.Command(t, "ip", "link", "add", "vtep10", "type", "vxlan", "id", "10", "dstport", "4790", "local", "192.0.2.1")
	p.examine(t, "devices error: device vtep9 is left over")
	p.a.Command(t, "ip", "link", "del", "vtep9")
	p.a.Command(t, "ip", "link", "set", "vtep1042", "mtu", "1300")
	p.examine(t, "devices error: device vtep1042 is not as it should be")
	p.a.Command(t, "ip", "link", "del", "vtep1042")
	p.examine(t, "devices error: device vtep1042 is missing",
		"tunnel error: there is no route of network overlay to host b")
}

func TestF137RealClockSkew(t *testing.T) {
	p := newPair(t)
	p.respond(t, echo.Server{Now: func() time.Time { return time.Now().Add(-90 * time.Second) }})
	p.examine(t, "clock error: the clock of host b is 1m30s behind this host's")
}

func TestF137RealBlockingRules(t *testing.T) {
	p := newPair(t)
	p.respond(t, echo.Server{})
	p.a.Command(t, "nft", "delete table inet lariat")
	p.snap.Networks = append(p.snap.Networks,
		metadata.Network{Name: "payroll", Subnets: []netip.Prefix{netip.MustParsePrefix("10.44.0.0/16")},
			Encapsulation: metadata.EncapIPsec})
	k, err := kernel.NewAt(p.a.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	const what = "rules error: rules that keep containers, networks and the underlay apart are "
	p.examine(t, what+"missing: chain clear-out, from-outside, from-port, guard, isolation, to-host, untracked")
	if _, err := kernel.Reconcile(t.Context(), k, want(p.snap, "a")); err != nil {
		t.Fatal(err)
	}
	p.examine(t)
	p.a.Command(t, "nft", "insert rule inet lariat clear-out accept")
	p.examine(t, what+"not as they should be: chain clear-out")
	p.a.Command(t, "nft", "flush chain inet lariat clear-out")
	p.examine(t, what+"not as they should be: chain clear-out")
	p.a.Command(t, "nft", "delete chain inet lariat clear-out")
	p.examine(t, what+"missing: chain clear-out")
	if _, err := kernel.Reconcile(t.Context(), k, want(p.snap, "a")); err != nil {
		t.Fatal(err)
	}
	p.sysctl(t, "net/ipv4/conf/"+p.devA+"/disable_policy", "1")
	p.examine(t, "fail-closed error: the kernel does not ask IPsec's policies on "+p.devA)
}
