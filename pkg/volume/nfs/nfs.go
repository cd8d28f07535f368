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
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
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
	mounts  volume.Journal[mountRecord]
	locks   volume.Locks
}

var _ volume.Driver = (*Driver)(nil)

// record of a volume that Create was asked for on this host.
type record struct {
	Volume  Volume    `json:"volume"`
	State   string    `json:"state"` // creating, ready or deleting
	Created bool      `json:"created"`
	Time    time.Time `json:"time"`
}

// mountRecord says what was mounted at a folder. It is written before the mount and removed after it is gone.
type mountRecord struct {
	Volume Volume    `json:"volume"`
	BootID string    `json:"bootID"`
	Pod    string    `json:"pod,omitempty"`
	Time   time.Time `json:"time"`
}

// New makes the driver. Nothing happens before the first call.
func New(c Config, log *slog.Logger) (*Driver, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	if c.StateDir == "" {
		c.StateDir = volume.DefaultStateDir
	}
	if c.RunDir == "" {
		c.RunDir = volume.DefaultRunDir
	}
	dir := filepath.Join(c.StateDir, "nfs")
	return &Driver{
		config: c, log: log,
		volumes: volume.Journal[record]{Dir: filepath.Join(dir, "volumes")},
		mounts:  volume.Journal[mountRecord]{Dir: filepath.Join(dir, "mounts")},
		locks:   volume.Locks{Dir: filepath.Join(c.RunDir, "nfs")},
	}, nil
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
	unlock, err := d.locks.Lock(ctx, v.Name, "create")
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
	within, cancel := d.before(ctx)
	defer cancel()
	c, err := createOn(within, a)
	if err != nil {
		return c, d.explain(ctx, fmt.Sprintf("create folder %s", v.Source()), err)
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
	return exportArgs{Mount: spec(v.Host, v.Base, "", options, addr), RunDir: filepath.Dir(d.locks.Dir), Name: v.Name, OnRemove: v.OnRemove}, nil
}

func spec(host, path, dir string, options []string, addr string) mounts.Spec {
	fstype := "nfs"
	if strings.HasPrefix(value(options, "vers", "nfsvers"), "4") {
		fstype = "nfs4"
	}
	return mounts.Spec{Source: source(host, path), Dir: dir, FSType: fstype, Options: options, Address: addr}
}

// Delete implements volume.Driver. Without options the journal says where the volume is.
func (d *Driver) Delete(ctx context.Context, r volume.Request) (volume.Reply, error) {
	ctx, cancel := volume.WithDeadline(ctx, volume.Deadlines.Long)
	defer cancel()
	if err := volume.CheckName(r.Name); err != nil {
		return volume.Reply{}, err
	}
	unlock, err := d.locks.Lock(ctx, r.Name, "delete")
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
		within, cancel := d.before(ctx)
		defer cancel()
		gone, err := removeOn(within, a)
		if err != nil {
			return reply, d.explain(ctx, fmt.Sprintf("remove folder %s", v.Source()), err)
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
	dir, err = mounts.Resolve(dir)
	if err != nil {
		return err
	}
	unlockVolume, err := d.locks.Lock(ctx, v.Name, "mount")
	if err != nil {
		return err
	}
	defer unlockVolume()
	unlock, err := d.locks.Lock(ctx, dir, "mount")
	if err != nil {
		return err
	}
	defer unlock()

	table, err := mounts.Read()
	if err != nil {
		return err
	}
	stack := table.At(dir)
	rec := mountRecord{Volume: v, BootID: volume.BootID(), Pod: strings.Trim(r.Pod.Namespace+"/"+r.Pod.Name, "/"), Time: time.Now().UTC()}
	if len(stack) > 0 {
		// The path, not the device: all mounts of one server may have the same device number.
		top := stack[len(stack)-1]
		if len(stack) == 1 && isNFS(top) && top.Source == v.Source() && top.ReadOnly() == v.ReadOnly {
			return d.mounts.Put(dir, rec)
		}
		return volume.Errorf(volume.ErrConflict, "%s is mounted at %s already (%s, %s); %s would hide it", top.Source, dir, top.FSType, top.Options, v.Source())
	}
	addr, err := v.reach(ctx)
	if err != nil {
		return err
	}
	if err := d.mounts.Put(dir, rec); err != nil {
		return err
	}
	volume.Step("mount-journalled")
	s := spec(v.Host, v.Path, dir, v.Options, addr)
	within, cancelMount := d.before(ctx)
	defer cancelMount()
	err = mounts.Mount(within, s)
	if err != nil && v.Base != "" && !v.ReadOnly && ctx.Err() == nil && within.Err() == nil {
		// Maybe only the folder is missing. mount.nfs has one exit status for everything, so look.
		if c, cerr := d.provision(ctx, v); cerr == nil && c.New {
			err = mounts.Mount(within, s)
		} else if errors.Is(cerr, volume.ErrInUse) || errors.Is(cerr, volume.ErrConflict) {
			err = cerr
		}
	}
	volume.Step("mounted")
	if errors.Is(err, context.DeadlineExceeded) {
		// Maybe it was just in time. The table knows.
		if t, terr := mounts.Read(); terr == nil && len(t.At(dir)) == 1 && t.At(dir)[0].Source == v.Source() {
			err = nil
		}
	}
	if err != nil {
		err = d.explain(ctx, fmt.Sprintf("mount %s at %s", v.Source(), dir), err)
		// A mount whose end nobody saw stays on record.
		if t, terr := mounts.Read(); terr == nil && len(t.At(dir)) == 0 {
			err = errors.Join(err, d.mounts.Remove(dir))
		}
		return err
	}
	if v.FSGroup != nil && v.Base != "" && !v.ReadOnly {
		// A server that maps root to nobody refuses that, and kubelet would ignore it: so do we, aloud.
		if _, err := setGroup(within, groupArgs{dir, *v.FSGroup}); err != nil {
			d.log.Warn("fsGroup not set", "volume", v.Name, "group", *v.FSGroup, "error", err)
		}
	}
	d.log.Info("mounted", "volume", v.Name, "source", v.Source(), "dir", dir, "pod", rec.Pod)
	d.prune()
	return nil
}

// prune drops records of mounts that went with an earlier boot.
func (d *Driver) prune() {
	all, err := d.mounts.List()
	if err != nil {
		d.log.Warn("journal not pruned", "error", err)
		return
	}
	boot := volume.BootID()
	for dir, rec := range all {
		if rec.BootID != boot {
			if err := d.mounts.Remove(dir); err != nil {
				d.log.Warn("journal not pruned", "dir", dir, "error", err)
			}
		}
	}
}

func isNFS(m mounts.Entry) bool { return m.FSType == "nfs" || m.FSType == "nfs4" }

// deepest is how many mounts at one folder are taken away. More are nobody's accident.
const deepest = 8

// Unmount implements volume.Driver.
func (d *Driver) Unmount(ctx context.Context, dir string) error {
	ctx, cancel := volume.WithDeadline(ctx, volume.Deadlines.Short)
	defer cancel()
	dir, err := mounts.Resolve(dir)
	if err != nil {
		return err
	}
	unlock, err := d.locks.Lock(ctx, dir, "unmount")
	if err != nil {
		return err
	}
	defer unlock()
	rec, _, err := d.mounts.Get(dir)
	if err != nil {
		return err
	}
	within, cancelUnmount := d.before(ctx)
	defer cancelUnmount()
	for range deepest {
		table, err := mounts.Read()
		if err != nil {
			return err
		}
		stack := table.At(dir)
		if len(stack) == 0 {
			volume.Step("unmount-proven")
			return d.mounts.Remove(dir)
		}
		top := stack[len(stack)-1]
		if !isNFS(top) {
			return volume.Errorf(volume.ErrConflict, "at %s is %s (%s), which is not an NFS volume: it is left alone", dir, top.Source, top.FSType)
		}
		how, err := mounts.Unmount(within, dir, mounts.Policy{Remote: true, Lazy: rec.Volume.OnHang == Lazy})
		if err != nil {
			return fmt.Errorf("unmount %s: %w", top.Source, err)
		}
		d.log.Info("unmounted", "source", top.Source, "dir", dir, "how", how)
	}
	return fmt.Errorf("unmount %s: more than %d mounts are there", dir, deepest)
}

// before ends a while before the caller's own deadline, so that there is time left to say why.
func (d *Driver) before(ctx context.Context) (context.Context, context.CancelFunc) {
	end, _ := ctx.Deadline()
	left := time.Until(end)
	left -= min(left/5, 3*time.Second)
	return context.WithTimeoutCause(ctx, left, volume.Timeout(left))
}

// reach finds out in a few seconds what mount.nfs would try for minutes and then not say: whether there is a server at all. It returns the
// server's address.
func (v Volume) reach(ctx context.Context) (string, error) {
	end, _ := ctx.Deadline()
	ctx, cancel := context.WithTimeout(ctx, min(time.Until(end)/3, 5*time.Second))
	defer cancel()
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", v.Host)
	if err != nil {
		return "", fmt.Errorf("NFS server %s: its name has no address: %w", v.Host, err)
	}
	to := v.dialed()
	if to == "" {
		return addrs[0].Unmap().String(), nil
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", to)
	switch {
	case err == nil:
		defer conn.Close()
		host, _, _ := net.SplitHostPort(conn.RemoteAddr().String())
		return host, nil
	case errors.Is(err, syscall.ECONNREFUSED):
		return "", fmt.Errorf("NFS server %s refuses connections: is nfsd running there?", to)
	case errors.Is(err, context.DeadlineExceeded), isTimeout(err):
		return "", fmt.Errorf("NFS server %s does not answer: is the host up, and no firewall between?", to)
	}
	return "", fmt.Errorf("NFS server %s: %w", to, err)
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

// explain says what a child that was cut off waited for.
func (d *Driver) explain(ctx context.Context, what string, err error) error {
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return fmt.Errorf("%s: the NFS server accepts connections and does not answer: %w", what, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// Mounted lists what this host has mounted, by folder, of what the journal knows and the mount table shows.
func (d *Driver) Mounted() (map[string]Volume, error) {
	all, err := d.mounts.List()
	if err != nil {
		return nil, err
	}
	table, err := mounts.Read()
	if err != nil {
		return nil, err
	}
	found := map[string]Volume{}
	for dir, rec := range all {
		if slices.ContainsFunc(table.At(dir), func(m mounts.Entry) bool { return m.Source == rec.Volume.Source() }) {
			found[dir] = rec.Volume
		}
	}
	return found, nil
}
