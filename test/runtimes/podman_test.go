package runtimes

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lariat-net/lariat/test/busybox"
)

// podman is Podman 4 with its CNI back end, with a storage of its own on one host.
type podman struct {
	*host
	flags []string
	env   []string
}

// podmanConfig asks for runc, because crun refuses hybrid cgroups, and for limits that an unprivileged
// bounding set allows.
const podmanConfig = `[containers]
cgroups = "enabled"
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
log_driver = "k8s-file"
apparmor_profile = "unconfined"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
runtime = "runc"
[network]
network_backend = "cni"
cni_plugin_dirs = [%q]
network_config_dir = %q
`

func newPodman(t *testing.T, h *host) *podman {
	t.Helper()
	dir := filepath.Join(h.dir, "pm")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	conf, policy, tar := filepath.Join(dir, "containers.conf"), filepath.Join(dir, "policy.json"),
		filepath.Join(dir, "image.tar")
	if err := os.WriteFile(conf, fmt.Appendf(nil, podmanConfig, h.bin, h.conf), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(policy, []byte(`{"default":[{"type":"insecureAcceptAnything"}]}`), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := busybox.WriteImage(tar, imageName, imageTag, static(t), []string{"/bin/sleep", "1000000"}); err != nil {
		t.Fatal(err)
	}
	driver := "vfs"
	if snapshotter(t, dir) == "overlayfs" {
		driver = "overlay"
	}
	p := &podman{host: h,
		flags: []string{"--root", filepath.Join(dir, "root"), "--runroot", filepath.Join(dir, "run"), "--tmpdir",
			filepath.Join(dir, "tmp"), "--storage-driver", driver},
		env: []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "CONTAINERS_CONF=" + conf, "TMPDIR=" + dir},
	}
	p.must(t, "load", "--signature-policy", policy, "-q", "-i", tar)
	return p
}

func (p *podman) do(args ...string) (string, error) {
	cmd := p.command("podman", append(p.flags[:len(p.flags):len(p.flags)], args...)...)
	cmd.Env = p.env
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("podman %s: %w: %s\n%s", strings.Join(args, " "), err, tail([]byte(stderr.String()), 2000),
			p.pluginErrors())
	}
	return strings.TrimSpace(string(out)), nil
}

func (p *podman) must(t *testing.T, args ...string) string {
	t.Helper()
	out, err := p.do(args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestPodman takes containers on two hosts through their life on a network of ours.
func TestPodman(t *testing.T) {
	need(t, "root", "podman", "conmon", "runc", "ip", "nsenter")
	need(t, debianPlugins...)
	static(t)
	ha, hb := cluster(t)
	ha.conflist()
	hb.conflist()
	a, b := newPodman(t, ha), newPodman(t, hb)
	if backend := a.must(t, "info", "-f", "{{.Host.NetworkBackend}}"); backend != "cni" {
		t.Skipf("this Podman speaks %s, not CNI", backend)
	}
	addresses := map[*podman][]string{}
	for name, p := range map[string]*podman{"ca": a, "cb": b} {
		p.must(t, "run", "-d", "--name", name, "--network", networkName, image)
		out := p.must(t, "inspect", "-f", `{{range .NetworkSettings.Networks}}{{.IPAddress}} {{.GlobalIPv6Address}}{{end}}`,
			name)
		addresses[p] = strings.Fields(out)
		if len(addresses[p]) != 2 || !strings.HasPrefix(addresses[p][0], "10.42.") ||
			!strings.HasPrefix(addresses[p][1], "fd42:") {
			t.Errorf("%s has %v", name, addresses[p])
		}
	}
	for _, dir := range []struct {
		from, to *podman
		name     string
	}{{a, b, "ca"}, {b, a, "cb"}} {
		for _, address := range addresses[dir.to] {
			eventually(t, dir.name+" pings "+address, func() error {
				_, err := dir.from.do("exec", dir.name, "ping", "-c", "1", "-W", "1", address)
				return err
			})
		}
	}
	a.must(t, "rm", "-f", "-t", "0", "ca")
	b.must(t, "rm", "-f", "-t", "0", "cb")
	wantClean(t, ha, hb)
}
