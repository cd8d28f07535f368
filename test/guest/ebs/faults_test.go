package ebs_test

import (
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/volume/flex"
	"github.com/lariat-net/lariat/test/fakeaws"
	"github.com/lariat-net/lariat/test/flextest"
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
	l.enter(t)
	fresh := map[string]string{"lariat:file-system": "none"}
	random := []byte(strings.Repeat("\x17\x2a\xf3", 3000))
	for i, tc := range []struct {
		name  string
		v     fakeaws.Volume
		image func(path string)
		words string
	}{
		{"a torn ext4: the first 64 KiB wiped, backups whole", fakeaws.Volume{Tags: fresh}, func(p string) {
			sh(t, "mkfs.ext4 -q -F "+p)
			write(t, p, 0, make([]byte, 64<<10))
		}, "it is not blank: there is data at octet"},
		{"a torn ext4: the first 5 MiB wiped", fakeaws.Volume{Tags: fresh}, func(p string) {
			sh(t, "mkfs.ext4 -q -F "+p)
			write(t, p, 0, make([]byte, 5<<20))
		}, "it is not blank"},
		{"a partition table", fakeaws.Volume{Tags: fresh}, func(p string) {
			mbr := make([]byte, 512)
			copy(mbr[446:], []byte{0, 0, 2, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 0, 8, 0})
			mbr[510], mbr[511] = 0x55, 0xaa
			write(t, p, 0, mbr)
		}, "is a partition table (dos)"},
		{"swap", fakeaws.Volume{Tags: fresh}, func(p string) { sh(t, "mkswap "+p) }, "is swap, which is not mounted"},
		{"random data at the start", fakeaws.Volume{Tags: fresh}, func(p string) { write(t, p, 0, random) },
			"there is data at octet 0 of"},
		{"some in the middle", fakeaws.Volume{Tags: fresh}, func(p string) { write(t, p, 512<<20, random) },
			"there is data at octet 536870912 of"},
		{"a device larger than the volume", fakeaws.Volume{Tags: fresh}, func(p string) { must(t, os.Truncate(p, 2<<30)) },
			"has 2147483648 octets, and the volume 1073741824"},
		{"from a snapshot", fakeaws.Volume{Tags: fresh, SnapshotID: "snap-00000001"}, nil,
			"it comes from snapshot snap-00000001"},
		{"of somebody else", fakeaws.Volume{ID: "vol-0000000000000000f"}, nil, "Lariat did not create it. Format it by hand"},
		{"that had a file system", fakeaws.Volume{Tags: map[string]string{"lariat:file-system": "made"}}, nil,
			"it had a file system once"},
		{"that another host was formatting", fakeaws.Volume{Tags: map[string]string{"lariat:file-system": "making"}}, nil,
			"another host began to format it"},
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
			dir := l.Place(t, name)
			l.do(t, "", "attach", j, self)
			l.do(t, tc.words, "mountdevice", dir, "", j)
			nothingAt(t, dir)
			l.do(t, "", "detach", name, self)
			if content(t, image) != before {
				t.Error("it was written to")
			}
			l.NoRecords(t)
		})
	}
}

// F157: a volume that is still attaching is not touched, and one whose device does not come is told.
func TestF157AttachingAndNeverThere(t *testing.T) {
	l := newLab(t, 1)
	short := []string{flex.TimeoutVariable + "=5s"}
	dir := l.Place(t, "d")
	j := options("name", "slow", "size", "1", "onRemove", "purge")
	l.OK(t, "create", j)
	id := l.volume(t).ID
	l.Stick(id, "attaching")
	l.Fails(t, short, "it has been attaching as /dev/xvd", "attach", j, self)
	before := content(t, l.drives.Image(id))
	l.Fails(t, short, "is still attaching", "mountdevice", dir, "", j)
	if content(t, l.drives.Image(id)) != before {
		t.Error("it was written to")
	}
	nothingAt(t, dir)

	l.AddVolume(fakeaws.Volume{ID: "vol-0000000000000000a", Tags: map[string]string{"lariat:volume": "never",
		"lariat:file-system": "none"}})
	l.NeverAppears("vol-0000000000000000a")
	l.OK(t, "attach", options("name", "never"), self)
	l.Fails(t, short, "no device appears here whose serial number is vol0000000000000000a", "waitforattach", "",
		options("name", "never"))
	nothingAt(t, dir)
	l.OK(t, "detach", "never", self)
	l.NoRecords(t, "slow.json")
}

// F157: a device that is torn away under a live mount is noticed, and can be unmounted; the volume comes back
// under another name.
func TestF157TornAway(t *testing.T) {
	l := newLab(t, -1)
	global, pod := l.Place(t, "global"), l.Place(t, "pod")
	j := options("name", "torn", "size", "1", "onRemove", "purge")
	l.OK(t, "attach", j, self)
	l.OK(t, "mountdevice", global, "", j)
	must(t, os.WriteFile(global+"/f", []byte("data"), 0o644))
	sh(t, "sync -f "+global)
	was := at(t, global)[0]
	must(t, l.drives.Tear(l.volume(t).ID))
	l.Fails(t, nil, "is gone: it was detached while it was mounted", "mountdevice", global, "", j)
	l.Fails(t, []string{flex.TimeoutVariable + "=5s"}, "no device appears here", "mount", pod, j)

	// It is attached again, and its device is another; the mount is still the old one's.
	sh(t, "true")
	id := l.volume(t).ID
	must(t, l.drives.Detach(id))
	must(t, l.drives.Attach(id, self, "", 1<<30))
	l.OK(t, "waitforattach", "", j)
	l.Fails(t, nil, "volume torn: the device of what is mounted at "+global, "mount", pod, j)
	nothingAt(t, pod)
	l.OK(t, "unmountdevice", global)
	nothingAt(t, global)
	l.OK(t, "mountdevice", global, "", j)
	if data, err := os.ReadFile(global + "/f"); err != nil || string(data) != "data" ||
		at(t, global)[0].Device == was.Device && at(t, global)[0].Source == was.Source {
		t.Errorf("after it came back: %q %v %+v", data, err, at(t, global))
	}

	// The folder has another volume than the options say.
	l.OK(t, "attach", options("name", "another", "size", "1"), self)
	l.Fails(t, nil, "is mounted at "+global+" already", "mountdevice", global, "", options("name", "another"))
	l.OK(t, "detach", "another", self)
	l.OK(t, "unmountdevice", global)
	l.OK(t, "detach", "torn", self)
	l.NoRecords(t)
}

// F158: kill -9 at every step of every verb, each time of the call that goes on where the one before was
// killed: one volume, one mkfs, one mount, no record lost or left.
func TestF158KilledAtEveryStep(t *testing.T) {
	l := newLab(t, -1)
	global := l.Place(t, "global")
	j := options("name", "k", "size", "1", "onRemove", "purge")
	for _, tc := range []struct {
		verb  []string
		steps []string
	}{
		{[]string{"create", j}, []string{"before-create", "created", "journal-written", "volume-recorded"}},
		{[]string{"attach", j, self}, []string{"before-attach", "attach-asked", "attached"}},
		{[]string{"mountdevice", global, "", j}, []string{"journal-written", "mount-journalled", "mount-prepared",
			"format-journalled", "format-marked", "formatted", "format-tagged", "before-mount", "mounted"}},
		{[]string{"expandfs", j, "", global, fmt.Sprint(2 << 30), "0"},
			[]string{"before-modify", "modify-asked", "volume-expanded", "file-system-expanded"}},
		{[]string{"unmountdevice", global}, []string{"unmounted", "unmount-proven"}},
		{[]string{"detach", "k", self}, []string{"before-detach", "detach-asked", "detached"}},
		{[]string{"delete", j}, []string{"delete-journalled", "deleted", "delete-done"}},
	} {
		for _, step := range tc.steps {
			if r, killed := l.Call(t, flextest.KillAt(step), tc.verb...); !killed {
				t.Fatalf("%s: step %s was not passed: %+v", tc.verb[0], step, r)
			}
			l.Killed(t)
			if n := len(l.Volumes()); n > 1 {
				t.Fatalf("%s killed at %s: %d volumes", tc.verb[0], step, n)
			}
			if n := len(at(t, global)); n > 1 {
				t.Fatalf("%s killed at %s: mounted %d times", tc.verb[0], step, n)
			}
		}
		l.OK(t, tc.verb...)
		switch tc.verb[0] {
		case "create":
			if l.volume(t).State != "available" {
				t.Errorf("created: %+v", l.volume(t))
			}
		case "attach":
			if l.volume(t).Attachment.Instance != self {
				t.Errorf("attached: %+v", l.volume(t))
			}
		case "mountdevice":
			if m := at(t, global); len(m) != 1 || m[0].FSType != "ext4" {
				t.Errorf("mounted: %+v", m)
			}
			must(t, os.WriteFile(global+"/f", []byte("data"), 0o644))
		case "expandfs":
			var st unix.Statfs_t
			must(t, unix.Statfs(global, &st))
			if data, err := os.ReadFile(global + "/f"); err != nil || string(data) != "data" || l.volume(t).Size != 2 ||
				int64(st.Blocks)*st.Bsize < 19<<26 {
				t.Errorf("expanded: %q %v %+v", data, err, l.volume(t))
			}
		case "unmountdevice":
			nothingAt(t, global)
		case "detach":
			if l.volume(t).State != "available" {
				t.Errorf("detached: %+v", l.volume(t))
			}
		}
	}
	if len(l.Volumes()) > 0 {
		t.Errorf("volumes: %+v", l.Volumes())
	}
	l.NoRecords(t)
}

// F158: mkfs that was killed half-way leaves a device that is not blank. It is begun again where it was
// begun, and nowhere else.
func TestF158KilledInMkfs(t *testing.T) {
	l := newLab(t, -1)
	dir := l.Place(t, "d")
	j := options("name", "half", "size", "1", "onRemove", "purge", "fsType", "xfs", "mntOptions", "noatime")
	l.OK(t, "attach", j, self)
	device := l.OK(t, "waitforattach", "", j).Device
	if _, killed := l.Call(t, flextest.KillAt("format-marked"), "mountdevice", dir, "", j); !killed {
		t.Fatal("not killed")
	}
	if tag := l.volume(t).Tags["lariat:file-system"]; tag != "making" {
		t.Errorf("the tag says %s", tag)
	}
	write(t, device, 3<<20, []byte(strings.Repeat("half", 1000)))
	sh(t, "mv "+l.StateDir()+"/formats /tmp/formats")
	l.Fails(t, nil, "another host began to format it and did not end", "mountdevice", dir, "", j)
	sh(t, "rm -rf "+l.StateDir()+"/formats; mv /tmp/formats "+l.StateDir()+"/formats")
	// In Rancher's shape, and on xfs.
	l.OK(t, "mount", dir, device, j)
	if m := at(t, dir); len(m) != 1 || m[0].FSType != "xfs" || !strings.Contains(m[0].Options, "noatime") ||
		l.volume(t).Tags["lariat:file-system"] != "made" {
		t.Errorf("mounted: %+v, %+v", m, l.volume(t))
	}
	must(t, os.WriteFile(dir+"/f", []byte("data"), 0o644))
	l.OK(t, "expandfs", j, device, dir, fmt.Sprint(2<<30), "0")
	var st unix.Statfs_t
	must(t, unix.Statfs(dir, &st))
	if int64(st.Blocks)*st.Bsize < 19<<26 {
		t.Errorf("the file system has %d octets", int64(st.Blocks)*st.Bsize)
	}
	l.Fails(t, nil, "has the file system xfs, not ext4", "mount", dir+"-2", device,
		options("name", "half", "fsType", "ext4"))
	l.OK(t, "unmount", dir, j)
	l.OK(t, "detach", device)
	if l.volume(t).State != "available" {
		t.Errorf("detached by its device: %+v", l.volume(t))
	}
	l.OK(t, "delete", j)
	l.NoRecords(t)
}

// F106, F158: where no controller attaches, mount does, and unmount detaches; killed at the steps between.
func TestF106NodeAttach(t *testing.T) {
	l := newLab(t, -1)
	l.Driver.Env = append(l.Driver.Env, "LARIAT_EBS_ATTACH=node")
	pod, second := l.Place(t, "pod"), l.Place(t, "second")
	if r := l.OK(t, "init"); r.Capabilities.Attach || !r.Capabilities.FSGroup {
		t.Errorf("init: %+v", r.Capabilities)
	}
	j := options("kubernetes.io/pvOrVolumeName", "n", "size", "1", "onRemove", "purge")
	for _, step := range []string{"mount-journalled", "created", "attach-asked", "mount-prepared", "mounted"} {
		if r, killed := l.Call(t, flextest.KillAt(step), "mount", pod, j); !killed {
			t.Fatalf("step %s: %+v", step, r)
		}
	}
	l.OK(t, "mount", pod, j)
	l.OK(t, "mount", second, j)
	if len(at(t, pod)) != 1 || len(at(t, second)) != 1 || len(l.Volumes()) != 1 {
		t.Fatalf("mounted: %+v %+v", at(t, pod), at(t, second))
	}
	l.OK(t, "unmount", pod)
	if l.volume(t).Attachment.State != "attached" {
		t.Error("it was detached under the second mount")
	}
	for _, step := range []string{"unmounted", "unmount-proven", "detach-asked", "detached"} {
		if r, killed := l.Call(t, flextest.KillAt(step), "unmount", second); !killed {
			t.Fatalf("step %s: %+v", step, r)
		}
	}
	l.OK(t, "unmount", second)
	if l.volume(t).State != "available" {
		t.Errorf("after the last unmount: %+v", l.volume(t))
	}
	// What cannot be mounted does not stay here.
	l.AddVolume(fakeaws.Volume{ID: "vol-0000000000000000a", Tags: map[string]string{"lariat:volume": "never"}})
	l.NeverAppears("vol-0000000000000000a")
	l.Fails(t, []string{flex.TimeoutVariable + "=5s"}, "no device appears here", "mount", pod, options("name", "never"))
	for _, v := range l.Volumes() {
		if v.Attachment.State == "attached" {
			t.Errorf("after a mount that failed: %+v", v)
		}
	}
	l.OK(t, "detach", "never", self)
	l.OK(t, "delete", options("name", "never", "onRemove", "purge"))
	l.Fails(t, nil, "has the file system ext4, not xfs", "mount", pod, options("name", "n", "fsType", "xfs"))
	if l.volume(t).Attachment.State == "attached" {
		t.Errorf("after a mount that failed: %+v", l.volume(t))
	}
	l.OK(t, "detach", "n", self)
	l.OK(t, "delete", j)
	l.NoRecords(t)
}

// foreign is a volume that somebody attached.
func (l *lab) foreign(t *testing.T) string {
	const id = "vol-0000000000000000d"
	l.AddVolume(fakeaws.Volume{ID: id})
	l.OK(t, "attach", options("name", "foreign", "volumeID", id), self)
	return id
}

// F160: keys are in no argument of any process, no journal, no log and no answer.
func TestF160Secrets(t *testing.T) {
	l := newLab(t, -1)
	dir := l.Place(t, "d")
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
	l.Fails(t, nil, "is left alone", "unmountdevice", dir)
	l.Fails(t, nil, "tmpfs is mounted at", "mountdevice", dir, "", options("name", "s", "volumeID", l.foreign(t)))
	must(t, unix.Unmount(dir, 0))
	j := options("name", "s", "size", "1", "onRemove", "purge")
	answers := fmt.Sprint(l.OK(t, "create", j), l.OK(t, "attach", j, self), l.OK(t, "mountdevice", dir, "", j))
	r, _ := l.Call(t, []string{"AWS_SECRET_ACCESS_KEY=" + fakeaws.SecretAccessKey + "x"}, "detach", "s", self)
	answers += r.Message
	if r.Status == flex.Success {
		t.Error("a wrong key is accepted")
	}
	for _, root := range []string{"/var/lib/lariat", "/run/lariat", l.LogFile()} {
		err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return err
			}
			data, err := os.ReadFile(path)
			if text := string(data); strings.Contains(text, fakeaws.SecretAccessKey) ||
				strings.Contains(text, fakeaws.AccessKeyID) {
				t.Errorf("a key is in %s", path)
			}
			return err
		})
		must(t, err)
	}
	l.OK(t, "unmountdevice", dir)
	l.OK(t, "detach", "s", self)
	l.OK(t, "delete", j)
	close(stop)
	wg.Wait()
	if seen != "" || strings.Contains(answers, fakeaws.SecretAccessKey) {
		t.Errorf("a key was shown: %s %s", seen, answers)
	}
}
