package kernel_test

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/lariat-net/lariat/pkg/attach"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/kernel/netnstest"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// TestF132RemoverSparesTheNextPort checks that the late request of a killed DEL spares the host end
// of the next ADD. That host end has the same name. The test removes many endpoints at once.
func TestF132RemoverSparesTheNextPort(t *testing.T) {
	host, inside := netnstest.New(t), netnstest.New(t)
	host.Do(t, func() {
		r, err := kernel.NewLinkReaper(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		k, err := kernel.New()
		if err != nil {
			t.Fatal(err)
		}
		defer k.Close()
		port := func(round, n int) (string, uint32) {
			t.Helper()
			id := metadata.AttachmentID{ContainerID: fmt.Sprint("c", round, "-", n), IfName: fmt.Sprint("e", round, "-", n)}
			p := attach.Plan(&metadata.Attachment{Network: "n", MTU: 1450,
				Addresses: []metadata.AttachmentAddress{{Address: netip.AddrFrom4([4]byte{10, 0, byte(round), byte(n)})}}},
				attach.Config{ID: id})
			if err := k.AddEndpoint(t.Context(), inside.Path(), p); err != nil {
				t.Fatal(err)
			}
			return p.HostName, kernel.VethIndex(p.HostName)
		}
		var kept []string
		for round := range 10 {
			done := make(chan error)
			for n := range 8 { // the workers are busy
				name, index := port(round, n)
				go func() { done <- r.Remove(t.Context(), name, index) }()
			}
			name, index := port(round, 100)
			gone, cancel := context.WithCancel(t.Context())
			cancel()
			_ = r.Remove(gone, name, index) // the DEL that was killed
			if err := k.DelEndpoint(t.Context(), name); err != nil {
				t.Fatal(err)
			}
			port(round, 100) // ADD again
			kept = append(kept, name)
			for range 8 {
				if err := <-done; err != nil {
					t.Error(err)
				}
			}
			if err := r.Remove(t.Context(), name, index); err != nil { // already removed
				t.Error(err)
			}
		}
		ports, err := k.Veths(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var left []string
		for _, p := range ports {
			left = append(left, p.Name)
		}
		if slices.Sort(left); !slices.Equal(left, slices.Sorted(slices.Values(kept))) {
			t.Errorf("want the ports %v, got %v", kept, left)
		}
		if err := r.Remove(t.Context(), "eth0", 1); err == nil {
			t.Error("a link that is no port is removed")
		}
	})
}

// TestF132PortsThatTwoRemoveAtOnce checks that two removals of the same host ends both succeed.
// A garbage collection and the network manager may find the same dangling host ends.
func TestF132PortsThatTwoRemoveAtOnce(t *testing.T) {
	host, inside := netnstest.New(t), netnstest.New(t)
	host.Do(t, func() {
		var kernels []*kernel.Netns
		for range 3 {
			k, err := kernel.New()
			if err != nil {
				t.Fatal(err)
			}
			defer k.Close()
			kernels = append(kernels, k)
		}
		for round := range 25 {
			var names []string
			for n := range 6 {
				id := metadata.AttachmentID{ContainerID: fmt.Sprint("c", round, "-", n), IfName: fmt.Sprint("e", round, "-", n)}
				p := attach.Plan(&metadata.Attachment{Network: "n", MTU: 1450,
					Addresses: []metadata.AttachmentAddress{{Address: netip.AddrFrom4([4]byte{10, 0, byte(round), byte(n)})}}},
					attach.Config{ID: id})
				if err := kernels[0].AddEndpoint(t.Context(), inside.Path(), p); err != nil {
					t.Fatal(err)
				}
				names = append(names, p.HostName)
			}
			done := make(chan error)
			for _, k := range kernels {
				go func() { done <- k.DelEndpoints(t.Context(), names) }()
			}
			for range kernels {
				if err := <-done; err != nil {
					t.Errorf("round %d: %v", round, err)
				}
			}
		}
		if ports, err := kernels[0].Veths(t.Context()); err != nil || len(ports) > 0 {
			t.Errorf("left: %v %v", ports, err)
		}
	})
}
