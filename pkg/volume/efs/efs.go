// Package efs is the volume driver for AWS's Elastic File System. Its volumes are own file systems,
// directories of a shared file system behind access points, and existing objects.
//
//	no fsid                a file system of its own, with mount targets; Create makes them, Delete removes them
//	fsid                   that file system, or the directory export on it; never changed
//	fsid + basePath        an access point of its own, to the directory basePath/NAME; Create makes it, Delete
//	                       removes it, but never the data
//	fsid + accessPoint     that access point; never changed
//	mountTargetIp          the export at that address, without a request to AWS
//
// A tag shows that Lariat created an object. The call that makes the object also writes the tag. A
// creation token follows from the volume's name. So every host, even a host without its state,
// finds the same object. pkg/volume/nfs mounts the volumes. With TLS, the program of
// amazon-efs-utils mounts them, because a proxy must outlive this process.
package efs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"reflect"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	api "github.com/aws/aws-sdk-go-v2/service/efs"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/cloud"
	"github.com/lariat-net/lariat/pkg/volume/mounts"
	"github.com/lariat-net/lariat/pkg/volume/nfs"
)

// Driver implements volume.Driver. It does not support Attach, MountDevice and Expand. It does not
// support GetVolumeName, because kubelet's own names suffice.
type Driver struct {
	volume.Unsupported
	log     *slog.Logger
	volumes volume.Journal[record]
	mounter *nfs.Mounter
}

var _ volume.Driver = (*Driver)(nil)

// record describes a volume for which Create was called on this host.
type record struct {
	Volume      Volume    `json:"volume"`
	State       string    `json:"state"`                 // creating, ready, deleting or lost
	FileSystem  string    `json:"fileSystem,omitempty"`  // as Create found or made it
	AccessPoint string    `json:"accessPoint,omitempty"` // likewise
	Created     bool      `json:"created"`
	Time        time.Time `json:"time"`
}

// lost is the state of a record whose volume no longer exists. Another host has replaced the volume
// and a Delete touched nothing, or a Create has begun to make it again. The record stays until a
// Create ends. Until then, no Delete mistakes another volume of that name for the lost volume.
const lost = "lost"

// identity returns the id of the volume's own object that Create made or found, or "" if there is
// none.
func (r record) identity() string {
	switch {
	case !r.Created:
		return ""
	case r.Volume.Folder != nil:
		return r.AccessPoint
	}
	return r.FileSystem
}

// New returns the driver. It does nothing before the first call.
func New(c Config, log *slog.Logger) *Driver {
	c.StateDir, c.RunDir = cmp.Or(c.StateDir, volume.DefaultStateDir), cmp.Or(c.RunDir, volume.DefaultRunDir)
	return &Driver{
		log:     log,
		volumes: volume.Journal[record]{Dir: filepath.Join(c.StateDir, "efs", "volumes")},
		mounter: nfs.NewMounter("efs", c.StateDir, c.RunDir, log),
	}
}

// Init implements volume.Driver. It reports no attachment. It also reports no FSGroup, because
// callers must not walk through a shared file system to change groups.
func (d *Driver) Init(context.Context) (volume.Capabilities, error) {
	return volume.Capabilities{}, nil
}

// Create implements volume.Driver. A creation that ran out of time continues in AWS, and the next
// call waits for its end.
func (d *Driver) Create(ctx context.Context, r volume.Request) (volume.Reply, error) {
	ctx, cancel := volume.WithDeadline(ctx, volume.Deadlines.Long)
	defer cancel()
	v, err := ParseVolume(r)
	if err != nil {
		return volume.Reply{}, err
	}
	unlock, err := d.mounter.Locks.Lock(ctx, v.Name, "create")
	if err != nil {
		return volume.Reply{}, err
	}
	defer unlock()
	old, known, err := d.volumes.Get(v.Name)
	if err != nil {
		return volume.Reply{}, err
	}
	wasLost := old.State == lost
	if wasLost {
		old, known = record{}, false
	}
	v.Known = cmp.Or(v.Known, old.identity())
	if known && !old.is(v) {
		return volume.Reply{}, volume.Errorf(volume.ErrConflict, "volume %s exists on this host as %s, not as %s", v.Name,
			old.Volume, v)
	}
	rec := record{Volume: v, State: "creating", Created: old.Created, Time: time.Now().UTC(),
		FileSystem: cmp.Or(v.FileSystem, old.FileSystem), AccessPoint: cmp.Or(v.AccessPoint, old.AccessPoint)}
	if !wasLost {
		if err := d.volumes.Put(v.Name, rec); err != nil {
			return volume.Reply{}, err
		}
	}
	volume.Failpoint("create-journalled")
	kept, err := d.provision(ctx, &v, &rec)
	switch {
	case err != nil && wasLost:
		return volume.Reply{}, err
	case err != nil && !known && volume.IsFinal(err): // no later call continues it
		return volume.Reply{}, errors.Join(err, d.volumes.Remove(v.Name))
	case err != nil && volume.IsFinal(err): // the volume did not change
		return volume.Reply{}, errors.Join(err, d.volumes.Put(v.Name, old))
	case err != nil:
		return volume.Reply{}, err
	}
	rec.State = "ready"
	if err := d.volumes.Put(v.Name, rec); err != nil {
		return volume.Reply{}, err
	}
	volume.Failpoint("create-recorded")
	reply := volume.Reply{Options: map[string]string{"name": v.Name, "created": fmt.Sprint(rec.Created),
		"onRemove": string(v.OnRemove)}}
	if rec.FileSystem != "" {
		reply.Options["fsid"] = rec.FileSystem
	}
	if v.Folder != nil {
		reply.Options["accessPointId"] = rec.AccessPoint
	}
	if id := rec.identity(); id != "" {
		reply.Options[volume.Identity] = id
	}
	switch {
	case kept && v.OnRemove != cloud.Retain:
		reply.Message = fmt.Sprintf("volume %s was there already, and onRemove=retain of its creator counts", v)
	case !rec.Created:
		reply.Message = fmt.Sprintf("volume %s was there already; Lariat did not create it, and will not remove it", v)
	}
	return reply, nil
}

// provision makes the missing parts of a volume and records all parts. It reports whether the
// creator wants to keep the data.
func (d *Driver) provision(ctx context.Context, of *Volume, rec *record) (kept bool, err error) {
	if of.Address != "" && of.Folder == nil {
		return false, nil // AWS must not be asked
	}
	a, err := open(ctx, of.Region, d.log)
	if err != nil {
		return false, err
	}
	if is, err := a.there(ctx, *of); err != nil {
		return false, err
	} else if !is {
		// Record the volume as lost first. After a kill, the next call must recognise the new
		// object as its own. No Delete may mistake another host's new object for it.
		own := &rec.FileSystem
		if of.Folder != nil {
			own = &rec.AccessPoint
		}
		*own = of.Known
		gone := *rec
		gone.State, gone.Created = lost, true
		if err := d.volumes.Put(of.Name, gone); err != nil {
			return false, err
		}
		of.Known, rec.Created, *own = "", false, ""
	}
	v := *of
	fs, err := a.makeFileSystem(ctx, v)
	if err != nil {
		return false, err
	}
	rec.FileSystem = *fs.FileSystemId
	own := v.ours(fs.Tags) && v.Folder == nil && v.AccessPoint == ""
	if own || len(v.Subnets) > 0 {
		if err := a.makeMountTargets(ctx, v, rec.FileSystem); err != nil {
			return false, err
		}
	}
	switch {
	case v.Folder != nil:
		p, err := a.makeAccessPoint(ctx, v)
		if err != nil {
			return false, err
		}
		rec.AccessPoint, rec.Created, kept = *p.AccessPointId, true, retained(p.Tags)
	case v.AccessPoint != "":
		out, err := a.efs.DescribeAccessPoints(ctx, &api.DescribeAccessPointsInput{AccessPointId: &v.AccessPoint})
		if err != nil {
			return false, refused(ctx, err)
		}
		if len(out.AccessPoints) == 0 || aws.ToString(out.AccessPoints[0].FileSystemId) != v.FileSystem {
			return false, volume.Errorf(volume.ErrInvalid,
				"access point %s is not one of file system %s", v.AccessPoint, v.FileSystem)
		}
	default:
		rec.Created, kept = own, own && retained(fs.Tags)
	}
	return kept, nil
}

// String returns the volume's description for messages.
func (v Volume) String() string {
	where := cmp.Or(v.FileSystem, v.Address, "a file system of its own")
	switch {
	case v.AccessPoint != "":
		where += " by access point " + v.AccessPoint
	case v.Folder != nil:
		where += ":" + v.Folder.Path + " by an access point of its own"
	case v.Mount.Path != "/":
		where += ":" + v.Mount.Path
	}
	return where
}

// is reports whether a request means the volume of the record. A request may also name an own file
// system by its id.
func (r record) is(v Volume) bool {
	o := r.Volume
	fs := v.FileSystem == o.FileSystem || v.FileSystem == r.FileSystem || v.FileSystem == "" && r.Created
	region := v.Region == o.Region || v.Region == "" || o.Region == ""
	return fs && region && v.AccessPoint == o.AccessPoint && v.Address == o.Address && v.Mount.Path == o.Mount.Path &&
		reflect.DeepEqual(v.Folder, o.Folder)
}

// about reports whether a request to delete can mean the volume of the record. The request need not
// have all options.
func (r record) about(v Volume) bool {
	o := r.Volume
	fs := v.FileSystem == "" || v.FileSystem == o.FileSystem || v.FileSystem == r.FileSystem
	folder := v.FileSystem == "" ||
		(v.Folder == nil) == (o.Folder == nil) && (v.Folder == nil || v.Folder.Path == o.Folder.Path)
	return fs && folder && (v.Region == "" || o.Region == "" || v.Region == o.Region)
}

// Delete implements volume.Driver. Without options, the journal locates the volume.
func (d *Driver) Delete(ctx context.Context, r volume.Request) (volume.Reply, error) {
	ctx, cancel := volume.WithDeadline(ctx, volume.Deadlines.Long)
	defer cancel()
	v, err := ParseVolume(r)
	if err != nil {
		return volume.Reply{}, err
	}
	unlock, err := d.mounter.Locks.Lock(ctx, v.Name, "delete")
	if err != nil {
		return volume.Reply{}, err
	}
	defer unlock()
	rec, known, err := d.volumes.Get(r.Name)
	if err != nil {
		return volume.Reply{}, err
	}
	elsewhere := known && !rec.about(v) // the record is about another volume
	if elsewhere {
		rec, known = record{}, false
	}
	if known && v.FileSystem == "" && v.Address == "" {
		how := rec.Volume.OnRemove
		if r.Options["onRemove"] != "" {
			how = v.OnRemove
		}
		region, said := v.Region, v.Known
		v = rec.Volume
		v.OnRemove, v.Region, v.Known = how, cmp.Or(region, v.Region), said
	}
	v.Known = cmp.Or(v.Known, rec.identity())
	if err := d.unused(func(m nfs.Volume) bool { return m.Name == v.Name }); err != nil {
		return volume.Reply{}, err
	}
	var reply volume.Reply
	other := false
	switch {
	case v.AccessPoint != "", v.Address != "" && v.Folder == nil:
		reply.Message = fmt.Sprintf("%s is kept: Lariat did not create it", v)
	case v.OnRemove == cloud.Retain && rec.State != "deleting":
		reply.Message = fmt.Sprintf("%s is kept, as onRemove=retain says", v)
	default:
		if reply.Message, other, err = d.purge(ctx, v, rec, known); err != nil {
			return reply, err
		}
	}
	volume.Failpoint("delete-done")
	switch {
	case elsewhere:
		return reply, nil
	case other && known && r.Options[volume.Identity] == "":
		rec.State = lost
		return reply, d.volumes.Put(v.Name, rec)
	}
	return reply, d.volumes.Remove(v.Name)
}

// purge removes the parts of a volume that Create made, and returns a text about removed and kept
// parts. With other, the name means another volume by now.
func (d *Driver) purge(ctx context.Context, v Volume, rec record, known bool) (message string, other bool, err error) {
	a, err := open(ctx, v.Region, d.log)
	if err != nil {
		return "", false, err
	}
	const keptByCreator = "%s is kept, as onRemove=retain of its creator says; to change that, set its tag %s to purge"
	begin := func() error {
		if known && rec.State != lost {
			rec.State = "deleting"
			if err := d.volumes.Put(v.Name, rec); err != nil {
				return err
			}
		}
		volume.Failpoint("delete-journalled")
		return nil
	}
	if v.Folder != nil {
		p, err := a.accessPoint(ctx, v)
		if errors.Is(err, volume.ErrNotFound) || err == nil && p == nil {
			return "", false, nil
		}
		if err != nil {
			return "", false, err
		}
		id := *p.AccessPointId
		switch {
		case v.other(id):
			return fmt.Sprintf("access point %s is kept: %s", id, v.replaced(id)), true, nil
		case retained(p.Tags) && rec.State != "deleting":
			return fmt.Sprintf(keptByCreator, "access point "+id, removeTag), false, nil
		}
		if err := d.unused(func(m nfs.Volume) bool { return m.ID == v.FileSystem+"/"+id }); err != nil {
			return "", false, err
		}
		if err := begin(); err != nil {
			return "", false, err
		}
		if err := a.removeAccessPoint(ctx, v, id); err != nil {
			return "", false, err
		}
		d.log.Info("removed", "volume", v.Name, "accessPoint", id)
		return fmt.Sprintf(
			"access point %s is removed; the folder %s and all data in it stay on %s",
			id, v.Folder.Path, v.FileSystem), false, nil
	}
	fs, err := a.fileSystem(ctx, v)
	if err != nil || fs == nil {
		return "", false, err
	}
	id := *fs.FileSystemId
	switch {
	case !v.ours(fs.Tags):
		return fmt.Sprintf("file system %s is kept: Lariat did not create it for volume %s", id, v.Name), false, nil
	case v.FileSystem == "" && v.other(id):
		return fmt.Sprintf("file system %s is kept: %s", id, v.replaced(id)), true, nil
	case retained(fs.Tags) && rec.State != "deleting":
		return fmt.Sprintf(keptByCreator, "file system "+id, removeTag), false, nil
	}
	if err := d.unmounted(ctx, a, id); err != nil {
		return "", false, err
	}
	if err := begin(); err != nil {
		return "", false, err
	}
	if err := a.removeFileSystem(ctx, v, id); err != nil {
		return "", false, err
	}
	d.log.Info("removed", "volume", v.Name, "fileSystem", id)
	return fmt.Sprintf("file system %s is removed, with its mount targets and all data", id), false, nil
}

// unused returns an error if a matching volume is mounted on this host.
func (d *Driver) unused(is func(nfs.Volume) bool) error {
	mounted, err := d.mounter.Mounted()
	if err != nil {
		return err
	}
	for dir, m := range mounted {
		if is(m) {
			return volume.Errorf(volume.ErrInUse, "volume %s is mounted at %s", m.Name, dir)
		}
	}
	return nil
}

// unmounted returns an error if any part of a file system is mounted on this host, even by another
// program.
func (d *Driver) unmounted(ctx context.Context, a *account, fs string) error {
	if err := d.unused(func(m nfs.Volume) bool { id, _, _ := strings.Cut(m.ID, "/"); return id == fs }); err != nil {
		return err
	}
	name, err := a.dnsName(ctx, fs)
	if err != nil {
		return err
	}
	hosts := map[string]bool{name: true}
	targets, err := a.mountTargets(ctx, fs)
	if err != nil {
		return err
	}
	for _, t := range targets {
		hosts[address(t)] = true
	}
	table, err := mounts.Read()
	if err != nil {
		return err
	}
	for _, m := range table {
		if host, _, ok := strings.Cut(m.Source, ":/"); ok && strings.HasPrefix(m.FSType, "nfs") &&
			hosts[strings.Trim(host, "[]")] {
			return volume.Errorf(volume.ErrInUse, "file system %s is mounted at %s", fs, m.Point)
		}
	}
	return nil
}

// known parses a request, and adds this host's record of the volume's name.
func (d *Driver) known(r volume.Request) (Volume, error) {
	v, err := ParseVolume(r)
	if err != nil {
		return v, err
	}
	rec, known, err := d.volumes.Get(v.Name)
	if known && rec.State != lost && rec.about(v) {
		v.Known = cmp.Or(v.Known, rec.identity())
	}
	return v, err
}

// Mount implements volume.Driver. It creates nothing in AWS.
func (d *Driver) Mount(ctx context.Context, dir, _ string, r volume.Request) error {
	ctx, cancel := volume.WithDeadline(ctx, volume.Deadlines.Long)
	defer cancel()
	v, err := d.known(r)
	if err != nil {
		return err
	}
	if v.TLS && mounts.Program("mount.efs") == "" {
		return fmt.Errorf("volume %s: TLS, which access points and iam need, is done by mount.efs, and that is not "+
			"installed: install the package amazon-efs-utils", v.Name)
	}
	m, err := d.source(ctx, v)
	if err != nil {
		return err
	}
	err = d.mounter.Mount(ctx, dir, m, r.Pod, nil)
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		err = fmt.Errorf("%w; do the mount target's security groups let this instance in, TCP port 2049?", err)
	}
	return err
}

// source returns a volume's description for an NFS mount.
func (d *Driver) source(ctx context.Context, v Volume) (nfs.Volume, error) {
	m, fs, point := v.Mount, v.FileSystem, v.AccessPoint
	m.Host = v.Address
	if m.Host == "" || v.Folder != nil {
		a, err := open(ctx, v.Region, d.log)
		if err != nil {
			return m, err
		}
		if v.Folder != nil {
			p, err := a.accessPoint(ctx, v)
			switch {
			case err != nil:
			case p == nil && v.Known != "":
				err = v.gone()
			case p != nil && v.other(*p.AccessPointId):
				err = v.replaced(*p.AccessPointId)
			case p == nil:
				err = volume.Errorf(volume.ErrNotFound, "volume %s has no access point on %s: create makes it", v.Name, fs)
			}
			if err != nil {
				return m, err
			}
			point = *p.AccessPointId
		}
		if fs == "" {
			fs = v.Known // the name can mean no other
		}
		if fs == "" {
			found, err := a.fileSystem(ctx, v)
			if err == nil && found == nil {
				err = volume.Errorf(volume.ErrNotFound, "volume %s has no file system in %s: create makes it", v.Name,
					a.Config.Region)
			}
			if err != nil {
				return m, err
			}
			fs = *found.FileSystemId
		}
		if m.Host == "" {
			m.Host, err = a.server(ctx, fs)
			if errors.Is(err, volume.ErrNotFound) && v.Known != "" && v.Folder == nil {
				err = v.gone()
			}
			if err != nil {
				return m, err
			}
		}
	}
	m.ID = fs
	if point != "" {
		m.ID += "/" + point
	}
	if v.TLS {
		m.Through = v.through(m, fs, point)
	}
	return m, nil
}

// through returns the call of amazon-efs-utils' program.
func (v Volume) through(m nfs.Volume, fs, point string) *nfs.Through {
	options := append([]string{"tls"}, m.Options...)
	if v.IAM {
		options = append(options, "iam")
	}
	if point != "" {
		options = append(options, "accesspoint="+point)
	}
	if v.Region != "" {
		options = append(options, "region="+v.Region)
	}
	const byAddress = "mounttargetip"
	t := &nfs.Through{FSType: "efs", Source: fs + ":" + m.Path, Options: options}
	if _, err := netip.ParseAddr(m.Host); err == nil {
		t.Options = append(t.Options, byAddress+"="+m.Host)
	} else {
		t.Pin = byAddress
	}
	return t
}

// Unmount implements volume.Driver. The watchdog of amazon-efs-utils ends the proxy of a mount with
// TLS.
func (d *Driver) Unmount(ctx context.Context, dir string) error { return d.mounter.Unmount(ctx, dir) }
