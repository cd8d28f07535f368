package mounts

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/volume"
)

// Spec describes a desired mount.
type Spec struct {
	Source  string
	Shown   string // the table's name of the source, if a program mounts another source instead; "": Source
	Dir     string // a result of Resolve
	FSType  string
	Options []string // all checked; including words such as ro and nodev
	Address string   // of the server, for a mount without a helper program
	// Pinned means that the server's name has other addresses, which may be dead. The kernel then
	// mounts from Address. mount.nfs takes no address. It tries all addresses in its own order, a
	// minute each.
	Pinned bool
	// Writable means that a device's file system is writable, or mounted for writing elsewhere.
	// Then the option ro applies to this mount alone.
	Writable bool
}

// flags maps options to the bits of mount(2).
var flags = map[string]struct{ set, clear uintptr }{
	"ro": {unix.MS_RDONLY, 0}, "rw": {0, unix.MS_RDONLY},
	"nosuid": {unix.MS_NOSUID, 0}, "suid": {0, unix.MS_NOSUID},
	"nodev": {unix.MS_NODEV, 0}, "dev": {0, unix.MS_NODEV},
	"noexec": {unix.MS_NOEXEC, 0}, "exec": {0, unix.MS_NOEXEC},
	"sync": {unix.MS_SYNCHRONOUS, 0}, "async": {0, unix.MS_SYNCHRONOUS},
	"dirsync": {unix.MS_DIRSYNC, 0}, "lazytime": {unix.MS_LAZYTIME, 0}, "nolazytime": {0, unix.MS_LAZYTIME},
	"noatime": {unix.MS_NOATIME, 0}, "relatime": {unix.MS_RELATIME, unix.MS_NOATIME},
	"strictatime": {unix.MS_STRICTATIME, unix.MS_NOATIME},
	"nodiratime":  {unix.MS_NODIRATIME, 0}, "diratime": {0, unix.MS_NODIRATIME}, "atime": {0, unix.MS_NOATIME},
}

var doMount = Task("mount", func(s Spec) (struct{}, error) { return struct{}{}, MountHere(s, true) })

// Mount mounts by the file system's own program (such as mount.nfs), or by mount(2) if there is no
// program. It creates the directory. It returns nil only if the table then shows the source at the
// directory.
func Mount(ctx context.Context, s Spec) error {
	if _, err := doMount(ctx, s); err != nil {
		return err
	}
	t, err := Read()
	if err != nil {
		return err
	}
	if stack := t.At(s.Dir); len(stack) == 0 || stack[len(stack)-1].Source != cmp.Or(s.Shown, s.Source) {
		return fmt.Errorf("the mount of %s at %s was reported as done, and the mount table does not show it", s.Source, s.Dir)
	}
	return nil
}

// helper returns the path of the program that mounts a file system, such as mount.nfs, or "".
func helper(fstype string) string { return Program("mount." + fstype) }

// Program returns the path of a system program, or "". It ignores PATH, because kubelet's
// environment determines PATH.
func Program(name string) string {
	for _, dir := range []string{"/sbin", "/usr/sbin", "/usr/local/sbin", "/usr/bin", "/run/current-system/sw/bin"} {
		path := filepath.Join(dir, name)
		if unix.Access(path, unix.X_OK) == nil {
			return path
		}
	}
	return ""
}

// MountHere mounts in this process, which must be a child. With become, the process turns into the
// file system's program. Then there is one process less that could outlive its parent.
func MountHere(s Spec, become bool) error {
	if err := os.MkdirAll(s.Dir, 0o750); err != nil {
		return fmt.Errorf("create the folder: %w", err)
	}
	if fi, err := os.Lstat(s.Dir); err != nil || !fi.IsDir() {
		return volume.Errorf(volume.ErrConflict, "%s is not a folder", s.Dir)
	}
	volume.Failpoint("before-mount")
	program := helper(s.FSType)
	if program == "" && s.Address == "" {
		return deviceMount(s)
	}
	if program == "" || s.Pinned {
		return kernelMount(s, program != "")
	}
	// The source cannot begin with a dash, because it is a host and a path, or a device's path. The
	// directory is absolute.
	argv := []string{program, s.Source, s.Dir, "-o", strings.Join(s.Options, ",")}
	runtime.LockOSThread()
	if become {
		// PR_SET_PDEATHSIG applies to a thread, and only the thread that calls exec survives.
		if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(syscall.SIGKILL), 0, 0, 0); err != nil {
			return fmt.Errorf("prctl: %w", err)
		}
		return fmt.Errorf("execute %s: %w", program, syscall.Exec(program, argv, os.Environ()))
	}
	var words limited
	cmd := exec.Command(program, argv[1:]...)
	cmd.Stdout, cmd.Stderr = &words, &words
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // the program stays in this process's group
	err := cmd.Run()
	if text := words.String(); err != nil && text != "" {
		return errors.New(text)
	}
	return err
}

// kernelMount mounts without the file system's program, which may nevertheless be installed.
func kernelMount(s Spec, installed bool) error {
	bits, data := uintptr(0), []string{}
	for _, o := range s.Options {
		if f, ok := flags[o]; ok {
			bits = bits&^f.clear | f.set
		} else if !strings.HasPrefix(o, "retry=") { // only mount.nfs knows this option
			data = append(data, o)
		}
	}
	type try struct{ fstype, version string }
	tries := []try{{s.FSType, ""}}
	if s.Address != "" {
		data = append(data, "addr="+s.Address)
		open := func(o string) bool { return o == "vers=4" || o == "nfsvers=4" }
		said := slices.ContainsFunc(data, func(o string) bool {
			return strings.HasPrefix(o, "vers=") || strings.HasPrefix(o, "nfsvers=")
		})
		if s.FSType == "nfs" && !said || slices.ContainsFunc(data, open) {
			// As mount.nfs does, use the highest version that both sides speak. The kernel reads
			// version 4 as 4.0.
			data = slices.DeleteFunc(data, open)
			tries = []try{{"nfs4", ",vers=4.2"}, {"nfs4", ",vers=4.1"}, {"nfs4", ",vers=4.0"}}
			if !said && installed { // the programs of version 3 are then installed too
				tries = append(tries, try{"nfs", ",vers=3"})
			}
		}
	}
	var err error
	for _, t := range tries {
		if t.fstype == "nfs" && !slices.Contains(data, "nolock") {
			if err = startStatd(); err != nil {
				break
			}
		}
		err = unix.Mount(s.Source, s.Dir, t.fstype, bits, strings.Join(data, ",")+t.version)
		if !errors.Is(err, unix.EPROTONOSUPPORT) && !errors.Is(err, unix.EINVAL) {
			break
		}
	}
	if err != nil {
		why := ""
		switch {
		case errors.Is(err, unix.ENODEV):
			why = fmt.Sprintf(" (this kernel has no %s: modprobe %s)", s.FSType, s.FSType)
		case !strings.HasPrefix(s.FSType, "nfs"):
			why = " (the kernel's log, dmesg, may say more)"
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EPROTO), errors.Is(err, unix.EPROTONOSUPPORT):
			why = fmt.Sprintf(" (mount.%s is not installed, and without it the kernel does not take these options; for NFS "+
				"it needs version 4)", s.FSType)
		}
		return fmt.Errorf("mount %s: %w%s", s.Source, err, why)
	}
	return nil
}

// startStatd starts the program that locks of NFS 3 need, as mount.nfs does. It runs the script of
// that program, which does nothing if the program is running. Without the script, the kernel alone
// handles locks.
func startStatd() error {
	script := Program("start-statd")
	if script == "" {
		return nil
	}
	var words limited
	cmd := exec.Command(script)
	cmd.Stdout, cmd.Stderr = &words, &words
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = time.Second
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Run(); err != nil && !errors.Is(err, exec.ErrWaitDelay) {
		return fmt.Errorf("locks of NFS 3 need rpc.statd, and %s fails: %w (%s): start it, or add nolock to the mount "+
			"options", script, err, words.String())
	}
	return nil
}

type unmountArgs struct {
	Dir   string
	Flags int
}

var doUnmount = Task("unmount", func(a unmountArgs) (struct{}, error) {
	if err := unix.Unmount(a.Dir, a.Flags|unix.UMOUNT_NOFOLLOW); err != nil {
		return struct{}{}, fmt.Errorf("umount: %w", err)
	}
	return struct{}{}, nil
})

var doProbe = Task("probe", func(dir string) (struct{}, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return struct{}{}, err
	}
	// An open file keeps a directory alive that was removed on the server. Ask the server, not the
	// cache.
	var x unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, dir, unix.AT_SYMLINK_NOFOLLOW|unix.AT_STATX_FORCE_SYNC, unix.STATX_NLINK, &x)
	if err == nil && x.Mask&unix.STATX_NLINK != 0 && x.Nlink == 0 {
		return struct{}{}, unix.ESTALE
	}
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EINVAL) {
		err = nil
	}
	return struct{}{}, err
})

// Alive reports whether the mount at a directory answers within a time.
func Alive(ctx context.Context, dir string, within time.Duration) bool {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	_, err := doProbe(ctx, dir)
	return !unanswered(err)
}

// Patience is the time that an existing mount has to answer before its next use.
const Patience = 5 * time.Second

// Probe asks the server of the mount at a directory, in a child. nil means that the server answers.
// With stale, the error is final: the server has forgotten the volume, or the mount has lost its
// server. Otherwise the server has not answered yet, and may answer later.
func Probe(ctx context.Context, dir string) (stale bool, err error) {
	within, cancel := context.WithTimeoutCause(ctx, part(ctx, 4, Patience), volume.Timeout(Patience))
	defer cancel()
	_, err = doProbe(within, dir)
	for _, final := range []error{unix.ESTALE, unix.ENOTCONN, unix.EIO, unix.ESHUTDOWN} {
		if errors.Is(err, final) {
			return true, err
		}
	}
	if unanswered(err) {
		return false, err
	}
	return false, nil // a refusal is an answer
}

// errRestartSys is ERESTARTSYS (linux/errno.h), which user space should never see. A call that
// waits for an NFS server returns it under two conditions. Another mount of the same export is
// unmounted by force, and no signal is pending for a restart of the call.
const errRestartSys = unix.Errno(512)

// unanswered reports whether a call ended without an answer of the server. All other errors come
// from the server, and prove that it lives.
func unanswered(err error) bool {
	return slices.ContainsFunc([]error{
		context.DeadlineExceeded, errRestartSys, unix.EINTR, unix.EIO, unix.ETIMEDOUT, unix.ENOTCONN, unix.ECONNREFUSED,
		unix.ECONNRESET, unix.ECONNABORTED,
		unix.EPIPE, unix.EHOSTUNREACH, unix.EHOSTDOWN, unix.ENETUNREACH, unix.ENETDOWN,
	}, func(e error) bool { return errors.Is(err, e) })
}

// Policy limits the means of Unmount.
type Policy struct {
	Remote bool // the server may be dead; its waiting calls may then be aborted (MNT_FORCE)
	// Dead means that the mount is known to be stale though its server answers. Then Unmount never
	// uses force, because force would also hit other mounts of the server. Only Lazy can help.
	Dead bool
	Lazy bool // if all else fails, detach: processes that use the volume keep it, out of sight
}

// forceTries is the number of forced unmounts of a dead server's volume. Each attempt aborts the
// calls that wait for the server. The processes that made these calls leave only afterwards.
const forceTries = 6

// leastTry is the least time for one attempt, because a busy host needs time to start a child.
const leastTry = time.Second

// deepest is the number of mounts that UnmountAll removes from one directory. More mounts there are
// no accident.
const deepest = 8

// UnmountAll unmounts one mount after the other at a directory, until the mount table shows none
// there. A mount for which ours returns false is an ErrConflict. The error names the expected kind.
func UnmountAll(ctx context.Context, dir string, p Policy, log *slog.Logger, kind string, ours func(Entry) bool) error {
	for range deepest {
		table, err := Read()
		if err != nil {
			return err
		}
		stack := table.At(dir)
		if len(stack) == 0 {
			volume.Failpoint("unmount-proven")
			return nil
		}
		top := stack[len(stack)-1]
		if !ours(top) {
			return volume.Errorf(volume.ErrConflict, "at %s is %s (%s), which is not %s: it is left alone", dir, top.Source,
				top.FSType, kind)
		}
		how, err := Unmount(ctx, dir, p)
		if err != nil {
			return fmt.Errorf("unmount %s: %w", top.Source, err)
		}
		log.Info("unmounted", "source", top.Source, "dir", dir, "how", how)
	}
	return fmt.Errorf("unmount %s: more than %d mounts are there", dir, deepest)
}

// Unmount removes the uppermost mount of a directory, and returns the method: "umount", "force" or
// "lazy". A volume in use whose server answers is an ErrInUse, which names the users. If nothing is
// mounted, the method is "".
func Unmount(ctx context.Context, dir string, p Policy) (how string, err error) {
	before, err := Read()
	if err != nil {
		return "", err
	}
	stack := before.At(dir)
	if len(stack) == 0 {
		return "", nil
	}
	id := stack[len(stack)-1].ID
	gone := func() (bool, error) {
		t, err := Read()
		if err != nil {
			return false, err
		}
		for _, m := range t.At(dir) {
			if m.ID == id {
				return false, nil
			}
		}
		return true, nil
	}
	try := func(how string, flag int, share int, most time.Duration) (done bool, err error) {
		within := max(part(ctx, share, most), min(leastTry, part(ctx, 1, most)))
		ctx, cancel := context.WithTimeoutCause(ctx, within, volume.Timeout(within))
		defer cancel()
		_, cause := doUnmount(ctx, unmountArgs{dir, flag})
		volume.Failpoint("unmounted")
		if ok, err := gone(); err != nil || ok {
			return ok, err
		}
		if cause == nil {
			cause = errors.New("the mount table still shows it")
		}
		return false, cause
	}

	done, cause := try("umount", 0, 3, 15*time.Second)
	if done {
		return "umount", nil
	}
	if p.Dead {
		if p.Lazy {
			if done, cause = try("lazy", unix.MNT_DETACH, 2, 5*time.Second); done {
				return "lazy", nil
			}
		}
		return "", inUse(dir, cause)
	}
	late := unanswered(cause)
	if !p.Remote || !late && !errors.Is(cause, unix.EBUSY) {
		return "", inUse(dir, cause)
	}
	if !late && Alive(ctx, dir, part(ctx, 4, 5*time.Second)) {
		return "", inUse(dir, cause)
	}
	var kept time.Duration // reserved for the lazy unmount, which needs no server
	if p.Lazy {
		kept = part(ctx, 2, 5*time.Second)
	}
	pause := time.NewTicker(400 * time.Millisecond)
	defer pause.Stop()
	for range forceTries {
		if kept > 0 && part(ctx, 1, time.Hour)-kept < leastTry {
			break
		}
		done, err := try("force", unix.MNT_FORCE, 4, 5*time.Second)
		if done {
			return "force", nil
		}
		cause = err
		select {
		case <-pause.C:
		case <-ctx.Done():
			return "", fmt.Errorf("unmount %s: the server does not answer: %w", dir, context.Cause(ctx))
		}
	}
	if p.Lazy {
		if done, cause = try("lazy", unix.MNT_DETACH, 1, 5*time.Second); done {
			return "lazy", nil
		}
	}
	return "", fmt.Errorf("the server does not answer, and %w", inUse(dir, cause))
}

// part returns a share of the remaining time.
func part(ctx context.Context, share int, most time.Duration) time.Duration {
	if end, ok := ctx.Deadline(); ok {
		return min(time.Until(end)/time.Duration(share), most)
	}
	return most
}

func inUse(dir string, cause error) error {
	if !errors.Is(cause, unix.EBUSY) {
		return fmt.Errorf("unmount %s: %w", dir, cause)
	}
	who := Users(dir)
	if len(who) == 0 {
		return volume.Errorf(volume.ErrInUse, "%s is in use: %w", dir, cause)
	}
	return volume.Errorf(volume.ErrInUse, "%s is in use by %s: %w", dir, strings.Join(who, ", "), cause)
}

// Holders returns processes in whose mount namespaces a mount is in use, as "name (pid) at
// directory". It returns at most five, above all processes of containers. The place of the mount
// itself does not count, because every copy of the host's namespace has it. That includes a copy
// below a directory where a container has the host's root.
func Holders(top Entry, place func(point string) bool) (who []string) {
	below := strings.TrimSuffix(top.Root, "/") + "/"
	namespaces(func(pid string, table Table) bool {
		for _, m := range table {
			same := m.Device == top.Device && m.Source == top.Source
			if same && (m.Root == top.Root || strings.HasPrefix(m.Root, below)) && !place(m.Point) {
				who = append(who, holder(pid, m))
				break
			}
		}
		return len(who) < most
	})
	return who
}

// Users returns processes that have something below a directory open or as their working directory.
// The result has at most five entries, as "name (pid)". Users does not search other mount
// namespaces. It reads links in /proc, which needs no server.
func Users(dir string) (who []string) {
	procs, _ := os.ReadDir("/proc")
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil {
			continue
		}
		base := filepath.Join("/proc", p.Name())
		links := []string{base + "/cwd", base + "/root"}
		fds, _ := os.ReadDir(base + "/fd")
		for _, fd := range fds {
			links = append(links, base+"/fd/"+fd.Name())
		}
		for _, l := range links {
			if to, err := os.Readlink(l); err == nil && (to == dir || strings.HasPrefix(to, dir+"/")) {
				name, _ := os.ReadFile(base + "/comm")
				who = append(who, fmt.Sprintf("%s (%d)", strings.TrimSpace(string(name)), pid))
				break
			}
		}
		if len(who) == most {
			break
		}
	}
	return who
}
