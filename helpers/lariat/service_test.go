package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/lariat-net/lariat/pkg/kernel/netnstest"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// metadataBinary is the real lariat-metadata.
func metadataBinary(t testing.TB) string { return helper(t, "metadata") }

// helper is a real executable: of LARIAT_BIN, or built for the test.
func helper(t testing.TB, name string) string {
	t.Helper()
	if dir := os.Getenv("LARIAT_BIN"); dir != "" {
		if file := filepath.Join(dir, "lariat-"+name); exec.Command(file, "--help").Run() == nil {
			return file
		}
	}
	file := filepath.Join(t.TempDir(), "lariat-"+name)
	if out, err := exec.Command("go", "build", "-o", file, "../"+name).CombinedOutput(); err != nil {
		t.Fatalf("build lariat-%s: %v\n%s", name, err, out)
	}
	return file
}

// The services run in a namespace that has their addresses.
func TestMain(m *testing.M) { netnstest.Main(m) }

// service is a running lariat-metadata.
type service struct {
	socket string
	cmd    *exec.Cmd
	log    bytes.Buffer
	done   chan struct{}
}

// serve starts the metadata service of a host with further arguments, and waits until it is ready.
func serve(t testing.TB, ns *netnstest.NS, binary, host, underlay string, args ...string) *service {
	t.Helper()
	dir, err := os.MkdirTemp("", "lariat") // a socket's path may have 107 octets, t.TempDir's are longer
	if err != nil {
		t.Fatal(err)
	}
	s := &service{socket: filepath.Join(dir, "m.sock"), done: make(chan struct{})}
	id := filepath.Join(dir, "id")
	if err := os.WriteFile(id, fmt.Appendf(nil, "%032x\n", []byte(host)), 0o600); err != nil {
		t.Fatal(err)
	}
	s.cmd = exec.Command(binary, append([]string{"--host-name", host, "--socket", s.socket, "--data-dir",
		filepath.Join(dir, "etcd"), "--machine-id-file", id,
		"--underlay", underlay, "--lease", "2s"}, args...)...)
	s.cmd.Stderr = &s.log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	ns.Do(t, func() { err = s.cmd.Start() })
	if err != nil {
		t.Fatal(err)
	}
	go func() { s.cmd.Wait(); close(s.done) }()
	t.Cleanup(func() { s.stop(); os.RemoveAll(dir) })
	s.await(t, func(v *metadata.Snapshot) bool { _, ok := v.Host(host); return ok })
	return s
}

// await waits until this host's view is so. The watch retries until the service answers, so it serves to wait
// for that too.
func (s *service) await(t testing.TB, so func(*metadata.Snapshot) bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	seen := errors.New("seen")
	err := metadata.Client{Socket: s.socket}.Watch(ctx, func(v *metadata.Snapshot) error {
		if so(v) {
			return seen
		}
		return nil
	}, func(error) {
		select {
		case <-s.done:
			cancel()
		default:
		}
	})
	if !errors.Is(err, seen) {
		s.stop()
		t.Fatalf("the service of %s does not come so far: %v\n%s", s.socket, err, s.log.String())
	}
}

func has(network string) func(*metadata.Snapshot) bool {
	return func(v *metadata.Snapshot) bool { _, ok := v.Network(network); return ok }
}

func (s *service) stop() {
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	<-s.done
}

func (s *service) lariat(t testing.TB, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	return lariat(t, append([]string{"--socket", s.socket, "--manager-socket", s.socket + ".none"}, args...)...)
}

func (s *service) must(t testing.TB, args ...string) string {
	t.Helper()
	out, errs, status := s.lariat(t, args...)
	if status != 0 {
		t.Fatalf("lariat %s: status %d: %s", strings.Join(args, " "), status, errs)
	}
	return out
}

// refused expects a status of 1 and a message.
func (s *service) refused(t testing.TB, want string, args ...string) {
	t.Helper()
	if _, errs, status := s.lariat(t, args...); status != 1 || !strings.Contains(errs, want) {
		t.Errorf("lariat %s: status %d: %q, want %q", strings.Join(args, " "), status, errs, want)
	}
}

func (s *service) attach(t testing.TB, id, name string) netip.Addr {
	t.Helper()
	a, err := metadata.Client{Socket: s.socket}.Attach(t.Context(), "overlay", metadata.AttachRequest{ContainerID: id,
		IfName: "eth0", Name: name})
	if err != nil {
		t.Fatal(err)
	}
	return a.Addresses[0].Address
}

func TestWithRealService(t *testing.T) {
	ns, binary := netnstest.New(t), metadataBinary(t)
	netnstest.Veth(t, ns, "192.0.2.1/24", ns, "192.0.2.2/24")
	const store = "http://127.0.0.1:2379" // of the namespace
	h1 := serve(t, ns, binary, "h1", "192.0.2.1/24", "--listen-client", store)
	h2 := serve(t, ns, binary, "h2", "192.0.2.2/24", "--etcd-endpoints", store)

	if out := h1.must(t, "status"); !strings.Contains(out, "2 hosts (all live), 0 networks") || !strings.Contains(out,
		"No network yet") || !strings.Contains(out, "not running on this host") {
		t.Error(out)
	}

	// Networks: mistakes are named, the rest is made.
	for args, want := range map[string]string{
		"--subnet 10.42.0.1/16":                         "did you mean 10.42.0.0/16?",
		"--subnet 10.42.0.0/16,10.43.0.0/16":            "second of its family",
		"--subnet bogus":                                `--subnet: "bogus"`,
		"":                                              "no subnet given",
		"--subnet 192.0.0.0/16":                         "overlaps the underlay 192.0.2.1/24 of host h1",
		"--subnet 10.42.0.0/16 --vni 16777216":          "vni 16777216",
		"--subnet 10.42.0.0/16 --mtu 100":               "mtu 100",
		"--subnet 10.42.0.0/16 --encapsulation gre":     `encapsulation "gre"`,
		"--subnet 10.42.0.0/16 --cooldown 1ms":          "--cooldown",
		"--subnet 10.42.0.0/16 --exclude 10.42.0.9-x":   "exclude",
		"--subnet 10.42.0.0/16 --cni-config main.go":    "is not JSON",
		"--subnet 10.42.0.0/16 --block-size-v4 8":       "block size /8",
		"--subnet 10.42.0.0/16 --gateway 10.42.0.0/16x": "--gateway",
	} {
		h1.refused(t, want, append([]string{"network", "create", "overlay"}, strings.Fields(args)...)...)
	}
	if out := h1.must(t, "network", "create", "overlay", "--subnet", "10.42.0.0/16", "--default"); !strings.Contains(out,
		"network overlay made: 10.42.0.0/16, vxlan, vni 1042, udp 4789") {
		t.Error(out)
	}
	h2.await(t, has("overlay"))
	h2.refused(t, "is there already", "network", "create", "overlay", "--subnet", "10.44.0.0/16")
	h2.refused(t, "overlaps subnet 10.42.0.0/16 of network overlay", "network", "create", "other", "--subnet",
		"10.42.128.0/17")
	h2.refused(t, "vni 1042 is network overlay's", "network", "create", "other", "--subnet", "10.44.0.0/16", "--vni",
		"1042")
	if out := h2.must(t, "network", "create", "backend", "--subnet", "10.43.0.0/16,fd43::/48", "--mtu", "1400",
		"--direct-routing", "--host-nat=false", "--exclude", "10.43.0.9"); !strings.Contains(out, "vni 1043") {
		t.Error(out)
	}
	h1.await(t, has("backend"))
	h1.must(t, "network", "update", "backend", "--mtu", "1380", "--exclude", "")
	h2.await(t, func(v *metadata.Snapshot) bool { n, _ := v.Network("backend"); return n.MTU == 1380 })
	var n metadata.Network
	if err := json.Unmarshal([]byte(h2.must(t, "network", "show", "backend", "-o", "json")), &n); err != nil ||
		n.MTU != 1380 || !n.DirectRouting || n.HostNAT || len(n.Exclude) != 0 || n.VNI != 1043 {
		t.Errorf("%v %+v", err, n)
	}
	h1.refused(t, "there is no network nope; there are: backend overlay", "network", "show", "nope")
	h1.refused(t, "there is no network nope", "network", "delete", "nope")

	// Addresses.
	both := func(v *metadata.Snapshot) bool {
		return len(v.Gateways("overlay", "h1")) == 1 && len(v.Gateways("overlay", "h2")) == 1
	}
	web, db := h1.attach(t, "c0ffee0000001111222233334444", "web"), h2.attach(t, "deadbeef000011112222", "db")
	h1.await(t, both)
	h2.await(t, both)
	list := h1.must(t, "ip", "list")
	for _, want := range []string{web.String(), db.String(), "c0ffee000000/eth0", "deadbeef0000/eth0", "web"} {
		if !strings.Contains(list, want) {
			t.Errorf("ip list lacks %s:\n%s", want, list)
		}
	}
	if out := h1.must(t, "ip", "list", "--host", "h2", "--output", "table"); strings.Contains(out, web.String()) ||
		!strings.Contains(out, db.String()) {
		t.Error(out)
	}
	for addr, want := range map[string]string{web.String(): "in use", "10.43.0.1": "free",
		"192.168.9.9": "no network has it"} {
		if out := h1.must(t, "ip", "show", addr); !strings.Contains(out, want) {
			t.Errorf("ip show %s: %s", addr, out)
		}
	}
	volume := metadata.Volume{Driver: "lariat-nfs", Name: "data", Scope: "global", State: "ready", Users: 2}
	for _, s := range []*service{h1, h2} {
		if err := (metadata.Client{Socket: s.socket}).PutVolume(t.Context(), volume); err != nil {
			t.Fatal(err)
		}
	}
	if out := h1.must(t, "volume", "list", "--host", "h2", "--output", "table"); !strings.Contains(out,
		"data    lariat-nfs  global  h2    ready      2  -") || strings.Contains(out, "h1") {
		t.Error(out)
	}
	var volumes []metadata.Volume
	if err := json.Unmarshal([]byte(h1.must(t, "volume", "list", "-o", "json")), &volumes); err != nil ||
		len(volumes) != 2 || volumes[1].Host != "h2" {
		t.Errorf("%v %+v", err, volumes)
	}
	if out := h1.must(t, "volume", "list", "--driver", "lariat-ebs"); strings.Contains(out, "data") {
		t.Error(out)
	}
	h1.refused(t, "there is no host h9", "volume", "list", "--host", "h9")
	gateways := metadata.Snapshot{}
	if err := json.Unmarshal([]byte(h1.must(t, "status", "--snapshot")), &gateways); err != nil {
		t.Fatal(err)
	}
	if out := h1.must(t, "ip", "show", gateways.Gateways("overlay", "h2")[0].String()); !strings.Contains(out,
		"of host h2") {
		t.Error(out)
	}

	// Status, and the network's details.
	var r statusReport
	if err := json.Unmarshal([]byte(h2.must(t, "status", "-o", "json")), &r); err != nil {
		t.Fatal(err)
	}
	if i := slices.IndexFunc(r.Networks, func(n networkRow) bool { return n.Name == "overlay" }); i < 0 ||
		r.Networks[i].Subnets[0].Used != 2 || r.Networks[i].Subnets[0].Free < 60000 || r.Networks[i].Subnets[0].Blocks != 2 ||
		r.Store != "healthy" || !r.Hosts[1].Self || r.Hosts[0].Containers != 1 {
		t.Errorf("%+v", r)
	}
	if out := h1.must(t, "network", "show", "overlay"); !strings.Contains(out, "vni              1042") ||
		!strings.Contains(out, "addresses for this host") {
		t.Error(out)
	}
	if out := h1.must(t, "host", "show", "h2"); !strings.Contains(out, "192.0.2.2/24") || !strings.Contains(out, "db") {
		t.Error(out)
	}
	if out := h1.must(t, "network", "list"); strings.Count(out, "\n") != 3 {
		t.Error(out)
	}
	if out := h1.must(t, "plan"); !strings.Contains(out, "type vxlan id 1042") || !strings.Contains(out, "nhid") {
		t.Error(out)
	}
	if out := h1.must(t, "plan", "--host", "h2"); !strings.Contains(out, "local 192.0.2.2") {
		t.Error(out)
	}
	if out := h1.must(t, "graph"); !strings.Contains(out, "2 hosts, 2 networks, 2 containers") {
		t.Error(out)
	}

	// Completion asks the service.
	for args, want := range map[string]string{
		"network show":           "backend\t10.43.0.0/16 fd43::/48\noverlay\t10.42.0.0/16\n",
		"host show":              "h1\t192.0.2.1\nh2\t192.0.2.2\n",
		"ip show":                web.String() + "\tweb\n",
		"ip list --network":      "backend\t",
		"plan --host":            "h1\t",
		"network delete":         "backend\t",
		"host remove":            "h1\t",
		"network create":         ":4",
		"ip release --network":   "backend\t",
		"network show overlay x": ":4",
	} {
		out, _, _ := lariat(t, append(append([]string{"__complete", "--socket", h1.socket}, strings.Fields(args)...), "")...)
		if !strings.Contains(out, want) {
			t.Errorf("completion of %s: %q", args, out)
		}
	}

	// Refusals, then release and deletion.
	h1.refused(t, "network overlay is in use by 2 addresses: "+web.String()+" by c0ffee000000/eth0 on h1", "network",
		"delete", "overlay")
	h1.refused(t, "run this on h2", "network", "delete", "overlay", "--force")
	h1.refused(t, "run this on h2", "ip", "release", db.String(), "--yes")
	h1.refused(t, "Say --yes", "ip", "release", web.String())
	h1.refused(t, "is not in use", "ip", "release", "10.42.99.99", "--yes")
	h1.refused(t, "want an address, or a container", "ip", "release", "web", "--yes")
	h1.refused(t, "host h2 is live", "host", "remove", "h2")
	h1.must(t, "ip", "release", "c0ffee/eth0", "--yes")
	h2.must(t, "ip", "release", db.String(), "--yes")
	if out := h1.must(t, "ip", "list", "-o", "json"); strings.TrimSpace(out) != "[]" {
		t.Error(out)
	}
	h1.refused(t, "Delete network backend, 10.43.0.0/16 fd43::/48, vxlan, vni 1043", "network", "delete", "backend")
	h1.refused(t, "Say --yes", "network", "delete", "backend")
	h1.must(t, "network", "delete", "backend", "--yes")
	h1.attach(t, "feed", "late")
	h1.refused(t, "and release 1 address", "network", "delete", "overlay", "--force")
	h1.must(t, "network", "delete", "overlay", "--force", "--yes")
	h2.await(t, func(v *metadata.Snapshot) bool { return len(v.Networks) == 0 })
	if out := h2.must(t, "network", "list", "-o", "json"); strings.TrimSpace(out) != "[]" {
		t.Error(out)
	}

	// A host that is gone.
	h2.stop()
	h1.await(t, func(v *metadata.Snapshot) bool { h, _ := v.Host("h2"); return !h.Live })
	if out := h1.must(t, "status"); !strings.Contains(out, "host h2 does not answer") || !strings.Contains(out,
		"remedy: on h2: systemctl status lariat-metadata") || !strings.Contains(out, "2 hosts (1 live)") {
		t.Error(out)
	}
	h1.must(t, "host", "remove", "h2")
	if out := h1.must(t, "host", "list", "-o", "json"); strings.Contains(out, `"h2"`) {
		t.Error(out)
	}

	// The service dies: what is left says so.
	_ = h1.cmd.Process.Kill()
	<-h1.done
	h1.refused(t, "the metadata service has died: nobody answers on its socket "+h1.socket, "network", "list")
}

// Every example of every --help works against a real service, in the order in which one would try them.
func TestExamplesWithRealService(t *testing.T) {
	ns := netnstest.New(t)
	netnstest.Veth(t, ns, "198.51.100.1/24", ns, "")
	s := serve(t, ns, metadataBinary(t), "h1", "198.51.100.1/24")
	dir := t.TempDir()
	if err := os.CopyFS(filepath.Join(dir, "testdata"), os.DirFS("testdata")); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	var create, other, release, remove []string
	every((&app{}).root(), func(c *cobra.Command) {
		for line := range strings.Lines(c.Example) {
			line = strings.TrimSpace(line)
			switch {
			case !strings.HasPrefix(line, "lariat ") || c.HasSubCommands() || strings.HasPrefix(line, "lariat certs") ||
				strings.Contains(line, "--diff"):
			case strings.HasPrefix(line, "lariat doctor"): // it judges this very machine
			case strings.Contains(line, "network create"):
				create = append(create, line)
			case strings.Contains(line, "ip release"):
				release = append(release, line)
			case strings.Contains(line, "network delete"), strings.Contains(line, "host remove"):
				remove = append(remove, line)
			default:
				other = append(other, line)
			}
		}
	})
	manager := newFakeManager(t, fixtureReport(t))
	secrets := secretFile(t, oldSecret)
	if err := os.WriteFile("new.secret", []byte(newSecret), 0o600); err != nil {
		t.Fatal(err)
	}
	client := metadata.Client{Socket: s.socket}
	attach := func(id, addr string) {
		req := metadata.AttachRequest{ContainerID: id, IfName: "eth0"}
		if addr != "" {
			req.Requested = []netip.Addr{netip.MustParseAddr(addr)}
		}
		if _, err := client.Attach(t.Context(), "overlay", req); err != nil {
			t.Fatal(err)
		}
	}
	do := func(lines []string) {
		for _, line := range lines {
			line, _, _ = strings.Cut(line, "|")
			line, _, _ = strings.Cut(line, ">")
			args := strings.Fields(line)[1:]
			if args[0] == "ipsec" {
				args = append(args, "--manager-socket", manager.socket)
			}
			if slices.Contains(args, "rotate") {
				args = append(args, "--secret-file", secrets)
			}
			if i := slices.Index(args, "--out"); i > 0 {
				args[i+1] = filepath.Join(t.TempDir(), "out")
			}
			if out, errs, status := s.lariat(t, args...); status != 0 && !strings.Contains(errs, "there are: h1") &&
				!strings.Contains(errs, "there is no network") && !strings.Contains(errs, "Say --yes") && !strings.Contains(errs,
				"is in use by") && !strings.Contains(errs, "nothing is wrong with an entry") {
				t.Errorf("%s: status %d: %s%s", line, status, out, errs)
			}
		}
	}
	do(create)
	attach("c0ffee123456aaaa", "")
	attach("beef", "10.42.0.5")
	do(other)
	do(release)
	do(remove)
	if len(create) < 3 || len(other) < 15 || len(release) != 2 || len(remove) != 3 {
		t.Errorf("examples found: %d, %d, %d, %d", len(create), len(other), len(release), len(remove))
	}
}
