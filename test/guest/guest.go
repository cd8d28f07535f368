// Package guest runs Go tests inside of Debian's kernel under QEMU, for what the machine's own kernel may
// lack: ESP, XFRM interfaces, kernel NFS, NVMe. No privileges and no KVM are needed; a guest is ready in a
// few seconds.
//
//	func TestMain(m *testing.M) { guest.Main(m, guest.Options{Warm: true}) }
//
//	func TestESP(t *testing.T) {
//		probe.Need(t, probe.ESP)
//		… // as root of a machine of its own
//	}
//
// On the machine, Main boots a guest and runs the same test binary in it, with the same flags; what it
// prints, its exit status and the files that tests leave in Out come back. A guest lives as long as one test
// binary runs. Where none can be had, the tests are skipped with the reason, or fail if REQUIRE lists
// "guest".
//
// docs/design/guest.md says why it is as it is; packages.list, what is in a guest.
package guest

import (
	"archive/tar"
	"bufio"
	"cmp"
	"context"
	_ "embed" // the second half of a guest's start
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/lariat-net/lariat/test/debian"
)

//go:embed start.sh
var startScript string

// Patience is how long what must come in a guest may take. It ends a test that hangs and says nothing of how
// quick things are: an emulated machine on a busy one takes a hundred times as long as a real one.
const Patience = 4 * time.Minute

// Options of a guest.
type Options struct {
	// Main runs this package's tests instead of the caller's: a folder, relative to the caller's
	Package string
	Only    string // the tests that Main runs if no -run says otherwise, as -run takes it; "": all
	// of which release of Debian, such as "trixie"; "": LARIAT_GUEST_RELEASE, or this machine's own
	Kernel     string
	KernelArgs []string // added to the kernel's command line, such as "module_blacklist=esp4,esp6"
	QEMUArgs   []string // added to QEMU's
	Memory     int      // MiB; 0: 1024
	CPUs       int      // 0: 1, which is safest: emulated processors sometimes wait for each other for too long
	Slots      int      // PCIe slots for hot-plug, named rp1 and so on; with any, OpenMonitor works in the guest
	Disks      []int    // MiB of disks for Monitor.Plug; empty sparse files that go with the guest
	Bin        bool     // the project's executables are in the guest, and LARIAT_BIN says where
	// IPsec's modules are loaded beforehand, or else the first security association takes seconds
	Warm    bool
	Files   map[string]string // path in the guest below its working directory: file or folder of this machine
	Require string            // REQUIRE inside; "": all, so that nothing a guest has is skipped there
	// a nanosecond of the guest's clock is an instruction executed, or a real one without work: for measuring
	Counted bool
	Boot    time.Duration // how long a guest may take until it is ready; 0: two minutes
}

// Command is what a guest is booted for.
type Command struct {
	Args   []string
	Env    []string      // beside PATH and HOME
	Stdout io.Writer     // takes both streams; nil: nobody
	Out    string        // folder of this machine that gets what the command leaves in LARIAT_OUT; "": nowhere
	Limit  time.Duration // 0: ten minutes

	interactive bool // on this terminal
}

// Result of a guest that ran its command.
type Result struct {
	Code     int           // exit status of the command
	Ready    time.Duration // from QEMU's start until the guest was ready
	Took     time.Duration // all told, of the last attempt
	Attempts int           // at booting
}

// Error is a guest that did not run its command to the end.
type Error struct {
	Ready   bool   // it had booted, and its command may have run
	Console string // the end of what the kernel said
	Err     error
}

func (e *Error) Error() string {
	what := "the guest did not boot"
	if e.Ready {
		what = "the guest did not finish"
	}
	return fmt.Sprintf("%s: %v; its console's last lines:\n%s", what, e.Err, e.Console)
}

// Unwrap is the cause.
func (e *Error) Unwrap() error { return e.Err }

// attempts at booting. Under emulation a boot fails now and then for no reason that concerns a test; what a
// test does never gets a second try.
const attempts = 3

// Run boots a guest, runs a command in it as root, and waits for both to end. The error is an *Error where
// the guest is to blame. A command that fails is no error: see Result.Code.
func Run(ctx context.Context, o Options, c Command) (Result, error) {
	image, unlock, err := hold()
	if err != nil {
		return Result{}, err
	}
	defer unlock()
	for attempt := 1; ; attempt++ {
		res, err := run(ctx, image, o, c)
		res.Attempts = attempt
		var e *Error
		if !errors.As(err, &e) || e.Ready || ctx.Err() != nil || attempt == attempts {
			return res, err
		}
	}
}

// hold finds an image and keeps others from removing it as long as a guest runs.
func hold() (Image, func(), error) {
	for {
		image, err := Find()
		if err != nil {
			return Image{}, nil, err
		}
		unlock, err := lock(image.dir+".lock", syscall.LOCK_SH)
		if err != nil {
			return Image{}, nil, err
		}
		if isDir(image.dir) {
			return image, unlock, nil
		}
		unlock() // it was removed in between; there is another, or Find says so
	}
}

// run is one attempt.
func run(ctx context.Context, image Image, o Options, c Command) (res Result, err error) {
	start := time.Now()
	dir, err := os.MkdirTemp("", "guest-") // short, because the paths of sockets must be
	if err != nil {
		return res, err
	}
	defer os.RemoveAll(dir)
	if err := writeInput(filepath.Join(dir, "in.tar"), o, c); err != nil {
		return res, fmt.Errorf("collect files for the guest: %w", err)
	}

	for i, size := range o.Disks {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint("disk", i+1)), nil, 0o600); err != nil {
			return res, err
		}
		if err := os.Truncate(filepath.Join(dir, fmt.Sprint("disk", i+1)), int64(size)<<20); err != nil {
			return res, err
		}
	}

	// The listeners are there before QEMU is, so it needs no second try.
	ports := map[string]*port{}
	for _, name := range []string{"control", "output", "files"} {
		p, err := listen(filepath.Join(dir, name))
		if err != nil {
			return res, err
		}
		defer p.Close()
		ports[name] = p
	}

	ctx, cancel := context.WithTimeout(ctx, orElse(c.Limit, 10*time.Minute))
	defer cancel()
	q, err := startQEMU(ctx, image, dir, o, c)
	if err != nil {
		return res, err
	}
	defer q.stop()

	fail := func(ready bool, err error) (Result, error) {
		q.stop()
		if said := strings.TrimSpace(q.said()); said != "" {
			err = fmt.Errorf("%w; QEMU: %s", err, said)
		}
		console, rerr := os.ReadFile(filepath.Join(dir, "console"))
		if rerr != nil && !c.interactive {
			err = errors.Join(err, rerr)
		}
		if c.Out != "" {
			_ = os.WriteFile(filepath.Join(c.Out, "console.log"), console, 0o644) // a help, not more
		}
		return res, &Error{Ready: ready, Console: excerpt(string(console)), Err: err}
	}

	var wg sync.WaitGroup
	var filesErr error
	wg.Go(func() {
		out := c.Stdout
		if out == nil {
			out = io.Discard
		}
		if conn := ports["output"].accept(); conn != nil {
			_, _ = io.Copy(out, conn) // ends with the guest
		}
	})
	wg.Go(func() {
		if conn := ports["files"].accept(); conn != nil {
			filesErr = readFiles(conn, c.Out)
		}
	})
	lines := make(chan string)
	go func() {
		defer close(lines)
		conn := ports["control"].accept()
		if conn == nil {
			return
		}
		for in := bufio.NewScanner(conn); in.Scan(); {
			select {
			case lines <- in.Text():
			case <-ctx.Done():
				return
			}
		}
	}()

	boot := orElse(o.Boot, 2*time.Minute)
	late := time.NewTimer(boot)
	defer late.Stop()
	ready, ended := false, false
	hear := func(line string) {
		if line == "ready" {
			ready, res.Ready = true, time.Since(start)
			late.Stop()
		} else if code, ok := strings.CutPrefix(line, "exit "); ok {
			res.Code, err = strconv.Atoi(code)
			ended = true
		}
	}
	open := true
	for !ended {
		var line string
		select {
		case <-late.C:
			return fail(false, fmt.Errorf("not ready after %s", boot))
		case <-ctx.Done():
			return fail(ready, fmt.Errorf("stopped after %s: %w", time.Since(start).Round(time.Second), context.Cause(ctx)))
		case line, open = <-lines:
			hear(line)
		case <-q.ended:
			ports["control"].l.Close() // if it did not even come
			for line := range lines {
				hear(line)
			}
			open = false
		}
		if !open && !ended {
			return fail(ready, errors.New("the machine went down, as it does after a kernel panic"))
		}
	}
	if err != nil {
		return fail(ready, err)
	}

	// The machine powers itself off now. Only its end says that all output has come, and a busy host may need
	// as long for that as for the boot.
	select {
	case <-q.ended:
	case <-time.After(boot):
	case <-ctx.Done():
	}
	q.stop()
	for _, p := range ports {
		p.l.Close() // nobody comes any more
	}
	wg.Wait()
	if filesErr != nil {
		return res, fmt.Errorf("files from the guest: %w", filesErr)
	}
	res.Took = time.Since(start)
	return res, nil
}

// excerpt is the end of a console: from the first line that tells of the kernel's own failure, if there is one.
func excerpt(console string) string {
	last := debian.Tail(console, 40)
	for _, sign := range []string{"BUG: ", "Oops: ", "general protection fault", "Kernel panic"} {
		if i := strings.Index(console, sign); i >= 0 && i < len(console)-len(last) {
			start := strings.LastIndex(console[:i], "\n") + 1
			all := strings.Split(console[start:], "\n")
			return strings.TrimRight(strings.Join(all[:min(len(all), 120)], "\n"), "\n")
		}
	}
	return last
}

func orElse[T comparable](v, other T) T {
	var zero T
	if v == zero {
		return other
	}
	return v
}

// port is this side of a virtio port: QEMU connects, once.
type port struct {
	l net.Listener

	mu   sync.Mutex
	conn net.Conn
}

func listen(path string) (*port, error) {
	l, err := net.Listen("unix", path)
	return &port{l: l}, err
}

// accept is nil when nobody came.
func (p *port) accept() net.Conn {
	conn, err := p.l.Accept()
	if err != nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conn = conn
	return conn
}

// Close ends both, and whoever waits for them.
func (p *port) Close() error {
	err := p.l.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.conn != nil {
		err = errors.Join(err, p.conn.Close())
	}
	return err
}

// qemu is a process.
type qemu struct {
	cancel context.CancelFunc
	ended  chan struct{} // closed when it is gone
	log    string
}

func (q *qemu) stop() {
	q.cancel()
	<-q.ended
}

func (q *qemu) said() string {
	data, _ := os.ReadFile(q.log)
	return debian.Tail(string(data), 10)
}

func startQEMU(ctx context.Context, image Image, dir string, o Options, c Command) (*qemu, error) {
	console := "file,id=console,path=" + filepath.Join(dir, "console")
	if c.interactive {
		console = "stdio,id=console,signal=off"
	}
	vmlinuz, err := image.kernel(cmp.Or(o.Kernel, os.Getenv("LARIAT_GUEST_RELEASE")))
	if err != nil {
		return nil, err
	}
	kernel := []string{"console=ttyS0", "no_timer_check", "clocksource=hpet", "cryptomgr.notests", "root=/dev/nvme0n1",
		"rootfstype=ext4", "rw", "init=/init", "panic=-1", "quiet"}
	args := []string{
		"-machine", "q35",
		"-cpu", "max,-cx16", // cmpxchg16b is emulated wrongly at times
		"-m", strconv.Itoa(orElse(o.Memory, 1024)), "-smp", strconv.Itoa(orElse(o.CPUs, 1)),
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-kernel", vmlinuz, "-append", strings.Join(slices.Concat(kernel, o.KernelArgs), " "),
		"-chardev", console, "-serial", "chardev:console",
		// Debian's kernel has NVMe and ext4 built in, which makes an initramfs superfluous.
		"-drive", "if=none,id=root,format=raw,snapshot=on,file=" + image.path("root.img"), "-device",
		"nvme,serial=guest-root,drive=root",
		"-drive", "if=virtio,format=raw,readonly=on,file=" + filepath.Join(dir, "in.tar"),
		"-device", "virtio-serial-pci",
	}
	for i, name := range []string{"control", "output", "files"} {
		args = append(args, "-chardev", "socket,id="+name+",path="+filepath.Join(dir, name),
			"-device", fmt.Sprintf("virtserialport,nr=%d,chardev=%s,name=lariat.%s", i+1, name, name))
	}
	for i := 1; i <= o.Slots; i++ {
		args = append(args, "-device", fmt.Sprintf("pcie-root-port,id=rp%d,chassis=%d,slot=%d", i, i, i))
	}
	if o.Slots > 0 {
		// QEMU talks to itself: the monitor waits at a socket, and the guest's port is connected to it.
		path := filepath.Join(dir, "qmp")
		args = append(args, "-chardev", "socket,id=qmp,server=on,wait=off,path="+path, "-mon", "chardev=qmp,mode=control",
			"-chardev", "socket,id=qmpport,path="+path, "-device", "virtserialport,nr=4,chardev=qmpport,name=qmp")
	}
	if o.Counted {
		args = append(args, "-accel", "tcg,thread=single", "-icount", "shift=0")
	} else {
		args = append(args, "-accel", "tcg,thread=multi")
	}
	args = append(args, o.QEMUArgs...)

	root := image.path("qemu")
	for _, data := range []string{"usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"} {
		args = append(args, "-L", filepath.Join(root, data))
	}
	log, err := os.Create(filepath.Join(dir, "qemu.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	ctx, cancel := context.WithCancel(ctx)
	cmd := own(ctx, root, "qemu-system-x86_64", "usr/bin/qemu-system-x86_64", args...)
	cmd.Env = append(os.Environ(), "QEMU_MODULE_DIR="+filepath.Join(root, "usr/lib/x86_64-linux-gnu/qemu"))
	cmd.Stderr, cmd.Dir = log, dir
	if c.interactive {
		cmd.Stdin, cmd.Stdout = os.Stdin, os.Stdout
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	q := &qemu{cancel: cancel, ended: make(chan struct{}), log: log.Name()}
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // the death signal is the thread's, not the process's
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // how it ended is on the console
			close(q.ended)
		}
	}()
	if err := <-started; err != nil {
		cancel()
		return nil, fmt.Errorf("start QEMU: %w", err)
	}
	return q, nil
}

// writeInput makes the tar that the guest unpacks to /lariat.
func writeInput(path string, o Options, c Command) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	in := newInput(f)
	env := []string{"LARIAT_GUEST=1", "LARIAT_OUT=" + outDir, "REQUIRE=" + orElse(o.Require, "all")}
	if o.Bin {
		bin, err := projectBin()
		if err != nil {
			return err
		}
		if err := in.add("bin", bin); err != nil {
			return err
		}
		env = append(env, "LARIAT_BIN=/lariat/bin", "PATH=/lariat/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin")
	}
	if err := in.dir("work"); err != nil {
		return err
	}
	for to, from := range o.Files {
		if err := in.add(filepath.Join("work", to), from); err != nil {
			return err
		}
	}
	settings := ""
	if o.Warm {
		settings += "WARM=1\n"
	}
	if c.interactive {
		settings += "INTERACTIVE=1\n"
	}
	command := "#!/bin/sh\n"
	for _, e := range append(env, c.Env...) {
		name, value, _ := strings.Cut(e, "=")
		command += "export " + name + "=" + quote(value) + "\n"
	}
	command += "exec"
	for _, a := range c.Args {
		command += " " + quote(a)
	}
	for name, text := range map[string]string{"start": startScript, "settings": settings, "command": command + "\n"} {
		if err := in.text(".guest/"+name, text); err != nil {
			return err
		}
	}
	if err := in.w.Close(); err != nil {
		return err
	}
	return f.Close()
}

// outDir is where the guest keeps the files that come out.
const outDir = "/lariat/out"

// quote makes a word of the shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

type input struct{ w *tar.Writer }

func newInput(w io.Writer) *input { return &input{tar.NewWriter(w)} }

func (in *input) dir(name string) error {
	return in.w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755})
}

func (in *input) text(name, text string) error {
	if err := in.w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(text))}); err != nil {
		return err
	}
	_, err := io.WriteString(in.w, text)
	return err
}

// add takes a file, or a folder with all below it.
func (in *input) add(to, from string) error {
	return filepath.WalkDir(from, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		name := filepath.Join(to, rel)
		switch {
		case e.IsDir():
			if name == "bin/peers" {
				return filepath.SkipDir // the reference plugins are as large as ours, and nothing compares in a guest
			}
			return in.dir(name)
		case !e.Type().IsRegular():
			return nil
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		fi, err := f.Stat()
		if err != nil {
			return err
		}
		if err := in.w.WriteHeader(&tar.Header{Name: name, Mode: int64(fi.Mode().Perm()), Size: fi.Size()}); err != nil {
			return err
		}
		_, err = io.CopyN(in.w, f, fi.Size())
		return err
	})
}

// readFiles unpacks what comes out of a guest. A guest that went down sends nothing, or half of it.
func readFiles(r io.Reader, dir string) error {
	if dir == "" {
		_, _ = io.Copy(io.Discard, r)
		return nil
	}
	// Nothing is written outside of the folder, whatever the names in the archive.
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	in := tar.NewReader(r)
	for {
		h, err := in.Next()
		if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		name := filepath.Clean(h.Name)
		switch h.Typeflag {
		case tar.TypeDir:
			if name == "." {
				continue
			}
			err = root.MkdirAll(name, 0o755)
		case tar.TypeReg:
			var f *os.File
			if f, err = root.Create(name); err == nil {
				_, err = io.Copy(f, in)
				err = errors.Join(err, f.Close())
			}
		}
		if err != nil {
			return err
		}
	}
}

// projectBin is the folder of the built executables.
func projectBin() (string, error) {
	dir := os.Getenv("LARIAT_BIN")
	if dir == "" {
		root, err := moduleRoot()
		if err != nil {
			return "", err
		}
		dir = filepath.Join(root, "bin")
	}
	if _, err := os.Stat(filepath.Join(dir, "lariat")); err != nil {
		return "", fmt.Errorf("%s holds no executables: run make build first", dir)
	}
	return dir, nil
}

// moduleRoot is the source tree above the working directory.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
	}
	return "", errors.New("not inside of the source tree")
}
