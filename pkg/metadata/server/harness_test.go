package server

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/store"
	"github.com/lariat-net/lariat/pkg/service"
)

// openStore starts a real etcd in the test's folder.
func openStore(t testing.TB, dir string) *store.Etcd {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	st, err := store.Open(ctx, store.Embedded{Dir: dir, Prefix: "/lariat/v1/", Log: testLog()})
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func testLog() *slog.Logger {
	if os.Getenv("LARIAT_TEST_LOG") == "" {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(os.Stderr, nil))
}

// node is one host's metadata service, with a client that speaks to its socket.
type node struct {
	*Server
	metadata.Client
	stop func()
}

func mtu(n metadata.Network, h metadata.Host) int {
	switch {
	case n.MTU != 0:
		return n.MTU
	case n.Encapsulation != metadata.EncapVXLAN:
		return h.Underlay[0].MTU
	case h.UnderlayAddr().Is6():
		return h.Underlay[0].MTU - 70
	}
	return h.Underlay[0].MTU - 50
}

func hostConfig(name, underlay string) Config {
	return Config{HostName: name, MachineID: "machine-" + name, BootID: "boot-1-" + name, MTU: mtu, Device: device,
		Log: testLog(), Timeout: 20 * time.Second,
		Underlay: []metadata.Underlay{{Address: netip.MustParsePrefix(underlay), Device: "eth0", MTU: 1500}}}
}

func startNode(t testing.TB, st store.Store, cfg Config) *node {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	s, err := New(ctx, cfg, st)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "lariat")
	if err != nil {
		t.Fatal(err)
	}
	sock := filepath.Join(dir, "s")
	l, err := service.Listen(sock)
	if err != nil {
		t.Fatal(err)
	}
	api := s.API()
	api.Serve(l)
	n := &node{Server: s, Client: metadata.Client{Socket: sock}}
	stopped := false
	n.stop = func() {
		if !stopped {
			stopped = true
			s.Stop()
			api.Stop(0) //nolint:errcheck // it cuts off who is still there
			s.Close()
			os.RemoveAll(dir)
		}
	}
	t.Cleanup(n.stop)
	return n
}

func overlay(subnets ...string) *metadata.Network {
	n := &metadata.Network{HostNAT: true}
	for _, s := range subnets {
		n.Subnets = append(n.Subnets, netip.MustParsePrefix(s))
	}
	return n
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func device(n metadata.Network) string { return fmt.Sprint("vtep", n.VNI) }
