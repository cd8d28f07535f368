package ebs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/cloud"
	"github.com/lariat-net/lariat/pkg/volume/mounts"
	"github.com/lariat-net/lariat/test/fakeaws"
)

// TestMain lets this binary be the driver's children.
func TestMain(m *testing.M) {
	mounts.RunChild()
	pauses = cloud.Pauses{First: 4 * time.Millisecond, Most: 100 * time.Millisecond}
	os.Exit(m.Run())
}

const (
	self  = "i-00000000000000001"
	other = "i-00000000000000002"
)

// lab is a cloud without devices and a driver in its first instance. What needs a device is in test/guest/ebs.
type lab struct {
	*testing.T
	*fakeaws.Cloud
	d   *Driver
	ctx context.Context
}

func newLab(t *testing.T, lag int, c Config) *lab {
	t.Helper()
	l := &lab{T: t, Cloud: fakeaws.New(t, fakeaws.Options{Lag: lag})}
	l.AddInstance(fakeaws.Instance{ID: self, Nitro: true, Zone: "eu-test-1a"})
	l.AddInstance(fakeaws.Instance{ID: other, Nitro: true, Zone: "eu-test-1a", PrivateDNSName: "node-2.internal"})
	l.AddInstance(fakeaws.Instance{ID: "i-00000000000000003", Nitro: true, Zone: "eu-test-1b",
		PrivateDNSName: "node-3.internal"})
	l.AddInstance(fakeaws.Instance{ID: "i-00000000000000004", Nitro: true, Zone: "eu-test-1a",
		PrivateDNSName: "node-4.internal", Type: "t3.nano", MaxVolumes: 2, NICs: 1})
	for _, e := range l.Env(self) {
		name, value, _ := strings.Cut(e, "=")
		t.Setenv(name, value)
	}
	c.StateDir, c.RunDir = t.TempDir(), t.TempDir()
	l.d = New(c, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithTimeoutCause(t.Context(), 60*time.Second, volume.Timeout(60*time.Second))
	t.Cleanup(cancel)
	l.ctx = ctx
	return l
}

// short is for what does not end.
func (l *lab) short() (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(l.ctx, 3*time.Second, volume.Timeout(3*time.Second))
}

func request(name string, pairs ...string) volume.Request {
	o := map[string]string{}
	for i := 0; i < len(pairs); i += 2 {
		o[pairs[i]] = pairs[i+1]
	}
	return volume.Request{Name: name, Options: o}
}

func (l *lab) ok(err error) {
	l.Helper()
	if err != nil {
		l.Fatal(err)
	}
}

// says is for an error with words, of a kind unless that is nil.
func (l *lab) says(err, kind error, words string) {
	l.Helper()
	if err == nil || !strings.Contains(err.Error(), words) || kind != nil && !errors.Is(err, kind) {
		l.Errorf("got  %v\nwant %v with words %s", err, kind, words)
	}
}

func (l *lab) only() fakeaws.Volume {
	l.Helper()
	all := l.Volumes()
	if len(all) != 1 {
		l.Fatalf("%d volumes: %+v", len(all), all)
	}
	return all[0]
}

// F106: create is repeatable over lost answers, a lost journal, throttling, tokens that AWS remembers; what
// differs is a conflict.
func TestF106Create(t *testing.T) {
	l := newLab(t, 2, Config{Cluster: "blue"})
	r := request("v", "size", "10", "iops", "4000", "throughput", "200", "kmsKeyId", "alias/k", "onRemove", "purge")
	l.Lose("CreateVolume", 1)
	l.Fail("CreateVolume", "RequestLimitExceeded", 2)
	l.Fail("DescribeVolumes", "RequestLimitExceeded", 2)
	for range 2 {
		told, err := l.d.Create(l.ctx, r)
		l.ok(err)
		if told.Options["created"] != "true" {
			t.Errorf("%+v", told)
		}
		l.ok(os.RemoveAll(l.d.volumes.Dir))
	}
	first := l.only()
	if first.IOPS != 4000 || first.Throughput != 200 || !first.Encrypted || first.KMSKeyID != "alias/k" ||
		first.Tags[tagCluster] != "blue" || first.Tags[tagFileSystem] != none {
		t.Errorf("%+v", first)
	}
	_, err := l.d.Create(l.ctx, request("v", "size", "11"))
	l.says(err, volume.ErrConflict, "size is 10, not 11")
	_, err = l.d.Create(l.ctx, request("v", "size", "10", "availabilityZone", "eu-test-1b"))
	l.says(err, volume.ErrConflict, "availabilityZone is eu-test-1a, not eu-test-1b")
	_, err = l.d.Create(l.ctx, request("w"))
	l.says(err, volume.ErrInvalid, "neither size (in GiB) nor snapshotID")
	_, err = l.d.Create(l.ctx, request("w", "size", "1", "volumeType", "io2", "iops", "5000"))
	l.says(err, volume.ErrInvalid, "ec2:CreateVolume: InvalidParameterValue")

	// Deleted and made anew, under the name and with the token that AWS knows; then with other values.
	for range 2 {
		_, err = l.d.Delete(l.ctx, r)
		l.ok(err)
		_, err = l.d.Create(l.ctx, r)
		l.ok(err)
	}
	_, err = l.d.Delete(l.ctx, r)
	l.ok(err)
	_, err = l.d.Create(l.ctx, request("v", "size", "7"))
	l.ok(err)
	if v := l.only(); v.ID == first.ID || v.Size != 7 {
		t.Errorf("%+v", v)
	}
	// Another cluster's volume of the name is another volume.
	l.d.config.Cluster = ""
	_, err = l.d.Create(l.ctx, request("v", "size", "7"))
	l.ok(err)
	if n := len(l.Volumes()); n != 2 {
		t.Errorf("%d volumes", n)
	}
}

// F106: delete removes only what create made, and nothing that is attached.
func TestF106Delete(t *testing.T) {
	l := newLab(t, 1, Config{})
	l.AddVolume(fakeaws.Volume{ID: "vol-0000000000000000a", Tags: map[string]string{"Name": "theirs"}})
	told, err := l.d.Delete(l.ctx, request("theirs", "volumeID", "vol-0000000000000000a"))
	l.ok(err)
	if !strings.Contains(told.Message, "Lariat did not create it") {
		t.Errorf("%+v", told)
	}
	_, err = l.d.Delete(l.ctx, request("theirs", "onRemove", "purge"))
	l.ok(err)
	l.only()
	r := request("mine", "size", "1", "onRemove", "purge")
	_, err = l.d.Attach(l.ctx, r, "")
	l.ok(err)
	_, err = l.d.Delete(l.ctx, r)
	l.says(err, volume.ErrInUse, "is attached to instance "+self)
	l.ok(l.d.Detach(l.ctx, "mine", ""))
	told, err = l.d.Delete(l.ctx, request("mine"))
	l.ok(err)
	if !strings.Contains(told.Message, "onRemove=retain") || len(l.Volumes()) != 2 {
		t.Errorf("%+v", told)
	}
	l.Lose("DeleteVolume", 1)
	_, err = l.d.Delete(l.ctx, r)
	l.ok(err)
	l.only()
	// One part of AWS does not know yet what another has shown: it passes.
	_, err = l.d.Create(l.ctx, r)
	l.ok(err)
	l.Fail("CreateTags", "InvalidVolume.NotFound", 1)
	detachedAs := r
	detachedAs.DetachAs = "else"
	_, err = l.d.Attach(l.ctx, detachedAs, "")
	l.ok(err)
	l.ok(l.d.Detach(l.ctx, "else", ""))
	l.Fail("DeleteVolume", "VolumeInUse", 1)
	l.Fail("DeleteVolume", "IncorrectState", 1)
	_, err = l.d.Delete(l.ctx, r)
	l.ok(err)
	l.only()
}

// F106: attach is repeatable over lost answers and throttling, finds a free name, and knows nodes by their names.
func TestF106Attach(t *testing.T) {
	l := newLab(t, 2, Config{})
	r := request("v", "size", "1")
	l.Lose("AttachVolume", 1)
	l.Fail("AttachVolume", "RequestLimitExceeded", 1)
	l.Fail("DescribeInstances", "RequestLimitExceeded", 1)
	host, _ := os.Hostname()
	first := ""
	for _, node := range []string{"", self, host} {
		device, err := l.d.Attach(l.ctx, r, node)
		l.ok(err)
		if first == "" {
			first = device
		}
		if device != first || l.only().Attachment.Instance != self {
			t.Errorf("%s: %s %+v", node, device, l.only())
		}
	}
	for node, want := range map[string]bool{"": true, other: false, "node-2": false, "node-2.internal": false} {
		if is, err := l.d.IsAttached(l.ctx, r, node); err != nil || is != want {
			t.Errorf("%s: %v %v", node, is, err)
		}
	}
	_, err := l.d.Attach(l.ctx, r, "nowhere")
	l.says(err, nil, "no instance in region eu-test-1 has it as its private DNS name")

	// A name that EC2 calls used though nothing shows by what.
	l.Fail("AttachVolume", "InvalidDevice.InUse", 1)
	if freeName("vol-1", []string{"/dev/" + strings.TrimPrefix(freeName("vol-1", nil), "/dev/")}) == freeName("vol-1",
		nil) {
		t.Error("a used name")
	}

	// The record is lost, and detach gets nothing but the name; a detach that comes late, from elsewhere, touches nothing.
	l.ok(os.RemoveAll(l.d.volumes.Dir))
	l.ok(l.d.Detach(l.ctx, "v", other))
	if l.only().Attachment.State != "attached" {
		t.Fatal("detached from another instance")
	}
	l.Lose("DetachVolume", 1)
	l.Fail("DetachVolume", "RequestLimitExceeded", 1)
	for range 2 {
		l.ok(l.d.Detach(l.ctx, "v", self))
	}
	if v := l.only(); v.State != "available" {
		t.Errorf("%+v", v)
	}
	l.ok(l.d.Detach(l.ctx, "unknown", self))

	// A volume of somebody else, by its id; its name is found again by the tag.
	l.AddVolume(fakeaws.Volume{ID: "vol-0000000000000000a"})
	_, err = l.d.Attach(l.ctx, request("named", "volumeID", "vol-0000000000000000a"), "node-2")
	l.ok(err)
	l.ok(os.RemoveAll(l.d.volumes.Dir))
	l.ok(l.d.Detach(l.ctx, "named", "node-2"))
	for _, v := range l.Volumes() {
		if v.State != "available" {
			t.Errorf("%+v", v)
		}
	}

	// Two pods call theirs "data", which is all that kubelet says in the end; the volumes have names of their
	// own, and a third one has theirs.
	before := len(l.Volumes())
	for name, node := range map[string]string{"one": self, "two": other, "data": ""} {
		r := request(name, "size", "1")
		if r.DetachAs = "data"; node != "" {
			_, err = l.d.Attach(l.ctx, r, node)
		} else {
			_, err = l.d.Create(l.ctx, r)
		}
		l.ok(err)
	}
	attached := func() (names []string) {
		for _, v := range l.Volumes()[before:] {
			if v.State != "available" {
				names = append(names, v.Tags["lariat:volume"])
			}
		}
		return names
	}
	for range 2 {
		l.ok(l.d.Detach(l.ctx, "data", self))
	}
	if names := attached(); !slices.Equal(names, []string{"two"}) {
		t.Errorf("attached: %v", names)
	}
	l.ok(l.d.Detach(l.ctx, "data", other))
	if names := attached(); len(names) > 0 {
		t.Errorf("attached: %v", names)
	}

	_, err = l.d.Attach(l.ctx, request("gone", "volumeID", "vol-0000000000000000b"), "")
	l.says(err, volume.ErrNotFound, "there is no vol-0000000000000000b in region eu-test-1")
}

// F106: a volume that is being modified is attached as soon as AWS allows that; the time ends with
// a word about the modification. An instance that starts is waited for.
func TestF106AttachWhileModified(t *testing.T) {
	l := newLab(t, 4, Config{})
	r := request("v", "size", "1")
	_, err := l.d.Create(l.ctx, r)
	l.ok(err)
	modify := func(size int64) {
		t.Helper()
		ctx, cancel := context.WithCancel(l.ctx)
		volume.OnFailpoint = func(name string) {
			if name == "modify-asked" {
				cancel()
			}
		}
		defer func() { volume.OnFailpoint = nil }()
		if _, err := l.d.Expand(ctx, r, volume.Expansion{Size: size << 30}); err == nil {
			t.Fatal("expanded already")
		}
	}
	modify(2)
	ctx, cancel := context.WithCancelCause(l.ctx)
	asked := 0
	volume.OnFailpoint = func(name string) {
		if name == "attach-asked" {
			if asked++; asked == 2 {
				cancel(volume.Timeout(time.Second))
			}
		}
	}
	defer func() { volume.OnFailpoint = nil }()
	_, err = l.d.Attach(ctx, r, "")
	l.says(err, context.DeadlineExceeded, "AWS attaches no volume that is being modified: from 1 GiB gp3 to 2 GiB "+
		"gp3, begun at ")
	_, err = l.d.Attach(l.ctx, r, "")
	l.ok(err)
	if v := l.only(); v.Attachment.State != "attached" || v.Size != 2 {
		t.Errorf("%+v", v)
	}
	l.ok(l.d.Detach(l.ctx, "v", ""))

	l.Fail("CreateTags", "ConcurrentTagAccess", 2)
	l.Fail("AttachVolume", "InvalidVolume.NotFound", 1)
	l.Fail("AttachVolume", "IncorrectInstanceState", 1)
	l.SetInstanceState(self, "pending")
	volume.OnFailpoint = nil
	done := make(chan error, 1)
	calls := l.Calls("DescribeInstances")
	r.DetachAs = "else"
	go func() { _, err := l.d.Attach(l.ctx, r, self); done <- err }()
	for l.Calls("DescribeInstances") < calls+2 {
		select {
		case err := <-done:
			t.Fatalf("an instance that starts: %v", err)
		case <-time.After(time.Millisecond):
		}
	}
	l.SetInstanceState(self, "running")
	l.ok(<-done)
}

// F106: wrong zone and limit are explained before AWS is asked.
func TestF106ZoneAndLimit(t *testing.T) {
	l := newLab(t, 1, Config{})
	r := request("v", "size", "1")
	_, err := l.d.Create(l.ctx, r)
	l.ok(err)
	_, err = l.d.Attach(l.ctx, r, "node-3")
	l.says(err, volume.ErrConflict, "the volume is in zone eu-test-1a and the instance in eu-test-1b, and volumes "+
		"never leave their zone")
	_, err = l.d.Attach(l.ctx, r, "node-4")
	l.says(err, volume.ErrInUse, "has 1 volumes and 1 network interfaces and disks of its own, which count: a "+
		"t3.nano takes 2")
	if n := l.Calls("AttachVolume"); n != 0 {
		t.Errorf("AWS was asked %d times", n)
	}
	// AWS's own word, where the type cannot be asked.
	l.Fail("DescribeInstanceTypes", "UnauthorizedOperation", 1)
	l.Fail("AttachVolume", "AttachmentLimitExceeded", 1)
	_, err = l.d.Attach(l.ctx, r, "")
	l.says(err, volume.ErrInUse, "use another node or instance type")
}

// F106: a volume is taken from another instance only if that was asked for and the instance cannot write any more.
func TestF106Elsewhere(t *testing.T) {
	l := newLab(t, 1, Config{})
	r, force := request("v", "size", "1"), request("v", "size", "1", "forceDetach", "true")
	_, err := l.d.Attach(l.ctx, r, other)
	l.ok(err)
	_, err = l.d.Attach(l.ctx, r, "")
	l.says(err, volume.ErrInUse, "it is attached to instance "+other+" (running); detach it there first")
	_, err = l.d.Attach(l.ctx, force, "")
	l.says(err, volume.ErrInUse, "forceDetach takes it only from instances that are stopped or terminated")
	l.SetInstanceState(other, "stopped")
	_, err = l.d.Attach(l.ctx, r, "")
	l.says(err, volume.ErrInUse, "or set forceDetach")
	if l.Calls("DetachVolume") != 0 || l.only().Attachment.Instance != other {
		t.Fatalf("%+v", l.only())
	}
	_, err = l.d.Attach(l.ctx, force, "")
	l.ok(err)
	if l.only().Attachment.Instance != self {
		t.Errorf("%+v", l.only())
	}

	// Of one that is terminated AWS takes it away by itself.
	l.ok(l.d.Detach(l.ctx, "v", self))
	l.SetInstanceState(other, "running")
	_, err = l.d.Attach(l.ctx, r, other)
	l.ok(err)
	l.SetInstanceState(other, "terminated")
	_, err = l.d.Attach(l.ctx, r, "")
	l.ok(err)

	// What does not end says what it was last seen as.
	l.Stick(l.only().ID, "busy")
	ctx, cancel := l.short()
	defer cancel()
	l.says(l.d.Detach(ctx, "v", self), context.DeadlineExceeded, "does not let it go (busy)")
}

// F106: AWS says that it has made a volume, and does not answer the question for it for a long time: that is
// no reason to make another one.
func TestF106ThrottledBehindCreate(t *testing.T) {
	l := newLab(t, 1, Config{})
	usual := appearance
	appearance = 50 * time.Millisecond
	volume.OnFailpoint = func(name string) {
		if name == "created" {
			l.Fail("DescribeVolumes", "RequestLimitExceeded", 3)
		}
	}
	t.Cleanup(func() { appearance, volume.OnFailpoint = usual, nil })
	_, err := l.d.Create(l.ctx, request("v", "size", "1"))
	l.ok(err)
	if n := l.Calls("CreateVolume"); n != 1 || len(l.Volumes()) != 1 {
		t.Errorf("%d calls, %+v", n, l.Volumes())
	}
}

// F106: expand waits for AWS, is repeatable, and says when it may be tried again.
func TestF106Expand(t *testing.T) {
	l := newLab(t, 1, Config{})
	r := request("v", "size", "1")
	_, err := l.d.Create(l.ctx, r)
	l.ok(err)
	l.Lose("ModifyVolume", 1)
	for range 2 {
		size, err := l.d.Expand(l.ctx, r, volume.Expansion{Size: 2<<30 - 5})
		l.ok(err)
		if size != 2<<30 || l.only().Size != 2 {
			t.Errorf("%d %+v", size, l.only())
		}
	}
	_, err = l.d.Expand(l.ctx, r, volume.Expansion{Size: 3 << 30})
	words := "AWS lets a volume be changed once in six hours; it can be tried again at "
	l.says(err, nil, words)
	if _, at, ok := strings.Cut(fmt.Sprint(err), words); ok {
		again, err := time.Parse(time.RFC3339, strings.TrimRight(strings.Fields(at)[0], ",;.:"))
		if wait := time.Until(again); err != nil || wait < coolDown-10*time.Minute || wait > coolDown {
			t.Errorf("again in %s: %v", wait, err)
		}
	}
	_, err = l.d.Expand(l.ctx, r, volume.Expansion{Size: 1 << 60})
	l.says(err, volume.ErrInvalid, "more than the 65536 GiB")
	if _, err := l.d.Create(l.ctx, r); err != nil { // a volume that has grown is still the one
		t.Error(err)
	}
}

// F109: hostile names and options are refused, and nothing is done.
func TestF109Refused(t *testing.T) {
	l := newLab(t, -1, Config{})
	for words, r := range map[string]volume.Request{
		"only letters, digits":            request("../x", "size", "1"),
		"volumeID \"vol-1;id\" is none":   request("x", "volumeID", "vol-1;id"),
		"region \"a.evil.example/\"":      request("x", "size", "1", "region", "a.evil.example/"),
		"kmsKeyId \"a b\" is none":        request("x", "size", "1", "kmsKeyId", "a b"),
		"\"suid\" is not among":           request("x", "size", "1", "mntOptions", "suid,dev"),
		"\"bind\" is not among":           request("x", "size", "1", "mntOptions", "bind"),
		"\"commit=x\" does not have":      request("x", "size", "1", "mntOptions", "commit=x"),
		"none of [ext4 ext3 xfs]":         request("x", "size", "1", "fsType", "ext4 -F"),
		"none of [retain purge]":          request("x", "size", "1", "onRemove", "shred"),
		"did you mean \"size\"":           request("x", "sizes", "1"),
		"size -1":                         request("x", "size", "-1"),
		"volumeType \"gp9\"":              request("x", "size", "1", "volumeType", "gp9"),
		"io2 needs iops":                  request("x", "size", "4", "volumeType", "io2"),
		"only gp3, io1 and io2":           request("x", "size", "4", "volumeType", "gp2", "iops", "100"),
		"only gp3 is given a throughput":  request("x", "size", "4", "volumeType", "gp2", "throughput", "200"),
		"kept for AWS's or Lariat's":      request("x", "size", "1", "tags", "lariat:volume=y"),
		"control characters":              request("x", "size", "1", "tags", "a=b\nc"),
		"is not key=value":                request("x", "size", "1", "tags", "a"),
		"snapshotID \"-o\" is none":       request("x", "snapshotID", "-o"),
		"exclude each other":              request("x", "volumeID", "vol-00000001", "snapshotID", "snap-00000001"),
		"did not create the volume and":   request("x", "volumeID", "vol-00000001", "onRemove", "purge"),
		"availabilityZone \"../\" is non": request("x", "size", "1", "availabilityZone", "../"),
	} {
		_, err := l.d.Create(l.ctx, r)
		l.says(err, volume.ErrInvalid, words)
		_, err = l.d.Attach(l.ctx, r, self)
		l.says(err, volume.ErrInvalid, words)
		l.says(l.d.Mount(l.ctx, t.TempDir()+"/d", "", r), volume.ErrInvalid, words)
	}
	for _, bad := range []string{"../x", "/dev/../x", "/dev/disk/by-id/x", "-o", "a\nb", ""} {
		l.says(l.d.Detach(l.ctx, bad, self), volume.ErrInvalid, "")
	}
	_, err := l.d.Attach(l.ctx, request("x", "size", "1"), "-o x")
	l.says(err, volume.ErrInvalid, "neither a host name nor")
	for _, bad := range []string{"", "relative", "/tmp/../etc", "/"} {
		l.says(l.d.Mount(l.ctx, bad, "", request("x", "size", "1")), volume.ErrInvalid, "folder")
		l.says(l.d.Unmount(l.ctx, bad), volume.ErrInvalid, "folder")
	}
	if n := l.Calls("CreateVolume") + l.Calls("AttachVolume") + l.Calls("DetachVolume"); n > 0 {
		t.Errorf("%d calls that change something", n)
	}
}

// F157: devices are found by serial number, in a tree like /sys. Nodes in it are files, so what finds one
// says that it is no device.
func TestF157Find(t *testing.T) {
	const id, another = "vol-0123456789abcdef0", "vol-00000000000000bad"
	type entry struct{ name, serial, model, hidden string }
	nvme := func(name, id string) entry { return entry{name, serial(id), model + "          ", "0"} }
	for _, tc := range []struct {
		name    string
		entries []entry
		as      string
		want    string // device that is opened, or words of an error
	}{
		{"nothing is there", nil, "/dev/xvdba", ""},
		{"by its serial number, not by its place", []entry{nvme("nvme0n1", another), nvme("nvme3n1", id)}, "", "nvme3n1"},
		{"not the hidden path of multipath", []entry{{"nvme0c0n1", serial(id), model, "1"}, nvme("nvme0n1", id)}, "",
			"nvme0n1"},
		{"not one that only claims the number", []entry{{"nvme0n1", serial(id), "Some Drive", "0"}}, "", ""},
		{"not an instance's own disk", []entry{{"nvme0n1", "AWS0123456789ABCDEF0", "Amazon EC2 NVMe Instance Storage", "0"}},
			"/dev/xvdba", ""},
		{"two that say the same", []entry{nvme("nvme0n1", id), nvme("nvme1n1", id)}, "", "all say that they are"},
		{"Xen's by its name", []entry{{"xvdba", "", "", "0"}}, "/dev/xvdba", "xvdba"},
		{"Xen's by the name of another age", []entry{{"xvdf", "", "", "0"}}, "/dev/sdf", "xvdf"},
		{"no other disk by its name", []entry{{"sda", "", "", "0"}}, "/dev/sda", ""},
		{"no path by its name", []entry{{"xvdba", "", "", "0"}}, "/dev/xvd/../xvdba", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := devices{t.TempDir(), t.TempDir()}
			for _, e := range tc.entries {
				for file, text := range map[string]string{"hidden": e.hidden, "device/serial": e.serial, "device/model": e.model} {
					path := filepath.Join(d.sys, "block", e.name, file)
					if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755),
						os.WriteFile(path, []byte(text+"\n"), 0o600)); err != nil {
						t.Fatal(err)
					}
				}
				if err := os.WriteFile(filepath.Join(d.dev, e.name), nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.MkdirAll(filepath.Join(d.sys, "block"), 0o755); err != nil {
				t.Fatal(err)
			}
			dev, err := d.find(id, tc.as)
			switch {
			case tc.want == "" && (err != nil || dev.path != ""):
				t.Errorf("%+v %v", dev, err)
			case strings.Contains(tc.want, " ") && (err == nil || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("%v", err)
			case tc.want != "" && !strings.Contains(tc.want, " ") && fmt.Sprint(err) != "device "+d.dev+"/"+tc.want+
				": not a block device":
				t.Errorf("%+v %v", dev, err)
			}
		})
	}
}

// F157: wherever ext4, ext3 or xfs leave something, one octet there is found.
func TestF157Places(t *testing.T) {
	for _, size := range []int64{1 << 20, 1 << 30, 1<<30 + 512, 16 << 40} {
		var total, last int64
		for _, e := range places(size) {
			if e.from < last || e.to <= e.from || e.to > size {
				t.Fatalf("size %d: %+v after %d", size, e, last)
			}
			last, total = e.to, total+e.to-e.from
		}
		if total > 300<<20 {
			t.Errorf("size %d: %d octets are read", size, total)
		}
		// superblocks of ext4 with blocks of 4096, and their backups in groups 1, 3, 5, 7, 9, 25, 27, 49; xfs's
		// groups; both ends
		for _, at := range []int64{0, 1080, 128<<20 + 56, 3*128<<20 + 56, 5*128<<20 + 56, 7*128<<20 + 56, 9 * 128 << 20,
			25 * 128 << 20, 27 * 128 << 20, 49 * 128 << 20, 8193 * 1024, 24577 * 1024, size / 4, size / 2, size / 4 * 3,
			size - 1} {
			if at >= size {
				continue
			}
			found, err := firstData(size, func(b []byte, from int64) (int, error) {
				clear(b)
				if from <= at && at < from+int64(len(b)) {
					b[at-from] = 1
				}
				return len(b), nil
			})
			if err != nil || found != at {
				t.Errorf("size %d: an octet at %d: %d %v", size, at, found, err)
			}
		}
	}
	if _, err := firstData(1<<20, func([]byte, int64) (int, error) { return 0, os.ErrInvalid }); err == nil {
		t.Error("what cannot be read counts as blank")
	}
	if _, err := firstData(1<<20, func([]byte, int64) (int, error) { return 0, nil }); err == nil {
		t.Error("what ends too early counts as blank")
	}
	if at, err := firstData(1<<30, func(b []byte, _ int64) (int, error) {
		clear(b)
		return min(len(b), 512),
			nil
	}); at != -1 || err != nil {
		t.Errorf("a blank one: %d %v", at, err)
	}
}

// A program that is not content is told by its status, and by its words if it has any.
func TestProgramsEnd(t *testing.T) {
	if _, err := run(t.Context(), "false"); err == nil || err.Error() != "false ended with status 1" ||
		!endedWith(err, 1) {
		t.Errorf("false: %v", err)
	}
	if _, err := run(t.Context(), "sh", "-c", "echo why >&2; exit 3"); err == nil ||
		err.Error() != "sh ended with status 3: why" || endedWith(err, 1) {
		t.Errorf("sh: %v", err)
	}
	if _, err := run(t.Context(), "no-such-program"); err == nil || err.Error() != "no-such-program is not installed" ||
		endedWith(err, 0) {
		t.Errorf("none: %v", err)
	}
	if out, err := run(t.Context(), "echo", "well"); err != nil || out != "well\n" {
		t.Errorf("echo: %q %v", out, err)
	}
}

func FuzzVolume(f *testing.F) {
	f.Add("data", "vol-0123456789abcdef0", "a=b,c=d", "noatime,commit=5", "xfs")
	f.Add("../x", "vol-1", "=", "ro,rw", "ext4 -F")
	f.Fuzz(func(t *testing.T, name, id, tags, mnt, fs string) {
		v, err := Config{}.Volume(request(name, "volumeID", id, "tags", tags, "mntOptions", mnt, "fsType", fs))
		if err != nil {
			if !errors.Is(err, volume.ErrInvalid) || len(err.Error()) > 1000 {
				t.Errorf("%v", err)
			}
			return
		}
		if id != "" && !volumeID.MatchString(v.ID) || fs != "" && fs != "ext4" && fs != "ext3" && fs != "xfs" {
			t.Errorf("%+v", v)
		}
		for _, o := range v.Options {
			key, _, _ := strings.Cut(o, "=")
			if _, ok := rules[key]; !ok || strings.ContainsAny(o, ", \n") {
				t.Errorf("option %q", o)
			}
		}
		for key := range maps.Keys(v.New.Tags) {
			if strings.HasPrefix(strings.ToLower(key), tagPrefix) {
				t.Errorf("tag %q", key)
			}
		}
	})
}

// FuzzDevices: whatever the kernel's files and names say of a device, it is the volume that it says it is, or
// none, and no name leads out of the folders.
func FuzzDevices(f *testing.F) {
	f.Add("nvme1n1", model+"  \n", "vol0123456789abcdef0\n", "0\n", "2048", "/dev/sdf")
	f.Add("nvme0c0n1", model, "vol0123456789abcdef0", "1", "-1", "/dev/xvdf")
	f.Add("nvme1n1p1", "QEMU NVMe Ctrl", "vol-0123456789abcdef0", "", "x", "sdf")
	f.Add("xvdf", "", "volvol0123456789abcdef0", "0", "18446744073709551615", "/dev/../sdf")
	f.Fuzz(func(t *testing.T, name, says, serialNumber, hidden, size, as string) {
		if x := xenName(as); x != "" && (!strings.HasPrefix(x, "xvd") || strings.ContainsAny(x, "/\x00") ||
			volume.CheckName(x) != nil) {
			t.Errorf("%q is %q", as, x)
		}
		if name == "" || name == "." || name == ".." || len(name) > 100 || strings.ContainsAny(name, "/\x00") {
			return
		}
		root := t.TempDir()
		d := devices{sys: filepath.Join(root, "sys"), dev: filepath.Join(root, "dev")}
		dir := filepath.Join(d.sys, "block", name)
		if err := os.MkdirAll(filepath.Join(dir, "device"), 0o700); err != nil {
			t.Skip(err) // a name that the file system does not take
		}
		for file, content := range map[string]string{"hidden": hidden, "size": size, "dev": "259:1", "device/model": says,
			"device/serial": serialNumber} {
			if err := os.WriteFile(filepath.Join(dir, file), []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		id := d.volume(name)
		if id != "" && (!volumeID.MatchString(id) || !nvmeName.MatchString(name) ||
			serial(id) != strings.TrimSpace(serialNumber) && id != strings.TrimSpace(serialNumber) ||
			strings.TrimSpace(hidden) == "1") {
			t.Errorf("%q with the serial number %q is %q", name, serialNumber, id)
		}
		if dev, err := d.find(id, as); dev.path != "" && err == nil { // there is no node
			t.Errorf("%+v", dev)
		}
	})
}
