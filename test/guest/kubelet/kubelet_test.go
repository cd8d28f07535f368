package kubelet_test

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/lariat-net/lariat/pkg/volume/mounts"
)

// each runs a test with each driver.
func each(t *testing.T, test func(t *testing.T, n *node, d driver)) {
	n := onNode(t)
	for _, d := range drivers {
		t.Run(d.name, func(t *testing.T) {
			test(t, n, d)
			eventually(t, d.idle)
		})
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

// F156: a pod writes as an ordinary user into its volume, by fsGroup; when it is gone, so is the mount. Another one then finds what it wrote, and cannot change it.
func TestF156UpAndDown(t *testing.T) {
	each(t, func(t *testing.T, _ *node, d driver) {
		volume := d.volume("up")
		writer := pod{name: "writer-" + d.name, driver: d.name, options: volume, fsGroup: 1234, script: "echo from the pod >/data/file && echo written"}
		writer.up(t)
		writer.says(t, "written")
		if m := mounted(t, writer); m.Source != d.source("up") || m.ReadOnly() {
			t.Errorf("mounted: %+v", m)
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
		must(t, d.idle())

		reader := pod{name: "reader-" + d.name, driver: d.name, options: volume, readOnly: true, script: "cat /data/file; echo x >/data/other || echo not written"}
		reader.up(t)
		reader.says(t, "not written")
		reader.says(t, "from the pod")
		reader.says(t, "Read-only file system")
		if m := mounted(t, reader); !m.ReadOnly() {
			t.Errorf("mounted: %+v", m)
		}
		reader.down(t)
	})
}

// F156: kubelet is killed while a pod runs. It is started again, or only after the pod was taken away: then it finds the volume by
// its folder, and calls the driver without options.
func TestF156KubeletKilled(t *testing.T) {
	each(t, func(t *testing.T, n *node, d driver) {
		for _, away := range []string{"stays", "leaves"} {
			p := pod{name: away + "-" + d.name, driver: d.name, options: d.volume("killed"), fsGroup: 1234, script: "echo x >/data/file && echo written"}
			p.up(t)
			p.says(t, "written")
			before := mounted(t, p)
			n.kill()
			if away == "leaves" {
				must(t, os.Remove(p.file()))
			}
			if m := mounted(t, p); m != before {
				t.Errorf("without kubelet: %+v", m)
			}
			must(t, n.start())
			if away == "leaves" {
				p.gone(t)
			} else {
				p.down(t)
			}
			must(t, d.idle())
		}
	})
}

// F156: what the driver says of a wrong option is what kubelet tells of the pod. Nothing is mounted, and the pod can go.
func TestF156WrongOption(t *testing.T) {
	each(t, func(t *testing.T, _ *node, d driver) {
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
				if strings.Contains(line, p.name) && strings.Contains(line, d.words) {
					t.Log(line)
					return nil
				}
			}
			return fmt.Errorf("kubelet does not say %s", d.words)
		})
		p.down(t)
	})
}
