package allocator_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/allocate"
	"github.com/lariat-net/lariat/pkg/metadata/server/allocator"
	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// network returns the definition of a network with blocks of sixteen addresses, or all of a smaller subnet.
func network(subnets ...string) metadata.Network {
	n := metadata.Network{BlockSizeV4: 28, BlockSizeV6: 124, CooldownSeconds: 60}
	for _, s := range subnets {
		n.Subnets = append(n.Subnets, netip.MustParsePrefix(s))
	}
	return n
}

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

func TestF126_FIFOCooldownAndNoABA(t *testing.T) {
	c := newCluster(t, network("10.42.0.0/28"))
	a := c.start("a")
	var order []allocate.Entry
	for i := range 13 { // 16 less network, broadcast, gateway
		order = append(order, a.attach(fmt.Sprint("c", i)))
	}
	for _, i := range []int{5, 2, 9} {
		c.now = c.now.Add(time.Second)
		a.release(fmt.Sprint("c", i), 0)
	}
	// All three are in their cooldown: the longest released one is better than no container.
	if x := a.attach("hot"); x.Address != order[5].Address {
		t.Errorf("%s, want %s", x.Address, order[5].Address)
	}
	c.now = c.now.Add(2 * time.Minute)
	x := a.attach("d1")
	if x.Address != order[2].Address {
		t.Errorf("%s, want %s: first released, first used", x.Address, order[2].Address)
	}
	// A late DEL of the former owner.
	a.release("c2", order[2].Sequence)
	// The same container id comes back: a late DEL frees only what was allocated by then.
	a.release("d1", x.Sequence)
	y := a.attach("d1")
	if y.Sequence <= x.Sequence {
		t.Errorf("sequence %d after %d", y.Sequence, x.Sequence)
	}
	a.release("d1", x.Sequence)
	if now := a.EntriesOf(aid("d1")); len(now) != 1 || now[0].Address != y.Address {
		t.Errorf("the late release freed the new one: %+v", now)
	}
}

func TestF126_ReleasedComesLastWhileOthersAreFresh(t *testing.T) {
	n := network("10.42.0.0/24")
	n.BlockSizeV4 = 24
	a := newCluster(t, n).start("a")
	first := a.attach("c").Address
	for i := range 200 {
		a.release("c", 0)
		if x := a.attach("c").Address; x == first && i < 190 {
			t.Fatalf("%s came back after %d others", x, i)
		}
	}
}

// TestRequestsThatWaitTogetherShareAWrite: those that arrive during a write are one further write.
func TestRequestsThatWaitTogetherShareAWrite(t *testing.T) {
	n := network("10.42.0.0/24")
	n.BlockSizeV4 = 24
	a := newCluster(t, n).start("a")
	a.attach("first")
	a.writes = 0
	under, goOn := make(chan struct{}), make(chan struct{})
	var once sync.Once
	a.before = func([]store.Change) {
		once.Do(func() {
			close(under)
			<-goOn
		})
	}
	var wg sync.WaitGroup
	wg.Go(func() { a.attach("second") })
	<-under
	const more = 100
	for i := range more {
		wg.Go(func() { a.attach(fmt.Sprint("c", i)) })
	}
	for a.Queued() < more {
		select {
		case <-a.ctx.Done():
			t.Fatal("they are not queued within a minute")
		default:
			runtime.Gosched()
		}
	}
	close(goOn)
	wg.Wait()
	if a.writes != 2 || len(a.Entries()) != more+2 {
		t.Errorf("%d writes for %d entries, want 2", a.writes, len(a.Entries()))
	}
}

// TestBorrowedAddressesHaveHostRoutes: a host without a block borrows, and the host route comes before the entry and
// ends after it.
func TestBorrowedAddressesHaveHostRoutes(t *testing.T) {
	c := newCluster(t, network("10.42.0.0/28"))
	a, b := c.start("a"), c.start("b")
	a.attach("of-a")
	var order []string
	b.before = func(changes []store.Change) {
		kind, _, _ := strings.Cut(strings.TrimPrefix(changes[0].Key, entry.ViewPrefix), "/")
		order = append(order, fmt.Sprint(kind, " ", changes[0].Value != nil))
	}
	x := b.attach("of-b")
	c.wantKeys(entry.HostRoutePrefix, lan+"/"+x.Address.String())
	if again := b.attach("of-b"); again != x {
		t.Errorf("%+v, had %+v", again, x)
	}
	_, err := a.ask("thief", x.Address.String())
	wantCode(t, err, metadata.CodeHeld, "of-b/eth0 on host b")
	b.release("of-b", 0)
	c.wantKeys(entry.HostRoutePrefix)
	if want := []string{"endpoints true", "addresses true", "addresses true", "endpoints false"}; !slices.Equal(order,
		want) {
		t.Errorf("the order of writes is %q, want %q", order, want)
	}
}

// TestAfterAKill: host routes and containers' objects agree with the tables again after a start, whatever a killed
// process wrote of them.
func TestAfterAKill(t *testing.T) {
	c := newCluster(t, network("10.42.0.0/28"))
	a, b := c.start("a"), c.start("b")
	a.attach("of-a")
	kept := b.attach("kept").Address
	c.wantKeys(entry.HostRoutePrefix, lan+"/"+kept.String())
	if _, err := store.One(b.ctx, c, store.Change{Key: entry.HostRouteKey(lan, kept),
		Revision: store.Any}); err != nil {
		t.Fatal(err)
	}
	needless := netip.MustParseAddr("10.42.0.9") // announced, and killed before the entry was written
	c.put(entry.HostRouteKey(lan, needless), metadata.HostRoute{Network: lan, Address: needless, Host: "b"})
	half := metadata.Container{ID: "half", Host: "b", Interfaces: []metadata.ContainerInterface{
		{Network: lan, IfName: "eth0", Addresses: []netip.Addr{needless}}}, Addresses: []netip.Addr{needless}}
	c.put(entry.ContainerPrefix+metadata.ContainerKey(half), half)

	b = c.start("b")
	if err := b.Load(b.ctx); err != nil {
		t.Fatal(err)
	}
	c.wantKeys(entry.HostRoutePrefix, lan+"/"+kept.String())
	c.wantKeys(entry.ContainerPrefix, "a/of-a", "b/kept")
	if !b.Holds(aid("kept")) || len(b.Entries()) != 1 {
		t.Errorf("it holds %+v", b.Entries())
	}
}

// TestHalfOfTwoFamiliesIsRolledBack: another host takes the last IPv6 address between plan and write. The IPv4 half
// is written then, and must not stay.
func TestHalfOfTwoFamiliesIsRolledBack(t *testing.T) {
	n := network("10.42.0.0/28", "fd42::/126") // of four, one is the router's anycast address and one the gateway
	n.BlockSizeV6 = 126
	c := newCluster(t, n)
	a, b := c.start("a"), c.start("b")
	a.attach("first")
	last := netip.MustParseAddr("fd42::3")
	var once sync.Once
	a.before = func(changes []store.Change) {
		if len(changes) > 1 {
			once.Do(func() {
				if _, err := b.Attach(b.ctx, allocator.Attachment{Want: []netip.Addr{last}, AttachRequest: &metadata.AttachRequest{
					ContainerID: "faster", IfName: "eth0", Foreign: true}}); err != nil {
					t.Error(err)
				}
			})
		}
	}
	_, err := a.ask("second")
	wantCode(t, err, metadata.CodeExhausted, "fd42::/126")
	if a.Holds(aid("second")) || len(a.Entries()) != 2 {
		t.Errorf("a holds %+v", a.Entries())
	}
	c.wantKeys(entry.ContainerPrefix, "a/first", "b/faster")
}

// TestEndlessConflictsEnd: a table that changes before each write ends a request with an error.
func TestEndlessConflictsEnd(t *testing.T) {
	c := newCluster(t, network("10.42.0.0/28"))
	a := c.start("a")
	a.attach("first")
	key := entry.TableKey(lan, netip.MustParsePrefix("10.42.0.0/28"))
	a.before = func(changes []store.Change) {
		for _, ch := range changes {
			if ch.Key == key {
				e, err := c.Get(a.ctx, key)
				if err != nil {
					t.Error(err)
				}
				if _, err := store.One(a.ctx, c, store.Change{Key: key, Value: e.Value, Revision: store.Any}); err != nil {
					t.Error(err)
				}
			}
		}
	}
	_, err := a.ask("second")
	if !errors.Is(err, store.ErrUnavailable) || !strings.Contains(err.Error(), "other hosts keep changing") {
		t.Errorf("%v", err)
	}
	a.before = nil
	a.attach("third")
}

// TestEmptyBlockInUseByABorrowerStays: a host that borrows while the block is being released keeps the block there.
func TestEmptyBlockInUseByABorrowerStays(t *testing.T) {
	c := newCluster(t, network("10.42.0.0/27"))
	a, b := c.start("a"), c.start("b")
	for i := range 14 { // fills the first block; the second has no gateway
		a.attach(fmt.Sprint("c", i))
	}
	second := a.attach("last")
	c.wantKeys(entry.BlockPrefix, "lan/10.42.0.0/28", "lan/10.42.0.16/28")
	for i := range 14 {
		a.release(fmt.Sprint("c", i), 0)
	}
	a.release("last", 0)
	c.now = c.now.Add(time.Hour)
	var once sync.Once
	a.before = func([]store.Change) { once.Do(func() { b.attach("borrower", second.Address.String()) }) }
	if err := a.ReleaseEmpty(a.ctx, c.now); err != nil {
		t.Fatal(err)
	}
	c.wantKeys(entry.BlockPrefix, "lan/10.42.0.0/28", "lan/10.42.0.16/28")
	b.release("borrower", 0)
	c.now = c.now.Add(time.Hour)
	if err := a.ReleaseEmpty(a.ctx, c.now); err != nil {
		t.Fatal(err)
	}
	c.wantKeys(entry.BlockPrefix, "lan/10.42.0.0/28")
}

// TestAContextThatEndedCostsNothing: a request whose caller has left is not planned.
func TestAContextThatEndedCostsNothing(t *testing.T) {
	c := newCluster(t, network("10.42.0.0/28"))
	a := c.start("a")
	ctx, cancel := context.WithCancel(a.ctx)
	cancel()
	a.ctx, ctx = ctx, a.ctx
	if _, err := a.ask("gone"); err == nil {
		t.Error("it got an address")
	}
	a.ctx = ctx
	a.attach("here")
	if a.Holds(aid("gone")) {
		t.Errorf("%+v", a.Entries())
	}
}
