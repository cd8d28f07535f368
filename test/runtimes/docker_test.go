package runtimes

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lariat-net/lariat/test/busybox"
	"github.com/lariat-net/lariat/test/fakeaws"
)

// shellDriver is a FlexVolume driver in twenty lines: a volume is a folder, which is bind-mounted.
const shellDriver = `#!/bin/sh
name() { printf %%s "$1" | sed -n 's/.*"name":"\([^"]*\)".*/\1/p'; }
say() { printf '{"status":"%%s","message":"%%s"}\n' "$1" "$(printf %%s "$2" | tr '\n"' "  ")"; [ "$1" = Success ]; exit; }
base=%[1]s verb=$1
echo "$verb" >>$base.calls
case $verb in
init) echo '{"status":"Success","capabilities":{"attach":false}}' ;;
create) mkdir -p "$base/$(name "$2")" && say Success ;;
delete) rm -rf "$base/$(name "$2")" && say Success ;;
mount) out=$(mount --bind "$base/$(name "$4")" "$2" 2>&1) && say Success; say Failure "$out" ;;
unmount) out=$(umount "$2" 2>&1) && say Success; say Failure "$out" ;;
*) say "Not supported" ;;
esac
`

// dockersContainerd is the configuration of containerd for dockerd.
const dockersContainerd = `version = 2
root = "%[1]s/cd/root"
state = "%[1]s/cd/state"
oom_score = 0
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "%[1]s/c.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "%[1]s/cd/opt"
`

// docker is a dockerd with folders of its own, in the test's namespaces.
type docker struct {
	*host
	daemon *daemon
}

func (d *docker) up(t *testing.T) {
	t.Helper()
	os.Remove(filepath.Join(d.dir, "docker.pid")) // dockerd believes what a killed one left
	d.daemon = d.start("dockerd", "dockerd", "-H", "unix://"+d.dir+"/d.sock", "--data-root", d.dir+"/data", "--exec-root",
		d.dir+"/exec", "--pidfile", d.dir+"/docker.pid",
		"--containerd", d.dir+"/c.sock", "--bridge=none", "--iptables=false", "--ip6tables=false", "--live-restore",
		"--cgroup-parent=/lariat-docker", "--default-ulimit=nofile=1024:1024")
	eventually(t, "dockerd", func() error {
		select {
		case <-d.daemon.done:
			data, _ := os.ReadFile(d.daemon.log)
			t.Fatalf("dockerd ended:\n%s", tail(data, 4000))
		default:
		}
		_, err := d.do("version")
		return err
	})
}

func (d *docker) do(args ...string) (string, error) {
	cmd := d.command("docker", args...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + d.dir, "DOCKER_HOST=unix://" + d.dir + "/d.sock"}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("docker %s: %w: %s", strings.Join(args, " "), err, tail(out, 2000))
	}
	return strings.TrimSpace(string(out)), nil
}

func (d *docker) must(t *testing.T, args ...string) string {
	t.Helper()
	out, err := d.do(args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// refused wants a call to fail with all these words.
func (d *docker) refused(t *testing.T, words []string, args ...string) {
	t.Helper()
	_, err := d.do(args...)
	for _, w := range words {
		if err == nil || !strings.Contains(err.Error(), w) {
			t.Errorf("docker %s: %v, want an error with %q", strings.Join(args, " "), err, w)
		}
	}
}

// container starts one with a volume at /data. It lives until it is removed.
func (d *docker) container(t *testing.T, name, vol, script string) {
	t.Helper()
	d.must(t, "run", "-d", "--name", name, "--network", "none", "-v", vol+":/data", image, "sh", "-c", script+
		"; exec sleep 1000000")
}

// storage starts lariat-storage and waits until it answers.
func (d *docker) storage(t *testing.T, args ...string) *daemon {
	t.Helper()
	p := d.start("lariat-storage", filepath.Join(directory(t, "LARIAT_BIN", "../../bin"), "lariat-storage"), args...)
	socket := "/run/docker/plugins/lariat-" + filepath.Base(args[1]) + ".sock"
	eventually(t, socket, func() error {
		_, err := os.Stat(socket) // it appears when it is served
		return err
	})
	return p
}

// secretsStay is F160 for Docker: a driver has AWS's keys in its environment, and they are neither in the
// arguments of any process, nor in logs, nor in the journal, nor in what Docker knows of a volume, be it made
// or refused.
func secretsStay(t *testing.T, d *docker) {
	t.Helper()
	cloud := fakeaws.New(t, fakeaws.Options{})
	d.env = cloud.Env(cloud.AddInstance(fakeaws.Instance{}).ID)
	d.storage(t, "--driver", "ebs", "--state-dir", d.dir+"/state", "--log-level", "debug")
	cloud.Fail("CreateVolume", "UnauthorizedOperation", 1)
	d.refused(t, []string{"ec2:CreateVolume", "UnauthorizedOperation"}, "volume", "create", "--driver", "lariat-ebs",
		"--opt", "size=1", "secretive")
	d.must(t, "volume", "create", "--driver", "lariat-ebs", "--opt", "size=1", "--opt", "onRemove=purge", "secretive")
	seen := map[string]string{"docker volume inspect": d.must(t, "volume", "inspect", "secretive")}
	cmdlines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range cmdlines {
		data, _ := os.ReadFile(f) // gone meanwhile
		seen[f] = string(data)
	}
	err := filepath.WalkDir(d.dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() || !strings.HasPrefix(path, d.dir+"/state/") && filepath.Ext(path) != ".log" {
			return nil // containers' files come and go
		}
		data, err := os.ReadFile(path)
		seen[path] = string(data)
		return err
	})
	if err != nil {
		t.Error(err)
	}
	if len(cmdlines) == 0 || !strings.Contains(seen[d.dir+"/state/lariat-ebs/volumes/secretive.json"], "size") ||
		!strings.Contains(seen[d.dir+"/lariat-storage.log"], "secretive") {
		t.Error("the search does not see the processes, the journal or the log")
	}
	d.must(t, "volume", "rm", "secretive")
	if all := cloud.Volumes(); len(all) != 0 {
		t.Errorf("left in EC2: %+v", all)
	}
	for where, text := range seen {
		for _, secret := range []string{fakeaws.AccessKeyID, fakeaws.SecretAccessKey} {
			if strings.Contains(text, secret) {
				t.Errorf("F160: a secret is in %s", where)
			}
		}
	}
}

// TestDockerVolumes: a real dockerd, two containers on one volume, and restarts of lariat-storage and of
// dockerd between.
func TestDockerVolumes(t *testing.T) {
	need(t, "root", "ip", "dockerd", "docker", "containerd", "runc", "busybox")
	if _, err := os.Stat(filepath.Join(directory(t, "LARIAT_BIN", "../../bin"), "lariat-storage")); err != nil {
		t.Skipf("%v; run `make build`", err)
	}
	dir, err := os.MkdirTemp(os.Getenv(workDir), "")
	if err != nil {
		t.Fatal(err)
	}
	d := &docker{host: &host{t: t, name: "docker", netns: "/proc/self/ns/net", dir: dir}}
	run(t, "ip", "link", "set", "lo", "up")
	base, shell, broken := filepath.Join(dir, "volumes"), filepath.Join(dir, "shell"), filepath.Join(dir, "broken")
	for path, text := range map[string]string{shell: fmt.Sprintf(shellDriver, base),
		broken: "#!/bin/sh\necho 'it is Tuesday'\necho 'no such pool' >&2\n"} {
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	flags := []string{"--driver", shell, "--state-dir", dir + "/state", "--log-level", "debug"}
	calls := func(verb string) (n int) {
		data, _ := os.ReadFile(base + ".calls")
		for line := range strings.Lines(string(data)) {
			if strings.TrimSpace(line) == verb {
				n++
			}
		}
		return n
	}
	mounted := func() bool {
		data, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			t.Fatal(err)
		}
		return strings.Contains(string(data), " /run/lariat/storage/lariat-shell/vol ")
	}

	// containerd stands by itself, as Debian's unit has it, so that containers outlive a dockerd that is killed.
	config := filepath.Join(dir, "containerd.toml")
	if err := os.WriteFile(config, fmt.Appendf(nil, dockersContainerd, dir), 0o644); err != nil {
		t.Fatal(err)
	}
	d.start("containerd", "containerd", "-c", config)
	eventually(t, "containerd", func() error {
		_, err := os.Stat(dir + "/c.sock")
		return err
	})

	// F102: dockerd starts without the plugin, and finds it later; with it, it starts as fast.
	d.up(t)
	storage := d.storage(t, flags...)
	d.storage(t, "--driver", broken, "--state-dir", dir+"/state")
	d.storage(t, "--driver", "nfs", "--state-dir", dir+"/state")
	tar := filepath.Join(dir, "image.tar")
	if err := busybox.WriteImage(tar, imageName, imageTag, static(t), []string{"/bin/sleep", "1000000"}); err != nil {
		t.Fatal(err)
	}
	d.must(t, "load", "-q", "-i", tar)

	// F103, F107: create, list, inspect, by a driver that is a shell script.
	for range 2 {
		d.must(t, "volume", "create", "--driver", "lariat-shell", "vol")
	}
	if got := d.must(t, "volume", "ls", "--format", "{{.Driver}} {{.Name}}"); got != "lariat-shell vol" {
		t.Errorf("volume ls: %q", got)
	}
	if got := d.must(t, "volume", "inspect", "--format", "{{.Scope}} {{.Status.state}} {{.Status.users}}",
		"vol"); got != "local ready 0" {
		t.Errorf("volume inspect: %q", got)
	}
	// F107, F110: what the driver says, or mount(8), is what the user reads.
	d.refused(t, []string{"it is Tuesday", "no such pool"}, "volume", "create", "--driver", "lariat-broken", "x")
	d.refused(t, []string{`unknown option "hots", did you mean "host"?`}, "volume", "create", "--driver", "lariat-nfs",
		"--opt", "hots=x", "x")
	d.refused(t, []string{"127.0.0.1:2049", "nfsd"}, "volume", "create", "--driver", "lariat-nfs", "--opt",
		"host=127.0.0.1", "--opt", "exportBase=/x", "x")
	d.must(t, "volume", "create", "--driver", "lariat-shell", "gone")
	if err := os.Remove(base + "/gone"); err != nil {
		t.Fatal(err)
	}
	d.refused(t, []string{"mount: ", base + "/gone does not exist"}, "run", "--rm", "--network", "none", "-v",
		"gone:/data", image, "true")
	d.must(t, "volume", "rm", "gone")

	// F104: two containers, one mount.
	d.container(t, "first", "vol", "echo from the first >/data/file")
	d.container(t, "second", "vol", "true")
	eventually(t, "the file of the first in the second", func() error {
		if got, err := d.do("exec", "second", "cat", "/data/file"); err != nil || got != "from the first" {
			return fmt.Errorf("%q %w", got, err)
		}
		return nil
	})
	if n := calls("mount") - 1; n != 1 || !mounted() { // one was of the volume that had gone
		t.Fatalf("mounted %d times, %v", n, mounted())
	}

	// It uses an id again for this.
	d.must(t, "cp", "second:/data/file", dir+"/copy")

	// The plugin is killed, and a third container comes and goes.
	storage.stop(syscall.SIGKILL)
	storage = d.storage(t, flags...)
	if got := d.must(t, "run", "--rm", "--network", "none", "-v", "vol:/data", image, "cat",
		"/data/file"); got != "from the first" {
		t.Errorf("after a restart of lariat-storage: %q", got)
	}
	// dockerd is killed, and its containers live on. It asks for nothing, and gives back the old ids later.
	d.daemon.stop(syscall.SIGKILL)
	began := time.Now()
	d.up(t)
	t.Logf("dockerd was up again after %s", time.Since(began).Round(time.Millisecond))
	storage.stop(syscall.SIGTERM)
	storage = d.storage(t, flags...)
	if got := d.must(t, "volume", "inspect", "--format", "{{.Status.users}}", "vol"); got != "2" || !mounted() {
		t.Errorf("users after restarts of both: %s, mounted: %v", got, mounted())
	}
	d.refused(t, []string{"in use"}, "volume", "rm", "vol")
	d.must(t, "rm", "-f", "first")
	if got := d.must(t, "exec", "second", "cat", "/data/file"); got != "from the first" || !mounted() {
		t.Errorf("after the end of the first: %q, mounted: %v", got, mounted())
	}
	d.must(t, "rm", "-f", "second")
	if n := calls("unmount"); n != 1 || mounted() {
		t.Errorf("unmounted %d times, mounted: %v", n, mounted())
	}
	d.must(t, "volume", "rm", "vol")
	if left, _ := os.ReadDir(base); len(left) != 0 || d.must(t, "volume", "ls", "-q") != "" {
		t.Errorf("left: %v", left)
	}

	// A dockerd that was killed, and then copied a file by the id of a container from before, forgets to give
	// that back (moby#46508). It does not matter.
	d.must(t, "volume", "create", "--driver", "lariat-shell", "vol")
	d.container(t, "third", "vol", "true")
	d.daemon.stop(syscall.SIGKILL)
	d.up(t)
	if err := os.WriteFile(base+"/vol/file", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	d.must(t, "cp", "third:/data/file", dir+"/copy")
	d.must(t, "rm", "-f", "third")
	d.must(t, "volume", "rm", "vol")
	if left, _ := os.ReadDir(base); len(left) != 0 || mounted() {
		t.Errorf("left: %v, mounted: %v", left, mounted())
	}
	secretsStay(t, d)

	d.daemon.stop(syscall.SIGTERM)
	storage.stop(syscall.SIGTERM)
	if _, err := os.Stat("/run/docker/plugins/lariat-shell.sock"); err == nil {
		t.Error("the socket of lariat-storage outlives it")
	}
}
