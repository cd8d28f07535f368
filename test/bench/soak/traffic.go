package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/test/lab"
)

const (
	pause   = 200 * time.Millisecond // between two pings of a container
	patient = 10 * time.Second       // for an answer; what comes later counts as lost
	hang    = 900 * time.Millisecond // an answer so late waited for a repeated ARP request
)

// traffic is the pings between all living containers.
//
// A container pings and is pinged from the moment that its ADD has returned until its DEL is about to
// be called; what is under way then is waited for. So every packet must arrive, whatever is killed or
// away meanwhile. There is one exception, which join makes: other hosts do not ping the first
// container of a new block before they have the block's route.
type traffic struct {
	r *report

	mu      sync.Mutex
	moved   *sync.Cond // a ping was answered or given up
	ends    []*end
	flying  map[flight]*ping
	sent    map[string]int // by pair: the same host, other hosts
	lost    map[string]int
	first   int // answers of first pings
	late    int // of these, those that came late
	slowest time.Duration
	wg      sync.WaitGroup
}

// flight is what tells pings apart.
type flight struct {
	from *end
	v6   bool
	seq  int
}

type ping struct {
	to    *end
	at    time.Time
	first bool
}

// end is a living container.
type end struct {
	label, network string
	host           *lab.Host
	addrs          [2]netip.Addr // IPv4, IPv6
	conns          [2]*icmp.PacketConn
	announced      bool // all hosts have the route
	stop           context.CancelFunc
	seq            int // guarded by traffic.mu, as all that changes
	open           int // pings under way from and to it
	gone           bool
}

func newTraffic(r *report) *traffic {
	t := &traffic{r: r, flying: map[flight]*ping{}, sent: map[string]int{}, lost: map[string]int{}}
	t.moved = sync.NewCond(&t.mu)
	return t
}

// join lets a container ping and be pinged, by those of its own host. Announce opens it to all.
func (t *traffic) join(c *lab.Container, network string) (*end, error) {
	e := &end{label: c.Name, network: network, host: c.Host, addrs: [2]netip.Addr{c.Addr(false), c.Addr(true)}}
	err := c.Do(func() (err error) {
		for i, network := range []string{"ip4:icmp", "ip6:ipv6-icmp"} {
			if e.conns[i], err = icmp.ListenPacket(network, ""); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("sockets in %s: %w", c.Name, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	e.stop = cancel
	t.mu.Lock()
	t.ends = append(t.ends, e)
	t.mu.Unlock()
	for i := range e.conns {
		t.wg.Go(func() { t.receive(e, i == 1) })
	}
	t.send(e, true)
	if other := t.partner(e); other != nil { // and the other way round
		t.sendTo(other, e, true)
	}
	t.wg.Go(func() {
		tick := time.NewTicker(pause)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				t.send(e, false)
			}
		}
	})
	return e, nil
}

// announce says that all hosts know the way to the container.
func (t *traffic) announce(e *end) {
	t.mu.Lock()
	e.announced = true
	t.mu.Unlock()
}

// leave ends a container's pings, waits for what is under way from and to it, and counts what does not come.
func (t *traffic) leave(e *end) {
	e.stop()
	t.mu.Lock()
	t.ends = slices.DeleteFunc(t.ends, func(o *end) bool { return o == e })
	e.gone = true
	late := time.AfterFunc(patient, func() { t.expire(time.Now()) })
	for e.open > 0 {
		t.moved.Wait()
	}
	late.Stop()
	t.mu.Unlock()
	for _, c := range e.conns {
		c.Close()
	}
}

// close is for the end, when all have left.
func (t *traffic) close() { t.wg.Wait() }

// partner is a container that another one may ping now.
func (t *traffic) partner(e *end) *end {
	t.mu.Lock()
	defer t.mu.Unlock()
	var may []*end
	for _, o := range t.ends {
		if o != e && o.network == e.network && (o.host == e.host || o.announced && e.announced) {
			may = append(may, o)
		}
	}
	if len(may) == 0 {
		return nil
	}
	return may[rand.IntN(len(may))]
}

func (t *traffic) send(e *end, first bool) {
	if to := t.partner(e); to != nil {
		t.sendTo(e, to, first)
	}
}

func (t *traffic) sendTo(from, to *end, first bool) {
	for i := range from.addrs {
		v6 := i == 1
		t.mu.Lock()
		if from.gone || to.gone {
			t.mu.Unlock()
			return
		}
		from.seq = (from.seq + 1) & 0xffff
		key := flight{from, v6, from.seq}
		t.flying[key] = &ping{to: to, at: time.Now(), first: first}
		from.open++
		to.open++
		t.sent[pair(from, to)]++
		t.mu.Unlock()
		echo := icmp.Type(ipv4.ICMPTypeEcho)
		if v6 {
			echo = ipv6.ICMPTypeEchoRequest
		}
		packet, err := (&icmp.Message{Type: echo, Body: &icmp.Echo{ID: 1, Seq: key.seq, Data: make([]byte, 56)}}).Marshal(nil)
		if err == nil {
			_, err = from.conns[i].WriteTo(packet, &net.IPAddr{IP: to.addrs[i].AsSlice()})
		}
		if err != nil {
			t.mu.Lock()
			t.give(key, fmt.Sprintf("not sent: %v", err))
			t.mu.Unlock()
		}
	}
}

func pair(a, b *end) string {
	if a.host == b.host {
		return "on one host"
	}
	return "between hosts"
}

// receive takes the answers until the container's socket is closed.
func (t *traffic) receive(e *end, v6 bool) {
	i, reply, proto := 0, icmp.Type(ipv4.ICMPTypeEchoReply), unix.IPPROTO_ICMP
	if v6 {
		i, reply, proto = 1, ipv6.ICMPTypeEchoReply, unix.IPPROTO_ICMPV6
	}
	for buf := make([]byte, 1500); ; {
		n, _, err := e.conns[i].ReadFrom(buf)
		if err != nil {
			return
		}
		m, err := icmp.ParseMessage(proto, buf[:n])
		if err != nil || m.Type != reply {
			continue
		}
		body, ok := m.Body.(*icmp.Echo)
		if !ok {
			continue
		}
		t.mu.Lock()
		if p := t.flying[flight{e, v6, body.Seq}]; p != nil {
			took := time.Since(p.at)
			t.slowest = max(t.slowest, took)
			if p.first {
				t.first++
				if took > hang {
					t.late++
				}
			}
			t.land(flight{e, v6, body.Seq}, p)
		}
		t.mu.Unlock()
	}
}

// land takes a ping out of the air.
func (t *traffic) land(key flight, p *ping) {
	delete(t.flying, key)
	key.from.open--
	p.to.open--
	t.moved.Broadcast()
}

// give gives a ping up.
func (t *traffic) give(key flight, why string) {
	p := t.flying[key]
	if p == nil {
		return
	}
	t.land(key, p)
	t.lost[pair(key.from, p.to)]++
	family := map[bool]string{false: "IPv4", true: "IPv6"}[key.v6]
	first := map[bool]string{false: "", true: ", its first"}[p.first]
	t.r.fault("lost: %s ping %s to %s (%s)%s, sent at %s: %s", family, key.from.label, p.to.label,
		pair(key.from, p.to), first, p.at.Sub(t.r.start).Round(time.Millisecond), why)
}

// expire gives up what is too old.
func (t *traffic) expire(now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for key, p := range t.flying {
		if now.Sub(p.at) >= patient {
			t.give(key, "no answer")
		}
	}
}

// watch expires pings until the context ends.
func (t *traffic) watch(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			t.expire(now)
		}
	}
}
