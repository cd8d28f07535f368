package server

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
)

// A network must not have addresses to which a host has another way, unless somebody insists; one that is there can be
// changed in everything else.
func TestANetworkThatCrossesHostsWaysIsRefused(t *testing.T) {
	st := openStore(t, t.TempDir())
	defer st.Close()
	cfg := hostConfig("a", "192.0.2.1/24")
	cfg.Foreign = []metadata.Foreign{{Prefix: netip.MustParsePrefix("172.17.0.0/16"), Device: "docker0"},
		{Prefix: netip.MustParsePrefix("10.0.0.0/8"), Device: "eth0", Via: addr("192.0.2.254")}}
	a := startNode(t, st, cfg)
	ctx := t.Context()
	for subnet, way := range map[string]string{"172.17.3.0/24": "172.17.0.0/16 dev docker0 on host a",
		"10.42.0.0/16": "10.0.0.0/8 via 192.0.2.254 dev eth0 on host a"} {
		n := *overlay(subnet)
		n.Name = "crossing"
		for _, create := range []bool{false, true} {
			if _, err := a.PutNetwork(ctx, n, create, false); !metadata.IsCode(err, metadata.CodeConflict) ||
				!strings.Contains(err.Error(), way) ||
				!strings.Contains(err.Error(), "lariat network create crossing --force") {
				t.Errorf("%s: %v", subnet, err)
			}
		}
	}
	n := *overlay("172.17.3.0/24")
	n.Name = "wanted"
	got, err := a.PutNetwork(ctx, n, true, true)
	if err != nil {
		t.Fatal(err)
	}
	got.MTU = 1400
	if _, err := a.PutNetwork(ctx, got, false, false); err != nil {
		t.Errorf("another MTU: %v", err)
	}
	flat := *overlay("172.17.0.0/16")
	flat.Name, flat.Encapsulation, flat.HostNAT = "lan", metadata.EncapNone, false
	flat.Gateways = []netip.Addr{addr("172.17.0.1")}
	if _, err := a.PutNetwork(ctx, flat, true, false); err != nil {
		t.Errorf("a flat network is such a link itself: %v", err)
	}
}

func TestThinPath(t *testing.T) {
	ctx := t.Context()
	st := openStore(t, t.TempDir())
	defer st.Close()
	a := startNode(t, st, hostConfig("a", "192.0.2.1/24"))
	b := startNode(t, st, hostConfig("b", "192.0.2.2/24"))

	seen := make(chan *metadata.Snapshot, 100)
	wctx, stop := context.WithCancel(ctx)
	defer stop()
	go b.Client.Watch(wctx, func(s *metadata.Snapshot) error { seen <- s; return nil },
		nil) //nolint:errcheck // ends with the context

	at, err := a.Client.Attach(ctx, "lan", metadata.AttachRequest{ContainerID: "c1", IfName: "eth0", Name: "web",
		Create: overlay("10.42.0.0/16", "fd42::/64")})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", at)
	if len(at.Addresses) != 2 || at.Addresses[0].Address != addr("10.42.0.2") ||
		at.Addresses[0].Gateway != addr("10.42.0.1") ||
		at.Device != "vtep1042" || at.MTU != 1450 || at.Addresses[1].Address != addr("fd42::2") ||
		at.Addresses[1].Gateway != addr("fd42::1") {
		t.Errorf("%+v", at)
	}
	bt, err := b.Client.Attach(ctx, "lan", metadata.AttachRequest{ContainerID: "c2", IfName: "eth0"})
	if err != nil {
		t.Fatal(err)
	}
	if bt.Addresses[0].Address != addr("10.42.0.65") || bt.Addresses[0].Gateway != addr("10.42.0.64") {
		t.Errorf("%+v", bt)
	}
	for s := range seen {
		if len(s.Blocks) == 4 && len(s.Hosts) == 2 && s.Hosts[0].Live && s.Hosts[1].Live {
			break
		}
	}
	snap, err := b.Client.Snapshot(ctx)
	if err != nil || len(snap.Containers) != 2 || snap.Containers[0].Name != "web" {
		t.Errorf("%+v %v", snap, err)
	}
	all, err := a.Client.Allocations(ctx, "lan", true)
	if err != nil || len(all) != 4 {
		t.Errorf("%+v %v", all, err)
	}
	stt, err := a.Client.Status(ctx, "lan")
	t.Logf("%+v %v", stt, err)

	start := time.Now()
	const n = 500
	for i := range n {
		if _, err := a.Client.Attach(ctx, "lan", metadata.AttachRequest{ContainerID: fmt.Sprintf("s%063d", i),
			IfName: "eth0"}); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("attach %v", time.Since(start)/n)
	start = time.Now()
	var wg sync.WaitGroup
	for w := range 50 {
		wg.Go(func() {
			for i := range 20 {
				if _, err := a.Client.Attach(ctx, "lan", metadata.AttachRequest{ContainerID: fmt.Sprintf("p%d-%060d", w, i),
					IfName: "eth0"}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	t.Logf("attach by 50 at once %v", time.Since(start)/1000)
	start = time.Now()
	for i := range n {
		if err := a.Client.Release(ctx, "lan", metadata.AttachmentID{ContainerID: fmt.Sprintf("s%063d", i), IfName: "eth0"},
			0); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("release %v", time.Since(start)/n)
	gc, err := a.Client.GC(ctx, "lan", nil)
	if err != nil || len(gc.Released) != 2*1001 {
		t.Errorf("%d %v", len(gc.Released), err)
	}
	snap, err = b.Client.Snapshot(ctx)
	if err != nil || len(snap.Containers) != 1 {
		t.Errorf("%d %v", len(snap.Containers), err)
	}
}
