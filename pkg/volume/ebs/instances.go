package ebs

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/cloud"
)

var (
	instanceID = regexp.MustCompile(`^i-([0-9a-f]{8}|[0-9a-f]{17})$`)
	nodeName   = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?$`)
)

// instance returns the id of a node with kubelet's name. "" and this host's own name mean this
// instance. Other nodes are found by their private DNS name. Nodes with names of their own are
// found by their tag Name. An id is returned unchanged.
func (r *region) instance(ctx context.Context, node string) (string, error) {
	host, _ := os.Hostname()
	short, _, _ := strings.Cut(host, ".")
	switch {
	case instanceID.MatchString(node):
		return node, nil
	case node == "":
		self, err := r.Instance(ctx)
		if err == nil && self.Region != r.Config.Region {
			err = volume.Errorf(volume.ErrInvalid, "this instance is in region %s, not %s", self.Region, r.Config.Region)
		}
		return self.ID, err
	case !nodeName.MatchString(node):
		return "", volume.Errorf(volume.ErrInvalid, "node %s is neither a host name nor an instance's id",
			volume.Excerpt(node))
	case node == host || node == short:
		if self, err := r.Instance(ctx); err == nil && self.Region == r.Config.Region {
			return self.ID, nil
		}
	}
	for _, filter := range []types.Filter{
		{Name: aws.String("private-dns-name"), Values: []string{node, node + ".*"}},
		{Name: aws.String("tag:Name"), Values: []string{node}},
	} {
		alive := types.Filter{Name: aws.String("instance-state-name"), Values: []string{"pending", "running", "stopping",
			"stopped", "shutting-down"}}
		all, err := r.instances(ctx, &ec2.DescribeInstancesInput{Filters: []types.Filter{filter, alive}})
		switch {
		case err != nil:
			return "", err
		case len(all) == 1:
			return aws.ToString(all[0].InstanceId), nil
		case len(all) > 1:
			return "", volume.Errorf(volume.ErrConflict, "node %s: %d instances have it as their %s (%s, %s …)", node,
				len(all), aws.ToString(filter.Name), aws.ToString(all[0].InstanceId), aws.ToString(all[1].InstanceId))
		}
	}
	return "", fmt.Errorf("node %s: no instance in region %s has it as its private DNS name or its tag Name: %w", node,
		r.Config.Region, errNoInstance)
}

// errNoInstance means that a node's name matches no instance. The error may pass.
var errNoInstance = fmt.Errorf("is it gone, or in another region?")

func (r *region) instances(ctx context.Context, in *ec2.DescribeInstancesInput) (all []types.Instance, err error) {
	pages := ec2.NewDescribeInstancesPaginator(r.ec2, in)
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return nil, cloud.Explain(ctx, err)
		}
		for _, reservation := range page.Reservations {
			all = append(all, reservation.Instances...)
		}
	}
	return all, nil
}

// instanceByID returns an instance by its id. If AWS has forgotten the instance, it returns an
// instance with the state terminated.
func (r *region) instanceByID(ctx context.Context, id string) (types.Instance, error) {
	all, err := r.instances(ctx, &ec2.DescribeInstancesInput{InstanceIds: []string{id}})
	if cloud.Is(err, "InvalidInstanceID.NotFound") || err == nil && len(all) == 0 {
		return types.Instance{InstanceId: aws.String(id),
			State: &types.InstanceState{Name: types.InstanceStateNameTerminated}}, nil
	}
	if err != nil {
		return types.Instance{}, err
	}
	return all[0], nil
}

func state(i types.Instance) types.InstanceStateName {
	if i.State == nil {
		return ""
	}
	return i.State.Name
}

// zone returns the zone of an instance.
func zone(i types.Instance) string {
	if i.Placement == nil {
		return ""
	}
	return aws.ToString(i.Placement.AvailabilityZone)
}

// checkAttachLimit checks that an instance can take one more volume. It accepts credentials without
// the permission for this check, because AttachVolume enforces the limit.
func (d *Driver) checkAttachLimit(ctx context.Context, r *region, i types.Instance) error {
	out, err := r.ec2.DescribeInstanceTypes(ctx,
		&ec2.DescribeInstanceTypesInput{InstanceTypes: []types.InstanceType{i.InstanceType}})
	if err != nil || len(out.InstanceTypes) != 1 || out.InstanceTypes[0].EbsInfo == nil ||
		out.InstanceTypes[0].EbsInfo.MaximumEbsAttachments == nil {
		d.log.Warn("the limit of volumes is not known", "type", i.InstanceType, "error", cloud.Explain(ctx, err))
		return nil
	}
	kind := out.InstanceTypes[0]
	limit, volumes := int(*kind.EbsInfo.MaximumEbsAttachments), len(i.BlockDeviceMappings)
	others, with := 0, ""
	if kind.EbsInfo.AttachmentLimitType == types.AttachmentLimitTypeShared {
		others = len(i.NetworkInterfaces)
		if s := kind.InstanceStorageInfo; s != nil {
			for _, disk := range s.Disks {
				others += int(aws.ToInt32(disk.Count))
			}
		}
		with = fmt.Sprintf(" and %d network interfaces and disks of its own, which count", others)
	}
	if volumes+others >= limit {
		return volume.Errorf(volume.ErrInUse, "instance %s has %d volumes%s: a %s takes %d; detach one, or use another "+
			"node or instance type", aws.ToString(i.InstanceId), volumes, with, i.InstanceType, limit)
	}
	return nil
}
