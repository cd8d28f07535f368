// Package nfs is the volume driver for NFS: exports, and folders on exports that it makes and removes.
//
//	host + export                  the export itself is the volume; it is mounted, and never changed
//	host + exportBase + name       a folder on the export is the volume; Create makes it, Delete removes what Create made
//	NFS_SERVER, MOUNT_DIR + name   the same, by the environment
//
// What Lariat created is known by a mark on the export beside the folder, which all hosts see, and which tells the folder's identity and not only its
// name. The host's journal says which volume was mounted where and how; without it the mount table does.
//
// Whatever touches the export happens in children with a deadline (pkg/volume/mounts). The base is mounted in a mount namespace of the child's
// own, so nothing is left of one that was killed.
package nfs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/mounts"
)

// Driver implements volume.Driver. Attach, MountDevice and Expand are not supported, nor GetVolumeName: kubelet's own names serve.
type Driver struct {
	volume.Unsupported
	config  Config
	log     *slog.Logger
	volumes volume.Journal[record]
	mounter *Mounter
}

var _ volume.Driver = (*Driver)(nil)

// record of a volume that Create was asked for on this host.
type record struct {
	Volume  Volume    `json:"volume"`
	State   string    `json:"state"` // creating, ready or deleting
	Created bool      `json:"created"`
	Time    time.Time `json:"time"`
}

// New makes the driver. Nothing happens before the first call. With a configuration that is wrong it answers Init, because kubelet does not ask a second
// time, and unmounts. All else says what is wrong.
func New(c Config, log *slog.Logger) *Driver {
	c.StateDir, c.RunDir = cmp.Or(c.StateDir, volume.DefaultStateDir), cmp.Or(c.RunDir, volume.DefaultRunDir)
	return &Driver{
		config: c, log: log,
		volumes: volume.Journal[record]{Dir: filepath.Join(c.StateDir, "nfs", "volumes")},
		mounter: NewMounter("nfs", c.StateDir, c.RunDir, log),
	}
}

// Init implements volume.Driver: nobody attaches anything, and nobody walks through a shared file system to change groups.
func (d *Driver) Init(context.Context) (volume.Capabilities, error) {
	return volume.Capabilities{}, nil
}

// Create implements volume.Driver: it makes the folder below exportBase. With export there is nothing to make.
func (d *Driver) Create(ctx context.Context, r volume.Request) (volume.Reply, error) {
	ctx, cancel := volume.WithDeadline(ctx, volume.Deadlines.Long)
	defer cancel()
	v, err := d.config.Volume(r)
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
	if known && old.Volume.Source() != v.Source() {
		return volume.Reply{}, volume.Errorf(volume.ErrConflict, "volume %s exists on this host as %s, not as %s", v.Name, old.Volume.Source(), v.Source())
	}
	rec := record{Volume: v, State: "creating", Created: old.Created, Time: time.Now().UTC()}
	if err := d.volumes.Put(v.Name, rec); err != nil {
		return volume.Reply{}, err
	}
	volume.Step("create-journalled")
	if v.Base != "" {
		c, err := d.provision(ctx, v)
		if err != nil {
			if !known { // nothing of it exists here
				err = errors.Join(err, d.volumes.Remove(v.Name))
			}
			return volume.Reply{}, err
		}
		rec.Created = c.Ours
	}
	rec.State = "ready"
	if err := d.volumes.Put(v.Name, rec); err != nil {
		return volume.Reply{}, err
	}
	volume.Step("create-recorded")
	reply := volume.Reply{Options: map[string]string{"name": v.Name, "created": "false", "onRemove": string(v.OnRemove)}}
	switch {
	case rec.Created:
		reply.Options["created"] = "true"
	case v.Base != "":
		reply.Message = fmt.Sprintf("folder %s was there already; Lariat did not create it, and will not remove it", v.Source())
	}
	return reply, nil
}

// provision makes a volume's folder.
func (d *Driver) provision(ctx context.Context, v Volume) (created, error) {
	a, err := d.export(ctx, v)
	if err != nil {
		return created{}, err
	}
	within, cancel := volume.Before(ctx)
	defer cancel()
	c, err := createOn(within, a)
	if err != nil {
		return c, explain(ctx, fmt.Sprintf("create folder %s", v.Source()), err)
	}
	if c.New {
		d.log.Info("created", "volume", v.Name, "folder", v.Source())
	}
	return c, nil
}

// export is how children get at a volume's base.
func (d *Driver) export(ctx context.Context, v Volume) (exportArgs, error) {
	addr, err := v.reach(ctx)
	if err != nil {
		return exportArgs{}, err
	}
	// Nothing cached, nothing shared with other mounts of the export: decisions are made by what is on the server now.
	options := rules.Merge(v.Options, []string{"rw", "noac", "lookupcache=none", "nosharecache", "nosuid", "nodev", "noexec"})
	return exportArgs{Mount: spec(v.Host, v.Base, "", options, addr), RunDir: d.config.RunDir, Name: v.Name, OnRemove: v.OnRemove}, nil
}

// Delete implements volume.Driver. Without options the journal says where the volume is.
func (d *Driver) Delete(ctx context.Context, r volume.Request) (volume.Reply, error) {
	ctx, cancel := volume.WithDeadline(ctx, volume.Deadlines.Long)
	defer cancel()
	if err := volume.CheckName(r.Name); err != nil {
		return volume.Reply{}, err
	}
	unlock, err := d.mounter.Locks.Lock(ctx, r.Name, "delete")
	if err != nil {
		return volume.Reply{}, err
	}
	defer unlock()
	rec, known, err := d.volumes.Get(r.Name)
	if err != nil {
		return volume.Reply{}, err
	}
	v, err := d.config.Volume(r)
	if known && r.Options["host"] == "" && r.Options["export"] == "" && r.Options["exportBase"] == "" {
		how := rec.Volume.OnRemove
		if r.Options["onRemove"] != "" && err == nil {
			how = v.OnRemove
		}
		v, err = rec.Volume, nil
		v.OnRemove = how
	}
	if err != nil {
		return volume.Reply{}, err
	}
	table, err := mounts.Read()
	if err != nil {
		return volume.Reply{}, err
	}
	if used := table.Of(v.Source()); len(used) > 0 && v.Base != "" {
		return volume.Reply{}, volume.Errorf(volume.ErrInUse, "volume %s is mounted at %s", v.Name, used[0].Point)
	}
	var reply volume.Reply
	switch {
	case v.Base == "":
		reply.Message = fmt.Sprintf("export %s is kept: Lariat did not create it", v.Source())
	case v.OnRemove == Retain && rec.State != "deleting":
		reply.Message = fmt.Sprintf("folder %s is kept, as onRemove=retain says", v.Source())
	default:
		if known {
			rec.State = "deleting"
			if err := d.volumes.Put(v.Name, rec); err != nil {
				return reply, err
			}
		}
		volume.Step("delete-journalled")
		a, err := d.export(ctx, v)
		if err != nil {
			return reply, err
		}
		within, cancel := volume.Before(ctx)
		defer cancel()
		gone, err := removeOn(within, a)
		if err != nil {
			return reply, explain(ctx, fmt.Sprintf("remove folder %s", v.Source()), err)
		}
		reply.Message = gone.Message
		d.log.Info("removed", "volume", v.Name, "folder", v.Source(), "how", v.OnRemove, "result", gone.Message)
	}
	volume.Step("delete-done")
	return reply, d.volumes.Remove(r.Name)
}

// Mount implements volume.Driver. A folder below exportBase that does not exist yet is created, because kubelet has no verb for that.
func (d *Driver) Mount(ctx context.Context, dir, _ string, r volume.Request) error {
	ctx, cancel := volume.WithDeadline(ctx, volume.Deadlines.Long)
	defer cancel()
	v, err := d.config.Volume(r)
	if err != nil {
		return err
	}
	var missing func(context.Context) (bool, error)
	if v.Base != "" && !v.ReadOnly {
		missing = func(ctx context.Context) (bool, error) {
			c, err := d.provision(ctx, v)
			return c.New, err
		}
	}
	return d.mounter.Mount(ctx, dir, v, r.Pod, missing)
}

// Unmount implements volume.Driver.
func (d *Driver) Unmount(ctx context.Context, dir string) error { return d.mounter.Unmount(ctx, dir) }
