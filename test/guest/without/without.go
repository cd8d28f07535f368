// Package without is what the tests in its folders have in common: a host of an encrypted network, with the
// real programs, in a guest whose kernel lacks something.
package without

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"

	"github.com/lariat-net/lariat/pkg/cni"
	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/test/guest"
	"github.com/lariat-net/lariat/test/lab"
)

// Network is the encrypted one.
const Network = "private"

// Main is TestMain of a package whose guest lacks modules.
func Main(m *testing.M, modules string) {
	if guest.Inside() {
		lab.Main(m)
	}
	guest.Main(m, guest.Options{Bin: true, Warm: true, KernelArgs: []string{"module_blacklist=" + modules}})
}

// Cluster starts hosts with the network.
func Cluster(t *testing.T, hosts int) *lab.Cluster {
	t.Helper()
	c, err := lab.New(lab.Options{Hosts: hosts, Manager: []string{"--interval", "1s", "--grace", "0s"}})
	Must(t, err)
	for _, h := range c.Hosts {
		Must(t, os.WriteFile(h.SecretFile(), []byte("bm90IGEgcmVhbCBzZWNyZXQsIGJ1dCBsb25nIGVub3VnaA==\n"), 0o600))
	}
	Must(t, c.Up(t.Context()))
	Must(t, c.Hosts[0].Client().Put(t.Context(), metadata.KindNetwork, Network,
		metadata.Network{Name: Network, Encapsulation: metadata.EncapIPsec,
			Subnets: []netip.Prefix{netip.MustParsePrefix("10.44.0.0/16")}}))
	return c
}

// Must fails the test.
func Must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Call is a CNI call for the network.
func Call(t *testing.T, h *lab.Host) lab.Call {
	t.Helper()
	conf, err := h.Conf(Network, map[string]any{"type": "lariat-ipsec"})
	Must(t, err)
	return lab.Call{Conf: conf}
}

// ADDIsRefused shows that ADD and STATUS fail and name the feature and the module, with the manager and
// without, and that nothing is left of the attempt.
func ADDIsRefused(t *testing.T, feature, module string) {
	c := Cluster(t, 1)
	h := c.Hosts[0]
	call := Call(t, h)
	refused := func(what string, err error) {
		t.Helper()
		var e *types.Error
		if !errors.As(err, &e) || e.Code != cni.ErrNotAvailable || !strings.Contains(e.Msg, feature) ||
			!strings.Contains(e.Msg, module) {
			t.Errorf("%s: %v; want code %d, %q and %q", what, err, cni.ErrNotAvailable, feature, module)
		}
	}
	attempt := func(who string) {
		t.Helper()
		ct, err := h.NewContainer(who)
		Must(t, err)
		defer ct.Netns.Remove()
		ctx, cancel := context.WithTimeout(t.Context(), guest.Patience)
		defer cancel()
		refused("ADD, "+who, ct.Add(ctx, call))
		refused("STATUS, "+who, h.Status(ctx, call))
		Must(t, ct.Del(ctx, call))
		list, err := h.Client().Allocations(ctx, Network, false)
		Must(t, err)
		if len(list) > 0 {
			t.Errorf("%s: addresses are held: %v", who, list)
		}
		if found, _ := filepath.Glob(filepath.Join(h.StateDir(), "attachments", Network, "[^.]*")); len(found) > 0 {
			t.Errorf("%s: in the journal: %v", who, found)
		}
		Must(t, h.Do(func() error {
			links, err := kernel.RetryDump(netlink.LinkList)
			for _, l := range links {
				if strings.HasPrefix(l.Attrs().Name, delta.VethPrefix) {
					t.Errorf("%s: device %s is left", who, l.Attrs().Name)
				}
			}
			return err
		}))
	}
	again := time.NewTicker(100 * time.Millisecond)
	defer again.Stop()
	for late := time.After(guest.Patience); ; {
		var e *types.Error
		err := h.Status(t.Context(), call)
		if errors.As(err, &e) && strings.Contains(e.Msg, feature) {
			break
		}
		select {
		case <-again.C: // each question is a process, and the manager has to get somewhere on the guest's one processor
		case <-late:
			t.Fatalf("the manager does not find out: %v", err)
		}
	}
	attempt("with the manager")
	Must(t, h.Manager.Stop())
	h.Manager = nil
	attempt("without it")
}
