package flex

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/mounts"
)

// Program describes the executable of one driver.
type Program struct {
	Name    string // kubelet's name of the driver: nfs
	About   string // one line
	Version string
	// Driver makes the driver. It must not fail for reasons that do not concern init, because
	// kubelet does not ask again.
	Driver func(log *slog.Logger) (volume.Driver, error)
	// --help shows Options and Environment. Environment has pairs of a variable and its meaning.
	Options     []string
	Environment [][2]string

	LogFile string // "": /var/log/lariat/volume-<name>.log
}

// TimeoutVariable is the environment variable that limits the time of a call.
const TimeoutVariable = "LARIAT_VOLUME_TIMEOUT"

// slack is the time after its deadline in which a driver may still report the cause. After that,
// the call is cut off.
const slack = 5 * time.Second

// maxLog is the size at which the log file is rotated. One older file is kept.
const maxLog = 8 << 20

// Main is the complete main function of a driver. It answers the call in os.Args and ends the
// process with status 0 for Success, otherwise 1.
//
// From the start, standard output and error of the process and its children are the log file. The
// reason is that kubelet reads both streams together. One warning of a library would make a
// successful mount count as failed. The answer leaves through a private copy of standard output,
// even after a panic.
func Main(p Program) {
	mounts.RunChild()
	if len(os.Args) == 2 {
		switch os.Args[1] {
		case "--help", "-h", "help":
			fmt.Print(p.Help())
			os.Exit(0)
		case "--version":
			fmt.Println(p.Name, p.Version)
			os.Exit(0)
		}
	}
	out, err := p.quiet()
	if err != nil {
		os.Exit(1) // there is no way to report the error
	}
	// os.Stderr is the log file by now.
	log := slog.New(slog.NewTextHandler(os.Stderr, nil)).With("driver", p.Name)
	os.Exit(p.answer(out, log, os.Args[1:]))
}

// quiet turns standard output and error into the log, and returns the original standard output.
func (p Program) quiet() (io.Writer, error) {
	fd, err := unix.FcntlInt(1, unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, err
	}
	path := p.LogFile
	if path == "" {
		path = "/var/log/lariat/volume-" + p.Name + ".log"
	}
	_ = os.MkdirAll(filepath.Dir(path), 0o755)
	if fi, err := os.Lstat(path); err == nil && fi.Size() > maxLog {
		_ = os.Rename(path, path+".1")
	}
	const how = unix.O_WRONLY | unix.O_CLOEXEC
	sink, err := unix.Open(path, how|unix.O_APPEND|unix.O_CREAT|unix.O_NOFOLLOW, 0o640)
	if err != nil {
		sink, err = unix.Open(os.DevNull, how, 0)
	}
	if err != nil {
		return nil, err
	}
	for _, std := range []int{1, 2} {
		if err := unix.Dup3(sink, std, 0); err != nil {
			return nil, err
		}
	}
	return os.NewFile(uintptr(fd), "answer"), nil
}

// answer writes exactly one line and returns the exit status.
func (p Program) answer(out io.Writer, log *slog.Logger, args []string) int {
	said := make(chan Reply, 1)
	d := deadline(args)
	go func() {
		said <- p.reply(log, args, d)
	}()
	var r Reply
	late := time.NewTimer(d + slack)
	defer late.Stop()
	select {
	case r = <-said:
	case <-late.C:
		r = Reply{Status: Failure, Message: fmt.Sprintf("%s did not end after %s; a bug of the driver", at(args, 0), d+slack)}
	}
	if _, err := out.Write(r.encode()); err != nil || r.Status != Success {
		return 1
	}
	return 0
}

// deadline returns the time limit of a call.
func deadline(args []string) time.Duration {
	if d, err := time.ParseDuration(os.Getenv(TimeoutVariable)); err == nil && d >= time.Second {
		return d
	}
	if v, ok := verbs[at(args, 0)]; ok && v.long {
		return volume.Deadlines.Long
	}
	return volume.Deadlines.Short
}

func (p Program) reply(log *slog.Logger, args []string, d time.Duration) (r Reply) {
	start := time.Now()
	ctx, cancel := context.WithTimeoutCause(context.Background(), d, volume.Timeout(d))
	defer cancel()
	c, err := Parse(args)
	defer func() {
		if v := recover(); v != nil {
			log.Error("panic", "verb", c.Verb, "cause", redact(fmt.Sprint(v), c.Request.Secrets), "stack", string(debug.Stack()))
			r = failed(fmt.Errorf("%s: a bug of the driver: %v", c.Verb, v), c.Request.Secrets)
		}
		if r.Status != Success && c.Verb != "init" && c.Verb != "" || r.Message != "" {
			log.Warn(c.Verb, "status", r.Status, "message", oneLine(r.Message), "volume", c.Request.Name, "dir", c.Dir, "took",
				time.Since(start).Round(time.Millisecond))
		}
	}()
	if err != nil {
		return failed(err, c.Request.Secrets)
	}
	drv, err := p.Driver(log)
	if err != nil {
		return failed(err, c.Request.Secrets)
	}
	r, err = Do(ctx, drv, c)
	if err != nil {
		return failed(err, c.Request.Secrets)
	}
	r.Message = redact(r.Message, c.Request.Secrets)
	return r
}

// Do executes a call with a driver.
func Do(ctx context.Context, drv volume.Driver, c Call) (r Reply, err error) {
	r.Status = Success
	switch c.Verb {
	case "init":
		var caps volume.Capabilities
		caps, err = drv.Init(ctx)
		r.Capabilities = &Capabilities{Attach: caps.Attach, FSGroup: caps.FSGroup, SELinuxRelabel: caps.SELinuxRelabel,
			SupportsMetrics: caps.SupportsMetrics, RequiresFSResize: caps.RequiresFSResize}
	case "create", "delete":
		do := drv.Create
		if c.Verb == "delete" {
			do = drv.Delete
		}
		var told volume.Reply
		told, err = do(ctx, c.Request)
		r.Options, r.Message = told.Options, told.Message
	case "getvolumename":
		r.VolumeName, err = drv.GetVolumeName(ctx, c.Request)
	case "attach":
		r.Device, err = drv.Attach(ctx, c.Request, c.Node)
	case "waitforattach":
		r.Device, err = drv.WaitForAttach(ctx, c.Device, c.Request)
	case "isattached":
		var attached bool
		attached, err = drv.IsAttached(ctx, c.Request, c.Node)
		r.Attached = &attached
	case "mountdevice":
		err = drv.MountDevice(ctx, c.Dir, c.Device, c.Request)
	case "mount":
		err = drv.Mount(ctx, c.Dir, c.Device, c.Request)
	case "unmount":
		err = drv.Unmount(ctx, c.Dir)
	case "unmountdevice":
		err = drv.UnmountDevice(ctx, c.Dir)
	case "detach":
		err = drv.Detach(ctx, c.Volume, c.Node)
	case "expandvolume", "expandfs":
		r.VolumeNewSize, err = drv.Expand(ctx, c.Request, volume.Expansion{Size: c.Size, Old: c.Old, Device: c.Device,
			Dir: c.Dir, FileSystem: c.Verb == "expandfs"})
	default:
		err = errUnknownVerb
	}
	if err != nil {
		if errors.Is(err, volume.ErrNotSupported) && err.Error() == volume.ErrNotSupported.Error() {
			err = fmt.Errorf("%s: %w", c.Verb, err)
		}
		return Reply{}, err
	}
	return r, nil
}

// Help returns the text of --help.
func (p Program) Help() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s\n\nA FlexVolume driver: kubelet calls it, Rancher's storage daemon did, and a person "+
		"can.\nEach call prints one line of JSON; its exit status is 0 if that says Success.\n\nVerbs:\n", p.Name, p.About)
	for _, name := range order {
		v := verbs[name]
		usage := v.usage
		if v.most == 0 {
			usage = ""
		}
		fmt.Fprintf(&b, "  %s %s %s\n      %s\n", p.Name, name, usage, v.about)
	}
	fmt.Fprintf(&b, "\nJSON is an object of strings: the volume's \"name\", and its options:\n  %s\n",
		strings.Join(p.Options, ", "))
	fmt.Fprintf(&b, "\nEnvironment:\n")
	for _, e := range append(p.Environment, [2]string{TimeoutVariable, "how long a call may take, such as 90s"}) {
		fmt.Fprintf(&b, "  %-22s %s\n", e[0], e[1])
	}
	return b.String()
}
