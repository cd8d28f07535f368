package ebs_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/test/fakeaws"
	"github.com/lariat-net/lariat/test/flextest"
)

// format puts a volume with a file system into the cloud, attached to this machine, and returns its device.
func (l *lab) format(t *testing.T, name, id, mkfs string, has, volume int64) {
	t.Helper()
	image := l.drives.Image(id)
	must(t, os.WriteFile(image, nil, 0o600))
	must(t, os.Truncate(image, has<<30))
	sh(t, mkfs+" "+image)
	must(t, os.Truncate(image, volume<<30))
	l.AddVolume(fakeaws.Volume{ID: id, Size: int(volume), SnapshotID: "snap-00000001",
		Tags: map[string]string{"lariat:volume": name, "lariat:file-system": "made"}})
	l.OK(t, "attach", options("name", name), self)
}

// makers are the file systems of volumes.
var makers = map[string]string{"ext4": "mkfs.ext4 -q -F", "ext3": "mkfs.ext3 -q -F", "xfs": "mkfs.xfs -q"}

// size returns the size of the file system at a directory.
func size(t *testing.T, dir string) int64 {
	t.Helper()
	var st unix.Statfs_t
	must(t, unix.Statfs(dir, &st))
	return int64(st.Blocks) * st.Bsize
}

// F157, F158: a consumer that only reads and one that writes have a volume at the same time,
// whoever comes first and whoever goes first, over kill -9 at each step.
func TestF157ReadOnlyBesideReadWrite(t *testing.T) {
	l := newLab(t, -1)
	l.enter(t)
	n := 0
	for fs, mkfs := range makers {
		for _, writerFirst := range []bool{false, true} {
			n++
			t.Run(fmt.Sprintf("%s/writer first %v", fs, writerFirst), func(t *testing.T) {
				name := fmt.Sprint("v", n)
				l.format(t, name, fmt.Sprintf("vol-000000000000000%02x", n), mkfs, 1, 1)
				reader, writer, third := l.Place(t, "reader"), l.Place(t, "writer"), l.Place(t, "third")
				read := []string{"mount", reader, options("name", name, "kubernetes.io/readwrite", "ro")}
				write := []string{"mount", writer, options("name", name)}
				both := [][]string{read, write}
				if writerFirst {
					both = [][]string{write, read}
				}
				l.do(t, "", both[0]...)
				steps := []string{"mount-prepared", "before-mount", "mounted"}
				if !writerFirst {
					steps = append([]string{"made-writable"}, steps...)
				}
				for _, step := range steps {
					if r, killed := l.Call(t, flextest.KillAt(step), both[1]...); !killed {
						t.Fatalf("%s: %+v", step, r)
					}
					l.Killed(t)
				}
				for _, args := range both {
					l.do(t, "", args...)
				}
				l.do(t, "", "mount", third, options("name", name, "readOnly", "true"))
				if r, w := at(t, reader), at(t, writer); len(r) != 1 || len(w) != 1 || !r[0].ReadOnly() || w[0].ReadOnly() ||
					!strings.Contains(w[0].Options, "nosuid,nodev") {
					t.Fatalf("mounted: %+v %+v", r, w)
				}
				must(t, os.WriteFile(writer+"/f", []byte("data"), 0o644))
				if data, err := os.ReadFile(reader + "/f"); err != nil || string(data) != "data" {
					t.Errorf("the reader sees %q %v", data, err)
				}
				for _, dir := range []string{reader, third} {
					if err := os.WriteFile(dir+"/g", nil, 0o644); !errors.Is(err, unix.EROFS) {
						t.Errorf("a reader writes: %v", err)
					}
				}
				// The mode of a mount does not change by the way.
				l.do(t, "is mounted at "+reader+" already, read-only, and is wanted read-write",
					"mount", reader, options("name", name))
				l.do(t, "is mounted at", "detach", name, self)
				first, second := reader, writer
				if writerFirst {
					first, second = writer, reader
				}
				for _, step := range []string{"unmounted", "unmount-proven"} {
					if r, killed := l.Call(t, flextest.KillAt(step), "unmount", first); !killed {
						t.Fatalf("%s: %+v", step, r)
					}
				}
				l.do(t, "", "unmount", first)
				nothingAt(t, first)
				if len(at(t, second)) != 1 {
					t.Error("the other one is gone, too")
				}
				if !writerFirst {
					must(t, os.WriteFile(writer+"/h", nil, 0o644))
				}
				l.do(t, "", "unmount", second)
				l.do(t, "", "unmount", third)
				l.do(t, "", "detach", name, self)
				l.NoRecords(t)
			})
		}
	}
}

// F105: options of one mount, and of the file system, reach the kernel as they do by mount(8).
func TestF105MountOptions(t *testing.T) {
	l := newLab(t, -1)
	l.enter(t)
	n := 0
	for fs, option := range map[string]string{
		"ext4": "noatime,nodiratime,noexec,lazytime,dirsync,acl,user_xattr,commit=10,data=ordered," +
			"errors=remount-ro,delalloc,nodiscard",
		"ext3": "strictatime,sync,async,nolazytime,data=journal,errors=continue",
		"xfs":  "atime,diratime,noexec,largeio,inode64,logbufs=8,prjquota,discard",
	} {
		n++
		name := fmt.Sprint("v", n)
		l.format(t, name, fmt.Sprintf("vol-000000000000000%02x", n), makers[fs], 1, 1)
		dir, byHand := l.Place(t, name), l.Place(t, name+"-by-hand")
		l.do(t, "", "mount", dir, options("name", name, "mntOptions", option))
		m := at(t, dir)
		if len(m) != 1 {
			t.Fatalf("%s: %+v", fs, m)
		}
		l.do(t, "", "unmount", dir)
		if fs == "xfs" {
			option += ",nouuid" // it comes from a snapshot
		}
		must(t, os.MkdirAll(byHand, 0o755))
		sh(t, "mount -o nosuid,nodev,"+option+" "+m[0].Source+" "+byHand)
		if want := at(t, byHand)[0]; m[0].Options != want.Options || m[0].Super != want.Super {
			t.Errorf("%s:\ngot  %s %s\nwant %s %s", fs, m[0].Options, m[0].Super, want.Options, want.Super)
		}
		sh(t, "umount "+byHand)
		l.do(t, "", "detach", name, self)
	}
}

// F157: kubelet's directory for all pods of the node, which is what the last call wants; and mounts as
// an older version made them.
func TestF157NodesFolder(t *testing.T) {
	l := newLab(t, -1)
	l.format(t, "v", "vol-0000000000000000a", makers["ext4"], 1, 1)
	global, pod, old := l.Place(t, "global"), l.Place(t, "pod"), l.Place(t, "old")
	rw, ro := options("name", "v"), options("name", "v", "kubernetes.io/readwrite", "ro")
	device := l.OK(t, "waitforattach", "", rw).Device
	must(t, os.MkdirAll(old, 0o755))
	sh(t, "mount -o ro "+device+" "+old) // with one flag for the mount and the file system
	l.OK(t, "mountdevice", global, device, ro)
	l.OK(t, "mount", pod, rw)
	for _, step := range []string{"mount-prepared", "switched"} {
		if r, killed := l.Call(t, flextest.KillAt(step), "mountdevice", global, device, rw); !killed {
			t.Fatalf("%s: %+v", step, r)
		}
	}
	for _, j := range []string{rw, ro, rw} {
		l.OK(t, "mountdevice", global, device, j)
		if m := at(t, global); len(m) != 1 || m[0].ReadOnly() != (j == ro) {
			t.Errorf("mounted: %+v", m)
		}
		must(t, os.WriteFile(pod+"/f", nil, 0o644))
	}
	if m := at(t, old); len(m) != 1 || !m[0].ReadOnly() {
		t.Errorf("mounted: %+v", m)
	}
	for _, dir := range []string{old, pod, global} {
		l.OK(t, "unmount", dir)
	}
	l.OK(t, "detach", "v", self)
	l.NoRecords(t)
}

// F110, F157: who has the device is named: a mount in a namespace of its own, a program; and which
// other file system has the same UUID.
func TestF110WhoHasTheDevice(t *testing.T) {
	l := newLab(t, -1)
	l.format(t, "v", "vol-0000000000000000a", makers["xfs"], 1, 1)
	dir, second := l.Place(t, "d"), l.Place(t, "second")
	rw, ro := options("name", "v"), options("name", "v", "readOnly", "true")
	device := l.OK(t, "waitforattach", "", rw).Device

	l.OK(t, "mount", dir, ro)
	hidden := exec.Command("unshare", "-m", "--propagation", "private", "sh", "-c", "echo ready; exec sleep 1000")
	out, err := hidden.StdoutPipe()
	must(t, err)
	must(t, hidden.Start())
	defer hidden.Process.Kill()
	_, err = out.Read(make([]byte, 6))
	must(t, err)
	l.OK(t, "unmount", dir)
	l.Fails(t, nil, fmt.Sprintf("(%d) at %s", hidden.Process.Pid, dir), "mount", dir, rw)
	nothingAt(t, dir)
	l.OK(t, "mount", dir, ro) // beside it
	l.OK(t, "mount", second, rw)
	l.OK(t, "unmount", dir)
	l.OK(t, "unmount", second)
	must(t, hidden.Process.Kill())
	_ = hidden.Wait()

	f, err := os.OpenFile(device, os.O_RDWR|unix.O_EXCL, 0)
	must(t, err)
	l.Fails(t, nil, fmt.Sprintf("a program has %s for itself", device), "mount", dir, rw)
	l.Fails(t, nil, fmt.Sprintf("(%d)", os.Getpid()), "mount", dir, rw)
	must(t, f.Close())

	l.OK(t, "detach", "v", self)
	must(t, os.WriteFile(l.drives.Image("vol-0000000000000000b"), nil, 0o600))
	sh(t, "cp --sparse=always "+l.drives.Image("vol-0000000000000000a")+" "+l.drives.Image("vol-0000000000000000b"))
	l.AddVolume(fakeaws.Volume{ID: "vol-0000000000000000b", Size: 1})
	copied := func(pairs ...string) string {
		return options(append([]string{"name", "copy", "volumeID", "vol-0000000000000000b"}, pairs...)...)
	}
	l.OK(t, "attach", copied(), self)
	l.OK(t, "attach", rw, self)
	l.OK(t, "mount", dir, copied())
	l.OK(t, "mount", second, rw) // it comes from a snapshot, so that is expected
	sh(t, "xfs_io -x -c shutdown "+dir)
	l.Fails(t, nil, "is shut down: input/output error", "mount", dir, copied()) // as if it were there
	l.Fails(t, nil, "is shut down: input/output error", "mount", l.Place(t, "third"), copied())
	l.OK(t, "unmount", second)
	l.OK(t, "unmount", dir)
	sh(t, "mount -o nouuid "+l.OK(t, "waitforattach", "", rw).Device+" "+dir+" && umount "+dir)
	sh(t, "mount "+l.OK(t, "waitforattach", "", rw).Device+" "+dir)
	l.Fails(t, nil, "which is mounted at "+dir+": is it a copy? Then add nouuid to mntOptions", "mount", second, copied())
	l.OK(t, "mount", second, copied("mntOptions", "nouuid"))
	l.OK(t, "unmount", second)
	l.OK(t, "unmount", dir)
	l.OK(t, "detach", "copy", self)
	l.OK(t, "detach", "v", self)
	l.NoRecords(t)
}

// F106, F158: a file system that is smaller than its volume, of a smaller snapshot or enlarged
// while it was attached nowhere, is enlarged by the first mount that may write, and never by one
// that may not.
func TestF106GrownAtFirstMount(t *testing.T) {
	l := newLab(t, -1)
	l.enter(t)
	const small, large = 17 << 26, 19 << 26
	n := 0
	for fs, mkfs := range makers {
		n++
		t.Run(fs, func(t *testing.T) {
			name, id := fmt.Sprint("v", n), fmt.Sprintf("vol-000000000000000%02x", n)
			l.format(t, name, id, mkfs, 1, 2)
			before := content(t, l.drives.Image(id))
			ro, dir, second := l.Place(t, "ro"), l.Place(t, "rw"), l.Place(t, "second")
			j := options("name", name)
			l.do(t, "", "mount", ro, options("name", name, "readOnly", "true"))
			if got := size(t, ro); got > small {
				t.Errorf("read-only it has %d bytes", got)
			}
			l.do(t, "", "unmount", ro)
			if fs != "xfs" && content(t, l.drives.Image(id)) != before { // xfs ends its log itself
				t.Error("it was written to")
			}
			if r, killed := l.Call(t, flextest.KillAt("mounted"), "mount", dir, j); !killed {
				t.Fatalf("%+v", r)
			}
			l.Killed(t)
			l.do(t, "", "mount", dir, j) // goes on where the other was killed
			if got := size(t, dir); got < large {
				t.Errorf("it has %d bytes", got)
			}
			must(t, os.WriteFile(dir+"/f", []byte("data"), 0o644))
			l.do(t, "", "unmount", dir)
			l.do(t, "", "detach", name, self)

			// Enlarged while it is attached nowhere; a reader is first.
			l.do(t, "", "expandvolume", j, dir, fmt.Sprint(3<<30), fmt.Sprint(2<<30))
			l.do(t, "", "attach", j, self)
			l.do(t, "", "mount", ro, options("name", name, "readOnly", "true"))
			l.do(t, "", "mount", second, j)
			if got := size(t, second); got < large+1<<30-1<<27 {
				t.Errorf("enlarged it has %d bytes", got)
			}
			if data, err := os.ReadFile(ro + "/f"); err != nil || string(data) != "data" {
				t.Errorf("the data: %q %v", data, err)
			}
			l.do(t, "", "expandfs", j, "", ro, fmt.Sprint(3<<30), fmt.Sprint(2<<30)) // a reader's directory; the writer's serves
			l.do(t, "", "unmount", second)
			l.do(t, "", "unmount", ro)
			l.do(t, "", "detach", name, self)
			l.NoRecords(t)
		})
	}
}
