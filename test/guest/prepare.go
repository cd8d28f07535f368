package guest

import (
	"cmp"
	"context"
	"crypto/sha256"
	_ "embed" // the package list and PID 1 are part of the program
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/lariat-net/lariat/test/debian"
)

//go:embed packages.list
var packagesList string

//go:embed init.sh
var initScript string

// format is part of an image's name; raise it when the code below makes something else of the same packages.
const format = "2"

// Image is what guests boot from, ready in the cache.
type Image struct{ dir string }

// Packages are the packages of the image with their versions, a line each.
func (i Image) Packages() (string, error) {
	data, err := os.ReadFile(filepath.Join(i.dir, "packages"))
	return string(data), err
}

// Dir is where the image is.
func (i Image) Dir() string { return i.dir }

func (i Image) path(name string) string { return filepath.Join(i.dir, name) }

// kernel is the kernel of a Debian release; "": of this machine's own.
func (i Image) kernel(release string) (string, error) {
	if release == "" {
		return i.path("vmlinuz"), nil
	}
	path := i.path("vmlinuz-" + release)
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("the image has no kernel of Debian %s; test/guest/packages.list says which it has: %w", release,
			err)
	}
	return path, nil
}

// Cache is the folder that keeps packages and images: LARIAT_GUEST_CACHE, or lariat/guest in the user's
// cache, so that all checkouts of a user share it.
func Cache() (string, error) {
	if dir := os.Getenv("LARIAT_GUEST_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "lariat", "guest"), nil
}

// recipe names what an image is made of, but for the versions of packages.
func recipe() string {
	sum := sha256.Sum256([]byte(format + "\n" + packagesList + "\n" + initScript))
	return hex.EncodeToString(sum[:5])
}

// Find is the newest image of this recipe. It makes nothing and asks nobody.
func Find() (Image, error) {
	cache, err := Cache()
	if err != nil {
		return Image{}, err
	}
	found, err := filepath.Glob(filepath.Join(cache, "image-"+recipe()+"-*"))
	if err != nil {
		return Image{}, err
	}
	found = slices.DeleteFunc(found, func(dir string) bool { return modified(dir) == 0 }) // a lock, or nothing whole
	if len(found) == 0 {
		return Image{}, fmt.Errorf("no image of the guest in %s: run make guest-image, which downloads some 130 MB of "+
			"Debian packages once", cache)
	}
	slices.SortFunc(found, func(a, b string) int { return cmp.Compare(modified(a), modified(b)) })
	return Image{dir: found[len(found)-1]}, nil
}

// modified is when an image was made or last confirmed to be current.
func modified(dir string) int64 {
	fi, err := os.Stat(filepath.Join(dir, "packages"))
	if err != nil {
		return 0
	}
	return fi.ModTime().UnixNano()
}

// Prepare finds the image or makes it, which takes ten seconds and the download, and needs a Debian with its
// package sources, but no privileges. With refresh it asks for newer packages. Nothing outside of the cache
// changes. Calls at the same time wait for each other.
func Prepare(ctx context.Context, log io.Writer, refresh bool) (Image, error) {
	if image, err := Find(); err == nil && !refresh {
		return image, nil
	}
	cache, err := Cache()
	if err != nil {
		return Image{}, err
	}
	if runtime.GOARCH != "amd64" {
		return Image{}, fmt.Errorf("the guest is an amd64 machine, this is %s", runtime.GOARCH)
	}
	for _, program := range []string{"apt-get", "dpkg-deb", "tar"} {
		if _, err := exec.LookPath(program); err != nil {
			return Image{}, fmt.Errorf("the guest is made of Debian packages: %w", err)
		}
	}
	if err := os.MkdirAll(filepath.Join(cache, "debs"), 0o755); err != nil {
		return Image{}, err
	}
	unlock, err := lock(filepath.Join(cache, "lock"), syscall.LOCK_EX)
	if err != nil {
		return Image{}, err
	}
	defer unlock()
	if image, err := Find(); err == nil && !refresh {
		return image, nil // another process made it meanwhile
	}
	p := preparation{cache: cache, log: log}
	if err := p.fetch(ctx, refresh); err != nil {
		return Image{}, err
	}
	image, err := p.image(ctx)
	if err != nil {
		return Image{}, err
	}
	p.sweep(image)
	return image, nil
}

// lock takes a lock on a file that it makes; the lock goes with the process if not before.
func lock(path string, how int) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err = syscall.Flock(int(f.Fd()), how)
		if !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, &fs.PathError{Op: "lock", Path: path, Err: err}
	}
	return func() { f.Close() }, nil
}

type preparation struct {
	cache   string
	log     io.Writer
	qemu    []debian.Package            // for this machine
	guest   []debian.Package            // for the image
	own     string                      // this machine's release of Debian
	kernels map[string][]debian.Package // those of guest that are kernels, by their releases
}

// wanted are the packages of the list, those that are left out, and the package of each release that is a kernel.
func wanted() (qemu, guest, without []string, kernels map[string]string) {
	kernels = map[string]string{}
	for line := range strings.Lines(packagesList) {
		f := strings.Fields(line)
		switch {
		case len(f) == 0 || strings.HasPrefix(f[0], "#"):
		case f[0] == "qemu":
			qemu = append(qemu, f[1:]...)
		case f[0] == "kernel" && len(f) == 3:
			kernels[f[1]] = f[2]
		case f[0] == "-":
			without = append(without, f[1:]...)
		default:
			guest = append(guest, f...)
		}
	}
	return qemu, guest, without, kernels
}

// fetch downloads the packages: by the machine's package lists if they serve, and by fresh ones in the cache
// otherwise, or first if the newest packages are wanted.
func (p *preparation) fetch(ctx context.Context, refresh bool) error {
	var errs []error
	order := []string{debian.Machine, ""}
	if refresh {
		slices.Reverse(order)
	}
	for _, lists := range order {
		a, err := debian.New(filepath.Join(p.cache, "apt"), p.debs(), lists, "")
		if err != nil {
			return err
		}
		if lists == "" {
			fmt.Fprintln(p.log, "guest: fetching package lists")
			err = a.Update(ctx)
		}
		if err == nil {
			err = p.download(ctx, a)
		}
		if err == nil {
			err = p.foreign(ctx)
		}
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (p *preparation) debs() string { return filepath.Join(p.cache, "debs") }

func (p *preparation) download(ctx context.Context, a debian.Apt) (err error) {
	qemu, guest, without, _ := wanted()
	if p.qemu, err = a.Resolve(ctx, qemu, without); err != nil {
		return err
	}
	if p.guest, err = a.Resolve(ctx, guest, without); err != nil {
		return err
	}
	if p.own, err = debian.Release(); err != nil {
		return err
	}
	p.kernels = map[string][]debian.Package{p.own: slices.DeleteFunc(slices.Clone(p.guest), notKernel)}
	return a.Download(ctx, slices.Concat(p.qemu, p.guest), p.downloading)
}

func (p *preparation) downloading(n int) { fmt.Fprintf(p.log, "guest: downloading %d packages\n", n) }

// notKernel is of what a kernel's package needs on a real machine.
func notKernel(d debian.Package) bool { return !strings.HasPrefix(d.Name, "linux-image-") }

// foreign downloads the kernels of other releases, and nothing else of those. They come from where apt gets this
// machine's release.
func (p *preparation) foreign(ctx context.Context) error {
	_, _, _, kernels := wanted()
	delete(kernels, p.own)
	for _, release := range slices.Sorted(maps.Keys(kernels)) {
		a, err := debian.New(filepath.Join(p.cache, "apt-"+release), p.debs(), "", release)
		if err != nil {
			return err
		}
		fmt.Fprintf(p.log, "guest: fetching package lists of %s\n", release)
		if err := a.Update(ctx); err != nil {
			return fmt.Errorf("package lists of %s: %w", release, err)
		}
		found, err := a.Resolve(ctx, []string{kernels[release]}, nil)
		if err != nil {
			return fmt.Errorf("kernel of %s: %w", release, err)
		}
		found = slices.DeleteFunc(found, notKernel)
		if err := a.Download(ctx, found, p.downloading); err != nil {
			return fmt.Errorf("kernel of %s: %w", release, err)
		}
		p.kernels[release] = found
		p.guest = append(p.guest, found...)
	}
	return nil
}

// manifest is the text that says which packages an image has.
func (p *preparation) manifest() string {
	var b strings.Builder
	for _, d := range p.qemu {
		fmt.Fprintf(&b, "qemu %s %s\n", d.Name, d.Version)
	}
	for _, d := range p.guest {
		fmt.Fprintf(&b, "guest %s %s\n", d.Name, d.Version)
	}
	return b.String()
}

// image makes the image, under another name until it is whole.
func (p *preparation) image(ctx context.Context) (image Image, err error) {
	sum := sha256.Sum256([]byte(p.manifest()))
	image.dir = filepath.Join(p.cache, "image-"+recipe()+"-"+hex.EncodeToString(sum[:5]))
	if _, err := os.Stat(image.dir); err == nil {
		now := time.Now()
		return image, os.Chtimes(image.path("packages"), now, now)
	}
	fmt.Fprintf(p.log, "guest: making %s of %d packages\n", image.dir, len(p.guest))
	tmp, err := os.MkdirTemp(p.cache, "making-")
	if err != nil {
		return Image{}, err
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o755); err != nil {
		return Image{}, err
	}
	if err := debian.Unpack(ctx, p.debs(), filepath.Join(tmp, "qemu"), p.qemu, units...); err != nil {
		return Image{}, err
	}
	root := filepath.Join(tmp, "root")
	if err := debian.Unpack(ctx, p.debs(), root, p.guest, units...); err != nil {
		return Image{}, err
	}
	if err := furnish(root); err != nil {
		return Image{}, err
	}
	if err := p.bootable(ctx, root, tmp); err != nil {
		return Image{}, err
	}
	if err := makeFilesystem(ctx, root, filepath.Join(tmp, "root.img")); err != nil {
		return Image{}, err
	}
	if err := os.RemoveAll(root); err != nil {
		return Image{}, err
	}
	if err := os.WriteFile(filepath.Join(tmp, "packages"), []byte(p.manifest()), 0o644); err != nil {
		return Image{}, err
	}
	return image, os.Rename(tmp, image.dir)
}

// units are left out of every package: PID 1 is init.sh.
var units = []string{"./lib/systemd/system/*", "./usr/lib/systemd/system/*"}

// furnish does to an unpacked root what the packages' scripts would do to a system, as far as a guest needs it.
func furnish(root string) error {
	err := debian.Furnish(root, "guest", // whom programs in the guest change to
		"statd:x:106:65534::/var/lib/nfs:/usr/sbin/nologin\n"+
			"_rpc:x:107:65534::/run/rpcbind:/usr/sbin/nologin\n"+
			"tcpdump:x:108:108::/nonexistent:/usr/sbin/nologin\n",
		"tcpdump:x:108:\n")
	if err != nil {
		return err
	}
	for _, dir := range []string{"lariat", "var/lib/nfs"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(root, "etc/machine-id"), []byte("00000000000040008000000000000001\n"),
		0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(root, "init"), []byte(initScript), 0o755)
}

// bootable takes the kernels out of an unpacked root, to where QEMU finds each by its release, and lists the
// modules of each.
func (p *preparation) bootable(ctx context.Context, root, to string) error {
	for release, packages := range p.kernels {
		kernel := filepath.Join(to, "vmlinuz-"+release)
		for _, d := range packages {
			version := strings.TrimPrefix(d.Name, "linux-image-")
			err := os.Rename(filepath.Join(root, "boot", "vmlinuz-"+version), kernel)
			if errors.Is(err, fs.ErrNotExist) { // a package that only depends on the kernel's
				continue
			}
			if err == nil {
				// depmod decides by its name which of kmod's programs it is.
				_, err = debian.Output(own(ctx, root, "depmod", "usr/bin/kmod", "-b", root, version))
			}
			if err != nil {
				return err
			}
		}
		if _, err := os.Stat(kernel); err != nil {
			return fmt.Errorf("no kernel among %d packages of %s: %w", len(packages), release, err)
		}
	}
	return errors.Join(os.Symlink("vmlinuz-"+p.own, filepath.Join(to, "vmlinuz")),
		os.RemoveAll(filepath.Join(root, "boot")))
}

// own is a program of an unpacked root, run on this machine by the root's own loader and libraries, so that
// it does not matter which this machine has.
func own(ctx context.Context, root, argv0, program string, args ...string) *exec.Cmd {
	lib := filepath.Join(root, "usr/lib/x86_64-linux-gnu")
	return exec.CommandContext(ctx, filepath.Join(lib, "ld-linux-x86-64.so.2"),
		append([]string{"--argv0", argv0, "--library-path", lib + ":" + filepath.Join(lib, "pulseaudio"),
			filepath.Join(root, program)}, args...)...)
}

// makeFilesystem makes a file with an ext4 of all that is below root, owned by root. There is no journal:
// nobody keeps what a guest writes.
func makeFilesystem(ctx context.Context, root, image string) error {
	var size int64
	err := filepath.WalkDir(root, func(_ string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := e.Info()
		if err == nil {
			size += 4096 + (fi.Size()+4095)&^4095
		}
		return err
	})
	if err != nil {
		return err
	}
	cmd := own(ctx, root, "mke2fs", "usr/sbin/mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-E",
		"lazy_itable_init=1,root_owner=0:0", "-d", root,
		image, fmt.Sprintf("%dM", size>>20*12/10+128))
	cmd.Env = append(os.Environ(), "MKE2FS_CONFIG="+filepath.Join(root, "etc/mke2fs.conf"))
	if os.Getuid() != 0 {
		// In a user namespace the files, which are the user's, are root's.
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		}
	}
	if _, err := debian.Output(cmd); err != nil {
		return fmt.Errorf("make the guest's file system: %w", err)
	}
	return nil
}

// sweep removes what is of no use any more: packages that no image here is made of, half-made images of
// processes that were killed, and all images but this one and the last used other one, unless a guest runs
// from it.
func (p *preparation) sweep(current Image) {
	keep := map[string]bool{}
	for _, d := range slices.Concat(p.qemu, p.guest) {
		keep[d.File] = true
	}
	for _, path := range glob(p.cache, "debs/*.deb") {
		if !keep[filepath.Base(path)] {
			os.Remove(path)
		}
	}
	for _, path := range glob(p.cache, "making-*") { // ours is renamed, and nobody else holds the lock
		os.RemoveAll(path)
	}
	images := slices.DeleteFunc(glob(p.cache, "image-*"), func(dir string) bool {
		return dir == current.dir ||
			strings.HasSuffix(dir, ".lock")
	})
	slices.SortFunc(images, func(a, b string) int { return cmp.Compare(modified(a), modified(b)) })
	for _, dir := range images[:max(0, len(images)-1)] {
		unlock, err := lock(dir+".lock", syscall.LOCK_EX|syscall.LOCK_NB)
		if err != nil {
			continue
		}
		os.RemoveAll(dir)
		os.Remove(dir + ".lock")
		unlock()
	}
}

func glob(dir, pattern string) []string {
	found, _ := filepath.Glob(filepath.Join(dir, pattern))
	return found
}
