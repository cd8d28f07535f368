package failure_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/lariat-net/lariat/pkg/certs"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/probe"
	"github.com/lariat-net/lariat/test/conformance/cnirun"
	"github.com/lariat-net/lariat/test/lab"
)

func TestMain(m *testing.M) { lab.Main(watched{m}) }

// watched fails the run when the sentinel heard what must not be heard, in whichever test.
type watched struct{ *testing.M }

// Run implements what lab.Main wants.
func (w watched) Run() int {
	code := w.M.Run()
	if sentinel == nil {
		return code
	}
	if err := sentinel.Close(); err != nil {
		fmt.Fprintln(os.Stderr, "FAIL: while the tests ran,", err)
		return max(code, 1)
	}
	return code
}

var (
	ctx     = context.Background()
	cluster *lab.Cluster
	// sentinel listens on the underlay, as a machine that is no host.
	sentinel *lab.Sentinel
	once     sync.Once
)

// start makes three hosts that the tests share. Each keeps a member of the store, so that any one may be lost.
func start(t testing.TB) *lab.Cluster {
	t.Helper()
	probe.Need(t, probe.UserNS, probe.Veth, probe.Bridge, probe.VXLAN, probe.NexthopObjects, probe.Nft, probe.NftFib,
		probe.NftNAT, probe.IPv6)
	once.Do(func() {
		c, err := lab.New(lab.Options{Hosts: 3, Manager: []string{"--interval", "1s", "--grace", "0s"}})
		must(t, err)
		_, err = certs.Init(pki(c), "lab", time.Now())
		must(t, err)
		for _, h := range c.Hosts {
			_, err := certs.Host(pki(c), certs.Request{Name: h.Name, IPs: []netip.Addr{h.Addr.Addr()}}, time.Now())
			must(t, err)
		}
		cluster = c
		errs := make(chan error)
		for _, h := range c.Hosts { // at once: one member alone waits for the others
			go func() { errs <- startMetadata(c, h) }()
		}
		for range c.Hosts {
			must(t, <-errs)
		}
		must(t, c.Hosts[0].Client().Put(ctx, metadata.KindNetwork, "overlay",
			metadata.Network{Name: "overlay", Encapsulation: metadata.EncapVXLAN, VNI: 1042, HostNAT: true,
				// a second block, claimed in the middle of a test, would look like something left over
				BlockSizeV4: 18, BlockSizeV6: 114,
				Subnets: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("fd42::/48")}}))
		for _, h := range c.Hosts {
			must(t, h.StartManager(ctx))
		}
		for _, h := range c.Hosts {
			eventually(t, 10*time.Second, func() error {
				return h.Do(func() error { _, err := netlink.LinkByName("vtep1042"); return err })
			})
			eventually(t, 20*time.Second, func() error {
				v, err := h.Client().View(ctx)
				if err == nil && len(v.Blocks) < 6 {
					err = fmt.Errorf("%d blocks of 6", len(v.Blocks))
				}
				return errors.Join(err, h.Settled(ctx))
			})
		}
		s, err := lab.NewSentinel(ctx, c, "sentinel", netip.MustParseAddr("192.0.2.250"))
		must(t, err)
		sentinel = s
	})
	if cluster == nil {
		t.Fatal("the cluster did not start")
	}
	return cluster
}

func pki(c *lab.Cluster) string { return filepath.Join(c.Dir, "certs") }

// startMetadata starts a host's service with its member of the store.
func startMetadata(c *lab.Cluster, h *lab.Host) (err error) {
	var members []string
	for _, x := range c.Hosts {
		members = append(members, fmt.Sprintf("%s=https://%s:2380", x.Name, x.Addr.Addr()))
	}
	h.Metadata, err = h.Netns.Start(ctx, h.Dir, nil, filepath.Join(c.Bin, "lariat-metadata"), "--host-name", h.Name,
		"--socket", h.Socket(), "--underlay", h.Addr.String(),
		"--machine-id-file", filepath.Join(h.Dir, "machine-id"), "--boot-id-file", filepath.Join(h.Dir, "boot-id"),
		"--data-dir", filepath.Join(h.Dir, "etcd"),
		"--initial-cluster", strings.Join(members, ","), "--listen-peer", fmt.Sprintf("https://%s:2380", h.Addr.Addr()),
		"--listen-client", fmt.Sprintf("https://%s:2379", h.Addr.Addr()),
		"--etcd-ca", filepath.Join(pki(c), certs.CACert), "--etcd-cert", filepath.Join(pki(c), h.Name+".crt"), "--etcd-key",
		filepath.Join(pki(c), h.Name+".key"))
	return err
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually asks until there is no error.
func eventually(t testing.TB, limit time.Duration, f func() error) {
	t.Helper()
	deadline := time.After(limit)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Errorf("still, after %s: %v", limit, err)
			return
		}
	}
}

// need skips a test that calls a program which is not installed, or fails it where REQUIRE names the program.
func need(t *testing.T, program string) {
	t.Helper()
	if _, err := exec.LookPath(program); err == nil {
		return
	}
	msg := "needs the program " + program
	if r := strings.Split(os.Getenv("REQUIRE"), ","); slices.Contains(r, program) || slices.Contains(r, "all") {
		t.Fatal(msg + ", and REQUIRE says that it must be here")
	}
	t.Skip(msg)
}

var serial int

func container(t testing.TB, h *lab.Host) *lab.Container {
	t.Helper()
	serial++
	c, err := h.NewContainer(fmt.Sprint("c", serial))
	must(t, err)
	t.Cleanup(func() { c.Netns.Remove() })
	return c
}

// call is lariat-vxlan as a runtime calls it for a container.
func call(c *lab.Container, verb string) cnirun.Call {
	return cnirun.Call{
		Exe: filepath.Join(cluster.Bin, "lariat-vxlan"),
		Env: map[string]string{"CNI_COMMAND": verb, "CNI_CONTAINERID": c.ID, "CNI_NETNS": c.Path, "CNI_IFNAME": "eth0",
			"CNI_PATH": cluster.Bin},
		Conf: conf(c.Host, c.Host.StateDir(), ""),
	}
}

// conf is a configuration; more stands at its end, beginning with a comma.
func conf(h *lab.Host, stateDir, more string) string {
	return fmt.Sprintf(`{"cniVersion":"1.1.0","name":"overlay","type":"lariat-vxlan","socket":%q,"managerSocket":%q,"stateDir":%q,"ipam":{"type":"lariat-ipam"}%s}`,
		h.Socket(), h.ManagerSocket(), stateDir, more)
}

// gc is a call of GC with a list of what lives.
func gc(h *lab.Host, live ...*lab.Container) cnirun.Call {
	var list []string
	for _, c := range live {
		list = append(list, fmt.Sprintf(`{"containerID":%q,"ifname":"eth0"}`, c.ID))
	}
	return cnirun.Call{
		Exe: filepath.Join(cluster.Bin, "lariat-vxlan"), Env: map[string]string{"CNI_COMMAND": "GC", "CNI_PATH": cluster.Bin},
		Conf: conf(h, h.StateDir(), `,"cni.dev/valid-attachments":[`+strings.Join(list, ",")+"]"),
	}
}

// works runs a call that must succeed.
func works(t testing.TB, h *lab.Host, c cnirun.Call) cnirun.Outcome {
	t.Helper()
	o, err := c.Run(ctx, h.Netns)
	must(t, err)
	if o.Code != 0 {
		t.Errorf("%s: %s%s", c.Env["CNI_COMMAND"], o.Stdout, o.Stderr)
	}
	return o
}

func world(t testing.TB, h *lab.Host) string {
	t.Helper()
	w, err := cnirun.World(ctx, h)
	must(t, err)
	return w
}

// difference is what two worlds do not share, a line each; empty when they are the same.
func difference(before, after string) string {
	have := map[string]int{}
	for _, l := range strings.Split(before, "\n") {
		have[l]--
	}
	for _, l := range strings.Split(after, "\n") {
		have[l]++
	}
	var out []string
	for l, n := range have {
		switch {
		case l == "":
		case n > 0:
			out = append(out, "left behind: "+l)
		case n < 0:
			out = append(out, "taken away: "+l)
		}
	}
	slices.Sort(out)
	return strings.Join(out, "\n")
}

func pings(t testing.TB, from lab.Netns, to netip.Addr) {
	t.Helper()
	short, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if _, err := from.Ping(short, to, 56); err != nil {
		t.Error(err)
	}
}

// address is a container's first, as its kernel has it.
func address(t testing.TB, c *lab.Container) (a netip.Addr) {
	t.Helper()
	must(t, c.Do(func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		list, err := kernel.RetryDump(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_V4) })
		if err != nil || len(list) == 0 {
			return fmt.Errorf("eth0 has no address: %w", err)
		}
		a, _ = netip.AddrFromSlice(list[0].IP.To4())
		return nil
	}))
	return a
}
