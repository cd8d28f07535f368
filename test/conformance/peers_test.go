package conformance_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/probe"
	"github.com/lariat-net/lariat/test/lab"
)

// peers skips a test when the reference plugins, or programs that they call, are not there.
func peers(t *testing.T, programs ...string) {
	t.Helper()
	needs(t)
	dir := os.Getenv("LARIAT_PEERS")
	if dir == "" {
		bin, err := lab.Bin()
		must(t, err)
		dir = filepath.Join(bin, "peers")
	}
	if _, err := os.Stat(filepath.Join(dir, "bridge")); err != nil {
		t.Fatalf("the reference plugins are not built: make peers (%v)", err)
	}
	for _, p := range programs {
		if _, err := exec.LookPath(p); err == nil {
			continue
		}
		msg := "needs the program " + p
		if r := strings.Split(os.Getenv("REQUIRE"), ","); slices.Contains(r, p) || slices.Contains(r, "all") {
			t.Fatal(msg + ", and REQUIRE says that it must be here")
		}
		t.Skip(msg)
	}
}

// connect is an ADD that must work; the DEL at the test's end must too, and must leave the addresses free.
func connect(t *testing.T, h *lab.Host, network string, plugin object, call lab.Call,
	chained ...object) (*lab.Container, lab.Call) {
	t.Helper()
	c := container(t, h)
	conf, err := h.Conf(network, plugin, chained...)
	must(t, err)
	call.Conf = conf
	if err := c.Add(ctx, call); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Del(ctx, call); err != nil {
			t.Error(err)
		}
		if w := world(t, h); strings.Contains(w, c.ID) {
			t.Errorf("DEL left something of %s:\n%s", c.ID, w)
		}
	})
	return c, call
}

// inside returns what eth0 of a container has.
func inside(t *testing.T, c *lab.Container) (addrs []string, mtu int) {
	t.Helper()
	must(t, c.Do(func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		mtu = l.Attrs().MTU
		list, err := kernel.RetryDump(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_ALL) })
		for _, a := range list {
			addrs = append(addrs, a.IPNet.String())
		}
		return err
	}))
	return addrs, mtu
}

func holds(t *testing.T, h *lab.Host, network string, c *lab.Container) bool {
	t.Helper()
	list, err := h.Client().Allocations(ctx, network, false)
	must(t, err)
	return slices.ContainsFunc(list, func(a metadata.Allocation) bool {
		return a.ContainerID == c.ID &&
			a.Address == c.Addr(false)
	})
}

// TestF12_OurAddressesUnderTheirPlugins: each of them gives its container the address of the metadata
// service, and gives it back.
func TestF12_OurAddressesUnderTheirPlugins(t *testing.T) {
	peers(t)
	for _, tc := range []struct {
		name   string
		need   []probe.Feature
		subnet string
		plugin object
	}{
		{"bridge", nil, "10.50.0.0/24", object{"type": "bridge", "bridge": "br-rack", "isGateway": true}},
		{"ptp", nil, "10.51.0.0/24", object{"type": "ptp"}},
		{"macvlan", []probe.Feature{probe.Macvlan}, "10.52.0.0/24", object{"type": "macvlan", "master": "eth0"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			probe.Need(t, tc.need...)
			h := host(t, 0)
			tc.plugin["ipam"] = object{"type": ipam, "subnet": tc.subnet, "routes": []object{{"dst": "0.0.0.0/0"}}}
			a, call := connect(t, h, "under-"+tc.name, tc.plugin, lab.Call{})
			b, _ := connect(t, h, "under-"+tc.name, tc.plugin, lab.Call{})
			for _, c := range []*lab.Container{a, b} {
				if addrs, _ := inside(t, c); !slices.Contains(addrs, c.Addr(false).String()+"/24") {
					t.Errorf("eth0 has %v, not %s/24", addrs, c.Addr(false))
				}
				if !netip.MustParsePrefix(tc.subnet).Contains(c.Addr(false)) || !holds(t, h, "under-"+tc.name, c) {
					t.Errorf("%s is not held on the network", c.Addr(false))
				}
			}
			pings(t, a.Netns, b.Addr(false))
			if tc.name != "macvlan" { // whose containers cannot reach their own host, by design
				pings(t, h.Netns, a.Addr(false))
				gw, _ := netip.AddrFromSlice(a.Result.IPs[0].Gateway)
				if gw = gw.Unmap(); gw == a.Addr(false) || gw == b.Addr(false) {
					t.Errorf("the gateway's address %s is a container's too", gw)
				}
				pings(t, a.Netns, gw)
			}
			if err := a.Check(ctx, call); err != nil {
				t.Errorf("CHECK: %v", err)
			}
		})
	}
}

// TestF13_FlatL2: containers on the LAN itself, on two hosts, with addresses and the router from the network object.
func TestF13_FlatL2(t *testing.T) {
	peers(t)
	probe.Need(t, probe.Macvlan)
	host(t, 0)
	router, err := lab.NewNetns("router")
	must(t, err)
	t.Cleanup(func() { router.Remove() })
	must(t, cluster.Switch.Plug(router, "eth0", 1500, netip.MustParsePrefix("192.0.2.254/24")))
	beyond := netip.MustParseAddr("203.0.113.7")
	must(t, router.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		a, _ := netlink.ParseAddr(beyond.String() + "/32")
		return netlink.AddrAdd(lo, a)
	}))
	must(t, host(t, 0).Client().Put(ctx, metadata.KindNetwork, "lan",
		metadata.Network{Name: "lan", Encapsulation: metadata.EncapNone,
			Subnets:  []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")},
			Gateways: []netip.Addr{netip.MustParseAddr("192.0.2.254")}, Exclude: []string{"192.0.2.1-192.0.2.99"},
			BlockSizeV4: 28}))
	plugin := object{"type": "macvlan", "master": "eth0",
		"ipam": object{"type": ipam, "routes": []object{{"dst": "0.0.0.0/0"}}}}
	a, _ := connect(t, host(t, 0), "lan", plugin, lab.Call{})
	b, _ := connect(t, host(t, 1), "lan", plugin, lab.Call{})
	for _, c := range []*lab.Container{a, b} {
		if gw := c.Result.IPs[0].Gateway.String(); gw != "192.0.2.254" {
			t.Errorf("the gateway is %s, not the network's 192.0.2.254", gw)
		}
		if c.Addr(false).Less(netip.MustParseAddr("192.0.2.100")) || !holds(t, c.Host, "lan", c) {
			t.Errorf("%s is excluded, or not held", c.Addr(false))
		}
		pings(t, c.Netns, beyond)
	}
	pings(t, a.Netns, b.Addr(false))
	pings(t, b.Netns, a.Addr(false))
}

// TestF12_TheirAddressesUnderOurs: what host-local and static choose is announced, and reached from the other host.
func TestF12_TheirAddressesUnderOurs(t *testing.T) {
	peers(t)
	for _, tc := range []struct {
		name string
		ipam func(h *lab.Host) object
	}{
		{"host-local", func(h *lab.Host) object {
			return object{"type": "host-local", "dataDir": filepath.Join(h.Dir, "host-local"),
				"subnet": fmt.Sprintf("10.60.%d.0/24", h.Index)}
		}},
		{"static", func(h *lab.Host) object {
			return object{"type": "static", "addresses": []object{{"address": fmt.Sprintf("10.61.0.%d/24", h.Index+9)}}}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var all []*lab.Container
			for i := range 2 {
				h := host(t, i)
				c, call := connect(t, h, "overlay", object{"ipam": tc.ipam(h)}, lab.Call{})
				if !holds(t, h, "overlay", c) {
					t.Errorf("%s is not held", c.Addr(false))
				}
				if err := c.Check(ctx, call); err != nil {
					t.Errorf("CHECK: %v", err)
				}
				all = append(all, c)
			}
			pings(t, all[0].Netns, all[1].Addr(false))
			pings(t, all[1].Netns, all[0].Addr(false))
			pings(t, host(t, 0).Netns, all[1].Addr(false))
		})
	}
}

// TestF3_RepeatedADDWithAnotherIPAM: host-local refuses to answer twice, and that must cost the running
// container nothing.
func TestF3_RepeatedADDWithAnotherIPAM(t *testing.T) {
	peers(t)
	h := host(t, 0)
	dir := filepath.Join(h.Dir, "again")
	c, call := connect(t, h, "overlay",
		object{"ipam": object{"type": "host-local", "dataDir": dir, "subnet": "10.62.0.0/24"}}, lab.Call{})
	address := c.Addr(false)
	err := c.Add(ctx, call)
	t.Logf("the second ADD: %v", err)
	if _, err := os.Stat(filepath.Join(dir, "overlay", address.String())); err != nil {
		t.Errorf("host-local was told to free the address of a running container: %v", err)
	}
	if !holds(t, h, "overlay", c) {
		t.Errorf("%s is held no more", address)
	}
	pings(t, h.Netns, address)
}

// TestF7_GCReachesTheirIPAM: what host-local holds for containers that are gone is freed too.
func TestF7_GCReachesTheirIPAM(t *testing.T) {
	peers(t)
	h := host(t, 0)
	before := world(t, h)
	dir := filepath.Join(h.Dir, "gc")
	conf := configuration(h, vxlan, "1.1.0")
	conf["ipam"] = object{"type": "host-local", "dataDir": dir, "subnet": "10.63.0.0/24"}
	path := map[string]string{"CNI_PATH": cluster.Bin + "/peers"}
	if p := os.Getenv("LARIAT_PEERS"); p != "" {
		path["CNI_PATH"] = p
	}
	succeeds(t, h, vxlan, text(t, conf), environment("ADD", container(t, h), path))
	conf["cni.dev/valid-attachments"] = []object{}
	succeeds(t, h, vxlan, text(t, conf), environment("GC", nil, path))
	unchanged(t, h, before)
	left, err := filepath.Glob(filepath.Join(dir, "overlay", "10.63.*"))
	if err != nil || len(left) > 0 {
		t.Errorf("host-local still holds %v %v", left, err)
	}
}

// serve answers every connection to the container's port with words, until the test ends.
func serve(t *testing.T, c *lab.Container, port uint16, words string) {
	t.Helper()
	var l net.Listener
	must(t, c.Do(func() (err error) {
		l, err = net.Listen("tcp4", fmt.Sprint("0.0.0.0:", port))
		return err
	}))
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(conn, words)
			conn.Close()
		}
	}()
}

// ask connects from a namespace and returns what is said there.
func ask(t *testing.T, from lab.Netns, to netip.AddrPort) (string, error) {
	t.Helper()
	var said []byte
	err := from.Do(func() error {
		conn, err := net.DialTimeout("tcp", to.String(), 3*time.Second)
		if err != nil {
			return err
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(3 * time.Second))
		said, err = io.ReadAll(conn)
		return err
	})
	return string(said), err
}

// TestF9_F12_Portmap: a published port is reached from another host, from the host itself, and by the
// container's own way out and back in.
func TestF9_F12_Portmap(t *testing.T) {
	for _, backend := range []struct{ name, program string }{{"nftables", "nft"}, {"iptables", "iptables"}} {
		t.Run(backend.name, func(t *testing.T) {
			peers(t, backend.program)
			a, b := host(t, 0), host(t, 1)
			call := lab.Call{Capabilities: object{"portMappings": []object{{"hostPort": 8080, "containerPort": 80,
				"protocol": "tcp"}}}}
			c, call := connect(t, a, "overlay", nil, call, object{"type": "portmap", "backend": backend.name, "snat": true,
				"capabilities": map[string]bool{"portMappings": true}})
			serve(t, c, 80, "hello")
			other, _ := connect(t, b, "overlay", nil, lab.Call{})
			published := netip.AddrPortFrom(a.Addr.Addr(), 8080)
			for _, from := range []struct {
				name string
				ns   lab.Netns
			}{{"another host", b.Netns}, {"a container on another host", other.Netns}, {"the host itself", a.Netns},
				{"F9: the container itself", c.Netns}} {
				if said, err := ask(t, from.ns, published); err != nil || said != "hello" {
					t.Errorf("%s heard %q: %v", from.name, said, err)
				}
			}
			if err := c.Check(ctx, call); err != nil {
				t.Errorf("CHECK: %v", err)
			}
		})
	}
}

// TestF12_Bandwidth: the limit is felt, and CHECK passes.
func TestF12_Bandwidth(t *testing.T) {
	peers(t)
	probe.Need(t, probe.IFB)
	h := host(t, 0)
	// 8 Mbit/s and a burst of a tenth of a second: 1 MiB takes a second less that.
	c, call := connect(t, h, "overlay", nil, lab.Call{}, object{"type": "bandwidth", "ingressRate": 8000000,
		"ingressBurst": 800000, "egressRate": 8000000, "egressBurst": 800000})
	if err := c.Check(ctx, call); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	short, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	took, err := h.Transfer(short, c.Netns, c.Addr(false), 1<<20)
	if err != nil || took < 500*time.Millisecond {
		t.Errorf("1 MiB at 1 MB/s took %s: %v", took, err)
	}
}

// TestF12_Tuning: MTU, MAC and sysctls that the next plugin changes are its own business, and CHECK knows.
func TestF12_Tuning(t *testing.T) {
	peers(t)
	h := host(t, 0)
	c, call := connect(t, h, "overlay", nil, lab.Call{}, object{"type": "tuning", "mtu": 1400, "mac": "0a:77:77:77:77:77",
		"sysctl": map[string]string{"net.ipv4.conf.eth0.arp_filter": "1"}})
	if _, mtu := inside(t, c); mtu != 1400 {
		t.Errorf("the MTU is %d, not tuning's 1400", mtu)
	}
	if err := c.Check(ctx, call); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	pings(t, host(t, 1).Netns, c.Addr(false))
}

// TestF12_Firewall: its rules, and ours, let packets of the container pass.
func TestF12_Firewall(t *testing.T) {
	peers(t, "iptables")
	h := host(t, 0)
	c, call := connect(t, h, "overlay", nil, lab.Call{}, object{"type": "firewall", "backend": "iptables"})
	if err := c.Check(ctx, call); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	pings(t, host(t, 1).Netns, c.Addr(false))
	pings(t, c.Netns, host(t, 1).Addr.Addr())
}

// TestF12_WholeChain: what a distribution's default list has, all at once.
func TestF12_WholeChain(t *testing.T) {
	peers(t, "iptables")
	h := host(t, 0)
	call := lab.Call{Capabilities: object{"portMappings": []object{{"hostPort": 8081, "containerPort": 80,
		"protocol": "tcp"}}}}
	c, call := connect(t, h, "overlay", nil, call,
		object{"type": "portmap", "capabilities": map[string]bool{"portMappings": true}}, object{"type": "firewall"},
		object{"type": "tuning"})
	serve(t, c, 80, "chain")
	if said, err := ask(t, host(t, 1).Netns, netip.AddrPortFrom(h.Addr.Addr(), 8081)); err != nil || said != "chain" {
		t.Errorf("heard %q: %v", said, err)
	}
	if err := c.Check(ctx, call); err != nil {
		t.Errorf("CHECK: %v", err)
	}
}
