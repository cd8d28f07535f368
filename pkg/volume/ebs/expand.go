package ebs

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/cloud"
	"github.com/lariat-net/lariat/pkg/volume/mounts"
)

// Expand implements volume.Driver. On the node it also enlarges the volume if necessary, because
// kubelet's controller does not call Expand.
func (d *Driver) Expand(ctx context.Context, req volume.Request, to volume.Expansion) (int64, error) {
	ctx, cancel := volume.WithDeadline(ctx, volume.Deadlines.Long)
	defer cancel()
	v, err := d.understand(req)
	if err != nil {
		return 0, err
	}
	unlock, err := d.locks.Lock(ctx, v.Name, "expand")
	if err != nil {
		return 0, err
	}
	defer unlock()
	within, cancelWork := volume.WithReserve(ctx)
	defer cancelWork()
	r, err := d.open(within, v.Region)
	if err != nil {
		return 0, err
	}
	f, err := d.findExisting(within, r, v)
	if err != nil {
		return 0, err
	}
	const gib = 1 << 30
	want := (to.Size + gib - 1) / gib
	if want > 65536 {
		return 0, volume.Errorf(volume.ErrInvalid, "volume %s: %d octets are more than the 65536 GiB that a volume can have",
			v.Name, to.Size)
	}
	if err := d.enlarge(within, r, f, int32(want)); err != nil {
		return 0, fmt.Errorf("expand volume %s (%s) to %d GiB: %w", v.Name, f.id(), want, err)
	}
	volume.Failpoint("volume-expanded")
	size := max(want*gib, f.bytes())
	if !to.FileSystem {
		return size, nil
	}
	return size, d.enlargeFS(within, v, f, to.Dir, size)
}

// coolDown is AWS's minimum time between two changes of a volume.
const coolDown = 6 * time.Hour

// enlarge enlarges a volume, and waits until the new size is usable.
func (d *Driver) enlarge(ctx context.Context, r *region, f *found, want int32) error {
	last, err := r.modification(ctx, f.id())
	if err != nil {
		return err
	}
	// A volume shows its new size before that size is usable. The state of its modification shows
	// whether it is.
	going := last != nil && last.ModificationState == types.VolumeModificationStateModifying &&
		aws.ToInt32(last.TargetSize) >= want
	if !going {
		if aws.ToInt32(f.Size) >= want {
			return nil
		}
		volume.Failpoint("before-modify")
		_, err := r.ec2.ModifyVolume(ctx, &ec2.ModifyVolumeInput{VolumeId: aws.String(f.id()), Size: aws.Int32(want)})
		volume.Failpoint("modify-asked")
		if cloud.Is(err, "VolumeModificationRateExceeded", "IncorrectModificationState") {
			when := "six hours after the last change"
			if last != nil && last.StartTime != nil {
				when = "at " + last.StartTime.Add(coolDown).UTC().Format(time.RFC3339)
			}
			// The answer to an earlier call may have been lost.
			if now, merr := r.modification(ctx, f.id()); merr != nil || now == nil || aws.ToInt32(now.TargetSize) < want ||
				now.ModificationState == types.VolumeModificationStateFailed {
				return fmt.Errorf("AWS lets a volume be changed once in six hours; it can be tried again %s: %w", when,
					cloud.Explain(ctx, err))
			}
		} else if err != nil {
			return cloud.Invalid(cloud.Explain(ctx, err))
		}
	}
	return pauses.Poll(ctx, func() (bool, string, error) {
		m, err := r.modification(ctx, f.id())
		switch {
		case err != nil:
			return false, "", err
		case m == nil || aws.ToInt32(m.TargetSize) < want:
			return false, "AWS has accepted it, and does not show it", nil
		case m.ModificationState == types.VolumeModificationStateFailed:
			return false, "", fmt.Errorf("AWS could not: %s", aws.ToString(m.StatusMessage))
		}
		return m.ModificationState != types.VolumeModificationStateModifying,
			fmt.Sprintf("AWS is still at it (%s)", m.ModificationState), nil
	})
}

// modification returns the latest modification of a volume, or nil.
func (r *region) modification(ctx context.Context, id string) (*types.VolumeModification, error) {
	out, err := r.ec2.DescribeVolumesModifications(ctx, &ec2.DescribeVolumesModificationsInput{VolumeIds: []string{id}})
	if cloud.Is(err, "InvalidVolumeModification.NotFound") || err == nil && len(out.VolumesModifications) == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, cloud.Explain(ctx, err)
	}
	latest := slices.MaxFunc(out.VolumesModifications, func(a, b types.VolumeModification) int {
		return aws.ToTime(a.StartTime).Compare(aws.ToTime(b.StartTime))
	})
	return &latest, nil
}

// enlargeFS enlarges the file system at a directory to the whole device.
func (d *Driver) enlargeFS(ctx context.Context, v Volume, f *found, dir string, size int64) error {
	dir, err := mounts.Resolve(dir)
	if err != nil {
		return err
	}
	table, err := mounts.Read()
	if err != nil {
		return err
	}
	stack := table.At(dir)
	if len(stack) == 0 {
		return fmt.Errorf("volume %s (%s) has %d octets now; its file system was not enlarged: nothing is mounted at %s",
			v.Name, f.id(), size, dir)
	}
	top := stack[len(stack)-1]
	if err := d.healthy(dir, top); err != nil {
		return err
	}
	var dev device
	err = pauses.Poll(ctx, func() (bool, string, error) {
		dev, err = d.devices.wait(ctx, f.id(), top.Source)
		if err != nil || dev.size >= size {
			return true, "", err
		}
		d.devices.rescan(dev)
		return false, fmt.Sprintf("%s has %d octets still, and the volume %d", dev.path, dev.size, size), nil
	})
	if err != nil {
		return err
	}
	if top.Device != dev.number {
		return volume.Errorf(volume.ErrConflict, "%s is mounted at %s, and not volume %s (%s, %s)", top.Source, dir, v.Name,
			f.id(), dev.path)
	}
	if top.ReadOnly() {
		i := slices.IndexFunc(table, func(m mounts.Entry) bool { return m.Device == dev.number && !m.ReadOnly() })
		if i < 0 {
			return fmt.Errorf("volume %s (%s) has %d bytes now; its file system is mounted read-only at %s: the first "+
				"mount that may write enlarges it", v.Name, f.id(), size, dir)
		}
		dir = table[i].Point
	}
	err = growFS(ctx, top.FSType, dir, dev)
	volume.Failpoint("file-system-expanded")
	if err != nil {
		return fmt.Errorf("volume %s (%s): %w", v.Name, f.id(), err)
	}
	d.log.Info("expanded", "volume", v.Name, "id", f.id(), "octets", size)
	return nil
}
