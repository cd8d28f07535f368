package runtimes

import (
	"context"
	"crypto/sha256"
	_ "embed" // the start of a machine
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/lariat-net/lariat/test/busybox"
	"github.com/lariat-net/lariat/test/debian"
)

// debianVariable in the environment names Debian's releases on which TestThreeHosts runs, by their codenames.
const debianVariable = "LARIAT_DEBIAN"

// debianPackages are what a machine has: a small system, and what docs/three-hosts.md presumes.
var debianPackages = strings.Fields(`base-files base-passwd bash coreutils dash grep sed mawk findutils util-linux mount
	hostname procps tar gzip kmod
	systemd systemd-sysv openssh-server iproute2 iputils-ping iptables nftables busybox-static
	containerd runc podman conmon containernetworking-plugins`)

// debianSetup does what the packages' scripts would do, and suits the system to these tests: it sets nothing of the
// machine's kernel, loads nothing, and needs no capability to lower OOM scores. What containerd and Podman are told
// about networks is left as the packages have it.
const debianSetup = `set -e
: > /dev/null
ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key
sed 's/^UsePAM yes/UsePAM no/' /usr/share/openssh/sshd_config > /etc/ssh/sshd_config
units=/usr/lib/systemd/system
for u in $units/sysinit.target.wants/* $units/multi-user.target.wants/*; do
	case $u in *-journald.service | *-sysusers.service | *-tmpfiles-setup.service) ;; *) rm -f $u ;; esac
done
mkdir -p /etc/systemd/system/multi-user.target.wants
ln -s $units/ssh.service $units/containerd.service /etc/systemd/system/multi-user.target.wants/
ln -sf $units/multi-user.target /etc/systemd/system/default.target
lines='restrict_oom_score_adj = true\ndisable_apparmor = true\nsandbox_image = "docker.io/library/busybox:latest"'
sed -i '/\[plugins."io.containerd.grpc.v1.cri"\]/a '"$lines" /etc/containerd/config.toml
mkdir -p /etc/containers/containers.conf.d
cat > /etc/containers/containers.conf.d/test.conf <<END
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
cgroup_manager = "cgroupfs"
END
`

// debianRoot is where the root directory of a release is, or shall be. Its name changes with what it is made of, but
// not with the versions of packages: remove it to have newer ones.
func debianRoot(codename string) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256([]byte(strings.Join(debianPackages, " ")))
	return filepath.Join(cache, "lariat", "debian", codename+"-"+hex.EncodeToString(sum[:5])), nil
}

// prepareDebian makes the root directory of a release, unless it is there: a download of some 120 MB, and half a
// minute.
func prepareDebian(ctx context.Context, codename string) error {
	root, err := debianRoot(codename)
	if err != nil {
		return err
	}
	if _, err := os.Stat(root); err == nil {
		return nil
	}
	fmt.Println("test/runtimes: fetching packages of Debian", codename)
	if err := os.MkdirAll(filepath.Dir(root), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(root), "making-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	debs, made := filepath.Join(tmp, "debs"), filepath.Join(tmp, "root")
	apt, err := debian.New(filepath.Join(tmp, "apt"), debs, "", codename)
	if err != nil {
		return err
	}
	if err := apt.Update(ctx); err != nil {
		return err
	}
	packages, err := apt.Resolve(ctx, debianPackages, nil)
	if err != nil {
		return err
	}
	if err := apt.Download(ctx, packages, func(int) {}); err != nil {
		return err
	}
	if err := debian.Unpack(ctx, debs, made, packages); err != nil {
		return err
	}
	if err := debian.Furnish(made, "debian", "sshd:x:101:65534::/run/sshd:/usr/sbin/nologin\n", ""); err != nil {
		return err
	}
	if err := os.Rename(made, root); err != nil && !errors.Is(err, fs.ErrExist) { // another process was faster
		return err
	}
	return nil
}

//go:embed boot.sh
var bootScript string

// machine is a Debian with systemd, in namespaces of its own, that root reaches by ssh.
type machine struct {
	*host
	root string
}

const busyboxImage = "docker.io/library/busybox"

// newMachine boots a machine on the bridge that joins all.
func newMachine(t *testing.T, dir, lower, key, name string, address netip.Addr) *machine {
	t.Helper()
	netns := t.Name()[strings.LastIndex(t.Name(), "/")+1:] + "-" + name
	m := &machine{host: &host{t: t, name: name, netns: "/run/netns/" + netns, underlay: address.String()}}
	m.dir = filepath.Join(dir, name)
	m.calls, m.root = filepath.Join(m.dir, "calls"), filepath.Join(m.dir, "root")
	run(t, "ip", "netns", "add", netns)
	t.Cleanup(func() { run(t, "ip", "netns", "del", netns) })
	run(t, "ip", "link", "add", netns, "master", "wire", "type", "veth", "peer", "name", "eth0", "netns", netns)
	run(t, "ip", "link", "set", netns, "up")
	for _, args := range []string{"link set lo up", "address add " + m.underlay + "/24 dev eth0", "link set eth0 up",
		"route add default via 192.0.2.254"} {
		run(t, "ip", append([]string{"-n", netns}, strings.Fields(args)...)...)
	}

	// Everything that the machine writes is in memory.
	mount := func(target, kind, options string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(target, 0o755), unix.Mount("lariat", target, kind, 0, options)); err != nil {
			t.Fatalf("mount %s: %v", target, err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(target, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
	}
	mount(m.dir, "tmpfs", "mode=755")
	for _, d := range []string{"upper", "work"} {
		if err := os.Mkdir(filepath.Join(m.dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	mount(m.root, "overlay", fmt.Sprintf("lowerdir=%s,upperdir=%[2]s/upper,workdir=%[2]s/work", lower, m.dir))
	mount(filepath.Join(m.root, "run"), "tmpfs", "mode=755")
	for _, d := range []string{"var/lib/containerd", "var/lib/containers"} { // an overlay's layers are on no overlay
		mount(filepath.Join(m.root, d), "tmpfs", "mode=755")
	}
	public, err := os.ReadFile(key + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	for file, text := range map[string]string{"etc/hostname": name + "\n", "root/.ssh/authorized_keys": string(public),
		"etc/machine-id": fmt.Sprintf("%032x\n", address.As4())} {
		path := filepath.Join(m.root, file)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Join(m.root, "etc/machine-id"), 0o444); err != nil {
		t.Fatal(err)
	}
	setup := exec.Command("/bin/sh", "-c", debianSetup)
	setup.SysProcAttr = &syscall.SysProcAttr{Chroot: m.root}
	setup.Dir, setup.Env = "/", []string{"PATH=/usr/sbin:/usr/bin"}
	if _, err := debian.Output(setup); err != nil {
		t.Fatal(err)
	}
	err = busybox.WriteImage(filepath.Join(m.root, "root/busybox.tar"), busyboxImage, "latest",
		filepath.Join(lower, "usr/bin/busybox"), []string{"/bin/sleep", "1000000"})
	if err != nil {
		t.Fatal(err)
	}

	m.boot(t)
	return m
}

func (m *machine) boot(t *testing.T) {
	t.Helper()
	cmd := exec.Command("sh", "-c", bootScript, "boot", m.root, m.name, m.netns)
	log := filepath.Join(m.dir, "boot.log")
	out, err := os.Create(log)
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	out.Close()
	done := make(chan struct{})
	go func() { cmd.Wait(); close(done) }()
	t.Cleanup(func() {
		if t.Failed() {
			text, _ := m.do("journalctl --no-pager -b -p info | tail -60")
			t.Logf("last words of %s:\n%s", m.name, text)
		}
		cmd.Process.Kill()
		<-done
	})
	eventually(t, m.name+" is up", func() error {
		select {
		case <-done:
			text, _ := os.ReadFile(log)
			t.Fatalf("%s ended: %s", m.name, tail(text, 2000))
		default:
		}
		if _, err := m.do("systemctl is-active containerd"); err != nil {
			text, _ := os.ReadFile(log)
			return fmt.Errorf("%w\n%s", err, tail(text, 1000))
		}
		return nil
	})
	m.must(t, "ctr image import /root/busybox.tar && ctr -n k8s.io image import /root/busybox.tar && podman load -q "+
		"-i /root/busybox.tar")
}

// do runs a script as root of the machine.
func (m *machine) do(script string) (string, error) {
	cmd := exec.Command("ssh", "-o", "ConnectTimeout=5", "root@"+m.underlay, "sh", "-e")
	cmd.Stdin = strings.NewReader(script)
	return scripted(cmd, m.name, script)
}

func (m *machine) must(t *testing.T, script string) string {
	t.Helper()
	out, err := m.do(script)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func scripted(cmd *exec.Cmd, where, script string) (string, error) {
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("on %s: %w\n%s\n%s%s", where, err, script, tail(out, 2000),
			tail([]byte(stderr.String()), 2000))
	}
	return strings.TrimSpace(string(out)), nil
}

// pageBlock is a block of commands of the page, and where it is to be run.
type pageBlock struct {
	places []string
	about  string
	script string
}

func pageBlocks(t *testing.T, name string, atLeast int) (blocks []pageBlock) {
	t.Helper()
	page, err := os.ReadFile(filepath.Join("../../docs", name))
	if err != nil {
		t.Fatal(err)
	}
	block := regexp.MustCompile("(?s)<!-- on: ([a-z0-9 ]+)(?:, ([a-z]+))? -->\n```sh\n(.*?)```")
	for _, b := range block.FindAllStringSubmatch(string(page), -1) {
		blocks = append(blocks, pageBlock{strings.Fields(b[1]), b[2], b[3]})
	}
	if n := strings.Count(string(page), "```sh"); len(blocks) < atLeast || len(blocks) != n {
		t.Fatalf("%s: %d blocks, of which %d say where they are to be run", name, n, len(blocks))
	}
	return blocks
}

// on is the script for a host: of several hosts a block names the first, and the others use their own name and address.
func (b pageBlock) on(name string) string {
	return strings.ReplaceAll(b.script, "NAME="+b.places[0]+" IP=192.0.2."+b.places[0][1:], "NAME="+name+" IP=192.0.2."+
		name[1:])
}

// admin is the administrator's machine: this one, with a copy of the tree that may be written to.
type admin struct{ tree string }

func newAdmin(t *testing.T, dir, key string) *admin {
	t.Helper()
	tree, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	a := &admin{filepath.Join(dir, "tree")}
	scratch := filepath.Join(dir, "scratch")
	for _, d := range []string{a.tree, scratch} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	mount := func(target, kind, options string) {
		if err := unix.Mount("lariat", target, kind, 0, options); err != nil {
			t.Fatalf("mount %s: %v", target, err)
		}
		t.Cleanup(func() { unix.Unmount(target, unix.MNT_DETACH) })
	}
	mount(scratch, "tmpfs", "")
	if err := errors.Join(os.Mkdir(scratch+"/upper", 0o755), os.Mkdir(scratch+"/work", 0o755)); err != nil {
		t.Fatal(err)
	}
	mount(a.tree, "overlay", fmt.Sprintf("lowerdir=%s,upperdir=%[2]s/upper,workdir=%[2]s/work", tree, scratch))

	run(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
	// ssh's configuration, in this mount namespace.
	config := filepath.Join(dir, "ssh_config")
	text := "IdentityFile " + key + "\nIdentitiesOnly yes\nBatchMode yes\nLogLevel ERROR\n" +
		"StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n"
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	const system = "/etc/ssh/ssh_config"
	if err := unix.Mount(config, system, "", unix.MS_BIND, ""); err != nil {
		t.Fatalf("mount %s: %v", system, err)
	}
	t.Cleanup(func() { unix.Unmount(system, unix.MNT_DETACH) })
	return a
}

// do runs a script with a umask that leaves nothing to others.
func (a *admin) do(script string) (string, error) {
	cmd := exec.Command("sh", "-e", "-c", "umask 077\n"+script)
	// What make acceptance builds before it starts the tests is in bin/. It is not built once more.
	cmd.Dir, cmd.Env = a.tree, append(os.Environ(), "PWD="+a.tree, "GO=true")
	return scripted(cmd, "the administrator's machine", script)
}

// TestThreeHosts runs the commands of docs/three-hosts.md as they stand, on machines of Debian's releases, and connects
// containers.
func TestThreeHosts(t *testing.T) {
	releases := strings.Fields(os.Getenv(debianVariable))
	if len(releases) == 0 {
		t.Skip("needs releases of Debian, which make acceptance names in " + debianVariable)
	}
	need(t, "root", "ip", "nsenter", "unshare", "ssh", "scp", "ssh-keygen", "tar", "make")
	for _, codename := range releases {
		t.Run(codename, func(t *testing.T) { threeHosts(t, codename) })
	}
}

// builder is who owns what was built on the administrator's machine.
const builder = 4711

func threeHosts(t *testing.T, codename string) {
	lower, err := debianRoot(codename)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp(os.Getenv(workDir), "")
	if err != nil {
		t.Fatal(err)
	}
	run(t, "ip", "link", "add", "wire", "type", "bridge")
	t.Cleanup(func() { run(t, "ip", "link", "del", "wire") })
	run(t, "ip", "address", "add", "192.0.2.254/24", "dev", "wire")
	run(t, "ip", "link", "set", "wire", "up")
	key := filepath.Join(dir, "key")
	builds := newAdmin(t, dir, key)
	machines := map[string]*machine{}
	for i, name := range []string{"h1", "h2", "h3"} {
		machines[name] = newMachine(t, dir, lower, key, name, netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)}))
	}
	t.Log(machines["h1"].must(t, "containerd --version; podman --version; runc --version | head -1"))
	const owners = "stat -c '%n %u:%g %a' / /etc /etc/systemd/system /usr /usr/lib /usr/lib/cni /usr/local /usr/local/bin"
	before := machines["h1"].must(t, owners)

	for _, b := range pageBlocks(t, "three-hosts.md", 10) {
		if b.about == "podman" && !strings.Contains(machines["h1"].must(t, "podman --version"), " 4.") {
			// Podman 5 has no CNI. When it has again, the page is to say so.
			_, err := machines["h1"].do(b.on("h1"))
			if err == nil || !strings.Contains(err.Error(), "cni support is not enabled in this build") {
				t.Errorf("the page says that this Podman refuses CNI: %v", err)
			}
			continue
		}
		for _, place := range b.places {
			var out string
			var err error
			if place == "admin" {
				out, err = builds.do(b.script)
			} else {
				out, err = machines[place].do(b.on(place))
			}
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("on %s:\n%s%s", place, b.on(place), out)
			if b.about == "containerd" && !strings.Contains(out, "inet 10.42.") {
				t.Errorf("on %s the container of ctr has no address: %s", place, out)
			}
		}
		switch {
		case strings.Contains(b.script, "make install"):
			// Who builds is not root, as a rule.
			run(t, "chown", "-R", fmt.Sprintf("%d:%[1]d", builder), filepath.Join(builds.tree, "out"))
		case strings.Contains(b.script, "tar -C out"):
			h1 := machines["h1"]
			if after := h1.must(t, owners); after != before {
				t.Errorf("the installation changed\n%s\nto\n%s", before, after)
			}
			if theirs := h1.must(t, fmt.Sprintf("find / -xdev -uid %d -o -xdev -gid %[1]d", builder)); theirs != "" {
				t.Errorf("files of the builder: %s", theirs)
			}
		case strings.Contains(b.script, "lariat status"):
			for name := range machines {
				if !strings.Contains(machines["h1"].must(t, "lariat host list"), name) {
					t.Errorf("%s is not listed", name)
				}
			}
		case b.about == "containerd":
			t.Run("CRI", func(t *testing.T) { criPods(t, machines) })
		case b.about == "podman":
			t.Run("podman", func(t *testing.T) {
				reach(t, machines, "nsenter -t $(podman inspect -f '{{.State.Pid}}' web) -n")
				for _, from := range []string{"h2", "h3"} {
					if out := machines[from].must(t, "timeout 20 busybox wget -q -O - http://192.0.2.1:8080/etc/hosts"); out == "" {
						t.Errorf("h1's published port does not answer %s", from)
					}
				}
				for _, name := range b.places {
					machines[name].must(t, "podman rm -f -t 0 web")
				}
			})
		}
	}
	t.Run("kubernetes", func(t *testing.T) { otherPort(t, machines) })
	for name, m := range machines {
		eventually(t, name+" holds no address any more", func() error {
			if out := m.must(t, "ls /var/lib/lariat/attachments/overlay; ip -o link | grep ': lrt' || true"); out != "" {
				return fmt.Errorf("left: %s", out)
			}
			return nil
		})
	}
}

// otherPort is docs/kubernetes.md: the store moves to another port, because an etcd has its own.
func otherPort(t *testing.T, machines map[string]*machine) {
	h1 := machines["h1"]
	h1.must(t, "systemctl stop lariat-metadata && systemd-run -q --unit etcd busybox httpd -f -p 2379")
	for _, b := range pageBlocks(t, "kubernetes.md", 2) {
		for _, place := range b.places {
			t.Logf("on %s:\n%s%s", place, b.on(place), machines[place].must(t, b.on(place)))
		}
	}
	criPods(t, machines)
	h1.must(t, "systemctl is-active etcd")
}

// reach lets the containers of h1 and h2 ping each other. The command runs another one in the network of a host's
// container.
func reach(t *testing.T, machines map[string]*machine, inside string) {
	t.Helper()
	addresses := map[string]string{}
	for _, name := range []string{"h1", "h2"} {
		out := machines[name].must(t, inside+" ip -4 -o address show dev eth0")
		addresses[name] = regexp.MustCompile(`10\.42\.[0-9]+\.[0-9]+`).FindString(out)
		if addresses[name] == "" || addresses["h1"] == addresses["h2"] {
			t.Fatalf("the container on %s has %s, %v", name, out, addresses)
		}
	}
	for from, to := range map[string]string{"h1": "h2", "h2": "h1"} {
		eventually(t, from+" pings "+addresses[to], func() error {
			_, err := machines[from].do(inside + " ping -c 1 -W 1 " + addresses[to])
			return err
		})
	}
}

// criPods starts pods as a kubelet does, on each machine, and lets each ping the next.
func criPods(t *testing.T, machines map[string]*machine) {
	t.Helper()
	pods := map[string]*pod{}
	for name, m := range machines {
		socket := filepath.Join(m.root, "run/containerd/containerd.sock")
		conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		c := &containerd{host: m.host, conn: conn, pods: cri.NewRuntimeServiceClient(conn), image: busyboxImage + ":latest"}
		pods[name] = c.runPod(t, "pod-"+name)
	}
	names := []string{"h1", "h2", "h3"}
	for i, name := range names {
		pods[name].pings(t, pods[names[(i+1)%3]].addresses...)
	}
	for _, p := range pods {
		p.remove(t)
	}
}
