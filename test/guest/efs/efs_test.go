// Package efs_test runs the driver efs as kubelet does: the real SDK against an emulated AWS, and real mounts
// from the kernel's NFS server.
package efs_test

import (
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/efs"
	"github.com/lariat-net/lariat/pkg/volume/flex"
	"github.com/lariat-net/lariat/test/fakeaws"
	"github.com/lariat-net/lariat/test/flextest"
	"github.com/lariat-net/lariat/test/guest"
	"github.com/lariat-net/lariat/test/guest/nfsd"
)

var driver = flextest.Driver{Name: "efs", Secret: fakeaws.SecretAccessKey, New: func(log *slog.Logger) (volume.Driver,
	error) {
	return efs.New(efs.FromEnvironment(os.Getenv), log), nil
}}

func TestMain(m *testing.M) { driver.Main(m, guest.Options{}) }

// Short names for what all tests say.
var options, at, must = flextest.Options, flextest.At, flextest.Must

// host is an instance of an emulated AWS, on which the driver runs. Mount targets of its zone are the guest's
// NFS server, those of another zone are its other address.
type host struct {
	*fakeaws.Cloud
	flextest.Driver
}

func newHost(t *testing.T, lag int) *host {
	t.Helper()
	nfsd.Serve(t)
	c := fakeaws.New(t, fakeaws.Options{Lag: lag})
	// for its subnet and its group
	c.AddInstance(fakeaws.Instance{SubnetID: "subnet-b", Zone: "eu-test-1b", SecurityGroups: []string{"sg-given"}})
	i := c.AddInstance(fakeaws.Instance{SubnetID: "subnet-a", Zone: "eu-test-1a", SecurityGroups: []string{"sg-own"}})
	c.MountTargetAddress(func(subnet string) netip.Addr {
		if subnet == "subnet-a" {
			return netip.MustParseAddr(nfsd.Server)
		}
		return netip.MustParseAddr(nfsd.Other)
	})
	t.Cleanup(func() { noSecrets(t) })
	h := &host{c, driver}
	h.Driver.Env = c.Env(i.ID)
	return h
}

// noSecrets: F160, keys are in no record and no log.
func noSecrets(t *testing.T) {
	t.Helper()
	files, _ := filepath.Glob(driver.StateDir() + "/*/*")
	for _, f := range append(files, driver.LogFile()) {
		if data, _ := os.ReadFile(f); strings.Contains(string(data), fakeaws.SecretAccessKey) ||
			strings.Contains(string(data), fakeaws.AccessKeyID) {
			t.Errorf("keys in %s", f)
		}
	}
}

func (h *host) noLeftovers(t *testing.T) {
	t.Helper()
	h.NoRecords(t)
	h.NoProcesses(t)
}

// gone: nothing of it is in AWS any more.
func (h *host) gone(t *testing.T) {
	t.Helper()
	if fs, mt, ap := h.FileSystems(), h.MountTargets(), h.AccessPoints(); len(fs)+len(mt)+len(ap) > 0 {
		t.Errorf("left in AWS: %+v %+v %+v", fs, mt, ap)
	}
}

// F106, F155: the life of a volume.
func TestF106Life(t *testing.T) {
	h := newHost(t, 1)
	dir := h.Place(t, "data")
	j := options("name", "web", "subnets", "subnet-a,subnet-b", "securityGroups", "sg-given", "onRemove", "purge",
		"export", nfsd.Export, "kubernetes.io/mounterArgs.FsGroup", "1234")
	h.Fails(t, nil, "volume web has no file system in eu-test-1: create makes it", "mount", dir, j)
	if r := h.OK(t, "create", j); r.Options["created"] != "true" || r.Options["fsid"] == "" {
		t.Errorf("create: %+v", r)
	}
	targets := h.MountTargets()
	if len(targets) != 2 || !slices.Equal(targets[0].SecurityGroups, []string{"sg-given"}) ||
		!slices.Equal(targets[1].SecurityGroups, []string{"sg-given"}) {
		t.Errorf("%+v", targets)
	}
	h.OK(t, "mount", dir, j)
	h.OK(t, "mount", dir, "", j)
	stack := at(t, dir)
	if len(stack) != 1 || stack[0].Source != nfsd.Server+":"+nfsd.Export || !strings.Contains(stack[0].Options,
		"nosuid,nodev") {
		t.Fatalf("mounted: %+v", stack)
	}
	for _, o := range []string{"vers=4.1", "rsize=1048576", "wsize=1048576", "hard", "timeo=600", "retrans=2",
		"noresvport"} {
		if !slices.Contains(strings.Split(stack[0].Super, ","), o) {
			t.Errorf("%s is not among %s", o, stack[0].Super)
		}
	}
	must(t, os.WriteFile(dir+"/f", []byte("data"), 0o644))
	if data, err := os.ReadFile(nfsd.Export + "/f"); err != nil || string(data) != "data" {
		t.Errorf("on the server: %q %v", data, err)
	}
	if fi, err := os.Stat(nfsd.Export); err != nil || fi.Sys().(*syscall.Stat_t).Gid != 1234 {
		t.Errorf("fsGroup: %v %v", fi, err)
	}
	h.Fails(t, nil, "is mounted at "+dir, "delete", j)
	must(t, os.RemoveAll(h.StateDir()))
	h.Fails(t, nil, "is mounted at "+dir, "delete", j) // the mount table knows
	h.OK(t, "mount", dir, j)
	h.OK(t, "unmount", dir)
	h.OK(t, "unmount", dir)
	if len(at(t, dir)) > 0 {
		t.Errorf("mounted: %+v", at(t, dir))
	}
	if r := h.OK(t, "delete", j); !strings.Contains(r.Message, "is removed, with its mount targets") {
		t.Errorf("delete: %+v", r)
	}
	h.OK(t, "delete", j)
	h.gone(t)
	// Without AWS.
	fixed := options("name", "fixed", "mountTargetIp", nfsd.Other, "export", nfsd.Export)
	h.Driver.Env = nil
	h.OK(t, "create", fixed)
	h.OK(t, "mount", dir, fixed)
	if data, err := os.ReadFile(dir + "/f"); err != nil || string(data) != "data" {
		t.Errorf("by address: %q %v", data, err)
	}
	h.OK(t, "unmount", dir)
	h.OK(t, "delete", fixed)
	h.noLeftovers(t)
}

// F106, F160: access points need the program of amazon-efs-utils. Here a script has its place: it notes how
// it is called, and mounts as that does, from the address of a proxy.
func TestF106AccessPoint(t *testing.T) {
	h := newHost(t, -1)
	dir := h.Place(t, "data")
	fs := h.OK(t, "create", options("name", "shared", "onRemove", "purge")).Options["fsid"]
	j := options("name", "mine", "fsid", fs, "basePath", "/vols", "uid", "1000", "gid", "1000", "iam", "true", "export",
		nfsd.Export, "onRemove", "purge")
	point := h.OK(t, "create", j).Options["accessPointId"]
	h.Fails(t, nil, "install the package amazon-efs-utils", "mount", dir, j)
	if len(at(t, dir)) > 0 {
		t.Errorf("mounted: %+v", at(t, dir))
	}
	const program, called = "/usr/local/sbin/mount.efs", "/tmp/mount.efs-called"
	must(t, os.MkdirAll(filepath.Dir(program), 0o755))
	must(t, os.WriteFile(program, []byte(`#!/bin/sh
printf '%s\n' "$*" > `+called+`
cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\0' ' ' >> `+called+`
nfs=$(printf %s "$4" | tr , '\n' | grep -vE '^(tls|iam|accesspoint=.*|region=.*|mounttargetip=.*)$' | paste -sd ,)
exec mount.nfs "127.0.0.1:${1#*:}" "$2" -o "$nfs"
`), 0o755))
	defer os.Remove(program)
	h.OK(t, "mount", dir, j)
	h.OK(t, "mount", dir, j)
	text, err := os.ReadFile(called)
	must(t, err)
	line, all, _ := strings.Cut(string(text), "\n")
	want := fs + ":" + nfsd.Export + " " + dir +
		" -o tls,nosuid,nodev,retry=0,nfsvers=4.1,rsize=1048576,wsize=1048576,hard,timeo=600,retrans=2," +
		"noresvport,rw,iam,accesspoint=" + point + ",mounttargetip=" + nfsd.Server
	if line != want {
		t.Errorf("called with\n%s\nwant\n%s", line, want)
	}
	if strings.Contains(all, fakeaws.SecretAccessKey) || strings.Contains(all, fakeaws.AccessKeyID) ||
		!strings.Contains(all, "efs mount") {
		t.Errorf("arguments of all processes: %s", all)
	}
	if m := at(t, dir); len(m) != 1 || m[0].Source != "127.0.0.1:"+nfsd.Export {
		t.Errorf("mounted: %+v", m)
	}
	// Another one looks the same in the mount table.
	h.Fails(t, nil, "would hide it", "mount", dir, options("name", "other", "fsid", fs, "tls", "true", "export",
		nfsd.Export))
	h.Fails(t, nil, "is mounted at "+dir, "delete", j)
	h.Fails(t, nil, "is mounted at "+dir, "delete", options("name", "shared"))
	h.OK(t, "unmount", dir)
	if r := h.OK(t, "delete", j); !strings.Contains(r.Message, "all data in it stay") {
		t.Errorf("delete: %+v", r)
	}
	h.OK(t, "delete", options("name", "shared"))
	h.gone(t)
	h.noLeftovers(t)
}

// F158: kill -9 at every step. The same call again must find its way: nothing twice, no orphan, no lost record.
func TestF158KilledAtEveryStep(t *testing.T) {
	h := newHost(t, -1)
	dir := h.Place(t, "data")
	own := options("name", "k", "onRemove", "purge", "export", nfsd.Export)
	other := func() string {
		return options("name", "p", "fsid", h.FileSystems()[0].ID, "basePath", "/b", "onRemove", "purge")
	}
	create, remove, mount, unmount := []string{"create", own}, []string{"delete", own}, []string{"mount", dir, own},
		[]string{"unmount", dir}
	try := func(verb []string, steps ...string) {
		t.Helper()
		for _, step := range steps {
			if r, killed := h.Call(t, flextest.KillAt(step), verb...); !killed {
				t.Fatalf("%v: the step %s was not passed: %+v", verb, step, r)
			}
			if fs, mt, m := len(h.FileSystems()), len(h.MountTargets()), len(at(t, dir)); fs > 1 || mt > 1 || m > 1 {
				t.Errorf("%v, killed at %s: %d file systems, %d mount targets, %d mounts", verb, step, fs, mt, m)
			}
		}
	}
	// Killed at one step after the other, each call goes on from where the last one was.
	try(create, "journal-written", "create-journalled", "file-system-asked", "mount-target-asked", "create-recorded")
	if r := h.OK(t, create...); r.Options["created"] != "true" || len(h.MountTargets()) != 1 {
		t.Errorf("create: %+v", r)
	}
	p := other()
	try([]string{"create", p}, "access-point-asked")
	if h.OK(t, "create", p); len(h.AccessPoints()) != 1 {
		t.Errorf("%+v", h.AccessPoints())
	}
	try([]string{"delete", p}, "access-point-removed")
	h.OK(t, "delete", p)
	for _, step := range []string{"mount-journalled", "before-mount", "mounted"} {
		try(mount, step)
		if h.OK(t, mount...); len(at(t, dir)) != 1 {
			t.Errorf("%s: mounted: %+v", step, at(t, dir))
		}
		h.OK(t, unmount...)
	}
	h.OK(t, mount...)
	try(unmount, "unmounted")
	h.OK(t, unmount...)
	h.OK(t, mount...)
	try(unmount, "unmount-proven")
	if h.OK(t, unmount...); len(at(t, dir)) > 0 {
		t.Errorf("mounted: %+v", at(t, dir))
	}
	try(remove, "delete-journalled", "mount-target-removed", "mount-targets-gone", "file-system-removed", "delete-done")
	h.OK(t, remove...)
	h.gone(t)
	h.noLeftovers(t)
}

// F159: the mount target does not answer: each call ends by its deadline and says why. F109: what is hostile
// is refused.
func TestF159ServerGone(t *testing.T) {
	h := newHost(t, -1)
	dir := h.Place(t, "data")
	fresh := dir + "-fresh"
	j := options("name", "v", "onRemove", "purge", "export", nfsd.Export)
	h.OK(t, "create", j)
	h.OK(t, "mount", dir, j)
	drop := func(how string) {
		t.Helper()
		out, err := exec.Command("iptables", how, "INPUT", "-d", nfsd.Server, "-p", "tcp", "--dport", "2049", "-j",
			"DROP").CombinedOutput()
		if err != nil {
			t.Fatalf("%v %s", err, out)
		}
	}
	drop("-A")
	start := time.Now()
	h.Fails(t, []string{flex.TimeoutVariable + "=6s"}, "do the mount target's security groups let this instance in",
		"mount", fresh, j)
	if r, _ := h.Call(t, []string{flex.TimeoutVariable + "=15s"}, "unmount", dir); r.Status != flex.Success ||
		len(at(t, dir)) > 0 {
		t.Errorf("unmount: %+v", r)
	}
	if took := time.Since(start); took > 30*time.Second {
		t.Errorf("it took %s", took)
	}
	drop("-D")
	h.OK(t, "mount", dir, j)
	h.OK(t, "unmount", dir)
	for words, bad := range map[string]string{
		"only letters, digits":     options("name", "../x"),
		"fsid \"-o\" is none":      options("name", "x", "fsid", "-o"),
		"is not among the mount":   options("name", "x", "mntOptions", "foo,suid"),
		"is allowed only":          options("name", "x", "mntOptions", "suid"),
		"not a plain absolute":     options("name", "x", "export", "/a/../b"),
		"4097 octets":              options("name", "x", "tags", strings.Repeat("x", 4097)),
		"subnets: \"--\" is no id": options("name", "x", "subnets", "--"),
	} {
		h.Fails(t, nil, words, "create", bad)
		h.Fails(t, nil, words, "mount", fresh, bad)
	}
	if len(h.FileSystems()) != 1 {
		t.Errorf("%+v", h.FileSystems())
	}
	h.OK(t, "delete", j)
	h.gone(t)
	h.noLeftovers(t)
}

// F159: the file system's name has two addresses, of which the first is dead: what answers is
// mounted, at once, by the name.
func TestF159FirstAddressDead(t *testing.T) {
	h := newHost(t, -1)
	dir := h.Place(t, "data")
	patient := []string{flex.TimeoutVariable + "=100s"}
	j := options("name", "pair", "onRemove", "purge", "export", nfsd.Export)
	name := h.OK(t, "create", j).Options["fsid"] + ".efs.eu-test-1.amazonaws.com"
	nfsd.Pair(t, name)
	for _, mnt := range []string{"", "vers=4.0"} {
		j := options("name", "pair", "onRemove", "purge", "export", nfsd.Export, "mntOptions", mnt)
		for range 2 {
			if r := h.Play(t, patient, "mount", dir, j); r.Status != flex.Success {
				t.Fatalf("%+v", r)
			}
		}
		m := at(t, dir)
		if len(m) != 1 || m[0].Source != name+":"+nfsd.Export || !strings.Contains(m[0].Super, "addr="+nfsd.Server) {
			t.Errorf("mounted: %+v", m)
		}
		h.Fails(t, nil, "is mounted at "+dir, "delete", j)
		h.OK(t, "unmount", dir)
	}
	h.OK(t, "delete", j)
	h.gone(t)
	h.noLeftovers(t)
}
