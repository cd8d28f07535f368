package efs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/test/fakeaws"
)

func TestMain(m *testing.M) {
	pauses.First, pauses.Most = 10*time.Millisecond, 100*time.Millisecond
	os.Exit(m.Run())
}

// cloudOf is an emulated AWS with an instance, in whose environment this process is then.
func cloudOf(t *testing.T) (*fakeaws.Cloud, *fakeaws.Instance) {
	t.Helper()
	c := fakeaws.New(t, fakeaws.Options{Lag: 1})
	// for its subnet and its group
	c.AddInstance(fakeaws.Instance{SubnetID: "subnet-b", Zone: "eu-test-1b", SecurityGroups: []string{"sg-other"}})
	i := c.AddInstance(fakeaws.Instance{SubnetID: "subnet-a", Zone: "eu-test-1a", SecurityGroups: []string{"sg-own"}})
	for _, pair := range c.Env(i.ID) {
		name, value, _ := strings.Cut(pair, "=")
		t.Setenv(name, value)
	}
	return c, i
}

func driver(t *testing.T) *Driver {
	t.Helper()
	dir := t.TempDir()
	return New(Config{StateDir: dir, RunDir: dir}, slog.New(slog.DiscardHandler))
}

type options = map[string]string

func create(t *testing.T, d *Driver, name string, o options) volume.Reply {
	t.Helper()
	r, err := d.Create(t.Context(), volume.Request{Name: name, Options: o})
	if err != nil {
		t.Fatalf("create %s %v: %v", name, o, err)
	}
	return r
}

func remove(t *testing.T, d *Driver, name string, o options) volume.Reply {
	t.Helper()
	r, err := d.Delete(t.Context(), volume.Request{Name: name, Options: o})
	if err != nil {
		t.Fatalf("delete %s %v: %v", name, o, err)
	}
	return r
}

// F106: a file system of its own, with mount targets in the subnets asked for and the groups given; again,
// from a host that knows nothing; removed with all that was made, and nothing else.
func TestF106FileSystem(t *testing.T) {
	c, _ := cloudOf(t)
	d := driver(t)
	o := options{"subnets": "subnet-a, subnet-b", "securityGroups": "sg-other", "performanceMode": "generalPurpose",
		"throughputMode": "elastic", "tags": "team=x,empty=", "onRemove": "purge"}
	r := create(t, d, "web", o)
	fs := c.FileSystems()
	if len(fs) != 1 || r.Options["created"] != "true" || r.Options["fsid"] != fs[0].ID || !fs[0].Encrypted ||
		fs[0].ThroughputMode != "elastic" {
		t.Fatalf("%+v %+v", r, fs)
	}
	if tags := fs[0].Tags; tags["Name"] != "web" || tags["lariat:volume"] != "web" || tags["team"] != "x" ||
		tags["lariat:on-remove"] != "purge" || len(tags) != 5 || c.Calls("TagResource") > 0 {
		t.Errorf("tags: %v", tags)
	}
	targets := c.MountTargets()
	if len(targets) != 2 {
		t.Fatalf("%+v", targets)
	}
	for _, m := range targets {
		if m.State != "available" || !slices.Equal(m.SecurityGroups, []string{"sg-other"}) {
			t.Errorf("%+v", m)
		}
	}
	if c.Calls("AuthorizeSecurityGroupIngress")+c.Calls("CreateSecurityGroup")+
		c.Calls("ModifyMountTargetSecurityGroups") > 0 {
		t.Error("security groups were touched")
	}
	// Given back, and from elsewhere.
	back := options{"fsid": r.Options["fsid"], "created": "true", "name": "web", "onRemove": "purge"}
	for _, again := range []options{o, back, {}} {
		if got := create(t, d, "web", again); got.Options["fsid"] != fs[0].ID || got.Options["created"] != "true" {
			t.Errorf("%v: %+v", again, got)
		}
		if got := create(t, driver(t), "web", again); got.Options["fsid"] != fs[0].ID || got.Options["created"] != "true" {
			t.Errorf("%v elsewhere: %+v", again, got)
		}
	}
	for words, differs := range map[string]options{
		"performanceMode=generalPurpose, not maxIO":         {"performanceMode": "maxIO"},
		"throughputMode=elastic, not bursting":              {"throughputMode": "bursting"},
		"encrypted=true, not false":                         {"encrypted": "no"},
		"has the security groups sg-other, not sg-own":      {"securityGroups": "sg-own"},
		"exists on this host as a file system of its own, ": {"fsid": "fs-01234567"},
	} {
		if _, err := d.Create(t.Context(), volume.Request{Name: "web", Options: differs}); !errors.Is(err,
			volume.ErrConflict) || !strings.Contains(err.Error(), words) {
			t.Errorf("%v: %v", differs, err)
		}
	}
	if r := remove(t, d, "web", options{"onRemove": "retain"}); !strings.Contains(r.Message,
		"is kept, as onRemove=retain says") || len(c.FileSystems()) != 1 {
		t.Errorf("%+v", r)
	}
	if r := remove(t, driver(t), "web", options{"onRemove": "purge"}); !strings.Contains(r.Message, fs[0].ID+
		" is removed") || len(c.FileSystems())+len(c.MountTargets()) > 0 {
		t.Errorf("%+v %v %v", r, c.FileSystems(), c.MountTargets())
	}
	remove(t, d, "web", options{"onRemove": "purge"})
}

// F106: without subnets and groups, those of the instance; what another host has made in this zone is as good.
func TestF106InstancesSubnet(t *testing.T) {
	c, i := cloudOf(t)
	create(t, driver(t), "v", nil)
	if m := c.MountTargets(); len(m) != 1 || m[0].SubnetID != i.SubnetID ||
		!slices.Equal(m[0].SecurityGroups, []string{"sg-own"}) {
		t.Errorf("%+v", m)
	}
	other := c.AddInstance(fakeaws.Instance{SubnetID: "subnet-a2", Zone: "eu-test-1a", VPCID: i.VPCID,
		SecurityGroups: []string{"sg-own"}})
	for _, pair := range c.RoleEnv(other.ID) {
		name, value, _ := strings.Cut(pair, "=")
		t.Setenv(name, value)
	}
	create(t, driver(t), "v", nil)
	if m := c.MountTargets(); len(m) != 1 {
		t.Errorf("%+v", m)
	}
	// A subnet that was named is not silently another.
	_, err := driver(t).Create(t.Context(), volume.Request{Name: "v", Options: options{"subnets": "subnet-a2"}})
	if !errors.Is(err, volume.ErrConflict) ||
		!strings.Contains(err.Error(), "subnet-a2: elasticfilesystem:CreateMountTarget: MountTargetConflict") {
		t.Errorf("%v", err)
	}
	for words, o := range map[string]options{
		"SubnetNotFound":        {"subnets": "subnet-none"},
		"fs-01234567 does not":  {"fsid": "fs-01234567"},
		"SecurityGroupNotFound": {"subnets": "subnet-b", "securityGroups": "sg-none"},
	} {
		if _, err := driver(t).Create(t.Context(), volume.Request{Name: "v", Options: o}); !volume.IsFinal(err) ||
			!strings.Contains(err.Error(), words) {
			t.Errorf("%v: %v", o, err)
		}
	}
}

// F106: many volumes on one file system, by access points, beyond a page of the list.
func TestF106AccessPoints(t *testing.T) {
	c, _ := cloudOf(t)
	d := driver(t)
	fs := create(t, d, "shared", options{"onRemove": "purge"}).Options["fsid"]
	o := options{"fsid": fs, "basePath": "/vols", "uid": "1000", "gid": "1001", "directoryPerms": "0750",
		"onRemove": "purge"}
	a, err := open(t.Context(), "", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for n := range 120 {
		v, err := ParseVolume(volume.Request{Name: fmt.Sprint("p", n), Options: o})
		if err == nil {
			_, err = a.askAccessPoint(t.Context(), v)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	first := create(t, d, "mine", o)
	again := create(t, driver(t), "mine", o)
	points := c.AccessPoints()
	if len(points) != 121 || first.Options["accessPointId"] != again.Options["accessPointId"] ||
		first.Options["created"] != "true" {
		t.Fatalf("%d %+v %+v", len(points), first, again)
	}
	p := points[120]
	if p.ID != first.Options["accessPointId"] || p.RootDirectory.Path != "/vols/mine" ||
		p.RootDirectory.CreationInfo.Permissions != "0750" || p.PosixUser.Uid != 1000 || p.PosixUser.Gid != 1001 ||
		p.Tags["lariat:volume"] != "mine" {
		t.Errorf("%+v", p)
	}
	_, err = driver(t).Create(t.Context(),
		volume.Request{Name: "mine", Options: options{"fsid": fs, "basePath": "/vols", "uid": "1", "gid": "1"}})
	if !errors.Is(err, volume.ErrConflict) {
		t.Errorf("another user: %v", err)
	}
	if r := create(t, d, "given", options{"fsid": fs, "accessPoint": p.ID}); r.Options["created"] != "false" {
		t.Errorf("%+v", r)
	}
	if r := remove(t, d, "given",
		options{"fsid": fs, "accessPoint": p.ID, "onRemove": "purge"}); !strings.Contains(r.Message, "is kept") {
		t.Errorf("%+v", r)
	}
	if r := remove(t, d, "mine", nil); !strings.Contains(r.Message,
		"is removed; the folder /vols/mine and all data in it stay on "+fs) || len(c.AccessPoints()) != 120 {
		t.Errorf("%+v", r)
	}
	// Others' data is on it.
	_, err = d.Delete(t.Context(), volume.Request{Name: "shared"})
	if !errors.Is(err, volume.ErrInUse) || !strings.Contains(err.Error(), "has the access point") ||
		len(c.MountTargets()) == 0 {
		t.Errorf("%v", err)
	}
}

// F106: what Lariat did not make for this volume is not removed, whatever is asked.
func TestF106OnlyOurs(t *testing.T) {
	c, _ := cloudOf(t)
	d := driver(t)
	fs := create(t, d, "a", nil).Options["fsid"]
	if r := create(t, d, "b", options{"fsid": fs}); r.Options["created"] != "false" {
		t.Errorf("%+v", r)
	}
	if r := remove(t, d, "b", options{"fsid": fs, "onRemove": "purge", "created": "true"}); !strings.Contains(r.Message,
		"is kept: Lariat did not create it for volume b") || len(c.FileSystems()) != 1 {
		t.Errorf("%+v", r)
	}
}

// F158: throttled and with lost answers, one file system, one mount target, one access point, and again none.
func TestF158Throttled(t *testing.T) {
	c, _ := cloudOf(t)
	for _, action := range []string{"CreateFileSystem", "DescribeFileSystems", "CreateMountTarget", "DescribeMountTargets",
		"DeleteMountTarget", "DeleteFileSystem"} {
		c.Fail(action, "ThrottlingException", 1)
		c.Lose(action, 1)
	}
	d := driver(t)
	create(t, d, "v", options{"onRemove": "purge"})
	if len(c.FileSystems()) != 1 || len(c.MountTargets()) != 1 {
		t.Errorf("%+v %+v", c.FileSystems(), c.MountTargets())
	}
	remove(t, d, "v", nil)
	if len(c.FileSystems())+len(c.MountTargets()) > 0 {
		t.Errorf("%+v %+v", c.FileSystems(), c.MountTargets())
	}
}

// F159: AWS is slow: the call ends by its deadline and says on what, and the next one goes on.
func TestF159Slow(t *testing.T) {
	c := fakeaws.New(t, fakeaws.Options{Lag: 12})
	i := c.AddInstance(fakeaws.Instance{})
	for _, pair := range c.Env(i.ID) {
		name, value, _ := strings.Cut(pair, "=")
		t.Setenv(name, value)
	}
	d := driver(t)
	calls := 0
	for {
		ctx, cancel := context.WithTimeoutCause(t.Context(), 300*time.Millisecond, volume.Timeout(300*time.Millisecond))
		_, err := d.Create(ctx, volume.Request{Name: "v"})
		cancel()
		if calls++; err == nil || calls == 20 {
			break
		}
		if !errors.Is(err, context.DeadlineExceeded) || volume.IsFinal(err) {
			t.Fatal(err)
		}
	}
	if len(c.FileSystems()) != 1 || calls < 2 || calls == 20 {
		t.Errorf("%d calls, %+v", calls, c.FileSystems())
	}
}

// F158: two hosts at once make one volume.
func TestF158TwoHosts(t *testing.T) {
	c, _ := cloudOf(t)
	var wg sync.WaitGroup
	for range 3 {
		d := driver(t)
		wg.Go(func() {
			if _, err := d.Create(t.Context(),
				volume.Request{Name: "v", Options: options{"subnets": "subnet-a,subnet-b"}}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(c.FileSystems()) != 1 || len(c.MountTargets()) != 2 {
		t.Errorf("%+v %+v", c.FileSystems(), c.MountTargets())
	}
}

// F106: the mount target of the instance's zone.
func TestF106ZoneAndName(t *testing.T) {
	c, i := cloudOf(t)
	d := driver(t)
	fs := create(t, d, "v", options{"subnets": "subnet-a,subnet-b"}).Options["fsid"]
	a, err := open(t.Context(), "", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	host, err := a.server(t.Context(), fs)
	if err != nil || !slices.ContainsFunc(c.MountTargets(), func(m fakeaws.MountTarget) bool {
		return m.Zone == i.Zone &&
			m.IP.String() == host
	}) {
		t.Errorf("%s %v", host, err)
	}
	// Names of all partitions are the SDK's knowledge.
	for region, want := range map[string]string{
		"eu-central-1": "fs-1.efs.eu-central-1.amazonaws.com", "cn-north-1": "fs-1.efs.cn-north-1.amazonaws.com.cn",
		"us-gov-west-1": "fs-1.efs.us-gov-west-1.amazonaws.com", "eusc-de-east-1": "fs-1.efs.eusc-de-east-1.amazonaws.eu",
	} {
		a.Config.Region = region
		if got, err := a.dnsName(t.Context(), "fs-1"); err != nil || got != want {
			t.Errorf("%s: %s %v", region, got, err)
		}
	}
	if got := fileSystemName("fs-1",
		url.URL{Host: "elasticfilesystem.xx-new-1.example"}); got != "fs-1.efs.xx-new-1.example" {
		t.Error(got)
	}
}

// F160: keys appear in no record and no error.
func TestF160NoSecrets(t *testing.T) {
	c, _ := cloudOf(t)
	dir := t.TempDir()
	d := New(Config{StateDir: dir, RunDir: dir}, slog.New(slog.DiscardHandler))
	create(t, d, "v", nil)
	c.Fail("DescribeFileSystems", "AccessDeniedException", 1)
	_, err := d.Create(t.Context(), volume.Request{Name: "v"})
	if err == nil || !strings.Contains(err.Error(), "elasticfilesystem:DescribeFileSystems") ||
		strings.Contains(err.Error(), fakeaws.SecretAccessKey) {
		t.Errorf("%v", err)
	}
	files, _ := filepath.Glob(dir + "/efs/*/*")
	for _, f := range files {
		if data, _ := os.ReadFile(f); strings.Contains(string(data), fakeaws.SecretAccessKey) ||
			strings.Contains(string(data), fakeaws.AccessKeyID) {
			t.Errorf("%s: %s", f, data)
		}
	}
	if len(files) == 0 {
		t.Error("no records")
	}
}
