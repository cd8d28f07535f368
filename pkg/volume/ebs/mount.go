package ebs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/hostid"
	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/mounts"
)

// WaitForAttach implements volume.Driver. AWS's name of the device matters only on instances
// without NVMe.
func (d *Driver) WaitForAttach(ctx context.Context, as string, req volume.Request) (string, error) {
	ctx, cancel := volume.WithDeadline(ctx, volume.Deadlines.Long)
	defer cancel()
	v, err := d.understand(req)
	if err != nil {
		return "", err
	}
	within, cancelWork := volume.WithReserve(ctx)
	defer cancelWork()
	// kubelet asks again after its restart. A mounted volume has its device, even if AWS does not
	// answer.
	if dev, err := d.mounted(v); err != nil || dev.path != "" {
		return dev.path, err
	}
	r, err := d.open(within, v.Region)
	if err != nil {
		return "", err
	}
	f, err := d.findExisting(within, r, v)
	if err != nil {
		return "", err
	}
	dev, err := d.arrived(within, r, v, f, as)
	return dev.path, err
}

// mounted returns the device of a volume for which this host has a mount on record.
func (d *Driver) mounted(v Volume) (device, error) {
	all, err := d.mounts.List()
	if err != nil {
		return device{}, err
	}
	for dir, rec := range all {
		if rec.Name == v.Name && rec.ID != "" && (v.ID == "" || v.ID == rec.ID) && (v.Known == "" || v.Known == rec.ID) {
			if table, err := mounts.Read(); err != nil || len(table.At(dir)) > 0 {
				dev, ferr := d.devices.find(rec.ID, "")
				return dev, errors.Join(err, ferr)
			}
		}
	}
	return device{}, nil
}

// arrived waits for the device of a volume that AWS reports as attached to this instance. It does
// not change a volume that is still attaching or already detaching.
func (d *Driver) arrived(ctx context.Context, r *region, v Volume, f *found, as string) (device, error) {
	if len(f.Attachments) == 0 {
		return device{}, fmt.Errorf("volume %s (%s) is attached to no instance: attach it first", v.Name, f.id())
	}
	at := f.Attachments[0]
	err := pauses.Poll(ctx, func() (bool, string, error) {
		if at.State == types.VolumeAttachmentStateAttached {
			return true, "", nil
		}
		now, err := r.describe(ctx, f.id())
		if err == nil && now != nil && len(now.Attachments) > 0 {
			at = now.Attachments[0]
		}
		return false, fmt.Sprintf("volume %s (%s) is still %s", v.Name, f.id(), at.State), err
	})
	if err != nil {
		return device{}, err
	}
	if name := aws.ToString(at.Device); name != "" {
		as = name
	}
	dev, err := d.devices.wait(ctx, f.id(), as)
	if err != nil {
		return device{}, fmt.Errorf("volume %s (%s) is attached to instance %s as %s: %w", v.Name, f.id(),
			aws.ToString(at.InstanceId), as, err)
	}
	return dev, nil
}

// MountDevice implements volume.Driver. kubelet has one directory for all pods of a node, and calls
// MountDevice for any of them. The last call decides whether the mount there is read-only.
func (d *Driver) MountDevice(ctx context.Context, dir, as string, req volume.Request) error {
	return d.mountAt(ctx, dir, as, req, true)
}

// UnmountDevice implements volume.Driver.
func (d *Driver) UnmountDevice(ctx context.Context, dir string) error { return d.Unmount(ctx, dir) }

// Mount implements volume.Driver. At a second directory it mounts the device once more, which is
// the same file system. So one verb serves callers that mount once, and kubelet, which mounts for
// the node and then for each pod. Each mount is read-only or read-write by itself. With
// Config.Attach=node, Mount attaches first.
func (d *Driver) Mount(ctx context.Context, dir, as string, req volume.Request) error {
	return d.mountAt(ctx, dir, as, req, false)
}

// mountAt implements MountDevice and Mount. With switches, an existing mount may become read-only
// or read-write.
func (d *Driver) mountAt(ctx context.Context, dir, as string, req volume.Request, switches bool) error {
	ctx, cancel := volume.WithDeadline(ctx, volume.Deadlines.Long)
	defer cancel()
	v, err := d.understand(req)
	if err != nil {
		return err
	}
	dir, err = mounts.Resolve(dir)
	if err != nil {
		return err
	}
	unlock, err := d.locks.LockAll(ctx, "mount", v.Name, dir)
	if err != nil {
		return err
	}
	defer unlock()
	within, cancelWork := volume.WithReserve(ctx)
	defer cancelWork()
	r, err := d.open(within, v.Region)
	if err != nil {
		return err
	}
	rec := mountRecord{Name: v.Name, ID: v.ID, Region: r.Config.Region, FromNode: d.config.fromNode(),
		BootID: hostid.Boot(),
		Pod:    strings.Trim(req.Pod.Namespace+"/"+req.Pod.Name, "/"), Time: time.Now().UTC()}
	old, known, err := d.mounts.Get(dir)
	if err != nil {
		return err
	}
	if err := d.mount(within, r, v, dir, as, rec, switches); err != nil {
		// A mount with an unknown end stays on record.
		if t, terr := mounts.Read(); terr == nil && len(t.At(dir)) == 0 && (!known || old.Name == v.Name) {
			err = errors.Join(err, d.giveUp(ctx, r, dir))
		}
		return err
	}
	// Keep the records of volumes that unmount has to detach.
	boot := hostid.Boot()
	if err := d.mounts.Prune(func(r mountRecord) bool { return r.BootID != boot && !r.FromNode }); err != nil {
		d.log.Warn("journal not pruned", "error", err)
	}
	return nil
}

// giveUp drops the record of a failed mount. kubelet does not call unmount then, so giveUp detaches
// a volume that Mount attached. It does not wait for the detachment.
func (d *Driver) giveUp(ctx context.Context, r *region, dir string) error {
	rec, known, err := d.mounts.Get(dir)
	if err != nil || !known {
		return err
	}
	if rec.FromNode && rec.ID != "" && d.used(rec.ID) == "" {
		self, err := r.instance(ctx, "")
		if err == nil {
			err = r.release(ctx, rec.ID, self, false)
		}
		if err != nil {
			return fmt.Errorf("and it is still attached: %w", err) // the volume stays on record
		}
	}
	return d.mounts.Remove(dir)
}

// mount is mountAt with locks held.
func (d *Driver) mount(ctx context.Context, r *region, v Volume, dir, as string, rec mountRecord,
	switches bool) (err error) {
	table, err := mounts.Read()
	if err != nil {
		return err
	}
	stack := table.At(dir)
	if len(stack) > 0 {
		if err := d.healthy(dir, stack[len(stack)-1]); err != nil {
			return err
		}
	} else if err := d.mounts.Put(dir, rec); err != nil {
		return err
	}
	volume.Failpoint("mount-journalled")
	var f *found
	if rec.FromNode {
		v.DetachAs = v.Name // unmount detaches, by the record
		f, as, err = d.attach(ctx, r, v, "")
	} else {
		f, err = d.findExisting(ctx, r, v)
	}
	if err != nil {
		return err
	}
	rec.ID = f.id()
	if len(stack) == 0 {
		if err := d.mounts.Put(dir, rec); err != nil {
			return err
		}
	}
	volume.Failpoint("mount-prepared")
	dev, err := d.arrived(ctx, r, v, f, as)
	if err != nil {
		return err
	}
	// While the device is open, no other device gets its name and number.
	dev, fd, err := d.devices.open(filepath.Base(dev.path), f.id(), unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if len(stack) > 0 {
		top := stack[len(stack)-1]
		switch {
		case len(stack) > 1 || top.Device != dev.number:
			return volume.Errorf(volume.ErrConflict,
				"%s is mounted at %s already (%s, %s); volume %s (%s, %s) would hide it. Volumes of one name in two pods of a "+
					"node share a folder of kubelet's: use PersistentVolumes, or names of their own",
				top.Source, dir, top.FSType, top.Options, v.Name, f.id(), dev.path)
		case top.ReadOnly() != v.ReadOnly && !switches:
			return volume.Errorf(volume.ErrConflict,
				"volume %s (%s, %s) is mounted at %s already, %s, and is wanted %s: unmount it first",
				v.Name, f.id(), dev.path, dir, mode(top.ReadOnly()), mode(v.ReadOnly))
		}
		if err := alive(ctx, v, f, dir); err != nil {
			return err
		}
		if _, err := d.writable(ctx, r, v, f, dev, fd, d.having(table, dev)); err != nil {
			return err
		}
		if readOnly(top.Options) != v.ReadOnly {
			err = mounts.SetReadOnly(ctx, dir, v.ReadOnly)
			volume.Failpoint("switched")
			if err != nil {
				return fmt.Errorf("make the mount of volume %s (%s) at %s %s: %w", v.Name, f.id(), dir, mode(v.ReadOnly), err)
			}
		}
		if !v.ReadOnly {
			d.grow(ctx, v, f, dev, fd, top.FSType, dir)
		}
		return d.mounts.Put(dir, rec)
	}
	if err := d.torn(table, f.id()); err != nil {
		return err
	}
	spec := mounts.Spec{Source: dev.path, Dir: dir, Options: v.Options}
	if others, err := d.others(ctx, table, dev); err != nil {
		return fmt.Errorf("volume %s (%s): %w", v.Name, f.id(), err)
	} else if len(others) > 0 {
		// Another mount shares the file system and its state. A mounted file system is not
		// examined.
		spec.FSType = others[0].FSType
		if err := v.is(f, spec.FSType); err != nil {
			return err
		}
		if here := d.having(table, dev); len(here) > 0 {
			if err := alive(ctx, v, f, here[0].Point); err != nil {
				return err
			}
		}
		if spec.Writable, err = d.writable(ctx, r, v, f, dev, fd, others); err != nil {
			return err
		}
	} else if spec.FSType, err = d.prepare(ctx, r, v, f, dev); err != nil {
		return err
	}
	if err := v.is(f, spec.FSType); err != nil {
		return err
	}
	if spec.FSType == "xfs" && aws.ToString(f.SnapshotId) != "" {
		spec.Options = rules.Merge(spec.Options, []string{"nouuid"}) // the snapshot's source may be mounted here, too
	}
	err = mounts.Mount(ctx, spec)
	volume.Failpoint("mounted")
	if err != nil {
		return fmt.Errorf("mount volume %s (%s) at %s: %w", v.Name, f.id(), dir, d.refused(ctx, dev, spec.FSType, err))
	}
	if !v.ReadOnly {
		d.grow(ctx, v, f, dev, fd, spec.FSType, dir)
	}
	d.log.Info("mounted", "volume", v.Name, "id", f.id(), "device", dev.path, "dir", dir, "pod", rec.Pod)
	return nil
}

// is refuses a file system that differs from the options.
func (v Volume) is(f *found, fs string) error {
	if v.FSType == "" || v.FSType == fs {
		return nil
	}
	return volume.Errorf(volume.ErrConflict, "volume %s (%s) has the file system %s, not %s as asked for",
		v.Name, f.id(), fs, v.FSType)
}

// mode returns the name of a mount's mode for messages.
func mode(readOnly bool) string {
	if readOnly {
		return "read-only"
	}
	return "read-write"
}

// readOnly reports whether a list of the mount table begins with ro, as it does for read-only
// mounts.
func readOnly(options string) bool { return strings.HasPrefix(options+",", "ro,") }

// having returns the mounts of a device on this host.
func (d *Driver) having(table mounts.Table, dev device) (all []mounts.Entry) {
	for _, m := range table {
		if m.Device == dev.number {
			all = append(all, m)
		}
	}
	return all
}

// others returns the mounts of a device on this host. If there are none, it returns the mounts in
// the mount namespaces of the host's processes. A container keeps its mount after the host's mount
// is removed.
func (d *Driver) others(ctx context.Context, table mounts.Table, dev device) ([]mounts.Entry, error) {
	if all := d.having(table, dev); len(all) > 0 {
		return all, nil
	}
	fd, err := unix.Open(dev.path, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err == nil {
		return nil, unix.Close(fd)
	}
	if !errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("open %s: %w", dev.path, err)
	}
	if all, _ := mounts.Elsewhere(dev.number); len(all) > 0 {
		return all, nil
	}
	return nil, d.refused(ctx, dev, "", err)
}

// writable reports whether the file system of a mounted device can be written to. If the file
// system is read-only and the volume is wanted for writing, writable makes the file system
// writable. This does not change the existing mounts.
func (d *Driver) writable(ctx context.Context, r *region, v Volume, f *found, dev device, fd int,
	others []mounts.Entry) (bool, error) {
	if !slices.ContainsFunc(others, func(m mounts.Entry) bool { return readOnly(m.Super) }) {
		return true, nil
	}
	if v.ReadOnly {
		return false, nil
	}
	fail := func(format string, args ...any) (bool, error) {
		return false, volume.Errorf(volume.ErrInUse,
			"volume %s (%s) is wanted read-write, and is mounted read-only at %s: %w. It can be mounted read-write when it "+
				"is unmounted there",
			v.Name, f.id(), points(others), fmt.Errorf(format, args...))
	}
	if i := slices.IndexFunc(others, func(m mounts.Entry) bool { return !readOnly(m.Options) }); i >= 0 {
		return fail("the kernel has taken the right to write from the mount at %s, after errors, as its log says",
			others[i].Point)
	}
	if s, err := readSuperblock(fd, others[0].FSType); err != nil || s.damaged {
		return fail("the file system has errors (%w), which e2fsck repairs at the next mount of a volume that is mounted "+
			"nowhere", cmp.Or(err, errors.New("its superblock says so")))
	}
	table, err := mounts.Read()
	if err != nil {
		return false, err
	}
	here := d.having(table, dev)
	if len(here) == 0 {
		_, who := mounts.Elsewhere(dev.number)
		return fail("only %s has it", strings.Join(who, ", "))
	}
	if err := d.formatted(ctx, r, f); err != nil {
		return false, err
	}
	if err := mounts.MakeWritable(ctx, here[0].Point); err != nil {
		return fail("%w", err)
	}
	volume.Failpoint("made-writable")
	return true, nil
}

func points(all []mounts.Entry) string {
	var list []string
	for _, m := range all {
		list = append(list, m.Point)
	}
	return strings.Join(list, ", ")
}

// refused adds facts that the kernel omits. To EBUSY it adds the users of the device, and to EINVAL
// the other device with the same UUID.
func (d *Driver) refused(ctx context.Context, dev device, fs string, err error) error {
	switch {
	case errors.Is(err, unix.EBUSY):
		if _, who := mounts.Elsewhere(dev.number); len(who) > 0 {
			return volume.Errorf(volume.ErrInUse, "%w: %s is mounted by %s", err, dev.path, strings.Join(who, ", "))
		}
		holders, _ := filepath.Glob(filepath.Join(d.devices.sys, "block", filepath.Base(dev.path), "holders", "*"))
		for i := range holders {
			holders[i] = filepath.Base(holders[i])
		}
		if len(holders) > 0 {
			return volume.Errorf(volume.ErrInUse, "%w: %s is a part of %s", err, dev.path, strings.Join(holders, ", "))
		}
		return volume.Errorf(volume.ErrInUse, "%w: a program has %s for itself (%s)", err, dev.path,
			strings.Join(mounts.Users(dev.path), ", "))
	case errors.Is(err, unix.EINVAL) && fs == "xfs":
		table, terr := mounts.Read()
		own := uuid(ctx, dev.path)
		for _, m := range table {
			if terr == nil && own != "" && m.FSType == "xfs" && m.Device != dev.number && uuid(ctx, m.Source) == own {
				return volume.Errorf(volume.ErrConflict,
					"%w: it has the UUID of %s, which is mounted at %s: is it a copy? Then add nouuid to mntOptions", err, m.Source,
					m.Point)
			}
		}
	}
	return err
}

// uuid returns the UUID of the file system on a device, or "".
func uuid(ctx context.Context, path string) string {
	out, _ := run(ctx, "blkid", "-p", "-s", "UUID", "-o", "value", path)
	return strings.TrimSpace(out)
}

// healthy checks that the device below a mount still exists. The file system of a device that was
// detached by force still answers, accepts writes, and loses them.
func (d *Driver) healthy(dir string, m mounts.Entry) error {
	if strings.HasPrefix(m.Device, "0:") {
		return nil // a file system without a device, which is not this driver's
	}
	if _, alive := d.devices.numbered(m.Device); !alive {
		return fmt.Errorf("the device of what is mounted at %s (%s, %s) is gone: it was detached while it was mounted, "+
			"and what was not written yet is lost. End what uses it, and unmount it", dir, m.Source, m.Device)
	}
	return nil
}

// alive refuses a file system that the kernel has shut down after errors of its device. Without
// this check, its mount would count as a success.
func alive(ctx context.Context, v Volume, f *found, dir string) error {
	if stale, err := mounts.Probe(ctx, dir); stale {
		return fmt.Errorf("the file system of volume %s (%s), mounted at %s, is shut down: %w. The kernel's log says "+
			"why; unmount it wherever it is mounted, and the next mount looks after it", v.Name, f.id(), dir, err)
	}
	return nil
}

// torn returns an error if a mount of a volume on this host has lost its device.
func (d *Driver) torn(table mounts.Table, id string) error {
	all, err := d.mounts.List()
	if err != nil {
		return err
	}
	for dir, rec := range all {
		if rec.ID != id {
			continue
		}
		for _, m := range table.At(dir) {
			if err := d.healthy(dir, m); err != nil {
				return fmt.Errorf("volume %s: %w", rec.Name, err)
			}
		}
	}
	return nil
}

// used returns a directory where a volume is mounted, or "".
func (d *Driver) used(id string) string {
	table, err := mounts.Read()
	if err != nil {
		return "a place that is not known: " + err.Error()
	}
	for _, m := range table {
		if of, alive := d.devices.numbered(m.Device); alive && of == id {
			return m.Point
		}
	}
	all, _ := d.mounts.List()
	for dir, rec := range all {
		if rec.ID == id && len(table.At(dir)) > 0 {
			return dir
		}
	}
	return ""
}

// Unmount implements volume.Driver. A volume that a Mount with Config.Attach=node attached is
// detached after its last unmount.
func (d *Driver) Unmount(ctx context.Context, dir string) error {
	ctx, cancel := volume.WithDeadline(ctx, volume.Deadlines.Short)
	defer cancel()
	dir, err := mounts.Resolve(dir)
	if err != nil {
		return err
	}
	rec, known, err := d.mounts.Get(dir)
	if err != nil {
		return err
	}
	keys := []string{dir}
	if known {
		keys = []string{rec.Name, dir}
	}
	unlock, err := d.locks.LockAll(ctx, "unmount", keys...)
	if err != nil {
		return err
	}
	defer unlock()
	now, _, err := d.mounts.Get(dir)
	if err != nil {
		return err
	}
	if now.Name != rec.Name && now.Name != "" {
		return volume.Errorf(volume.ErrInUse, "unmount %s: another call has just mounted volume %s there", dir, now.Name)
	}
	within, cancelWork := volume.WithReserve(ctx)
	defer cancelWork()
	err = mounts.UnmountAll(within, dir, mounts.Policy{}, d.log, "an EBS volume", func(m mounts.Entry) bool {
		id, alive := d.devices.numbered(m.Device)
		return slices.Contains(append(FSTypes, "ext2"), m.FSType) && (!alive || id != "" || now.Name != "")
	})
	if err != nil {
		return err
	}
	return d.release(within, dir, now)
}

// release drops the record of a removed mount. Before that, it detaches the volume if unmount must
// do so.
func (d *Driver) release(ctx context.Context, dir string, rec mountRecord) error {
	if rec.FromNode && (rec.ID == "" || d.used(rec.ID) == "") {
		r, err := d.open(ctx, rec.Region)
		if err != nil {
			return err
		}
		f, err := d.named(ctx, r, rec.Name, rec.ID, "", record{})
		if err == nil && f != nil {
			err = d.detach(ctx, r, f, "")
		}
		volume.Failpoint("detached")
		if err == nil {
			err = d.forget(rec.Name)
		}
		if err != nil {
			return fmt.Errorf("detach volume %s: %w", rec.Name, err)
		}
	}
	return d.mounts.Remove(dir)
}
