package overlay_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/lariat-net/lariat/pkg/cni"
	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/journal"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/kernel/fake"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/overlay"
	"github.com/lariat-net/lariat/pkg/plan"
	"github.com/lariat-net/lariat/pkg/reconcile"
	"github.com/lariat-net/lariat/test/conformance/cnirun"
	"github.com/lariat-net/lariat/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }

var ctx = context.Background()

// start returns a host with a real lariat-metadata and no manager: the kernel of these tests is a fake.
func start(t *testing.T) *lab.Host {
	t.Helper()
	network := func(name, encapsulation string, vni uint32, subnets ...netip.Prefix) metadata.Network {
		return metadata.Network{Name: name, Encapsulation: encapsulation, VNI: vni,
			HostNAT:     encapsulation == metadata.EncapVXLAN,
			BlockSizeV4: 22, BlockSizeV6: 118, Subnets: subnets}
	}
	h := lab.Alone(t,
		network("overlay", metadata.EncapVXLAN, 1042, netip.MustParsePrefix("10.42.0.0/16"),
			netip.MustParsePrefix("fd42::/48")),
		network("private", metadata.EncapIPsec, 0, netip.MustParsePrefix("10.44.0.0/16"), netip.MustParsePrefix("fd44::/48")))
	must(t, h.Client().Join(ctx, "overlay"))
	must(t, h.Client().Join(ctx, "private"))
	return h
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// mortal is the fake kernel of a process that can die in the middle: what a killed process does not do, its
// code must not do here either, so it is left by a panic, which runs no roll-back.
type mortal struct{ *fake.Kernel }

func (m mortal) AddEndpoint(ctx context.Context, netns string, p delta.Endpoint) error {
	return die(m.Kernel.AddEndpoint(ctx, netns, p))
}

func (m mortal) Apply(ctx context.Context, d *delta.Difference) error {
	return die(m.Kernel.Apply(ctx, d))
}

func (m mortal) DelEndpoint(ctx context.Context, name string) error {
	return die(m.Kernel.DelEndpoint(ctx, name))
}

func (m mortal) DelEndpoints(ctx context.Context, names []string) error {
	return die(m.Kernel.DelEndpoints(ctx, names))
}

func die(err error) error {
	if errors.Is(err, fake.ErrKilled) {
		panic(err)
	}
	return err
}

// bench is one plugin, one container and one fake kernel.
type bench struct {
	t      *testing.T
	host   *lab.Host
	k      *fake.Kernel
	c      *lab.Container
	socket string // of the metadata service
	ipam   map[string]any

	network, encapsulation string
}

var serial int

func newBench(t *testing.T) *bench {
	t.Helper()
	h := start(t)
	serial++
	c, err := h.NewContainer(fmt.Sprint("f", serial))
	must(t, err)
	t.Cleanup(func() { c.Netns.Remove() })
	return &bench{t: t, host: h, k: fake.New(), c: c, socket: h.Socket(), ipam: map[string]any{"type": "lariat-ipam"},
		network: "overlay", encapsulation: metadata.EncapVXLAN}
}

// encrypted has the plugin be lariat-ipsec, on a host where nothing is in the way.
func (b *bench) encrypted() *bench {
	b.network, b.encapsulation = "private", metadata.EncapIPsec
	return b
}

// setUp makes the host as the manager would have.
func (b *bench) setUp() {
	b.t.Helper()
	snap, err := b.host.Client().View(ctx)
	must(b.t, err)
	_, err = kernel.Reconcile(ctx, b.k, plan.Desired(snap, b.host.Name, false))
	must(b.t, err)
}

// run calls the plugin in-process. A nil error is exit code 0.
func (b *bench) run(verb string, more map[string]any) (string, error) {
	conf := map[string]any{"cniVersion": "1.1.0", "name": b.network, "type": "lariat-" + b.encapsulation,
		"socket": b.socket, "stateDir": b.host.StateDir(), "ipam": b.ipam}
	for k, v := range more {
		conf[k] = v
	}
	data, err := json.Marshal(conf)
	must(b.t, err)
	env := map[string]string{"CNI_COMMAND": verb, "CNI_CONTAINERID": b.c.ID, "CNI_NETNS": b.c.Path, "CNI_IFNAME": "eth0",
		"CNI_PATH": os.Getenv("CNI_PATH"), "CNI_ARGS": os.Getenv("CNI_ARGS")}
	var stdout, stderr bytes.Buffer
	p := overlay.Plugin{
		Name: "lariat-" + b.encapsulation, Encapsulation: b.encapsulation,
		Kernel: func() (kernel.Kernel, error) { return mortal{b.k}, nil },
	}
	if p.CNI().Run(func(name string) string { return env[name] }, bytes.NewReader(data), &stdout, &stderr) == 0 {
		return stdout.String(), nil
	}
	var e types.Error
	if err := json.Unmarshal(stdout.Bytes(), &e); err != nil {
		b.t.Fatalf("%s: %v: %s", verb, err, &stdout)
	}
	return "", &e
}

// world is what stands in the fake kernel, the journal and the metadata service.
func (b *bench) world() string {
	b.t.Helper()
	journal, err := cnirun.Journal(b.host.StateDir())
	must(b.t, err)
	held, err := cnirun.Held(ctx, b.host)
	must(b.t, err)
	return b.k.String() + strings.Join(journal, "\n") + "\n" + held
}

func (b *bench) same(what, before string) {
	b.t.Helper()
	have := map[string]int{}
	for _, l := range strings.Split(before, "\n") {
		have[l]--
	}
	for _, l := range strings.Split(b.world(), "\n") {
		have[l]++
	}
	for l, n := range have {
		switch {
		case n > 0:
			b.t.Errorf("%s, left behind: %s", what, l)
		case n < 0:
			b.t.Errorf("%s, taken away: %s", what, l)
		}
	}
}

// leftovers is a pass of the manager's, with no grace.
func (b *bench) leftovers() {
	b.t.Helper()
	boot, err := os.ReadFile(filepath.Join(b.host.Dir, "boot-id"))
	must(b.t, err)
	l := &reconcile.GarbageCollector{Client: b.host.Client(), Journal: journal.New(b.host.StateDir()), Kernel: b.k,
		BootID: strings.TrimSpace(string(boot))}
	_, err = l.Run(ctx)
	must(b.t, err)
}

var empty = map[string]any{"cni.dev/valid-attachments": []any{}}

// TestF132_ADDFailsAtEveryStep: the failing ADD itself leaves the world as it was, a DEL behind it does too,
// and the next ADD works.
func TestF132_ADDFailsAtEveryStep(t *testing.T) {
	b := newBench(t)
	b.setUp()
	before := b.world()
	steps := 0
	for n := 1; ; n++ {
		b.k.FailAt(n, errors.New("no such luck"))
		_, err := b.run("ADD", nil)
		if !b.k.Failed() {
			must(t, err)
			b.k.FailAt(0, nil)
			_, err := b.run("DEL", nil)
			must(t, err)
			b.same("after the ADD that met no failure, and its DEL", before)
			break
		}
		steps++
		what := fmt.Sprintf("step %d, %s", n, b.k.Steps()[n-1])
		var e *types.Error
		if !errors.As(err, &e) || e.Code != cni.ErrKernel || !strings.Contains(e.Msg, "no such luck") {
			t.Errorf("%s: error %v", what, err)
		}
		b.k.FailAt(0, nil)
		b.same(what+", roll-back", before)
		_, err = b.run("DEL", nil)
		must(t, err)
		b.same(what+", DEL", before)
	}
	if steps < 10 {
		t.Errorf("an ADD with two addresses took only %d steps", steps)
	}
}

// TestF132_ADDKilledAtEveryStep: nothing is rolled back; DEL, or GC, or (when the container is gone) the
// manager's pass does it.
func TestF132_ADDKilledAtEveryStep(t *testing.T) {
	for _, cure := range []string{"DEL", "GC", "leftovers", "ADD"} {
		t.Run(cure, func(t *testing.T) {
			for n := 1; ; n++ {
				b := newBench(t)
				b.setUp()
				before := b.world()
				b.k.KillAt(n)
				_, err := b.run("ADD", nil)
				if !b.k.Failed() {
					must(t, err)
					b.k.FailAt(0, nil)
					_, err := b.run("DEL", nil)
					must(t, err)
					break
				}
				if err == nil {
					t.Fatalf("step %d: the process is dead, and answered", n)
				}
				b.k.FailAt(0, nil)
				what := fmt.Sprintf("killed at step %d, cured by %s", n, cure)
				err = nil
				switch cure {
				case "DEL":
					_, err = b.run("DEL", nil)
				case "GC":
					_, err = b.run("GC", empty)
				case "leftovers":
					must(t, b.c.Netns.Remove())
					b.k.RemoveNetns(b.c.Path)
					b.leftovers()
				case "ADD": // the runtime tries again with the same id
					if _, err = b.run("ADD", nil); err == nil {
						_, err = b.run("DEL", nil)
					}
				}
				if err != nil {
					t.Errorf("%s: %v", what, err)
				}
				b.same(what, before)
			}
		})
	}
}

// TestF132_HostSetUpByADD: without a manager the ADD sets the host up. Failing or killed at any step, the
// container's part is gone; what the host needs may stay, and the next ADD completes it. No encrypted device
// is ever there without the rules that block.
func TestF132_HostSetUpByADD(t *testing.T) {
	for _, encrypted := range []bool{false, true} {
		for _, killed := range []bool{false, true} {
			t.Run(fmt.Sprintf("encrypted=%t killed=%t", encrypted, killed), func(t *testing.T) {
				fresh := func() *bench {
					if encrypted {
						return newBench(t).encrypted()
					}
					return newBench(t)
				}
				whole := fresh()
				whole.setUp()
				want := whole.world()
				for n := 1; ; n++ {
					b := fresh()
					if killed {
						b.k.KillAt(n)
					} else {
						b.k.FailAt(n, errors.New("no such luck"))
					}
					_, err := b.run("ADD", nil)
					failed := b.k.Failed()
					b.k.FailAt(0, nil)
					if failed && err == nil {
						t.Errorf("step %d failed, and the ADD said that all is well", n)
					}
					if w := b.world(); strings.Contains(w, "type xfrm") && !strings.Contains(w, "clear-out ip daddr 10.44.0.0/16 ") {
						t.Errorf("step %d: tunnels without rules:\n%s", n, w)
					}
					if _, err := b.run("ADD", nil); err != nil {
						t.Errorf("step %d: the ADD behind it: %v", n, err)
					}
					if _, err := b.run("DEL", nil); err != nil {
						t.Errorf("step %d: the DEL: %v", n, err)
					}
					b.same(fmt.Sprintf("step %d", n), want)
					if !failed {
						break
					}
				}
			})
		}
	}
}

// TestF132_DELAndGCFailOrDie: while the interface is there the address is not free, whatever happens; the
// next call does it.
func TestF132_DELAndGCFailOrDie(t *testing.T) {
	for _, verb := range []string{"DEL", "GC"} {
		for _, killed := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s killed=%t", verb, killed), func(t *testing.T) {
				b := newBench(t)
				b.setUp()
				before := b.world()
				_, err := b.run("ADD", nil)
				must(t, err)
				added := b.world()
				if killed {
					b.k.KillAt(1)
				} else {
					b.k.FailAt(1, errors.New("no such luck"))
				}
				if _, err = b.run(verb, empty); err == nil || !b.k.Failed() {
					t.Errorf("the interface could not be removed, and nobody was told")
				}
				b.k.FailAt(0, nil)
				b.same("after the failure", added)
				_, err = b.run(verb, empty)
				must(t, err)
				b.same("after the next "+verb, before)
			})
		}
	}
}

// proxy stands between the plugin and the metadata service, and breaks a connection.
type proxy struct {
	net.Listener
	to string

	mu      sync.Mutex
	count   int
	breakAt int  // the connection that is broken; 0: none
	ever    bool // and all after it: the service is dead
	deliver bool // the request still arrives, only its answer is lost
	broken  bool
}

func newProxy(t *testing.T, to string) *proxy {
	t.Helper()
	dir, err := os.MkdirTemp("/run", "proxy") // a socket's path must be short
	must(t, err)
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	must(t, err)
	p := &proxy{Listener: l, to: to}
	t.Cleanup(func() { l.Close(); os.RemoveAll(dir) })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			p.serve(conn)
		}
	}()
	return p
}

func (p *proxy) serve(conn net.Conn) {
	defer conn.Close()
	p.mu.Lock()
	p.count++
	hit := p.breakAt > 0 && (p.count == p.breakAt || p.ever && p.count > p.breakAt)
	heard := !hit || p.deliver && p.count == p.breakAt
	p.broken = p.broken || hit
	p.mu.Unlock()
	if !heard {
		return
	}
	up, err := net.Dial("unix", p.to)
	if err != nil {
		return
	}
	defer up.Close()
	go io.Copy(up, conn) // ends with the connection
	answer, _ := io.ReadAll(up)
	if !hit {
		conn.Write(answer)
	}
}

// arm counts connections anew.
func (p *proxy) arm(breakAt int, ever, deliver bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.count, p.breakAt, p.ever, p.deliver, p.broken = 0, breakAt, ever, deliver, false
}

func (p *proxy) hit() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.broken
}

// TestF132_MetadataDiesBetweenSteps: at the n-th question of a verb the metadata service dies, before it
// hears or before it answers, for a moment or for good. Whatever came of the verb, what follows it puts all
// in order.
func TestF132_MetadataDiesBetweenSteps(t *testing.T) {
	for _, ever := range []bool{false, true} {
		for _, deliver := range []bool{false, true} {
			for _, cure := range []string{"DEL", "GC", "leftovers"} {
				t.Run(fmt.Sprintf("for good=%t heard=%t cured by %s", ever, deliver, cure), func(t *testing.T) {
					p := newProxy(t, start(t).Socket())
					for _, setUp := range []bool{true, false} {
						for n := 1; ; n++ {
							b := newBench(t)
							b.setUp()
							before := b.world()
							if !setUp { // one more question: the view
								b.k = fake.New()
							}
							b.socket = p.Addr().String()
							p.arm(n, ever, deliver)
							_, err := b.run("ADD", nil)
							hit := p.hit()
							p.arm(0, false, false)
							if !hit {
								must(t, err)
							}
							switch cure {
							case "DEL":
								_, err := b.run("DEL", nil)
								must(t, err)
							case "GC":
								_, err := b.run("GC", empty)
								must(t, err)
							case "leftovers":
								must(t, b.c.Netns.Remove())
								b.k.RemoveNetns(b.c.Path)
								b.leftovers()
							}
							b.setUp()
							b.same(fmt.Sprintf("question %d", n), before)
							if !hit {
								break
							}
						}
					}
				})
			}
		}
	}
}

// TestF127_DELWhileMetadataDies: DEL and GC succeed all the same, and the manager's pass tells the service later.
func TestF127_DELWhileMetadataDies(t *testing.T) {
	p := newProxy(t, start(t).Socket())
	for _, verb := range []string{"DEL", "GC"} {
		for _, deliver := range []bool{false, true} {
			for n := 1; ; n++ {
				b := newBench(t)
				b.setUp()
				before := b.world()
				_, err := b.run("ADD", nil)
				must(t, err)
				b.socket = p.Addr().String()
				p.arm(n, true, deliver)
				if _, err := b.run(verb, empty); err != nil {
					t.Errorf("%s with the service dead from question %d on: %v", verb, n, err)
				}
				hit := p.hit()
				p.arm(0, false, false)
				b.leftovers()
				b.same(fmt.Sprintf("%s, question %d", verb, n), before)
				if !hit {
					break
				}
			}
		}
	}
}

// TestADDAfterADELThatDied: the DEL may have asked the manager to remove the interface before it died, and
// the manager may get to it after the next ADD. So that ADD makes the interface anew, though it is there and
// whole.
func TestADDAfterADELThatDied(t *testing.T) {
	b := newBench(t)
	b.setUp()
	before := b.world()
	first, err := b.run("ADD", nil)
	must(t, err)
	b.k.KillAt(1)
	if _, err := b.run("DEL", nil); err == nil {
		t.Fatal("the DEL lived")
	}
	b.k.FailAt(0, nil)
	again, err := b.run("ADD", nil)
	if err != nil || again != first {
		t.Errorf("the ADD behind it: %s %v", again, err)
	}
	if len(b.k.Steps()) == 0 {
		t.Error("it relied on the interface that there was")
	}
	b.k.FailAt(0, nil)
	if _, err := b.run("ADD", nil); err != nil || len(b.k.Steps()) > 0 {
		t.Errorf("F3: one ADD more changes something: %v %v", b.k.Steps(), err)
	}
	_, err = b.run("DEL", nil)
	must(t, err)
	b.same("at the end", before)
}

// script is an IPAM plugin of others: it notes each call, and does as it is told for an ADD.
func script(t *testing.T, b *bench, add string) (calls func() string) {
	t.Helper()
	dir := t.TempDir()
	log := filepath.Join(dir, "log")
	must(t, os.WriteFile(filepath.Join(dir, "other"), []byte("#!/bin/sh\necho $CNI_COMMAND $CNI_CONTAINERID >> "+log+
		"\ncase $CNI_COMMAND in ADD) "+add+";; esac\n"), 0o755))
	t.Setenv("CNI_PATH", dir)
	t.Setenv("CNI_CONTAINERID", b.c.ID)
	b.ipam = map[string]any{"type": "other"}
	return func() string {
		data, _ := os.ReadFile(log)
		os.Remove(log)
		return strings.TrimSpace(strings.ReplaceAll(string(data), b.c.ID, "me"))
	}
}

// TestDELWithSpoiltArguments: what is no pair in CNI_ARGS does not keep a DEL from anything, nor
// another IPAM plugin that would refuse it.
func TestDELWithSpoiltArguments(t *testing.T) {
	for _, own := range []bool{true, false} {
		b := newBench(t)
		b.setUp()
		before := b.world()
		calls := func() string { return "ADD me\nDEL me" }
		if !own {
			calls = script(t, b, `echo '{"cniVersion":"1.1.0","ips":[{"address":"10.99.0.9/24"}]}';;
				DEL) case "$CNI_ARGS" in "A=1;B=2=3") ;; *) exit 1;; esac`)
		}
		_, err := b.run("ADD", nil)
		must(t, err)
		t.Setenv("CNI_ARGS", "nonsense;B=2=3;A=1")
		if _, err := b.run("DEL", nil); err != nil {
			t.Errorf("own IPAM %t: %v", own, err)
		}
		t.Setenv("CNI_ARGS", "")
		b.same("after the DEL", before)
		if got := calls(); got != "ADD me\nDEL me" {
			t.Errorf("the plugin was called %q", got)
		}
	}
}

// TestF5_IPAMFails: whatever the IPAM plugin does, its own DEL follows, and nothing stays.
func TestF5_IPAMFails(t *testing.T) {
	for _, tc := range []struct {
		name, add string
		code      uint
		words     string
	}{
		{"an error object", `echo '{"cniVersion":"1.1.0","code":120,"msg":"pool empty"}'; exit 1`, 120, "pool empty"},
		{"words on stderr", "echo ouch >&2; exit 3", cni.ErrConfig, "ouch"},
		{"no result", "true", cni.ErrDecode, "result"},
		{"a result that is none", "echo '{\"cniVersion\":\"1.1.0\",\"ips\":7}'", cni.ErrDecode, "result"},
		{"a result without an address", "echo '{\"cniVersion\":\"1.1.0\"}'", cni.ErrConfig, "no address"},
		{"death by a signal", "kill -9 $$", cni.ErrConfig, "killed"},
		{"an address that is held already", `echo '{"cniVersion":"1.1.0","ips":[{"address":"10.42.0.1/16"}]}'`,
			cni.ErrAddressHeld, "10.42.0.1"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBench(t)
			b.setUp()
			before := b.world()
			calls := script(t, b, tc.add)
			_, err := b.run("ADD", nil)
			var e *types.Error
			if !errors.As(err, &e) || e.Code != tc.code || !strings.Contains(e.Msg, tc.words) {
				t.Errorf("error %v, want code %d with %q", err, tc.code, tc.words)
			}
			if got := calls(); got != "ADD me\nDEL me" {
				t.Errorf("the plugin was called %q", got)
			}
			b.same("after the ADD", before)
		})
	}
}

// TestF132_ADDWithAnotherIPAMFailsAtEveryStep: the other plugin is told to free its address, too.
func TestF132_ADDWithAnotherIPAMFailsAtEveryStep(t *testing.T) {
	b := newBench(t)
	b.setUp()
	before := b.world()
	calls := script(t, b, `echo '{"cniVersion":"1.1.0","ips":[{"address":"10.99.0.5/24"}],"routes":[{"dst":"10.98.0.0/16"}]}'`)
	for n := 1; ; n++ {
		b.k.FailAt(n, errors.New("no such luck"))
		out, err := b.run("ADD", nil)
		if !b.k.Failed() {
			must(t, err)
			if !strings.Contains(out, "10.99.0.5/32") || !strings.Contains(out, "10.98.0.0/16") {
				t.Errorf("result %s", out)
			}
			break
		}
		b.same(fmt.Sprintf("step %d", n), before)
		if got := calls(); got != "ADD me\nDEL me" {
			t.Errorf("step %d: the plugin was called %q", n, got)
		}
	}
	b.k.FailAt(0, nil)
	calls()
	// What no plugin of the field has a GC for is freed by a DEL.
	_, err := b.run("GC", empty)
	must(t, err)
	if got := calls(); !strings.Contains(got, "DEL me") {
		t.Errorf("at GC the plugin was called %q", got)
	}
	b.same("after GC", before)
}

// TestF7_CHECKNames what is missing, from either end.
func TestF7_CHECKNames(t *testing.T) {
	b := newBench(t)
	b.setUp()
	before := b.world()
	out, err := b.run("ADD", nil)
	must(t, err)
	prev := map[string]any{"prevResult": json.RawMessage(out)}
	if _, err := b.run("CHECK", prev); err != nil {
		t.Fatalf("right after ADD: %v", err)
	}
	var res struct{ Interfaces []struct{ Name string } }
	must(t, json.Unmarshal([]byte(out), &res))
	host := res.Interfaces[0].Name
	var lines []string
	for _, l := range strings.Split(b.k.String(), "\n") {
		if inside, ok := strings.CutPrefix(l, "in "+b.c.Path+": "); ok && !strings.HasPrefix(inside, "link  eth0 type") {
			lines = append(lines, inside)
		}
	}
	if len(lines) < 5 {
		t.Fatalf("the port has only %q", lines)
	}
	for _, l := range lines {
		if !b.k.Spoil(host, l) {
			t.Fatalf("no line %q", l)
		}
		if _, err := b.run("CHECK", prev); err == nil || !strings.Contains(err.Error(), l) {
			t.Errorf("%q is missing; CHECK said %v", l, err)
		}
		// A second ADD repairs it, with the same result.
		again, err := b.run("ADD", nil)
		if err != nil || again != out {
			t.Errorf("%q is missing; the second ADD said %s %v", l, again, err)
		}
		if _, err := b.run("CHECK", prev); err != nil {
			t.Errorf("%q was repaired; CHECK said %v", l, err)
		}
	}
	b.k.RemoveLink("vtep1042")
	if _, err := b.run("CHECK", prev); err == nil || !strings.Contains(err.Error(), "vtep1042") {
		t.Errorf("the device is gone; CHECK said %v", err)
	}
	must(t, os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0)) // of the lab's own namespace
	if _, err := b.run("STATUS", nil); err != nil {
		t.Errorf("the next ADD makes the device; STATUS said %v", err)
	}
	if _, err := b.run("STATUS", map[string]any{"strictStatus": true}); err == nil || !strings.Contains(err.Error(),
		"vtep1042") {
		t.Errorf("the device is gone; strict STATUS said %v", err)
	}
	b.setUp()
	_, err = b.run("DEL", nil)
	must(t, err)
	if _, err := b.run("CHECK", prev); err == nil {
		t.Error("CHECK passes after DEL")
	}
	b.same("at the end", before)
}

// TestF3_FailedRepetitionKeepsTheContainer: a second ADD that fails undoes nothing that the first one made.
func TestF3_FailedRepetitionKeepsTheContainer(t *testing.T) {
	b := newBench(t)
	b.setUp()
	before := b.world()
	_, err := b.run("ADD", nil)
	must(t, err)
	added := b.world()
	for name, more := range map[string]map[string]any{
		"an address that is not": {"args": map[string]any{"cni": map[string]any{"ips": []string{"10.42.0.1"}}}},
		"the journal is gone":    {"stateDir": "/proc/nowhere"},
	} {
		if _, err := b.run("ADD", more); err == nil {
			t.Errorf("%s: the second ADD worked", name)
		}
		b.same(name, added)
	}
	_, err = b.run("DEL", nil)
	must(t, err)
	b.same("at the end", before)
}

// TestADDInAnotherNamespace: the id of a running container with another namespace, or on another
// network, costs that container nothing: neither its port, nor its address, nor its record, without
// which it would be taken for dead.
func TestADDInAnotherNamespace(t *testing.T) {
	b := newBench(t)
	b.setUp()
	_, err := b.run("ADD", nil)
	must(t, err)
	id, j := metadata.AttachmentID{ContainerID: b.c.ID, IfName: "eth0"}, journal.New(b.host.StateDir())
	record, _, err := j.Get("overlay", id)
	must(t, err)
	added, own := b.world(), b.c.Path
	refused := func(what string) {
		t.Helper()
		_, err := b.run("ADD", nil)
		var e *types.Error
		if !errors.As(err, &e) || e.Code != cni.ErrKernel || !strings.Contains(e.Msg, id.String()) {
			t.Errorf("%s: %v", what, err)
		}
		b.same(what, added)
		now, _, err := j.Get("overlay", id)
		if err != nil || now.Netns != record.Netns || now.NetnsInode != record.NetnsInode {
			t.Errorf("%s: the record is %+v, was %+v: %v", what, now, record, err)
		}
	}
	other, err := b.host.NewContainer(b.c.ID + "-other")
	must(t, err)
	t.Cleanup(func() { other.Netns.Remove() })
	b.c.Path = other.Path
	refused("in another namespace")
	b.k.AddInterface(other.Path, "eth0")
	refused("in another namespace that has such an interface")
	b.k.RemoveNetns(own) // the journal alone knows
	added = b.world()
	refused("in another namespace, without a port")
	b.c.Path = own
	if _, err := b.run("ADD", nil); err != nil {
		t.Error(err)
	}
	added = b.world()
	b.network, b.encapsulation = "private", metadata.EncapIPsec
	refused("on another network")
	for _, verb := range []string{"DEL", "GC"} { // as runtimes do behind an ADD that failed
		_, err := b.run(verb, empty)
		must(t, err)
		b.same("on another network, "+verb, added)
	}
	b.network, b.encapsulation = "overlay", metadata.EncapVXLAN
	_, err = b.run("DEL", nil)
	must(t, err)
}

// TestADDAfterADELThatCouldNotBeTold: the old record waits to be replayed; a new ADD of the same id that
// fails must not keep what it got.
func TestADDAfterADELThatCouldNotBeTold(t *testing.T) {
	b := newBench(t)
	b.setUp()
	before := b.world()
	_, err := b.run("ADD", nil)
	must(t, err)
	b.socket = "/run/nobody"
	_, err = b.run("DEL", nil)
	must(t, err)
	b.socket = b.host.Socket()
	b.k.FailAt(1, errors.New("no such luck"))
	if _, err := b.run("ADD", nil); err == nil {
		t.Fatal("the ADD worked")
	}
	b.k.FailAt(0, nil)
	b.same("after the failed ADD", before)
}

// TestAddressThatRuns: the service has forgotten a container and gives its address to another: that one's ADD gets it
// registered, and takes what the service gives then.
func TestAddressThatRuns(t *testing.T) {
	b := newBench(t)
	b.setUp()
	_, err := b.run("ADD", nil)
	must(t, err)
	client := b.host.Client()
	id := metadata.AttachmentID{ContainerID: b.c.ID, IfName: "eth0"}
	held, err := client.Attachment(ctx, b.network, id)
	must(t, err)
	must(t, client.Release(ctx, b.network, id, 0))

	// By name: the service says no then, and who has it.
	running := b.c
	b.c, err = b.host.NewContainer(running.ID[:8] + "-next")
	must(t, err)
	t.Cleanup(func() { b.c.Netns.Remove() })
	ips := []string{held.Addresses[0].Address.String()}
	_, err = b.run("ADD", map[string]any{"args": map[string]any{"cni": map[string]any{"ips": ips}}})
	var e *types.Error
	if !errors.As(err, &e) || e.Code != cni.ErrAddressHeld || !strings.Contains(e.Msg, running.ID) {
		t.Errorf("%v", err)
	}
	now, err := client.Attachment(ctx, b.network, id)
	if err != nil || now.Addresses[0].Address != held.Addresses[0].Address || len(now.Addresses) != len(held.Addresses) {
		t.Errorf("registered: %+v, %v, want %+v", now, err, held)
	}
	if _, err := client.Attachment(ctx, b.network, metadata.AttachmentID{ContainerID: b.c.ID,
		IfName: "eth0"}); !metadata.IsCode(err, metadata.CodeNotFound) {
		t.Errorf("the one that failed: %v", err)
	}
	_, err = b.run("ADD", nil)
	must(t, err)
	_, err = b.run("DEL", nil)
	must(t, err)
	b.c = running
	_, err = b.run("DEL", nil)
	must(t, err)
}
