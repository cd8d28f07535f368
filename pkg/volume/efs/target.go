package efs

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	api "github.com/aws/aws-sdk-go-v2/service/efs"
	"github.com/aws/aws-sdk-go-v2/service/efs/types"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/cloud"
)

func (a *account) mountTargets(ctx context.Context, fs string) ([]types.MountTargetDescription, error) {
	p := api.NewDescribeMountTargetsPaginator(a.efs, &api.DescribeMountTargetsInput{FileSystemId: &fs})
	all, err := pages(ctx, p.HasMorePages, p.NextPage,
		func(o *api.DescribeMountTargetsOutput) []types.MountTargetDescription { return o.MountTargets })
	return all, refused(ctx, err)
}

// patience is the largest number of polls until a new mount target must be visible.
const patience = 6

// makeMountTargets makes missing mount targets in a volume's subnets and waits for all of them. The
// security groups are the volume's or the instance's. It neither makes nor opens a security group.
func (a *account) makeMountTargets(ctx context.Context, v Volume, fs string) error {
	subnets, groups, zone := v.Subnets, v.Groups, ""
	if len(subnets) == 0 || len(groups) == 0 {
		self, err := a.Instance(ctx)
		if err != nil {
			return fmt.Errorf("no subnets or no securityGroups for the mount targets of volume %s, and %w", v.Name, err)
		}
		if len(groups) == 0 {
			groups = self.SecurityGroups
		}
		if len(subnets) == 0 {
			subnets, zone = []string{self.Subnet}, self.Zone
		}
	}
	asked, conflict, seen := map[string]bool{}, map[string]error{}, 0
	err := until(ctx, "a mount target of "+fs, func() (bool, string, error) {
		have, err := a.mountTargets(ctx, fs)
		if err != nil {
			return false, "", err
		}
		seen++
		done, state := true, ""
		for _, subnet := range subnets {
			at := slices.IndexFunc(have, func(t types.MountTargetDescription) bool {
				// The user did not name the instance's subnet. A zone can have only one mount
				// target, so another subnet of the zone is as good.
				return aws.ToString(t.SubnetId) == subnet || zone != "" && aws.ToString(t.AvailabilityZoneName) == zone
			})
			switch {
			case at < 0 && !asked[subnet]:
				_, err := a.efs.CreateMountTarget(ctx, &api.CreateMountTargetInput{FileSystemId: &fs, SubnetId: &subnet,
					SecurityGroups: groups})
				switch {
				case err == nil:
					a.log.Info("created", "volume", v.Name, "fileSystem", fs, "mountTargetIn", subnet, "securityGroups", groups)
					volume.Failpoint("mount-target-asked")
				case cloud.Is(err, "MountTargetConflict"):
					// Another host was faster, or an answer was lost. Then the mount target will
					// show. If it does not, the zone has a mount target in another subnet.
					conflict[subnet] = fmt.Errorf("subnet %s: %w", subnet, refused(ctx, err))
				case cloud.Is(err, "IncorrectFileSystemLifeCycleState"):
					return false, "waiting for its file system", nil
				default:
					return false, "", refused(ctx, err)
				}
				asked[subnet], done, state = true, false, "creating"
			case at < 0 && conflict[subnet] != nil && seen > patience:
				return false, "", conflict[subnet]
			case at < 0:
				done, state = false, "not shown"
			case have[at].LifeCycleState == types.LifeCycleStateError:
				return false, "", fmt.Errorf("mount target %s in subnet %s is in the state error: delete it",
					*have[at].MountTargetId, subnet)
			case have[at].LifeCycleState != types.LifeCycleStateAvailable:
				done, state = false, string(have[at].LifeCycleState)
			}
		}
		return done, state, nil
	})
	if err != nil || len(v.Groups) == 0 {
		return err
	}
	return a.checkGroups(ctx, v, fs)
}

// checkGroups compares the volume's security groups with the security groups of its mount targets.
func (a *account) checkGroups(ctx context.Context, v Volume, fs string) error {
	have, err := a.mountTargets(ctx, fs)
	if err != nil {
		return err
	}
	for _, t := range have {
		if len(v.Subnets) > 0 && !slices.Contains(v.Subnets, aws.ToString(t.SubnetId)) {
			continue
		}
		out, err := a.efs.DescribeMountTargetSecurityGroups(ctx,
			&api.DescribeMountTargetSecurityGroupsInput{MountTargetId: t.MountTargetId})
		if err != nil {
			return refused(ctx, err)
		}
		if got := slices.Sorted(slices.Values(out.SecurityGroups)); !slices.Equal(got, v.Groups) {
			return volume.Errorf(volume.ErrConflict, "mount target %s of volume %s has the security groups %s, not %s",
				*t.MountTargetId, v.Name, strings.Join(got, ","), strings.Join(v.Groups, ","))
		}
	}
	return nil
}

// lookup is the time limit for DNS, which may not work. The API knows addresses, too.
const lookup = 2 * time.Second

// server returns the address from which a file system is mounted. It is the DNS name, if that
// resolves: the name stands for the mount target of the client's zone. Otherwise it is the address
// of that mount target or, as a last resort, of another mount target.
func (a *account) server(ctx context.Context, fs string) (string, error) {
	name, err := a.dnsName(ctx, fs)
	if err != nil {
		return "", err
	}
	within, cancel := context.WithTimeout(ctx, lookup)
	defer cancel()
	if addrs, err := net.DefaultResolver.LookupNetIP(within, "ip", name); err == nil && len(addrs) > 0 {
		return name, nil
	}
	all, err := a.mountTargets(ctx, fs)
	if err != nil {
		return "", fmt.Errorf("%s does not resolve, and %w", name, err)
	}
	ready := slices.DeleteFunc(slices.Clone(all), func(t types.MountTargetDescription) bool {
		return t.LifeCycleState != types.LifeCycleStateAvailable || address(t) == ""
	})
	if len(ready) == 0 {
		state := "has no mount target: create makes them"
		if len(all) > 0 {
			state = fmt.Sprintf("has no mount target that is ready: %s is %s", *all[0].MountTargetId, all[0].LifeCycleState)
		}
		return "", fmt.Errorf("file system %s %s", fs, state)
	}
	self, err := a.Instance(ctx)
	if err != nil {
		a.log.Warn("the mount target may be one of another zone", "fileSystem", fs, "mountTarget", *ready[0].MountTargetId,
			"error", err)
		return address(ready[0]), nil
	}
	for _, t := range ready {
		if aws.ToString(t.AvailabilityZoneName) == self.Zone {
			return address(t), nil
		}
	}
	a.log.Warn("no mount target in this zone: traffic to another is slower and is charged", "fileSystem", fs, "zone",
		self.Zone, "mountTarget", *ready[0].MountTargetId, "its zone", aws.ToString(ready[0].AvailabilityZoneName))
	return address(ready[0]), nil
}

func address(t types.MountTargetDescription) string {
	if t.IpAddress != nil {
		return *t.IpAddress
	}
	return aws.ToString(t.Ipv6Address)
}
