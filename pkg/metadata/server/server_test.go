package server

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
)

func TestThinPath(t *testing.T) {
	ctx := t.Context()
	st := openStore(t, t.TempDir())
	defer st.Close()
	a := startNode(t, st, hostConfig("a", "192.0.2.1/24"))
	b := startNode(t, st, hostConfig("b", "192.0.2.2/24"))

	seen := make(chan *metadata.Snapshot, 100)
	wctx, stop := context.WithCancel(ctx)
	defer stop()
	go b.Client.Watch(wctx, func(s *metadata.Snapshot) error { seen <- s; return nil }, nil) //nolint:errcheck // ends with the context

	at, err := a.Client.Attach(ctx, "lan", metadata.AttachRequest{ContainerID: "c1", IfName: "eth0", Name: "web", Create: overlay("10.42.0.0/16", "fd42::/64")})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", at)
	if len(at.Addresses) != 2 || at.Addresses[0].Address != addr("10.42.0.2") || at.Addresses[0].Gateway != addr("10.42.0.1") ||
		at.Device != "vtep1042" || at.MTU != 1450 || at.Addresses[1].Address != addr("fd42::2") || at.Addresses[1].Gateway != addr("fd42::1") {
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
		if _, err := a.Client.Attach(ctx, "lan", metadata.AttachRequest{ContainerID: fmt.Sprintf("s%063d", i), IfName: "eth0"}); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("attach %v", time.Since(start)/n)
	start = time.Now()
	var wg sync.WaitGroup
	for w := range 50 {
		wg.Go(func() {
			for i := range 20 {
				if _, err := a.Client.Attach(ctx, "lan", metadata.AttachRequest{ContainerID: fmt.Sprintf("p%d-%060d", w, i), IfName: "eth0"}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	t.Logf("attach by 50 at once %v", time.Since(start)/1000)
	start = time.Now()
	for i := range n {
		if err := a.Client.Release(ctx, "lan", metadata.AttachmentID{ContainerID: fmt.Sprintf("s%063d", i), IfName: "eth0"}, 0); err != nil {
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
