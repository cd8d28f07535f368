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

	"github.com/lariat-net/lariat/pkg/hostid"
	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/mounts"
)

// Mounter mounts volumes at directories of this host by NFS, and unmounts them. Each driver with
// NFS mounts has one Mounter.
type Mounter struct {
	Locks volume.Locks // of volumes, by name, and of directories

	mounts volume.Journal[mountRecord]
	log    *slog.Logger
}

// mountRecord describes the mount at a directory. It is written before the mount, and removed after
// the unmount.
type mountRecord struct {
	Volume Volume    `json:"volume"`
	BootID string    `json:"bootID"`
	Pod    string    `json:"pod,omitempty"`
	Time   time.Time `json:"time"`
}

// NewMounter returns the mounter of a driver, with a journal and locks of its own.
func NewMounter(driver, stateDir, runDir string, log *slog.Logger) *Mounter {
	return &Mounter{
		Locks:  volume.Locks{Dir: filepath.Join(runDir, driver)},
		mounts: volume.Journal[mountRecord]{Dir: filepath.Join(stateDir, driver, "mounts")},
		log:    log,
	}
}

// Mount mounts a volume at a directory, as volume.Driver's Mount does. If the mount fails and
// missing is not nil, Mount calls missing to create the missing parts on the server. If missing
// made something, the mount is retried.
func (m *Mounter) Mount(ctx context.Context, dir string, v Volume, pod volume.Pod,
	missing func(context.Context) (made bool, err error)) error {
	dir, err := mounts.Resolve(dir)
	if err != nil {
		return err
	}
	unlock, err := m.Locks.LockAll(ctx, "mount", v.Name, dir)
	if err != nil {
		return err
	}
	defer unlock()

	rec := mountRecord{Volume: v, BootID: hostid.Boot(), Pod: strings.Trim(pod.Namespace+"/"+pod.Name, "/"),
		Time: time.Now().UTC()}
	shown, err := m.reuse(ctx, dir, v)
	if err != nil {
		return err
	}
	if shown != nil {
		rec.Volume.Host, rec.Volume.Through = shown.Host, shown.Through
		return m.mounts.Put(dir, rec)
	}
	at, err := v.reach(ctx)
	if err != nil {
		return err
	}
	if err := m.mounts.Put(dir, rec); err != nil {
		return err
	}
	volume.Failpoint("mount-journalled")
	s := v.spec(dir, at)
	within, cancelMount := volume.WithReserve(ctx)
	defer cancelMount()
	err = mounts.Mount(within, s)
	if err != nil && missing != nil && ctx.Err() == nil && within.Err() == nil {
		// mount.nfs has one exit status for all failures, so examine the server.
		if made, merr := missing(ctx); merr == nil && made {
			err = mounts.Mount(within, s)
		} else if errors.Is(merr, volume.ErrInUse) || errors.Is(merr, volume.ErrConflict) {
			err = merr
		}
	}
	volume.Failpoint("mounted")
	if errors.Is(err, context.DeadlineExceeded) {
		// The mount may have succeeded just before the deadline. The mount table shows that.
		if t, terr := mounts.Read(); terr == nil && len(t.At(dir)) == 1 && t.At(dir)[0].Source == v.Source() {
			err = nil
		}
	}
	if err != nil {
		err = explain(ctx, fmt.Sprintf("mount %s at %s", s.Source, dir), err)
		// A mount with an unknown end stays on record.
		if t, terr := mounts.Read(); terr == nil && len(t.At(dir)) == 0 {
			err = errors.Join(err, m.mounts.Remove(dir))
		}
		return err
	}
	if v.FSGroup != nil && !v.ReadOnly {
		// A server that maps root to nobody refuses the change. kubelet would ignore that error.
		// Ignore it too, but log a warning.
		if _, err := setGroup(within, groupArgs{dir, *v.FSGroup}); err != nil {
			m.log.Warn("fsGroup not set", "volume", v.Name, "group", *v.FSGroup, "error", err)
		}
	}
	m.log.Info("mounted", "volume", v.Name, "source", s.Source, "dir", dir, "pod", rec.Pod)
	boot := hostid.Boot()
	if err := m.mounts.Prune(func(r mountRecord) bool { return r.BootID != boot }); err != nil {
		m.log.Warn("journal not pruned", "error", err)
	}
	return nil
}

// has reports whether a volume is already mounted at a directory, by the rules of reuse.
func (m *Mounter) has(ctx context.Context, dir string, v Volume) (bool, error) {
	dir, err := mounts.Resolve(dir)
	if err != nil {
		return false, err
	}
	unlock, err := m.Locks.LockAll(ctx, "mount", v.Name, dir)
	if err != nil {
		return false, err
	}
	defer unlock()
	shown, err := m.reuse(ctx, dir, v)
	return shown != nil, err
}

// reuse returns the volume if it is mounted at a directory and its server answers. It unmounts a
// stale mount, whose server or directory was replaced. It unmounts a mount in use only if the
// volume's options allow that. The caller holds the locks.
func (m *Mounter) reuse(ctx context.Context, dir string, v Volume) (*Volume, error) {
	shown, err := m.shown(dir, v)
	if err != nil || shown == nil {
		return nil, err
	}
	stale, cause := mounts.Probe(ctx, dir)
	if cause == nil {
		return shown, nil
	}
	if !stale {
		return nil, fmt.Errorf("%s is mounted at %s, and the NFS server does not answer: %w", v, dir, cause)
	}
	table, err := mounts.Read()
	if err != nil {
		return nil, err
	}
	var who []string
	if stack := table.At(dir); len(stack) > 0 {
		own := func(point string) bool { return strings.HasSuffix(point, dir) }
		who = append(mounts.Users(dir), mounts.Holders(stack[len(stack)-1], own)...)
	}
	if len(who) > 0 && v.OnHang != Lazy {
		return nil, volume.Errorf(volume.ErrInUse,
			"%s is mounted at %s and stale (%w), and in use by %s: end these, or set onHang=lazy",
			v, dir, cause, strings.Join(who, ", "))
	}
	m.log.Warn("the mount is stale: it is made anew", "volume", v.Name, "dir", dir, "error", cause)
	within, cancel := volume.WithReserve(ctx)
	defer cancel()
	policy := mounts.Policy{Dead: true, Lazy: v.OnHang == Lazy}
	if err := mounts.UnmountAll(within, dir, policy, m.log, "an NFS volume", isNFS); err != nil {
		return nil, fmt.Errorf("%s is mounted at %s and stale (%w), and %w", v, dir, cause, err)
	}
	return nil, m.mounts.Remove(dir)
}

// shown returns the volume, as it was mounted, if the mount table shows only this volume at a
// directory. It returns nil if nothing is mounted there. All other mounts are an ErrConflict.
func (m *Mounter) shown(dir string, v Volume) (*Volume, error) {
	table, err := mounts.Read()
	if err != nil {
		return nil, err
	}
	stack := table.At(dir)
	if len(stack) == 0 {
		return nil, nil
	}
	rec, _, err := m.mounts.Get(dir)
	if err != nil {
		return nil, err
	}
	// Compare the path, not the device, because all mounts of one server may have the same device
	// number.
	top := stack[len(stack)-1]
	if len(stack) == 1 && isNFS(top) && top.ReadOnly() == v.ReadOnly {
		if v.Through == nil && top.Source == v.Source() {
			return &v, nil
		}
		if was := rec.Volume; v.ID != "" && was.ID == v.ID && was.Path == v.Path && top.Source == was.Source() {
			return &was, nil
		}
	}
	return nil, volume.Errorf(volume.ErrConflict, "%s is mounted at %s already (%s, %s); %s would hide it", top.Source,
		dir, top.FSType, top.Options, v)
}

func isNFS(m mounts.Entry) bool { return m.FSType == "nfs" || m.FSType == "nfs4" }

// Unmount unmounts an NFS mount at a directory, as volume.Driver's Unmount does.
func (m *Mounter) Unmount(ctx context.Context, dir string) error {
	ctx, cancel := volume.WithDeadline(ctx, volume.Deadlines.Short)
	defer cancel()
	dir, err := mounts.Resolve(dir)
	if err != nil {
		return err
	}
	unlock, err := m.Locks.Lock(ctx, dir, "unmount")
	if err != nil {
		return err
	}
	defer unlock()
	rec, _, err := m.mounts.Get(dir)
	if err != nil {
		return err
	}
	within, cancelUnmount := volume.WithReserve(ctx)
	defer cancelUnmount()
	policy := mounts.Policy{Remote: true, Lazy: rec.Volume.OnHang == Lazy}
	if err := mounts.UnmountAll(within, dir, policy, m.log, "an NFS volume", isNFS); err != nil {
		return err
	}
	return m.mounts.Remove(dir)
}

// Mounted returns the volumes that this host has mounted, by directory. It returns only volumes
// that the journal has and the mount table shows.
func (m *Mounter) Mounted() (map[string]Volume, error) {
	all, err := m.mounts.List()
	if err != nil {
		return nil, err
	}
	table, err := mounts.Read()
	if err != nil {
		return nil, err
	}
	found := map[string]Volume{}
	for dir, rec := range all {
		for _, e := range table.At(dir) {
			if e.Source == rec.Volume.Source() {
				found[dir] = rec.Volume
			}
		}
	}
	return found, nil
}

// server is the address from which a volume is mounted.
type server struct {
	addr    string
	several bool // the name has more addresses, and this one answered first
}

// stagger is the time that an address has to answer before the next address is tried in parallel.
const stagger = 200 * time.Millisecond

// reach finds out in a few seconds whether there is a server. mount.nfs would try for minutes and
// then not report the cause. Of several addresses, reach takes the first that answers. A server
// that does not answer is a context.DeadlineExceeded.
func (v Volume) reach(ctx context.Context) (server, error) {
	end, _ := ctx.Deadline()
	ctx, cancel := context.WithTimeout(ctx, min(time.Until(end)/3, 5*time.Second))
	defer cancel()
	network, port := v.dialed()
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, network, v.Host)
	if err != nil {
		return server{}, fmt.Errorf("NFS server %s: its name has no address: %w", v.Host, err)
	}
	var all []string
	for _, a := range addrs {
		if text := a.Unmap().String(); !slices.Contains(all, text) {
			all = append(all, text)
		}
	}
	if port == "" {
		return server{addr: all[0]}, nil
	}
	addr, errs := race(ctx, all, port)
	if addr == "" {
		return server{}, silent(net.JoinHostPort(v.Host, port), all, errs)
	}
	return server{addr, len(all) > 1}, nil
}

// race connects to addresses with a pause between them, and returns the first that answers. ""
// means that no address answered; then race returns all errors.
func race(ctx context.Context, addrs []string, port string) (string, []error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type end struct {
		of  int
		err error
	}
	ends := make(chan end, len(addrs))
	next := make(chan struct{}, len(addrs)) // an address has failed: try the next at once
	go func() {
		tick := time.NewTicker(stagger)
		defer tick.Stop()
		for i, addr := range addrs {
			go func() {
				conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort(addr, port))
				if err == nil {
					conn.Close()
				}
				ends <- end{i, err}
				next <- struct{}{}
			}()
			select {
			case <-tick.C:
			case <-next:
			}
		}
	}()
	errs := make([]error, len(addrs))
	for range addrs {
		e := <-ends
		if e.err == nil {
			return addrs[e.of], nil
		}
		errs[e.of] = e.err
	}
	return "", errs
}

// silent explains why no address of a server accepted a connection.
func silent(to string, addrs []string, errs []error) error {
	const refuses, quiet = "refuses connections", "does not answer"
	var kind error
	said := make([]string, len(errs))
	for i, err := range errs {
		switch {
		case errors.Is(err, syscall.ECONNREFUSED):
			said[i] = refuses
		case errors.Is(err, context.DeadlineExceeded), isTimeout(err):
			said[i], kind = quiet, context.DeadlineExceeded
		default:
			said[i] = err.Error()
		}
	}
	which := ""
	if len(addrs) > 1 {
		which = " (" + strings.Join(addrs, ", ") + ")"
	}
	same := !slices.ContainsFunc(said, func(s string) bool { return s != said[0] })
	var err error
	switch {
	case same && said[0] == refuses:
		err = fmt.Errorf("NFS server %s%s refuses connections: is nfsd running there?", to, which)
	case same && said[0] == quiet:
		err = fmt.Errorf("NFS server %s%s does not answer: is the host up, and no firewall between?", to, which)
	case len(addrs) == 1:
		err = fmt.Errorf("NFS server %s: %w", to, errs[0])
	default:
		for i := range said {
			said[i] = addrs[i] + ": " + said[i]
		}
		err = fmt.Errorf("NFS server %s has no address that answers: %s", to, strings.Join(said, "; "))
	}
	if kind != nil {
		return volume.Errorf(kind, "%w", err)
	}
	return err
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

// explain adds the cause of the wait to the error of a child that was cut off.
func explain(ctx context.Context, what string, err error) error {
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return fmt.Errorf("%s: the NFS server accepts connections and does not answer: %w", what, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}
