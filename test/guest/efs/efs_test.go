// Package efs_test runs the driver efs as kubelet does: the real SDK against an emulated AWS, and real mounts from the kernel's NFS server.
package efs_test

import (
	"bytes"
	"encoding/json"
	"errors"
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

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/efs"
	"github.com/lariat-net/lariat/pkg/volume/flex"
	"github.com/lariat-net/lariat/pkg/volume/mounts"
	"github.com/lariat-net/lariat/test/fakeaws"
	"github.com/lariat-net/lariat/test/guest"
	"github.com/lariat-net/lariat/test/guest/nfsd"
)

// killVariable names the step at which a driver, or its child, is killed. Only this test's binary knows it.
const killVariable = "LARIAT_TEST_KILL"

const (
	logFile = "/tmp/efs.log"
	state   = "/var/lib/lariat/volumes/efs"
)

// TestMain lets this binary be the driver and the driver's children, too.
func TestMain(m *testing.M) {
	child := os.Args[0] == "lariat-volume-child"
	if step := os.Getenv(killVariable); step != "" && (child || os.Args[0] == "efs") {
		volume.OnStep = func(name string) {
			if name != step {
				return
			}
			who := os.Getpid()
			if child {
				who = os.Getppid() // the driver dies, and with it this process
			}
			syscall.Kill(who, syscall.SIGKILL)
			select {}
		}
	}
	if child {
		mounts.RunChild()
	}
	if os.Args[0] == "efs" {
		flex.Main(flex.Program{Name: "efs", LogFile: logFile, Driver: func(log *slog.Logger) (volume.Driver, error) {
			return efs.New(efs.FromEnvironment(os.Getenv), log), nil
		}})
	}
	guest.Main(m, guest.Options{})
}

// host is an instance of an emulated AWS, on which the driver runs. Mount targets of its zone are the guest's NFS server, those of another
// zone are its other address.
type host struct {
	*fakeaws.Cloud
	env []string
}

func newHost(t *testing.T, lag int) *host {
	t.Helper()
	nfsd.Serve(t)
	c := fakeaws.New(t, fakeaws.Options{Lag: lag})
	c.AddInstance(fakeaws.Instance{SubnetID: "subnet-b", Zone: "eu-test-1b", SecurityGroups: []string{"sg-given"}}) // for its subnet and its group
	i := c.AddInstance(fakeaws.Instance{SubnetID: "subnet-a", Zone: "eu-test-1a", SecurityGroups: []string{"sg-own"}})
	c.MountTargetAddress(func(subnet string) netip.Addr {
		if subnet == "subnet-a" {
			return netip.MustParseAddr(nfsd.Server)
		}
		return netip.MustParseAddr(nfsd.Other)
	})
	t.Cleanup(func() { noSecrets(t) })
	return &host{c, c.Env(i.ID)}
}

func (h *host) call(t *testing.T, env []string, args ...string) (r flex.Reply, killed bool) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = "efs"
	cmd.Env = append(append(append(os.Environ(), flex.TimeoutVariable+"=60s"), h.env...), env...)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signaled() {
		return r, true
	}
	if r, err = flex.ParseReply(out); err != nil || bytes.Count(out, []byte("\n")) != 1 {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
	if strings.Contains(string(out), fakeaws.SecretAccessKey) {
		t.Errorf("%v: the secret key is in the answer: %s", args, out)
	}
	return r, false
}

// ok must succeed.
func (h *host) ok(t *testing.T, args ...string) flex.Reply {
	t.Helper()
	r, killed := h.call(t, nil, args...)
	if killed || r.Status != flex.Success {
		t.Fatalf("%v: %v %s: %s", args, killed, r.Status, r.Message)
	}
	return r
}

// fails must fail with words.
func (h *host) fails(t *testing.T, env []string, words string, args ...string) {
	t.Helper()
	if r, killed := h.call(t, env, args...); killed || r.Status != flex.Failure || !strings.Contains(r.Message, words) {
		t.Errorf("%v:\ngot  %s: %s\nwant words %s", args, r.Status, r.Message, words)
	}
}

// options of a volume as JSON.
func options(pairs ...string) string {
	m := map[string]string{}
	for i := 0; i < len(pairs); i += 2 {
		m[pairs[i]] = pairs[i+1]
	}
	data, _ := json.Marshal(m)
	return string(data)
}

func at(t *testing.T, dir string) []mounts.Entry {
	t.Helper()
	table, err := mounts.Read()
	must(t, err)
	return table.At(dir)
}

// place is a folder for a mount; what a test leaves there is detached.
func place(t *testing.T) string {
	t.Helper()
	dir := filepath.Join("/tmp/pods", strings.ReplaceAll(t.Name(), "/", "_"), "volumes", "lariat~efs", "data")
	t.Cleanup(func() {
		for unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) == nil {
		}
	})
	return dir
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// noSecrets: F160, keys are in no record and no log.
func noSecrets(t *testing.T) {
	t.Helper()
	files, _ := filepath.Glob(state + "/*/*")
	for _, f := range append(files, logFile) {
		if data, _ := os.ReadFile(f); strings.Contains(string(data), fakeaws.SecretAccessKey) || strings.Contains(string(data), fakeaws.AccessKeyID) {
			t.Errorf("keys in %s", f)
		}
	}
}

func noLeftovers(t *testing.T) {
	t.Helper()
	for _, pattern := range []string{state + "/*/*", "/run/lariat/volumes/efs/*"} {
		if left, _ := filepath.Glob(pattern); len(left) > 0 {
			t.Errorf("left over: %v", left)
		}
	}
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
	dir := place(t)
	j := options("name", "web", "subnets", "subnet-a,subnet-b", "securityGroups", "sg-given", "onRemove", "purge", "export", nfsd.Export, "kubernetes.io/mounterArgs.FsGroup", "1234")
	h.fails(t, nil, "volume web has no file system in eu-test-1: create makes it", "mount", dir, j)
	if r := h.ok(t, "create", j); r.Options["created"] != "true" || r.Options["fsid"] == "" {
		t.Errorf("create: %+v", r)
	}
	targets := h.MountTargets()
	if len(targets) != 2 || !slices.Equal(targets[0].SecurityGroups, []string{"sg-given"}) || !slices.Equal(targets[1].SecurityGroups, []string{"sg-given"}) {
		t.Errorf("%+v", targets)
	}
	h.ok(t, "mount", dir, j)
	h.ok(t, "mount", dir, "", j)
	stack := at(t, dir)
	if len(stack) != 1 || stack[0].Source != nfsd.Server+":"+nfsd.Export || !strings.Contains(stack[0].Options, "nosuid,nodev") {
		t.Fatalf("mounted: %+v", stack)
	}
	for _, o := range []string{"vers=4.1", "rsize=1048576", "wsize=1048576", "hard", "timeo=600", "retrans=2", "noresvport"} {
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
	h.fails(t, nil, "is mounted at "+dir, "delete", j)
	must(t, os.RemoveAll(state))
	h.fails(t, nil, "is mounted at "+dir, "delete", j) // the mount table knows
	h.ok(t, "mount", dir, j)
	h.ok(t, "unmount", dir)
	h.ok(t, "unmount", dir)
	if len(at(t, dir)) > 0 {
		t.Errorf("mounted: %+v", at(t, dir))
	}
	if r := h.ok(t, "delete", j); !strings.Contains(r.Message, "is removed, with its mount targets") {
		t.Errorf("delete: %+v", r)
	}
	h.ok(t, "delete", j)
	h.gone(t)
	// Without AWS.
	fixed := options("name", "fixed", "mountTargetIp", nfsd.Other, "export", nfsd.Export)
	h.env = nil
	h.ok(t, "create", fixed)
	h.ok(t, "mount", dir, fixed)
	if data, err := os.ReadFile(dir + "/f"); err != nil || string(data) != "data" {
		t.Errorf("by address: %q %v", data, err)
	}
	h.ok(t, "unmount", dir)
	h.ok(t, "delete", fixed)
	noLeftovers(t)
}

// F106, F160: access points need the program of amazon-efs-utils. Here a script has its place: it notes how it is called, and mounts as that does,
// from the address of a proxy.
func TestF106AccessPoint(t *testing.T) {
	h := newHost(t, -1)
	dir := place(t)
	fs := h.ok(t, "create", options("name", "shared", "onRemove", "purge")).Options["fsid"]
	j := options("name", "mine", "fsid", fs, "basePath", "/vols", "uid", "1000", "gid", "1000", "iam", "true", "export", nfsd.Export, "onRemove", "purge")
	point := h.ok(t, "create", j).Options["accessPointId"]
	h.fails(t, nil, "install the package amazon-efs-utils", "mount", dir, j)
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
	h.ok(t, "mount", dir, j)
	h.ok(t, "mount", dir, j)
	text, err := os.ReadFile(called)
	must(t, err)
	line, all, _ := strings.Cut(string(text), "\n")
	want := fs + ":" + nfsd.Export + " " + dir + " -o tls,nosuid,nodev,retry=0,nfsvers=4.1,rsize=1048576,wsize=1048576,hard,timeo=600,retrans=2,noresvport,rw,iam,accesspoint=" + point + ",mounttargetip=" + nfsd.Server
	if line != want {
		t.Errorf("called with\n%s\nwant\n%s", line, want)
	}
	if strings.Contains(all, fakeaws.SecretAccessKey) || strings.Contains(all, fakeaws.AccessKeyID) || !strings.Contains(all, "efs mount") {
		t.Errorf("arguments of all processes: %s", all)
	}
	if m := at(t, dir); len(m) != 1 || m[0].Source != "127.0.0.1:"+nfsd.Export {
		t.Errorf("mounted: %+v", m)
	}
	// Another one looks the same in the mount table.
	h.fails(t, nil, "would hide it", "mount", dir, options("name", "other", "fsid", fs, "tls", "true", "export", nfsd.Export))
	h.fails(t, nil, "is mounted at "+dir, "delete", j)
	h.fails(t, nil, "is mounted at "+dir, "delete", options("name", "shared"))
	h.ok(t, "unmount", dir)
	if r := h.ok(t, "delete", j); !strings.Contains(r.Message, "all data in it stay") {
		t.Errorf("delete: %+v", r)
	}
	h.ok(t, "delete", options("name", "shared"))
	h.gone(t)
	noLeftovers(t)
}

// F158: kill -9 at every step. The same call again must find its way: nothing twice, no orphan, no lost record.
func TestF158KilledAtEveryStep(t *testing.T) {
	h := newHost(t, -1)
	dir := place(t)
	own := options("name", "k", "onRemove", "purge", "export", nfsd.Export)
	other := func() string {
		return options("name", "p", "fsid", h.FileSystems()[0].ID, "basePath", "/b", "onRemove", "purge")
	}
	create, remove, mount, unmount := []string{"create", own}, []string{"delete", own}, []string{"mount", dir, own}, []string{"unmount", dir}
	try := func(verb []string, steps ...string) {
		t.Helper()
		for _, step := range steps {
			if r, killed := h.call(t, []string{killVariable + "=" + step}, verb...); !killed {
				t.Fatalf("%v: the step %s was not passed: %+v", verb, step, r)
			}
			if fs, mt, m := len(h.FileSystems()), len(h.MountTargets()), len(at(t, dir)); fs > 1 || mt > 1 || m > 1 {
				t.Errorf("%v, killed at %s: %d file systems, %d mount targets, %d mounts", verb, step, fs, mt, m)
			}
		}
	}
	// Killed at one step after the other, each call goes on from where the last one was.
	try(create, "journal-written", "create-journalled", "file-system-asked", "mount-target-asked", "create-recorded")
	if r := h.ok(t, create...); r.Options["created"] != "true" || len(h.MountTargets()) != 1 {
		t.Errorf("create: %+v", r)
	}
	p := other()
	try([]string{"create", p}, "access-point-asked")
	if h.ok(t, "create", p); len(h.AccessPoints()) != 1 {
		t.Errorf("%+v", h.AccessPoints())
	}
	try([]string{"delete", p}, "access-point-removed")
	h.ok(t, "delete", p)
	for _, step := range []string{"mount-journalled", "before-mount", "mounted"} {
		try(mount, step)
		if h.ok(t, mount...); len(at(t, dir)) != 1 {
			t.Errorf("%s: mounted: %+v", step, at(t, dir))
		}
		h.ok(t, unmount...)
	}
	h.ok(t, mount...)
	try(unmount, "unmounted")
	h.ok(t, unmount...)
	h.ok(t, mount...)
	try(unmount, "unmount-proven")
	if h.ok(t, unmount...); len(at(t, dir)) > 0 {
		t.Errorf("mounted: %+v", at(t, dir))
	}
	try(remove, "delete-journalled", "mount-target-removed", "mount-targets-gone", "file-system-removed", "delete-done")
	h.ok(t, remove...)
	h.gone(t)
	noLeftovers(t)
}

// F159: the mount target does not answer: each call ends by its deadline and says why. F109: what is hostile is refused.
func TestF159ServerGone(t *testing.T) {
	h := newHost(t, -1)
	dir := place(t)
	fresh := dir + "-fresh"
	j := options("name", "v", "onRemove", "purge", "export", nfsd.Export)
	h.ok(t, "create", j)
	h.ok(t, "mount", dir, j)
	drop := func(how string) {
		t.Helper()
		out, err := exec.Command("iptables", how, "INPUT", "-d", nfsd.Server, "-p", "tcp", "--dport", "2049", "-j", "DROP").CombinedOutput()
		if err != nil {
			t.Fatalf("%v %s", err, out)
		}
	}
	drop("-A")
	start := time.Now()
	h.fails(t, []string{flex.TimeoutVariable + "=6s"}, "do the mount target's security groups let this instance in", "mount", fresh, j)
	if r, _ := h.call(t, []string{flex.TimeoutVariable + "=15s"}, "unmount", dir); r.Status != flex.Success || len(at(t, dir)) > 0 {
		t.Errorf("unmount: %+v", r)
	}
	if took := time.Since(start); took > 30*time.Second {
		t.Errorf("it took %s", took)
	}
	drop("-D")
	h.ok(t, "mount", dir, j)
	h.ok(t, "unmount", dir)
	for words, bad := range map[string]string{
		"only letters, digits":     options("name", "../x"),
		"fsid \"-o\" is none":      options("name", "x", "fsid", "-o"),
		"is not among the mount":   options("name", "x", "mntOptions", "foo,suid"),
		"is allowed only":          options("name", "x", "mntOptions", "suid"),
		"not a plain absolute":     options("name", "x", "export", "/a/../b"),
		"4097 octets":              options("name", "x", "tags", strings.Repeat("x", 4097)),
		"subnets: \"--\" is no id": options("name", "x", "subnets", "--"),
	} {
		h.fails(t, nil, words, "create", bad)
		h.fails(t, nil, words, "mount", fresh, bad)
	}
	if len(h.FileSystems()) != 1 {
		t.Errorf("%+v", h.FileSystems())
	}
	h.ok(t, "delete", j)
	h.gone(t)
	noLeftovers(t)
}
