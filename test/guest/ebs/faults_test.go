package ebs_test

import (
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/volume/flex"
	"github.com/lariat-net/lariat/test/fakeaws"
)

// content is what a sparse file has, wherever it has something.
func content(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	sum := sha256.New()
	for at := int64(0); ; {
		from, err := f.Seek(at, unix.SEEK_DATA)
		if err != nil {
			return fmt.Sprintf("%x", sum.Sum(nil))
		}
		to, err := f.Seek(from, unix.SEEK_HOLE)
		must(t, err)
		fmt.Fprintln(sum, from, to)
		_, err = io.Copy(sum, io.NewSectionReader(f, from, to-from))
		must(t, err)
		at = to
	}
}

// write puts octets at a place of a file.
func write(t *testing.T, path string, at int64, data []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	_, err = f.WriteAt(data, at)
	must(t, err)
}

// F157: what is not proven blank is never formatted, and nothing else is written to it either.
func TestF157NeverFormatted(t *testing.T) {
	l := newLab(t, -1)
	l.inProcess()
	fresh := map[string]string{"lariat:file-system": "none"}
	random := []byte(strings.Repeat("\x17\x2a\xf3", 3000))
	for i, tc := range []struct {
		name  string
		v     fakeaws.Volume
		image func(path string)
		words string
	}{
		{"a torn ext4: the first 64 KiB wiped, backups whole", fakeaws.Volume{Tags: fresh}, func(p string) {
			l.sh("mkfs.ext4 -q -F " + p)
			write(t, p, 0, make([]byte, 64<<10))
		}, "it is not blank: there is data at octet"},
		{"a torn ext4: the first 5 MiB wiped", fakeaws.Volume{Tags: fresh}, func(p string) {
			l.sh("mkfs.ext4 -q -F " + p)
			write(t, p, 0, make([]byte, 5<<20))
		}, "it is not blank"},
		{"a partition table", fakeaws.Volume{Tags: fresh}, func(p string) {
			mbr := make([]byte, 512)
			copy(mbr[446:], []byte{0, 0, 2, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 0, 8, 0})
			mbr[510], mbr[511] = 0x55, 0xaa
			write(t, p, 0, mbr)
		}, "is a partition table (dos)"},
		{"swap", fakeaws.Volume{Tags: fresh}, func(p string) { l.sh("mkswap " + p) }, "is swap, which is not mounted"},
		{"random data at the start", fakeaws.Volume{Tags: fresh}, func(p string) { write(t, p, 0, random) }, "there is data at octet 0 of"},
		{"some in the middle", fakeaws.Volume{Tags: fresh}, func(p string) { write(t, p, 512<<20, random) }, "there is data at octet 536870912 of"},
		{"a device larger than the volume", fakeaws.Volume{Tags: fresh}, func(p string) { must(t, os.Truncate(p, 2<<30)) }, "has 2147483648 octets, and the volume 1073741824"},
		{"from a snapshot", fakeaws.Volume{Tags: fresh, SnapshotID: "snap-00000001"}, nil, "it comes from snapshot snap-00000001"},
		{"of somebody else", fakeaws.Volume{ID: "vol-0000000000000000f"}, nil, "Lariat did not create it. Format it by hand"},
		{"that had a file system", fakeaws.Volume{Tags: map[string]string{"lariat:file-system": "made"}}, nil, "it had a file system once"},
		{"that another host was formatting", fakeaws.Volume{Tags: map[string]string{"lariat:file-system": "making"}}, nil, "another host began to format it"},
		{"wanted read-only", fakeaws.Volume{Tags: fresh}, nil, "it is wanted read-only"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			name := fmt.Sprint("v", i)
			j := options("name", name)
			if tc.v.ID != "" {
				j = options("name", name, "volumeID", tc.v.ID)
			} else {
				tc.v.ID = fmt.Sprintf("vol-000000000000000%02x", i)
				tc.v.Tags = map[string]string{"lariat:volume": name, "lariat:file-system": tc.v.Tags["lariat:file-system"]}
			}
			if strings.Contains(tc.name, "read-only") {
				j = options("name", name, "kubernetes.io/readwrite", "ro")
			}
			image := l.drives.Image(tc.v.ID)
			must(t, os.WriteFile(image, nil, 0o600))
			must(t, os.Truncate(image, 1<<30))
			if tc.image != nil {
				tc.image(image)
			}
			before := content(t, image)
			tc.v.Size = 1
			l.AddVolume(tc.v)
			dir := l.place(name)
			l.do(t, "", "attach", j, self)
			l.do(t, tc.words, "mountdevice", dir, "", j)
			l.nothingAt(dir)
			l.do(t, "", "detach", name, self)
			if content(t, image) != before {
				t.Error("it was written to")
			}
			l.noRecords()
		})
	}
}

// F157: a volume that is still attaching is not touched, and one whose device does not come is told.
func TestF157AttachingAndNeverThere(t *testing.T) {
	l := newLab(t, 1)
	short := []string{flex.TimeoutVariable + "=2s"}
	dir := l.place("d")
	j := options("name", "slow", "size", "1", "onRemove", "purge")
	l.ok("create", j)
	id := l.volume().ID
	l.Stick(id, "attaching")
	l.failsWith(short, "it has been attaching as /dev/xvd", "attach", j, self)
	before := content(t, l.drives.Image(id))
	l.failsWith(short, "is still attaching", "mountdevice", dir, "", j)
	if content(t, l.drives.Image(id)) != before {
		t.Error("it was written to")
	}
	l.nothingAt(dir)

	l.AddVolume(fakeaws.Volume{ID: "vol-0000000000000000a", Tags: map[string]string{"lariat:volume": "never", "lariat:file-system": "none"}})
	l.NeverAppears("vol-0000000000000000a")
	l.ok("attach", options("name", "never"), self)
	l.failsWith(short, "no device appears here whose serial number is vol0000000000000000a", "waitforattach", "", options("name", "never"))
	l.nothingAt(dir)
	l.ok("detach", "never", self)
	l.noRecordsBut("slow.json")
}

func (l *lab) noRecordsBut(name string) {
	l.Helper()
	left, _ := filepath.Glob(state + "/*/*")
	if left = slices.DeleteFunc(left, func(p string) bool { return filepath.Base(p) == name }); len(left) > 0 {
		l.Errorf("left over: %v", left)
	}
}

// F157: a device that is torn away under a live mount is noticed, and can be unmounted; the volume comes back under another name.
func TestF157TornAway(t *testing.T) {
	l := newLab(t, -1)
	global, pod := l.place("global"), l.place("pod")
	j := options("name", "torn", "size", "1", "onRemove", "purge")
	l.ok("attach", j, self)
	l.ok("mountdevice", global, "", j)
	must(t, os.WriteFile(global+"/f", []byte("data"), 0o644))
	l.sh("sync -f " + global)
	was := l.at(global)[0]
	must(t, l.drives.Tear(l.volume().ID))
	l.fails("is gone: it was detached while it was mounted", "mountdevice", global, "", j)
	l.failsWith([]string{flex.TimeoutVariable + "=3s"}, "no device appears here", "mount", pod, j)

	// It is attached again, and its device is another; the mount is still the old one's.
	l.sh("true")
	id := l.volume().ID
	must(t, l.drives.Detach(id))
	must(t, l.drives.Attach(id, self, "", 1<<30))
	l.ok("waitforattach", "", j)
	l.fails("volume torn: the device of what is mounted at "+global, "mount", pod, j)
	l.nothingAt(pod)
	l.ok("unmountdevice", global)
	l.nothingAt(global)
	l.ok("mountdevice", global, "", j)
	if data, err := os.ReadFile(global + "/f"); err != nil || string(data) != "data" || l.at(global)[0].Device == was.Device && l.at(global)[0].Source == was.Source {
		t.Errorf("after it came back: %q %v %+v", data, err, l.at(global))
	}

	// The folder has another volume than the options say.
	l.ok("attach", options("name", "another", "size", "1"), self)
	l.fails("is mounted at "+global+" already", "mountdevice", global, "", options("name", "another"))
	l.ok("detach", "another", self)
	l.ok("unmountdevice", global)
	l.ok("detach", "torn", self)
	l.noRecords()
}

// F158: kill -9 at every step of every verb, each time of the call that goes on where the one before was killed: one volume, one mkfs, one mount, no record lost or left.
func TestF158KilledAtEveryStep(t *testing.T) {
	l := newLab(t, -1)
	global := l.place("global")
	j := options("name", "k", "size", "1", "onRemove", "purge")
	for _, tc := range []struct {
		verb  []string
		steps []string
	}{
		{[]string{"create", j}, []string{"before-create", "created", "journal-written", "volume-recorded"}},
		{[]string{"attach", j, self}, []string{"before-attach", "attach-asked", "attached"}},
		{[]string{"mountdevice", global, "", j}, []string{"journal-written", "mount-journalled", "mount-prepared", "format-journalled", "format-marked", "formatted", "format-tagged", "before-mount", "mounted"}},
		{[]string{"expandfs", j, "", global, fmt.Sprint(2 << 30), "0"}, []string{"before-modify", "modify-asked", "volume-expanded", "file-system-expanded"}},
		{[]string{"unmountdevice", global}, []string{"unmounted", "unmount-proven"}},
		{[]string{"detach", "k", self}, []string{"before-detach", "detach-asked", "detached"}},
		{[]string{"delete", j}, []string{"delete-journalled", "deleted", "delete-done"}},
	} {
		for _, step := range tc.steps {
			if r, killed := l.call([]string{killVariable + "=" + step}, tc.verb...); !killed {
				t.Fatalf("%s: step %s was not passed: %+v", tc.verb[0], step, r)
			}
			eventually(t, 20*time.Second, func() bool { return len(drivers()) == 0 }, func() string { return fmt.Sprint("orphans: ", drivers()) })
			if n := len(l.Volumes()); n > 1 {
				t.Fatalf("%s killed at %s: %d volumes", tc.verb[0], step, n)
			}
			if n := len(l.at(global)); n > 1 {
				t.Fatalf("%s killed at %s: mounted %d times", tc.verb[0], step, n)
			}
		}
		l.ok(tc.verb...)
		switch tc.verb[0] {
		case "create":
			if l.volume().State != "available" {
				t.Errorf("created: %+v", l.volume())
			}
		case "attach":
			if l.volume().Attachment.Instance != self {
				t.Errorf("attached: %+v", l.volume())
			}
		case "mountdevice":
			if m := l.at(global); len(m) != 1 || m[0].FSType != "ext4" {
				t.Errorf("mounted: %+v", m)
			}
			must(t, os.WriteFile(global+"/f", []byte("data"), 0o644))
		case "expandfs":
			var st unix.Statfs_t
			must(t, unix.Statfs(global, &st))
			if data, err := os.ReadFile(global + "/f"); err != nil || string(data) != "data" || l.volume().Size != 2 || int64(st.Blocks)*st.Bsize < 19<<26 {
				t.Errorf("expanded: %q %v %+v", data, err, l.volume())
			}
		case "unmountdevice":
			l.nothingAt(global)
		case "detach":
			if l.volume().State != "available" {
				t.Errorf("detached: %+v", l.volume())
			}
		}
	}
	if len(l.Volumes()) > 0 {
		t.Errorf("volumes: %+v", l.Volumes())
	}
	l.noRecords()
}

// F158: mkfs that was killed half-way leaves a device that is not blank. It is begun again where it was begun, and nowhere else.
func TestF158KilledInMkfs(t *testing.T) {
	l := newLab(t, -1)
	dir := l.place("d")
	j := options("name", "half", "size", "1", "onRemove", "purge", "fsType", "xfs", "mntOptions", "noatime")
	l.ok("attach", j, self)
	device := l.ok("waitforattach", "", j).Device
	if _, killed := l.call([]string{killVariable + "=format-marked"}, "mountdevice", dir, "", j); !killed {
		t.Fatal("not killed")
	}
	if tag := l.volume().Tags["lariat:file-system"]; tag != "making" {
		t.Errorf("the tag says %s", tag)
	}
	write(t, device, 3<<20, []byte(strings.Repeat("half", 1000)))
	l.sh("mv " + state + "/formats /tmp/formats")
	l.fails("another host began to format it and did not end", "mountdevice", dir, "", j)
	l.sh("rm -rf " + state + "/formats; mv /tmp/formats " + state + "/formats")
	// In Rancher's shape, and on xfs.
	l.ok("mount", dir, device, j)
	if m := l.at(dir); len(m) != 1 || m[0].FSType != "xfs" || !strings.Contains(m[0].Options, "noatime") || l.volume().Tags["lariat:file-system"] != "made" {
		t.Errorf("mounted: %+v, %+v", m, l.volume())
	}
	must(t, os.WriteFile(dir+"/f", []byte("data"), 0o644))
	l.ok("expandfs", j, device, dir, fmt.Sprint(2<<30), "0")
	var st unix.Statfs_t
	must(t, unix.Statfs(dir, &st))
	if int64(st.Blocks)*st.Bsize < 19<<26 {
		t.Errorf("the file system has %d octets", int64(st.Blocks)*st.Bsize)
	}
	l.fails("has the file system xfs, not ext4", "mount", dir+"-2", device, options("name", "half", "fsType", "ext4"))
	l.ok("unmount", dir, j)
	l.ok("detach", device)
	if l.volume().State != "available" {
		t.Errorf("detached by its device: %+v", l.volume())
	}
	l.ok("delete", j)
	l.noRecords()
}

// F106, F158: where no controller attaches, mount does, and unmount detaches; killed at the steps between.
func TestF106NodeAttach(t *testing.T) {
	l := newLab(t, -1)
	l.env = append(l.env, "LARIAT_EBS_ATTACH=node")
	pod, second := l.place("pod"), l.place("second")
	if r := l.ok("init"); r.Capabilities.Attach || !r.Capabilities.FSGroup {
		t.Errorf("init: %+v", r.Capabilities)
	}
	j := options("kubernetes.io/pvOrVolumeName", "n", "size", "1", "onRemove", "purge")
	for _, step := range []string{"mount-journalled", "created", "attach-asked", "mount-prepared", "mounted"} {
		if r, killed := l.call([]string{killVariable + "=" + step}, "mount", pod, j); !killed {
			t.Fatalf("step %s: %+v", step, r)
		}
	}
	l.ok("mount", pod, j)
	l.ok("mount", second, j)
	if len(l.at(pod)) != 1 || len(l.at(second)) != 1 || len(l.Volumes()) != 1 {
		t.Fatalf("mounted: %+v %+v", l.at(pod), l.at(second))
	}
	l.ok("unmount", pod)
	if l.volume().Attachment.State != "attached" {
		t.Error("it was detached under the second mount")
	}
	for _, step := range []string{"unmounted", "unmount-proven", "detach-asked", "detached"} {
		if r, killed := l.call([]string{killVariable + "=" + step}, "unmount", second); !killed {
			t.Fatalf("step %s: %+v", step, r)
		}
	}
	l.ok("unmount", second)
	if l.volume().State != "available" {
		t.Errorf("after the last unmount: %+v", l.volume())
	}
	// What cannot be mounted does not stay here.
	l.AddVolume(fakeaws.Volume{ID: "vol-0000000000000000a", Tags: map[string]string{"lariat:volume": "never"}})
	l.NeverAppears("vol-0000000000000000a")
	l.failsWith([]string{flex.TimeoutVariable + "=3s"}, "no device appears here", "mount", pod, options("name", "never"))
	for _, v := range l.Volumes() {
		if v.Attachment.State == "attached" {
			t.Errorf("after a mount that failed: %+v", v)
		}
	}
	l.ok("detach", "never", self)
	l.ok("delete", options("name", "never", "onRemove", "purge"))
	l.fails("has the file system ext4, not xfs", "mount", pod, options("name", "n", "fsType", "xfs"))
	if l.volume().Attachment.State == "attached" {
		t.Errorf("after a mount that failed: %+v", l.volume())
	}
	l.ok("detach", "n", self)
	l.ok("delete", j)
	l.noRecords()
}

// foreign is a volume that somebody attached.
func (l *lab) foreign() string {
	const id = "vol-0000000000000000d"
	l.AddVolume(fakeaws.Volume{ID: id})
	l.ok("attach", options("name", "foreign", "volumeID", id), self)
	return id
}

// F160: keys are in no argument of any process, no journal, no log and no answer.
func TestF160Secrets(t *testing.T) {
	l := newLab(t, -1)
	dir := l.place("d")
	stop := make(chan struct{})
	var wg sync.WaitGroup
	seen := ""
	wg.Go(func() {
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for {
			all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
			for _, f := range all {
				if data, _ := os.ReadFile(f); strings.Contains(string(data), fakeaws.SecretAccessKey) {
					seen = string(data)
				}
			}
			select {
			case <-stop:
				return
			case <-tick.C:
			}
		}
	})
	// What is somebody else's is left alone, by the way.
	must(t, os.MkdirAll(dir, 0o755))
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, ""))
	l.fails("is left alone", "unmountdevice", dir)
	l.fails("tmpfs is mounted at", "mountdevice", dir, "", options("name", "s", "volumeID", l.foreign()))
	must(t, unix.Unmount(dir, 0))
	j := options("name", "s", "size", "1", "onRemove", "purge")
	answers := fmt.Sprint(l.ok("create", j), l.ok("attach", j, self), l.ok("mountdevice", dir, "", j))
	r, _ := l.call([]string{"AWS_SECRET_ACCESS_KEY=" + fakeaws.SecretAccessKey + "x"}, "detach", "s", self)
	answers += r.Message
	if r.Status == flex.Success {
		t.Error("a wrong key is accepted")
	}
	for _, root := range []string{"/var/lib/lariat", "/run/lariat", logFile} {
		err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return err
			}
			data, err := os.ReadFile(path)
			if text := string(data); strings.Contains(text, fakeaws.SecretAccessKey) || strings.Contains(text, fakeaws.AccessKeyID) {
				t.Errorf("a key is in %s", path)
			}
			return err
		})
		must(t, err)
	}
	l.ok("unmountdevice", dir)
	l.ok("detach", "s", self)
	l.ok("delete", j)
	close(stop)
	wg.Wait()
	if seen != "" || strings.Contains(answers, fakeaws.SecretAccessKey) {
		t.Errorf("a key was shown: %s %s", seen, answers)
	}
}
