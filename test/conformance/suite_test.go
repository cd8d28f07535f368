package conformance_test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/plan"
	"github.com/lariat-net/lariat/test/conformance/cnirun"
	"github.com/lariat-net/lariat/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }

var (
	ctx     = context.Background()
	cluster *lab.Cluster
	once    sync.Once
)

// host returns one of the two hosts that the tests share, with the network "overlay" on both. Their managers
// take a minute before they remove anything, so what is gone at the end of a call was removed by the call.
func host(t testing.TB, i int) *lab.Host {
	t.Helper()
	once.Do(func() {
		c, err := lab.New(lab.Options{Hosts: 2})
		if err != nil {
			t.Fatal(err)
		}
		cluster = c
		must(t, c.Up(ctx))
		must(t, c.Hosts[0].Client().Put(ctx, metadata.KindNetwork, "overlay",
			metadata.Network{Name: "overlay", Encapsulation: metadata.EncapVXLAN, VNI: 1042, HostNAT: true,
				// a second block, claimed in the middle of a test, would look like something left over
				BlockSizeV4: 22, BlockSizeV6: 118,
				Subnets: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("fd42::/48")}}))
		for _, h := range c.Hosts {
			eventually(t, func() error { return h.Do(func() error { _, err := netlink.LinkByName("vtep1042"); return err }) })
			// And until the host has heard of the other's blocks, or the world changes by itself under a test.
			eventually(t, func() error {
				v, err := h.Client().View(ctx)
				if err == nil && len(v.Blocks) < 4 {
					err = fmt.Errorf("%d blocks of 4", len(v.Blocks))
				}
				return err
			})
		}
		settle(t, c.Hosts...)
	})
	if cluster == nil || len(cluster.Hosts) <= i {
		t.Fatal("the cluster did not start")
	}
	return cluster.Hosts[i]
}

// settle waits until the kernel of each host is as the planners want it.
func settle(t testing.TB, hosts ...*lab.Host) {
	t.Helper()
	for _, h := range hosts {
		eventually(t, func() error {
			snap, err := h.Client().View(ctx)
			if err != nil {
				return err
			}
			return h.Do(func() error {
				k, err := kernel.New()
				if err != nil {
					return err
				}
				defer k.Close()
				want := plan.Desired(snap, h.Name, kernel.LooseReversePath())
				have, err := k.Observe(ctx, want)
				if err != nil {
					return err
				}
				if d := delta.Between(want, have); !d.Empty() {
					return fmt.Errorf("host %s is not settled:\n%s", h.Name, d)
				}
				return nil
			})
		})
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually asks until there is no error, for ten seconds.
func eventually(t testing.TB, f func() error) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal(err)
		}
	}
}

var serial int

// container makes a namespace that goes with the test.
func container(t testing.TB, h *lab.Host) *lab.Container {
	t.Helper()
	serial++
	c, err := h.NewContainer(fmt.Sprint("c", serial))
	must(t, err)
	t.Cleanup(func() { c.Netns.Remove() })
	return c
}

func pings(t testing.TB, from lab.Netns, to netip.Addr) {
	t.Helper()
	short, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if _, err := from.Ping(short, to, 56); err != nil {
		t.Error(err)
	}
}

func world(t testing.TB, h *lab.Host) string {
	t.Helper()
	w, err := cnirun.World(ctx, h)
	must(t, err)
	return w
}

// unchanged compares the world of a host with an earlier one.
func unchanged(t testing.TB, h *lab.Host, before string) {
	t.Helper()
	after := world(t, h)
	if before == after {
		return
	}
	have := map[string]int{}
	for _, l := range strings.Split(before, "\n") {
		have[l]--
	}
	for _, l := range strings.Split(after, "\n") {
		have[l]++
	}
	for l, n := range have {
		switch {
		case n > 0:
			t.Errorf("left behind: %s", l)
		case n < 0:
			t.Errorf("taken away: %s", l)
		}
	}
}

// The executables under test.
const (
	vxlan = "lariat-vxlan"
	ipam  = "lariat-ipam"
)

// object is a configuration that a test may change before it is sent.
type object = map[string]any

// configuration is what a runtime would send to an executable of ours on the host.
func configuration(h *lab.Host, exe, version string) object {
	if exe == vxlan {
		return object{"cniVersion": version, "name": "overlay", "type": vxlan, "socket": h.Socket(), "stateDir": h.StateDir(),
			"ipam": object{"type": ipam}}
	}
	return object{"cniVersion": version, "name": "overlay", "type": "macvlan", "master": "eth0",
		"ipam": object{"type": ipam, "socket": h.Socket(), "stateDir": h.StateDir()}}
}

func text(t testing.TB, c object) string {
	t.Helper()
	data, err := json.Marshal(c)
	must(t, err)
	return string(data)
}

// environment is what a runtime would set, with changes; a changed value of "-" leaves the variable out.
func environment(verb string, c *lab.Container, changes map[string]string) map[string]string {
	env := map[string]string{"CNI_COMMAND": verb, "CNI_PATH": cluster.Bin, "CNI_ARGS": "IgnoreUnknown=1"}
	if verb == "ADD" || verb == "CHECK" || verb == "DEL" {
		env["CNI_CONTAINERID"], env["CNI_NETNS"], env["CNI_IFNAME"] = c.ID, c.Path, "eth0"
	}
	maps.Copy(env, changes)
	maps.DeleteFunc(env, func(_, v string) bool { return v == "-" })
	return env
}

// run calls an executable and holds it to what is true of every call: exit code 0 and at most one document,
// or exit code 1 and one error object; silent verbs are silent.
func run(t testing.TB, h *lab.Host, exe, conf string, env map[string]string) cnirun.Outcome {
	t.Helper()
	o, err := cnirun.Call{Exe: filepath.Join(cluster.Bin, exe), Env: env, Conf: conf}.Run(ctx, h.Netns)
	must(t, err)
	switch verb := env["CNI_COMMAND"]; {
	case o.Code == 1:
		if _, err := o.CNIError(); err != nil {
			t.Errorf("%s %s: %v", exe, verb, err)
		}
	case o.Code != 0:
		t.Errorf("%s %s: exit code %d, want 0 or 1; %s", exe, verb, o.Code, o.Stderr)
	case verb == "ADD" || verb == "VERSION":
		if _, err := o.Document(); err != nil {
			t.Errorf("%s %s: %v", exe, verb, err)
		}
	case o.Stdout != "":
		t.Errorf("%s %s is a silent verb, but said %q", exe, verb, o.Stdout)
	}
	return o
}

// succeeds is run for a call that must work.
func succeeds(t testing.TB, h *lab.Host, exe, conf string, env map[string]string) cnirun.Outcome {
	t.Helper()
	o := run(t, h, exe, conf, env)
	if o.Code != 0 {
		t.Fatalf("%s %s: %s", exe, env["CNI_COMMAND"], o.Stdout)
	}
	return o
}

// fails is run for a call that must be refused with a code and words.
func fails(t testing.TB, h *lab.Host, exe, conf string, env map[string]string, code uint, words ...string) {
	t.Helper()
	o := run(t, h, exe, conf, env)
	if o.Code != 1 {
		t.Errorf("%s %s was not refused", exe, env["CNI_COMMAND"])
		return
	}
	e, err := o.CNIError()
	if err != nil {
		return // told by run
	}
	if e.Code != code {
		t.Errorf("%s %s: code %d, want %d: %s", exe, env["CNI_COMMAND"], e.Code, code, o.Stdout)
	}
	for _, w := range words {
		if !strings.Contains(e.Msg+"; "+e.Details, w) {
			t.Errorf("%s %s: %q is not in %s", exe, env["CNI_COMMAND"], w, o.Stdout)
		}
	}
}
