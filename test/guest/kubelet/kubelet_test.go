package kubelet_test

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/lariat-net/lariat/pkg/volume/mounts"
	"github.com/lariat-net/lariat/test/guest"
)

// F156: kubelet has volumes mounted by each driver, and unmounted.
func TestF156Kubelet(t *testing.T) {
	if !guest.Inside() {
		t.Skip("needs a kubelet, which make acceptance builds")
	}
	cloud, env := aws(t)
	drivers := []driver{nfs(t), efs(t, env), ebs(cloud)}
	n := newNode(t, env, drivers)
	for _, d := range drivers {
		for _, tc := range []struct {
			name string
			test func(*testing.T, *node, driver)
		}{
			{"up and down", upAndDown},
			{"kubelet is killed", kubeletKilled},
			{"wrong option", wrongOption},
		} {
			t.Run(d.name+"/"+tc.name, func(t *testing.T) {
				tc.test(t, n, d)
				eventually(t, func() error { return errors.Join(unmounted(root+"/plugins"), d.idle()) })
			})
		}
	}
}

// mounted is the one mount at a pod's volume.
func mounted(t *testing.T, p pod) mounts.Entry {
	t.Helper()
	table, err := mounts.Read()
	must(t, err)
	stack := table.At(p.mount())
	if len(stack) != 1 {
		t.Fatalf("mounted at %s: %+v", p.mount(), stack)
	}
	return stack[0]
}

// A pod writes as an ordinary user into its volume, by fsGroup; when it is gone, so is the mount. Another one
// then finds what it wrote, and cannot change it.
func upAndDown(t *testing.T, _ *node, d driver) {
	volume := d.volume("up")
	writer := pod{name: "writer-" + d.name, driver: d.name, options: volume, fsGroup: 1234,
		script: "echo from the pod >/data/file && echo written"}
	writer.up(t)
	writer.says(t, "written")
	if m := mounted(t, writer); !strings.HasPrefix(m.Source, d.source("up")) || m.ReadOnly() {
		t.Errorf("mounted: %+v", m)
	}
	if d.idle() == nil {
		t.Error("the driver does not know of it")
	}
	if d.folder != nil {
		file := filepath.Join(d.folder("up"), "file")
		data, err := os.ReadFile(file)
		must(t, err)
		fi, err := os.Stat(file)
		must(t, err)
		if st := fi.Sys().(*syscall.Stat_t); string(data) != "from the pod\n" || st.Uid != 1000 || st.Gid != 1234 {
			t.Errorf("on the server: %q of %d:%d", data, st.Uid, st.Gid)
		}
	}
	writer.down(t)
	eventually(t, d.idle)

	reader := pod{name: "reader-" + d.name, driver: d.name, options: volume, readOnly: true,
		script: "cat /data/file; echo x >/data/other || echo not written"}
	reader.up(t)
	reader.says(t, "not written")
	reader.says(t, "from the pod")
	reader.says(t, "Read-only file system")
	if m := mounted(t, reader); !m.ReadOnly() {
		t.Errorf("mounted: %+v", m)
	}
	reader.down(t)
}

// kubelet is killed while a pod runs, and started again. It goes on with the pod, and lets a second one have
// the volume. It is killed again and comes back when the pod has been taken away: then it finds the volume by
// its folder, and calls the driver without options.
func kubeletKilled(t *testing.T, n *node, d driver) {
	running := pod{name: "first-" + d.name, driver: d.name, options: d.volume("killed"), fsGroup: 1234,
		script: "echo from the first >/data/file && echo written"}
	running.up(t)
	running.says(t, "written")
	before := mounted(t, running)
	n.kill()
	n.start(t)
	// kubelet 1.37 panics over a second pod on a volume that is attached and belongs to no PersistentVolume
	if !d.attaches {
		second := pod{name: "second-" + d.name, driver: d.name, options: d.volume("killed"), fsGroup: 1234,
			script: "cat /data/file"}
		second.up(t)
		second.says(t, "from the first")
		if m := mounted(t, running); m != before {
			t.Errorf("after the restart: %+v, not %+v", m, before)
		}
		running.down(t)
		running, before = second, mounted(t, second)
	}
	n.kill()
	must(t, os.Remove(running.file()))
	if m := mounted(t, running); m != before {
		t.Errorf("without kubelet: %+v, not %+v", m, before)
	}
	n.start(t)
	running.gone(t)
	if d.attaches {
		// After a restart only a node's status in an API server tells kubelet what is attached. In a cluster it is
		// the controller that detaches.
		call(t, n.env, d.name, "detach", volumeName, nodeName)
	}
}

// What the driver says of a wrong option is in the event that kubelet makes of it. Nothing is mounted, and
// the pod can go.
func wrongOption(t *testing.T, _ *node, d driver) {
	options := maps.Clone(d.volume("wrong"))
	options[d.wrong] = "x"
	p := pod{name: "wrong-" + d.name, driver: d.name, options: options, script: "echo started"}
	p.up(t)
	eventually(t, func() error {
		log, err := os.ReadFile(logOf("kubelet"))
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(log)) {
			if strings.Contains(line, p.name) && strings.Contains(line, `reason="Failed`) && strings.Contains(line, d.words) {
				t.Log(line)
				return nil
			}
		}
		return fmt.Errorf("no event of %s has the words %q", p.name, d.words)
	})
	p.down(t)
}
