package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/doctor/echo"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// healthy is a host of three where all is well; each case spoils one thing.
func healthy(t testing.TB) *Facts {
	t.Helper()
	b, err := os.ReadFile("../../helpers/lariat/testdata/three.json")
	if err != nil {
		t.Fatal(err)
	}
	var s metadata.Snapshot
	if err := json.Unmarshal(b, &s); err != nil {
		t.Fatal(err)
	}
	pfx := netip.MustParsePrefix
	f := &Facts{Self: "h1",
		Metadata: &Metadata{Socket: "/run/lariat/metadata.sock", Snapshot: &s, Store: &Store{Size: 1 << 20, Quota: 1 << 31},
			Status: []metadata.NetworkStatus{
				{Network: "overlay", Ready: true,
					Usage: []metadata.SubnetUsage{{Subnet: pfx("10.42.0.0/16"), Blocks: 4, BlocksFree: 1020, Used: 3, Free: 65000}}}}},
		Manager: &Manager{Socket: "/run/lariat/network-manager.sock", Concerns: []Concern{{Name: "overlay", OK: true}},
			StateDir: "/var/lib/lariat"},
		Own:    []metadata.Allocation{{StateDir: "/var/lib/lariat"}},
		Living: []metadata.Allocation{{StateDir: "/var/lib/lariat"}},
		Kernel: &Kernel{
			Sysctls: map[string]string{"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1",
				"net/ipv4/conf/all/rp_filter": "1"},
			Links:   map[string]Link{"eth0": {MTU: 1500, Up: true, Addrs: []netip.Prefix{pfx("192.0.2.1/24")}}},
			Devices: []Device{{Name: "vtep1042", Want: "vni 1042", Have: "vni 1042"}},
			Forward: []ForwardChain{{Name: "iptables filter FORWARD", Passes: true}},
		},
		Features: []Feature{{Name: "vxlan", OK: true}}, Disagreements: []string{},
		Residents: []Resident{{Veth: "lrtabc", Address: netip.MustParseAddr("10.42.1.5"), Answers: true}},
	}
	for i, addr := range []string{"192.0.2.2", "198.51.100.3"} {
		f.Peers = append(f.Peers, Peer{Host: fmt.Sprintf("h%d", i+2), Addr: netip.MustParseAddr(addr), RTT: time.Millisecond,
			WantMTU: 1500, MTU: 1500,
			Overlay: []Overlay{{Network: "overlay", Port: 4789, Gateway: netip.MustParseAddr(fmt.Sprintf("10.42.%d.1", i+2)),
				Ours: netip.MustParseAddr("10.42.1.1"), Source: netip.MustParseAddr("10.42.1.1")}}})
	}
	return f
}

func TestF137HealthyHostHasNoFinding(t *testing.T) {
	r := Check(healthy(t))
	if len(r.Findings)+len(r.Skipped) != 0 || len(r.Passed) != len(checks) || r.ExitStatus() != 0 {
		t.Errorf("%+v", r)
	}
}

func TestF137Findings(t *testing.T) {
	silent := fmt.Errorf("ask: %w", echo.ErrSilent)
	refused := fmt.Errorf("ask: %w", echo.ErrRefused)
	lost := errors.New("no answer")
	addr, pfx := netip.MustParseAddr, netip.MustParsePrefix
	for _, tc := range []struct {
		name   string
		spoil  func(f *Facts)
		want   string // check severity: what … remedy
		remedy string
	}{
		{"metadata socket is absent",
			func(f *Facts) { f.Metadata = &Metadata{Socket: "/x", Err: fmt.Errorf("dial: %w", fs.ErrNotExist)} },
			"metadata error: the metadata service is not running: there is no socket /x", "systemctl start lariat-metadata"},
		{"metadata socket is dead", func(f *Facts) { f.Metadata = &Metadata{Socket: "/x", Err: syscall.ECONNREFUSED} },
			"metadata error: the metadata service has died", "systemctl start"},
		{"metadata socket is not for us", func(f *Facts) { f.Metadata = &Metadata{Socket: "/x", Err: syscall.EACCES} },
			"metadata error: the metadata service's socket /x is not open to this user", "as root"},
		{"metadata is a file", func(f *Facts) { f.Metadata = &Metadata{Socket: "/x", Err: syscall.ENOTSOCK} },
			"metadata error: /x is not a socket", "remove the file"},
		{"metadata hangs", func(f *Facts) { f.Metadata = &Metadata{Socket: "/x", Err: context.DeadlineExceeded} },
			"metadata error: the metadata service on /x does not answer in time", "majority"},
		{"metadata has no store", func(f *Facts) {
			f.Metadata = &Metadata{Socket: "/x", Err: metadata.Errorf(metadata.CodeUnavailable, "no leader")}
		}, "metadata error: the metadata service has no store: no leader", "etcdctl endpoint health"},
		{"store unhealthy", func(f *Facts) { f.Metadata.Store.Reason = "no leader" },
			"store error: the store is not healthy: no leader", "journalctl"},
		{"store fills", func(f *Facts) { f.Metadata.Store.Size = f.Metadata.Store.Quota / 100 * 85 },
			"store warning: the store is 85 % full (1.7 GiB of 2.0 GiB)", "defrag"},
		{"store is full", func(f *Facts) { f.Metadata.Store.Size = f.Metadata.Store.Quota },
			"store error: the store is 100 % full", "defrag"},
		{"an entry cannot be used", func(f *Facts) {
			f.Metadata.Snapshot.Problems = []metadata.Problem{{Key: "blocks/overlay/0.0.0.0/0", What: "it lies outside"}}
			f.Metadata.Problems = append(f.Metadata.Problems, f.Metadata.Snapshot.Problems...)
		}, "entries error: entry blocks/overlay/0.0.0.0/0 is left out: it lies outside",
			"lariat entry remove blocks/overlay/0.0.0.0/0"},
		{"an address table cannot be used", func(f *Facts) {
			f.Metadata.Problems = []metadata.Problem{{Key: "addresses/overlay/10.42.0.0/26", What: "boom"}}
		},
			"entries error: entry addresses/overlay/10.42.0.0/26 is left out: boom", "first stop all containers"},
		{"manager stopped", func(f *Facts) { f.Manager = &Manager{Err: fs.ErrNotExist} },
			"manager error: the network manager is not running", "systemctl start lariat-network-manager"},
		{"plugins keep their records elsewhere", func(f *Facts) {
			f.Own = []metadata.Allocation{{StateDir: "/var/lib/lariat"}, {StateDir: "/srv/cni"}, {StateDir: "/srv/cni"}}
		}, "journal warning: plugins with the stateDir /srv/cni gave 2 of this host's addresses, and the network " +
			"manager looks in /var/lib/lariat alone", "--state-dir"},
		{"a container that the service does not know", func(f *Facts) {
			f.Living = append(f.Living, metadata.Allocation{Network: "overlay", ContainerID: "lost", IfName: "eth0",
				Address: netip.MustParseAddr("10.42.1.99")})
		}, "attachments error: the metadata service does not know 1 address of this host, and may give them to others: " +
			"container lost has 10.42.1.99 of network overlay",
			"start lariat-network-manager"},
		{"a container of a network that is gone", func(f *Facts) {
			f.Living = append(f.Living, metadata.Allocation{Network: "gone", ContainerID: "lost", IfName: "eth0",
				Address: netip.MustParseAddr("10.99.1.99")})
		}, "attachments error: container lost has 10.99.1.99 of network gone, which is not in the metadata",
			"lariat network create gone"},
		{"two containers with one address", func(f *Facts) {
			c := f.Metadata.Snapshot.Containers[0]
			f.Living = append(f.Living, metadata.Allocation{Network: "overlay", ContainerID: "lost", IfName: "eth0",
				Address: c.Holds()[0]})
		}, "attachments error: container lost has ", "restart one of the two"},
		{"manager is stuck", func(f *Facts) { f.Manager.Concerns[0] = Concern{Name: "overlay", Error: "boom"} },
			"manager error: the network manager cannot keep overlay true: boom", "journalctl"},
		{"dead host", func(f *Facts) { f.Metadata.Snapshot.Hosts[2].Live = false },
			"hosts warning: host h3 does not answer: its metadata service has not been heard of; it has 3 blocks and 2 " +
				"containers", "lariat host remove h3"},
		{"not in the metadata", func(f *Facts) { f.Self = "h9"; f.Kernel, f.Peers = nil, nil },
			"hosts error: this host is not in the metadata", "restart lariat-metadata"},
		{"duplicate host", func(f *Facts) { f.Metadata.Snapshot.Hosts[1].MachineID = f.Metadata.Snapshot.Hosts[0].MachineID },
			"duplicates error: hosts h1 and h2 have the same machine id", "systemd-machine-id-setup"},
		{"duplicate underlay address",
			func(f *Facts) { f.Metadata.Snapshot.Hosts[2].Underlay = f.Metadata.Snapshot.Hosts[1].Underlay },
			"duplicates error: hosts h2 and h3 have the same underlay address 192.0.2.2", "lariat host remove"},
		{"duplicate MAC", func(f *Facts) { f.Metadata.Snapshot.Hosts[2].MAC = f.Metadata.Snapshot.Hosts[1].MAC },
			"duplicates error: hosts h2 and h3 have the same overlay MAC 0e:00:c0:00:02:02", "restart lariat-metadata"},
		{"block claimed twice", func(f *Facts) {
			b := f.Metadata.Snapshot.Blocks[0]
			b.Host, b.Gateway = "h2", netip.Addr{}
			f.Metadata.Snapshot.Blocks = append(f.Metadata.Snapshot.Blocks, b)
		}, "duplicates error: 10.42.1.0/26 is claimed by hosts h1 and h2", "backup"},
		{"bad network", func(f *Facts) { f.Metadata.Snapshot.Networks[1].VNI = 1 << 24 },
			"networks error: network overlay: vni 16777216", "lariat network update overlay"},
		{"one VNI twice", func(f *Facts) { f.Metadata.Snapshot.Networks[1].VNI = 1043 },
			"networks error: networks backend and overlay have the same VNI 1043", "--vni"},
		{"subnets overlap", func(f *Facts) { f.Metadata.Snapshot.Networks[1].Subnets[0] = pfx("10.43.128.0/17") },
			"networks error: subnet 10.43.0.0/16 of network backend and subnet 10.43.128.0/17 of network overlay overlap",
			"another subnet"},
		{"subnet holds the underlay", func(f *Facts) {
			f.Metadata.Snapshot.Hosts[2].Underlay[0].Address = pfx("10.42.9.9/24")
			f.Peers = f.Peers[:1]
		}, "networks error: subnet 10.42.0.0/16 overlaps the underlay 10.42.9.9/24 of host h3", "another subnet"},
		{"a link with a network's addresses", func(f *Facts) {
			f.Metadata.Snapshot.Hosts[2].Foreign = []metadata.Foreign{{Prefix: netip.MustParsePrefix("10.42.0.0/24"),
				Device: "docker0"}}
		}, "networks error: 10.42.0.0/24 dev docker0 is a link of host h3, and network overlay has its addresses",
			"another subnet"},
		{"a container that is silent", func(f *Facts) { f.Residents[0].Answers = false },
			"containers error: container  does not answer at its address 10.42.1.5", "look inside"},
		{"an address that the service does not know",
			func(f *Facts) { f.Disagreements = []string{"container c0ffee/eth0 of network overlay is connected"} },
			"agreement error: container c0ffee/eth0 of network overlay is connected", "network manager"},
		{"no address left", func(f *Facts) {
			f.Metadata.Status[0].Usage[0] = metadata.SubnetUsage{Subnet: pfx("10.42.0.0/24"), Used: 250}
			f.Metadata.Status[0].Ready = false
		}, "addresses error: subnet 10.42.0.0/24 has no address left", "lariat ip list"},
		{"few addresses left", func(f *Facts) {
			f.Metadata.Status[0].Usage[0] = metadata.SubnetUsage{Subnet: pfx("10.42.0.0/24"), Used: 240, Free: 10}
		}, "addresses warning: subnet 10.42.0.0/24 is 96 % full for this host: 10 of 250 addresses are left", "wider"},
		{"no block left", func(f *Facts) { f.Metadata.Status[0].Usage[0].BlocksFree = 0 },
			"addresses warning: subnet 10.42.0.0/16 has no free block left", "wider"},
		{"no ADD possible", func(f *Facts) {
			f.Metadata.Status[0].Ready, f.Metadata.Status[0].Reason = false,
				"device missing"
		},
			"addresses error: no container can be attached to network overlay on this host: device missing", "reason"},
		{"missing feature", func(f *Facts) {
			f.Features[0] = Feature{Name: "vxlan", Detail: "operation not supported", Need: "hosts cannot tunnel",
				Remedy: "modprobe vxlan"}
		}, "features error: the kernel cannot do vxlan (operation not supported), without which hosts cannot tunnel",
			"modprobe vxlan"},
		{"missing feature that a network needs for IPv6",
			func(f *Facts) { f.Features[0] = Feature{Name: "ipv6", IPv6: true} }, "features error: the kernel cannot do ipv6",
			""},
		{"ip_forward off", func(f *Facts) { f.Kernel.Sysctls["net/ipv4/ip_forward"] = "0" },
			"forwarding error: the host does not forward IPv4", "sysctl -w net.ipv4.ip_forward=1"},
		{"IPv6 forwarding off", func(f *Facts) { f.Kernel.Sysctls["net/ipv6/conf/all/forwarding"] = "0" },
			"forwarding error: the host does not forward IPv6", "sysctl -w net.ipv6.conf.all.forwarding=1"},
		{"rp_filter loose", func(f *Facts) { f.Kernel.Sysctls["net/ipv4/conf/all/rp_filter"] = "2" },
			"rp-filter warning: the reverse path check is loose (2)", "rp_filter=0"},
		{"port believes advertisements", func(f *Facts) {
			f.Kernel.Endpoints = []delta.EndpointFault{lacking("sysctl net/ipv6/conf/lrtx/accept_ra=0")}
		},
			"ports error: the port of container 0123456789ab lacks sysctl net/ipv6/conf/lrtx/accept_ra=0",
			"start lariat-network-manager"},
		{"port without routes", func(f *Facts) {
			f.Kernel.Endpoints = []delta.EndpointFault{lacking("link  lrtx up", "route 10.42.0.5/32 dev lrtx proto 76")}
		}, "ports error: the port of container 0123456789ab lacks link  lrtx up; route 10.42.0.5/32 dev lrtx proto 76",
			"NetworkManager"},
		{"many ports with loose checks", func(f *Facts) {
			f.Kernel.Endpoints = slices.Repeat([]delta.EndpointFault{lacking("sysctl net/ipv4/conf/lrtx/rp_filter=1")}, 9)
		},
			"ports error: 9 containers' ports are not what they should be: the first lacks sysctl " +
				"net/ipv4/conf/lrtx/rp_filter=1", "start lariat-network-manager"},
		{"FORWARD DROP", func(f *Facts) { f.Kernel.Forward[0].Passes = false },
			"forward-policy error: forwarded packets are dropped by the policy of iptables filter FORWARD",
			"start lariat-network-manager"},
		{"a firewall's own DROP", func(f *Facts) {
			f.Kernel.Forward[0] = ForwardChain{Name: "nft chain inet firewall forward", Both: true}
		},
			"forward-policy error: forwarded packets are dropped by the policy of nft chain inet firewall forward",
			"add accept rules"},
		{"underlay address gone", func(f *Facts) { f.Kernel.Links["eth0"] = Link{MTU: 1500, Up: true} },
			"underlay error: the underlay address 192.0.2.1 of this host is on none", "put the address back"},
		{"underlay moved", func(f *Facts) {
			f.Kernel.Links["bond0"] = f.Kernel.Links["eth0"]
			delete(f.Kernel.Links,
				"eth0")
		},
			"underlay warning: the underlay address 192.0.2.1 is on bond0, the metadata says eth0", "restart"},
		{"underlay down", func(f *Facts) { l := f.Kernel.Links["eth0"]; l.Up = false; f.Kernel.Links["eth0"] = l },
			"underlay error: the underlay's interface eth0 is down", "ip link set eth0 up"},
		{"underlay MTU changed", func(f *Facts) { l := f.Kernel.Links["eth0"]; l.MTU = 9000; f.Kernel.Links["eth0"] = l },
			"underlay warning: the MTU of eth0 is 9000, the metadata says 1500", "manager"},
		{"MTU too large for the underlay", func(f *Facts) { f.Metadata.Snapshot.Networks[1].MTU = 1480 },
			"underlay error: network overlay has an MTU of 1480, which with 50 octets",
			"lariat network update overlay --mtu 1450"},
		{"stale device", func(f *Facts) { f.Kernel.Devices = append(f.Kernel.Devices, Device{Name: "vtep9", Have: "vni 9"}) },
			"devices error: device vtep9 is left over", "ip link del vtep9"},
		{"device gone", func(f *Facts) { f.Kernel.Devices[0].Have = "" }, "devices error: device vtep1042 is missing",
			"start lariat-network-manager"},
		{"device with wrong parameters", func(f *Facts) { f.Kernel.Devices[0].Have = "vni 1042 mtu 9" },
			"devices error: device vtep1042 is not as it should be", "plan --diff"},
		{"host unreachable", func(f *Facts) { f.Peers[1].Echo, f.Peers[1].Overlay[0].Err = silent, lost },
			"reach error: host h3 does not answer over the underlay", "UDP 4788"},
		{"manager of the peer stopped", func(f *Facts) { f.Peers[1].Echo = refused },
			"reach warning: host h3 is reached, but its network manager does not answer", "start lariat-network-manager there"},
		{"probe port blocked only", func(f *Facts) { f.Peers[1].Echo = silent },
			"reach warning: host h3 is reached through the tunnel, but not on UDP 4788", "open UDP 4788"},
		{"UDP port blocked", func(f *Facts) { f.Peers[0].Overlay[0].Err = lost },
			"tunnel error: UDP 4789 is blocked to or from host h2", "open UDP 4789"},
		{"route missing", func(f *Facts) {
			f.Peers[0].Overlay[0].Err, f.Peers[0].Overlay[0].Source = lost,
				addr("192.0.2.1")
		}, "tunnel error: there is no route of network overlay to host h2", "plan --diff"},
		{"MTU too small on the way", func(f *Facts) { f.Peers[1].MTU = 1400 },
			"mtu error: packets of 1500 octets, as the tunnels make them, do not come through to host h3 and back; the " +
				"largest that do have 1400", "--mtu 1350"},
		{"clock of another host", func(f *Facts) { f.Peers[1].Skew = -5 * time.Second },
			"clock warning: the clock of host h3 is 5s behind this host's", "timedatectl"},
		{"clock of this host", func(f *Facts) { f.Peers[0].Skew, f.Peers[1].Skew = time.Hour, time.Hour },
			"clock error: this host's clock is off by 1h0m0s against every other", "timedatectl"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := healthy(t)
			tc.spoil(f)
			r := Check(f)
			var got []string
			for _, x := range r.Findings {
				line := fmt.Sprintf("%s %s: %s", x.Check, x.Severity, x.What)
				got = append(got, line)
				if strings.HasPrefix(line, tc.want) {
					if !strings.Contains(x.Remedy, tc.remedy) {
						t.Errorf("remedy %q does not say %q", x.Remedy, tc.remedy)
					}
					if x.Where == "" {
						t.Error("it does not say where")
					}
					if want := map[Severity]int{Error: 1}[x.Severity]; x.Severity == Error && r.ExitStatus() != want {
						t.Errorf("exit status %d", r.ExitStatus())
					}
				}
			}
			if len(got) != 1 || !strings.HasPrefix(got[0], tc.want) {
				t.Errorf("got %q, want one finding: %s", got, tc.want)
			}
		})
	}
}

func TestF137DoubtIsNoFinding(t *testing.T) {
	f := healthy(t)
	f.Peers[0].Skew, f.Peers[0].RTT = 3*time.Second, 4*time.Second // the way there took long
	f.Kernel.Forward = append(f.Kernel.Forward, ForwardChain{Name: "x", Both: true, Passes: true})
	if r := Check(f); len(r.Findings) != 0 {
		t.Errorf("%+v", r.Findings)
	}
}

func TestF137FeatureThatNobodyNeedsIsNoFinding(t *testing.T) {
	f := healthy(t)
	f.Features[0] = Feature{Name: "ipv6", IPv6: true}
	f.Metadata.Snapshot.Networks = f.Metadata.Snapshot.Networks[1:] // IPv4 alone
	f.Metadata.Snapshot.Blocks, f.Metadata.Snapshot.HostRoutes = nil, nil
	if r := Check(f, "features"); len(r.Findings) != 0 {
		t.Errorf("%+v", r.Findings)
	}
}

func TestF137WhatWasNotLookedAtIsNotFine(t *testing.T) {
	r := Check(&Facts{Unavailable: map[string]string{"kernel": "not root"}})
	if len(r.Passed) != 0 || len(r.Skipped) != len(checks) || r.ExitStatus() != 2 {
		t.Errorf("%+v", r)
	}
	for _, s := range r.Skipped {
		if s.Why == "" || s.Check == "devices" && s.Why != "not root" {
			t.Errorf("%+v", s)
		}
	}
	f := healthy(t)
	f.Peers[1].MTUErr, f.Peers[1].MTU = errors.New("lost"), 0
	if r := Check(f); r.ExitStatus() != 2 || len(r.Skipped) != 1 || r.Skipped[0].Check != "mtu" {
		t.Errorf("%+v", r)
	}
	if r := Check(f, "mtu", "clock"); len(r.Skipped) != 1 || len(r.Passed) != 1 {
		t.Errorf("chosen checks: %+v", r)
	}
}

// TestWhatIsUnderWayIsNoFault: a finding counts when two looks in a row make it.
func TestWhatIsUnderWayIsNoFault(t *testing.T) {
	fine := func(*Facts) {}
	gone := func(name string) func(*Facts) {
		return func(f *Facts) { f.Kernel.Devices = append(f.Kernel.Devices, Device{Name: name, Want: "vxlan id 7"}) }
	}
	differs := func(names ...string) func(*Facts) {
		return func(f *Facts) { f.Disagreements = append(f.Disagreements, names...) }
	}
	for _, tt := range []struct {
		name  string
		looks []func(*Facts)
		want  string // what the findings are about
	}{
		{"nothing", []func(*Facts){fine}, ""},
		{"a network was made a moment ago", []func(*Facts){gone("vtep7"), fine}, ""},
		{"a device is missing", []func(*Facts){gone("vtep7"), gone("vtep7")}, "device vtep7"},
		{"one network after the other", []func(*Facts){gone("vtep7"), gone("vtep8"), fine}, ""},
		{"it begins meanwhile", []func(*Facts){gone("vtep7"), gone("vtep8"), gone("vtep8")}, "device vtep8"},
		{"containers come and go", []func(*Facts){differs("a", "b"), differs("c"), differs("d")}, ""},
		{"a container stays wrong", []func(*Facts){differs("a", "b"), differs("b", "c"), differs("b", "d")}, "host h1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				made := 0
				r := checkUp(t.Context(), func(context.Context) *Facts {
					f := healthy(t)
					tt.looks[made](f)
					made++
					return f
				}, []string{"devices", "agreement"})
				var got []string
				for _, f := range r.Findings {
					got = append(got, f.Where)
				}
				if strings.Join(got, " ") != tt.want || made != len(tt.looks) {
					t.Errorf("after %d looks: %+v", made, r)
				}
				if len(r.Passed)+len(got) != 2 {
					t.Errorf("each check passes or finds something: %+v", r)
				}
			})
		})
	}
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), settle/2)
		defer cancel()
		r := checkUp(ctx, func(context.Context) *Facts {
			f := healthy(t)
			gone("vtep7")(f)
			return f
		}, nil)
		if len(r.Findings) != 1 {
			t.Errorf("there was no time for a second look, and the first found: %+v", r.Findings)
		}
	})
}

func TestF137ManyPeersMakeOneFinding(t *testing.T) {
	f := healthy(t)
	p := f.Peers[0]
	f.Peers = nil
	for i := range 40 {
		p.Host, p.Echo = fmt.Sprintf("n%d", i), echo.ErrSilent
		p.Overlay = []Overlay{{Network: "overlay", Port: 4789, Err: errors.New("lost"), Source: p.Overlay[0].Ours,
			Ours: p.Overlay[0].Ours}}
		f.Peers = append(f.Peers, p)
	}
	r := Check(f, "reach", "tunnel")
	if len(r.Findings) != 1 || !strings.HasPrefix(r.Findings[0].What, "40 hosts do not answer") {
		t.Errorf("%+v", r.Findings)
	}
}

func lacking(what ...string) delta.EndpointFault {
	return delta.EndpointFault{Want: delta.VethInfo{Name: "lrtx",
		Alias: delta.EndpointAlias{ContainerID: "0123456789abcdef"}}, Lacks: what}
}
