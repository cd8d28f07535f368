package ebs

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/cloud"
)

// Tags that Lariat sets. The first tag marks a volume of Create, and is part of the call that
// creates the volume.
const (
	tagPrefix  = "lariat:"
	tagVolume  = tagPrefix + "volume"  // the name
	tagCluster = tagPrefix + "cluster" // Config.Cluster, if it is not ""
	// Detach's name for the volume, if it is not the volume's name. It differs if Lariat did not
	// create the volume, or if kubelet uses another name.
	tagAttachedAs = tagPrefix + "attached-as"
	tagFileSystem = tagPrefix + "file-system" // none, making or made
	tagOnRemove   = tagPrefix + "on-remove"   // the creator's choice; absent: the creator made none
)

// Values of tagFileSystem.
const (
	none   = "none"   // never formatted
	making = "making" // mkfs has begun
	made   = "made"
)

// found is a volume as AWS shows it.
type found struct {
	types.Volume
	tags map[string]string
}

func (f *found) id() string { return aws.ToString(f.VolumeId) }

// bytes returns the volume's size in bytes.
func (f *found) bytes() int64 { return int64(aws.ToInt32(f.Size)) << 30 }

// ours reports whether Create made the volume under this name.
func (d *Driver) ours(f *found, name string) bool {
	return f.tags[tagVolume] == name && f.tags[tagCluster] == d.config.Cluster
}

// describe returns one volume, or nil.
func (r *region) describe(ctx context.Context, id string) (*found, error) {
	out, err := r.ec2.DescribeVolumes(ctx, &ec2.DescribeVolumesInput{VolumeIds: []string{id}})
	if cloud.Is(err, "InvalidVolume.NotFound") {
		return nil, nil
	}
	if err != nil {
		return nil, cloud.Explain(ctx, err)
	}
	if len(out.Volumes) != 1 {
		return nil, fmt.Errorf("ec2:DescribeVolumes: %d volumes have the id %s", len(out.Volumes), id)
	}
	return newFound(out.Volumes[0]), nil
}

func newFound(v types.Volume) *found {
	f := &found{v, map[string]string{}}
	for _, t := range v.Tags {
		f.tags[aws.ToString(t.Key)] = aws.ToString(t.Value)
	}
	return f
}

// findByTag returns the volume of a name in a tag, or nil. It ignores volumes in deletion.
func (d *Driver) findByTag(ctx context.Context, r *region, tag, name string) (*found, error) {
	var all []*found
	pages := ec2.NewDescribeVolumesPaginator(r.ec2,
		&ec2.DescribeVolumesInput{Filters: []types.Filter{{Name: aws.String("tag:" + tag), Values: []string{name}}}})
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return nil, cloud.Explain(ctx, err)
		}
		for _, v := range page.Volumes {
			// The filter reads * and ? as wildcards, which they are not in names, so compare again.
			if f := newFound(v); f.tags[tag] == name && f.tags[tagCluster] == d.config.Cluster &&
				v.State != types.VolumeStateDeleting && v.State != types.VolumeStateDeleted {
				all = append(all, f)
			}
		}
	}
	switch len(all) {
	case 0:
		return nil, nil
	case 1:
		return all[0], nil
	}
	return nil, volume.Errorf(volume.ErrConflict, "%d volumes have the tag %s=%s (%s, %s …): take it away from those "+
		"that are not meant", len(all), tag, name, all[0].id(), all[1].id())
}

// find returns the volume that a request means, or nil if no volume has its name.
func (d *Driver) find(ctx context.Context, r *region, v Volume) (*found, error) {
	switch {
	case v.ID != "":
		f, err := r.describe(ctx, v.ID)
		if err == nil && f == nil {
			err = volume.Errorf(volume.ErrNotFound, "volume %s: there is no %s in region %s", v.Name, v.ID, r.Config.Region)
		}
		return f, err
	case v.Known == "":
		return d.findByTag(ctx, r, tagVolume, v.Name)
	}
	f, err := r.alive(ctx, v.Known)
	if f != nil || err != nil {
		return f, err
	}
	other, err := d.findByTag(ctx, r, tagVolume, v.Name)
	if err == nil && other != nil {
		err = &replaced{v, other}
	}
	return nil, err
}

// alive returns one volume, or nil if it does not exist or is in deletion.
func (r *region) alive(ctx context.Context, id string) (*found, error) {
	f, err := r.describe(ctx, id)
	if f != nil && (f.State == types.VolumeStateDeleting || f.State == types.VolumeStateDeleted) {
		return nil, err
	}
	return f, err
}

// replaced is the error for a known volume that another host has replaced with another of the same
// name.
type replaced struct {
	v     Volume
	other *found
}

func (e *replaced) Error() string {
	return fmt.Sprintf(
		"volume %s that this host knows was %s and does not exist any more, and %s of the same name "+
			"is another, created at %s: delete the volume on this host, which touches nothing, and "+
			"create it again to use that one",
		e.v.Name, e.v.Known, e.other.id(), aws.ToTime(e.other.CreateTime).UTC().Format(time.RFC3339))
}

func (e *replaced) Unwrap() error { return volume.ErrConflict }

// findExisting is find for volumes that must exist.
func (d *Driver) findExisting(ctx context.Context, r *region, v Volume) (*found, error) {
	f, err := d.find(ctx, r, v)
	switch {
	case err == nil && f == nil && v.Known != "":
		err = volume.Errorf(volume.ErrNotFound,
			"volume %s that this host knows was %s and does not exist any more: create makes a new "+
				"one", v.Name, v.Known)
	case err == nil && f == nil:
		err = volume.Errorf(volume.ErrNotFound, "volume %s: no volume in region %s has the tag %s=%s: create makes one, "+
			"or the option volumeID names one", v.Name, r.Config.Region, tagVolume, v.Name)
	}
	return f, err
}

// Create implements volume.Driver. With volumeID there is nothing to make.
func (d *Driver) Create(ctx context.Context, req volume.Request) (volume.Reply, error) {
	ctx, cancel := volume.WithDeadline(ctx, volume.Deadlines.Long)
	defer cancel()
	v, err := d.config.Volume(req)
	if err != nil {
		return volume.Reply{}, err
	}
	unlock, err := d.locks.Lock(ctx, v.Name, "create")
	if err != nil {
		return volume.Reply{}, err
	}
	defer unlock()
	if v, err = d.understand(req); err != nil { // the record may have changed before the lock was taken
		return volume.Reply{}, err
	}
	within, cancelWork := volume.WithReserve(ctx)
	defer cancelWork()
	r, err := d.open(within, v.Region)
	if err != nil {
		return volume.Reply{}, err
	}
	f, err := d.ensure(within, r, v, true)
	if err != nil {
		return volume.Reply{}, err
	}
	reply := volume.Reply{Options: map[string]string{"name": v.Name, "created": "false", "volumeID": f.id()}}
	if d.ours(f, v.Name) {
		// Omit volumeID. With it, the next call would be about a volume that Lariat did not create.
		reply.Options = map[string]string{"name": v.Name, "created": "true", volume.Identity: f.id()}
		if f.retained() && v.OnRemove != cloud.Retain {
			reply.Message = fmt.Sprintf("volume %s was there already, and onRemove=retain of its creator counts", f.id())
		}
	} else {
		reply.Message = fmt.Sprintf("volume %s was there already; Lariat did not create it, and will not remove it", f.id())
	}
	return reply, nil
}

// retained reports whether the creator wants to keep the data.
func (f *found) retained() bool { return f.tags[tagOnRemove] == string(cloud.Retain) }

// ensure finds the volume, or makes it. Only Create makes a known volume again if it is missing,
// because an attachment needs the old data. The caller holds the lock.
func (d *Driver) ensure(ctx context.Context, r *region, v Volume, create bool) (*found, error) {
	find := d.find
	if v.Known != "" && !create {
		find = d.findExisting
	}
	f, err := find(ctx, r, v)
	if err != nil {
		return nil, err
	}
	// An attachment without the option is no decision to keep the data.
	v.Said = v.Said || create
	if f == nil {
		// Record the volume as lost first. After a kill, the next call must recognise the new
		// volume as its own. No Delete may mistake another host's new volume for it.
		if v.Known != "" {
			gone := record{ID: v.Known, Region: r.Config.Region, Cluster: d.config.Cluster, Created: true, Lost: true,
				Time: time.Now().UTC()}
			if err := d.volumes.Put(v.Name, gone); err != nil {
				return nil, err
			}
		}
		if f, err = d.make(ctx, r, v); err != nil {
			return nil, fmt.Errorf("create volume %s: %w", v.Name, err)
		}
	}
	if err := v.New.differs(f); err != nil {
		return nil, volume.Errorf(volume.ErrConflict, "volume %s exists as %s: %w; use its own values, or another name",
			v.Name, f.id(), err)
	}
	if f, err = r.ready(ctx, f); err != nil {
		return nil, err
	}
	return f, d.remember(v, r, f, create)
}

// remember records which volume the name means. It keeps the other members of a record of the same
// volume.
func (d *Driver) remember(v Volume, r *region, f *found, create bool) error {
	old, _, err := d.volumes.Get(v.Name)
	same := old.ID == f.id() && old.Cluster == d.config.Cluster
	if err != nil || same && !old.Deleting && !old.Lost && (old.Created || !create) {
		return err
	}
	err = d.volumes.Put(v.Name, record{ID: f.id(), Region: r.Config.Region, Cluster: d.config.Cluster,
		Created: create || same && old.Created, Time: time.Now().UTC()})
	volume.Failpoint("volume-recorded")
	return err
}

// differs returns an error that lists how a volume differs from a specification. The volume may
// have grown since, and its owner may have modified it.
func (s Specification) differs(f *found) error {
	var what []string
	is := func(option string, want, have any, differ bool) {
		if differ {
			what = append(what, fmt.Sprintf("%s is %v, not %v", option, have, want))
		}
	}
	is("size", s.Size, aws.ToInt32(f.Size), s.Size > aws.ToInt32(f.Size))
	is("snapshotID", s.SnapshotID, aws.ToString(f.SnapshotId), s.SnapshotID != "" &&
		s.SnapshotID != aws.ToString(f.SnapshotId))
	is("encrypted", s.Encrypted, aws.ToBool(f.Encrypted), s.Encrypted && !aws.ToBool(f.Encrypted))
	is("availabilityZone", s.Zone, aws.ToString(f.AvailabilityZone), s.Zone != "" &&
		s.Zone != aws.ToString(f.AvailabilityZone))
	if len(what) == 0 {
		return nil
	}
	return errors.New(strings.Join(what, ", "))
}

// tokens is the number of tokens that make tries for a name. Each earlier volume of the name that
// AWS remembers takes one token.
const tokens = 50

// token makes CreateVolume repeatable from every host: AWS answers the same token with the same
// volume.
func (d *Driver) token(name string, n int) string {
	sum := sha256.Sum256([]byte("lariat\x00" + d.config.Cluster + "\x00" + name + "\x00" + strconv.Itoa(n)))
	return hex.EncodeToString(sum[:])
}

// make creates the volume. After a kill or a lost answer, the next call gets the same volume by its
// token.
func (d *Driver) make(ctx context.Context, r *region, v Volume) (*found, error) {
	in, err := d.creation(ctx, r, v)
	if err != nil {
		return nil, err
	}
	volume.Failpoint("before-create")
	for n := range tokens {
		in.ClientToken = aws.String(d.token(v.Name, n))
		out, err := r.ec2.CreateVolume(ctx, in)
		volume.Failpoint("created")
		switch {
		case cloud.Is(err, "IdempotentParameterMismatch"), cloud.Is(err, "VolumeLimitExceeded"):
			// Another caller made the volume, maybe just now and with other values. Otherwise the
			// volume was made and deleted.
			if f, ferr := d.findByTag(ctx, r, tagVolume, v.Name); f != nil || ferr != nil {
				return f, ferr
			}
			if cloud.Is(err, "VolumeLimitExceeded") {
				return nil, cloud.Explain(ctx, err)
			}
			continue
		case err != nil:
			return nil, cloud.Invalid(cloud.Explain(ctx, err))
		case out.State == types.VolumeStateDeleting, out.State == types.VolumeStateDeleted:
			continue
		}
		f, err := r.appeared(ctx, aws.ToString(out.VolumeId))
		if err != nil || f != nil {
			if f != nil {
				d.log.Info("created", "volume", v.Name, "id", f.id(), "size", aws.ToInt32(f.Size), "type", f.VolumeType, "zone",
					aws.ToString(f.AvailabilityZone))
			}
			return f, err
		}
	}
	return nil, fmt.Errorf("AWS remembers %d volumes of this name, now deleted, and does not show them: take another name",
		tokens)
}

// appearance is the time for which AWS may not know a volume that it has just made. Tests shorten
// it.
var appearance = 15 * time.Second

// appeared waits until AWS shows a new volume. It returns nil if the volume was deleted: AWS does
// not know the volume even after the time of appearance. A request that was cut short or throttled
// does not prove a deletion. Otherwise the next token would make a second volume.
func (r *region) appeared(ctx context.Context, id string) (f *found, err error) {
	start := time.Now()
	err = pauses.Poll(ctx, func() (done bool, seen string, err error) {
		late := time.Since(start) > appearance
		f, err = r.describe(ctx, id)
		return err == nil && (f != nil || late), "AWS has made " + id + ", and does not show it", err
	})
	if f != nil && (f.State == types.VolumeStateDeleting || f.State == types.VolumeStateDeleted) {
		return nil, err
	}
	return f, err
}

// creation returns the request for AWS. The zone is the instance's own unless the volume names
// another.
func (d *Driver) creation(ctx context.Context, r *region, v Volume) (*ec2.CreateVolumeInput, error) {
	s := v.New
	if s.Size == 0 && s.SnapshotID == "" {
		return nil, volume.Errorf(volume.ErrInvalid, "it does not exist, and neither size (in GiB) nor snapshotID says "+
			"what it is to be")
	}
	if s.Zone == "" {
		self, err := r.Instance(ctx)
		if err != nil {
			return nil, fmt.Errorf("no availabilityZone is given, and %w", err)
		}
		if self.Region != r.Config.Region {
			return nil, volume.Errorf(volume.ErrInvalid, "no availabilityZone is given, and this instance is in region "+
				"%s, not %s", self.Region, r.Config.Region)
		}
		s.Zone = self.Zone
	}
	tags := map[string]string{"Name": v.Name}
	maps.Copy(tags, s.Tags)
	tags[tagVolume] = v.Name
	if d.config.Cluster != "" {
		tags[tagCluster] = d.config.Cluster
	}
	if s.SnapshotID == "" {
		tags[tagFileSystem] = none
	}
	if v.Said {
		tags[tagOnRemove] = string(v.OnRemove)
	}
	in := &ec2.CreateVolumeInput{
		AvailabilityZone: aws.String(s.Zone), VolumeType: types.VolumeType(s.Type),
		TagSpecifications: []types.TagSpecification{{ResourceType: types.ResourceTypeVolume, Tags: tagList(tags)}},
	}
	if s.Size > 0 {
		in.Size = aws.Int32(s.Size)
	}
	if s.IOPS > 0 {
		in.Iops = aws.Int32(s.IOPS)
	}
	if s.Throughput > 0 {
		in.Throughput = aws.Int32(s.Throughput)
	}
	if s.Encrypted {
		in.Encrypted = aws.Bool(true)
	}
	if s.KMSKeyID != "" {
		in.KmsKeyId = aws.String(s.KMSKeyID)
	}
	if s.SnapshotID != "" {
		in.SnapshotId = aws.String(s.SnapshotID)
	}
	return in, nil
}

func tagList(tags map[string]string) (list []types.Tag) {
	for _, key := range slices.Sorted(maps.Keys(tags)) {
		list = append(list, types.Tag{Key: aws.String(key), Value: aws.String(tags[key])})
	}
	return list
}

// tag changes one tag of a volume that AWS has shown. It retries, because one part of AWS may not
// know the volume yet.
func (r *region) tag(ctx context.Context, id, key, value string) error {
	start := time.Now()
	return pauses.Poll(ctx, func() (bool, string, error) {
		_, err := r.ec2.CreateTags(ctx, &ec2.CreateTagsInput{Resources: []string{id},
			Tags: tagList(map[string]string{key: value})})
		if cloud.Is(err, "InvalidVolume.NotFound") && time.Since(start) <= appearance {
			return false, cloud.Explain(ctx, err).Error(), nil
		}
		return err == nil, "", cloud.Explain(ctx, err)
	})
}

// ready waits until a volume is ready for use.
func (r *region) ready(ctx context.Context, f *found) (*found, error) {
	id := f.id()
	err := pauses.Poll(ctx, func() (done bool, seen string, err error) {
		switch f.State {
		case types.VolumeStateAvailable, types.VolumeStateInUse:
			return true, "", nil
		case types.VolumeStateCreating:
		default:
			return false, "", fmt.Errorf("%s is in state %s, and cannot be used", id, f.State)
		}
		next, err := r.describe(ctx, id)
		switch {
		case err != nil:
			return false, "", err
		case next == nil:
			return false, "", fmt.Errorf("%s has vanished while it was being created: may AWS use the KMS key of the "+
				"volume, or of the snapshot?", id)
		}
		f = next
		return false, id + " is still being created", nil
	})
	return f, err
}

// Delete implements volume.Driver.
func (d *Driver) Delete(ctx context.Context, req volume.Request) (volume.Reply, error) {
	ctx, cancel := volume.WithDeadline(ctx, volume.Deadlines.Long)
	defer cancel()
	v, err := d.config.Volume(req)
	if err != nil {
		return volume.Reply{}, err
	}
	unlock, err := d.locks.Lock(ctx, v.Name, "delete")
	if err != nil {
		return volume.Reply{}, err
	}
	defer unlock()
	within, cancelWork := volume.WithReserve(ctx)
	defer cancelWork()
	old, _, err := d.volumes.Get(v.Name)
	if err != nil {
		return volume.Reply{}, err
	}
	// In this case the record is about another volume.
	elsewhere := v.Region != "" && old.Region != v.Region || old.Cluster != d.config.Cluster && old.Created
	if elsewhere {
		old = record{}
	}
	if v.Region == "" {
		v.Region = old.Region
	}
	if v.ID == "" && v.Known == "" {
		v.Known = old.ID
	}
	r, err := d.open(within, v.Region)
	if err != nil {
		return volume.Reply{}, err
	}
	f, err := d.find(within, r, v)
	var other *replaced
	if errors.As(err, &other) {
		switch {
		case old.ID != "" && req.Options[volume.Identity] == "":
			old.Lost = true
			err = d.volumes.Put(v.Name, old)
		case !elsewhere:
			err = d.volumes.Remove(v.Name)
		default:
			err = nil
		}
		return volume.Reply{Message: fmt.Sprintf("volume %s is kept: %s", other.other.id(), other)}, err
	}
	if err != nil && !errors.Is(err, volume.ErrNotFound) {
		return volume.Reply{}, err
	}
	var reply volume.Reply
	switch {
	case f == nil:
	case len(f.Attachments) > 0:
		return reply, volume.Errorf(volume.ErrInUse, "volume %s (%s) is attached to instance %s", v.Name, f.id(),
			aws.ToString(f.Attachments[0].InstanceId))
	case !d.ours(f, v.Name):
		reply.Message = fmt.Sprintf("volume %s is kept: Lariat did not create it", f.id())
	case v.OnRemove == cloud.Retain && !(old.Deleting && old.ID == f.id()):
		reply.Message = fmt.Sprintf("volume %s is kept, as onRemove=retain says", f.id())
	case f.retained() && !(old.Deleting && old.ID == f.id()):
		reply.Message = fmt.Sprintf(
			"volume %s is kept, as onRemove=retain of its creator says; to change that, set its tag "+
				"%s to purge", f.id(), tagOnRemove)
	default:
		err := d.volumes.Put(v.Name, record{ID: f.id(), Region: r.Config.Region, Cluster: d.config.Cluster,
			Created: old.Created, Deleting: true, Time: time.Now().UTC()})
		if err != nil {
			return reply, err
		}
		volume.Failpoint("delete-journalled")
		if err := r.remove(within, f.id()); err != nil {
			return reply, fmt.Errorf("delete volume %s: %w", v.Name, err)
		}
		reply.Message = fmt.Sprintf("deleted %s, %d GiB", f.id(), aws.ToInt32(f.Size))
		d.log.Info("deleted", "volume", v.Name, "id", f.id())
	}
	volume.Failpoint("delete-done")
	if elsewhere {
		return reply, nil
	}
	return reply, d.volumes.Remove(v.Name)
}

// remove deletes a volume, and returns when AWS no longer shows the volume as usable. After that,
// findByTag finds a new volume of the same name.
func (r *region) remove(ctx context.Context, id string) error {
	asked := false
	return pauses.Poll(ctx, func() (done bool, seen string, err error) {
		seen = id + " is still there"
		if !asked {
			_, err = r.ec2.DeleteVolume(ctx, &ec2.DeleteVolumeInput{VolumeId: aws.String(id)})
			volume.Failpoint("deleted")
			switch {
			case cloud.Is(err, "IncorrectState", "VolumeInUse"):
				// The volume is in deletion or in change, or one part of AWS does not know of its
				// detachment. The next description shows it.
				seen = cloud.Explain(ctx, err).Error()
			case err != nil && !cloud.Is(err, "InvalidVolume.NotFound"):
				return false, "", cloud.Explain(ctx, err)
			default:
				asked = true
			}
		}
		f, err := r.describe(ctx, id)
		switch {
		case err != nil:
			return false, "", err
		case f == nil || f.State == types.VolumeStateDeleting || f.State == types.VolumeStateDeleted:
			return true, "", nil
		case !asked && len(f.Attachments) > 0:
			return false, "", volume.Errorf(volume.ErrInUse, "it is attached to instance %s",
				aws.ToString(f.Attachments[0].InstanceId))
		}
		return false, seen, nil
	})
}
