package efs

import (
	"context"
	"fmt"
	"slices"

	"github.com/aws/aws-sdk-go-v2/aws"
	api "github.com/aws/aws-sdk-go-v2/service/efs"
	"github.com/aws/aws-sdk-go-v2/service/efs/types"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/cloud"
)

func (a *account) accessPoints(ctx context.Context, fs string) ([]types.AccessPointDescription, error) {
	p := api.NewDescribeAccessPointsPaginator(a.efs, &api.DescribeAccessPointsInput{FileSystemId: &fs})
	all, err := pages(ctx, p.HasMorePages, p.NextPage,
		func(o *api.DescribeAccessPointsOutput) []types.AccessPointDescription { return o.AccessPoints })
	return all, refused(ctx, err)
}

// accessPoint returns the access point that Create made for a volume. nil means that there is none.
func (a *account) accessPoint(ctx context.Context, v Volume) (*types.AccessPointDescription, error) {
	all, err := a.accessPoints(ctx, v.FileSystem)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(all, func(p types.AccessPointDescription) bool {
		return v.ours(p.Tags) && aws.ToString(p.ClientToken) == v.token() && p.LifeCycleState != types.LifeCycleStateDeleted
	})
	if i < 0 {
		return nil, nil
	}
	return &all[i], nil
}

// makeAccessPoint makes or finds a volume's own access point, and waits until it is usable.
func (a *account) makeAccessPoint(ctx context.Context, v Volume) (p *types.AccessPointDescription, err error) {
	asked := false
	err = until(ctx, "the access point of volume "+v.Name, func() (bool, string, error) {
		if p, err = a.accessPoint(ctx, v); err != nil {
			return false, "", err
		}
		switch {
		case p == nil && asked:
			return false, "not shown", nil
		case p == nil:
			asked, err = a.askAccessPoint(ctx, v)
			return false, "being asked for", err
		case v.other(*p.AccessPointId) && !asked:
			return false, "", v.replaced(*p.AccessPointId)
		case p.LifeCycleState == types.LifeCycleStateError:
			return false, "", fmt.Errorf("access point %s is in the state error: AWS could not make it; delete it",
				*p.AccessPointId)
		}
		return p.LifeCycleState == types.LifeCycleStateAvailable, string(p.LifeCycleState), nil
	})
	if err != nil {
		return nil, err
	}
	if !v.Folder.is(p) {
		return nil, volume.Errorf(volume.ErrConflict, "volume %s exists as access point %s of another folder or user", v.Name,
			*p.AccessPointId)
	}
	return p, nil
}

func (a *account) askAccessPoint(ctx context.Context, v Volume) (asked bool, err error) {
	info := &types.CreationInfo{OwnerUid: aws.Int64(0), OwnerGid: aws.Int64(0), Permissions: &v.Folder.Perms}
	in := &api.CreateAccessPointInput{ClientToken: aws.String(v.token()), FileSystemId: &v.FileSystem, Tags: v.awsTags(),
		RootDirectory: &types.RootDirectory{Path: &v.Folder.Path, CreationInfo: info}}
	if v.Folder.UID != nil {
		in.PosixUser = &types.PosixUser{Uid: v.Folder.UID, Gid: v.Folder.GID}
		info.OwnerUid, info.OwnerGid = v.Folder.UID, v.Folder.GID
	}
	out, err := a.efs.CreateAccessPoint(ctx, in)
	// Either the token has an access point with other parameters, which the next poll shows. Or the
	// access point is in deletion, or the file system is in change. Then the next poll asks again.
	if cloud.Is(err, "AccessPointAlreadyExists", "IncorrectFileSystemLifeCycleState") {
		return false, nil
	}
	if err != nil {
		return false, refused(ctx, err)
	}
	volume.Failpoint("access-point-asked")
	a.log.Info("created", "volume", v.Name, "fileSystem", v.FileSystem, "accessPoint", *out.AccessPointId)
	return true, nil
}

// is compares the visible members. Permissions count only when AWS creates the directory.
func (f Folder) is(p *types.AccessPointDescription) bool {
	if p.RootDirectory == nil || aws.ToString(p.RootDirectory.Path) != f.Path || (p.PosixUser == nil) != (f.UID == nil) {
		return false
	}
	return f.UID == nil || aws.ToInt64(p.PosixUser.Uid) == *f.UID && aws.ToInt64(p.PosixUser.Gid) == *f.GID
}

// removeAccessPoint removes a volume's access point and waits for the end of the removal. The
// directory behind the access point stays, with all its data.
func (a *account) removeAccessPoint(ctx context.Context, v Volume, id string) error {
	_, err := a.efs.DeleteAccessPoint(ctx, &api.DeleteAccessPointInput{AccessPointId: &id})
	if err != nil && !cloud.Is(err, "AccessPointNotFound") {
		return refused(ctx, err)
	}
	volume.Failpoint("access-point-removed")
	return until(ctx, "access point "+id, func() (bool, string, error) {
		p, err := a.accessPoint(ctx, v)
		return err == nil && (p == nil || *p.AccessPointId != id), "deleting", err // another host may make the next one
	})
}
