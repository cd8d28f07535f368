package efs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	api "github.com/aws/aws-sdk-go-v2/service/efs"
	"github.com/aws/aws-sdk-go-v2/service/efs/types"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/cloud"
)

// account is EFS in one region.
type account struct {
	*cloud.Session
	efs *api.Client
	log *slog.Logger
}

func open(ctx context.Context, region string, log *slog.Logger) (*account, error) {
	s, err := cloud.Open(ctx, region)
	if err != nil {
		return nil, err
	}
	return &account{s, api.NewFromConfig(s.Config), log}, nil
}

// ownerTag is a tag on every object that Create makes. The call that makes the object also sets the
// tag. Its value is the volume's name.
const ownerTag = "lariat:volume"

// removeTag is the tag with the creator's onRemove.
const removeTag = "lariat:on-remove"

func (v Volume) awsTags() []types.Tag {
	all := []types.Tag{
		{Key: aws.String("Name"), Value: &v.Name},
		{Key: aws.String(ownerTag), Value: &v.Name},
		{Key: aws.String(removeTag), Value: aws.String(string(v.OnRemove))},
	}
	for _, t := range v.Tags {
		all = append(all, types.Tag{Key: &t.Key, Value: &t.Value})
	}
	return all
}

// ours reports whether an object with these tags was made for a volume of this name.
func (v Volume) ours(tags []types.Tag) bool {
	return slices.ContainsFunc(tags, func(t types.Tag) bool {
		return aws.ToString(t.Key) == ownerTag &&
			aws.ToString(t.Value) == v.Name
	})
}

// retained reports whether the creator wants to keep the data.
func retained(tags []types.Tag) bool {
	return slices.ContainsFunc(tags, func(t types.Tag) bool {
		return aws.ToString(t.Key) == removeTag && aws.ToString(t.Value) == string(cloud.Retain)
	})
}

// other reports whether the volume's name now means another volume than the one that this host
// knows.
func (v Volume) other(id string) bool { return v.Known != "" && v.Known != id }

// replaced returns the error for a name that means another volume by now.
func (v Volume) replaced(id string) error {
	return volume.Errorf(volume.ErrConflict,
		"volume %s that this host knows was %s and does not exist any more, and %s of the same name "+
			"is another: delete the volume on this host, which touches nothing, and create it again to "+
			"use that one",
		v.Name, v.Known, id)
}

// there reports whether the volume that this host knows, or another of its name, exists. If this
// host knows nothing, there returns true.
func (a *account) there(ctx context.Context, v Volume) (bool, error) {
	switch {
	case v.Known == "", v.Folder == nil && v.FileSystem != "":
		return true, nil
	case v.Folder != nil:
		p, err := a.accessPoint(ctx, v)
		return p != nil, err
	}
	fs, err := a.fileSystem(ctx, v)
	return fs != nil, err
}

// gone returns the error for a known volume whose name no volume has any more.
func (v Volume) gone() error {
	return volume.Errorf(volume.ErrNotFound,
		"volume %s that this host knows was %s and does not exist any more: create makes a new one", v.Name, v.Known)
}

// refused adds an explanation and a kind to an error of the SDK.
func refused(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	shown := cloud.Explain(ctx, err)
	switch {
	case cloud.Is(err, "FileSystemNotFound", "AccessPointNotFound"):
		return volume.Errorf(volume.ErrNotFound, "%w", shown)
	case cloud.Is(err, "SubnetNotFound", "SecurityGroupNotFound", "AvailabilityZonesMismatch",
		"UnsupportedAvailabilityZone"):
		return volume.Errorf(volume.ErrInvalid, "%w", shown)
	case cloud.Is(err, "MountTargetConflict"):
		return volume.Errorf(volume.ErrConflict, "%w", shown)
	}
	return cloud.Invalid(shown)
}

// pauses are the pauses between requests to AWS. A file system takes seconds, a mount target a
// minute or two.
var pauses = cloud.Pauses{First: 300 * time.Millisecond, Most: 10 * time.Second}

// until calls look until look reports the end. The error of a timeout names what and the last state
// of look.
func until(ctx context.Context, what string, look func() (done bool, state string, err error)) error {
	err := pauses.Poll(ctx, look)
	var late *cloud.Late
	if errors.As(err, &late) {
		return fmt.Errorf("%s is still %s: %w; the same call again goes on from here", what, late.Seen, late.Cause)
	}
	return err
}

// pages returns the items of all pages of a list.
func pages[P, T any](ctx context.Context, more func() bool,
	next func(context.Context, ...func(*api.Options)) (P, error), items func(P) []T) (all []T, err error) {
	for more() {
		page, err := next(ctx)
		if err != nil {
			return nil, err
		}
		all = append(all, items(page)...)
	}
	return all, nil
}

// fileSystem returns a volume's file system: the one that it names, or the one that Create made.
// nil means that none exists, or that it is in deletion.
func (a *account) fileSystem(ctx context.Context, v Volume) (*types.FileSystemDescription, error) {
	in := &api.DescribeFileSystemsInput{FileSystemId: &v.FileSystem}
	if v.FileSystem == "" {
		in = &api.DescribeFileSystemsInput{CreationToken: aws.String(v.token())}
	}
	out, err := a.efs.DescribeFileSystems(ctx, in)
	if cloud.Is(err, "FileSystemNotFound") || err == nil && len(out.FileSystems) == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, refused(ctx, err)
	}
	fs := &out.FileSystems[0]
	if fs.LifeCycleState == types.LifeCycleStateDeleted {
		return nil, nil
	}
	if v.FileSystem == "" && !v.ours(fs.Tags) {
		return nil, volume.Errorf(volume.ErrConflict, "file system %s has the creation token of volume %s, and not its "+
			"tag %s: somebody else made it, or took the tag away", *fs.FileSystemId, v.Name, ownerTag)
	}
	return fs, nil
}

// makeFileSystem makes or finds a volume's own file system, and waits until it is usable.
func (a *account) makeFileSystem(ctx context.Context, v Volume) (fs *types.FileSystemDescription, err error) {
	asked := false
	err = until(ctx, "the file system of volume "+v.Name, func() (bool, string, error) {
		if fs, err = a.fileSystem(ctx, v); err != nil {
			return false, "", err
		}
		switch {
		case fs == nil && v.FileSystem != "":
			return false, "", volume.Errorf(volume.ErrNotFound, "file system %s does not exist in %s", v.FileSystem,
				a.Config.Region)
		case fs == nil && asked: // AWS does not show a new file system at once
			return false, "not shown", nil
		case fs == nil:
			asked, err = a.askFileSystem(ctx, v)
			return false, "being asked for", err
		case v.FileSystem == "" && v.other(*fs.FileSystemId) && !asked:
			return false, "", v.replaced(*fs.FileSystemId)
		case fs.LifeCycleState == types.LifeCycleStateError:
			return false, "", fmt.Errorf("file system %s is in the state error: AWS could not make it; delete it",
				*fs.FileSystemId)
		}
		return fs.LifeCycleState == types.LifeCycleStateAvailable || fs.LifeCycleState == types.LifeCycleStateUpdating,
			string(fs.LifeCycleState), nil
	})
	if err != nil {
		return nil, err
	}
	if diff := v.Make.differs(fs); diff != "" {
		return nil, volume.Errorf(volume.ErrConflict, "volume %s exists as file system %s %s", v.Name, *fs.FileSystemId, diff)
	}
	return fs, nil
}

func (a *account) askFileSystem(ctx context.Context, v Volume) (asked bool, err error) {
	in := &api.CreateFileSystemInput{CreationToken: aws.String(v.token()), Tags: v.awsTags(),
		Encrypted:       aws.Bool(v.Make.Encrypted != "false"),
		PerformanceMode: types.PerformanceMode(v.Make.PerformanceMode),
		ThroughputMode:  types.ThroughputMode(v.Make.ThroughputMode)}
	if v.Make.KMSKey != "" {
		in.KmsKeyId = &v.Make.KMSKey
	}
	if v.Make.Throughput > 0 {
		in.ProvisionedThroughputInMibps = aws.Float64(float64(v.Make.Throughput))
	}
	out, err := a.efs.CreateFileSystem(ctx, in)
	// Another host made it, or this host made it and lost the answer. If that file system is in
	// deletion, the next poll asks again.
	if cloud.Is(err, "FileSystemAlreadyExists") {
		return false, nil
	}
	if err != nil {
		return false, refused(ctx, err)
	}
	volume.Failpoint("file-system-asked")
	a.log.Info("created", "volume", v.Name, "fileSystem", *out.FileSystemId)
	return true, nil
}

// differs returns how a file system differs from the request. It compares only options that the
// request has.
func (m Make) differs(fs *types.FileSystemDescription) string {
	have := func(option, is, wanted string) string { return fmt.Sprintf("with %s=%s, not %s", option, is, wanted) }
	key := aws.ToString(fs.KmsKeyId)
	switch {
	case m.PerformanceMode != "" && m.PerformanceMode != string(fs.PerformanceMode):
		return have("performanceMode", string(fs.PerformanceMode), m.PerformanceMode)
	case m.ThroughputMode != "" && m.ThroughputMode != string(fs.ThroughputMode):
		return have("throughputMode", string(fs.ThroughputMode), m.ThroughputMode)
	case m.Throughput > 0 && float64(m.Throughput) != aws.ToFloat64(fs.ProvisionedThroughputInMibps):
		return have("provisionedThroughput", fmt.Sprint(aws.ToFloat64(fs.ProvisionedThroughputInMibps)),
			fmt.Sprint(m.Throughput))
	case m.Encrypted != "" && (m.Encrypted == "true") != aws.ToBool(fs.Encrypted):
		return have("encrypted", fmt.Sprint(aws.ToBool(fs.Encrypted)), string(m.Encrypted))
	case m.KMSKey != "" && !strings.Contains(m.KMSKey, "alias/") && key != m.KMSKey &&
		!strings.HasSuffix(key, "/"+m.KMSKey):
		return have("kmsKeyId", key, m.KMSKey)
	}
	return ""
}

// removeFileSystem removes a file system of Create with its mount targets, and waits for the end of
// the removal.
func (a *account) removeFileSystem(ctx context.Context, v Volume, id string) error {
	points, err := a.accessPoints(ctx, id)
	if err != nil {
		return err
	}
	for _, p := range points {
		if p.LifeCycleState != types.LifeCycleStateDeleting && p.LifeCycleState != types.LifeCycleStateDeleted {
			return volume.Errorf(volume.ErrInUse, "file system %s of volume %s has the access point %s (%s), by which "+
				"others use it: remove that first", id, v.Name, *p.AccessPointId, aws.ToString(p.Name))
		}
	}
	asked := map[string]bool{}
	err = until(ctx, "a mount target of "+id, func() (bool, string, error) {
		targets, err := a.mountTargets(ctx, id)
		for _, t := range targets {
			if asked[*t.MountTargetId] || t.LifeCycleState == types.LifeCycleStateDeleting {
				continue
			}
			_, err := a.efs.DeleteMountTarget(ctx, &api.DeleteMountTargetInput{MountTargetId: t.MountTargetId})
			if err != nil && !cloud.Is(err, "MountTargetNotFound") {
				return false, "", refused(ctx, err)
			}
			asked[*t.MountTargetId] = true
			volume.Failpoint("mount-target-removed")
		}
		if errors.Is(err, volume.ErrNotFound) { // the file system no longer exists
			return true, "", nil
		}
		return len(targets) == 0, "deleting", err
	})
	if err != nil {
		return err
	}
	volume.Failpoint("mount-targets-gone")
	v.FileSystem = id
	removed := false
	return until(ctx, "file system "+id, func() (bool, string, error) {
		if !removed {
			_, err := a.efs.DeleteFileSystem(ctx, &api.DeleteFileSystemInput{FileSystemId: &id})
			switch {
			case err == nil, cloud.Is(err, "FileSystemNotFound"):
				removed = true
				volume.Failpoint("file-system-removed")
			case cloud.Is(err, "FileSystemInUse"): // a mount target is hidden or new
				return false, "in use", nil
			default:
				return false, "", refused(ctx, err)
			}
		}
		fs, err := a.fileSystem(ctx, v)
		return fs == nil && err == nil, "deleting", err
	})
}

// dnsName returns the DNS name of a file system. The SDK knows the suffix, which belongs to the
// region's partition.
func (a *account) dnsName(ctx context.Context, id string) (string, error) {
	e, err := api.NewDefaultEndpointResolverV2().ResolveEndpoint(ctx, api.EndpointParameters{Region: &a.Config.Region})
	if err != nil {
		return "", fmt.Errorf("EFS in region %s: %w", a.Config.Region, err)
	}
	return fileSystemName(id, e.URI), nil
}

func fileSystemName(id string, endpoint url.URL) string {
	_, domain, _ := strings.Cut(endpoint.Host, ".")
	return id + ".efs." + domain
}
