// Package ebs_test runs the EBS driver as kubelet and its controller do: the real SDK against an emulator of
// EC2 and IMDSv2, which makes attached volumes real NVMe drives of this machine.
package ebs_test

import (
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/ebs"
	"github.com/lariat-net/lariat/pkg/volume/flex"
	"github.com/lariat-net/lariat/test/fakeaws"
	"github.com/lariat-net/lariat/test/flextest"
	"github.com/lariat-net/lariat/test/guest"
)

var driver = flextest.Driver{Name: "ebs", Programs: []string{"blkid", "mkfs", "e2fsck"},
	New: func(log *slog.Logger) (volume.Driver, error) {
		c, err := ebs.FromEnvironment(os.Getenv)
		return ebs.New(c, log), err
	}}

func TestMain(m *testing.M) { driver.Main(m, guest.Options{Bin: true, Memory: 1024}) }

// Short names for what all tests say.
var options, at, nothingAt, must, sh = flextest.Options, flextest.At, flextest.NothingAt, flextest.Must, flextest.Sh

const (
	self  = "i-00000000000000001"
	other = "i-00000000000000002"
)

// lab is a cloud of two instances, both of which are this machine, and the driver in its first.
type lab struct {
	*fakeaws.Cloud
	flextest.Driver
	drives    *fakeaws.Nvmet
	inProcess volume.Driver // see enter
}

// newLab has a cloud whose answers lag behind as many times.
func newLab(t *testing.T, lag int) *lab {
	t.Helper()
	l := &lab{Driver: driver, drives: fakeaws.NewNvmet(t, t.TempDir())}
	l.Cloud = fakeaws.New(t, fakeaws.Options{Lag: lag, Devices: l.drives})
	l.AddInstance(fakeaws.Instance{ID: self, Nitro: true, Zone: "eu-test-1a"})
	l.AddInstance(fakeaws.Instance{ID: other, Nitro: true, Zone: "eu-test-1a", PrivateDNSName: "node-2.internal"})
	l.Driver.Env = l.Cloud.Env(self)
	t.Cleanup(func() {
		l.NoProcesses(t)
		if t.Failed() {
			log, _ := os.ReadFile(l.LogFile())
			t.Logf("the driver's log:\n%s", log)
		}
		os.Remove(l.LogFile())
		os.RemoveAll(l.StateDir())
	})
	return l
}

// enter is for tests of many calls: do has no process for each.
func (l *lab) enter(t *testing.T) {
	t.Helper()
	for _, e := range l.Driver.Env {
		name, value, _ := strings.Cut(e, "=")
		t.Setenv(name, value)
	}
	l.inProcess = ebs.New(ebs.Config{}, slog.New(slog.DiscardHandler))
}

// do is a call that must fail with words, or succeed if there are none.
func (l *lab) do(t *testing.T, words string, args ...string) {
	t.Helper()
	c, err := flex.Parse(args)
	if err == nil {
		_, err = flex.Do(t.Context(), l.inProcess, c)
	}
	if words == "" && err != nil || words != "" && (err == nil || !strings.Contains(err.Error(), words)) {
		t.Errorf("%v:\ngot  %v\nwant words %s", args, err, words)
	}
}

// volume is the only one in the cloud.
func (l *lab) volume(t *testing.T) fakeaws.Volume {
	t.Helper()
	all := l.Volumes()
	if len(all) != 1 {
		t.Fatalf("%d volumes: %+v", len(all), all)
	}
	return all[0]
}

// F106, F157: the whole life of a volume as kubelet and its controller play it: create, attach, wait, one
// mkfs, mount for the node and for a pod, detach and attach again under another device name, expand, delete.
func TestF157Life(t *testing.T) {
	l := newLab(t, 1)
	global, pod := l.Place(t, "global"), l.Place(t, "pod")
	j := options("kubernetes.io/pvOrVolumeName", "data", "size", "1", "onRemove", "purge", "tags", "team=blue")
	r := l.OK(t, "create", j)
	if v := l.volume(t); r.Options["created"] != "true" || v.Size != 1 || v.Type != "gp3" || v.Zone != "eu-test-1a" ||
		v.Tags["lariat:volume"] != "data" || v.Tags["Name"] != "data" || v.Tags["team"] != "blue" {
		t.Errorf("created: %+v %+v", r, v)
	}
	device := l.OK(t, "attach", j, self).Device
	if !strings.HasPrefix(device, "/dev/xvd") || !*l.OK(t, "isattached", j, self).Attached ||
		*l.OK(t, "isattached", j, "node-2.internal").Attached {
		t.Errorf("attached as %s", device)
	}
	real := l.OK(t, "waitforattach", device, j).Device
	if !strings.HasPrefix(real, "/dev/nvme") {
		t.Errorf("the device is %s", real)
	}
	l.OK(t, "mountdevice", global, real, j)
	l.OK(t, "mount", pod, j)
	l.OK(t, "mount", pod, j)
	if g, p := at(t, global), at(t, pod); len(g) != 1 || len(p) != 1 || g[0].FSType != "ext4" ||
		g[0].Device != p[0].Device || !strings.Contains(p[0].Options, "nosuid,nodev") {
		t.Fatalf("mounted: %+v %+v", g, p)
	}
	must(t, os.WriteFile(pod+"/f", []byte("data"), 0o644))
	uuid := sh(t, "blkid -s UUID -o value "+real)
	l.Fails(t, nil, "is mounted at", "detach", "data", self)
	l.Fails(t, nil, "is attached to instance "+self, "delete", j)
	l.OK(t, "unmount", pod)
	nothingAt(t, pod)
	l.OK(t, "unmountdevice", global)
	l.OK(t, "detach", "data", self)
	if v := l.volume(t); v.State != "available" {
		t.Errorf("after the detachment: %+v", v)
	}
	l.NoRecords(t, "data.json") // Create made it: on this host the name means this volume until it is deleted

	// Another volume takes its name in /dev.
	l.OK(t, "attach", options("name", "decoy", "size", "2", "onRemove", "purge"), self)
	decoy := l.OK(t, "waitforattach", "", options("name", "decoy")).Device
	l.OK(t, "attach", j, self)
	again := l.OK(t, "waitforattach", real, j).Device
	if decoy != real || again == real {
		t.Errorf("the names are not shuffled: %s was the volume's, now %s is, and %s the other's", real, again, decoy)
	}
	l.OK(t, "mountdevice", global, real, j) // the old name; it does not count
	if data, err := os.ReadFile(global + "/f"); err != nil || string(data) != "data" ||
		sh(t, "blkid -s UUID -o value "+again) != uuid {
		t.Errorf("the data: %q %v", data, err)
	}

	grown := l.OK(t, "expandfs", j, again, global, fmt.Sprint(2<<30), fmt.Sprint(1<<30))
	var st unix.Statfs_t
	must(t, unix.Statfs(global, &st))
	if size := int64(st.Blocks) * st.Bsize; grown.VolumeNewSize != 2<<30 || size < 19<<26 {
		t.Errorf("expanded: %+v, the file system has %d", grown, size)
	}
	l.OK(t, "expandfs", j, again, global, fmt.Sprint(2<<30), fmt.Sprint(1<<30))
	l.Fails(t, nil, "once in six hours; it can be tried again at 20", "expandvolume", j, global, fmt.Sprint(3<<30),
		fmt.Sprint(2<<30))
	l.OK(t, "unmountdevice", global)
	l.OK(t, "detach", "data", self)
	l.OK(t, "detach", "decoy", self)
	if r := l.OK(t, "delete", options("name", "decoy")); !strings.Contains(r.Message, "is kept, as onRemove=retain says") {
		t.Errorf("delete: %+v", r)
	}
	l.OK(t, "delete", options("name", "decoy", "onRemove", "purge"))
	if r := l.OK(t, "delete", j); !strings.Contains(r.Message, "deleted vol-") || len(l.Volumes()) != 0 {
		t.Errorf("delete: %+v %+v", r, l.Volumes())
	}
	l.OK(t, "delete", j)
	l.NoRecords(t)
	if n := l.Calls("CreateVolume"); n != 2 {
		t.Errorf("CreateVolume was called %d times", n)
	}
}
