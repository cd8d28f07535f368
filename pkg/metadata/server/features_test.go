package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
	"github.com/lariat-net/lariat/pkg/metadata/store"
	"github.com/lariat-net/lariat/pkg/service"
)

// wantCode fails unless err is an answer with that code whose text holds all parts.
func wantCode(t testing.TB, err error, code string, parts ...string) {
	t.Helper()
	if !metadata.IsCode(err, code) {
		t.Errorf("error %v, want code %s", err, code)
		return
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q does not say %q", err, p)
		}
	}
}

func req(id string, addrs ...string) metadata.AttachRequest {
	r := metadata.AttachRequest{ContainerID: id, IfName: "eth0"}
	for _, a := range addrs {
		r.Requested = append(r.Requested, addr(a))
	}
	return r
}

func aid(id string) metadata.AttachmentID {
	return metadata.AttachmentID{ContainerID: id, IfName: "eth0"}
}

func attach(t testing.TB, n *node, network string, r metadata.AttachRequest) *metadata.Attachment {
	t.Helper()
	a, err := n.Client.Attach(context.Background(), network, r)
	if err != nil {
		t.Fatalf("attach %s: %v", r.ContainerID, err)
	}
	return a
}

func define(t testing.TB, n *node, name string, def *metadata.Network) {
	t.Helper()
	if err := n.Client.Put(context.Background(), "networks", name, def); err != nil {
		t.Fatal(err)
	}
}

// one starts one host with a network "lan" on a store of its own.
func one(t testing.TB, def *metadata.Network, change ...func(*Config)) (*node, *store.Etcd) {
	t.Helper()
	st := openStore(t, t.TempDir())
	t.Cleanup(func() { st.Close() })
	cfg := hostConfig("a", "192.0.2.1/24")
	for _, c := range change {
		c(&cfg)
	}
	n := startNode(t, st, cfg)
	define(t, n, "lan", def)
	return n, st
}

func TestF16_AddressByContainerIDOrUUID(t *testing.T) {
	ctx := t.Context()
	n, _ := one(t, overlay("10.42.0.0/16"))
	mac, _ := metadata.ParseMAC("02:42:00:00:00:09")
	for key, c := range map[string]metadata.Container{
		"byid":   {Addresses: []netip.Addr{addr("10.42.3.9")}, MAC: mac},
		"u-uuid": {UUID: "u-uuid", Addresses: []netip.Addr{addr("10.42.3.10")}, Labels: map[string]string{"k": "v"}},
	} {
		if err := n.Client.Put(ctx, "containers", "a/"+key, c); err != nil {
			t.Fatal(err)
		}
	}
	a := attach(t, n, "lan", req("byid"))
	if a.Addresses[0].Address != addr("10.42.3.9") || !a.PreAssigned || a.MAC != mac {
		t.Errorf("%+v", a)
	}
	r := req("fresh-id")
	r.UUID = "u-uuid"
	a = attach(t, n, "lan", r)
	if a.Addresses[0].Address != addr("10.42.3.10") || !a.PreAssigned {
		t.Errorf("%+v", a)
	}
	var c metadata.Container
	if err := n.Client.Get(ctx, "containers", "a/fresh-id", &c); err != nil || c.UUID != "u-uuid" ||
		c.Labels["k"] != "v" || len(c.Interfaces) != 1 {
		t.Errorf("%+v %v", c, err)
	}
	wantCode(t, n.Client.Get(ctx, "containers", "a/u-uuid", nil), metadata.CodeNotFound)
	// The assignment outlives the container: its successor with the same UUID gets it again.
	if err := n.Client.Release(ctx, "lan", aid("fresh-id"), 0); err != nil {
		t.Fatal(err)
	}
	r.ContainerID = "next-id"
	if a = attach(t, n, "lan", r); a.Addresses[0].Address != addr("10.42.3.10") {
		t.Errorf("%+v", a)
	}
	_, err := n.Client.Attach(ctx, "lan", req("byid", "10.42.0.77"))
	wantCode(t, err, metadata.CodeConflict, "10.42.3.9", "10.42.0.77")
}

func TestF17_WaitsForLateMetadata(t *testing.T) {
	ctx := t.Context()
	n, _ := one(t, overlay("10.42.0.0/16"))
	r := req("late")
	r.WaitSeconds = 20
	type result struct {
		a   *metadata.Attachment
		err error
	}
	got := make(chan result, 1)
	waiting := n.containers.watch()
	go func() {
		a, err := n.Client.Attach(ctx, "lan", r)
		got <- result{a, err}
	}()
	// Another container in between wakes it up for nothing.
	if err := n.Client.Put(ctx, "containers", "a/other", metadata.Container{Name: "other"}); err != nil {
		t.Fatal(err)
	}
	<-waiting
	select {
	case r := <-got:
		t.Fatalf("came back too early: %+v", r)
	default:
	}
	start := time.Now()
	if err := n.Client.Put(ctx, "containers", "a/late",
		metadata.Container{Addresses: []netip.Addr{addr("10.42.0.9")}}); err != nil {
		t.Fatal(err)
	}
	res := <-got
	if res.err != nil || res.a.Addresses[0].Address != addr("10.42.0.9") {
		t.Fatalf("%+v", res)
	}
	if took := time.Since(start); took > 10*time.Second { // it would have asked once more after 20
		t.Errorf("woke up only after %v", took)
	}
}

func TestF18_SurvivesRestartWhileWaiting(t *testing.T) {
	ctx := t.Context()
	st := openStore(t, t.TempDir())
	defer st.Close()
	n := startNode(t, st, hostConfig("a", "192.0.2.1/24"))
	define(t, n, "lan", overlay("10.42.0.0/16"))
	r := req("late")
	r.WaitSeconds = 20
	got := make(chan error, 1)
	go func() {
		_, err := n.Client.Attach(ctx, "lan", r)
		got <- err
	}()
	n.stop()
	if err := <-got; !errors.Is(err, metadata.ErrUnreachable) {
		t.Fatalf("a stopping service says so, so that the caller asks again: %v", err)
	}
	n = startNode(t, st, hostConfig("a", "192.0.2.1/24"))
	go n.Client.Put(ctx, "containers", "a/late",
		metadata.Container{Addresses: []netip.Addr{addr("10.42.0.9")}}) //nolint:errcheck // seen below
	if a := attach(t, n, "lan", r); a.Addresses[0].Address != addr("10.42.0.9") {
		t.Errorf("%+v", a)
	}
}

func TestF21_TimeoutNamesContainerAndTime(t *testing.T) {
	n, _ := one(t, overlay("10.42.0.0/16"))
	r := req("c0ffee-unknown")
	r.WaitSeconds, r.UUID = 1, "u-1"
	_, err := n.Client.Attach(t.Context(), "lan", r)
	wantCode(t, err, metadata.CodeNotYet, "c0ffee-unknown", "after 1s", "u-1")
}

func TestF14_HeldAddressesNameTheirHolder(t *testing.T) {
	ctx := t.Context()
	a, st := one(t, overlay("10.42.0.0/16"))
	b := startNode(t, st, hostConfig("b", "10.42.9.9/24")) // its own address lies in the network
	attach(t, a, "lan", req("holder", "10.42.0.7"))
	attach(t, b, "lan", req("other"))
	for _, tc := range []struct {
		n     *node
		want  string
		parts []string
	}{
		{a, "10.42.0.7", []string{"holder/eth0", "host a"}},
		{b, "10.42.0.7", []string{"holder/eth0", "host a"}},
		{a, "10.42.0.1", []string{"host a", "gateway"}},
		{b, "10.42.0.1", []string{"host a", "gateway"}},
		{a, "10.42.9.9", []string{"host b", "own address"}},
	} {
		_, err := tc.n.Client.Attach(ctx, "lan", req("wants", tc.want))
		wantCode(t, err, metadata.CodeHeld, append(tc.parts, tc.want)...)
	}
	if _, err := a.Client.Attachment(ctx, "lan", aid("wants")); !metadata.IsCode(err, metadata.CodeNotFound) {
		t.Errorf("a refusal leaves nothing: %v", err)
	}
	r := req("foreign", "10.42.0.7")
	r.Foreign = true
	_, err := b.Client.Attach(ctx, "lan", r)
	wantCode(t, err, metadata.CodeHeld, "holder/eth0")
}

func TestF124_TwoHostsTenThousandAtOnce(t *testing.T) {
	ctx := t.Context()
	a, st := one(t, overlay("10.42.0.0/16"))
	b := startNode(t, st, hostConfig("b", "192.0.2.2/24"))
	const each, workers = 5000, 100
	var mu sync.Mutex
	got := map[netip.Addr]string{}
	var wg sync.WaitGroup
	start := time.Now()
	for _, n := range []*node{a, b} {
		for w := range workers {
			wg.Go(func() {
				for i := range each / workers {
					id := fmt.Sprintf("%s-%d-%d", n.cfg.HostName, w, i)
					at, err := n.Client.Attach(ctx, "lan", req(id))
					if err != nil {
						t.Error(err)
						return
					}
					mu.Lock()
					if old := got[at.Addresses[0].Address]; old != "" {
						t.Errorf("%s twice: %s and %s", at.Addresses[0].Address, old, id)
					}
					got[at.Addresses[0].Address] = n.cfg.HostName
					mu.Unlock()
				}
			})
		}
	}
	wg.Wait()
	t.Logf("%d in %v", len(got), time.Since(start))
	if len(got) != 2*each {
		t.Fatalf("%d addresses", len(got))
	}
	snap, err := a.Client.View(ctx)
	if err != nil {
		t.Fatal(err)
	}
	owner := map[netip.Prefix]string{}
	for _, blk := range snap.Blocks {
		owner[blk.CIDR] = blk.Host
	}
	for x, host := range got {
		if p, _ := x.Prefix(26); owner[p] != host {
			t.Errorf("%s of host %s lies in a block of %q", x, host, owner[p])
		}
	}
	if len(snap.HostRoutes) != 0 {
		t.Errorf("nothing was borrowed, yet %d endpoints", len(snap.HostRoutes))
	}
	all, err := b.Client.Allocations(ctx, "lan", true)
	if err != nil || len(all) != 2*each {
		t.Errorf("%d %v", len(all), err)
	}
}

func TestF125_BorrowAndStrictAffinity(t *testing.T) {
	ctx := t.Context()
	def := overlay("10.42.0.0/26") // four blocks of sixteen
	def.BlockSizeV4 = 28
	a, st := one(t, def)
	b := startNode(t, st, hostConfig("b", "192.0.2.2/24"))
	c := startNode(t, st, hostConfig("c", "192.0.2.3/24"))
	seen := map[netip.Addr]bool{}
	take := func(n *node, id string) netip.Addr {
		x := attach(t, n, "lan", req(id)).Addresses[0].Address
		if seen[x] {
			t.Errorf("%s twice", x)
		}
		seen[x] = true
		return x
	}
	take(b, "b0")
	for i := range 40 { // three blocks: 13 + 15 + 16 - …
		take(a, fmt.Sprint("a", i))
	}
	// c has no block at all and borrows.
	x := take(c, "c0")
	view, err := a.Client.View(ctx)
	if err != nil || len(view.Blocks) != 4 {
		t.Fatalf("%+v %v", view.Blocks, err)
	}
	if len(view.HostRoutes) != 1 || view.HostRoutes[0].Address != x || view.HostRoutes[0].Host != "c" {
		t.Fatalf("the routes follow endpoints: %+v", view.HostRoutes)
	}
	if again := attach(t, c, "lan", req("c0")); again.Addresses[0].Address != x {
		t.Errorf("%+v", again)
	}
	mine, err := c.Client.Allocations(ctx, "lan", false)
	if err != nil || len(mine) != 1 || mine[0].Host != "c" {
		t.Errorf("%+v %v", mine, err)
	}
	// A restarted service knows what it borrowed.
	c.stop()
	c = startNode(t, st, hostConfig("c", "192.0.2.3/24"))
	if again := attach(t, c, "lan", req("c0")); again.Addresses[0].Address != x {
		t.Errorf("%+v", again)
	}
	for i := range 10 {
		take(c, fmt.Sprint("c", i+1))
	}
	if gc, err := c.Client.GC(ctx, "lan", []metadata.AttachmentID{aid("c0")}); err != nil || len(gc.Released) != 10 {
		t.Errorf("%+v %v", gc, err)
	}
	if err := c.Client.Release(ctx, "lan", aid("c0"), 0); err != nil {
		t.Fatal(err)
	}
	if view, err = c.Client.View(ctx); err != nil {
		t.Fatal(err)
	}
	if err := c.view.Wait(ctx, view.Revision); err != nil {
		t.Fatal(err)
	}
	eventually(t, c, func(s *metadata.Snapshot) bool { return len(s.HostRoutes) == 0 })

	strict := overlay("10.43.0.0/28")
	strict.BlockSizeV4, strict.StrictAffinity = 28, true
	define(t, a, "strict", strict)
	attach(t, a, "strict", req("s"))
	_, err = b.Client.Attach(ctx, "strict", req("t"))
	wantCode(t, err, metadata.CodeExhausted, "10.43.0.0/28", "1 of 1 blocks")
	_, err = b.Client.Attach(ctx, "strict", req("t", "10.43.0.9"))
	wantCode(t, err, metadata.CodeHeld, "strictAffinity", "host a")
}

// eventually waits on the watch until the view is as wanted.
func eventually(t testing.TB, n *node, ok func(*metadata.Snapshot) bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	done := errors.New("done")
	err := n.Client.Watch(ctx, func(s *metadata.Snapshot) error {
		if ok(s) {
			return done
		}
		return nil
	}, nil)
	if !errors.Is(err, done) {
		t.Errorf("the view did not come to what was wanted: %v", err)
	}
}

func TestF128_EarlierBootIsReportedAndReleased(t *testing.T) {
	ctx := t.Context()
	st := openStore(t, t.TempDir())
	defer st.Close()
	n := startNode(t, st, hostConfig("a", "192.0.2.1/24"))
	define(t, n, "lan", overlay("10.42.0.0/16", "fd42::/64"))
	for i := range 100 {
		attach(t, n, "lan", req(fmt.Sprint("old", i)))
	}
	n.stop()
	cfg := hostConfig("a", "192.0.2.1/24")
	cfg.BootID = "boot-2"
	n = startNode(t, st, cfg)
	attach(t, n, "lan", req("new"))
	again := attach(t, n, "lan", req("old7")) // a container that the runtime started again under its id
	if again.BootID != "boot-2" {
		t.Errorf("%+v", again)
	}
	list, err := n.Client.Allocations(ctx, "lan", false)
	if err != nil || len(list) != 202 {
		t.Fatal(len(list), err)
	}
	for _, x := range list {
		if x.BootID == "boot-2" {
			continue
		}
		if err := n.Client.Release(ctx, "lan", metadata.AttachmentID{ContainerID: x.ContainerID, IfName: x.IfName},
			x.Sequence); err != nil {
			t.Fatal(err)
		}
	}
	list, err = n.Client.Allocations(ctx, "lan", true)
	if err != nil || len(list) != 4 {
		t.Errorf("%+v %v", list, err)
	}
}

func TestF129_ExhaustionIsVisible(t *testing.T) {
	ctx := t.Context()
	def := overlay("10.42.0.0/28", "fd42::/124")
	def.BlockSizeV4, def.BlockSizeV6 = 28, 124
	n, _ := one(t, def)
	st, err := n.Client.Status(ctx, "lan")
	if err != nil || !st.Ready || len(st.Usage) != 2 {
		t.Fatalf("%+v %v", st, err)
	}
	for i := range 13 {
		attach(t, n, "lan", req(fmt.Sprint("c", i)))
	}
	_, err = n.Client.Attach(ctx, "lan", req("one-too-many"))
	wantCode(t, err, metadata.CodeExhausted, "10.42.0.0/28", "13 used", "0 free", "1 of 1 blocks")
	if st, err = n.Client.Status(ctx, "lan"); err != nil || st.Ready || !strings.Contains(st.Reason, "10.42.0.0/28") ||
		st.Device != "vtep1042" {
		t.Errorf("%+v %v", st, err)
	}
	if st.Usage[0].Used != 13 || st.Usage[0].Free != 0 || st.Usage[1].Used != 13 || st.Usage[1].Free == 0 {
		t.Errorf("%+v", st.Usage)
	}
	text := metricsText(n)
	for _, line := range []string{`lariat_addresses_free{network="lan",subnet="10.42.0.0/28"} 0`,
		`lariat_addresses_used{network="lan",subnet="10.42.0.0/28"} 13`, "\nlariat_store_leader 1\n"} {
		if !strings.Contains(text, line) {
			t.Errorf("no %s in\n%s", line, text)
		}
	}
	// All or nothing: the IPv6 half of the refused one was not kept.
	all, err := n.Client.Allocations(ctx, "lan", true)
	if err != nil || len(all) != 26 {
		t.Errorf("%d %v", len(all), err)
	}
	_, err = n.Client.Status(ctx, "nonesuch")
	wantCode(t, err, metadata.CodeNotFound, "nonesuch", "known: lan")
}

func metricsText(n *node) string {
	w := httptest.NewRecorder()
	n.API().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	return w.Body.String()
}

func TestF130_BothFamiliesOrNone(t *testing.T) {
	ctx := t.Context()
	n, st := one(t, overlay("10.42.0.0/16", "fd42::/64"))
	a := attach(t, n, "lan", req("dual"))
	if len(a.Addresses) != 2 || !a.Addresses[0].Address.Is4() || !a.Addresses[1].Address.Is6() ||
		a.Addresses[0].Sequence != a.Addresses[1].Sequence {
		t.Errorf("%+v", a)
	}
	define(t, n, "six", overlay("fd43::/64"))
	if a = attach(t, n, "six", req("six")); len(a.Addresses) != 1 || a.Addresses[0].Gateway != addr("fd43::1") ||
		a.Device != "vtep1043" {
		t.Errorf("%+v", a)
	}
	// One family requested, the other follows.
	if a = attach(t, n, "lan", req("mix", "fd42::77")); len(a.Addresses) != 2 ||
		a.Addresses[1].Address != addr("fd42::77") {
		t.Errorf("%+v", a)
	}
	// One of the two held: nothing is left of the other.
	_, err := n.Client.Attach(ctx, "lan", req("half", "10.42.0.99", "fd42::77"))
	wantCode(t, err, metadata.CodeHeld, "mix/eth0")
	b := startNode(t, st, hostConfig("b", "192.0.2.2/24"))
	attach(t, b, "lan", req("gets", "10.42.0.99"))
}

func TestF131_RequestedAddresses(t *testing.T) {
	ctx := t.Context()
	def := overlay("10.42.0.0/16")
	def.Exclude = []string{"10.42.0.2-10.42.0.9", "10.42.1.0/24"}
	a, st := one(t, def)
	b := startNode(t, st, hostConfig("b", "192.0.2.2/24"))
	if x := attach(t, a, "lan", req("any")); x.Addresses[0].Address != addr("10.42.0.10") {
		t.Errorf("exclusions are passed over: %+v", x)
	}
	if x := attach(t, a, "lan", req("r1", "10.42.77.5")); x.Addresses[0].Address != addr("10.42.77.5") {
		t.Errorf("%+v", x)
	}
	x := attach(t, b, "lan", req("r2", "10.42.77.6")) // in a block that a has claimed by now
	eventually(t, a, func(s *metadata.Snapshot) bool {
		return slices.Contains(s.HostRoutes, metadata.HostRoute{Network: "lan", Address: x.Addresses[0].Address, Host: "b"})
	})
	_, err := a.Client.Attach(ctx, "lan", req("r3", "10.42.77.6"))
	wantCode(t, err, metadata.CodeHeld, "r2/eth0", "host b")
	for want, code := range map[string]string{"10.42.0.0": metadata.CodeInvalid, "10.42.255.255": metadata.CodeInvalid,
		"10.99.0.1": metadata.CodeInvalid, "127.0.0.1": metadata.CodeInvalid} {
		_, err := a.Client.Attach(ctx, "lan", req("r4", want))
		wantCode(t, err, code, want)
	}
	relative := req("r4")
	relative.StateDir = "lariat"
	_, err = a.Client.Attach(ctx, "lan", relative)
	wantCode(t, err, metadata.CodeInvalid, `stateDir "lariat": want the absolute path`)
	_, err = a.Client.Attach(ctx, "lan", req("r1", "10.42.77.9"))
	wantCode(t, err, metadata.CodeConflict, "10.42.77.5")
	// First block of a host claimed for the very address that would be its gateway.
	c := startNode(t, st, hostConfig("c", "192.0.2.3/24"))
	if x := attach(t, c, "lan", req("g", "10.42.200.0")); x.Addresses[0].Address != addr("10.42.200.0") ||
		x.Addresses[0].Gateway != addr("10.42.200.1") {
		t.Errorf("%+v", x)
	}
}

func TestForeignAddresses(t *testing.T) {
	ctx := t.Context()
	n, st := one(t, overlay("10.42.0.0/16"))
	r := req("dhcp", "172.30.0.5", "10.42.8.8")
	r.Foreign = true
	a := attach(t, n, "lan", r)
	if len(a.Addresses) != 2 || a.Addresses[1].Subnet.IsValid() ||
		a.Addresses[0].Subnet != netip.MustParsePrefix("10.42.0.0/16") {
		t.Errorf("%+v", a)
	}
	eventually(t, n, func(s *metadata.Snapshot) bool {
		return len(s.HostRoutes) == 1 && s.HostRoutes[0].Address == addr("172.30.0.5")
	})
	b := startNode(t, st, hostConfig("b", "192.0.2.2/24"))
	r.ContainerID = "dhcp2"
	_, err := b.Client.Attach(ctx, "lan", r)
	wantCode(t, err, metadata.CodeHeld, "dhcp/eth0", "host a")
	n.stop()
	n = startNode(t, st, hostConfig("a", "192.0.2.1/24"))
	if at, err := n.Client.Attachment(ctx, "lan", aid("dhcp")); err != nil || len(at.Addresses) != 2 {
		t.Errorf("%+v %v", at, err)
	}
	if err := n.Client.Release(ctx, "lan", aid("dhcp"), 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, n, func(s *metadata.Snapshot) bool { return len(s.HostRoutes) == 0 })
	if _, err := st.Get(ctx, entry.TablePrefix+"lan/172.30.0.5/32"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("its table is left: %v", err)
	}
}

func TestTwoInterfacesAndRepeatedCalls(t *testing.T) {
	ctx := t.Context()
	st := openStore(t, t.TempDir())
	defer st.Close()
	n := startNode(t, st, hostConfig("a", "192.0.2.1/24"))
	define(t, n, "lan", overlay("10.42.0.0/16"))
	r0, r1 := req("c"), req("c")
	r1.IfName = "eth1"
	r0.Name, r0.Labels = "web", map[string]string{"x": "y"}
	var wg sync.WaitGroup
	var first [10]*metadata.Attachment
	for i := range first { // the same, ten times at once
		wg.Go(func() { first[i] = attach(t, n, "lan", r0) })
	}
	wg.Wait()
	second := attach(t, n, "lan", r1)
	for _, f := range first {
		if f.Addresses[0] != first[0].Addresses[0] || f.Addresses[0].Address == second.Addresses[0].Address {
			t.Errorf("%+v %+v", f, second)
		}
	}
	n.stop()
	n = startNode(t, st, hostConfig("a", "192.0.2.1/24"))
	if f := attach(t, n, "lan", r0); f.Addresses[0] != first[0].Addresses[0] {
		t.Errorf("after a restart: %+v", f)
	}
	var c metadata.Container
	if err := n.Client.Get(ctx, "containers", "a/c", &c); err != nil || len(c.Addresses) != 2 || c.Name != "web" ||
		c.Labels["x"] != "y" || c.State != "running" {
		t.Errorf("%+v %v", c, err)
	}
	// The network manager adds what it knows; what the service keeps stays.
	c.Ports, c.Interfaces, c.Addresses = []string{"8080:80/tcp"}, nil, nil
	if err := n.Client.Put(ctx, "containers", "a/c", c); err != nil {
		t.Fatal(err)
	}
	if err := n.Client.Release(ctx, "lan", aid("c"), 0); err != nil {
		t.Fatal(err)
	}
	if err := n.Client.Get(ctx, "containers", "a/c", &c); err != nil || len(c.Addresses) != 1 || len(c.Ports) != 1 {
		t.Errorf("%+v %v", c, err)
	}
	if err := n.Client.Release(ctx, "lan", metadata.AttachmentID{ContainerID: "c", IfName: "eth1"}, 0); err != nil {
		t.Fatal(err)
	}
	wantCode(t, n.Client.Get(ctx, "containers", "a/c", nil), metadata.CodeNotFound)
	if err := n.Client.Release(ctx, "lan", aid("c"), 0); err != nil {
		t.Errorf("releasing twice is no error: %v", err)
	}
	if err := n.Client.Release(ctx, "gone", aid("c"), 0); err != nil {
		t.Errorf("nor is releasing on a network that is gone: %v", err)
	}
}

func TestGCNeedsAList(t *testing.T) {
	ctx := t.Context()
	n, _ := one(t, overlay("10.42.0.0/16"))
	for i := range 5 {
		attach(t, n, "lan", req(fmt.Sprint("c", i)))
	}
	wantCode(t, n.Client.Do(ctx, "POST", "/v1/networks/lan/gc", map[string]any{}, nil), metadata.CodeInvalid, "list")
	r, err := n.Client.GC(ctx, "lan", []metadata.AttachmentID{aid("c1"), aid("c3")})
	if err != nil || len(r.Released) != 3 {
		t.Fatalf("%+v %v", r, err)
	}
	if list, err := n.Client.Allocations(ctx, "lan", false); err != nil || len(list) != 2 {
		t.Errorf("%+v %v", list, err)
	}
	if r, err = n.Client.GC(ctx, "lan", nil); err != nil || len(r.Released) != 2 {
		t.Errorf("%+v %v", r, err)
	}
	if list, err := n.listContainers(ctx, ""); err != nil || len(list) != 0 {
		t.Errorf("%+v %v", list, err)
	}
}

func TestNetworks(t *testing.T) {
	ctx := t.Context()
	a, st := one(t, overlay("10.42.0.0/16"))
	b := startNode(t, st, hostConfig("b", "192.0.2.2/24"))
	// Many networks by two hosts at once: all VNIs differ.
	var wg sync.WaitGroup
	for i := range 20 {
		for _, n := range []*node{a, b} {
			wg.Go(func() {
				r := req("x" + n.cfg.HostName)
				r.Create = overlay(fmt.Sprintf("10.%d.0.0/16", 100+i))
				attach(t, n, fmt.Sprint("n", i), r) // the same network by both
			})
		}
	}
	wg.Wait()
	var list []metadata.Network
	if err := a.Client.Do(ctx, "GET", "/v1/networks", nil, &list); err != nil || len(list) != 21 {
		t.Fatal(len(list), err)
	}
	vnis := map[uint32]string{}
	for _, n := range list {
		if vnis[n.VNI] != "" || n.VNI < 1042 || !n.HostNAT || n.Encapsulation != "vxlan" {
			t.Errorf("%+v has the VNI of %s", n, vnis[n.VNI])
		}
		vnis[n.VNI] = n.Name
	}
	reserved, _, err := store.List(ctx, st, entry.VNIPrefix, 0)
	if err != nil || len(reserved) != 21 {
		t.Errorf("%d VNIs reserved for 21 networks: %v", len(reserved), err)
	}
	_, err = a.Client.Attach(ctx, "nope", req("x"))
	wantCode(t, err, metadata.CodeNotFound, "nope", "known: lan, n0")
	wantCode(t, a.Client.Put(ctx, "networks", "bad", map[string]any{"subnetz": []string{"10.0.0.0/8"}}),
		metadata.CodeInvalid, `unknown key "subnetz", did you mean "subnets"?`)
	wantCode(t, a.Client.Put(ctx, "networks", "bad", overlay("10.42.0.1/16")), metadata.CodeInvalid,
		"did you mean 10.42.0.0/16?")
	wantCode(t, a.Client.Put(ctx, "networks", "bad", overlay("10.42.128.0/17")), metadata.CodeConflict, "network lan")
	dup := overlay("10.7.0.0/16")
	dup.VNI = 1042
	wantCode(t, a.Client.Put(ctx, "networks", "bad", dup), metadata.CodeConflict, "VNI 1042", "network lan")
	changed := overlay("10.100.0.0/16")
	changed.BlockSizeV4 = 24
	wantCode(t, a.Client.Put(ctx, "networks", "n0", changed), metadata.CodeConflict, "block")
	wantCode(t, a.Client.Delete(ctx, "networks", "n0"), metadata.CodeConflict, "2 addresses")
	for _, n := range []*node{a, b} {
		if _, err := n.Client.GC(ctx, "n0", nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.Client.Delete(ctx, "networks", "n0"); err != nil {
		t.Fatal(err)
	}
	eventually(t, b, func(s *metadata.Snapshot) bool {
		_, ok := s.Network("n0")
		return !ok && !slices.ContainsFunc(s.Blocks, func(b metadata.Block) bool { return b.Network == "n0" })
	})
	for _, p := range []string{entry.TablePrefix + "n0/", entry.BlockPrefix + "n0/"} {
		if left, _, err := store.List(ctx, st, p, 0); err != nil || len(left) != 0 {
			t.Errorf("%s: %+v %v", p, left, err)
		}
	}
	flat := &metadata.Network{Subnets: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")},
		Encapsulation: metadata.EncapNone, Gateways: []netip.Addr{addr("192.0.2.254")}}
	define(t, a, "flat", flat)
	for range 3 {
		x := attach(t, a, "flat", req("f"))
		if x.MTU != 1500 || x.Addresses[0].Gateway != addr("192.0.2.254") || x.Addresses[0].Address != addr("192.0.2.3") {
			t.Errorf("the hosts' own addresses .1 and .2 are passed over: %+v", x)
		}
	}
}

func TestDuplicateHostIsRefused(t *testing.T) {
	ctx := t.Context()
	st := openStore(t, t.TempDir())
	defer st.Close()
	a := startNode(t, st, hostConfig("a", "192.0.2.1/24"))
	other := hostConfig("a", "192.0.2.9/24")
	other.MachineID = "machine-imposter"
	_, err := New(ctx, other, st)
	if err == nil {
		t.Fatal("two machines with one name")
	}
	for _, part := range []string{"machine-a", "machine-imposter", "192.0.2.1", "192.0.2.9"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q does not name %s", err, part)
		}
	}
	// The same machine after a crash takes its name back at once, without waiting for the old lease.
	start := time.Now()
	again := startNode(t, st, hostConfig("a", "192.0.2.1/24"))
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("took %v", took)
	}
	a.stop() // gives the old lease up, which holds nothing any more
	eventually(t, again, func(s *metadata.Snapshot) bool { return len(s.Hosts) == 1 && s.Hosts[0].Live })
	// Stopped in order: the name is free at once, and another machine may have it.
	again.stop()
	n := startNode(t, st, other)
	eventually(t, n, func(s *metadata.Snapshot) bool { return s.Hosts[0].MachineID == "machine-imposter" })
}

func TestOverlayMACs(t *testing.T) {
	st := openStore(t, t.TempDir())
	defer st.Close()
	a := startNode(t, st, hostConfig("a", "192.0.2.1/24"))
	b := startNode(t, st, hostConfig("b", "192.0.2.1/24")) // the same address by mistake
	c := startNode(t, st, hostConfig("c", "2001:db8::1/64"))
	var macs []string
	for _, n := range []*node{a, b, c} {
		h, _ := n.view.host(n.cfg.HostName)
		macs = append(macs, h.MAC.String())
	}
	if macs[0] != "0e:00:c0:00:02:01" || macs[1] == macs[0] || !strings.HasPrefix(macs[2], "0e:00:") {
		t.Error(macs)
	}
	b.stop()
	b = startNode(t, st, hostConfig("b", "192.0.2.1/24"))
	if h, _ := b.view.host("b"); h.MAC.String() != macs[1] {
		t.Errorf("%s after a restart, %s before", h.MAC, macs[1])
	}
}

func TestHostRemoval(t *testing.T) {
	ctx := t.Context()
	def := overlay("10.42.0.0/27") // two blocks
	def.BlockSizeV4 = 28
	a, st := one(t, def)
	b := startNode(t, st, hostConfig("b", "192.0.2.2/24"))
	for i := range 12 {
		attach(t, b, "lan", req(fmt.Sprint("b", i)))
	}
	attach(t, a, "lan", req("a0"))
	for i := range 14 {
		attach(t, a, "lan", req(fmt.Sprint("x", i))) // borrows from b at the end
	}
	view, _ := a.Client.View(ctx)
	if len(view.HostRoutes) == 0 {
		t.Fatalf("%+v: nothing borrowed", view)
	}
	data := metadata.Volume{Driver: "lariat-nfs", Name: "data", Scope: "global", State: "ready"}
	for _, n := range []*node{a, b} {
		if err := n.Client.PutVolume(ctx, data); err != nil {
			t.Fatal(err)
		}
	}
	wantCode(t, a.Client.Delete(ctx, "hosts", "b"), metadata.CodeConflict, "live")
	b.stop()
	eventually(t, a, func(s *metadata.Snapshot) bool { h, _ := s.Host("b"); return !h.Live })
	if err := a.Client.Delete(ctx, "hosts", "b"); err != nil {
		t.Fatal(err)
	}
	eventually(t, a, func(s *metadata.Snapshot) bool { return len(s.Hosts) == 1 && len(s.Blocks) == 1 })
	if err := a.Client.Delete(ctx, "hosts", "b"); err != nil {
		t.Errorf("removing what is gone: %v", err)
	}
	if left, err := a.Client.Volumes(ctx, false); err != nil || len(left) != 1 || left[0].Host != "a" {
		t.Errorf("%v %+v, want the volume of a alone", err, left)
	}
	all, err := a.Client.Allocations(ctx, "lan", true)
	if err != nil || len(all) != 15 {
		t.Errorf("%d left, a's own and borrowed ones stay: %v", len(all), err)
	}
	snap, _ := a.Client.Snapshot(ctx)
	if len(snap.Containers) != 15 {
		t.Errorf("%d containers", len(snap.Containers))
	}
	// The block is free again; what a borrowed from it stays a's.
	c := startNode(t, st, hostConfig("c", "192.0.2.3/24"))
	seen := map[netip.Addr]bool{}
	for _, x := range all {
		seen[x.Address] = true
	}
	for i := range 8 {
		x := attach(t, c, "lan", req(fmt.Sprint("c", i)))
		if seen[x.Addresses[0].Address] || seen[x.Addresses[0].Gateway] {
			t.Errorf("%+v is a's", x.Addresses)
		}
		seen[x.Addresses[0].Address] = true
	}
}

func TestEmptyBlocksAreGivenBack(t *testing.T) {
	ctx := t.Context()
	var offset atomic.Int64
	def := overlay("10.42.0.0/24")
	def.BlockSizeV4 = 28
	now := func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
	n, st := one(t, def, func(c *Config) { c.Now = now })
	for i := range 40 {
		attach(t, n, "lan", req(fmt.Sprint("c", i)))
	}
	if _, err := n.Client.GC(ctx, "lan", []metadata.AttachmentID{aid("c39")}); err != nil {
		t.Fatal(err)
	}
	if err := n.ReleaseEmptyBlocks(ctx, "lan"); err != nil {
		t.Fatal(err)
	}
	if v := n.view.snapshot(); len(v.Blocks) != 3 {
		t.Errorf("%d blocks: released addresses still cool down", len(v.Blocks))
	}
	offset.Store(int64(time.Hour))
	if err := n.ReleaseEmptyBlocks(ctx, "lan"); err != nil {
		t.Fatal(err)
	}
	v := n.view.snapshot()
	if len(v.Blocks) != 2 || !v.Blocks[0].Gateway.IsValid() {
		t.Errorf("%+v: the one with the gateway and the one in use stay", v.Blocks)
	}
	if left, _, err := store.List(ctx, st, entry.TablePrefix, 0); err != nil || len(left) != 2 {
		t.Errorf("%d tables %v", len(left), err)
	}
	seen := map[uint64]bool{}
	for i := range 30 {
		x := attach(t, n, "lan", req(fmt.Sprint("d", i))).Addresses[0]
		if seen[x.Sequence] || x.Sequence < 40 {
			t.Errorf("sequence %d came back", x.Sequence)
		}
		seen[x.Sequence] = true
	}
}

func TestWatchResumes(t *testing.T) {
	ctx := t.Context()
	n, _ := one(t, overlay("10.42.0.0/16"))
	lines := func(revision int64, count int) []metadata.Event {
		t.Helper()
		ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		w, r := io.Pipe()
		req := httptest.NewRequest("GET", fmt.Sprintf("/v1/watch?revision=%d", revision), nil).WithContext(ctx)
		go n.API().ServeHTTP(&pipeWriter{r, http.Header{}}, req)
		var out []metadata.Event
		d := json.NewDecoder(w)
		for range count {
			var ev metadata.Event
			if err := d.Decode(&ev); err != nil {
				t.Fatal(err)
			}
			out = append(out, ev)
		}
		w.Close()
		return out
	}
	ev := lines(0, 1)
	if ev[0].Type != metadata.EventSnapshot || ev[0].Revision == 0 {
		t.Fatalf("%+v", ev)
	}
	at := ev[0].Revision
	attach(t, n, "lan", req("c"))
	ev = lines(at, 2)
	if ev[0].Type != metadata.EventBookmark || ev[1].Kind != metadata.KindBlock || ev[1].Key != "lan/10.42.0.0/26" ||
		ev[1].Revision <= at {
		t.Errorf("%+v", ev)
	}
	if ev = lines(1, 1); ev[0].Type != metadata.EventSnapshot {
		t.Errorf("too old: start over: %+v", ev)
	}
	if ev = lines(1<<40, 1); ev[0].Type != metadata.EventSnapshot {
		t.Errorf("from another store's future: start over: %+v", ev)
	}
}

type pipeWriter struct {
	w *io.PipeWriter
	h http.Header
}

func (p *pipeWriter) Header() http.Header              { return p.h }
func (p *pipeWriter) WriteHeader(int)                  {}
func (p *pipeWriter) Write(b []byte) (int, error)      { return p.w.Write(b) }
func (p *pipeWriter) Flush()                           {}
func (p *pipeWriter) SetWriteDeadline(time.Time) error { return nil }

func TestF149_OnlyRootWrites(t *testing.T) {
	n, _ := one(t, overlay("10.42.0.0/16"))
	attach(t, n, "lan", metadata.AttachRequest{ContainerID: "c", IfName: "eth0", Name: "Web"})
	h := n.API()
	nobody := context.WithValue(t.Context(), service.Peer{}, unix.Ucred{Uid: 65534})
	for _, ctx := range []context.Context{nobody, t.Context()} {
		for _, m := range []string{"POST /v1/networks/lan/attachments", "POST /v1/networks/lan/gc",
			"DELETE /v1/networks/lan/attachments/c/eth0", "PUT /v1/networks/x",
			"DELETE /v1/networks/lan", "PUT /v1/hosts/x", "DELETE /v1/hosts/a", "PUT /v1/containers/a/c",
			"DELETE /v1/containers/a/c", "GET /v1/backup"} {
			method, path, _ := strings.Cut(m, " ")
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequest(method, path, strings.NewReader(`{"valid":[]}`)).WithContext(ctx))
			if w.Code != http.StatusForbidden {
				t.Errorf("%s: %d", m, w.Code)
			}
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("GET", "/v1/snapshot", nil).WithContext(ctx))
		if w.Code != 200 {
			t.Errorf("reading: %d", w.Code)
		}
	}
}

// TestTree: a container reads its own, whatever it claims to be, from the moment it has its address, and
// writes nothing.
func TestTree(t *testing.T) {
	n, _ := one(t, overlay("10.42.0.0/16"))
	th := n.Tree()
	get := func(method, path, from string, headers ...string) *httptest.ResponseRecorder {
		r := httptest.NewRequest(method, path, nil)
		r.RemoteAddr = from
		for i := 0; i < len(headers); i += 2 {
			r.Header.Set(headers[i], headers[i+1])
		}
		w := httptest.NewRecorder()
		th.ServeHTTP(w, r)
		return w
	}
	for i, id := range []string{"c", "d", "e", "f"} { // faster than trees are built
		attach(t, n, "lan", metadata.AttachRequest{ContainerID: id, IfName: "eth0", Name: "Web-" + id})
		if w := get("GET", "/latest/self/container/name", fmt.Sprintf("10.42.0.%d:999", 2+i)); w.Code != 200 ||
			w.Body.String() != "web-"+id {
			t.Errorf("%s: %d %q", id, w.Code, w.Body)
		}
	}
	for _, m := range []string{"POST", "PUT", "DELETE", "PATCH", "OPTIONS"} {
		if w := get(m, "/latest/self/container/name", "10.42.0.2:999"); w.Code != http.StatusMethodNotAllowed {
			t.Errorf("%s: %d", m, w.Code)
		}
	}
	if w := get("GET", "/latest/self/container/name", "10.42.0.2:999", "X-Forwarded-For", "10.42.0.3"); w.Code != 200 ||
		w.Body.String() != "web-c" {
		t.Errorf("%d %q", w.Code, w.Body)
	}
	if w := get("GET", "/latest/self/container/name", "10.42.0.99:999", "X-Forwarded-For", "10.42.0.2"); w.Code != 403 ||
		!strings.Contains(w.Body.String(), "10.42.0.99") {
		t.Errorf("a forwarded-for header opened another's self: %d %s", w.Code, w.Body)
	}
	if w := get("HEAD", "/latest/self/container/name", "10.42.0.2:999"); w.Code != 200 || w.Body.String() != "" {
		t.Errorf("%d %q", w.Code, w.Body)
	}
	// No page of another origin reads it, unless the setting names it.
	for _, origin := range []string{"", "https://example.org"} {
		n.cfg.TreeOrigin = origin
		if got := get("GET", "/latest", "10.42.0.2:999", "Origin",
			"https://example.org").Header().Get("Access-Control-Allow-Origin"); got != origin {
			t.Errorf("setting %q: %q", origin, got)
		}
	}
	// The host itself comes by the address that it speaks to.
	r := httptest.NewRequest("GET", "/latest/self/host/name", nil)
	r.RemoteAddr = "169.254.169.250:999"
	w := httptest.NewRecorder()
	if th.ServeHTTP(w, r); w.Code != 403 {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	w = httptest.NewRecorder()
	th.ServeHTTP(w, r.WithContext(context.WithValue(t.Context(), http.LocalAddrContextKey,
		net.Addr(&net.TCPAddr{IP: net.IPv4(169, 254, 169, 250), Port: 80}))))
	if w.Code != 200 || w.Body.String() != "a" {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}
