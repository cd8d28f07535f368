// Package volumes_test runs the volume drivers as kubelet does, against the kernel's own NFS server.
package volumes_test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/flex"
	"github.com/lariat-net/lariat/pkg/volume/mounts"
	"github.com/lariat-net/lariat/pkg/volume/nfs"
	"github.com/lariat-net/lariat/test/flextest"
	"github.com/lariat-net/lariat/test/guest"
	"github.com/lariat-net/lariat/test/guest/nfsd"
)

var driver = flextest.Driver{Name: "nfs", Programs: []string{"mount.nfs"},
	New: func(log *slog.Logger) (volume.Driver, error) {
		c, err := nfs.FromEnvironment(os.Getenv)
		return nfs.New(c, log), err
	}}

func TestMain(m *testing.M) { driver.Main(m, guest.Options{Bin: true}) }

// Short names for what all tests say.
var (
	call, play, ok, fails, place     = driver.Call, driver.Play, driver.OK, driver.Fails, driver.Place
	options, at, nothingAt, must, sh = flextest.Options, flextest.At, flextest.NothingAt, flextest.Must, flextest.Sh
)

const (
	server = nfsd.Server
	other  = nfsd.Other
	export = nfsd.Export
)

// below are the options of a folder on the export. NFSv4.0 takes half of the time of 4.2 to mount.
func below(name string, pairs ...string) string {
	return options(append([]string{"name", name, "host", server, "exportBase", export, "mntOptions", "vers=4.0"},
		pairs...)...)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// F105, F108: create, mount, use, unmount, delete, with every version of the protocol, in both verb shapes.
func TestF105Versions(t *testing.T) {
	nfsd.Serve(t)
	for _, vers := range []string{"3", "4.0", "4.1", "4.2"} {
		t.Run(vers, func(t *testing.T) {
			dir := place(t, "data")
			name := "v" + strings.ReplaceAll(vers, ".", "-")
			mnt := "vers=" + vers
			if vers == "3" {
				mnt += ",nolock"
			}
			j := below(name, "mntOptions", mnt, "onRemove", "purge", "kubernetes.io/mounterArgs.FsGroup", "1234")
			r := ok(t, "create", j)
			if r.Options["created"] != "true" || r.Options["name"] != name {
				t.Errorf("create: %+v", r)
			}
			if again := ok(t, "create", j); again.Options["created"] != "true" {
				t.Errorf("create again: %+v", again)
			}
			ok(t, "mount", dir, j)
			ok(t, "mount", dir, "", j) // kubelet 1.5's and Rancher's; and once more
			stack := at(t, dir)
			if len(stack) != 1 || stack[0].Source != server+":"+export+"/"+name ||
				!strings.Contains(stack[0].Super, "vers="+vers) || !strings.Contains(stack[0].Options, "nosuid,nodev") {
				t.Fatalf("mounted: %+v", stack)
			}
			must(t, os.WriteFile(dir+"/f", []byte("data"), 0o644))
			if data, err := os.ReadFile(export + "/" + name + "/f"); err != nil || string(data) != "data" {
				t.Errorf("on the server: %q %v", data, err)
			}
			if fi, err := os.Stat(export + "/" + name); err != nil || fi.Sys().(*syscall.Stat_t).Gid != 1234 ||
				fi.Mode()&os.ModeSetgid == 0 {
				t.Errorf("fsGroup: %v %v", fi.Mode(), err)
			}
			fails(t, nil, "is mounted at "+dir, "delete", j)
			ok(t, "unmount", dir)
			nothingAt(t, dir)
			ok(t, "unmount", dir)
			if r := ok(t, "delete", j); r.Message != "purged 1 files, 4 octets" {
				t.Errorf("delete: %s", r.Message)
			}
			if exists(export+"/"+name) || exists(export+"/.lariat/"+name+".json") {
				t.Error("it is still on the server")
			}
			if r := ok(t, "delete", j); r.Message != "" {
				t.Errorf("delete again: %s", r.Message)
			}
		})
	}
	noLeftovers(t)
}

// noLeftovers: neither processes, nor records, nor folders in the making.
func noLeftovers(t *testing.T) {
	t.Helper()
	if left, _ := filepath.Glob(export + "/.lariat/*"); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
	driver.NoRecords(t)
	driver.NoProcesses(t)
}

// F105: what Lariat did not create is never purged.
func TestF105OnlyOurs(t *testing.T) {
	nfsd.Serve(t)
	keep := func(name string) { // a folder of somebody else's, with data
		must(t, os.MkdirAll(export+"/"+name+"/deep", 0o755))
		must(t, os.WriteFile(export+"/"+name+"/deep/data", []byte("precious"), 0o644))
		t.Cleanup(func() { os.RemoveAll(export + "/" + name) })
	}
	kept := func(name string) {
		t.Helper()
		if data, err := os.ReadFile(export + "/" + name + "/deep/data"); err != nil || string(data) != "precious" {
			t.Errorf("%s: %q %v", name, data, err)
		}
	}
	t.Run("a folder that was there before", func(t *testing.T) {
		keep("theirs")
		if r := ok(t, "create", below("theirs", "onRemove", "purge")); r.Options["created"] != "false" ||
			!strings.Contains(r.Message, "did not create it") {
			t.Errorf("create: %+v", r)
		}
		if r := ok(t, "delete", below("theirs", "onRemove", "purge", "created", "true")); !strings.Contains(r.Message,
			"is kept: Lariat did not create it") {
			t.Errorf("delete: %+v", r)
		}
		kept("theirs")
	})
	t.Run("another folder under the name of ours", func(t *testing.T) {
		ok(t, "create", below("swapped", "onRemove", "purge"))
		must(t, os.Rename(export+"/swapped", export+"/aside"))
		defer os.RemoveAll(export + "/aside")
		keep("swapped")
		if r := ok(t, "delete", below("swapped", "onRemove", "purge")); !strings.Contains(r.Message,
			"not the one that Lariat created") {
			t.Errorf("delete: %+v", r)
		}
		kept("swapped")
		must(t, os.Remove(export+"/.lariat/swapped.json"))
	})
	t.Run("what links lead to", func(t *testing.T) {
		keep("target")
		ok(t, "create", below("links", "onRemove", "purge"))
		must(t, os.Symlink("../target", export+"/links/rel"))
		must(t, os.Symlink(export+"/target", export+"/links/abs"))
		must(t, os.MkdirAll(export+"/links/a/b/c", 0o755))
		must(t, os.Link(export+"/target/deep/data", export+"/links/a/b/c/hard"))
		if r := ok(t, "delete", below("links", "onRemove", "purge")); !strings.HasPrefix(r.Message, "purged 3 files") {
			t.Errorf("delete: %+v", r)
		}
		kept("target")
	})
	t.Run("an export", func(t *testing.T) {
		keep("whole")
		j := options("name", "whole", "host", server, "export", export+"/whole")
		ok(t, "create", j)
		dir := place(t, "data")
		ok(t, "mount", dir, j)
		ok(t, "unmount", dir)
		env := []string{"ON_REMOVE=purge"}
		if r := play(t, env, "delete", j); r.Status != flex.Success || !strings.Contains(r.Message, "is kept") {
			t.Errorf("delete: %+v", r)
		}
		fails(t, nil, "never removes it", "delete", options("name", "whole", "host", server, "export", export+"/whole",
			"onRemove", "purge"))
		kept("whole")
	})
	t.Run("ours, when it is to be retained or archived", func(t *testing.T) {
		ok(t, "create", below("mine", "onRemove", "archive"))
		must(t, os.WriteFile(export+"/mine/f", []byte("x"), 0o644))
		if r := ok(t, "delete", below("mine", "onRemove", "retain")); !strings.Contains(r.Message, "onRemove=retain") ||
			!exists(export+"/mine/f") {
			t.Errorf("retain: %+v", r)
		}
		r := ok(t, "delete", below("mine", "onRemove", "purge")) // the creator's word counts
		archived, _ := filepath.Glob(export + "/archived-mine-*/f")
		if len(archived) != 1 || exists(export+"/mine") || !strings.Contains(r.Message, "kept as archived-mine-") {
			t.Errorf("archive: %+v %v", r, archived)
		}
		must(t, os.RemoveAll(filepath.Dir(archived[0])))
	})
	t.Run("by the environment, as Rancher had it", func(t *testing.T) {
		env := []string{"NFS_SERVER=" + server, "MOUNT_DIR=" + export, "MOUNT_OPTS=nfsvers=4,noatime", "ON_REMOVE=purge"}
		dir := place(t, "data")
		for _, args := range [][]string{{"create", `{"name":"envy","rancher":"true"}`},
			{"mount", dir, "", `{"name":"envy","rancher":"true","created":"true"}`}} {
			if r := play(t, env, args...); r.Status != flex.Success {
				t.Fatalf("%v: %+v", args, r)
			}
		}
		if m := at(t, dir); len(m) != 1 || !strings.Contains(m[0].Options, "noatime") {
			t.Errorf("%+v", m)
		}
		ok(t, "unmount", dir)
		// The journal remembers what the environment said.
		if r := ok(t, "delete", `{"name":"envy"}`); !strings.HasPrefix(r.Message, "purged") || exists(export+"/envy") {
			t.Errorf("delete: %+v", r)
		}
	})
	noLeftovers(t)
}

// F105, F158: the mount table and the export know enough when the journal is lost, or damaged.
func TestF158LostJournal(t *testing.T) {
	nfsd.Serve(t)
	dir := place(t, "data")
	j := below("lost", "onRemove", "purge")
	for what, lose := range map[string]func(){
		"lost": func() { must(t, os.RemoveAll(driver.StateDir())) },
		"torn": func() {
			files, _ := filepath.Glob(driver.StateDir() + "/*/*.json")
			if len(files) != 2 {
				t.Fatalf("records: %v", files)
			}
			for _, f := range files {
				must(t, os.Truncate(f, 20))
			}
		},
	} {
		ok(t, "create", j)
		ok(t, "mount", dir, j)
		lose()
		ok(t, "mount", dir, j)
		if len(at(t, dir)) != 1 {
			t.Errorf("%s: %+v", what, at(t, dir))
		}
		must(t, os.RemoveAll(driver.StateDir()))
		ok(t, "unmount", dir)
		if r := ok(t, "delete", j); !strings.HasPrefix(r.Message, "purged") {
			t.Errorf("%s: delete: %+v", what, r)
		}
	}
	noLeftovers(t)
}

// F110: a failed mount is told in mount.nfs's own words, with the server's reason. F109, F105: what is
// hostile is refused, and nothing done.
func TestF110F109Refused(t *testing.T) {
	nfsd.Serve(t)
	dir := place(t, "data")
	before, err := mounts.Read()
	must(t, err)
	fails(t, nil, "mount.nfs: mounting "+server+":"+export+
		"/missing/x failed, reason given by server: No such file or directory", "mount", dir,
		options("name", "x", "host", server, "export", export+"/missing/x"))
	fails(t, nil, "mount.nfs: access denied by server while mounting "+server+":/etc", "mount", dir,
		options("name", "x", "host", server, "export", "/etc", "mntOptions", "vers=3,nolock"))
	fails(t, nil, "NFS server 192.168.9.3:2049", "mount", dir, options("name", "x", "host", "192.168.9.3", "export", "/"))
	fails(t, nil, "its name has no address", "mount", dir, options("name", "x", "host", "no-such-host.invalid", "export",
		"/"))
	for words, j := range map[string]string{
		"only letters, digits":                            below("../x"),
		"neither an address nor a host name":              options("name", "x", "host", "-o", "export", "/"),
		"export \"/a/../b\" is not a plain absolute path": options("name", "x", "host", server, "export", "/a/../b"),
		"control characters":                              options("name", "x", "host", server, "export", "/a\nb"),
		"suid is allowed only in the administrator's":     below("x", "mntOptions", "suid,dev,exec"),
		"sec=none":                                   below("x", "mntOptions", "sec=none,foo"),
		"\"foo\" is not among":                       below("x", "mntOptions", "foo"),
		"\"bind\" is not among":                      below("x", "mntOptions", "ro,bind"),
		"\"retry=x\" does not have a value":          below("x", "mntOptions", "retry=x"),
		"is none of [retain purge archive]":          below("x", "onRemove", "shred"),
		"unknown option \"mntOption\", did you mean": below("x", "mntOption", "ro"),
		"4097 octets":                                below("x", "mntOptions", strings.Repeat("x", 4097)),
		"exclude each other":                         below("x", "export", "/a"),
		"no host":                                    options("name", "x", "export", "/a"),
	} {
		fails(t, nil, words, "mount", dir, j)
		fails(t, nil, words, "create", j)
	}
	for _, bad := range []string{"", "relative", "/tmp/../etc", "/", "/tmp/a\nb", "-o", "/" + strings.Repeat("a", 4096)} {
		fails(t, nil, "folder", "mount", bad, below("x"))
		fails(t, nil, "folder", "unmount", bad)
	}
	// Somebody else's mount at the folder is neither hidden nor taken away.
	must(t, os.MkdirAll(dir, 0o755))
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, ""))
	fails(t, nil, "would hide it", "mount", dir, below("x"))
	fails(t, nil, "is left alone", "unmount", dir)
	must(t, unix.Unmount(dir, 0))
	if exists(export + "/x") {
		t.Error("a refused volume has a folder")
	}
	if after, err := mounts.Read(); err != nil || len(after) != len(before) {
		t.Errorf("the mount table changed, %v: %d lines, %d", err, len(before), len(after))
	}
	noLeftovers(t)
}

// hideMountNFS makes mount.nfs a file that cannot be executed, for as long as a test runs.
func hideMountNFS(t *testing.T) {
	t.Helper()
	nothing := filepath.Join(t.TempDir(), "nothing")
	must(t, os.WriteFile(nothing, nil, 0o644))
	programs, _ := filepath.Glob("/usr/sbin/mount.nfs*")
	if len(programs) == 0 {
		t.Fatal("no mount.nfs to hide")
	}
	for _, p := range programs {
		p, err := filepath.EvalSymlinks(p)
		must(t, err)
		must(t, unix.Mount(nothing, p, "", unix.MS_BIND, ""))
		t.Cleanup(func() { unix.Unmount(p, unix.MNT_DETACH) })
	}
}

// F105: without nfs-common on the host, the kernel alone mounts NFS 4.
func TestF105WithoutMountNFS(t *testing.T) {
	nfsd.Serve(t)
	dir := place(t, "data")
	hideMountNFS(t)
	for _, vers := range []string{"", "vers=4.1"} {
		ok(t, "mount", dir, below("bare", "mntOptions", vers))
		if m := at(t, dir); len(m) != 1 || m[0].FSType != "nfs4" || !strings.Contains(m[0].Options, "nosuid") ||
			!strings.Contains(m[0].Super, vers) {
			t.Errorf("mounted: %+v", m)
		}
		must(t, os.WriteFile(dir+"/f", nil, 0o644))
		ok(t, "unmount", dir)
	}
	fails(t, nil, "mount.nfs is not installed", "mount", dir, options("name", "x", "host", server, "export", export,
		"mntOptions", "vers=3,proto=rdma"))
	fails(t, nil, "no such file", "mount", dir, options("name", "x", "host", server, "export", export+"/missing"))
	ok(t, "delete", below("bare", "onRemove", "purge"))
	noLeftovers(t)
}

// Many calls at once for one folder and one volume: one mount, one folder, and everybody is told that it is there.
func TestF158ManyAtOnce(t *testing.T) {
	nfsd.Serve(t)
	dir := place(t, "data")
	crowd := func(args ...string) {
		t.Helper()
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				if out, err := driver.Command(nil, args...).CombinedOutput(); err != nil {
					t.Errorf("%v: %v %s", args, err, out)
				}
			})
		}
		wg.Wait()
	}
	j := below("crowd", "onRemove", "purge")
	crowd("mount", dir, j)
	if m := at(t, dir); len(m) != 1 {
		t.Errorf("mounted: %+v", m)
	}
	crowd("unmount", dir)
	nothingAt(t, dir)
	crowd("create", j)
	crowd("delete", j)
	noLeftovers(t)
}

// A second volume mounted over the first by hand: unmount takes both away.
func TestStackedMounts(t *testing.T) {
	nfsd.Serve(t)
	dir := place(t, "data")
	ok(t, "mount", dir, below("lower"))
	// Of another version: with one and the same the kernel says EBUSY, and mount.nfs takes that for success.
	must(t, exec.Command("mount", "-t", "nfs", "-o", "vers=4.2", server+":"+export, dir).Run())
	fails(t, nil, "would hide it", "mount", dir, below("lower"))
	if m := at(t, dir); len(m) != 2 {
		t.Fatalf("mounted: %+v", m)
	}
	ok(t, "unmount", dir)
	nothingAt(t, dir)
	ok(t, "delete", below("lower", "onRemove", "purge"))
	noLeftovers(t)
}

// F158: kill -9 at every step, of driver and child. The same call again must find its way: no double mount,
// no orphan, no lost record.
func TestF158KilledAtEveryStep(t *testing.T) {
	nfsd.Serve(t)
	dir := place(t, "data")
	mount := []string{"mount", dir, below("k", "onRemove", "purge")}
	create := []string{"create", below("k", "onRemove", "purge")}
	remove := []string{"delete", below("k", "onRemove", "purge")}
	archive := []string{"delete", below("k", "onRemove", "archive")}
	unmount := []string{"unmount", dir}
	// What has nothing to make and to remove takes half of the time.
	must(t, os.Mkdir(export+"/plain", 0o755))
	defer os.Remove(export + "/plain")
	plain := []string{"mount", dir, options("name", "plain", "host", server, "export", export+"/plain", "mntOptions",
		"vers=4.0")}
	for _, tc := range []struct {
		verb  []string
		first [][]string // calls before
		then  [][]string // and after, beside the same call again
		steps []string
	}{
		{create, nil, [][]string{remove}, []string{"journal-written", "create-journalled", "before-mount", "hidden-made",
			"folder-made-aside", "mark-written", "folder-marked", "folder-named", "create-recorded"}},
		{mount, nil, [][]string{unmount, remove}, []string{"folder-named"}},
		{plain, nil, [][]string{unmount}, []string{"mount-journalled", "before-mount", "mounted"}},
		{unmount, [][]string{plain}, nil, []string{"unmounted", "unmount-proven"}},
		{remove, [][]string{create}, nil, []string{"delete-journalled", "removal-marked", "moved-to-trash", "removing",
			"trash-cleared", "delete-done"}},
		{archive, [][]string{create}, nil, []string{"archived"}},
	} {
		for _, step := range tc.steps {
			t.Run(tc.verb[0]+"/"+step, func(t *testing.T) {
				for _, args := range tc.first {
					ok(t, args...)
				}
				if exists(export + "/k") {
					for i := range 5 {
						must(t, os.WriteFile(fmt.Sprint(export, "/k/", i), []byte("x"), 0o644))
					}
				}
				if r, killed := call(t, flextest.KillAt(step), tc.verb...); !killed {
					t.Fatalf("the step was not passed: %+v", r)
				}
				driver.Killed(t)
				if n := len(at(t, dir)); n > 1 {
					t.Errorf("mounted %d times", n)
				}
				again := ok(t, tc.verb...)
				switch tc.verb[0] {
				case "create":
					if r := again; r.Options["created"] != "true" {
						t.Errorf("the volume is not known as ours any more: %+v", r)
					}
				case "mount":
					if n := len(at(t, dir)); n != 1 {
						t.Errorf("mounted %d times", n)
					}
				case "unmount":
					nothingAt(t, dir)
				}
				for _, args := range tc.then {
					ok(t, args...)
				}
				if exists(export + "/k") {
					t.Error("the folder is still there")
				}
				archived, _ := filepath.Glob(export + "/archived-k-*")
				for _, a := range archived {
					must(t, os.RemoveAll(a))
				}
				if want := map[bool]int{true: 1}[step == "archived"]; len(archived) != want {
					t.Errorf("archived: %v", archived)
				}
				noLeftovers(t)
			})
		}
	}
}

// took says how long a call takes.
func took(f func()) time.Duration {
	start := time.Now()
	f()
	return time.Since(start)
}

// F159: the server is gone. Every call ends by its deadline and says why; volumes of other servers are not
// held up; when it comes back, all is well.
func TestF159ServerGone(t *testing.T) {
	nfsd.Serve(t)
	dir := place(t, "data")
	busy, free, lazy, fresh, elsewhere := dir+"-busy", dir+"-free", dir+"-lazy", dir+"-fresh", dir+"-elsewhere"
	t.Cleanup(func() {
		for _, d := range []string{busy, free, lazy, fresh, elsewhere} {
			flextest.Detach(d)
		}
	})
	short := []string{flex.TimeoutVariable + "=6s"}
	onOther := options("name", "o", "host", other, "exportBase", export, "mntOptions", "vers=3,nolock", "onRemove",
		"purge")
	for _, d := range []string{busy, free} {
		ok(t, "mount", d, below("gone"))
	}
	ok(t, "mount", lazy, below("gone", "onHang", "lazy"))
	must(t, os.WriteFile(busy+"/f", []byte("data"), 0o644))

	sh(t, "iptables -A INPUT -d "+server+" -p tcp --dport 2049 -j DROP")
	cut := true
	heal := func() {
		if cut {
			sh(t, "iptables -D INPUT -d "+server+" -p tcp --dport 2049 -j DROP")
			cut = false
		}
	}
	defer heal()

	// Somebody waits for the server, inside.
	reader := exec.Command("sh", "-c", "cd "+busy+"; cat g")
	must(t, reader.Start())
	defer func() { reader.Process.Kill(); reader.Wait() }()

	var wg sync.WaitGroup
	wg.Go(func() {
		d := took(func() { fails(t, short, "does not answer", "mount", fresh, below("gone")) })
		if d > 15*time.Second {
			t.Errorf("mount took %s", d)
		}
		nothingAt(t, fresh)
	})
	wg.Go(func() {
		d := took(func() { fails(t, short, "does not answer", "delete", below("never", "onRemove", "purge")) })
		if d > 15*time.Second {
			t.Errorf("delete took %s", d)
		}
	})
	// At the same time, another server's volume comes and goes as ever.
	if d := took(func() {
		ok(t, "mount", elsewhere, onOther)
		must(t, os.WriteFile(elsewhere+"/f", nil, 0o644))
		ok(t, "unmount", elsewhere)
		ok(t, "delete", onOther)
	}); d > 10*time.Second {
		t.Errorf("another server's volume took %s", d)
	}
	wg.Wait()
	// A mount that is there is not handed out as long as its server does not answer, and it is left as it is.
	fails(t, short, "is mounted at "+free+", and the NFS server does not answer", "mount", free, below("gone"))
	if len(at(t, free)) != 1 {
		t.Error("it is not mounted any more")
	}
	wg.Go(func() {
		if d := took(func() {
			if r := play(t, short, "unmount", free); r.Status != flex.Success {
				t.Errorf("unmount: %+v", r)
			}
		}); d > 15*time.Second {
			t.Errorf("unmount took %s", d)
		}
		nothingAt(t, free)
	})
	// One with a process inside: its waiting calls are aborted; the shell's working folder keeps it busy until it is gone.
	wg.Go(func() {
		d := took(func() {
			if r := play(t, []string{flex.TimeoutVariable + "=8s"}, "unmount", busy); r.Status != flex.Success &&
				!strings.Contains(r.Message, "in use by") && !strings.Contains(r.Message, "does not answer") {
				t.Errorf("unmount of a busy one: %+v", r)
			}
		})
		if d > 25*time.Second {
			t.Errorf("unmount of a busy one took %s", d)
		}
	})
	holder, err := os.OpenFile(lazy, unix.O_PATH, 0)
	must(t, err)
	if r := play(t, []string{flex.TimeoutVariable + "=8s"}, "unmount", lazy); r.Status != flex.Success {
		t.Errorf("unmount with onHang=lazy: %+v", r)
	}
	nothingAt(t, lazy)
	must(t, holder.Close())
	wg.Wait()
	driver.Killed(t)

	heal()
	reader.Process.Kill()
	reader.Wait()
	ok(t, "unmount", busy)
	ok(t, "mount", fresh, below("gone"))
	if data, err := os.ReadFile(fresh + "/f"); err != nil || string(data) != "data" {
		t.Errorf("after the server came back: %q %v", data, err)
	}
	ok(t, "unmount", fresh)
	ok(t, "delete", below("gone", "onRemove", "purge"))
	noLeftovers(t)
}

// F159: a server that takes connections and says nothing, one that is stopped, and one that is started again
// under a mounted volume.
func TestF159ServerSilentStoppedRestarted(t *testing.T) {
	nfsd.Serve(t)
	dir := place(t, "data")
	sh(t, "ip addr replace 192.168.9.4/32 dev lo")
	l, err := net.Listen("tcp", "192.168.9.4:20490")
	must(t, err)
	defer l.Close()
	silent := options("name", "s", "host", "192.168.9.4", "export", "/s", "mntOptions", "port=20490,vers=4.1")
	if d := took(func() {
		fails(t, []string{flex.TimeoutVariable + "=4s"}, "accepts connections and does not answer", "mount", dir, silent)
	}); d > 10*time.Second {
		t.Errorf("it took %s", d)
	}
	nothingAt(t, dir)
	driver.Killed(t)

	ok(t, "mount", dir, below("again"))
	must(t, os.WriteFile(dir+"/f", []byte("data"), 0o644))
	sh(t, "rpc.nfsd 0")
	if d := took(func() {
		fails(t, nil, "NFS server "+server+":2049 refuses connections: is nfsd running there?", "mount", dir+"-2",
			below("again"))
	}); d > 5*time.Second {
		t.Errorf("a stopped server is told after %s", d)
	}
	sh(t, "rpc.nfsd 4; echo Y > /proc/fs/nfsd/v4_end_grace")
	if data, err := os.ReadFile(dir + "/f"); err != nil || string(data) != "data" {
		t.Errorf("after the restart: %q %v", data, err)
	}
	// Stopped for good, with nobody inside.
	sh(t, "rpc.nfsd 0")
	if r := play(t, []string{flex.TimeoutVariable + "=20s"}, "unmount", dir); r.Status != flex.Success {
		t.Errorf("unmount: %+v", r)
	}
	nothingAt(t, dir)
	sh(t, "rpc.nfsd 4; echo Y > /proc/fs/nfsd/v4_end_grace")
	ok(t, "delete", below("again", "onRemove", "purge"))
	noLeftovers(t)
}

// A volume in use, of a server that is well: unmount says by whom, and leaves it.
func TestInUse(t *testing.T) {
	nfsd.Serve(t)
	dir := place(t, "data")
	ok(t, "mount", dir, below("used"))
	f, err := os.Create(dir + "/f")
	must(t, err)
	fails(t, nil, fmt.Sprintf("(%d)", os.Getpid()), "unmount", dir)
	if len(at(t, dir)) != 1 {
		t.Error("it is not mounted any more")
	}
	must(t, f.Close())
	ok(t, "unmount", dir)
	ok(t, "delete", below("used", "onRemove", "purge"))
	noLeftovers(t)
}

// F155: the executable itself, by hand, below a folder that a symbolic link leads to.
func TestF155Executable(t *testing.T) {
	nfsd.Serve(t)
	bin := filepath.Join(os.Getenv("LARIAT_BIN"), "nfs")
	if !exists(bin) {
		t.Skip("bin/nfs is not built: make build")
	}
	real := place(t, "data")
	must(t, os.MkdirAll(filepath.Dir(real), 0o755))
	link := filepath.Join(t.TempDir(), "link")
	must(t, os.Symlink(filepath.Dir(real), link))
	for _, args := range [][]string{{"init"}, {"mount", link + "/data", below("hand")},
		{"mount", link + "/data", below("hand")}, {"unmount", link + "/data"},
		{"delete", below("hand", "onRemove", "purge")}} {
		out, err := exec.Command(bin, args...).CombinedOutput()
		if r, perr := flex.ParseReply(out); err != nil || perr != nil || r.Status != flex.Success ||
			bytes.Count(out, []byte("\n")) != 1 {
			t.Errorf("%v: %v %v %s", args, err, perr, out)
		}
		if args[0] == "mount" && len(at(t, real)) != 1 {
			t.Errorf("mounted: %+v", at(t, real))
		}
	}
	nothingAt(t, real)
	log, err := os.ReadFile("/var/log/lariat/volume-nfs.log")
	if err != nil || !slices.ContainsFunc(strings.Split(string(log), "\n"),
		func(l string) bool { return strings.Contains(l, "msg=mounted") }) {
		t.Errorf("log: %v\n%s", err, log)
	}
	noLeftovers(t)
}

// F107, F108: the executable by way of flex.Client, as lariat-storage will have it, in both verb shapes.
func TestF107ClientOfTheExecutable(t *testing.T) {
	nfsd.Serve(t)
	bin := filepath.Join(os.Getenv("LARIAT_BIN"), "nfs")
	if !exists(bin) {
		t.Skip("bin/nfs is not built: make build")
	}
	r := volume.Request{Name: "client", Options: map[string]string{"host": server, "exportBase": export,
		"onRemove": "purge", "mntOptions": "vers=4.0"}}
	dir := place(t, "data")
	for _, shape := range []flex.Shape{flex.Rancher, flex.Kubernetes} {
		var d volume.Driver = flex.Client{Path: bin, Shape: shape}
		if caps, err := d.Init(t.Context()); err != nil || caps != (volume.Capabilities{}) {
			t.Errorf("init: %+v %v", caps, err)
		}
		told, err := d.Create(t.Context(), r)
		if err != nil || told.Options["created"] != "true" {
			t.Fatalf("create: %+v %v", told, err)
		}
		if _, err := d.Attach(t.Context(), r, "node"); !errors.Is(err, volume.ErrNotSupported) {
			t.Errorf("attach: %v", err)
		}
		must(t, d.Mount(t.Context(), dir, "", r))
		if _, err := d.Delete(t.Context(), r); err == nil || !strings.Contains(err.Error(), "is mounted at") {
			t.Errorf("delete while mounted: %v", err)
		}
		must(t, d.Unmount(t.Context(), dir))
		if told, err := d.Delete(t.Context(), r); err != nil || told.Message != "purged 0 files, 0 octets" {
			t.Errorf("delete: %+v %v", told, err)
		}
	}
	noLeftovers(t)
}
