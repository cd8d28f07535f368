package ebs

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/cloud"
)

// Attach implements volume.Driver. It creates a missing volume if the options specify the volume,
// because kubelet has no verb for that. The returned device is AWS's name, which differs from the
// kernel's name on most instances.
func (d *Driver) Attach(ctx context.Context, req volume.Request, node string) (string, error) {
	ctx, cancel := volume.WithDeadline(ctx, volume.Deadlines.Long)
	defer cancel()
	v, err := d.understand(req)
	if err != nil {
		return "", err
	}
	unlock, err := d.locks.Lock(ctx, v.Name, "attach")
	if err != nil {
		return "", err
	}
	defer unlock()
	within, cancelWork := volume.WithReserve(ctx)
	defer cancelWork()
	r, err := d.open(within, v.Region)
	if err != nil {
		return "", err
	}
	_, device, err := d.attach(within, r, v, node)
	return device, err
}

// attach is Attach with the lock held.
func (d *Driver) attach(ctx context.Context, r *region, v Volume, node string) (*found, string, error) {
	to, err := r.instance(ctx, node)
	if err != nil {
		return nil, "", err
	}
	f, err := d.ensure(ctx, r, v, false)
	if err != nil {
		return nil, "", err
	}
	if d.called(f) != v.DetachAs {
		// Detach gets only this name, maybe on another host.
		if err := r.tag(ctx, f.id(), tagAttachedAs, v.DetachAs); err != nil {
			return nil, "", err
		}
	}
	volume.Failpoint("before-attach")
	a := attachment{d: d, r: r, v: v, f: f, to: to}
	if err := pauses.Poll(ctx, func() (bool, string, error) { return a.step(ctx) }); err != nil {
		return nil, "", fmt.Errorf("attach volume %s (%s) to instance %s: %w", v.Name, f.id(), to, err)
	}
	volume.Failpoint("attached")
	return a.f, a.device, nil
}

// attachment is an attachment in progress.
type attachment struct {
	d      *Driver
	r      *region
	v      Volume
	f      *found
	to     string   // instance
	device string   // known after AWS's answer
	bad    []string // names that AWS reports as used, but whose users it does not show
	asked  bool     // AttachVolume was called; its effect may not be visible yet
}

// step examines the volume, takes the next action and reports whether the attachment is complete.
func (a *attachment) step(ctx context.Context) (done bool, seen string, err error) {
	f, err := a.r.describe(ctx, a.f.id())
	if err != nil {
		return false, "", err
	}
	if f == nil {
		return false, "", volume.Errorf(volume.ErrNotFound, "it does not exist any more")
	}
	a.f = f
	if len(f.Attachments) == 0 {
		if f.State != types.VolumeStateAvailable {
			return false, fmt.Sprintf("it is %s", f.State), nil
		}
		if a.asked {
			return false, "AWS has accepted it, and does not show it", nil
		}
		seen, err := a.ask(ctx)
		return false, seen, err
	}
	at := f.Attachments[0]
	switch id := aws.ToString(at.InstanceId); {
	case id != a.to:
		return a.elsewhere(ctx, id, at)
	case at.State == types.VolumeAttachmentStateAttached:
		a.device = aws.ToString(at.Device)
		return true, "", nil
	case at.State == types.VolumeAttachmentStateAttaching:
		since := ""
		if at.AttachTime != nil {
			since = " since " + at.AttachTime.UTC().Format("15:04:05 UTC")
		}
		return false, fmt.Sprintf("it has been attaching as %s%s; if that goes on, detach it by hand, or stop and start "+
			"the instance", aws.ToString(at.Device), since), nil
	}
	a.asked = false
	return false, fmt.Sprintf("it is still %s from there", at.State), nil
}

// elsewhere handles a volume that is attached to another instance. It detaches the volume only if
// the options ask for that and that instance can no longer write.
func (a *attachment) elsewhere(ctx context.Context, id string,
	at types.VolumeAttachment) (done bool, seen string, err error) {
	other, err := a.r.instanceByID(ctx, id)
	if err != nil {
		return false, "", err
	}
	name := fmt.Sprintf("instance %s (%s)", id, state(other))
	gone := state(other) == types.InstanceStateNameStopped || state(other) == types.InstanceStateNameTerminated
	switch {
	case at.State == types.VolumeAttachmentStateDetaching && !(gone && a.v.Force):
		return false, "it is being detached from " + name, nil
	case !a.v.Force:
		hint := "; detach it there first"
		if gone {
			hint += ", or set forceDetach"
		}
		return false, "", volume.Errorf(volume.ErrInUse, "it is %s to %s%s", at.State, name, hint)
	case !gone:
		return false, "", volume.Errorf(volume.ErrInUse, "it is %s to %s: forceDetach takes it only from instances that "+
			"are stopped or terminated, because others may write to it", at.State, name)
	}
	a.d.log.Warn("detaching by force", "volume", a.v.Name, "id", a.f.id(), "from", id, "state", state(other))
	// Use force only after an ordinary detachment that does not end.
	force := at.State == types.VolumeAttachmentStateDetaching || at.State == types.VolumeAttachmentStateBusy
	return false, "it is being detached from " + name, a.r.release(ctx, a.f.id(), id, force)
}

// ask calls AttachVolume, after checks for reasons of a refusal by AWS. A state that passes by
// itself is no error. Then seen describes the state.
func (a *attachment) ask(ctx context.Context) (seen string, err error) {
	i, err := a.r.instanceByID(ctx, a.to)
	if err != nil {
		return "", err
	}
	there, here := aws.ToString(a.f.AvailabilityZone), zone(i)
	switch {
	case state(i) == types.InstanceStateNamePending, state(i) == types.InstanceStateNameStopping:
		return fmt.Sprintf("the instance is %s", state(i)), nil
	case state(i) != types.InstanceStateNameRunning && state(i) != types.InstanceStateNameStopped:
		return "", fmt.Errorf("the instance is %s", state(i))
	case there != here:
		return "", volume.Errorf(volume.ErrConflict,
			"the volume is in zone %s and the instance in %s, and volumes never leave their zone: "+
				"use a node in %s, or make a snapshot of it and a volume of that (snapshotID) in %s", there, here, there, here)
	}
	if err := a.d.checkAttachLimit(ctx, a.r, i); err != nil {
		return "", err
	}
	used := slices.Clone(a.bad)
	for _, m := range i.BlockDeviceMappings {
		used = append(used, aws.ToString(m.DeviceName))
	}
	device := freeName(a.f.id(), used)
	if device == "" {
		return "", volume.Errorf(volume.ErrInUse, "the instance uses all device names")
	}
	_, err = a.r.ec2.AttachVolume(ctx, &ec2.AttachVolumeInput{VolumeId: aws.String(a.f.id()), InstanceId: aws.String(a.to),
		Device: aws.String(device)})
	volume.Failpoint("attach-asked")
	switch {
	case err == nil:
		a.asked = true
		a.d.log.Info("attaching", "volume", a.v.Name, "id", a.f.id(), "instance", a.to, "device", device)
		return "AWS does not show it", nil
	case cloud.Is(err, "InvalidDevice.InUse"), cloud.Is(err, "InvalidParameterValue") &&
		strings.Contains(err.Error(), "in use"):
		a.bad = append(a.bad, device)
		return "AWS says that the instance uses the device name " + device, nil
	case cloud.Is(err, "VolumeInUse", "IncorrectState", "IncorrectInstanceState",
		"InvalidVolume.NotFound", "InvalidInstanceID.NotFound"):
		// The volume may be attached by an earlier call, whose answer was lost, or by another
		// caller. Otherwise one part of AWS does not know yet what another part has shown. The next
		// step shows the result.
		return cloud.Explain(ctx, err).Error(), nil
	case cloud.Is(err, "OperationNotPermitted", "IncorrectModificationState"):
		m, merr := a.r.modification(ctx, a.f.id())
		if merr != nil {
			return "", merr
		}
		// Optimizing takes hours, and does not prevent an attachment.
		if m != nil && m.ModificationState == types.VolumeModificationStateModifying ||
			strings.Contains(err.Error(), "modification state") {
			return "AWS attaches no volume that is being modified: " + describe(m), nil
		}
	case cloud.Is(err, "AttachmentLimitExceeded"):
		return "", volume.Errorf(volume.ErrInUse,
			"%w; detach a volume, or use another node or instance type", cloud.Explain(ctx, err))
	}
	return "", cloud.Invalid(cloud.Explain(ctx, err))
}

// describe returns the text of a modification, for messages.
func describe(m *types.VolumeModification) string {
	if m == nil {
		return "AWS does not say to what"
	}
	return fmt.Sprintf(
		"from %d GiB %s to %d GiB %s, begun at %s, %d %% done",
		aws.ToInt32(m.OriginalSize), m.OriginalVolumeType, aws.ToInt32(m.TargetSize), m.TargetVolumeType,
		aws.ToTime(m.StartTime).UTC().Format(time.RFC3339), aws.ToInt64(m.Progress))
}

// freeName returns a device name that is not used, from /dev/xvdba to /dev/xvddz. Every type of
// instance accepts these names. Each volume starts its search at a different name, so that
// simultaneous attachments do not want the same name. This also avoids a name that was just freed,
// because EC2 holds such a name for a while.
func freeName(id string, used []string) string {
	const names = 3 * 26
	h := fnv.New32a()
	h.Write([]byte(id))
	for i := range names {
		n := (int(h.Sum32()%names) + i) % names
		name := "xvd" + string(rune('b'+n/26)) + string(rune('a'+n%26))
		if !slices.ContainsFunc(used, func(u string) bool { return strings.TrimPrefix(u, "/dev/") == name }) {
			return "/dev/" + name
		}
	}
	return ""
}

// IsAttached implements volume.Driver.
func (d *Driver) IsAttached(ctx context.Context, req volume.Request, node string) (bool, error) {
	ctx, cancel := volume.WithDeadline(ctx, volume.Deadlines.Short)
	defer cancel()
	v, err := d.understand(req)
	if err != nil {
		return false, err
	}
	r, err := d.open(ctx, v.Region)
	if err != nil {
		return false, err
	}
	to, err := r.instance(ctx, node)
	if err != nil {
		return false, err
	}
	f, err := d.find(ctx, r, v)
	if err != nil || f == nil {
		return false, err
	}
	return f.attachedTo(to), nil
}

func (f *found) attachedTo(instance string) bool {
	return slices.ContainsFunc(f.Attachments, func(a types.VolumeAttachment) bool {
		return aws.ToString(a.InstanceId) == instance && a.State == types.VolumeAttachmentStateAttached
	})
}

// Detach implements volume.Driver. The volume argument is a name, or a device of this host.
func (d *Driver) Detach(ctx context.Context, name, node string) error {
	ctx, cancel := volume.WithDeadline(ctx, volume.Deadlines.Long)
	defer cancel()
	if err := d.config.check(); err != nil {
		return fmt.Errorf("the driver's environment: %w", err)
	}
	id := ""
	if device, ok := strings.CutPrefix(name, "/dev/"); ok {
		if err := volume.CheckName(device); err != nil {
			return volume.Errorf(volume.ErrInvalid, "device %s is none", volume.Excerpt(name))
		}
		if id = d.devices.volume(device); id != "" {
			name = id
		}
	} else if err := volume.CheckName(name); err != nil {
		return err
	}
	unlock, err := d.locks.Lock(ctx, name, "detach")
	if err != nil {
		return err
	}
	defer unlock()
	rec, _, err := d.volumes.Get(name)
	if err != nil {
		return err
	}
	within, cancelWork := volume.WithReserve(ctx)
	defer cancelWork()
	r, err := d.open(within, rec.Region)
	if err != nil {
		return err
	}
	f, err := d.named(within, r, name, id, node, rec)
	if err == nil && f != nil {
		err = d.detach(within, r, f, node)
	}
	if err != nil {
		return fmt.Errorf("detach volume %s: %w", name, err)
	}
	volume.Failpoint("detached")
	if f != nil && d.ours(f, f.tags[tagVolume]) && f.tags[tagVolume] != name {
		if err := d.forget(f.tags[tagVolume]); err != nil {
			return err
		}
	}
	return d.forget(name)
}

// called returns Detach's name for a volume: the name of the last Attach, or the name under which
// Create made the volume.
func (d *Driver) called(f *found) string {
	if as := f.tags[tagAttachedAs]; as != "" {
		return as
	}
	if f.tags[tagCluster] == d.config.Cluster {
		return f.tags[tagVolume]
	}
	return ""
}

// has returns the volume that an instance has under Detach's name for it, or nil. Other instances
// may have other volumes of the same name, because two pods can call their volumes "data".
func (d *Driver) has(ctx context.Context, r *region, instance, name string) (*found, error) {
	pages := ec2.NewDescribeVolumesPaginator(r.ec2,
		&ec2.DescribeVolumesInput{Filters: []types.Filter{{Name: aws.String("attachment.instance-id"),
			Values: []string{instance}}}})
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return nil, cloud.Explain(ctx, err)
		}
		for _, v := range page.Volumes {
			if f := newFound(v); d.called(f) == name {
				return f, nil
			}
		}
	}
	return nil, nil
}

// named returns the volume of a Detach. It looks by id, by AWS's device name on this host, and by
// the node's volume of that name. Then it uses this host's record and the tags.
func (d *Driver) named(ctx context.Context, r *region, name, id, node string, rec record) (*found, error) {
	if strings.HasPrefix(name, "/dev/") {
		self, err := r.instance(ctx, "")
		if err != nil {
			return nil, err
		}
		i, err := r.instanceByID(ctx, self)
		if err != nil {
			return nil, err
		}
		for _, m := range i.BlockDeviceMappings {
			if aws.ToString(m.DeviceName) == name && m.Ebs != nil {
				id = aws.ToString(m.Ebs.VolumeId)
			}
		}
		if id == "" {
			return nil, nil
		}
	}
	if id == "" {
		instance, err := r.instance(ctx, node)
		if err != nil && !errors.Is(err, errNoInstance) {
			return nil, err
		}
		if err == nil {
			if f, err := d.has(ctx, r, instance, name); err != nil || f != nil {
				return f, err
			}
		}
		id = rec.ID
	}
	if id != "" {
		if f, err := r.describe(ctx, id); err != nil || f != nil {
			return f, err
		}
	}
	return d.findByTag(ctx, r, tagVolume, name)
}

// detach detaches a volume from a node, and from no other node.
func (d *Driver) detach(ctx context.Context, r *region, f *found, node string) error {
	if len(f.Attachments) == 0 && f.State == types.VolumeStateAvailable {
		return nil
	}
	from, err := r.instance(ctx, node)
	if err != nil {
		if len(f.Attachments) > 0 && errors.Is(err, errNoInstance) {
			err = fmt.Errorf("it is attached to instance %s, and %w", aws.ToString(f.Attachments[0].InstanceId), err)
		}
		return err
	}
	if used := d.used(f.id()); used != "" && d.here(ctx, r, from) {
		return volume.Errorf(volume.ErrInUse, "it is mounted at %s", used)
	}
	volume.Failpoint("before-detach")
	asked := false
	return pauses.Poll(ctx, func() (done bool, seen string, err error) {
		now, err := r.describe(ctx, f.id())
		if err != nil || now == nil {
			return err == nil, "", err
		}
		i := slices.IndexFunc(now.Attachments,
			func(a types.VolumeAttachment) bool { return aws.ToString(a.InstanceId) == from })
		if i < 0 {
			// Just after AttachVolume, the answer may not show the attachment yet. Then the volume
			// is in use without an attachment.
			return now.State == types.VolumeStateAvailable || len(now.Attachments) > 0,
				fmt.Sprintf("%s is %s", f.id(), now.State), nil
		}
		at := now.Attachments[i]
		switch at.State {
		case types.VolumeAttachmentStateBusy:
			return false, fmt.Sprintf("instance %s does not let it go (busy): something there has it open or mounted", from), nil
		case types.VolumeAttachmentStateDetaching, types.VolumeAttachmentStateDetached:
		default:
			if !asked {
				asked = true
				d.log.Info("detaching", "id", f.id(), "instance", from)
				if err := r.release(ctx, f.id(), from, false); err != nil {
					return false, "", err
				}
				volume.Failpoint("detach-asked")
			}
		}
		return false, fmt.Sprintf("instance %s has it still, %s", from, at.State), nil
	})
}

// here reports whether an instance is this instance.
func (d *Driver) here(ctx context.Context, r *region, instance string) bool {
	self, err := r.Instance(ctx)
	return err == nil && self.ID == instance
}

// release calls DetachVolume. A volume that is already detached is no error.
func (r *region) release(ctx context.Context, id, instance string, force bool) error {
	_, err := r.ec2.DetachVolume(ctx, &ec2.DetachVolumeInput{VolumeId: aws.String(id), InstanceId: aws.String(instance),
		Force: aws.Bool(force)})
	if cloud.Is(err, "IncorrectState", "InvalidAttachment.NotFound", "InvalidVolume.NotFound") {
		return nil
	}
	return cloud.Explain(ctx, err)
}
