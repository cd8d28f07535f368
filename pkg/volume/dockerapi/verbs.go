package dockerapi

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/mounts"
)

// foreign is the prefix of options that kubelet passes to FlexVolume drivers. From Docker's users,
// such options would be a lie, or a secret in argv.
const foreign = "kubernetes.io/"

func checkOptions(q request) error {
	if err := volume.CheckOptions(q.Opts); err != nil {
		return fmt.Errorf("volume %s: %w", q.Name, err)
	}
	for _, key := range slices.Sorted(maps.Keys(q.Opts)) {
		switch {
		case strings.HasPrefix(key, foreign):
			return volume.Errorf(volume.ErrInvalid, "volume %s: option %s is kubelet's, not Docker's", q.Name, cut(key))
		case key == "name" && q.Opts[key] != q.Name:
			return volume.Errorf(volume.ErrInvalid, "volume %s: option name says otherwise; leave it out", q.Name)
		}
	}
	return nil
}

func (s *Server) activate(context.Context, request) (answer, error) {
	return answer{Implements: []string{"VolumeDriver"}}, nil
}

func (s *Server) capabilities(context.Context, request) (answer, error) {
	return answer{Capabilities: &capabilities{s.config.Scope}}, nil
}

func (s *Server) unknown(name string) error {
	return volume.Errorf(volume.ErrNotFound, "no volume %s: docker volume create --driver %s %s", name, s.config.Name,
		name)
}

// show returns Docker's view of a volume.
func (s *Server) show(name string, rec record, mounted bool) info {
	i := info{Name: name, CreatedAt: rec.Created.UTC().Format(time.RFC3339),
		Status: map[string]any{"state": rec.State, "users": rec.users()}}
	if mounted {
		i.Mountpoint = s.dir(name)
	}
	return i
}

func (s *Server) lookup(_ context.Context, q request) (answer, error) {
	rec, known := s.get(q.Name)
	if !known {
		return answer{}, s.unknown(q.Name)
	}
	table, err := s.config.table()
	if err != nil {
		return answer{}, err
	}
	i := s.show(q.Name, rec, len(table.At(s.dir(q.Name))) > 0)
	return answer{Volume: &i}, nil
}

func (s *Server) path(ctx context.Context, q request) (answer, error) {
	a, err := s.lookup(ctx, q)
	if err != nil {
		return answer{}, err
	}
	return answer{Mountpoint: &a.Volume.Mountpoint}, nil
}

func (s *Server) list(context.Context, request) (answer, error) {
	table, err := s.config.table()
	if err != nil {
		return answer{}, err
	}
	mounted := s.mounted(table)
	s.mu.RLock()
	defer s.mu.RUnlock()
	all := make([]info, 0, len(s.records))
	for _, name := range slices.Sorted(maps.Keys(s.records)) {
		all = append(all, s.show(name, s.records[name], mounted[name]))
	}
	return answer{Volumes: &all}, nil
}

// create makes a volume, or continues the work of a killed process. Docker calls Get first, and
// does not call create for a name that exists.
func (s *Server) create(ctx context.Context, q request) (answer, error) {
	rec, known := s.get(q.Name)
	switch {
	case known && rec.State == Removing:
		return answer{}, errRemoving(q.Name)
	case known && rec.State != Recovered && !maps.Equal(rec.Options, q.Opts):
		return answer{}, volume.Errorf(volume.ErrConflict, "volume %s exists with other options (%s differ): remove it, "+
			"or choose another name", q.Name, strings.Join(different(rec.Options, q.Opts), ", "))
	case known && rec.State == Ready:
		return answer{}, s.verify(ctx, q.Name, rec)
	case !known:
		rec = record{Created: time.Now().UTC(), BootID: s.boot}
	}
	rec.Options = q.Opts
	_, err := s.finish(ctx, q.Name, rec, !known)
	return answer{}, err
}

// verify has the driver check that a created volume still exists, and create the volume again if it
// does not. A mounted volume exists. The driver gets the user's options alone. The driver's own
// record identifies the volume. That record changes together with the driver's work, even if this
// process is killed at any moment.
func (s *Server) verify(ctx context.Context, name string, rec record) error {
	table, err := s.config.table()
	if err != nil || len(table.At(s.dir(name))) > 0 {
		return err
	}
	again := rec
	again.Facts = nil
	if _, err := s.finish(ctx, name, again, false); err != nil {
		return errors.Join(err, s.put(name, rec))
	}
	return nil
}

func errRemoving(name string) error {
	return volume.Errorf(volume.ErrConflict, "the removal of volume %s was begun and did not end: docker volume rm %s",
		name, name)
}

// different returns the names of the options that differ. It omits the values, which do not belong
// in a log.
func different(a, b map[string]string) (keys []string) {
	for k, v := range a {
		if w, ok := b[k]; !ok || v != w {
			keys = append(keys, k)
		}
	}
	for k := range b {
		if _, ok := a[k]; !ok {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	return keys
}

// finish has the driver create the volume. If that fails, finish deletes a fresh record. Drivers
// keep their own record of an incomplete volume.
func (s *Server) finish(ctx context.Context, name string, rec record, fresh bool) (record, error) {
	rec.State = Creating
	if err := s.put(name, rec); err != nil {
		return rec, err
	}
	volume.Failpoint("docker-create-journalled")
	said, err := s.config.Driver.Create(ctx, rec.request(name))
	volume.Failpoint("docker-created")
	if err != nil && !errors.Is(err, volume.ErrNotSupported) {
		if fresh {
			err = errors.Join(err, s.drop(name))
		}
		return rec, err
	}
	if said.Message != "" {
		s.config.Log.Info("created", "volume", name, "note", said.Message)
	}
	rec.State, rec.Facts = Ready, said.Options
	return rec, s.put(name, rec)
}

// mount counts one more user, and mounts the volume if it is not mounted.
func (s *Server) mount(ctx context.Context, q request) (a answer, err error) {
	rec, known := s.get(q.Name)
	switch {
	case !known:
		return answer{}, s.unknown(q.Name)
	case rec.State == Removing:
		return answer{}, errRemoving(q.Name)
	case rec.State == Creating:
		if rec, err = s.finish(ctx, q.Name, rec, false); err != nil {
			return answer{}, err
		}
	}
	if rec, err = s.bring(ctx, q.Name, rec); err != nil {
		return answer{}, err
	}
	volume.Failpoint("docker-mounted")
	dir := s.dir(q.Name)
	if rec.Open.is("mount", q.ID, s.config.now()) && rec.Users[q.ID] > 0 {
		return answer{Mountpoint: &dir}, nil // a repetition, because the answer did not arrive
	}
	if q.caller.Err() != nil {
		// Docker may repeat the call. If it does not, Sweep unmounts the volume.
		return answer{}, fmt.Errorf("mount of %s: Docker hung up before it was done", q.Name)
	}
	rec.count(q.ID, 1)
	rec.Open = &call{"mount", q.ID, s.config.now()}
	if err := s.put(q.Name, rec); err != nil {
		return answer{}, err
	}
	volume.Failpoint("docker-mount-counted")
	return answer{Mountpoint: &dir}, nil
}

// bring mounts a volume at its directory, unless the volume is mounted there.
func (s *Server) bring(ctx context.Context, name string, rec record) (record, error) {
	dir := s.dir(name)
	table, err := s.config.table()
	if err != nil {
		return rec, err
	}
	if len(table.At(dir)) > 0 {
		if stale, err := s.config.probe(ctx, dir); err == nil {
			return rec, nil
		} else if rec, err = s.revive(ctx, name, rec, table, stale, err); err != nil {
			return rec, err
		}
	}
	if rec.State == Recovered {
		return rec, volume.Errorf(volume.ErrNotFound, "volume %s: the journal was lost and it is not mounted any more: "+
			"docker volume create --driver %s %s with its options", name, s.config.Name, name)
	}
	caps, err := s.config.Driver.Init(ctx)
	if err != nil {
		return rec, fmt.Errorf("driver %s: %w", s.config.Name, err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return rec, fmt.Errorf("folder for %s: %w", name, err)
	}
	r := rec.request(name)
	err = volume.ErrNotSupported
	if caps.Attach {
		if rec, err = s.attach(ctx, name, rec); err != nil {
			return rec, lost(name, err)
		}
		err = s.config.Driver.MountDevice(ctx, dir, rec.Device, r)
	}
	if errors.Is(err, volume.ErrNotSupported) {
		if rec.ByDevice {
			rec.ByDevice = false
			if err := s.put(name, rec); err != nil {
				return rec, err
			}
		}
		err = s.config.Driver.Mount(ctx, dir, rec.Device, r)
	}
	if err != nil {
		return rec, lost(name, err)
	}
	if table, err = s.config.table(); err != nil {
		return rec, err
	}
	if len(table.At(dir)) == 0 {
		return rec, fmt.Errorf("driver %s says that it mounted %s at %s, and the mount table does not show it: if the "+
			"driver or this process has a mount namespace of its own (PrivateTmp, ProtectHome …), take that away",
			s.config.Name, name, dir)
	}
	return rec, nil
}

// revive unmounts a stale mount, so that the volume can be mounted again. Users of the old mount
// would not get the new mount. Such users are an error that names them, unless the volume's options
// allow it.
func (s *Server) revive(
	ctx context.Context, name string, rec record, table mounts.Table, stale bool, cause error,
) (record, error) {
	if !stale {
		return rec, fmt.Errorf("volume %s is mounted at %s, and its server does not answer: %w", name, s.dir(name), cause)
	}
	if who := s.holders(table, name); len(who) > 0 && rec.Options["onHang"] != "lazy" {
		return rec, volume.Errorf(volume.ErrInUse,
			"volume %s is mounted at %s and stale (%w), and in use by %s: end these, or create the "+
				"volume with onHang=lazy", name, s.dir(name), cause, strings.Join(who, ", "))
	}
	s.config.Log.Warn("the mount is stale: it is made anew", "volume", name, "error", cause)
	if err := s.takeAway(ctx, name, rec); err != nil {
		return rec, fmt.Errorf("volume %s is mounted at %s and stale (%w), and %w", name, s.dir(name), cause, err)
	}
	rec.Attached, rec.ByDevice, rec.Device = false, false, ""
	return rec, nil
}

// lost adds a remedy to the error of a missing volume, because Docker does not create a volume that
// is listed.
func lost(name string, err error) error {
	if errors.Is(err, volume.ErrNotFound) {
		return fmt.Errorf("%w; docker volume rm %s, and create it again", err, name)
	}
	return err
}

// attach attaches the device to this host. The record says so before anything is mounted.
func (s *Server) attach(ctx context.Context, name string, rec record) (record, error) {
	r := rec.request(name)
	rec.Attached, rec.ByDevice = true, true
	if err := s.put(name, rec); err != nil {
		return rec, err
	}
	volume.Failpoint("docker-attach-journalled")
	device, err := s.config.Driver.Attach(ctx, r, "")
	if err != nil && !errors.Is(err, volume.ErrNotSupported) {
		return rec, err
	}
	there, err := s.config.Driver.WaitForAttach(ctx, device, r)
	if errors.Is(err, volume.ErrNotSupported) {
		there, err = device, nil
	}
	if err != nil {
		return rec, err
	}
	rec.Device = there
	return rec, s.put(name, rec)
}

// unmount counts one user less, and unmounts the volume after the last user. The count comes first,
// because Docker has finished with the volume even if the unmount fails.
func (s *Server) unmount(ctx context.Context, q request) (answer, error) {
	rec, known := s.get(q.Name)
	if !known {
		return answer{}, nil // the server knows every mounted volume: see load
	}
	if !rec.Open.is("unmount", q.ID, s.config.now()) {
		if rec.Users[q.ID] == 0 {
			// This happens after a reboot, or when Docker repeats a call.
			s.config.Log.Debug("unmount by one who does not have it", "volume", q.Name, "id", q.ID)
		}
		rec.count(q.ID, -1)
		rec.Open = &call{"unmount", q.ID, s.config.now()}
		if err := s.put(q.Name, rec); err != nil {
			return answer{}, err
		}
	}
	volume.Failpoint("docker-unmount-counted")
	if rec.users() > 0 {
		return answer{}, nil
	}
	if rec.State == Recovered {
		table, err := s.config.table()
		if err != nil {
			return answer{}, err
		}
		if len(s.holders(table, q.Name)) > 0 {
			return answer{}, nil // uncounted users still have the volume
		}
	}
	return answer{}, s.takeAway(ctx, q.Name, rec)
}

// takeAway unmounts a volume and detaches it. If nothing is mounted at the directory, there is
// nothing to unmount.
func (s *Server) takeAway(ctx context.Context, name string, rec record) error {
	dir := s.dir(name)
	table, err := s.config.table()
	if err != nil {
		return err
	}
	if len(table.At(dir)) > 0 {
		err := volume.ErrNotSupported
		if rec.ByDevice {
			err = s.config.Driver.UnmountDevice(ctx, dir)
		}
		if errors.Is(err, volume.ErrNotSupported) {
			err = s.config.Driver.Unmount(ctx, dir)
		}
		if err != nil {
			return err
		}
		if table, err = s.config.table(); err != nil {
			return err
		}
		if left := table.At(dir); len(left) > 0 {
			return fmt.Errorf("driver %s says that it unmounted %s, and the mount table shows %s at %s", s.config.Name, name,
				left[len(left)-1].Source, dir)
		}
	}
	volume.Failpoint("docker-unmounted")
	if rec.Attached {
		which := name
		if s.config.DetachDevice && rec.Device != "" {
			which = rec.Device
		}
		if err := s.config.Driver.Detach(ctx, which, ""); err != nil && !errors.Is(err, volume.ErrNotSupported) {
			return err
		}
		rec.Attached, rec.ByDevice, rec.Device = false, false, ""
		if err := s.put(name, rec); err != nil {
			return err
		}
	}
	_ = os.Remove(dir) // the directory is empty, and the next Mount creates it again
	if rec.State == Recovered {
		return s.drop(name)
	}
	return nil
}

// remove deletes a volume. A missing volume counts as removed. Docker calls remove only when none
// of its containers has the volume. Other counts stem from a killed dockerd, unless a process
// really uses the volume.
func (s *Server) remove(ctx context.Context, q request) (answer, error) {
	rec, known := s.get(q.Name)
	if !known {
		return answer{}, nil
	}
	table, err := s.config.table()
	if err != nil {
		return answer{}, err
	}
	if who := s.holders(table, q.Name); len(who) > 0 {
		return answer{}, volume.Errorf(volume.ErrInUse, "volume %s is in use by %s", q.Name, strings.Join(who, ", "))
	}
	if n := rec.users(); n > 0 {
		s.config.Log.Warn("users of whom no trace is left do not count", "volume", q.Name, "users", n)
		rec.Users = nil
	}
	before := rec
	rec.State, rec.Open = Removing, nil
	if before.State == Recovered {
		return answer{}, s.takeAway(ctx, q.Name, before) // too little is known for a Delete
	}
	if err := s.put(q.Name, rec); err != nil {
		return answer{}, err
	}
	volume.Failpoint("docker-remove-journalled")
	if err := s.takeAway(ctx, q.Name, rec); err != nil {
		before.Open = nil
		return answer{}, errors.Join(err, s.put(q.Name, before)) // nothing was deleted
	}
	rec.Attached, rec.ByDevice, rec.Device = false, false, ""
	said, err := s.config.Driver.Delete(ctx, rec.request(q.Name))
	volume.Failpoint("docker-deleted")
	switch {
	case errors.Is(err, volume.ErrNotSupported):
	case errors.Is(err, volume.ErrInUse):
		rec.State = before.State // nothing was deleted
		return answer{}, errors.Join(err, s.put(q.Name, rec))
	case err != nil:
		return answer{}, err
	}
	if said.Message != "" {
		s.config.Log.Info("removed", "volume", q.Name, "note", said.Message)
	}
	return answer{}, s.drop(q.Name)
}
