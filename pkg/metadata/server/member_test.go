package server

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// startMembers starts a cluster of stores.
func startMembers(t *testing.T, peers, clients []string, cluster string) (closers []func()) {
	t.Helper()
	members := make([]*store.Etcd, len(peers))
	var wg sync.WaitGroup
	for i := range members {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			var err error
			if members[i], err = store.Open(ctx, store.Embedded{Dir: t.TempDir(), Prefix: "/lariat/v1/",
				Name: fmt.Sprint("m", i), ListenPeer: peers[i],
				ListenClient: clients[i], InitialCluster: cluster, Log: testLog()}); err != nil {
				t.Error(err)
				return
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	for _, m := range members {
		end := sync.OnceFunc(func() { m.Close() })
		t.Cleanup(end)
		closers = append(closers, end)
	}
	return closers
}

// TestAMemberIsDead: with the first of several endpoints dead, addresses are given out, and readiness says so.
func TestAMemberIsDead(t *testing.T) {
	var peers, clients, cluster []string
	var free []net.Listener
	for i := range 3 {
		for _, list := range []*[]string{&peers, &clients} {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			*list = append(*list, "http://"+l.Addr().String())
			free = append(free, l)
		}
		cluster = append(cluster, fmt.Sprintf("m%d=%s", i, peers[i]))
	}
	for _, l := range free {
		l.Close()
	}
	members := startMembers(t, peers, clients, strings.Join(cluster, ","))
	st, err := store.Dial(t.Context(), store.External{Endpoints: clients, Prefix: "/lariat/v1/", Log: testLog()})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	n := startNode(t, st, hostConfig("a", "192.0.2.1/24"))
	define(t, n, "lan", overlay("10.0.0.0/16"))
	members[0]()
	attach(t, n, "lan", req("one"))
	if err := n.unready(t.Context()); err != nil {
		t.Errorf("addresses are given out, and readiness says: %v", err)
	}
	members[1]()
	deadline, tick := time.After(time.Minute), time.NewTicker(50*time.Millisecond)
	defer tick.Stop()
	for n.unready(t.Context()) == nil { // until the last member misses its leader
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("one of three members is left, and readiness says all is well")
		}
	}
}
