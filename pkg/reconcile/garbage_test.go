package reconcile

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/attach"
	"github.com/lariat-net/lariat/pkg/cni"
	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/ipam"
	"github.com/lariat-net/lariat/pkg/journal"
	"github.com/lariat-net/lariat/pkg/kernel/fake"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/test/lab"
)

// attic is what a pass works on: a real service, a journal, real namespaces, and a fake kernel.
type attic struct {
	*GarbageCollector
	t *testing.T
	h *lab.Host
	k *fake.Kernel
}

func newAttic(t *testing.T) *attic {
	t.Helper()
	h := start(t)
	boot, err := os.ReadFile(filepath.Join(h.Dir, "boot-id"))
	must(t, err)
	k := fake.New()
	a := &attic{t: t, h: h, k: k, GarbageCollector: &GarbageCollector{Client: h.Client(),
		Journal: journal.New(t.TempDir()), Kernel: k, BootID: strings.TrimSpace(string(boot))}}
	t.Cleanup(func() {
		if _, err := h.Client().GC(ctx, "overlay", nil); err != nil {
			t.Error(err)
		}
	})
	return a
}

func attachment(container string) metadata.AttachmentID {
	return metadata.AttachmentID{ContainerID: container, IfName: "eth0"}
}

var serial int

// connected is a container as an ADD leaves it: address, record, port.
func (a *attic) connected(container string, port bool) lab.Netns {
	a.t.Helper()
	serial++
	ns, err := lab.NewNetns(fmt.Sprint("r", serial))
	must(a.t, err)
	a.t.Cleanup(func() { ns.Remove() }) //nolint:errcheck // most tests have removed it
	inode, err := cni.NetnsInode(ns.Path)
	must(a.t, err)
	book := ipam.Client{Service: a.Client, Journal: a.Journal, Type: "lariat-vxlan"}
	got, err := book.Acquire(ctx, "overlay", metadata.AttachRequest{ContainerID: container, IfName: "eth0"},
		ipam.Netns{Path: ns.Path, Inode: inode}, nil)
	must(a.t, err)
	if port {
		must(a.t, a.k.AddEndpoint(ctx, ns.Path, attach.Plan(got, attach.Config{ID: attachment(container)})))
	}
	return ns
}

func (a *attic) held(container string) bool {
	a.t.Helper()
	_, err := a.Client.Attachment(ctx, "overlay", attachment(container))
	if err != nil && !metadata.IsCode(err, metadata.CodeNotFound) {
		a.t.Fatal(err)
	}
	return err == nil
}

func (a *attic) recorded(container string) bool {
	a.t.Helper()
	_, ok, err := a.Journal.Get("overlay", attachment(container))
	must(a.t, err)
	return ok
}

func (a *attic) pass(want ...string) {
	a.t.Helper()
	changed, err := a.Run(ctx)
	must(a.t, err)
	if len(changed) != len(want) {
		a.t.Errorf("changed %q, want %q", changed, want)
		return
	}
	for i := range want {
		if !strings.Contains(changed[i], want[i]) {
			a.t.Errorf("changed %q, want %q in it", changed[i], want[i])
		}
	}
}

func (a *attic) stays(container string) {
	a.t.Helper()
	a.pass()
	if !a.held(container) || !a.recorded(container) {
		a.t.Errorf("%s: held %t, recorded %t", container, a.held(container), a.recorded(container))
	}
}

func (a *attic) goes(container string) {
	a.t.Helper()
	a.pass("released attachment " + container)
	if a.held(container) || a.recorded(container) || strings.Contains(a.k.String(), container) {
		a.t.Errorf("%s: held %t, recorded %t\n%s", container, a.held(container), a.recorded(container), a.k)
	}
	a.pass() // and a second pass has nothing to do
}

func TestF133_LiveContainersStay(t *testing.T) {
	a := newAttic(t)
	a.connected("live", true)
	a.stays("live")

	// An ADD under way, or one that was killed before the port: while the namespace exists, the runtime may come
	// back for it.
	a.connected("unfinished", false)
	a.stays("unfinished")

	// The name of the namespace is gone, but a process or a mount elsewhere keeps it, as the port shows.
	must(t, a.connected("unnamed", true).Remove())
	a.stays("unnamed")
}

func TestF133_DeadOnesGo(t *testing.T) {
	a := newAttic(t)
	must(t, a.connected("gone", false).Remove())
	a.goes("gone")

	ns := a.connected("reused", false) // the runtime gave the same path to the next container
	must(t, ns.Remove())
	_, err := lab.NewNetns(ns.Name)
	must(t, err)
	a.goes("reused")

	ns = a.connected("plain", false) // unmounted, and the file is still there
	must(t, ns.Remove())
	must(t, os.WriteFile(ns.Path, nil, 0o600))
	a.goes("plain")
	must(t, os.WriteFile(ns.Path, nil, 0o600))
}

// TestF133_Grace: dead at every pass for so long, or the time starts anew.
func TestF133_Grace(t *testing.T) {
	a := newAttic(t)
	a.Grace = time.Hour
	ns := a.connected("c", false)
	must(t, ns.Remove())
	a.stays("c")
	a.stays("c")
	if len(a.suspects) != 1 {
		t.Fatalf("suspects %v", a.suspects)
	}
	for what := range a.suspects {
		a.suspects[what] = time.Now().Add(-2 * time.Hour)
	}
	r, _, err := a.Journal.Get("overlay", attachment("c"))
	must(t, err)
	alive := r
	alive.Netns, alive.NetnsInode = "/proc/self/ns/net", 0
	if alive.NetnsInode, err = cni.NetnsInode(alive.Netns); err != nil {
		t.Fatal(err)
	}
	must(t, a.Journal.Put(alive))
	a.stays("c") // it was seen alive
	must(t, a.Journal.Put(r))
	a.stays("c") // so it is suspect only since now
	for what := range a.suspects {
		a.suspects[what] = time.Now().Add(-2 * time.Hour)
	}
	a.goes("c")
}

// TestF128_EarlierBoot: nothing of it lives, so there is no grace; unless its port says otherwise.
func TestF128_EarlierBoot(t *testing.T) {
	a := newAttic(t)
	a.Grace = time.Hour
	must(t, a.connected("dead", false).Remove())
	a.connected("live", true)
	nowhere := a.connected("pathless", false)
	for _, c := range []string{"dead", "live", "pathless"} {
		r, _, err := a.Journal.Get("overlay", attachment(c))
		must(t, err)
		r.BootID = "before"
		if c == "pathless" {
			r.Netns = ""
		}
		must(t, a.Journal.Put(r))
	}
	_ = nowhere
	a.pass("released attachment dead", "released attachment pathless")
	if a.held("dead") || a.held("pathless") || !a.held("live") {
		t.Errorf("dead %t, pathless %t, live %t", a.held("dead"), a.held("pathless"), a.held("live"))
	}
}

// TestF132_AllocationsWithoutARecord are of an ADD that was killed between the service's answer and the journal.
func TestF132_AllocationsWithoutARecord(t *testing.T) {
	a := newAttic(t)
	a.Grace = time.Hour
	_, err := a.Client.Attach(ctx, "overlay", metadata.AttachRequest{ContainerID: "killed", IfName: "eth0",
		StateDir: a.Journal.StateDir()})
	must(t, err)
	a.pass() // it may be under way
	a.pass()
	if !a.held("killed") {
		t.Fatal("it was not given its time")
	}
	a.Grace = 0
	a.pass("killed/eth0 was never finished")
	if a.held("killed") {
		t.Error("it is still held")
	}

	// One whose port is there is alive, whatever became of its record.
	a.connected("lost-record", true)
	must(t, a.Journal.Remove("overlay", attachment("lost-record")))
	a.pass()
	if !a.held("lost-record") {
		t.Error("an address in use was released")
	}
}

// TestF132_AllocationsOfAnotherJournal: lariat-ipam under a bridge leaves no port of ours, so a record is the
// only sign of life. A manager that looks elsewhere than the plugin writes must not take its absence for
// death.
func TestF132_AllocationsOfAnotherJournal(t *testing.T) {
	a := newAttic(t)
	theirs := ipam.Client{Service: a.Client, Journal: journal.New(t.TempDir()), Type: "lariat-ipam"}
	_, err := theirs.Acquire(ctx, "overlay", metadata.AttachRequest{ContainerID: "bridged", IfName: "eth0"},
		ipam.Netns{Path: "/proc/self/ns/net"}, nil)
	must(t, err)
	// So of one that says nothing of itself: it is of who keeps to the default.
	_, err = a.Client.Attach(ctx, "overlay", metadata.AttachRequest{ContainerID: "plain", IfName: "eth0"})
	must(t, err)
	a.pass()
	a.pass()
	if !a.held("bridged") || !a.held("plain") {
		t.Fatal("an address in use was released")
	}
	dirs := map[string]string{}
	held, err := a.Client.Allocations(ctx, "overlay", false)
	must(t, err)
	for _, x := range held {
		dirs[x.ContainerID] = x.StateDir
	}
	if want := map[string]string{"bridged": theirs.Journal.StateDir(),
		"plain": metadata.DefaultStateDir}; !maps.Equal(dirs, want) {
		t.Errorf("state directories %v, want %v", dirs, want)
	}

	// An earlier boot's are dead wherever their records are.
	a.BootID = "the next one"
	a.pass("bridged/eth0 was never finished", "plain/eth0 was never finished")
}

func TestF127_Replay(t *testing.T) {
	a := newAttic(t)
	ns := a.connected("told-later", false)
	r, _, err := a.Journal.Get("overlay", attachment("told-later"))
	must(t, err)
	r.State = journal.Released
	must(t, a.Journal.Put(r))
	_ = ns // which may well exist: DEL comes before the container goes
	a.pass("replayed the release of attachment told-later")
	if a.held("told-later") || a.recorded("told-later") {
		t.Error("it is still there")
	}

	// Of which the service knows nothing, or whose network is gone: there is nothing to tell.
	r.ContainerID = "never-was"
	must(t, a.Journal.Put(r))
	r.Attachment.Network = "dropped"
	must(t, a.Journal.Put(r))
	changed, err := a.Run(ctx)
	must(t, err)
	if len(changed) != 3 || !strings.Contains(changed[2], "removed the journal of network dropped") {
		t.Errorf("changed %q", changed)
	}
	if n, err := a.Journal.List("dropped"); err != nil || len(n) > 0 || a.recorded("never-was") {
		t.Errorf("still recorded: %v %v", n, err)
	}

	// F126: a late replay does not hit the next life of the same container.
	a.connected("again", true)
	now, _, err := a.Journal.Get("overlay", attachment("again"))
	must(t, err)
	late := now
	late.State = journal.Released
	for i := range late.Attachment.Addresses {
		late.Attachment.Addresses[i].Sequence--
	}
	late.Attachment.Addresses = slices.Clone(late.Attachment.Addresses)
	if late.Sequence() > 0 {
		must(t, a.Journal.Put(late))
		a.pass("replayed")
		if !a.held("again") {
			t.Error("F126: the late replay freed the address of the next life")
		}
	}
}

func TestF19_Register(t *testing.T) {
	a := newAttic(t)
	unregistered := func(container, address string) {
		t.Helper()
		inode, err := cni.NetnsInode("/proc/self/ns/net")
		must(t, err)
		must(t, a.Journal.Put(journal.Record{AttachmentID: attachment(container), State: journal.Unregistered,
			Type: "lariat-ipam", BootID: a.BootID, Netns: "/proc/self/ns/net", NetnsInode: inode, Created: time.Now(),
			Attachment: metadata.Attachment{Network: "overlay",
				Addresses: []metadata.AttachmentAddress{{Address: netip.MustParseAddr(address)}}}}))
	}
	unregistered("explicit", "10.42.200.9")
	a.pass("registered attachment explicit")
	r, ok, err := a.Journal.Get("overlay", attachment("explicit"))
	if err != nil || !ok || r.State != journal.Held || !a.held("explicit") || addresses(r) != "10.42.200.9" {
		t.Errorf("%+v %t %v", r, ok, err)
	}
	// Somebody else has it by now: that is told with both names, again at each pass, and the record stays.
	unregistered("too-late", "10.42.200.9")
	for range 2 {
		if _, err := a.Run(ctx); err == nil || !strings.Contains(err.Error(), "too-late") ||
			!strings.Contains(err.Error(), "explicit") {
			t.Errorf("%v", err)
		}
	}
	if !a.recorded("too-late") {
		t.Error("the record is gone")
	}
}

// TestServiceAway: nothing is released on a guess, what could not be told is kept, and the rest of the pass
// is not given up.
func TestServiceAway(t *testing.T) {
	a := newAttic(t)
	must(t, a.connected("dead", false).Remove())
	a.connected("live", true)
	client := a.Client
	a.Client = metadata.Client{Socket: "/run/nobody"}
	if _, err := a.Run(ctx); !errors.Is(err, metadata.ErrUnreachable) {
		t.Errorf("%v", err)
	}
	a.Client = client
	if !a.held("dead") || !a.recorded("dead") {
		t.Errorf("held %t, recorded %t", a.held("dead"), a.recorded("dead"))
	}
	a.pass("attachment dead")
	if a.held("dead") || a.recorded("dead") || !a.held("live") {
		t.Error("not settled")
	}
}

// TestF29_NetworkDeletedMeanwhile: what was seen a moment ago may be gone when it is asked for. That is no
// failure, which would be logged, counted, and tried again.
func TestF29_NetworkDeletedMeanwhile(t *testing.T) {
	a := newAttic(t)
	passing := metadata.Network{Name: "passing", Encapsulation: metadata.EncapVXLAN, VNI: 1077,
		Subnets: []netip.Prefix{netip.MustParsePrefix("10.77.0.0/16")}}
	real := a.Client
	must(t, real.Put(ctx, metadata.KindNetwork, passing.Name, passing))
	seen, err := real.View(ctx)
	must(t, err)

	// The service as it is, whose network goes right after somebody has seen it.
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	must(t, err)
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", a.h.Socket())
	}
	proxy := &httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(&url.URL{Scheme: "http", Host: "service"}) },
		Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true},
		ModifyResponse: func(r *http.Response) error {
			if r.Request.URL.Path != "/v1/snapshot" {
				return nil
			}
			return real.Delete(ctx, metadata.KindNetwork, passing.Name)
		},
	}
	server := &http.Server{Handler: proxy}
	go server.Serve(l)
	defer server.Close()

	a.Client = metadata.Client{Socket: socket}
	if _, err := a.Run(ctx); err != nil {
		t.Errorf("the leftovers of a network that was deleted: %v", err)
	}
	if v, err := real.View(ctx); err != nil ||
		slices.ContainsFunc(v.Networks, func(n metadata.Network) bool { return n.Name == passing.Name }) {
		t.Fatalf("the network was not deleted: %v", err)
	}
	me, _ := seen.Host(seen.Self)
	settled := map[string]bool{}
	for _, n := range seen.Networks {
		settled[incarnation(me, n)] = true
	}
	m := &Manager{Client: real, leftovers: &GarbageCollector{}}
	m.leftovers.settled.Store(&settled)
	if err := m.join(ctx, seen); err != nil {
		t.Errorf("join a network that was deleted: %v", err)
	}
}

// TestKernelThatDoesNotLetGo: the address of an interface that could not be removed stays taken.
func TestKernelThatDoesNotLetGo(t *testing.T) {
	a := newAttic(t)
	ns := a.connected("c", true)
	must(t, ns.Remove())
	// A port without an alias says of nobody that he is alive.
	a.k.FailAt(1, errors.New("no such luck"))
	a.Kernel = blind{a.k}
	if _, err := a.Run(ctx); err == nil || !strings.Contains(err.Error(), "no such luck") {
		t.Errorf("%v", err)
	}
	if !a.held("c") || !a.recorded("c") {
		t.Error("released, with its interface in place")
	}
	a.k.FailAt(0, nil)
	a.goes("c")
}

// blind is a kernel whose ports have lost their alias.
type blind struct{ *fake.Kernel }

func (blind) Veths(context.Context) ([]delta.VethInfo, error) { return nil, nil }

// TestTheServiceForgot: what lives and is not known is registered again, exactly as it is; what is dead is not. An
// address that another has by now stays his, and both are named at each pass.
func TestTheServiceForgot(t *testing.T) {
	a := newAttic(t)
	a.connected("port", true)
	a.connected("bridged", false)
	must(t, a.connected("dead", false).Remove())
	must(t, a.connected("unnamed", true).Remove()) // its port shows that it lives
	forget := func(container string) journal.Record {
		t.Helper()
		r, _, err := a.Journal.Get("overlay", attachment(container))
		must(t, err)
		must(t, a.Client.Release(ctx, "overlay", attachment(container), 0))
		return r
	}
	before := map[string]journal.Record{}
	for _, c := range []string{"port", "bridged", "dead", "unnamed"} {
		before[c] = forget(c)
	}
	a.Grace = time.Hour
	a.pass("registered attachment bridged", "registered attachment port", "registered attachment unnamed")
	for _, c := range []string{"port", "bridged", "unnamed"} {
		now, err := a.Client.Attachment(ctx, "overlay", attachment(c))
		must(t, err)
		r, _, err := a.Journal.Get("overlay", attachment(c))
		must(t, err)
		if addresses(journal.Record{Attachment: *now}) != addresses(before[c]) || r.Sequence() != now.Addresses[0].Sequence ||
			r.Netns != before[c].Netns {
			t.Errorf("%s had %s, now %+v, recorded %+v", c, addresses(before[c]), now, r)
		}
	}
	if a.held("dead") {
		t.Error("one that is dead was registered")
	}
	a.pass()

	taken := before["port"].Attachment.Addresses[0].Address
	forget("port")
	_, err := a.Client.Attach(ctx, "overlay", metadata.AttachRequest{ContainerID: "heir", IfName: "eth0",
		Requested: []netip.Addr{taken}})
	must(t, err)
	for range 2 {
		if _, err := a.Run(ctx); err == nil || !strings.Contains(err.Error(), "port/eth0") ||
			!strings.Contains(err.Error(), "heir/eth0") {
			t.Errorf("%v", err)
		}
	}
	if !a.recorded("port") || !a.held("heir") {
		t.Error("one of the two was given up")
	}
	must(t, a.Client.Release(ctx, "overlay", attachment("heir"), 0))
	a.pass("registered attachment port")

	// A DEL is at work.
	forget("port")
	must(t, a.Journal.SetTerminating("overlay", attachment("port"), true))
	a.pass()

	// The network is gone.
	r := before["bridged"]
	r.Attachment.Network = "lost"
	must(t, a.Journal.Put(r))
	if _, err := a.Run(ctx); err == nil ||
		!strings.Contains(err.Error(), "1 attachments of this host are on network lost") {
		t.Errorf("%v", err)
	}
}
