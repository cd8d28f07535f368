// Package kubelet_test has a real kubelet mount volumes into pods by the FlexVolume drivers, and unmount
// them.
//
// The guest is a node without a cluster: kubelet, stand-alone, runs the pods that it finds in a folder, in
// the machine's containerd and runc. It is built from its published modules, which takes minutes: `make
// acceptance` does it and names it in LARIAT_KUBELET. Without that the tests skip.
package kubelet_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/volume/mounts"
	"github.com/lariat-net/lariat/test/busybox"
	"github.com/lariat-net/lariat/test/guest"
	"github.com/lariat-net/lariat/test/guest/nfsd"
)

// kubeletVariable names the executable.
const kubeletVariable = "LARIAT_KUBELET"

func TestMain(m *testing.M) {
	if guest.Inside() || os.Getenv(kubeletVariable) == "" {
		os.Exit(m.Run())
	}
	files, err := programs()
	if err != nil {
		fmt.Fprintln(os.Stderr, "test/guest/kubelet:", err)
		os.Exit(1)
	}
	guest.Main(m, guest.Options{Bin: true, Memory: 2048, Files: files})
}

// programs are this machine's that the guest needs: by the name there, the path here.
func programs() (map[string]string, error) {
	files := map[string]string{"programs/kubelet": os.Getenv(kubeletVariable)}
	for _, name := range []string{"containerd", "containerd-shim-runc-v2", "ctr", "runc"} {
		path, err := exec.LookPath(name)
		if err != nil {
			return nil, fmt.Errorf("%w: apt-get install containerd runc", err)
		}
		files["programs/"+name] = path
	}
	for name, path := range files {
		real, err := filepath.EvalSymlinks(path)
		if err != nil {
			return nil, err
		}
		files[name] = real
	}
	return files, nil
}

// Where things are in the guest.
const (
	root      = "/var/lib/kubelet"
	plugins   = "/usr/libexec/kubernetes/kubelet-plugins/volume/exec"
	manifests = "/etc/kubernetes/manifests"
	socket    = "/run/containerd/containerd.sock"
	nodeName  = "node"
	imageName = "localhost/lariat-test"
	image     = imageName + ":1"
)

// patience bounds every wait. The machine is emulated and nothing waits longer than it must.
const patience = 5 * time.Minute

const containerdConfig = `version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "` + image + `"
  disable_apparmor = true
`

// Pods are on the node's own network, so no CNI plugin is needed. 50 MiB of memory and 1 % of disks are enough.
const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
staticPodPath: ` + manifests + `
volumePluginDir: ` + plugins + `
containerRuntimeEndpoint: unix://` + socket + `
enableControllerAttachDetach: false
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
enforceNodeAllocatable: []
failSwapOn: false
makeIPTablesUtilChains: false
resolvConf: ""
evictionHard: {memory.available: 50Mi, nodefs.available: 1%, imagefs.available: 1%}
`

// node is the guest.
type node struct {
	env     []string // of kubelet, and so of the drivers
	kubelet *daemon
}

// daemon is a program that stays up.
type daemon struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it ended
}

// newNode starts containerd and kubelet with the drivers, whose environment is kubelet's. It is one for all
// tests: the emulated machine takes its time.
func newNode(t *testing.T, env []string, drivers []driver) *node {
	t.Helper()
	n := &node{env: append(append(os.Environ(), "PATH="+workDir(t)+"/programs:"+os.Getenv("PATH")), env...)}
	for _, dir := range []string{manifests, "/etc/containerd"} {
		must(t, os.MkdirAll(dir, 0o755))
	}
	must(t, os.WriteFile("/etc/containerd/config.toml", []byte(containerdConfig), 0o644))
	must(t, os.WriteFile("/etc/kubernetes/kubelet.yaml", []byte(kubeletConfig), 0o644))
	// The drivers' logs, too, come out of the guest.
	must(t, os.Symlink(guest.Out(), "/var/log/lariat"))
	for _, d := range drivers {
		install(t, d.name)
	}

	containerd := n.run(t, "containerd")
	ctr := func(args ...string) error {
		cmd := exec.Command(workDir(t)+"/programs/ctr", append([]string{"-n", "k8s.io"}, args...)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("ctr: %w: %s", err, out)
		}
		return nil
	}
	containerd.ready(t, func() error { return ctr("version") })
	tar := filepath.Join(t.TempDir(), "image.tar")
	must(t, busybox.WriteImage(tar, imageName, "1", "/bin/busybox", []string{"/bin/sleep", "1000000"}))
	must(t, ctr("image", "import", tar))
	n.start(t)
	t.Cleanup(func() { n.kill() }) // before what the drivers talk to
	return n
}

// workDir is where guest.Options.Files are.
func workDir(t *testing.T) string {
	t.Helper()
	dir, err := os.Getwd()
	must(t, err)
	return dir
}

// install puts a driver where kubelet finds it, as make install does: under a name with a dot, which kubelet
// ignores, and then whole.
func install(t *testing.T, driver string) {
	t.Helper()
	program, err := os.ReadFile(filepath.Join(os.Getenv("LARIAT_BIN"), driver))
	must(t, err)
	dir := filepath.Join(plugins, "lariat~"+driver)
	must(t, os.MkdirAll(dir, 0o755))
	must(t, os.WriteFile(dir+"/.new", program, 0o755))
	must(t, os.Rename(dir+"/.new", filepath.Join(dir, driver)))
	call(t, nil, driver, "init") // kubelet would only log that it cannot use it
}

// run starts one of the programs. Its log comes out of the guest when a test fails.
func (n *node) run(t *testing.T, name string, args ...string) *daemon {
	t.Helper()
	log, err := os.OpenFile(logOf(name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	must(t, err)
	defer log.Close()
	d := &daemon{cmd: exec.Command(workDir(t)+"/programs/"+name, args...), done: make(chan struct{})}
	d.cmd.Env, d.cmd.Stdout, d.cmd.Stderr = n.env, log, log
	must(t, d.cmd.Start())
	go func() { d.cmd.Wait(); close(d.done) }()
	return d
}

// ready waits until a daemon answers, or has ended.
func (d *daemon) ready(t *testing.T, try func() error) {
	t.Helper()
	eventually(t, func() error {
		select {
		case <-d.done:
			t.Fatalf("%s ended: %s", d.cmd.Path, d.cmd.ProcessState)
		default:
		}
		return try()
	})
}

func logOf(name string) string { return filepath.Join(guest.Out(), name+".log") }

// start starts kubelet and waits until it says that it is well. From level 3 it logs events, which nobody
// else is told of here.
func (n *node) start(t *testing.T) {
	t.Helper()
	n.kubelet = n.run(t, "kubelet", "--config=/etc/kubernetes/kubelet.yaml", "--root-dir="+root, "--hostname-override="+
		nodeName, "--node-ip="+nfsd.Server, "-v=3")
	n.kubelet.ready(t, func() error {
		r, err := http.Get("http://127.0.0.1:10248/healthz")
		if err != nil {
			return err
		}
		defer r.Body.Close()
		if r.StatusCode != http.StatusOK {
			said, _ := io.ReadAll(r.Body)
			return fmt.Errorf("kubelet: %s", said)
		}
		return nil
	})
}

// kill ends kubelet as kill -9 does. Its pods go on.
func (n *node) kill() {
	n.kubelet.cmd.Process.Kill()
	<-n.kubelet.done
}

// pod has one container that runs a script, with one volume at /data.
type pod struct {
	name     string // also its uid
	driver   string
	options  map[string]string
	readOnly bool
	fsGroup  int // 0: none
	script   string
}

// manifest is the pod as kubelet reads it. Its processes are not root's, so that fsGroup means something.
func (p pod) manifest() string {
	type m = map[string]any
	security := m{"runAsUser": 1000, "runAsGroup": 1000}
	if p.fsGroup != 0 {
		security["fsGroup"] = p.fsGroup
	}
	text, err := json.Marshal(m{
		"apiVersion": "v1", "kind": "Pod",
		"metadata": m{"name": p.name, "namespace": "default", "uid": p.name},
		"spec": m{
			"hostNetwork": true, "terminationGracePeriodSeconds": 1, "securityContext": security,
			"containers": []m{{
				"name": "main", "image": image, "imagePullPolicy": "Never",
				"command":      []string{"/bin/sh", "-c", p.script + "\nexec sleep 1000000"},
				"volumeMounts": []m{{"name": volumeName, "mountPath": "/data"}},
			}},
			"volumes": []m{{"name": volumeName, "flexVolume": m{"driver": "lariat/" + p.driver, "readOnly": p.readOnly,
				"options": p.options}}},
		},
	})
	if err != nil {
		panic(err)
	}
	return string(text)
}

// volumeName is what pods call their volume.
const volumeName = "data"

func (p pod) file() string { return filepath.Join(manifests, p.name+".json") }

// dir is kubelet's of the pod, and mount where its volume is mounted.
func (p pod) dir() string { return filepath.Join(root, "pods", p.name) }
func (p pod) mount() string {
	return filepath.Join(p.dir(), "volumes", "lariat~"+p.driver, volumeName)
}

// up gives the pod to kubelet. With the test it ends, whatever happened.
func (p pod) up(t *testing.T) {
	t.Helper()
	must(t, os.WriteFile(manifests+"/.new", []byte(p.manifest()), 0o644))
	must(t, os.Rename(manifests+"/.new", p.file()))
	t.Cleanup(func() { os.Remove(p.file()) })
}

// says waits until the container's log has the words.
func (p pod) says(t *testing.T, words string) {
	t.Helper()
	eventually(t, func() error {
		var said string
		logs, _ := filepath.Glob("/var/log/pods/*_" + p.name + "/main/*.log")
		for _, log := range logs {
			data, err := os.ReadFile(log)
			if err != nil {
				return err
			}
			said += string(data)
		}
		if !strings.Contains(said, words) {
			return fmt.Errorf("pod %s does not say %q but %q", p.name, words, said)
		}
		return nil
	})
}

// down takes the pod away and waits until nothing of it is left on the node.
func (p pod) down(t *testing.T) {
	t.Helper()
	must(t, os.Remove(p.file()))
	p.gone(t)
}

func (p pod) gone(t *testing.T) {
	t.Helper()
	eventually(t, func() error {
		if err := unmounted(p.dir()); err != nil {
			return err
		}
		if _, err := os.Lstat(p.dir()); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%s is still there", p.dir())
		}
		return nil
	})
}

// unmounted returns an error if something is mounted below a folder.
func unmounted(dir string) error {
	table, err := mounts.Read()
	if err != nil {
		return err
	}
	for _, m := range table {
		if strings.HasPrefix(m.Point, dir+"/") {
			return fmt.Errorf("still mounted: %+v", m)
		}
	}
	return nil
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually tries until it succeeds.
func eventually(t *testing.T, try func() error) {
	t.Helper()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for end := time.After(patience); ; {
		err := try()
		if err == nil {
			return
		}
		select {
		case <-end:
			t.Fatalf("after %s: %v", patience, err)
		case <-tick.C:
		}
	}
}
