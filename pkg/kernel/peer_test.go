package kernel_test

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/lariat-net/lariat/pkg/attach"
	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/kernel/netnstest"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// portOf plans the endpoint of one container on a network.
func portOf(network string) delta.Endpoint {
	addresses := []metadata.AttachmentAddress{{Address: netip.MustParseAddr("10.42.0.5")}}
	return attach.Plan(&metadata.Attachment{Network: network, MTU: 1450, Addresses: addresses},
		attach.Config{ID: metadata.AttachmentID{ContainerID: "c", IfName: "eth0"}})
}

// TestPortOfARunningContainerStays checks that an ADD never removes a running container's endpoint.
// The ADD cannot succeed, or is for another container. An ADD replaces a dangling host end.
func TestPortOfARunningContainerStays(t *testing.T) {
	host, first, second, taken := netnstest.New(t), netnstest.New(t), netnstest.New(t), netnstest.New(t)
	bridge := func(name string) func() {
		return func() {
			if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}); err != nil {
				t.Error(err)
			}
		}
	}
	taken.Do(t, bridge("eth0"))
	host.Do(t, func() {
		k, err := kernel.New()
		if err != nil {
			t.Fatal(err)
		}
		defer k.Close()
		p := portOf("n")
		add := func(ns *netnstest.NS, p delta.Endpoint) error { return k.AddEndpoint(t.Context(), ns.Path(), p) }
		if err := add(first, p); err != nil {
			t.Fatal(err)
		}
		index := kernel.VethIndex(p.HostName)
		refused := func(ns *netnstest.NS, p delta.Endpoint, want string) {
			t.Helper()
			if err := add(ns, p); !errors.Is(err, kernel.ErrExists) || !strings.Contains(err.Error(), want) {
				t.Errorf("got %v, want ErrExists and %q", err, want)
			}
			if now := kernel.VethIndex(p.HostName); now != index {
				t.Errorf("%s: the port with index %d became %d", want, index, now)
			}
		}
		refused(taken, p, "in another network namespace")
		refused(second, p, "in another network namespace")
		refused(first, portOf("m"), "network n")
		rename := func(from, to string) {
			first.Do(t, func() {
				l, err := netlink.LinkByName(from)
				if err == nil {
					err = netlink.LinkSetDown(l)
				}
				if err == nil {
					err = netlink.LinkSetName(l, to)
				}
				if err != nil {
					t.Error(err)
				}
			})
		}
		rename("eth0", "net0")
		first.Do(t, bridge("eth0"))
		refused(first, p, "net0")
		first.Do(t, func() {
			l, err := netlink.LinkByName("eth0")
			if err == nil {
				err = netlink.LinkDel(l)
			}
			if err != nil {
				t.Error(err)
			}
		})
		rename("net0", "eth0")
		for range 2 { // the interface itself, damaged or whole, is re-created
			if err := add(first, p); err != nil {
				t.Fatal(err)
			}
		}
		if err := k.CheckEndpoint(t.Context(), first.Path(), p); err != nil {
			t.Error(err)
		}
	})
}

// TestPortOfADyingNamespaceIsReplaced checks that ADD replaces the host end of a dying namespace.
// The kernel removes a namespace some time after the end of its last process.
// Until then the host end exists, and no container uses it.
func TestPortOfADyingNamespaceIsReplaced(t *testing.T) {
	host, next := netnstest.New(t), netnstest.New(t)
	host.Do(t, func() {
		k, err := kernel.New()
		if err != nil {
			t.Fatal(err)
		}
		defer k.Close()
		p := portOf("n")
		for range 20 {
			ns := netnstest.New(t)
			if err := k.AddEndpoint(t.Context(), ns.Path(), p); err != nil {
				t.Fatal(err)
			}
			ns.Close(t)
			for {
				err := k.AddEndpoint(t.Context(), next.Path(), p)
				if err == nil {
					break
				}
				if !errors.Is(err, kernel.ErrExists) { // the thread that made the namespace may take a moment to end
					t.Fatal(err)
				}
			}
			if err := k.DelEndpoint(t.Context(), p.HostName); err != nil {
				t.Fatal(err)
			}
		}
	})
}
