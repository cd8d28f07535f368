// Package nfs is the volume driver for NFS. Its volumes are exports, and directories on exports
// that the driver makes and removes.
//
//	host + export                  the export itself is the volume; it is mounted, and never changed
//	host + exportBase + name       a directory on the export is the volume; Delete removes only a directory of Create
//	NFS_SERVER, MOUNT_DIR + name   the same, by the environment
//
// A mark beside a directory on the export shows that Lariat created the directory. All hosts see
// the mark. It holds the directory's identity, not only its name. A host remembers the identity of
// each volume that it created or found. The reason is that another host may replace the volume with
// one of the same name. The host's journal says where and how each volume was mounted. Without the
// journal, the mount table does.
//
// All work on the export runs in children with a deadline (pkg/volume/mounts). The base is mounted
// in a mount namespace of the child's own. So a killed child leaves nothing behind.
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

// Driver implements volume.Driver. It does not support Attach, MountDevice and Expand. It does not
// support GetVolumeName, because kubelet's own names suffice.
type Driver struct {
	volume.Unsupported
	config  Config
	log     *slog.Logger
	volumes volume.Journal[record]
	mounter *Mounter
}

var _ volume.Driver = (*Driver)(nil)

// record describes a volume for which Create was called on this host.
type record struct {
	Volume Volume `json:"volume"`
	State  string `json:"state"` // creating, ready, deleting or lost
	// Identity of the directory that Create made or found. "" means that there is none yet, or that
	// an older version wrote the record.
	Identity string    `json:"identity,omitempty"`
	Created  bool      `json:"created"`
	Time     time.Time `json:"time"`
}

// lost is the state of a record whose volume no longer exists. Another host has replaced the volume
// and a Delete touched nothing, or a Create has begun to make it again. The record stays until a
// Create ends. Until then, no Delete mistakes another volume of that name for the lost volume.
const lost = "lost"

// want returns the identity of the only volume that Create or Mount may touch.
func (r record) want(q volume.Request) string {
	if r.State == lost {
		return q.Options[volume.Identity]
	}
	return volume.Remembered(q, r.Identity)
}

// New returns the driver. It does nothing before the first call. With a wrong configuration, the
// driver still answers Init, because kubelet does not ask again, and still unmounts. All other
// calls return the configuration's error.
func New(c Config, log *slog.Logger) *Driver {
	c.StateDir, c.RunDir = cmp.Or(c.StateDir, volume.DefaultStateDir), cmp.Or(c.RunDir, volume.DefaultRunDir)
	return &Driver{
		config: c, log: log,
		volumes: volume.Journal[record]{Dir: filepath.Join(c.StateDir, "nfs", "volumes")},
		mounter: NewMounter("nfs", c.StateDir, c.RunDir, log),
	}
}

// Init implements volume.Driver. It reports no attachment. It also reports no FSGroup, because
// callers must not walk through a shared file system to change groups.
func (d *Driver) Init(context.Context) (volume.Capabilities, error) {
	return volume.Capabilities{}, nil
}

// Create implements volume.Driver: it makes the directory below exportBase. With export there is
// nothing to make.
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
	if known && old.State != lost && old.Volume.Source() != v.Source() {
		return volume.Reply{}, volume.Errorf(volume.ErrConflict, "volume %s exists on this host as %s, not as %s", v.Name,
			old.Volume.Source(), v.Source())
	}
	rec := record{Volume: v, State: "creating", Created: old.Created, Time: time.Now().UTC()}
	begun := rec
	if old.State == lost {
		begun.State, begun.Identity = lost, old.Identity
	}
	if want := old.want(r); want != "" && v.Base != "" {
		switch _, err := d.verify(ctx, v, want); {
		case err == nil:
			rec.Identity = want
			begun = rec
		case !errors.Is(err, volume.ErrNotFound):
			return volume.Reply{}, err
		default:
			// A missing volume is created again. Record it as lost first: after a kill, the next
			// call must recognise the new directory as its own.
			begun.State, begun.Identity = lost, want
		}
	}
	if err := d.volumes.Put(v.Name, begun); err != nil {
		return volume.Reply{}, err
	}
	volume.Failpoint("create-journalled")
	var found created
	if v.Base != "" {
		c, err := d.provision(ctx, v, v.OnRemove)
		if err == nil && rec.Identity != "" && c.Identity != rec.Identity {
			err = replaced(v, rec.Identity, c)
		}
		if err != nil {
			if !known { // this host has nothing of the volume
				err = errors.Join(err, d.volumes.Remove(v.Name))
			}
			return volume.Reply{}, err
		}
		rec.Created, rec.Identity = c.Ours, c.Identity
		found = c
	}
	rec.State = "ready"
	if err := d.volumes.Put(v.Name, rec); err != nil {
		return volume.Reply{}, err
	}
	volume.Failpoint("create-recorded")
	reply := volume.Reply{Options: map[string]string{"name": v.Name, "created": "false", "onRemove": string(v.OnRemove)}}
	if rec.Identity != "" {
		reply.Options[volume.Identity] = rec.Identity
	}
	switch how := cautious(found.OnRemove, v.OnRemove); {
	case rec.Created && how != v.OnRemove:
		reply.Options["created"] = "true"
		reply.Message = fmt.Sprintf("onRemove=%s of the volume's creator counts (%s)", how, found.Made)
	case rec.Created:
		reply.Options["created"] = "true"
	case v.Base != "":
		reply.Message = fmt.Sprintf("folder %s was there already; Lariat did not create it, and will not remove it",
			v.Source())
	}
	return reply, nil
}

// replaced returns the error for a name that means another volume by now.
func replaced(v Volume, want string, c created) error {
	return volume.Errorf(volume.ErrConflict,
		"volume %s, identity %s, that this host knows does not exist any more, and folder %s is "+
			"another (identity %s, %s): delete the volume on this host, which touches nothing, and "+
			"create it again to use that one",
		v.Name, want, v.Source(), c.Identity, c.Made)
}

// provision makes a volume's directory.
func (d *Driver) provision(ctx context.Context, v Volume, how OnRemove) (created, error) {
	a, err := d.export(ctx, v)
	if err != nil {
		return created{}, err
	}
	a.OnRemove = how
	within, cancel := volume.WithReserve(ctx)
	defer cancel()
	c, err := createOn(within, a)
	if err != nil {
		return c, explain(ctx, fmt.Sprintf("create folder %s", v.Source()), err)
	}
	if c.New {
		d.log.Info("created", "volume", v.Name, "folder", v.Source(), "identity", c.Identity)
	}
	return c, nil
}

// verify checks that a volume's directory still has an identity. Callers compare the returned inode
// with the later mount.
func (d *Driver) verify(ctx context.Context, v Volume, want string) (inode uint64, err error) {
	a, err := d.export(ctx, v)
	if err != nil {
		return 0, err
	}
	within, cancel := volume.WithReserve(ctx)
	defer cancel()
	c, err := lookOn(within, a)
	switch {
	case err != nil:
		return 0, explain(ctx, fmt.Sprintf("look at folder %s", v.Source()), err)
	case c.Identity == "":
		return 0, volume.Errorf(volume.ErrNotFound,
			"volume %s, identity %s, does not exist any more: there is no folder %s; create makes a "+
				"new one", v.Name, want, v.Source())
	case c.Identity != want:
		return 0, replaced(v, want, c)
	}
	return c.Inode, nil
}

// export returns the arguments for children that work on a volume's base.
func (d *Driver) export(ctx context.Context, v Volume) (exportArgs, error) {
	at, err := v.reach(ctx)
	if err != nil {
		return exportArgs{}, err
	}
	// Cache nothing, and share nothing with other mounts of the export: decisions must rest on the
	// server's current state.
	//
	// Take no locks. This mount would start a program for locks. That program would keep the
	// child's mount namespace, and with it the export, for ever.
	options := rules.Merge(v.Options,
		[]string{"rw", "noac", "lookupcache=none", "nosharecache", "nosuid", "nodev", "noexec", "nolock"})
	return exportArgs{Mount: spec(v.Host, v.Base, "", options, at), RunDir: d.config.RunDir, Name: v.Name,
		OnRemove: v.OnRemove}, nil
}

// Delete implements volume.Driver. Without options, the journal locates the volume.
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
	elsewhere := known && rec.Volume.Source() != v.Source() // the record is about another directory
	if elsewhere {
		rec, known = record{}, false
	}
	table, err := mounts.Read()
	if err != nil {
		return volume.Reply{}, err
	}
	if used := table.Of(v.Source()); len(used) > 0 && v.Base != "" {
		return volume.Reply{}, volume.Errorf(volume.ErrInUse, "volume %s is mounted at %s", v.Name, used[0].Point)
	}
	var reply volume.Reply
	other := false
	switch {
	case v.Base == "":
		reply.Message = fmt.Sprintf("export %s is kept: Lariat did not create it", v.Source())
	case v.OnRemove == Retain && rec.State != "deleting":
		reply.Message = fmt.Sprintf("folder %s is kept, as onRemove=retain says", v.Source())
	default:
		want, legacy := volume.Remembered(r, rec.Identity), (*mark)(nil)
		if known && rec.Identity == "" && rec.State != "creating" {
			host, _ := hostname()
			legacy = &mark{Host: host, Time: rec.Time.Add(volume.Deadlines.Long)}
		}
		if known && rec.State != lost && rec.State != "creating" {
			rec.State = "deleting"
			if err := d.volumes.Put(v.Name, rec); err != nil {
				return reply, err
			}
		}
		volume.Failpoint("delete-journalled")
		a, err := d.export(ctx, v)
		if err != nil {
			return reply, err
		}
		a.Want, a.Legacy = want, legacy
		within, cancel := volume.WithReserve(ctx)
		defer cancel()
		gone, err := removeOn(within, a)
		if err != nil {
			return reply, explain(ctx, fmt.Sprintf("remove folder %s", v.Source()), err)
		}
		reply.Message, other = gone.Message, gone.Other
		d.log.Info("removed", "volume", v.Name, "folder", v.Source(), "how", v.OnRemove, "result", gone.Message)
	}
	volume.Failpoint("delete-done")
	switch {
	case elsewhere:
		return reply, nil
	case other && known && r.Options[volume.Identity] == "":
		rec.State = lost
		return reply, d.volumes.Put(r.Name, rec)
	}
	return reply, d.volumes.Remove(r.Name)
}

// Mount implements volume.Driver. It creates a missing directory below exportBase, because kubelet
// has no verb for that. On a host that has created or found the volume, a missing directory is an
// error. A new directory there would be an empty volume in place of a volume with data.
func (d *Driver) Mount(ctx context.Context, dir, _ string, r volume.Request) error {
	ctx, cancel := volume.WithDeadline(ctx, volume.Deadlines.Long)
	defer cancel()
	v, err := d.config.Volume(r)
	if err != nil {
		return err
	}
	if v.Base == "" {
		return d.mounter.Mount(ctx, dir, v, r.Pod, nil)
	}
	rec, known, err := d.volumes.Get(v.Name)
	if err != nil {
		return err
	}
	if known && rec.Volume.Source() != v.Source() {
		rec = record{}
	}
	if want := rec.want(r); want != "" {
		return d.mountThat(ctx, dir, v, r.Pod, want)
	}
	var missing func(context.Context) (bool, error)
	if !v.ReadOnly {
		missing = func(ctx context.Context) (bool, error) {
			// A default is not a request to keep the data, so pass only the user's option.
			c, err := d.provision(ctx, v, OnRemove(r.Options["onRemove"]))
			return c.New, err
		}
	}
	return d.mounter.Mount(ctx, dir, v, r.Pod, missing)
}

// mountThat mounts the volume with an identity, and no other volume.
func (d *Driver) mountThat(ctx context.Context, dir string, v Volume, pod volume.Pod, want string) error {
	if there, err := d.mounter.has(ctx, dir, v); err != nil || there {
		if err == nil {
			err = d.mounter.Mount(ctx, dir, v, pod, nil)
		}
		return err // verified when it was mounted; a later rename cannot redirect a mount
	}
	inode, err := d.verify(ctx, v, want)
	if err != nil {
		return err
	}
	volume.Failpoint("mount-verified")
	if err := d.mounter.Mount(ctx, dir, v, pod, nil); err != nil {
		return err
	}
	// Another host may have replaced the directory since. The mount itself no longer changes.
	within, cancel := volume.WithReserve(ctx)
	defer cancel()
	if resolved, rerr := mounts.Resolve(dir); rerr != nil {
		err = rerr
	} else if is, ierr := rootInode(within, resolved); ierr != nil {
		err = fmt.Errorf("look at %s: %w", dir, ierr)
	} else if is != inode {
		err = volume.Errorf(volume.ErrConflict,
			"folder %s has just been replaced by another host: it is not volume %s, identity %s", v.Source(), v.Name, want)
	}
	if err != nil {
		return errors.Join(err, d.mounter.Unmount(ctx, dir))
	}
	return nil
}

// Unmount implements volume.Driver.
func (d *Driver) Unmount(ctx context.Context, dir string) error { return d.mounter.Unmount(ctx, dir) }
