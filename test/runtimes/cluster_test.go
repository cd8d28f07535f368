package runtimes

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
)

// networkName of the network under test.
const networkName = "overlay"

// debianPlugins are reference plugins as Debian has them. The list names one, and containerd calls the other for
// every sandbox.
var debianPlugins = []string{"/usr/lib/cni/portmap", "/usr/lib/cni/loopback"}

// patience bounds every wait. It is long because CI machines are busy, and nothing waits longer than it must.
const patience = 60 * time.Second

// host is a network namespace that plays a machine.
type host struct {
	t        *testing.T
	name     string
	netns    string
	underlay string // address
	dir      string
	env      []string // of daemons, beside PATH and HOME
	bin      string   // CNI executables
	conf     string   // CNI configurations
	state    string   // Lariat's journal
	socket   string   // of lariat-metadata
	calls    string   // log of the CNI calls, one line each
}

// daemon is a process that the test started and ends.
type daemon struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{}
}

// cluster makes two hosts joined by a wire, with metadata and network manager on each, and the network. Everything is
// removed when the test ends.
//
//	a 192.0.2.1 ── veth ── 192.0.2.2 b
func cluster(t *testing.T) (a, b *host) {
	t.Helper()
	bin := directory(t, "LARIAT_BIN", "../../bin")
	for _, program := range []string{"lariat-vxlan", "lariat-ipam", "lariat-metadata", "lariat-network-manager"} {
		if _, err := os.Stat(filepath.Join(bin, program)); err != nil {
			t.Skipf("%v; run `make build`", err)
		}
	}
	root, err := os.MkdirTemp(os.Getenv(workDir), "")
	if err != nil {
		t.Fatal(err)
	}
	hosts := make([]*host, 2)
	for i := range hosts {
		h := &host{t: t, name: string(rune('a' + i)), underlay: fmt.Sprintf("192.0.2.%d", i+1)}
		h.dir = filepath.Join(root, h.name)
		h.bin, h.conf, h.state = filepath.Join(h.dir, "bin"), filepath.Join(h.dir, "net.d"), filepath.Join(h.dir, "lariat")
		h.socket, h.calls = filepath.Join(h.dir, "metadata.sock"), filepath.Join(h.dir, "calls")
		h.netns = "/run/netns/host-" + h.name
		for _, d := range []string{h.bin, h.conf, h.state} {
			if err := os.MkdirAll(d, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		run(t, "ip", "netns", "add", "host-"+h.name)
		t.Cleanup(func() { run(t, "ip", "netns", "del", "host-"+h.name) })
		hosts[i] = h
	}
	a, b = hosts[0], hosts[1]
	run(t, "ip", "link", "add", "up0", "netns", "host-a", "type", "veth", "peer", "name", "up0", "netns", "host-b")
	for _, h := range hosts {
		for _, args := range []string{"link set lo up", "address add " + h.underlay + "/24 dev up0", "link set up0 up",
			"route add default dev up0"} {
			run(t, "ip", append([]string{"-n", "host-" + h.name}, strings.Fields(args)...)...)
		}
		if err := os.WriteFile(filepath.Join(h.dir, "machine-id"), fmt.Appendf(nil, "%032d\n", h.underlay[len(h.underlay)-1]),
			0o644); err != nil {
			t.Fatal(err)
		}
	}
	startLariat(t, bin, a, b)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	network := metadata.Network{Name: networkName, Subnets: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"),
		netip.MustParsePrefix("fd42::/64")},
		Encapsulation: metadata.EncapVXLAN, VNI: metadata.DefaultVNI, HostNAT: true}
	if err := a.client().Put(ctx, metadata.KindNetwork, networkName, network); err != nil {
		t.Fatalf("define the network: %v", err)
	}
	for _, h := range hosts {
		eventually(t, "network known on host "+h.name, func() error {
			_, err := h.client().Status(ctx, networkName)
			return err
		})
		for _, program := range []string{"lariat-vxlan", "lariat-ipam"} {
			h.installRecording(filepath.Join(bin, program))
		}
		for _, program := range debianPlugins {
			if err := os.Symlink(program, filepath.Join(h.bin, filepath.Base(program))); err != nil {
				t.Fatal(err)
			}
		}
	}
	return a, b
}

// directory of executables, named by the environment as make does, or the default of this source tree.
func directory(t *testing.T, variable, def string) string {
	t.Helper()
	dir := os.Getenv(variable)
	if dir == "" {
		dir = def
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func (h *host) client() metadata.Client { return metadata.Client{Socket: h.socket} }

// installRecording puts an executable among the host's CNI plugins behind a wrapper that notes each call and
// how it ended: what a runtime really sends is part of what these tests show.
func (h *host) installRecording(program string) {
	h.t.Helper()
	script := fmt.Sprintf(`#!/bin/sh
conf=$(cat)
answer=$(printf '%%s' "$conf" | %s 2>>%s.err)
code=$?
[ "$CNI_COMMAND" = VERSION ] || echo "$CNI_COMMAND container=$CNI_CONTAINERID netns=$CNI_NETNS if=$CNI_IFNAME exit=$code" >> %s
[ $code = 0 ] || printf '%%s\n' "$answer" >> %s.err
printf '%%s' "$answer"
exit $code
`, program, h.calls, h.calls, h.calls)
	if err := os.WriteFile(filepath.Join(h.bin, filepath.Base(program)), []byte(script), 0o755); err != nil {
		h.t.Fatal(err)
	}
}

// callsOf returns the recorded calls of a verb.
func (h *host) callsOf(verb string) (out []string) {
	data, err := os.ReadFile(h.calls)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		h.t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if strings.HasPrefix(line, verb+" ") {
			out = append(out, strings.TrimSpace(line))
		}
	}
	return out
}

// conflist installs the list that is shipped. The hosts of these tests share the machine's files, so the plugin is
// told where its host's sockets are; the rest stays as it is.
func (h *host) conflist() {
	h.t.Helper()
	const name = "10-lariat.conflist"
	data, err := os.ReadFile(filepath.Join("../../examples/cni", name))
	if err != nil {
		h.t.Fatal(err)
	}
	var list map[string]any
	if err := json.Unmarshal(data, &list); err != nil {
		h.t.Fatal(err)
	}
	plugin := list["plugins"].([]any)[0].(map[string]any)
	plugin["socket"], plugin["managerSocket"], plugin["stateDir"] = h.socket, filepath.Join(h.dir, "manager.sock"), h.state
	if data, err = json.Marshal(list); err != nil {
		h.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(h.conf, name), data, 0o644); err != nil {
		h.t.Fatal(err)
	}
}

// command runs in the host's network namespace and, unlike under "ip netns exec", with all mounts, of which
// runtimes need /sys/fs/cgroup.
func (h *host) command(name string, args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--net=" + h.netns, name}, args...)...)
}

// start starts a daemon. It is ended with the test if nothing ended it before.
func (h *host) start(label, name string, args ...string) *daemon {
	h.t.Helper()
	d := &daemon{cmd: h.command(name, args...), log: filepath.Join(h.dir, label+".log"), done: make(chan struct{})}
	out, err := os.OpenFile(d.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		h.t.Fatal(err)
	}
	d.cmd.Stdout, d.cmd.Stderr = out, out
	// Proxies and clouds of the machine are none of the daemons' business.
	d.cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + h.dir}, h.env...)
	if err := d.cmd.Start(); err != nil {
		h.t.Fatalf("start %s: %v", label, err)
	}
	out.Close()
	go func() { d.cmd.Wait(); close(d.done) }()
	h.t.Cleanup(func() {
		d.stop(syscall.SIGTERM)
		if h.t.Failed() {
			data, _ := os.ReadFile(d.log)
			h.t.Logf("last words of %s on host %s:\n%s", label, h.name, tail(data, 4000))
		}
	})
	return d
}

// stop ends the daemon, at last by SIGKILL, and waits for it.
func (d *daemon) stop(sig syscall.Signal) {
	d.cmd.Process.Signal(sig)
	select {
	case <-d.done:
	case <-time.After(15 * time.Second):
		d.cmd.Process.Kill()
		<-d.done
	}
}

// leftovers lists what the host still holds of containers: links, journal files, addresses. Empty is what we want.
func (h *host) leftovers() (out []string) {
	h.t.Helper()
	for line := range strings.Lines(run(h.t, "ip", "-n", "host-"+h.name, "-o", "link", "show")) {
		if strings.Contains(line, ": lrt") {
			out = append(out, "link "+strings.TrimSpace(line))
		}
	}
	err := filepath.WalkDir(filepath.Join(h.state, "attachments"), func(path string, d fs.DirEntry, err error) error {
		// The journal's locks are a fixed few files and stay.
		if err == nil && d.Type().IsRegular() && !strings.HasPrefix(d.Name(), ".lock") {
			out = append(out, "file "+path)
		}
		return nil
	})
	if err != nil {
		h.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	list, err := h.client().Allocations(ctx, networkName, true)
	if err != nil {
		h.t.Fatalf("allocations: %v", err)
	}
	for _, a := range list {
		out = append(out, fmt.Sprintf("address %s of %s/%s", a.Address, a.ContainerID, a.IfName))
	}
	return out
}

// wantClean fails when something of a container is left on any of the hosts.
func wantClean(t *testing.T, hosts ...*host) {
	t.Helper()
	for _, h := range hosts {
		eventually(t, "nothing left on host "+h.name, func() error {
			if left := h.leftovers(); len(left) > 0 {
				return fmt.Errorf("left: %s", strings.Join(left, "; "))
			}
			return nil
		})
	}
}

// eventually asks again until there is no error, and fails with the last one when patience ends.
func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	deadline, tick := time.NewTimer(patience), time.NewTicker(50*time.Millisecond)
	defer deadline.Stop()
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("%s: %v", what, err)
		}
	}
}

// run runs a command to its end and returns what it printed.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, tail(out, 2000))
	}
	return string(out)
}

// static finds a busybox that needs no libraries.
func static(t *testing.T) string {
	t.Helper()
	need(t, "busybox")
	path, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("ldd", path).CombinedOutput()
	if err == nil && !bytes.Contains(out, []byte("not a dynamic executable")) &&
		!bytes.Contains(out, []byte("statically linked")) {
		t.Skipf("%s is not static; the package is busybox-static", path)
	}
	return path
}

func tail(b []byte, n int) []byte {
	b = bytes.TrimSpace(b)
	return b[max(0, len(b)-n):]
}
