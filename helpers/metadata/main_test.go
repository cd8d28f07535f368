package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/certs"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/unixhttp"
)

// The tests run the program itself: this binary, started again under a variable.
const asProgram = "LARIAT_METADATA_TEST_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

func program(args ...string) *exec.Cmd {
	self, err := os.Executable()
	if err != nil {
		panic(err)
	}
	c := exec.Command(self, args...)
	c.Env = append(os.Environ(), asProgram+"=1")
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return c
}

// proc is one running lariat-metadata.
type proc struct {
	metadata.Client
	dir  string
	cmd  *exec.Cmd
	log  *syncBuffer
	done chan struct{}
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// shortDir is a folder whose path leaves room for sockets' names.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "lm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func identity(dir, host string) []string {
	os.WriteFile(filepath.Join(dir, "machine-id"), []byte("machine-"+host), 0o600) //nolint:errcheck // noticed at start
	os.WriteFile(filepath.Join(dir, "boot-id"), []byte("boot-"+host), 0o600)       //nolint:errcheck // noticed at start
	return []string{"--host-name", host, "--socket", filepath.Join(dir, "s"), "--data-dir", filepath.Join(dir, "etcd"),
		"--underlay", "127.0.0.1/8",
		"--machine-id-file", filepath.Join(dir, "machine-id"), "--boot-id-file", filepath.Join(dir, "boot-id"),
		"--start-timeout", "30s"}
}

// start runs the program in a folder and does not wait.
func start(t testing.TB, dir, host string, flags ...string) *proc {
	t.Helper()
	p := &proc{Client: metadata.Client{Socket: filepath.Join(dir, "s")}, dir: dir, log: &syncBuffer{},
		done: make(chan struct{})}
	p.cmd = program(append(identity(dir, host), flags...)...)
	p.cmd.Stderr = p.log
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		p.cmd.Wait() //nolint:errcheck // looked at by ProcessState
		close(p.done)
	}()
	t.Cleanup(func() {
		p.cmd.Process.Kill() //nolint:errcheck // may be gone
		<-p.done
		if t.Failed() {
			t.Logf("%s:\n%s", host, p.log)
		}
	})
	return p
}

// ready waits until the program serves.
func (p *proc) ready(t testing.TB) *proc {
	t.Helper()
	t.Cleanup(func() {})
	for deadline := time.Now().Add(40 * time.Second); time.Now().Before(deadline); {
		if _, err := p.View(t.Context()); err == nil {
			return p
		}
		select {
		case <-p.done:
			t.Fatalf("it ended: %s", p.log)
		case <-time.After(20 * time.Millisecond): // for a socket that is not there yet there is no event
		}
	}
	t.Fatalf("not ready: %s", p.log)
	return nil
}

func (p *proc) stop(t testing.TB) {
	t.Helper()
	p.cmd.Process.Signal(syscall.SIGTERM) //nolint:errcheck // may be gone
	select {
	case <-p.done:
	case <-time.After(20 * time.Second):
		t.Fatal("does not stop")
	}
}

// metrics reads the text of /metrics.
func (p *proc) metrics(t testing.TB) string {
	t.Helper()
	_, data, err := unixhttp.Page(t.Context(), p.Socket, "GET", "/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// storeBack waits until the service knows that its store answers again. Before that it refuses requests at once.
func (p *proc) storeBack(t testing.TB) {
	t.Helper()
	for deadline := time.Now().Add(40 * time.Second); ; {
		status, why, err := unixhttp.Page(t.Context(), p.Socket, "GET", "/readyz", nil)
		switch {
		case err == nil && status == 200:
			return
		case time.Now().After(deadline):
			t.Fatalf("not ready: %s %v", why, err)
		}
		<-time.After(20 * time.Millisecond) // a service tells its readiness to who asks only
	}
}

func (p *proc) kill() {
	p.cmd.Process.Kill() //nolint:errcheck // may be gone
	<-p.done
}

var lan = &metadata.Network{Subnets: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")}, HostNAT: true}

func attach(t testing.TB, p *proc, id string) *metadata.Attachment {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	a, err := p.Attach(ctx, "lan", metadata.AttachRequest{ContainerID: id, IfName: "eth0", Create: lan})
	if err != nil {
		t.Fatalf("%s: %v", id, err)
	}
	return a
}

func TestF148_KillDuringTenThousandWrites(t *testing.T) {
	dir := shortDir(t)
	p := start(t, dir, "a").ready(t)
	attach(t, p, "first")
	var acknowledged sync.Map // id -> address
	var count atomic.Int64
	var wg sync.WaitGroup
	const goal = 10_000
	for w := range 100 {
		wg.Go(func() {
			for i := range goal / 100 {
				id := fmt.Sprintf("c-%d-%d", w, i)
				a, err := p.Attach(t.Context(), "lan", metadata.AttachRequest{ContainerID: id, IfName: "eth0"})
				if err != nil {
					return // killed
				}
				acknowledged.Store(id, a.Addresses[0])
				if count.Add(1) == goal*6/10 {
					p.cmd.Process.Kill() //nolint:errcheck // it runs
				}
			}
		})
	}
	wg.Wait()
	<-p.done
	if n := count.Load(); n < goal*6/10 || n == goal {
		t.Fatalf("%d acknowledged: the kill came at the wrong time", n)
	}
	// The socket is left behind, and the folder is as the kill left it.
	p = start(t, dir, "a").ready(t)
	list, err := p.Allocations(t.Context(), "lan", true)
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]metadata.Allocation{}
	byAddress := map[netip.Addr]string{}
	for _, x := range list {
		have[x.ContainerID] = x
		if byAddress[x.Address] != "" {
			t.Errorf("%s twice", x.Address)
		}
		byAddress[x.Address] = x.ContainerID
	}
	lost := 0
	acknowledged.Range(func(id, a any) bool {
		if x := have[id.(string)]; x.Address != a.(metadata.AttachmentAddress).Address ||
			x.Sequence != a.(metadata.AttachmentAddress).Sequence {
			lost++
		}
		return true
	})
	if lost > 0 {
		t.Errorf("%d of %d acknowledged addresses lost", lost, count.Load())
	}
	var id string
	acknowledged.Range(func(k, _ any) bool { id = k.(string); return false })
	want, _ := acknowledged.Load(id)
	if a := attach(t, p, id); a.Addresses[0] != want {
		t.Errorf("asked again: %+v, was %+v", a.Addresses[0], want)
	}
	p.stop(t)
}

func TestOneServicePerSocket(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0)) // whatever it is, nothing is for others
	dir := shortDir(t)
	p := start(t, dir, "a").ready(t)
	for name, mode := range map[string]os.FileMode{"s": 0o600, "etcd": 0o700, "etcd/client.sock": 0o600} {
		if st, err := os.Stat(filepath.Join(dir, name)); err != nil || st.Mode().Perm() != mode {
			t.Errorf("%s: %v %v, want %v", name, st.Mode(), err, mode)
		}
	}
	out, err := program(identity(dir, "a")...).CombinedOutput()
	if err == nil || !strings.Contains(string(out), fmt.Sprintf("process id %d", p.cmd.Process.Pid)) ||
		!strings.Contains(string(out), filepath.Join(dir, "s")) {
		t.Errorf("%v: %s", err, out)
	}
	p.stop(t)
	if code := p.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit code %d: %s", code, p.log)
	}
}

func TestMistakesAreNamed(t *testing.T) {
	dir := shortDir(t)
	for _, tc := range []struct {
		flags []string
		want  string
	}{
		{[]string{"--underlay", "203.0.113.77/24"}, "no interface has it"},
		{[]string{"--machine-id-file", filepath.Join(dir, "nope")}, "--machine-id-file"},
		{[]string{"--listen-client", "http://0.0.0.0:1"}, "plain http beyond this machine is refused"},
		{[]string{"--listen-client", "https://127.0.0.1:1"}, "lariat certs"},
		{[]string{"--initial-cluster", "x=https://127.0.0.1:1"}, "--listen-peer"},
		{[]string{"--etcd-endpoints", "http://192.0.2.1:2379"}, "loopback only"},
		{[]string{"--etcd-endpoints", "https://192.0.2.1:2379"}, "--etcd-ca"},
		{[]string{"--log-level", "loud"}, "--log-level"},
		{[]string{"--host-name", "a/b"}, "--host-name"},
		{[]string{"bakup"}, "bakup"},
		{[]string{"--nonesuch"}, "--nonesuch"},
	} {
		out, err := program(append(identity(dir, "a"), tc.flags...)...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), tc.want) {
			t.Errorf("%v: %v: %s", tc.flags, err, out)
		}
	}
}

func TestBackupAndRestore(t *testing.T) {
	old := syscall.Umask(0) // a backup is its owner's alone even so
	defer syscall.Umask(old)
	dir := shortDir(t)
	p := start(t, dir, "a").ready(t)
	a := attach(t, p, "c1")
	file := filepath.Join(dir, "backup")
	command := func(ok bool, want string, args ...string) {
		t.Helper()
		out, err := program(args...).CombinedOutput()
		if (err == nil) != ok || !strings.Contains(string(out), want) {
			t.Errorf("%v: %v: %s", args, err, out)
		}
	}
	command(true, file, "backup", "--socket", filepath.Join(dir, "s"), file)
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", st.Mode(), err)
	}
	attach(t, p, "after")
	p.stop(t)
	command(false, "not empty", "restore", "--data-dir", filepath.Join(dir, "etcd"), file)
	command(false, "is lariat-metadata running?", "backup", "--socket", filepath.Join(dir, "s"), filepath.Join(dir, "b2"))
	if left, _ := filepath.Glob(filepath.Join(dir, "*b2*")); len(left) > 0 {
		t.Errorf("%v left behind", left)
	}
	data, _ := os.ReadFile(file)
	bad := filepath.Join(dir, "bad")
	for _, damaged := range [][]byte{data[:len(data)-700], append([]byte{1}, data[1:]...)[:len(data)], nil} {
		if damaged != nil && len(damaged) == len(data) {
			damaged[9000] ^= 1
		}
		os.WriteFile(bad, damaged, 0o600) //nolint:errcheck // noticed by restore
		command(false, "nothing was changed", "restore", "--data-dir", filepath.Join(dir, "new"), bad)
	}
	if err := os.Rename(filepath.Join(dir, "etcd"), filepath.Join(dir, "old")); err != nil {
		t.Fatal(err)
	}
	command(true, "restored", "restore", "--data-dir", filepath.Join(dir, "etcd"), file)
	p = start(t, dir, "a").ready(t)
	list, err := p.Allocations(t.Context(), "lan", true)
	if err != nil || len(list) != 1 || list[0].Address != a.Addresses[0].Address {
		t.Errorf("%+v %v", list, err)
	}
	if b := attach(t, p, "c2"); b.Addresses[0].Sequence <= a.Addresses[0].Sequence {
		t.Errorf("sequence %d after %d", b.Addresses[0].Sequence, a.Addresses[0].Sequence)
	}
}

func TestCorruptionIsNamed(t *testing.T) {
	dir := shortDir(t)
	p := start(t, dir, "a").ready(t)
	attach(t, p, "c1")
	p.stop(t)
	wal, _ := filepath.Glob(filepath.Join(dir, "etcd/member/wal/*.wal"))
	for _, damage := range []string{wal[0], filepath.Join(dir, "etcd/member/snap/db")} {
		good, err := os.ReadFile(damage)
		if err != nil {
			t.Fatal(err)
		}
		bad := slices.Clone(good)
		for i := 0; i < len(bad) && i < 20000; i += 7 {
			bad[i] ^= 0x55
		}
		os.WriteFile(damage, bad, 0o600) //nolint:errcheck // noticed below
		out, err := program(identity(dir, "a")...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), filepath.Join(dir, "etcd")) ||
			!strings.Contains(string(out), "lariat-metadata restore FILE") {
			t.Errorf("%s: %v: %s", damage, err, out)
		}
		os.WriteFile(damage, good, 0o600) //nolint:errcheck // noticed below
	}
	p = start(t, dir, "a").ready(t)
	if list, err := p.Allocations(t.Context(), "lan", true); err != nil || len(list) != 1 {
		t.Errorf("%+v %v", list, err)
	}
}

// Two hosts on the first one's store: a killed host is seen as gone when its lease has run out, its restart at once.
func TestLivenessFollowsTheLease(t *testing.T) {
	da, db := shortDir(t), shortDir(t)
	url := "http://127.0.0.1:" + freePort(t)
	a := start(t, da, "a", "--listen-client", url).ready(t)
	b := start(t, db, "b", "--etcd-endpoints", url, "--lease", "2s").ready(t)
	live := make(chan bool, 100)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	go a.Watch(ctx, func(s *metadata.Snapshot) error { //nolint:errcheck // ends with the context
		h, ok := s.Host("b")
		live <- ok && h.Live
		return nil
	}, nil)
	until := func(want bool) {
		t.Helper()
		for {
			select {
			case got := <-live:
				if got == want {
					return
				}
			case <-ctx.Done():
				t.Fatalf("host b never became live=%t", want)
			}
		}
	}
	until(true)
	attach(t, b, "c1")
	b.kill()
	until(false)
	b = start(t, db, "b", "--etcd-endpoints", url, "--lease", "2s").ready(t)
	until(true)
	if _, err := b.Attachment(ctx, "lan", metadata.AttachmentID{ContainerID: "c1", IfName: "eth0"}); err != nil {
		t.Error(err)
	}
	b.stop(t)
	until(false)

	// The store's host restarts: the other goes on by itself.
	b = start(t, db, "b", "--etcd-endpoints", url, "--lease", "2s").ready(t)
	until(true)
	a.stop(t)
	if v, err := b.View(ctx); err != nil || len(v.Hosts) != 2 {
		t.Errorf("reads go on: %+v %v", v, err)
	}
	start(t, da, "a", "--listen-client", url).ready(t)
	attach(t, b, "c2")
}

// The tree can be bound before its address exists, and knows containers by their source address.
func TestTreeListens(t *testing.T) {
	dir := shortDir(t)
	port := freePort(t)
	p := start(t, dir, "a", "--listen-tree", "169.254.169.250:"+port).ready(t)
	p.stop(t)
	start(t, dir, "a", "--listen-tree", "127.0.0.1:"+port).ready(t)
	for method, want := range map[string]string{"GET": "200 OK", "POST": "405 Method Not Allowed"} {
		c, err := net.Dial("tcp", "127.0.0.1:"+port)
		// The socket's readiness is not the tree's.
		for deadline := time.Now().Add(10 * time.Second); err != nil && time.Now().Before(deadline); {
			c, err = net.Dial("tcp", "127.0.0.1:"+port)
		}
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(c, "%s /latest/self/host/name HTTP/1.0\r\n\r\n", method)
		data, _ := io.ReadAll(c)
		c.Close()
		if !strings.Contains(string(data), want) || method == "GET" && !strings.HasSuffix(string(data), "\r\n\r\na") {
			t.Errorf("%s: %s", method, data)
		}
	}
}

func freePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

// F146 and F147: the README's commands, on three hosts that are folders and addresses 127.0.0.1 to 127.0.0.3.
func TestF146_OneStoreToThreeAndBack(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?s)<!-- on: ([a-z0-9 ]+) -->\n```sh\n(.*?)```").FindAllStringSubmatch(string(readme),
		-1)
	if len(blocks) != 8 {
		t.Fatalf("%d blocks of commands in README.md", len(blocks))
	}
	root := shortDir(t)
	pki := filepath.Join(root, "pki")
	now := time.Now()
	if _, err := certs.Init(pki, "test", now); err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, root: root, client: freePort(t), peer: freePort(t), running: map[string]*proc{}}
	for i, h := range []string{"h1", "h2", "h3"} {
		if _, err := certs.Host(pki,
			certs.Request{Name: h, IPs: []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, byte(i + 1)})}}, now); err != nil {
			t.Fatal(err)
		}
		for _, d := range []string{"etc", "root", "var"} {
			if err := os.MkdirAll(filepath.Join(root, h, d), 0o700); err != nil {
				t.Fatal(err)
			}
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Mkdir(filepath.Join(root, "bin"), 0o700),
		os.Symlink(self, filepath.Join(root, "bin/lariat-metadata"))); err != nil {
		t.Fatal(err)
	}
	one := "--listen-client https://127.0.0.1:" + w.client + " --etcd-ca " + pki + "/ca.crt --etcd-cert " + pki +
		"/h1.crt --etcd-key " + pki + "/h1.key"
	os.WriteFile(filepath.Join(root, "h1/etc/metadata.env"), []byte("METADATA_FLAGS="+one+"\n"),
		0o600) //nolint:errcheck // noticed at start
	w.systemctl("h1", "start")
	w.running["h1"].ready(t)
	got := map[netip.Addr]string{}
	take := func(host, id string) {
		t.Helper()
		a := attach(t, w.running[host], id).Addresses[0].Address
		if old, ok := got[a]; ok && old != id {
			t.Errorf("%s has %s, and %s too", old, a, id)
		}
		got[a] = id
	}
	for i := range 100 {
		take("h1", fmt.Sprint("alone", i))
	}

	w.block(blocks[0]) // h2 and h3 join
	for _, h := range []string{"h2", "h3"} {
		w.running[h].ready(t)
		take(h, "joined-"+h)
	}
	t.Run("F147_refused_without_certificate", func(t *testing.T) { w.refused(t, pki) })

	for _, b := range blocks[1:4] {
		w.block(b)
	}
	for _, h := range []string{"h1", "h2", "h3"} {
		w.running[h].ready(t)
	}
	list, err := w.running["h2"].Allocations(t.Context(), "lan", true)
	if err != nil || len(list) != len(got) {
		t.Fatalf("%d addresses, there were %d: %v", len(list), len(got), err)
	}
	for i := range 20 {
		for _, h := range []string{"h1", "h2", "h3"} {
			take(h, fmt.Sprint("three-", h, i))
		}
	}
	take("h1", "alone7") // the same container, the same address

	// One member lost: writes go on, the leader or not.
	start := time.Now()
	hosts := []string{"h1", "h2", "h3"}
	leader := slices.IndexFunc(hosts,
		func(h string) bool { return strings.Contains(w.running[h].metrics(t), "\nlariat_store_leader 1\n") })
	if leader < 0 {
		t.Fatal("nobody leads")
	}
	lost, other, last := hosts[leader], hosts[(leader+1)%3], hosts[(leader+2)%3]
	w.running[lost].kill()
	for i := range 20 {
		for _, h := range []string{other, last} {
			take(h, fmt.Sprint("two-", h, i))
		}
	}
	t.Logf("40 addresses after the loss of the leading member in %v", time.Since(start))
	// Two lost: no quorum; requests end by their deadline, reads go on.
	w.running[other].kill()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	_, err = w.running[last].Attach(ctx, "lan", metadata.AttachRequest{ContainerID: "lonely", IfName: "eth0"})
	cancel()
	var answer *metadata.Error
	if !errors.As(err, &answer) || answer.Code != metadata.CodeUnavailable {
		t.Errorf("without a quorum: %v", err)
	}
	if v, err := w.running[last].View(t.Context()); err != nil || len(v.Hosts) != 3 {
		t.Errorf("%+v %v", v, err)
	}
	w.systemctl(lost, "start")
	w.systemctl(other, "start")
	for _, h := range []string{"h1", "h2", "h3"} {
		w.running[h].ready(t).storeBack(t)
		take(h, "again-"+h)
	}

	for _, b := range blocks[4:] {
		w.block(b)
	}
	w.running["h1"].ready(t)
	take("h1", "alone7")
	take("h1", "alone-again")
	list, err = w.running["h1"].Allocations(t.Context(), "lan", true)
	if err != nil {
		t.Fatal(err)
	}
	have := map[netip.Addr]string{}
	for _, x := range list {
		have[x.Address] = x.ContainerID
	}
	for a, id := range got {
		if have[a] != id {
			t.Errorf("%s of %s is %q now", a, id, have[a])
		}
	}
}

// world stands for three machines with systemd.
type world struct {
	t            *testing.T
	root         string
	client, peer string // ports
	running      map[string]*proc
}

// local maps what the README says to this test.
func (w *world) local(host, s string) string {
	n := host[1:]
	s = strings.ReplaceAll(s, "NAME=h1 IP=192.0.2.1", "NAME="+host+" IP=192.0.2."+n)
	s = strings.ReplaceAll(s, "NAME=h1\n", "NAME="+host+"\n")
	s = strings.NewReplacer("192.0.2.", "127.0.0.", ":2379", ":"+w.client, ":2380", ":"+w.peer,
		"/etc/lariat/pki/", w.root+"/pki/", "/etc/lariat/", w.root+"/"+host+"/etc/", "/var/lib/lariat/", w.root+"/"+host+"/",
		"/run/lariat/metadata.sock", w.root+"/"+host+"/s", "root@192.0.2.2:/root/", w.root+"/h2/root/",
		"root@192.0.2.3:/root/", w.root+"/h3/root/",
		" /root/", " "+w.root+"/"+host+"/root/").Replace(s)
	return strings.ReplaceAll(s, "scp ", "cp ")
}

// block runs one block of commands on each of its hosts, line by line where systemd is asked.
func (w *world) block(b []string) {
	w.t.Helper()
	for _, host := range strings.Fields(b[1]) {
		script := w.local(host, b[2])
		var part strings.Builder
		flush := func() {
			if part.Len() == 0 {
				return
			}
			if strings.Contains(part.String(), "lariat-metadata backup "+w.root) {
				part2 := strings.ReplaceAll(part.String(), "lariat-metadata backup ", "lariat-metadata backup --socket "+w.root+"/"+
					host+"/s ")
				part.Reset()
				part.WriteString(part2)
			}
			sh := exec.Command("sh", "-euc", part.String())
			sh.Env = append(os.Environ(), asProgram+"=1", "PATH="+w.root+"/bin:"+os.Getenv("PATH"))
			out, err := sh.CombinedOutput()
			if err != nil {
				w.t.Fatalf("on %s: %v: %s\n%s", host, err, out, part.String())
			}
			part.Reset()
		}
		for _, line := range strings.SplitAfter(script, "\n") {
			f := strings.Fields(line)
			if len(f) > 1 && f[0] == "systemctl" {
				flush()
				w.systemctl(host, f[1])
				if f[1] == "start" && f[2] != "--no-block" {
					w.running[host].ready(w.t)
				}
				continue
			}
			part.WriteString(line)
		}
		flush()
	}
}

func (w *world) systemctl(host, verb string) {
	w.t.Helper()
	if verb == "stop" {
		if p := w.running[host]; p != nil {
			p.stop(w.t)
		}
		return
	}
	env, err := os.ReadFile(filepath.Join(w.root, host, "etc/metadata.env"))
	if err != nil {
		w.t.Fatal(err)
	}
	_, flags, _ := strings.Cut(strings.TrimSpace(string(env)), "METADATA_FLAGS=")
	w.running[host] = start(w.t, filepath.Join(w.root, host), host, strings.Fields(flags)...)
}

// refused: a host without a certificate, or with one of another authority, gets nothing.
func (w *world) refused(t *testing.T, pki string) {
	url := "https://127.0.0.1:" + w.client
	other := filepath.Join(shortDir(t), "pki")
	now := time.Now()
	if _, err := certs.Init(other, "other", now); err != nil {
		t.Fatal(err)
	}
	if _, err := certs.Host(other, certs.Request{Name: "evil"}, now); err != nil {
		t.Fatal(err)
	}
	dir := shortDir(t)
	for _, flags := range [][]string{
		{},
		{"--etcd-ca", pki + "/ca.crt", "--etcd-cert", other + "/evil.crt", "--etcd-key", other + "/evil.key"},
	} {
		args := append(identity(dir, "h4"), "--start-timeout", "4s", "--etcd-endpoints", url)
		out, err := program(append(args, flags...)...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "etcd-c") {
			t.Errorf("%v: %v: %s", flags, err, out)
		}
	}
}
