package runtimes

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/lariat-net/lariat/test/busybox"
)

const (
	imageName = "localhost/lariat-test"
	imageTag  = "1"
	image     = imageName + ":" + imageTag
)

// containerd is one daemon with a root of its own.
type containerd struct {
	*host
	address string
	config  string
	daemon  *daemon
	conn    *grpc.ClientConn
	pods    cri.RuntimeServiceClient
	image   string // of the containers
}

// containerdConfig is for the 1.6 of Debian 12. No capability to raise limits or lower the OOM score is
// presumed, nor a cgroup version, nor systemd. The runtime "broken" fails after the network has been set up.
const containerdConfig = `version = 2
root = "%[1]s/root"
state = "%[1]s/state"
oom_score = 0
[grpc]
  address = "%[1]s/c.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "%[1]s/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "` + image + `"
  restrict_oom_score_adj = true
  disable_apparmor = true
  disable_tcp_service = true
  stream_server_address = "127.0.0.1"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "%[4]s"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.broken]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.broken.options]
        BinaryName = "/bin/false"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "%[2]s"
    conf_dir = "%[3]s"
`

// newContainerd starts containerd on a host and loads the image.
func newContainerd(t *testing.T, h *host) *containerd {
	t.Helper()
	dir := filepath.Join(h.dir, "cd")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	c := &containerd{host: h, image: image, address: filepath.Join(dir, "c.sock"),
		config: filepath.Join(dir, "config.toml")}
	if err := os.WriteFile(c.config, fmt.Appendf(nil, containerdConfig, dir, h.bin, h.conf, snapshotter(t, dir)),
		0o644); err != nil {
		t.Fatal(err)
	}
	tar := filepath.Join(h.dir, "image.tar")
	if err := busybox.WriteImage(tar, imageName, imageTag, static(t), []string{"/bin/sleep", "1000000"}); err != nil {
		t.Fatal(err)
	}
	c.up(t)
	run(t, "ctr", "-a", c.address, "-n", "k8s.io", "image", "import", tar)
	return c
}

// snapshotter is overlayfs where the file system below can carry it.
func snapshotter(t *testing.T, dir string) string {
	t.Helper()
	d := filepath.Join(dir, "probe")
	for _, sub := range []string{"l", "u", "w", "m"} {
		if err := os.MkdirAll(filepath.Join(d, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	options := fmt.Sprintf("lowerdir=%[1]s/l,upperdir=%[1]s/u,workdir=%[1]s/w", d)
	if err := syscall.Mount("overlay", filepath.Join(d, "m"), "overlay", 0, options); err != nil {
		return "native"
	}
	if err := syscall.Unmount(filepath.Join(d, "m"), 0); err != nil {
		t.Fatal(err)
	}
	return "overlayfs"
}

// up starts the daemon and waits until it says that its network is ready.
func (c *containerd) up(t *testing.T) {
	t.Helper()
	c.daemon = c.start("containerd", "containerd", "-c", c.config)
	conn, err := grpc.NewClient("unix://"+c.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	c.t.Cleanup(func() { conn.Close() }) // with the host, not with the subtest that restarts the daemon
	c.conn, c.pods = conn, cri.NewRuntimeServiceClient(conn)
	eventually(t, "containerd on host "+c.name, func() error {
		select {
		case <-c.daemon.done:
			data, _ := os.ReadFile(c.daemon.log)
			t.Fatalf("containerd ended:\n%s", tail(data, 3000))
		default:
		}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		r, err := c.pods.Status(ctx, &cri.StatusRequest{})
		if err != nil {
			return err
		}
		for _, cond := range r.Status.Conditions {
			if !cond.Status {
				return fmt.Errorf("%s: %s %s", cond.Type, cond.Reason, cond.Message)
			}
		}
		return nil
	})
}

// kill ends the daemon as a crash would. Its containers live on.
func (c *containerd) kill(t *testing.T) {
	t.Helper()
	c.conn.Close()
	c.daemon.stop(syscall.SIGKILL)
}

func sandboxConfig(name string) *cri.PodSandboxConfig {
	return &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: name, Uid: "uid-" + name, Namespace: "default", Attempt: 1},
		Hostname: name, LogDirectory: os.TempDir(), Linux: &cri.LinuxPodSandboxConfig{},
	}
}

// pod is a sandbox with one container in it.
type pod struct {
	c         *containerd
	config    *cri.PodSandboxConfig
	sandbox   string
	container string
	addresses []string
}

// runPod brings up a sandbox and a container that sleeps.
func (c *containerd) runPod(t *testing.T, name string) *pod {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	p := &pod{c: c, config: sandboxConfig(name)}
	sandbox, err := c.pods.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: p.config})
	if err != nil {
		t.Fatalf("run pod %s on host %s: %v\n%s", name, c.name, err, c.pluginErrors())
	}
	p.sandbox = sandbox.PodSandboxId
	status, err := c.pods.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: p.sandbox})
	if err != nil {
		t.Fatal(err)
	}
	p.addresses = append(p.addresses, status.Status.Network.Ip)
	for _, ip := range status.Status.Network.AdditionalIps {
		p.addresses = append(p.addresses, ip.Ip)
	}
	created, err := c.pods.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: p.sandbox,
		SandboxConfig: p.config,
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "main", Attempt: 1}, Image: &cri.ImageSpec{Image: c.image},
			Command: []string{"/bin/sleep", "1000000"}, Linux: &cri.LinuxContainerConfig{},
		}})
	if err != nil {
		t.Fatalf("create container of %s: %v", name, err)
	}
	p.container = created.ContainerId
	if _, err := c.pods.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: p.container}); err != nil {
		t.Fatalf("start container of %s: %v", name, err)
	}
	return p
}

func (h *host) pluginErrors() string {
	data, _ := os.ReadFile(h.calls + ".err")
	return string(tail(data, 3000))
}

// exec runs a command in the pod's container.
func (p *pod) exec(t *testing.T, command ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	r, err := p.c.pods.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: p.container, Cmd: command,
		Timeout: int64(patience / time.Second)})
	if err != nil {
		return "", err
	}
	if r.ExitCode != 0 {
		return "", fmt.Errorf("%s: exit %d: %s%s", strings.Join(command, " "), r.ExitCode, r.Stdout, r.Stderr)
	}
	return string(r.Stdout), nil
}

// pings asks until an answer comes: routes to a new host's block may follow a moment after its first container.
func (p *pod) pings(t *testing.T, addresses ...string) {
	t.Helper()
	for _, a := range addresses {
		eventually(t, fmt.Sprintf("%s pings %s", p.config.Metadata.Name, a), func() error {
			_, err := p.exec(t, "ping", "-c", "1", "-W", "1", a)
			return err
		})
	}
}

// remove stops and removes the pod, as a kubelet does.
func (p *pod) remove(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := p.c.pods.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.sandbox}); err != nil {
		t.Errorf("stop pod %s: %v\n%s", p.config.Metadata.Name, err, p.c.pluginErrors())
	}
	if _, err := p.c.pods.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.sandbox}); err != nil {
		t.Errorf("remove pod %s: %v", p.config.Metadata.Name, err)
	}
}

// TestContainerd takes pods through their life on two hosts: up, reached across hosts, past a crash of the
// daemon, down. Then nothing of them may be left.
func TestContainerd(t *testing.T) {
	need(t, "root", "containerd", "ctr", "runc", "ip", "nsenter")
	need(t, debianPlugins...)
	static(t)
	ha, hb := cluster(t)
	ha.conflist()
	hb.conflist()
	a, b := newContainerd(t, ha), newContainerd(t, hb)

	pa, pb := a.runPod(t, "pa"), b.runPod(t, "pb")
	t.Run("pods have unique addresses of both families", func(t *testing.T) {
		seen := map[string]bool{}
		for _, p := range []*pod{pa, pb} {
			if len(p.addresses) != 2 || !strings.HasPrefix(p.addresses[0], "10.42.") ||
				!strings.HasPrefix(p.addresses[1], "fd42:") {
				t.Errorf("%s has %v", p.config.Metadata.Name, p.addresses)
			}
			for _, ip := range p.addresses {
				if seen[ip] {
					t.Errorf("%s is used twice", ip)
				}
				seen[ip] = true
			}
		}
	})
	t.Run("pods reach each other across hosts", func(t *testing.T) {
		pa.pings(t, pb.addresses...)
		pb.pings(t, pa.addresses...)
	})
	t.Run("pods of one host reach each other", func(t *testing.T) {
		second := a.runPod(t, "pa2")
		second.pings(t, pa.addresses...)
		second.pings(t, pb.addresses...)
		second.remove(t)
	})
	t.Run("a crash of the daemon changes nothing", func(t *testing.T) {
		a.kill(t)
		pb.pings(t, pa.addresses...)
		a.up(t)
		pa.pings(t, pb.addresses...)
	})
	t.Run("a sandbox that fails leaves no address", func(t *testing.T) {
		before := len(a.leftovers())
		for i := range 3 {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			_, err := a.pods.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: sandboxConfig(fmt.Sprintf("broken%d", i)),
				RuntimeHandler: "broken"})
			cancel()
			if err == nil {
				t.Fatal("a runtime that always fails made a sandbox")
			}
		}
		if adds := len(a.callsOf("ADD")); adds < 5 {
			t.Errorf("%d ADDs on host a: the broken sandboxes failed before their network", adds)
		}
		eventually(t, "addresses of broken sandboxes", func() error {
			if left := a.leftovers(); len(left) != before {
				return fmt.Errorf("left, of %d before: %s", before, strings.Join(left, "; "))
			}
			return nil
		})
	})
	t.Run("a namespace that is gone does not stop the removal", func(t *testing.T) {
		p := a.runPod(t, "gone")
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		if _, err := a.pods.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.sandbox}); err != nil {
			t.Fatal(err)
		}
		p.remove(t) // a second DEL, now without a namespace
		empty := 0
		for _, call := range a.callsOf("DEL") {
			if !strings.HasSuffix(call, "exit=0") {
				t.Errorf("failed: %s\n%s", call, a.pluginErrors())
			}
			if strings.Contains(call, "netns= ") {
				empty++
			}
		}
		if empty == 0 {
			t.Errorf("no DEL came with an empty namespace: %q", a.callsOf("DEL"))
		}
	})
	pa.remove(t)
	pb.remove(t)
	wantClean(t, ha, hb)
	for _, h := range []*host{ha, hb} {
		t.Logf("host %s: %d ADD, %d DEL, %d CHECK, %d STATUS, %d GC", h.name, len(h.callsOf("ADD")), len(h.callsOf("DEL")),
			len(h.callsOf("CHECK")), len(h.callsOf("STATUS")), len(h.callsOf("GC")))
	}
}
