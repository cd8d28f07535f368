package failure_test

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/attach"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/test/lab"
)

// chaos is 40 workers that play runtimes on three hosts, and a saboteur.
type chaos struct {
	t     *testing.T
	hosts []*lab.Host
	stop  context.Context

	adds, dels, kills, refused atomic.Int64

	mu    sync.Mutex
	owner map[netip.Addr]*victim // of an acknowledged ADD, until its DEL begins
	all   []*victim
}

// victim is a container whose ADD was asked for at least once.
type victim struct {
	*lab.Container
	state string
	addrs []netip.Addr
	count int // of ADDs
}

// What a runtime knows of a container.
const (
	live    = "live"    // ADD was acknowledged, DEL was not asked for
	unknown = "unknown" // the last verb failed or was killed
	gone    = "gone"    // DEL was acknowledged
)

// TestF124_F126_F132_F133_Chaos: for 15 s (CHAOS=60s for longer) containers come and go on all hosts while
// plugins, metadata services (up to all of them at once, and with them the store) and managers are killed and
// started again. No address is ever given twice; nothing acknowledged is lost; nothing stays of what is gone.
// The schedule follows from a seed (CHAOS_SEED repeats one).
func TestF124_F126_F132_F133_Chaos(t *testing.T) {
	duration, err := time.ParseDuration(cmp.Or(os.Getenv("CHAOS"), "15s"))
	must(t, err)
	seed, err := strconv.ParseUint(cmp.Or(os.Getenv("CHAOS_SEED"), fmt.Sprint(time.Now().UnixNano()%1e9)), 10, 64)
	must(t, err)
	t.Logf("CHAOS=%s CHAOS_SEED=%d", duration, seed)
	c := &chaos{t: t, hosts: start(t).Hosts, owner: map[netip.Addr]*victim{}}
	before := make([]string, len(c.hosts))
	for i, h := range c.hosts {
		before[i] = world(t, h)
	}
	var cancel func()
	c.stop, cancel = context.WithTimeout(ctx, duration)
	defer cancel()
	var wg sync.WaitGroup
	for w := range 40 {
		wg.Go(func() { c.worker(c.hosts[w%len(c.hosts)], w, rand.New(rand.NewPCG(seed, uint64(w)))) })
	}
	wg.Go(func() { c.saboteur(rand.New(rand.NewPCG(seed, 1000))) })
	wg.Wait()
	t.Logf("%d ADDs and %d DELs acknowledged, %d verbs killed, %d refused", c.adds.Load(), c.dels.Load(), c.kills.Load(),
		c.refused.Load())
	if c.adds.Load() < 50 || c.kills.Load() < 10 {
		t.Errorf("hardly anything happened")
	}
	c.judge(before)
}

// worker plays a runtime with a few containers.
func (c *chaos) worker(h *lab.Host, w int, rng *rand.Rand) {
	var mine []*victim
	for n := 0; c.stop.Err() == nil; n++ {
		i := rng.IntN(4)
		switch {
		case i >= len(mine):
			ns, err := h.NewContainer(fmt.Sprintf("w%d-%d", w, n))
			if err != nil {
				c.t.Error(err)
				return
			}
			v := &victim{Container: ns, state: gone}
			mine = append(mine, v)
			c.mu.Lock()
			c.all = append(c.all, v)
			c.mu.Unlock()
			c.add(v, rng)
		case mine[i].state == live:
			c.del(mine[i], rng)
		case mine[i].state == unknown && rng.IntN(4) == 0:
			// The runtime forgets it: only GC or the manager will find what it left.
			if rng.IntN(2) == 0 {
				if err := mine[i].Netns.Remove(); err != nil {
					c.t.Error(err)
				}
				mine[i].Path = ""
			}
			mine = slices.Delete(mine, i, i+1)
		case mine[i].state == unknown && rng.IntN(2) == 0:
			c.del(mine[i], rng)
		default: // the same container id again, as after a reboot of the runtime
			c.add(mine[i], rng)
		}
	}
}

// killer ends the context of one verb in six after some milliseconds, and so its process.
func killer(rng *rand.Rand) (context.Context, func()) {
	if rng.IntN(6) > 0 {
		return context.WithTimeout(ctx, 60*time.Second)
	}
	return context.WithTimeout(ctx, time.Duration(rng.IntN(20_000))*time.Microsecond)
}

func (c *chaos) add(v *victim, rng *rand.Rand) {
	ctx, cancel := killer(rng)
	defer cancel()
	v.count++
	v.state = unknown
	o, err := call(v.Container, "ADD").Run(ctx, v.Host.Netns)
	switch {
	case err != nil || o.Code == -1:
		c.kills.Add(1)
		return
	case o.Code != 0:
		c.refused.Add(1)
		return
	}
	c.adds.Add(1)
	v.state, v.addrs = live, nil
	var res struct {
		IPs []struct{ Address netip.Prefix }
	}
	if err := json.Unmarshal([]byte(o.Stdout), &res); err != nil || len(res.IPs) != 2 {
		c.t.Errorf("result %s: %v", o.Stdout, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, ip := range res.IPs {
		a := ip.Address.Addr()
		if other := c.owner[a]; other != nil && other != v {
			c.t.Errorf("F124: %s was given to %s on %s, while %s on %s has it", a, v.Name, v.Host.Name, other.Name,
				other.Host.Name)
		}
		c.owner[a] = v
		v.addrs = append(v.addrs, a)
	}
}

func (c *chaos) del(v *victim, rng *rand.Rand) {
	c.mu.Lock()
	for _, a := range v.addrs {
		if c.owner[a] == v {
			delete(c.owner, a)
		}
	}
	v.addrs = nil
	c.mu.Unlock()
	v.state = unknown
	ctx, cancel := killer(rng)
	defer cancel()
	o, err := call(v.Container, "DEL").Run(ctx, v.Host.Netns)
	switch {
	case err != nil || o.Code == -1:
		c.kills.Add(1)
	case o.Code != 0:
		// With the service away DEL notes its work and succeeds. With the store's quorum gone the service is there and
		// says so; that counts as away.
		c.t.Errorf("DEL of %s on %s: %s", v.Name, v.Host.Name, o.Stdout)
	default:
		c.dels.Add(1)
		v.state = gone
	}
}

// saboteur kills daemons and starts them again.
func (c *chaos) saboteur(rng *rand.Rand) {
	for c.stop.Err() == nil {
		select {
		case <-c.stop.Done():
		case <-time.After(time.Duration(100+rng.IntN(900)) * time.Millisecond):
		}
		var down []*lab.Host
		switch n := rng.IntN(10); {
		case n < 4:
			h := c.hosts[rng.IntN(3)]
			h.Manager.Kill()
			if err := c.restart(func() error { return h.StartManager(ctx) }); err != nil {
				c.t.Error(err)
				return
			}
		case n < 8:
			down = []*lab.Host{c.hosts[rng.IntN(3)]}
		case n < 9: // no quorum
			down = slices.Delete(slices.Clone(c.hosts), n%3, n%3+1)
		default:
			down = c.hosts
		}
		for _, h := range down {
			h.Metadata.Kill()
		}
		errs := make(chan error, len(down))
		for _, h := range down {
			go func() { errs <- c.restart(func() error { return startMetadata(cluster, h) }) }()
		}
		for range down {
			if err := <-errs; err != nil {
				c.t.Error(err)
			}
		}
	}
}

// restart starts a program, and again when it ends at once, as its systemd unit does.
func (c *chaos) restart(start func() error) (err error) {
	for range 5 {
		if err = start(); err == nil || !strings.Contains(err.Error(), "ended before it was ready") {
			return err
		}
		c.t.Logf("a start that failed: %v", err)
	}
	return err
}

// judge looks at what is left.
func (c *chaos) judge(before []string) {
	t := c.t
	lives := map[string]*victim{} // by container id
	want := make([]map[string]bool, len(c.hosts))
	for i := range want {
		want[i] = map[string]bool{}
	}
	for _, v := range c.all {
		if v.state == live {
			lives[v.ID] = v
			for _, a := range v.addrs {
				want[v.Host.Index][a.String()+" "+v.ID] = true
			}
		} else if v.Path != "" {
			must(t, v.Netns.Remove()) // the runtime has no such container any more
		}
	}
	// Right after the storm, before anybody cleans up: each address has one holder, and that of a live container
	// is itself.
	holders := map[netip.Addr]string{}
	list, err := c.hosts[0].Client().Allocations(ctx, "overlay", true)
	must(t, err)
	for _, a := range list {
		if other, twice := holders[a.Address]; twice {
			t.Errorf("F124: %s is held by %s and by %s", a.Address, other, a.ContainerID)
		}
		holders[a.Address] = a.ContainerID
	}
	for _, v := range lives {
		for _, a := range v.addrs {
			if holders[a] != v.ID {
				t.Errorf("the ADD of %s on %s was acknowledged with %s, which is held by %q", v.Name, v.Host.Name, a, holders[a])
			}
		}
	}
	// The runtimes of two hosts send GC; on the third the manager is alone (F133).
	for _, h := range c.hosts[:2] {
		var l []*lab.Container
		for _, v := range lives {
			if v.Host == h {
				l = append(l, v.Container)
			}
		}
		works(t, h, gc(h, l...))
	}
	for i, h := range c.hosts {
		eventually(t, 20*time.Second, func() error {
			list, err := h.Client().Allocations(ctx, "overlay", false)
			if err != nil {
				return err
			}
			var errs []error
			have := map[string]bool{}
			for _, a := range list {
				have[a.Address.String()+" "+a.ContainerID] = true
				if !want[i][a.Address.String()+" "+a.ContainerID] {
					errs = append(errs, fmt.Errorf("host %s: %s is held by %s/%s, which is not alive", h.Name, a.Address,
						a.ContainerID, a.IfName))
				}
			}
			for x := range want[i] {
				if !have[x] {
					errs = append(errs, fmt.Errorf("host %s: %s of a live container is not held", h.Name, x))
				}
			}
			return errors.Join(errs...)
		})
		eventually(t, 20*time.Second, func() error {
			var errs []error
			for _, l := range strings.Split(difference(before[i], world(t, h)), "\n") {
				if l != "" && !mentions(l, lives) {
					errs = append(errs, fmt.Errorf("host %s: %s", h.Name, l))
				}
			}
			return errors.Join(errs...)
		})
	}
	// Live containers reach each other, each one another on the next host.
	var order []*victim
	for _, v := range c.all {
		if v.state == live {
			order = append(order, v)
		}
	}
	slices.SortStableFunc(order, func(a, b *victim) int { return a.Host.Index - b.Host.Index })
	var wg sync.WaitGroup
	slots := make(chan struct{}, 8)
	for i, v := range order {
		to := order[(i+len(order)/3+1)%len(order)]
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			short, cancel := context.WithTimeout(ctx, 5*time.Second)
			defer cancel()
			for _, a := range to.addrs {
				if _, err := v.Ping(short, a, 56); err != nil {
					t.Errorf("%v (%s on %s, %d ADDs, to %s on %s, %d ADDs)\n%s%s", err, v.Name, v.Host.Name, v.count, to.Name,
						to.Host.Name, to.count, autopsy(v), autopsy(to))
				}
			}
		})
	}
	wg.Wait()
	t.Logf("%d containers live, of %d; they ping", len(order), len(c.all))
	for _, v := range order {
		works(t, v.Host, call(v.Container, "DEL"))
		must(t, v.Netns.Remove())
	}
	for i, h := range c.hosts {
		eventually(t, 20*time.Second, func() error {
			if d := difference(before[i], world(t, h)); d != "" {
				return fmt.Errorf("host %s at the end:\n%s", h.Name, d)
			}
			return nil
		})
	}
}

// autopsy is what CHECK would want to know, from both ends.
func autopsy(v *victim) string {
	port := attach.HostName(metadata.AttachmentID{ContainerID: v.ID, IfName: "eth0"})
	inside, _ := v.Output(ctx, "sh", "-c", "ip -d addr show dev eth0; ip neigh; ip route; ip -6 route")
	outside, _ := v.Host.Output(ctx, "sh", "-c", "ip -d link show dev "+port+"; ip route show dev "+port+
		"; ip -6 route show dev "+port)
	return fmt.Sprintf("in %s:\n%son %s:\n%s", v.Name, inside, v.Host.Name, outside)
}

// mentions reports whether a line of a world is about a live container: by its id, its port or its address;
// or about an address that another host announces.
func mentions(line string, lives map[string]*victim) bool {
	for id, v := range lives {
		if strings.Contains(line, id) ||
			strings.Contains(line, attach.HostName(metadata.AttachmentID{ContainerID: id, IfName: "eth0"})) {
			return true
		}
		for _, a := range v.addrs {
			if strings.Contains(line, " "+a.String()+"/") {
				return true
			}
		}
	}
	return false
}
