package volumes_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/volume/flex"
	"github.com/lariat-net/lariat/test/flextest"
	"github.com/lariat-net/lariat/test/guest/nfsd"
)

// F105: two hosts, with journals of their own, and one export. The one removes the volume and makes
// another one of its name, also while the other mounts: nothing that the other host does then
// touches it.
func TestF105ReplacedElsewhere(t *testing.T) {
	nfsd.Serve(t)
	dir, dir2 := place(t, "data"), place(t, "data-2")
	two := []string{"LARIAT_STATE_DIR=" + t.TempDir(), "LARIAT_RUN_DIR=" + t.TempDir()}
	purge, retain := below("v", "onRemove", "purge"), below("v", "onRemove", "retain")
	on2 := func(args ...string) flex.Reply {
		t.Helper()
		r := play(t, two, args...)
		if r.Status != flex.Success {
			t.Fatalf("%v: %+v", args, r)
		}
		return r
	}
	kept := func() {
		t.Helper()
		if data, err := os.ReadFile(export + "/v/f"); err != nil || string(data) != "theirs" {
			t.Errorf("the other host's data: %q %v", data, err)
		}
	}
	for _, facts := range []bool{false, true} {
		r := ok(t, "create", purge)
		mine := purge
		if facts {
			mine = below("v", "onRemove", "purge", "identity", r.Options["identity"])
		}
		if again := on2("create", purge); again.Options["identity"] != r.Options["identity"] || r.Options["identity"] == "" {
			t.Errorf("%+v %+v", r, again)
		}
		ok(t, "mount", dir, mine)
		ok(t, "unmount", dir)
		on2("delete", purge)
		fails(t, nil, "does not exist any more: there is no folder", "mount", dir, mine)
		nothingAt(t, dir)
		on2("create", retain)
		on2("mount", dir2, retain)
		must(t, os.WriteFile(dir2+"/f", []byte("theirs"), 0o644))
		fails(t, nil, "and folder "+server+":"+export+"/v is another", "mount", dir, mine)
		nothingAt(t, dir)
		fails(t, nil, "delete the volume on this host, which touches nothing", "create", mine)
		on2("unmount", dir2) // one machine plays both hosts: what is mounted here is not deleted
		for range 2 {
			if r := ok(t, "delete", mine); !strings.Contains(r.Message, "is kept") {
				t.Errorf("%+v", r)
			}
			kept()
		}
		// Used together, its creator's word counts.
		ok(t, "create", purge)
		ok(t, "mount", dir, purge)
		ok(t, "unmount", dir)
		if r := ok(t, "delete", purge); !strings.Contains(r.Message, "onRemove=retain of its creator says") {
			t.Errorf("%+v", r)
		}
		kept()
		// Replaced between the look and the mount.
		third := ok(t, "create", purge)
		if r, killed := call(t, flextest.KillAt("mount-verified"), "mount", dir, purge); !killed {
			t.Fatalf("the step was not passed: %+v %+v", r, third)
		}
		driver.Killed(t)
		ok(t, "mount", dir, purge)
		ok(t, "unmount", dir)
		must(t, os.RemoveAll(export+"/v"))
		on2("delete", purge)
		ok(t, "delete", purge)
		if exists(export + "/v") {
			t.Error("the folder is still there")
		}
	}
	noLeftovers(t)
}

// F159: another host has purged the volume under a mount, and made another one: the dead mount is
// not handed out. Unused it is made anew; who uses it is named.
func TestF159StaleMount(t *testing.T) {
	nfsd.Serve(t)
	dir := place(t, "data")
	anew := func() { // as another host does, and without a mark
		t.Helper()
		must(t, os.RemoveAll(export+"/stale"))
		must(t, os.Mkdir(export+"/stale", 0o755))
	}
	works := func() {
		t.Helper()
		if m := at(t, dir); len(m) != 1 {
			t.Fatalf("mounted: %+v", m)
		}
		must(t, os.WriteFile(dir+"/f", []byte("x"), 0o644))
		if !exists(export + "/stale/f") {
			t.Error("written elsewhere")
		}
	}
	plain := below("stale")
	ok(t, "mount", dir, plain)
	ok(t, "mount", dir, plain)
	anew()
	ok(t, "mount", dir, plain)
	works()
	f, err := os.Open(dir + "/f")
	must(t, err)
	defer f.Close()
	anew()
	fails(t, nil, "and stale", "mount", dir, plain)
	fails(t, nil, fmt.Sprintf("(%d)", os.Getpid()), "mount", dir, plain)
	ok(t, "mount", dir, below("stale", "onHang", "lazy"))
	works()
	must(t, f.Close())
	ok(t, "unmount", dir)
	// A volume that this host knows is not replaced by another.
	must(t, os.RemoveAll(export+"/stale"))
	ok(t, "create", below("stale", "onRemove", "purge"))
	ok(t, "mount", dir, plain)
	anew()
	fails(t, nil, "is another (identity unmarked", "mount", dir, plain)
	nothingAt(t, dir)
	ok(t, "delete", below("stale", "onRemove", "purge"))
	if !exists(export + "/stale") {
		t.Error("somebody else's folder was removed")
	}
	must(t, os.Remove(export+"/stale"))
	must(t, os.Remove(export+"/.lariat/stale.json"))
	noLeftovers(t)
}

// F158: work on an export of NFS 3 leaves no program behind that keeps the export mounted, out of sight.
func TestF158NothingKeepsTheExport(t *testing.T) {
	nfsd.Serve(t)
	sh(t, "pkill -x rpc.statd; rm -f /run/rpc.statd.pid")
	j := below("three", "mntOptions", "vers=3", "onRemove", "purge")
	ok(t, "create", j)
	ok(t, "delete", j)
	if out, err := exec.Command("pidof", "rpc.statd").Output(); err == nil {
		t.Errorf("rpc.statd runs: %s", out)
	}
	noLeftovers(t)
}

// F159: the server's name has several addresses, of which the first is dead. Mounts, and all work
// on the export, take the one that answers, with mount.nfs and without it, and the mount table
// shows the name.
func TestF159FirstAddressDead(t *testing.T) {
	nfsd.Serve(t)
	dir := place(t, "data")
	const pair = "pair.test"
	nfsd.Pair(t, pair)
	patient := []string{flex.TimeoutVariable + "=100s"} // mount.nfs gives up before, with the dead address
	try := func(t *testing.T, mnt, shows string) {
		t.Helper()
		j := options("name", "pair", "host", pair, "exportBase", export, "mntOptions", mnt, "onRemove", "purge")
		for _, args := range [][]string{{"create", j}, {"mount", dir, j}, {"mount", dir, j}} {
			if r := play(t, patient, args...); r.Status != flex.Success {
				t.Fatalf("%v: %+v", args, r)
			}
		}
		m := at(t, dir)
		if len(m) != 1 || m[0].Source != pair+":"+export+"/pair" || !strings.Contains(m[0].Super, shows) ||
			!strings.Contains(m[0].Super, "addr="+server) {
			t.Errorf("mounted: %+v", m)
		}
		must(t, os.WriteFile(dir+"/f", []byte("data"), 0o644))
		if data, err := os.ReadFile(export + "/pair/f"); err != nil || string(data) != "data" {
			t.Errorf("on the server: %q %v", data, err)
		}
		fails(t, patient, "is mounted at "+dir, "delete", j)
		for _, args := range [][]string{{"unmount", dir}, {"delete", j}} {
			if r := play(t, patient, args...); r.Status != flex.Success {
				t.Fatalf("%v: %+v", args, r)
			}
		}
		noLeftovers(t)
	}
	all := func(t *testing.T) {
		t.Helper()
		for shows, mnt := range map[string]string{
			"vers=4.2": "",
			"vers=4.1": "vers=4.1,atime,softerr,timeo=100,actimeo=5,nosharecache,max_connect=2," +
				"local_lock=none,proto=tcp,sec=sys",
			"vers=3": "vers=3,nolock,rsize=65536,wsize=65536,ac,acregmin=3,lookupcache=pos,nocto,noacl," +
				"nordirplus,noresvport,nconnect=2," +
				"tcp,mountproto=tcp,mountvers=3,relatime,nodiratime,noexec",
		} {
			t.Run(shows, func(t *testing.T) { try(t, mnt, shows) })
		}
	}
	t.Run("with mount.nfs", all)
	t.Run("with locks of NFS 3", func(t *testing.T) { // whose program is started, as mount.nfs does
		j := options("name", "locks", "host", pair, "export", export, "mntOptions", "vers=3")
		if r := play(t, patient, "mount", dir, j); r.Status != flex.Success {
			t.Fatalf("%+v", r)
		}
		sh(t, "pidof rpc.statd")
		f, err := os.Create(dir + "/locked")
		must(t, err)
		must(t, unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}))
		must(t, errors.Join(f.Close(), os.Remove(dir+"/locked")))
		ok(t, "unmount", dir)
	})
	t.Run("without it", func(t *testing.T) {
		hideMountNFS(t)
		all(t)
	})
	// All are dead: each is named.
	const gone = "gone.test"
	nfsd.Name(t, gone, nfsd.Dead, "192.168.9.9")
	fails(t, patient, "NFS server "+gone+":2049", "mount", dir, options("name", "x", "host", gone, "export", export))
	fails(t, patient, nfsd.Dead, "mount", dir, options("name", "x", "host", gone, "export", export))
	nothingAt(t, dir)
	noLeftovers(t)
}
