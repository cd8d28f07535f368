package fakeaws

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/aws/smithy-go"
)

// session is the SDK as a driver on an instance has it. Without retries each call is one request.
func session(t *testing.T, env []string, retries int) aws.Config {
	t.Helper()
	for _, line := range env {
		k, v, _ := strings.Cut(line, "=")
		t.Setenv(k, v)
	}
	cfg, err := config.LoadDefaultConfig(t.Context(), config.WithEC2IMDSRegion(), config.WithRetryer(func() aws.Retryer {
		return retry.NewStandard(func(o *retry.StandardOptions) {
			o.MaxAttempts, o.MaxBackoff = 1+retries, time.Millisecond
		})
	}))
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// bench is a cloud with two instances, in zones a and b, and a client on the first.
type bench struct {
	*Cloud
	*ec2.Client
	t    *testing.T
	a, b *Instance
}

func newBench(t *testing.T, o Options) bench {
	t.Helper()
	c := New(t, o)
	b := bench{Cloud: c, t: t, a: c.AddInstance(Instance{Nitro: true}), b: c.AddInstance(Instance{Zone: "eu-test-1b"})}
	b.Client = ec2.NewFromConfig(session(t, c.Env(b.a.ID), 0))
	return b
}

func try[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// code is that of an answer that says no.
func code(err error) string {
	var api smithy.APIError
	if errors.As(err, &api) {
		return api.ErrorCode()
	}
	return fmt.Sprint(err)
}

// words are values with blanks between.
func words(values ...any) string { return strings.TrimSuffix(fmt.Sprintln(values...), "\n") }

func want[T comparable](t *testing.T, what string, got, wanted T) {
	t.Helper()
	if got != wanted {
		t.Errorf("%s: %v, want %v", what, got, wanted)
	}
}

// states are what the next Describe calls show of a volume.
func (b bench) states(id string, looks int) string {
	b.t.Helper()
	var all []string
	for range looks {
		out, err := b.DescribeVolumes(b.t.Context(), &ec2.DescribeVolumesInput{VolumeIds: []string{id}})
		if err != nil {
			all = append(all, code(err))
			continue
		}
		v := out.Volumes[0]
		s := string(v.State)
		for _, a := range v.Attachments {
			s += "/" + string(a.State)
		}
		all = append(all, s)
	}
	return strings.Join(all, " ")
}

// create makes a gp3 and waits for it.
func (b bench) create(gib int32) string {
	b.t.Helper()
	out := try[*ec2.CreateVolumeOutput](b.t)(b.CreateVolume(b.t.Context(),
		&ec2.CreateVolumeInput{AvailabilityZone: &b.a.Zone, Size: &gib, VolumeType: "gp3"}))
	for range 3 * (b.o.Lag + 1) {
		if b.states(*out.VolumeId, 1) == "available" {
			return *out.VolumeId
		}
	}
	b.t.Fatalf("%s is not available", *out.VolumeId)
	return ""
}

func (b bench) attach(id, instance, device string) error {
	_, err := b.AttachVolume(b.t.Context(), &ec2.AttachVolumeInput{VolumeId: &id, InstanceId: &instance, Device: &device})
	return err
}

func (b bench) detach(id, instance string, force bool) error {
	_, err := b.DetachVolume(b.t.Context(), &ec2.DetachVolumeInput{VolumeId: &id, InstanceId: &instance, Force: &force})
	return err
}

func TestVolumeFromCreationToDeletion(t *testing.T) {
	b := newBench(t, Options{})
	out := try[*ec2.CreateVolumeOutput](t)(b.CreateVolume(t.Context(), &ec2.CreateVolumeInput{
		AvailabilityZone: aws.String("eu-test-1a"), Size: aws.Int32(20), VolumeType: types.VolumeTypeGp3,
		Iops: aws.Int32(4000), Throughput: aws.Int32(250), Encrypted: aws.Bool(true),
		KmsKeyId: aws.String("alias/data"),
		TagSpecifications: []types.TagSpecification{{ResourceType: types.ResourceTypeVolume,
			Tags: []types.Tag{{Key: aws.String("Name"), Value: aws.String("data")}}}},
	}))
	id := *out.VolumeId
	want(t, "answer", out.State, types.VolumeStateCreating)
	unknown := "InvalidVolume.NotFound"
	want(t, "created", b.states(id, 6),
		strings.Join([]string{unknown, unknown, "creating", "creating", "available", "available"}, " "))
	v := try[*ec2.DescribeVolumesOutput](t)(b.DescribeVolumes(t.Context(),
		&ec2.DescribeVolumesInput{VolumeIds: []string{id}})).Volumes[0]
	got := words(*v.AvailabilityZone, *v.Size, v.VolumeType, *v.Iops, *v.Throughput, *v.Encrypted, *v.KmsKeyId,
		*v.Tags[0].Key, *v.Tags[0].Value)
	want(t, "volume", got, words("eu-test-1a", 20, "gp3", 4000, 250, true, "alias/data", "Name", "data"))

	want(t, "attach", code(b.attach(id, b.a.ID, "/dev/xvdba")), "<nil>")
	want(t, "attach again", code(b.attach(id, b.a.ID, "/dev/xvdba")), "VolumeInUse")
	want(t, "attached", b.states(id, 6), "available available in-use/attaching in-use/attaching in-use/attached "+
		"in-use/attached")
	want(t, "truth", b.Volumes()[0].Attachment, Attachment{b.a.ID, "/dev/xvdba", "attached"})
	_, err := b.DeleteVolume(t.Context(), &ec2.DeleteVolumeInput{VolumeId: &id})
	want(t, "delete", code(err), "VolumeInUse")

	want(t, "detach from another", code(b.detach(id, b.b.ID, false)), "InvalidAttachment.NotFound")
	want(t, "detach", code(b.detach(id, b.a.ID, false)), "<nil>")
	want(t, "detach again", code(b.detach(id, b.a.ID, false)), "IncorrectState")
	want(t, "detached", b.states(id, 3), "in-use/detaching in-use/detaching available")
	want(t, "detach once more", code(b.detach(id, b.a.ID, false)), "IncorrectState")

	_, err = b.DeleteVolume(t.Context(), &ec2.DeleteVolumeInput{VolumeId: &id})
	want(t, "delete", code(err), "<nil>")
	want(t, "deleted", b.states(id, 3), "deleting deleting "+unknown)
	_, err = b.DeleteVolume(t.Context(), &ec2.DeleteVolumeInput{VolumeId: &id})
	want(t, "delete again", code(err), unknown)
	want(t, "volumes left", len(b.Volumes()), 0)
}

func TestVolumeThatCannotBe(t *testing.T) {
	b := newBench(t, Options{})
	b.AddSnapshot("snap-0123456789abcdef0", 10, nil, true)
	num := aws.Int32
	for _, tc := range []struct {
		name, code string
		in         ec2.CreateVolumeInput
	}{
		{"no zone", "MissingParameter", ec2.CreateVolumeInput{Size: num(1)}},
		{"zone of another region", "InvalidZone.NotFound",
			ec2.CreateVolumeInput{Size: num(1), AvailabilityZone: aws.String("us-east-1a")}},
		{"neither size nor snapshot", "MissingParameter", ec2.CreateVolumeInput{}},
		{"type unknown", "UnknownVolumeType", ec2.CreateVolumeInput{Size: num(1), VolumeType: "gp9"}},
		{"too small", "InvalidParameterValue", ec2.CreateVolumeInput{Size: num(124), VolumeType: "st1"}},
		{"too large", "InvalidParameterValue", ec2.CreateVolumeInput{Size: num(16385), VolumeType: "gp2"}},
		{"iops of a gp2", "InvalidParameterCombination", ec2.CreateVolumeInput{Size: num(10), VolumeType: "gp2",
			Iops: num(300)}},
		{"io1 without iops", "MissingParameter", ec2.CreateVolumeInput{Size: num(10), VolumeType: "io1"}},
		{"too many iops for its size", "InvalidParameterValue", ec2.CreateVolumeInput{Size: num(10), VolumeType: "gp3",
			Iops: num(6000)}},
		{"too few iops", "InvalidParameterValue", ec2.CreateVolumeInput{Size: num(10), VolumeType: "gp3", Iops: num(2999)}},
		{"throughput of an io1", "InvalidParameterCombination", ec2.CreateVolumeInput{Size: num(10), VolumeType: "io1",
			Iops: num(100), Throughput: num(125)}},
		{"too much throughput for its iops", "InvalidParameterValue", ec2.CreateVolumeInput{Size: num(10), VolumeType: "gp3",
			Throughput: num(751)}},
		{"key but not encrypted", "InvalidParameterDependency",
			ec2.CreateVolumeInput{Size: num(1), KmsKeyId: aws.String("alias/data")}},
		{"snapshot unknown", "InvalidSnapshot.NotFound",
			ec2.CreateVolumeInput{SnapshotId: aws.String("snap-0123456789abcdef1")}},
		{"smaller than its snapshot", "InvalidParameterValue",
			ec2.CreateVolumeInput{Size: num(9), SnapshotId: aws.String("snap-0123456789abcdef0")}},
		{"tag of AWS", "InvalidParameterValue",
			ec2.CreateVolumeInput{Size: num(1), TagSpecifications: []types.TagSpecification{{
				ResourceType: types.ResourceTypeVolume, Tags: []types.Tag{{Key: aws.String("aws:x"), Value: aws.String("")}},
			}}}},
		{"dry run", "DryRunOperation", ec2.CreateVolumeInput{Size: num(1), DryRun: aws.Bool(true)}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.in.AvailabilityZone == nil && tc.name != "no zone" {
				tc.in.AvailabilityZone = &b.a.Zone
			}
			_, err := b.CreateVolume(t.Context(), &tc.in)
			want(t, "error", code(err), tc.code)
		})
	}
	want(t, "volumes", len(b.Volumes()), 0)
	out := try[*ec2.CreateVolumeOutput](t)(b.CreateVolume(t.Context(), &ec2.CreateVolumeInput{AvailabilityZone: &b.a.Zone,
		SnapshotId: aws.String("snap-0123456789abcdef0")}))
	want(t, "of the snapshot", words(*out.Size, *out.Encrypted, out.VolumeType), "10 true gp2")
}

func TestUnknownParameterIsNoSuccess(t *testing.T) {
	b := newBench(t, Options{})
	_, err := b.CreateVolume(t.Context(), &ec2.CreateVolumeInput{AvailabilityZone: &b.a.Zone, Size: aws.Int32(1),
		OutpostArn: aws.String("arn")})
	want(t, "error", code(err), "UnknownParameter")
}

func TestTokenMakesOneVolume(t *testing.T) {
	b := newBench(t, Options{Lag: -1})
	in := ec2.CreateVolumeInput{AvailabilityZone: &b.a.Zone, Size: aws.Int32(1), ClientToken: aws.String("token")}
	first := try[*ec2.CreateVolumeOutput](t)(b.CreateVolume(t.Context(), &in))
	again := try[*ec2.CreateVolumeOutput](t)(b.CreateVolume(t.Context(), &in))
	want(t, "second volume", *again.VolumeId, *first.VolumeId)
	other := in
	other.Size = aws.Int32(2)
	_, err := b.CreateVolume(t.Context(), &other)
	want(t, "other size", code(err), "IdempotentParameterMismatch")
	try[*ec2.DeleteVolumeOutput](t)(b.DeleteVolume(t.Context(), &ec2.DeleteVolumeInput{VolumeId: first.VolumeId}))
	again = try[*ec2.CreateVolumeOutput](t)(b.CreateVolume(t.Context(), &in))
	want(t, "volume of a token that was used", *again.VolumeId, *first.VolumeId)
	want(t, "volumes", len(b.Volumes()), 0)
}

func TestAttachmentThatCannotBe(t *testing.T) {
	b := newBench(t, Options{Lag: -1})
	small := b.AddInstance(Instance{Nitro: true, MaxVolumes: 3}) // the root volume, the network interface, and one more
	id, second := b.create(1), b.create(1)
	want(t, "zone", code(b.attach(id, b.b.ID, "/dev/xvdba")), "InvalidVolume.ZoneMismatch")
	want(t, "device name", code(b.attach(id, b.a.ID, "/dev/nvme1n1")), "InvalidParameterValue")
	want(t, "device name of the root volume", code(b.attach(id, b.a.ID, "/dev/xvda")), "InvalidParameterValue")
	want(t, "instance unknown", code(b.attach(id, "i-00000000000000000", "/dev/xvdba")), "InvalidInstanceID.NotFound")
	want(t, "volume unknown", code(b.attach("vol-00000000000000000", b.a.ID, "/dev/xvdba")), "InvalidVolume.NotFound")
	want(t, "no volume's id", code(b.attach("data", b.a.ID, "/dev/xvdba")), "InvalidParameterValue")
	want(t, "last place", code(b.attach(id, small.ID, "/dev/xvdba")), "<nil>")
	want(t, "device name in use", code(b.attach(second, small.ID, "/dev/xvdba")), "InvalidParameterValue")
	want(t, "no place", code(b.attach(second, small.ID, "/dev/xvdbb")), "AttachmentLimitExceeded")
	b.SetInstanceState(b.a.ID, "terminated")
	want(t, "terminated", code(b.attach(second, b.a.ID, "/dev/xvdba")), "IncorrectState")
	// Its attachments end with an instance.
	b.SetInstanceState(small.ID, "stopped")
	want(t, "stopped", b.states(id, 1), "in-use/attached")
	b.SetInstanceState(small.ID, "terminated")
	want(t, "terminated", b.states(id, 1), "available")
}

func TestAttachmentThatSticks(t *testing.T) {
	b := newBench(t, Options{Lag: 1})
	id := b.create(1)
	b.Stick(id, "attaching")
	want(t, "attach", code(b.attach(id, b.a.ID, "/dev/xvdba")), "<nil>")
	want(t, "stuck", b.states(id, 5), strings.TrimSpace(strings.Repeat("in-use/attaching ", 5)))
	want(t, "detach", code(b.detach(id, b.a.ID, false)), "<nil>")
	want(t, "free", b.states(id, 2), "in-use/detaching available")

	want(t, "attach", code(b.attach(id, b.a.ID, "/dev/xvdba")), "<nil>")
	b.states(id, 3)
	b.Stick(id, "busy")
	want(t, "detach", code(b.detach(id, b.a.ID, false)), "<nil>")
	want(t, "stuck", b.states(id, 3), "in-use/busy in-use/busy in-use/busy")
	want(t, "detach again", code(b.detach(id, b.a.ID, false)), "IncorrectState")
	want(t, "force", code(b.detach(id, b.a.ID, true)), "<nil>")
	want(t, "free", b.states(id, 2), "in-use/detaching available")

	want(t, "attach", code(b.attach(id, b.a.ID, "/dev/xvdba")), "<nil>")
	b.Stick(id, "busy")
	want(t, "detach", code(b.detach(id, b.a.ID, false)), "<nil>")
	b.Stick(id, "")
	want(t, "free", b.states(id, 2), "in-use/detaching available")
}

func TestWithoutLagEachStepIsDoneAtOnce(t *testing.T) {
	b := newBench(t, Options{Lag: -1})
	id := *try[*ec2.CreateVolumeOutput](t)(b.CreateVolume(t.Context(), &ec2.CreateVolumeInput{AvailabilityZone: &b.a.Zone,
		Size: aws.Int32(1)})).VolumeId
	for range 2 {
		want(t, "attach", code(b.attach(id, b.a.ID, "/dev/xvdba")), "<nil>")
		want(t, "truth", b.Volumes()[0].Attachment.State, "attached")
		want(t, "detach", code(b.detach(id, b.a.ID, false)), "<nil>")
		want(t, "truth", b.Volumes()[0].State, "available")
	}
	try[*ec2.DeleteVolumeOutput](t)(b.DeleteVolume(t.Context(), &ec2.DeleteVolumeInput{VolumeId: &id}))
	want(t, "volumes", len(b.Volumes()), 0)
}

// recorder is machinery that says what it was asked for, and refuses what it is told to.
type recorder struct {
	asked  []string
	refuse string
}

func (r *recorder) note(what, volume string, more ...any) error {
	r.asked = append(r.asked, strings.TrimSpace(what+" "+words(more...)))
	if what == r.refuse {
		return errors.New("no more room for " + volume)
	}
	return nil
}

func (r *recorder) Attach(volume, instance, device string, bytes int64) error {
	return r.note("attach", volume, instance, device, bytes)
}
func (r *recorder) Detach(volume string) error              { return r.note("detach", volume) }
func (r *recorder) Resize(volume string, bytes int64) error { return r.note("resize", volume, bytes) }
func (r *recorder) Delete(volume string) error              { return r.note("delete", volume) }

func TestDevices(t *testing.T) {
	r := &recorder{refuse: "attach"}
	b := newBench(t, Options{Lag: 1, Devices: r})
	id := b.create(1)
	b.AddInstance(Instance{ID: "i-1"})
	want(t, "attach without room", code(b.attach(id, "i-1", "/dev/xvdba")), "InternalError")
	want(t, "it is", b.states(id, 2), "available available")
	r.refuse, r.asked = "", nil
	want(t, "attach", code(b.attach(id, "i-1", "/dev/xvdba")), "<nil>")
	try[*ec2.ModifyVolumeOutput](t)(b.ModifyVolume(t.Context(), &ec2.ModifyVolumeInput{VolumeId: &id, Size: aws.Int32(2)}))
	b.states(id, 3)
	want(t, "detach", code(b.detach(id, "i-1", false)), "<nil>")
	want(t, "force what goes already", code(b.detach(id, "i-1", true)), "<nil>")
	b.states(id, 2)
	b.NeverAppears(id)
	want(t, "attach", code(b.attach(id, "i-1", "/dev/xvdba")), "<nil>")
	want(t, "without a device", b.states(id, 3), "available in-use/attaching in-use/attached")
	want(t, "detach", code(b.detach(id, "i-1", false)), "<nil>")
	b.states(id, 2)
	try[*ec2.DeleteVolumeOutput](t)(b.DeleteVolume(t.Context(), &ec2.DeleteVolumeInput{VolumeId: &id}))
	want(t, "devices", strings.Join(r.asked, ", "), "attach i-1 /dev/xvdba 1073741824, resize 2147483648, detach, delete")
}

func TestModifyVolume(t *testing.T) {
	now := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	b := newBench(t, Options{Lag: 1, Now: func() time.Time { return now }})
	id := b.create(1)
	modify := func(in ec2.ModifyVolumeInput) string {
		in.VolumeId = &id
		_, err := b.ModifyVolume(t.Context(), &in)
		return code(err)
	}
	progress := func() string {
		out, err := b.DescribeVolumesModifications(t.Context(),
			&ec2.DescribeVolumesModificationsInput{VolumeIds: []string{id}})
		if err != nil {
			return code(err)
		}
		m := out.VolumesModifications[0]
		return words(m.ModificationState, *m.OriginalSize, *m.TargetSize)
	}
	want(t, "never modified", progress(), "InvalidVolumeModification.NotFound")
	want(t, "modify", modify(ec2.ModifyVolumeInput{Size: aws.Int32(4), Iops: aws.Int32(2000 + 1500)}),
		"InvalidParameterValue")
	want(t, "modify", modify(ec2.ModifyVolumeInput{Size: aws.Int32(8), Iops: aws.Int32(3500)}), "<nil>")
	want(t, "modify again", modify(ec2.ModifyVolumeInput{Size: aws.Int32(9)}), "IncorrectModificationState")
	want(t, "size, while modifying", b.Volumes()[0].Size, 1)
	want(t, "progress", progress(), "modifying 1 8")
	want(t, "progress", progress(), "optimizing 1 8")
	want(t, "size", words(b.Volumes()[0].Size, b.Volumes()[0].IOPS), "8 3500")
	want(t, "progress", progress(), "completed 1 8")
	want(t, "smaller", modify(ec2.ModifyVolumeInput{Size: aws.Int32(7)}), "VolumeModificationRateExceeded")
	now = now.Add(6 * time.Hour)
	want(t, "smaller", modify(ec2.ModifyVolumeInput{Size: aws.Int32(7)}), "InvalidParameterValue")
	want(t, "type", modify(ec2.ModifyVolumeInput{VolumeType: types.VolumeTypeGp2}), "<nil>")
	b.states(id, 3)
	want(t, "type", words(b.Volumes()[0].Type, b.Volumes()[0].IOPS), "gp2 0")
}

func TestDescribeVolumes(t *testing.T) {
	b := newBench(t, Options{Lag: 1})
	for i := range 12 {
		b.AddVolume(Volume{ID: fmt.Sprintf("vol-000000000000000%02x", i),
			Tags: map[string]string{"n": fmt.Sprint(i), "odd": fmt.Sprint(i%2 == 1)}})
	}
	b.AddVolume(Volume{Attachment: Attachment{Instance: b.a.ID, Device: "/dev/xvdbz"}})
	find := func(filters ...string) int {
		t.Helper()
		var in ec2.DescribeVolumesInput
		for i := 0; i < len(filters); i += 2 {
			in.Filters = append(in.Filters, types.Filter{Name: &filters[i], Values: strings.Split(filters[i+1], ",")})
		}
		return len(try[*ec2.DescribeVolumesOutput](t)(b.DescribeVolumes(t.Context(), &in)).Volumes)
	}
	want(t, "one of two values", find("tag:n", "3,4,77"), 2)
	want(t, "both filters", find("tag:n", "3,4", "tag:odd", "true"), 1)
	want(t, "wildcard", find("tag:n", "1*"), 3)
	want(t, "tag-key", find("tag-key", "odd"), 12)
	want(t, "no such tag", find("tag:none", "*"), 0)
	want(t, "attachment", find("attachment.instance-id", b.a.ID), 1)
	want(t, "status", find("status", "in-use"), 1)
	_, err := b.DescribeVolumes(t.Context(),
		&ec2.DescribeVolumesInput{Filters: []types.Filter{{Name: aws.String("colour"), Values: []string{"x"}}}})
	want(t, "unknown filter", code(err), "InvalidParameterValue")

	var pages []int
	for p := ec2.NewDescribeVolumesPaginator(b.Client,
		&ec2.DescribeVolumesInput{MaxResults: aws.Int32(5)}); p.HasMorePages(); {
		pages = append(pages, len(try[*ec2.DescribeVolumesOutput](t)(p.NextPage(t.Context())).Volumes))
	}
	want(t, "pages", words(pages), "[5 5 3]")
	id := *try[*ec2.CreateVolumeOutput](t)(b.CreateVolume(t.Context(), &ec2.CreateVolumeInput{AvailabilityZone: &b.a.Zone,
		Size: aws.Int32(1)})).VolumeId
	want(t, "fresh", find("volume-id", id), 0)
	want(t, "fresh", find("volume-id", id), 1)
}

func TestTags(t *testing.T) {
	b := newBench(t, Options{Lag: -1})
	id := b.create(1)
	tag := func(k, v string) types.Tag { return types.Tag{Key: &k, Value: &v} }
	try[*ec2.CreateTagsOutput](t)(b.CreateTags(t.Context(), &ec2.CreateTagsInput{Resources: []string{id},
		Tags: []types.Tag{tag("a", "1"), tag("b", "2"), tag("c", "3")}}))
	try[*ec2.DeleteTagsOutput](t)(b.DeleteTags(t.Context(), &ec2.DeleteTagsInput{Resources: []string{id},
		Tags: []types.Tag{{Key: aws.String("a")}, tag("b", "other"), tag("c", "3")}}))
	want(t, "tags", words(b.Volumes()[0].Tags), "map[b:2]")
	_, err := b.CreateTags(t.Context(), &ec2.CreateTagsInput{Resources: []string{id, "vol-00000000000000000"},
		Tags: []types.Tag{tag("d", "")}})
	want(t, "one that is not there", code(err), "InvalidVolume.NotFound")
	want(t, "tags", words(b.Volumes()[0].Tags), "map[b:2]")
}

func TestInstances(t *testing.T) {
	b := newBench(t, Options{Lag: 1})
	id := b.create(1)
	want(t, "attach", code(b.attach(id, b.a.ID, "/dev/xvdba")), "<nil>")
	find := func(in ec2.DescribeInstancesInput) types.Instance {
		t.Helper()
		out := try[*ec2.DescribeInstancesOutput](t)(b.DescribeInstances(t.Context(), &in))
		if len(out.Reservations) != 1 {
			t.Fatalf("%d instances", len(out.Reservations))
		}
		return out.Reservations[0].Instances[0]
	}
	in := find(ec2.DescribeInstancesInput{InstanceIds: []string{b.a.ID}})
	want(t, "devices before it shows", len(in.BlockDeviceMappings), 1)
	in = find(ec2.DescribeInstancesInput{Filters: []types.Filter{{Name: aws.String("private-dns-name"),
		Values: []string{b.a.PrivateDNSName}}}})
	m := in.BlockDeviceMappings[1]
	want(t, "device", words(*m.DeviceName, *m.Ebs.VolumeId, m.Ebs.Status), words("/dev/xvdba", id, "attaching"))
	want(t, "place", words(*in.Placement.AvailabilityZone, *in.SubnetId, *in.VpcId, *in.SecurityGroups[0].GroupId,
		len(in.NetworkInterfaces), in.State.Name),
		words(b.a.Zone, b.a.SubnetID, b.a.VPCID, b.a.SecurityGroups[0], 1, "running"))
	_, err := b.DescribeInstances(t.Context(), &ec2.DescribeInstancesInput{InstanceIds: []string{"i-00000000000000000"}})
	want(t, "unknown", code(err), "InvalidInstanceID.NotFound")

	out := try[*ec2.DescribeInstanceTypesOutput](t)(b.DescribeInstanceTypes(t.Context(),
		&ec2.DescribeInstanceTypesInput{InstanceTypes: []types.InstanceType{types.InstanceType(b.a.Type)}}))
	k := out.InstanceTypes[0]
	want(t, "type", words(k.Hypervisor, k.EbsInfo.NvmeSupport, *k.EbsInfo.MaximumEbsAttachments,
		k.EbsInfo.AttachmentLimitType), "nitro required 28 shared")
}

func TestPlaces(t *testing.T) {
	b := newBench(t, Options{})
	b.AddSnapshot("snap-0123456789abcdef0", 10, map[string]string{"Name": "base"}, false)
	b.AddInstance(Instance{SubnetID: "subnet-of-mine", VPCID: "vpc-of-mine", Zone: "eu-test-1c",
		SecurityGroups: []string{"sg-of-mine"}})
	vpc := []types.Filter{{Name: aws.String("vpc-id"), Values: []string{"vpc-of-mine"}}}
	subnets := try[*ec2.DescribeSubnetsOutput](t)(b.DescribeSubnets(t.Context(),
		&ec2.DescribeSubnetsInput{Filters: vpc})).Subnets
	want(t, "subnets", words(len(subnets), *subnets[0].SubnetId, *subnets[0].AvailabilityZone),
		"1 subnet-of-mine eu-test-1c")
	groups := try[*ec2.DescribeSecurityGroupsOutput](t)(b.DescribeSecurityGroups(t.Context(),
		&ec2.DescribeSecurityGroupsInput{Filters: vpc})).SecurityGroups
	want(t, "groups", words(len(groups), *groups[0].GroupId), "1 sg-of-mine")
	zones := try[*ec2.DescribeAvailabilityZonesOutput](t)(b.DescribeAvailabilityZones(t.Context(),
		&ec2.DescribeAvailabilityZonesInput{})).AvailabilityZones
	want(t, "zones", words(len(zones), *zones[0].ZoneName, *zones[0].ZoneId), "3 eu-test-1a eut1-az2")
	s := try[*ec2.DescribeSnapshotsOutput](t)(b.DescribeSnapshots(t.Context(), &ec2.DescribeSnapshotsInput{
		OwnerIds: []string{"self"}, Filters: []types.Filter{{Name: aws.String("tag:Name"), Values: []string{"base"}}},
	})).Snapshots
	want(t, "snapshots", words(len(s), *s[0].SnapshotId, *s[0].VolumeSize), "1 snap-0123456789abcdef0 10")
}

func TestFailures(t *testing.T) {
	b := newBench(t, Options{Lag: -1})
	again := ec2.NewFromConfig(session(t, b.Env(b.a.ID), 3))
	for code, status := range map[string]int{"RequestLimitExceeded": 503, "UnauthorizedOperation": 403,
		"VolumeLimitExceeded": 400} {
		b.Fail("CreateVolume", code, 1)
		_, err := b.CreateVolume(t.Context(), &ec2.CreateVolumeInput{AvailabilityZone: &b.a.Zone, Size: aws.Int32(1)})
		var api smithy.APIError
		var http interface{ HTTPStatusCode() int }
		if !errors.As(err, &api) || api.ErrorCode() != code || !errors.As(err, &http) || http.HTTPStatusCode() != status {
			t.Errorf("%v, want %s and %d", err, code, status)
		}
	}
	want(t, "volumes", len(b.Volumes()), 0)
	// The SDK repeats what was throttled, and what got no answer; the token, which the SDK makes, keeps that
	// from being two volumes.
	b.Fail("CreateVolume", "RequestLimitExceeded", 2)
	b.Lose("CreateVolume", 1)
	before := b.Calls("CreateVolume")
	try[*ec2.CreateVolumeOutput](t)(again.CreateVolume(t.Context(), &ec2.CreateVolumeInput{AvailabilityZone: &b.a.Zone,
		Size: aws.Int32(1)}))
	want(t, "calls", b.Calls("CreateVolume")-before, 4)
	want(t, "volumes", len(b.Volumes()), 1)
}

func TestSignature(t *testing.T) {
	b := newBench(t, Options{})
	for _, tc := range []struct{ name, key, secret, token, region, code string }{
		{"right", AccessKeyID, SecretAccessKey, "", "eu-test-1", "<nil>"},
		{"key unknown", "AKIAUNKNOWN", SecretAccessKey, "", "eu-test-1", "AuthFailure"},
		{"secret wrong", AccessKeyID, "wrong", "", "eu-test-1", "AuthFailure"},
		{"role without its token", RoleAccessKeyID, RoleSecretAccessKey, "", "eu-test-1", "AuthFailure"},
		{"role", RoleAccessKeyID, RoleSecretAccessKey, RoleSessionToken, "eu-test-1", "<nil>"},
		{"region wrong", AccessKeyID, SecretAccessKey, "", "us-east-1", "AuthFailure"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			client := ec2.NewFromConfig(session(t, b.Env(b.a.ID), 0), func(o *ec2.Options) {
				o.Region = tc.region
				o.Credentials = aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
					return aws.Credentials{AccessKeyID: tc.key, SecretAccessKey: tc.secret, SessionToken: tc.token}, nil
				})
			})
			_, err := client.DescribeVolumes(t.Context(), &ec2.DescribeVolumesInput{})
			want(t, "error", code(err), tc.code)
		})
	}
	for name, off := range map[string]time.Duration{"now": 0, "an hour ago": -time.Hour} {
		t.Run("signed "+name, func(t *testing.T) {
			body := "Action=DescribeVolumes&Version=2016-11-15"
			req := try[*http.Request](t)(http.NewRequest("POST", b.URL(), strings.NewReader(body)))
			err := v4.NewSigner().SignHTTP(t.Context(),
				aws.Credentials{AccessKeyID: AccessKeyID, SecretAccessKey: SecretAccessKey}, req, hash([]byte(body)), "ec2",
				"eu-test-1", time.Now().Add(off))
			if err != nil {
				t.Fatal(err)
			}
			res := try[*http.Response](t)(http.DefaultClient.Do(req))
			defer res.Body.Close()
			want(t, "status", res.StatusCode, map[bool]int{true: 200, false: 400}[off == 0])
		})
	}
	res := try[*http.Response](t)(http.Post(b.URL(), "application/x-www-form-urlencoded",
		strings.NewReader("Action=DescribeVolumes")))
	defer res.Body.Close()
	want(t, "without a signature", res.StatusCode, http.StatusUnauthorized)
	want(t, "calls", b.Calls("DescribeVolumes"), 3)
}

func TestMetadata(t *testing.T) {
	t.Run("of a region", func(t *testing.T) { testMetadata(t, "eu-test-1", "aws", "amazonaws.com") })
	t.Run("of one in China", func(t *testing.T) { testMetadata(t, "cn-north-1", "aws-cn", "amazonaws.com.cn") })
}

func testMetadata(t *testing.T, region, partition, domain string) {
	c := New(t, Options{Region: region})
	in := c.AddInstance(Instance{Zone: region + "b", SecurityGroups: []string{"sg-1", "sg-2"}})
	cfg := session(t, c.RoleEnv(in.ID), 0)
	want(t, "region", cfg.Region, region)
	// The role's keys sign.
	try[*ec2.DescribeVolumesOutput](t)(ec2.NewFromConfig(cfg).DescribeVolumes(t.Context(), &ec2.DescribeVolumesInput{}))
	client := imds.NewFromConfig(cfg)
	get := func(path string) string {
		t.Helper()
		out := try[*imds.GetMetadataOutput](t)(client.GetMetadata(t.Context(), &imds.GetMetadataInput{Path: path}))
		defer out.Content.Close()
		var b strings.Builder
		try[int64](t)(io.Copy(&b, out.Content))
		return b.String()
	}
	mac := get("mac")
	for path, value := range map[string]string{
		"instance-id": in.ID, "instance-type": in.Type, "placement/availability-zone": in.Zone,
		"placement/availability-zone-id": "eut1-az3", "placement/region": region,
		"network/interfaces/macs/" + mac + "/subnet-id": in.SubnetID, "network/interfaces/macs/" + mac + "/vpc-id": in.VPCID,
		"network/interfaces/macs/" + mac + "/security-group-ids": "sg-1\nsg-2", "services/domain": domain,
		"services/partition": partition,
	} {
		want(t, path, get(path), value)
	}
	doc := try[*imds.GetInstanceIdentityDocumentOutput](t)(client.GetInstanceIdentityDocument(t.Context(), nil))
	want(t, "document", doc.InstanceID+doc.Region, in.ID+region)
	_, err := client.GetMetadata(t.Context(), &imds.GetMetadataInput{Path: "no-such"})
	if err == nil || !strings.Contains(err.Error(), "404") {
		t.Error("no-such:", err)
	}
	res := try[*http.Response](t)(http.Get(c.instances[0].imds + "/latest/meta-data/instance-id"))
	defer res.Body.Close()
	want(t, "without a token", res.StatusCode, http.StatusUnauthorized)
}
