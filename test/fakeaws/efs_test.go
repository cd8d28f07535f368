package fakeaws

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/efs"
	"github.com/aws/aws-sdk-go-v2/service/efs/types"
)

type efsBench struct {
	*Cloud
	*efs.Client
	t  *testing.T
	in *Instance
}

func newEFSBench(t *testing.T, o Options) efsBench {
	t.Helper()
	c := New(t, o)
	in := c.AddInstance(Instance{SecurityGroups: []string{"sg-mine"}})
	return efsBench{c, efs.NewFromConfig(session(t, c.RoleEnv(in.ID), 0)), t, in}
}

// create makes a file system and waits for it.
func (b efsBench) create(token string) string {
	b.t.Helper()
	id := *try[*efs.CreateFileSystemOutput](b.t)(b.CreateFileSystem(b.t.Context(),
		&efs.CreateFileSystemInput{CreationToken: &token})).FileSystemId
	b.fileSystem(id, b.o.Lag)
	want(b.t, "file system", b.fileSystem(id, 1), "available")
	return id
}

// fileSystem is what the next Describe calls show.
func (b efsBench) fileSystem(id string, looks int) string {
	return b.repeat(looks, func() (types.LifeCycleState, error) {
		out, err := b.DescribeFileSystems(b.t.Context(), &efs.DescribeFileSystemsInput{FileSystemId: &id})
		if err != nil {
			return "", err
		}
		return out.FileSystems[0].LifeCycleState, nil
	})
}

func (b efsBench) mountTarget(id string, looks int) string {
	return b.repeat(looks, func() (types.LifeCycleState, error) {
		out, err := b.DescribeMountTargets(b.t.Context(), &efs.DescribeMountTargetsInput{MountTargetId: &id})
		if err != nil {
			return "", err
		}
		return out.MountTargets[0].LifeCycleState, nil
	})
}

func (b efsBench) repeat(looks int, look func() (types.LifeCycleState, error)) string {
	var all []string
	for range looks {
		state, err := look()
		if err != nil {
			all = append(all, code(err))
		} else {
			all = append(all, string(state))
		}
	}
	return strings.Join(all, " ")
}

func TestFileSystemFromCreationToDeletion(t *testing.T) {
	b := newEFSBench(t, Options{})
	in := efs.CreateFileSystemInput{
		CreationToken: aws.String("data"), Encrypted: aws.Bool(true), KmsKeyId: aws.String("alias/data"),
		PerformanceMode: types.PerformanceModeGeneralPurpose,
		ThroughputMode:  types.ThroughputModeElastic, Tags: []types.Tag{{Key: aws.String("Name"), Value: aws.String("data")}},
	}
	out := try[*efs.CreateFileSystemOutput](t)(b.CreateFileSystem(t.Context(), &in))
	id := *out.FileSystemId
	want(t, "answer", words(out.LifeCycleState, *out.Name, *out.Encrypted, out.ThroughputMode, *out.CreationToken),
		"creating data true elastic data")
	_, err := b.CreateFileSystem(t.Context(), &in)
	var exists *types.FileSystemAlreadyExists
	if !errors.As(err, &exists) || *exists.FileSystemId != id {
		t.Errorf("the same again: %v", err)
	}
	_, err = b.CreateMountTarget(t.Context(), &efs.CreateMountTargetInput{FileSystemId: &id, SubnetId: &b.in.SubnetID})
	want(t, "mount target too early", code(err), "IncorrectFileSystemLifeCycleState")
	want(t, "created", b.fileSystem(id, 3), "creating creating available")
	byToken := try[*efs.DescribeFileSystemsOutput](t)(b.DescribeFileSystems(t.Context(),
		&efs.DescribeFileSystemsInput{CreationToken: aws.String("data")}))
	want(t, "by token", *byToken.FileSystems[0].FileSystemId, id)
	byToken = try[*efs.DescribeFileSystemsOutput](t)(b.DescribeFileSystems(t.Context(),
		&efs.DescribeFileSystemsInput{CreationToken: aws.String("other")}))
	want(t, "by another token", len(byToken.FileSystems), 0)

	b.MountTargetAddress(func(string) netip.Addr { return netip.MustParseAddr("192.168.9.1") })
	mt := try[*efs.CreateMountTargetOutput](t)(b.CreateMountTarget(t.Context(),
		&efs.CreateMountTargetInput{FileSystemId: &id, SubnetId: &b.in.SubnetID, SecurityGroups: []string{"sg-mine"}}))
	want(t, "mount target", words(mt.LifeCycleState, *mt.IpAddress, *mt.AvailabilityZoneName),
		"creating 192.168.9.1 eu-test-1a")
	want(t, "mount target", b.mountTarget(*mt.MountTargetId, 3), "creating creating available")
	_, err = b.DeleteFileSystem(t.Context(), &efs.DeleteFileSystemInput{FileSystemId: &id})
	want(t, "delete", code(err), "FileSystemInUse")
	try[*efs.DeleteMountTargetOutput](t)(b.DeleteMountTarget(t.Context(),
		&efs.DeleteMountTargetInput{MountTargetId: mt.MountTargetId}))
	_, err = b.DeleteFileSystem(t.Context(), &efs.DeleteFileSystemInput{FileSystemId: &id})
	want(t, "delete", code(err), "FileSystemInUse")
	want(t, "mount target", b.mountTarget(*mt.MountTargetId, 3), "deleting deleting MountTargetNotFound")
	try[*efs.DeleteFileSystemOutput](t)(b.DeleteFileSystem(t.Context(), &efs.DeleteFileSystemInput{FileSystemId: &id}))
	want(t, "deleted", b.fileSystem(id, 3), "deleting deleting FileSystemNotFound")
	want(t, "left", len(b.FileSystems())+len(b.MountTargets()), 0)
	try[*efs.CreateFileSystemOutput](t)(b.CreateFileSystem(t.Context(), &in))
}

func TestFileSystemThatCannotBe(t *testing.T) {
	b := newEFSBench(t, Options{})
	for _, tc := range []struct {
		name, code string
		in         efs.CreateFileSystemInput
	}{
		{"token too long", "BadRequest", efs.CreateFileSystemInput{CreationToken: aws.String(strings.Repeat("x", 65))}},
		{"zone unknown", "UnsupportedAvailabilityZone",
			efs.CreateFileSystemInput{AvailabilityZoneName: aws.String("us-east-1a")}},
		{"key but not encrypted", "BadRequest", efs.CreateFileSystemInput{KmsKeyId: aws.String("alias/data")}},
		{"performance mode unknown", "BadRequest", efs.CreateFileSystemInput{PerformanceMode: "fast"}},
		{"throughput mode unknown", "BadRequest", efs.CreateFileSystemInput{ThroughputMode: "fast"}},
		{"throughput without its mode", "BadRequest",
			efs.CreateFileSystemInput{ProvisionedThroughputInMibps: aws.Float64(1)}},
		{"maxIO with elastic throughput", "BadRequest", efs.CreateFileSystemInput{PerformanceMode: "maxIO",
			ThroughputMode: "elastic"}},
		{"parameter that the emulator has not", "BadRequest", efs.CreateFileSystemInput{Backup: aws.Bool(true)}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.in.CreationToken == nil {
				tc.in.CreationToken = aws.String("token")
			}
			_, err := b.CreateFileSystem(t.Context(), &tc.in)
			want(t, "error", code(err), tc.code)
		})
	}
	want(t, "file systems", len(b.FileSystems()), 0)
}

func TestMountTargets(t *testing.T) {
	b := newEFSBench(t, Options{Lag: -1})
	id := b.create("data")
	b.AddSubnet("subnet-second", b.in.VPCID, b.in.Zone)
	b.AddSubnet("subnet-b", b.in.VPCID, "eu-test-1b")
	b.AddSubnet("subnet-elsewhere", "vpc-elsewhere", "eu-test-1c")
	b.AddSecurityGroup("sg-elsewhere", "vpc-elsewhere")
	add := func(subnet string, groups ...string) (string, string) {
		out, err := b.CreateMountTarget(t.Context(), &efs.CreateMountTargetInput{FileSystemId: &id, SubnetId: &subnet,
			SecurityGroups: groups})
		if err != nil {
			return "", code(err)
		}
		return *out.MountTargetId, ""
	}
	fails := func(what, want string, subnet string, groups ...string) {
		t.Helper()
		if _, code := add(subnet, groups...); code != want {
			t.Errorf("%s: %s, want %s", what, code, want)
		}
	}
	fails("subnet unknown", "SubnetNotFound", "subnet-none")
	fails("group unknown", "SecurityGroupNotFound", b.in.SubnetID, "sg-none")
	fails("group of another network", "SecurityGroupNotFound", b.in.SubnetID, "sg-elsewhere")
	mt, _ := add(b.in.SubnetID, "sg-mine")
	fails("same zone", "MountTargetConflict", "subnet-second")
	fails("other network", "MountTargetConflict", "subnet-elsewhere")
	fails("other zone", "", "subnet-b")
	all := try[*efs.DescribeMountTargetsOutput](t)(b.DescribeMountTargets(t.Context(),
		&efs.DescribeMountTargetsInput{FileSystemId: &id})).MountTargets
	want(t, "mount targets", words(len(all), *all[1].SubnetId), "2 subnet-b")
	fs := try[*efs.DescribeFileSystemsOutput](t)(b.DescribeFileSystems(t.Context(),
		&efs.DescribeFileSystemsInput{FileSystemId: &id})).FileSystems[0]
	want(t, "their number", fs.NumberOfMountTargets, 2)

	groups := func() []string {
		return try[*efs.DescribeMountTargetSecurityGroupsOutput](t)(b.DescribeMountTargetSecurityGroups(t.Context(),
			&efs.DescribeMountTargetSecurityGroupsInput{MountTargetId: &mt})).SecurityGroups
	}
	want(t, "groups", words(groups()), "[sg-mine]")
	try[*efs.ModifyMountTargetSecurityGroupsOutput](t)(b.ModifyMountTargetSecurityGroups(t.Context(),
		&efs.ModifyMountTargetSecurityGroupsInput{MountTargetId: &mt, SecurityGroups: []string{defaultGroup}}))
	want(t, "groups", words(groups()), "["+defaultGroup+"]")
	want(t, "groups", words(b.MountTargets()[0].SecurityGroups), "["+defaultGroup+"]")

	zone := try[*efs.CreateFileSystemOutput](t)(b.CreateFileSystem(t.Context(),
		&efs.CreateFileSystemInput{CreationToken: aws.String("zone"), AvailabilityZoneName: aws.String("eu-test-1b")}))
	id = *zone.FileSystemId
	fails("One Zone", "AvailabilityZonesMismatch", b.in.SubnetID)
	fails("One Zone", "", "subnet-b")
	_, err := b.DescribeMountTargets(t.Context(), &efs.DescribeMountTargetsInput{})
	want(t, "of what", code(err), "BadRequest")
}

func TestAccessPoints(t *testing.T) {
	b := newEFSBench(t, Options{Lag: 1})
	id := b.create("data")
	in := efs.CreateAccessPointInput{
		ClientToken: aws.String("token"), FileSystemId: &id, PosixUser: &types.PosixUser{Uid: aws.Int64(1000),
			Gid: aws.Int64(1000)}, Tags: []types.Tag{{Key: aws.String("Name"), Value: aws.String("app")}},
		RootDirectory: &types.RootDirectory{Path: aws.String("/a/b/c/d"),
			CreationInfo: &types.CreationInfo{OwnerUid: aws.Int64(1000), OwnerGid: aws.Int64(1000),
				Permissions: aws.String("0750")}},
	}
	first := try[*efs.CreateAccessPointOutput](t)(b.CreateAccessPoint(t.Context(), &in))
	again := try[*efs.CreateAccessPointOutput](t)(b.CreateAccessPoint(t.Context(), &in))
	want(t, "the same again", *again.AccessPointId, *first.AccessPointId)
	other := in
	other.PosixUser = nil
	_, err := b.CreateAccessPoint(t.Context(), &other)
	var exists *types.AccessPointAlreadyExists
	if !errors.As(err, &exists) || *exists.AccessPointId != *first.AccessPointId {
		t.Errorf("another with the same token: %v", err)
	}
	for path, info := range map[string]*types.CreationInfo{"relative": nil, "/1/2/3/4/5": nil, "/.x": nil, "/x/.y": nil,
		"/x$": nil, "/x//y": nil, "/x/": nil, "/x": {OwnerUid: aws.Int64(0), OwnerGid: aws.Int64(0),
			Permissions: aws.String("0789")}} {
		_, err := b.CreateAccessPoint(t.Context(), &efs.CreateAccessPointInput{ClientToken: aws.String(path),
			FileSystemId: &id, RootDirectory: &types.RootDirectory{Path: &path, CreationInfo: info}})
		want(t, path, code(err), "BadRequest")
	}
	ap := func() string {
		return b.repeat(1, func() (types.LifeCycleState, error) {
			out, err := b.DescribeAccessPoints(t.Context(), &efs.DescribeAccessPointsInput{AccessPointId: first.AccessPointId})
			if err != nil {
				return "", err
			}
			return out.AccessPoints[0].LifeCycleState, nil
		})
	}
	want(t, "created", words(ap(), ap()), "creating available")
	p := b.AccessPoints()[0]
	want(t, "access point", words(p.FileSystemID, p.PosixUser.Uid, p.RootDirectory.Path,
		p.RootDirectory.CreationInfo.Permissions, p.Tags["Name"]), id+" 1000 /a/b/c/d 0750 app")

	// An ARN is as good as an id.
	try[*efs.TagResourceOutput](t)(b.TagResource(t.Context(), &efs.TagResourceInput{ResourceId: first.AccessPointArn,
		Tags: []types.Tag{{Key: aws.String("k"), Value: aws.String("v")}}}))
	tags := try[*efs.ListTagsForResourceOutput](t)(b.ListTagsForResource(t.Context(),
		&efs.ListTagsForResourceInput{ResourceId: first.AccessPointId})).Tags
	want(t, "tags", words(*tags[0].Key, *tags[1].Key, len(tags)), "Name k 2")
	try[*efs.TagResourceOutput](t)(b.TagResource(t.Context(),
		&efs.TagResourceInput{ResourceId: &id, Tags: []types.Tag{{Key: aws.String("k"), Value: aws.String("v")}}}))
	want(t, "tags", b.FileSystems()[0].Tags["k"], "v")
	mts := try[*efs.DescribeMountTargetsOutput](t)(b.DescribeMountTargets(t.Context(),
		&efs.DescribeMountTargetsInput{AccessPointId: first.AccessPointId}))
	want(t, "mount targets", len(mts.MountTargets), 0)

	try[*efs.DeleteAccessPointOutput](t)(b.DeleteAccessPoint(t.Context(),
		&efs.DeleteAccessPointInput{AccessPointId: first.AccessPointId}))
	want(t, "deleted", words(ap(), ap()), "deleting AccessPointNotFound")

	for i := range 101 {
		try[*efs.CreateAccessPointOutput](t)(b.CreateAccessPoint(t.Context(),
			&efs.CreateAccessPointInput{ClientToken: aws.String(fmt.Sprint(i)), FileSystemId: &id}))
	}
	var pages []int
	for p := efs.NewDescribeAccessPointsPaginator(b.Client,
		&efs.DescribeAccessPointsInput{FileSystemId: &id}); p.HasMorePages(); {
		pages = append(pages, len(try[*efs.DescribeAccessPointsOutput](t)(p.NextPage(t.Context())).AccessPoints))
	}
	want(t, "pages", words(pages), "[100 1]")
	try[*efs.DeleteFileSystemOutput](t)(b.DeleteFileSystem(t.Context(), &efs.DeleteFileSystemInput{FileSystemId: &id}))
	want(t, "access points of a deleted file system", len(b.AccessPoints()), 0)
}

func TestEFSRefusesAndRepeats(t *testing.T) {
	b := newEFSBench(t, Options{Lag: -1})
	again := efs.NewFromConfig(session(t, b.RoleEnv(b.in.ID), 3))
	b.Fail("CreateFileSystem", "ThrottlingException", 1)
	b.Lose("CreateFileSystem", 1)
	// The first try that got through made it; so the SDK's next one says that it is there.
	_, err := again.CreateFileSystem(t.Context(), &efs.CreateFileSystemInput{CreationToken: aws.String("data")})
	want(t, "error", code(err), "FileSystemAlreadyExists")
	want(t, "calls", b.Calls("CreateFileSystem"), 3)
	b.Fail("DescribeFileSystems", "AccessDeniedException", 1)
	_, err = b.DescribeFileSystems(t.Context(), &efs.DescribeFileSystemsInput{})
	want(t, "error", code(err), "AccessDeniedException")
	t.Setenv("AWS_ACCESS_KEY_ID", "AKIAUNKNOWN")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "x")
	wrong := efs.NewFromConfig(session(t, []string{"AWS_REGION=eu-test-1"}, 0))
	_, err = wrong.DescribeFileSystems(t.Context(), &efs.DescribeFileSystemsInput{})
	want(t, "key unknown", code(err), "UnrecognizedClientException")
}
