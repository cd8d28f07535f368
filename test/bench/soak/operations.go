package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/unixhttp"
	"github.com/lariat-net/lariat/test/lab"
)

// soak is the cluster and what its runtimes know.
type soak struct {
	*lab.Cluster
	o       options
	r       *report
	traffic *traffic

	visitor *lab.Host // comes and leaves
	rng     *rand.Rand

	trouble sync.Mutex // of one kind at a time
	wg      sync.WaitGroup

	mu       sync.Mutex
	away     bool // the visitor is
	all      []*container
	serial   int
	troubles []*trouble
	inflight int
	known    map[string]bool          // blocks and the hosts that have their routes
	calls    map[string]*sync.RWMutex // by host and network: GC is alone
}

// trouble is a time in which operations may be refused.
type trouble struct {
	what     string
	host     *lab.Host // nil: all
	from, to time.Time // to is zero while it lasts
}

// container is one that a runtime knows.
type container struct {
	*lab.Container
	network string
	call    lab.Call
	port    uint16 // published; 0: none
	served  io.Closer
	end     *end
	busy    bool
}

// networks that are there all the time. In the first each container goes through portmap, in the second none does.
var networks = []string{"blue", "green"}

const most = 40 // containers; about half of these live at any time

func newSoak(c *lab.Cluster, r *report, o options) *soak {
	return &soak{Cluster: c, o: o, r: r, traffic: newTraffic(r), visitor: c.Hosts[3],
		rng: rand.New(rand.NewPCG(o.seed, 0)), known: map[string]bool{}, calls: map[string]*sync.RWMutex{}}
}

// up starts everything, and lets each host do each thing once, so that what comes with the first is
// there before the first look.
func (s *soak) up(ctx context.Context) error {
	if err := s.Up(ctx); err != nil {
		return err
	}
	for i, name := range networks {
		_, err := s.Hosts[0].Lariat(ctx, "network", "create", name,
			"--subnet", fmt.Sprintf("10.%d.0.0/16", 42+i), "--subnet", fmt.Sprintf("fd42:%d::/48", i))
		if err != nil {
			return err
		}
	}
	for _, h := range s.Hosts[:3] {
		for _, network := range networks {
			c, err := s.add(ctx, h, network, true)
			if err == nil {
				err = c.Check(ctx, c.call)
			}
			if err == nil {
				err = s.del(ctx, c)
			}
			if err == nil {
				err = s.gc(ctx, h, network)
			}
			if err != nil {
				return fmt.Errorf("warm up: %w", err)
			}
		}
	}
	return s.depart(ctx)
}

// operate goes on for as long as it is told.
func (s *soak) operate(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, s.o.duration)
	defer cancel()
	watch, done := context.WithCancel(context.Background())
	defer done()
	s.wg.Go(func() { s.traffic.watch(watch) })
	tick := time.NewTicker(time.Duration(float64(time.Second) / s.o.rate))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			done()
			s.wg.Wait()
			return
		case <-tick.C:
			s.operation()
		}
	}
}

// operation begins one. It is not cut off: what has begun ends.
func (s *soak) operation() {
	s.mu.Lock()
	busy := s.inflight >= 50
	s.mu.Unlock()
	if busy {
		s.r.did("none: fifty are under way", nil, "")
		return
	}
	n := s.rng.IntN(1000)
	h := s.Hosts[s.rng.IntN(4)]
	if h == s.visitor && s.isAway() {
		h = s.Hosts[s.rng.IntN(3)]
	}
	network := networks[s.rng.IntN(len(networks))]
	publish := s.rng.IntN(3) == 0
	nth := s.rng.IntN(1 << 30)
	s.mu.Lock()
	s.inflight++
	s.mu.Unlock()
	s.wg.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		s.operationOf(ctx, n, nth, h, network, publish)
		s.mu.Lock()
		s.inflight--
		s.mu.Unlock()
	})
}

func (s *soak) operationOf(ctx context.Context, n, nth int, h *lab.Host, network string, publish bool) {
	switch {
	case n < 600: // the fewer there are, the likelier is one more
		if nth%most < s.living() {
			s.release(ctx, nth)
		} else {
			_, _ = s.add(ctx, h, network, publish) // it says itself what was wrong
		}
	case n < 760:
		if c := s.take(nth, nil); c != nil {
			s.try("CHECK", c.Host, func() error { return c.Check(ctx, c.call) })
			s.giveBack(c)
		}
	case n < 820:
		call, err := s.callOf(h, network)
		if err == nil {
			s.try("STATUS", h, func() error { return h.Status(ctx, call) })
		}
	case n < 870:
		_ = s.gc(ctx, h, network)
	case n < 900:
		s.forget(ctx, nth)
	case n < 925:
		s.passing(ctx, h)
	case n < 945:
		allow := [][]string{{"--allow-from", "blue"}, {"--allow-from", ""}}[nth%2]
		s.try("network update", h, func() error {
			_, err := h.Lariat(ctx, append([]string{"network", "update", "green"}, allow...)...)
			return err
		})
	case n < 965:
		s.alone("kill -9 of a network manager", func() { s.killManager(ctx, s.Hosts[[]int{0, 1}[nth%2]]) })
	case n < 980:
		s.alone("kill -9 of a metadata service", func() { s.killMetadata(ctx, s.Hosts[1]) })
	case n < 990:
		s.alone("store away", func() { s.outage(ctx, time.Duration(1+nth%4)*time.Second, nth%3 == 0) })
	default:
		s.alone("a host comes or leaves", func() {
			if s.isAway() {
				s.arrive(ctx)
			} else if err := s.depart(ctx); err != nil {
				s.r.fault("a host leaves: %v", err)
			}
		})
	}
}

// try does an operation on a host, and counts it.
func (s *soak) try(what string, h *lab.Host, do func() error) error {
	from := time.Now()
	err := do()
	if err != nil {
		err = fmt.Errorf("on host %s: %w", h.Name, err)
	}
	reason := s.reason(h, from)
	s.took(what, from, reason)
	s.r.did(what, err, reason)
	return err
}

// took keeps apart what took long with a reason.
func (s *soak) took(what string, from time.Time, reason string) {
	if reason != "" {
		what += ", while something was away"
	}
	s.r.took(what, time.Since(from))
}

// reason is what went on at a host since a time, or is going on, for which an operation may be refused.
func (s *soak) reason(h *lab.Host, from time.Time) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.troubles {
		if (t.host == nil || t.host == h) && (t.to.IsZero() || t.to.After(from)) {
			return t.what
		}
	}
	return ""
}

// alone does what makes trouble, unless something else does.
func (s *soak) alone(what string, do func()) {
	if !s.trouble.TryLock() {
		s.r.did(what+": not now", nil, "")
		return
	}
	defer s.trouble.Unlock()
	do()
	s.r.did(what, nil, "")
}

// begin notes a trouble, which lasts until what it returns is called: then the hosts are given time
// until they are ready.
func (s *soak) begin(what string, h *lab.Host) (over func(ctx context.Context)) {
	t := &trouble{what: what, host: h, from: time.Now()}
	s.mu.Lock()
	s.troubles = append(s.troubles, t)
	s.mu.Unlock()
	return func(ctx context.Context) {
		start := time.Now()
		for _, o := range s.Hosts {
			if h != nil && o != h || o == s.visitor && s.isAway() {
				continue
			}
			if err := ready(ctx, o); err != nil {
				s.r.fault("after %s, host %s: %v", what, o.Name, err)
			}
		}
		s.r.took("ready after "+what, time.Since(start))
		s.mu.Lock()
		t.to = time.Now()
		s.mu.Unlock()
	}
}

// ready waits until a host's helpers are, by their own account.
func ready(ctx context.Context, h *lab.Host) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return eventually(ctx, func() error {
		for _, socket := range []string{h.Socket(), h.ManagerSocket()} {
			if _, err := get(ctx, socket, "/readyz"); err != nil {
				return err
			}
		}
		return nil
	})
}

// eventually asks until there is no error, or returns the last.
func eventually(ctx context.Context, f func() error) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	var last error // one that the end of the context did not cut short says more
	for {
		err := f()
		if err == nil {
			return nil
		}
		if last == nil || ctx.Err() == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), last)
		case <-tick.C:
		}
	}
}

// get asks a helper by its socket.
func get(ctx context.Context, socket, path string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	status, body, err := unixhttp.Page(ctx, socket, "GET", path, nil)
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("%s of %s: %d: %s", path, socket, status, body)
	}
	return body, err
}

func (s *soak) isAway() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.away
}

func (s *soak) living() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.all)
}

// take marks a container that nobody else is at, the n-th of those on a host, or of all; nil: there is none.
func (s *soak) take(n int, h *lab.Host) *container {
	s.mu.Lock()
	defer s.mu.Unlock()
	var may []*container
	for _, c := range s.all {
		if !c.busy && c.end != nil && (h == nil || c.Host == h) {
			may = append(may, c)
		}
	}
	if len(may) == 0 {
		return nil
	}
	c := may[n%len(may)]
	c.busy = true
	return c
}

func (s *soak) giveBack(c *container) {
	s.mu.Lock()
	c.busy = false
	s.mu.Unlock()
}

// drop takes a container out of what the runtime knows.
func (s *soak) drop(c *container) {
	s.mu.Lock()
	s.all = slices.DeleteFunc(s.all, func(o *container) bool { return o == c })
	s.mu.Unlock()
}

// gate is held by ADD and DEL together, and by GC alone, as the specification wants.
func (s *soak) gate(h *lab.Host, network string) *sync.RWMutex {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := h.Name + " " + network
	if s.calls[key] == nil {
		s.calls[key] = &sync.RWMutex{}
	}
	return s.calls[key]
}

func (s *soak) callOf(h *lab.Host, network string) (lab.Call, error) {
	var chained []map[string]any
	if network == networks[0] {
		chained = append(chained, map[string]any{"type": "portmap", "snat": true,
			"capabilities": map[string]bool{"portMappings": true}})
	}
	conf, err := h.Conf(network, nil, chained...)
	return lab.Call{Conf: conf, Args: map[string]string{"IgnoreUnknown": "1"}}, err
}

// add is what a runtime does to start a container. One that is refused is deleted again.
func (s *soak) add(ctx context.Context, h *lab.Host, network string, publish bool) (*container, error) {
	s.mu.Lock()
	s.serial++
	n := s.serial
	s.mu.Unlock()
	made, err := h.NewContainer(fmt.Sprint("s", n))
	if err != nil {
		s.r.fault("make a namespace: %v", err)
		return nil, err
	}
	c := &container{Container: made, network: network, busy: true}
	if c.call, err = s.callOf(h, network); err != nil {
		return nil, err
	}
	if publish && network == networks[0] {
		c.port = uint16(20000 + n%10000)
		c.call.Capabilities = map[string]any{"portMappings": []map[string]any{
			{"hostPort": c.port, "containerPort": 80, "protocol": "tcp"}}}
	}
	s.mu.Lock()
	s.all = append(s.all, c)
	s.mu.Unlock()
	gate := s.gate(h, network)
	gate.RLock()
	err = s.try("ADD", h, func() error { return c.Add(ctx, c.call) })
	gate.RUnlock()
	if err != nil {
		return nil, errors.Join(err, s.del(ctx, c))
	}
	if c.end, err = s.traffic.join(c.Container, network); err != nil {
		s.r.fault("%v", err)
		return nil, errors.Join(err, s.del(ctx, c))
	}
	if c.port != 0 {
		s.published(ctx, c)
	}
	s.spread(ctx, c)
	s.giveBack(c)
	return c, nil
}

// published asks for what a container serves, from another host by the published port.
func (s *soak) published(ctx context.Context, c *container) {
	err := c.Do(func() error {
		l, err := net.Listen("tcp", ":80")
		if err != nil {
			return err
		}
		c.served = l
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = io.WriteString(conn, c.Name)
				conn.Close()
			}
		}()
		return nil
	})
	from := s.Hosts[(c.Host.Index+1)%3]
	if err == nil {
		err = from.Do(func() error {
			ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
			defer cancel()
			conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", netip.AddrPortFrom(c.Host.Addr.Addr(), c.port).String())
			if err != nil {
				return err
			}
			defer conn.Close()
			said, err := io.ReadAll(conn)
			if err == nil && string(said) != c.Name {
				err = fmt.Errorf("%q answers", said)
			}
			return err
		})
	}
	if err != nil {
		err = fmt.Errorf("port %d of host %s, for %s, from host %s: %w", c.port, c.Host.Name, c.Name, from.Name, err)
	}
	s.r.did("published port", err, "")
}

// spread waits until all hosts have the route of a container's blocks, where those are new, and lets
// other hosts' containers ping it then.
func (s *soak) spread(ctx context.Context, c *container) {
	start := time.Now()
	for _, addr := range []netip.Addr{c.Addr(false), c.Addr(true)} {
		for _, o := range s.Hosts {
			if o == c.Host || o == s.visitor && s.isAway() {
				continue
			}
			if err := s.routed(ctx, o, c, addr); err != nil && !(o == s.visitor && s.isAway()) {
				s.r.fault("host %s does not know the way to %s of %s: %v", o.Name, addr, c.Name, err)
				return
			}
		}
	}
	s.r.took("until all hosts route to a new container", time.Since(start))
	s.traffic.announce(c.end)
}

// routed waits until a host's view has the address's block with its owner, and its kernel all that the view asks for.
func (s *soak) routed(ctx context.Context, o *lab.Host, c *container, addr netip.Addr) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for { // the store may be away, and then the block of this moment with it
		var key string
		err := eventually(ctx, func() error {
			v, err := o.Client().View(ctx)
			if err != nil {
				return err
			}
			for _, b := range v.Blocks {
				if b.CIDR.Contains(addr) && b.Host == c.Host.Name {
					key = fmt.Sprintf("%s %s %s %s", c.network, b.CIDR, b.Host, o.Name)
					return nil
				}
			}
			return fmt.Errorf("no block of host %s in the view", c.Host.Name)
		})
		if err != nil {
			return err
		}
		s.mu.Lock()
		known := s.known[key]
		s.mu.Unlock()
		if known {
			return nil
		}
		if err := eventually(ctx, func() error { return o.Settled(ctx) }); err != nil {
			return err
		}
		s.mu.Lock()
		s.known[key] = true
		s.mu.Unlock()
	}
}

// release is the DEL of any container.
func (s *soak) release(ctx context.Context, n int) {
	if c := s.take(n, nil); c != nil {
		_ = s.del(ctx, c) // it says itself what was wrong
	}
}

// del is what a runtime does to end a container: DEL never fails, whatever is away.
func (s *soak) del(ctx context.Context, c *container) error {
	s.silence(c)
	gate := s.gate(c.Host, c.network)
	gate.RLock()
	defer gate.RUnlock()
	from := time.Now()
	err := c.Del(ctx, c.call)
	reason := s.reason(c.Host, from)
	s.took("DEL", from, reason)
	if err != nil {
		err = fmt.Errorf("of %s on host %s, with %q: %w", c.Name, c.Host.Name, reason, err)
	}
	s.r.did("DEL", err, "")
	s.drop(c)
	return errors.Join(err, c.Netns.Remove())
}

// silence ends what comes from and to a container.
func (s *soak) silence(c *container) {
	if c.end != nil {
		s.traffic.leave(c.end)
		c.end = nil
	}
	if c.served != nil {
		c.served.Close()
	}
}

// forget ends a container as a crash of its runtime does: nobody calls DEL. GC or the network manager finds it.
func (s *soak) forget(ctx context.Context, n int) {
	c := s.take(n, nil)
	if c == nil {
		return
	}
	s.silence(c)
	s.drop(c)
	s.r.did("container lost by its runtime", c.Netns.Remove(), "")
}

// gc is the runtime's, with what it knows.
func (s *soak) gc(ctx context.Context, h *lab.Host, network string) error {
	call, err := s.callOf(h, network)
	if err != nil {
		return err
	}
	list, err := libcni.ConfListFromBytes(call.Conf)
	if err != nil {
		return err
	}
	gate := s.gate(h, network)
	gate.Lock()
	defer gate.Unlock()
	args := &libcni.GCArgs{ValidAttachments: []types.GCAttachment{}}
	s.mu.Lock()
	for _, c := range s.all {
		if c.Host == h && c.network == network {
			args.ValidAttachments = append(args.ValidAttachments, types.GCAttachment{ContainerID: c.ID, IfName: "eth0"})
		}
	}
	s.mu.Unlock()
	return s.try("GC", h, func() error { return h.Do(func() error { return h.CNI().GCNetworkList(ctx, list, args) }) })
}

// passing is a network that is made, used by two hosts, and deleted.
func (s *soak) passing(ctx context.Context, h *lab.Host) {
	s.mu.Lock()
	s.serial++
	n := s.serial
	s.mu.Unlock()
	name := fmt.Sprint("passing", n)
	if err := s.try("network create", h, func() error {
		_, err := h.Lariat(ctx, "network", "create", name, "--block-size-v4", "28",
			"--subnet", fmt.Sprintf("10.%d.%d.0/24", 64+n/256%64, n%256), "--subnet", fmt.Sprintf("fd43:%x::/112", n%65536))
		return err
	}); err == nil {
		var made []*container
		for _, o := range []*lab.Host{h, s.Hosts[(h.Index+1)%3]} {
			if c, err := s.add(ctx, o, name, false); err == nil {
				made = append(made, c)
			}
		}
		for _, c := range made {
			s.mu.Lock()
			mine := !c.busy && slices.Contains(s.all, c)
			c.busy = c.busy || mine
			s.mu.Unlock()
			if mine {
				_ = s.del(ctx, c)
			}
		}
	}
	// What others are at, of this network, ends first; its create may have reached the store without an answer.
	// However long the rest took on a busy machine, the network must go.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Minute)
	defer cancel()
	err := eventually(ctx, func() error {
		for {
			c := s.takeOf(name)
			if c == nil {
				break
			}
			_ = s.del(ctx, c)
		}
		err := s.deleteNetwork(ctx, name)
		for _, o := range []*lab.Host{h, s.Hosts[(h.Index+1)%3]} {
			if err != nil && !(o == s.visitor && s.isAway()) { // its runtime may have forgotten a container
				_ = s.gc(ctx, o, name)
			}
		}
		return err
	})
	s.r.did("network delete", err, "")
}

func (s *soak) takeOf(network string) *container {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.all {
		if c.network == network && !c.busy && c.end != nil {
			c.busy = true
			return c
		}
	}
	return nil
}

func (s *soak) deleteNetwork(ctx context.Context, name string) error {
	s.mu.Lock()
	used := slices.ContainsFunc(s.all, func(c *container) bool { return c.network == name })
	s.mu.Unlock()
	if used {
		return fmt.Errorf("network %s is in use", name)
	}
	_, err := s.Hosts[2].Lariat(ctx, "network", "delete", "--yes", name)
	if err == nil {
		return nil
	}
	v, verr := s.Hosts[2].Client().View(ctx)
	if verr == nil && !slices.ContainsFunc(v.Networks, func(n metadata.Network) bool { return n.Name == name }) {
		return nil
	}
	return err
}

func (s *soak) killManager(ctx context.Context, h *lab.Host) {
	over := s.begin("kill -9 of a network manager", h)
	h.Manager.Kill()
	if err := h.StartManager(ctx); err != nil {
		s.r.fault("%v", err)
	}
	over(ctx)
}

func (s *soak) killMetadata(ctx context.Context, h *lab.Host) {
	over := s.begin("kill -9 of a metadata service", h)
	h.Metadata.Kill()
	if err := h.StartMetadata(ctx); err != nil {
		s.r.fault("%v", err)
	}
	over(ctx)
}

// outage takes the store away: its process stands still, or is killed.
func (s *soak) outage(ctx context.Context, d time.Duration, still bool) {
	over := s.begin("an outage of the store", nil)
	h := s.Hosts[0]
	timer := time.NewTimer(d)
	if still {
		_ = syscall.Kill(h.Metadata.Pid(), syscall.SIGSTOP)
		<-timer.C
		_ = syscall.Kill(h.Metadata.Pid(), syscall.SIGCONT)
	} else {
		h.Metadata.Kill()
		<-timer.C
		if err := h.StartMetadata(ctx); err != nil {
			s.r.fault("%v", err)
		}
	}
	over(ctx)
}

// arrive starts the visitor's helpers.
func (s *soak) arrive(ctx context.Context) {
	over := s.begin("a host comes", s.visitor)
	err := s.visitor.StartMetadata(ctx)
	if err == nil {
		err = s.visitor.StartManager(ctx)
	}
	if err != nil {
		s.r.fault("%v", err)
		return
	}
	s.mu.Lock()
	s.away = false
	s.mu.Unlock()
	over(ctx)
}

// depart ends the visitor's containers and helpers, takes its network away as docs/operations.md says,
// and removes it from the cluster.
func (s *soak) depart(ctx context.Context) error {
	h := s.visitor
	over := s.begin("a host leaves", h)
	s.mu.Lock()
	s.away = true
	s.mu.Unlock()
	err := eventually(ctx, func() error { // those that others are at come later
		for {
			c := s.take(0, h)
			if c == nil {
				break
			}
			_ = s.del(ctx, c)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if slices.ContainsFunc(s.all, func(c *container) bool { return c.Host == h }) {
			return errors.New("it has containers")
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, network := range networks {
		if err := s.gc(ctx, h, network); err != nil {
			return err
		}
	}
	if err := errors.Join(h.Manager.Stop(), h.Metadata.Stop()); err != nil {
		return err
	}
	_, err = h.Output(ctx, "sh", "-c", `ip -o link | awk -F': ' '/vtep[0-9]/{print $2}' | xargs -rn1 ip link del
		ip route flush proto 76; ip -6 route flush proto 76; ip nexthop flush proto 76
		nft delete table inet lariat; rm -rf `+h.StateDir())
	if err != nil {
		return err
	}
	_, err = s.Hosts[0].Lariat(ctx, "host", "remove", h.Name)
	s.mu.Lock()
	clear(s.known) // its blocks may be another host's next
	s.mu.Unlock()
	over(ctx)
	return err
}

// down ends what runs.
func (s *soak) down(ctx context.Context) error {
	for {
		c := s.take(0, nil)
		if c == nil {
			break
		}
		_ = s.del(ctx, c)
	}
	if n := s.living(); n > 0 {
		return fmt.Errorf("%d containers are still being worked at", n)
	}
	if !s.isAway() {
		if err := s.depart(ctx); err != nil {
			return err
		}
	}
	for _, h := range s.Hosts[:3] {
		for _, network := range networks {
			if err := s.gc(ctx, h, network); err != nil {
				return err
			}
		}
	}
	_, err := s.Hosts[0].Lariat(ctx, "network", "update", "green", "--allow-from", "")
	return err
}
