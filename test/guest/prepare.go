package guest

import (
	"bytes"
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
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
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
		return "", fmt.Errorf("the image has no kernel of Debian %s; test/guest/packages.list says which it has: %w", release, err)
	}
	return path, nil
}

// Cache is the folder that keeps packages and images: LARIAT_GUEST_CACHE, or lariat/guest in the user's cache, so that all checkouts of a
// user share it.
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
		return Image{}, fmt.Errorf("no image of the guest in %s: run make guest-image, which downloads some 130 MB of Debian packages once", cache)
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

// Prepare finds the image or makes it, which takes ten seconds and the download, and needs a Debian with its package sources, but no privileges.
// With refresh it asks for newer packages. Nothing outside of the cache changes. Calls at the same time wait for each other.
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

// deb is a package as apt names it.
type deb struct{ name, version, file string }

type preparation struct {
	cache   string
	log     io.Writer
	qemu    []deb            // for this machine
	guest   []deb            // for the image
	own     string           // this machine's release of Debian
	kernels map[string][]deb // those of guest that are kernels, by their releases
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

// fetch downloads the packages: by the machine's package lists if they serve, and by fresh ones in the cache otherwise, or first if the
// newest packages are wanted.
func (p *preparation) fetch(ctx context.Context, refresh bool) error {
	var errs []error
	const machine = "/var/lib/apt/lists"
	order := []string{machine, filepath.Join(p.cache, "apt", "lists")}
	if refresh {
		slices.Reverse(order)
	}
	for _, lists := range order {
		a, err := p.apt("apt.conf", lists, "")
		if err != nil {
			return err
		}
		if lists != machine {
			fmt.Fprintln(p.log, "guest: fetching package lists")
			_, err = a.run(ctx, "update")
		}
		if err == nil {
			err = p.download(ctx, a)
		}
		if err == nil {
			err = p.foreign(ctx, a)
		}
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// apt calls apt-get with a state of its own: as if nothing were installed, so that it resolves everything, and without the right
// to anything, so that it changes nothing.
type apt struct{ conf, dir string }

// apt writes its configuration to a file of the given name; more is added to it.
func (p *preparation) apt(name, lists, more string) (apt, error) {
	dir := filepath.Join(p.cache, "apt")
	for _, d := range []string{filepath.Join(dir, "lists", "partial"), filepath.Join(dir, "archives", "partial")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return apt{}, err
		}
	}
	status := filepath.Join(dir, "status")
	if err := os.WriteFile(status, nil, 0o644); err != nil {
		return apt{}, err
	}
	conf := filepath.Join(dir, name)
	return apt{conf, filepath.Join(p.cache, "debs")}, os.WriteFile(conf, fmt.Appendf(nil, `// written anew by each call of hack/guest
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear Acquire::IndexTargets::deb::DEP-11;
#clear Acquire::IndexTargets::deb::DEP-11-icons-small;
#clear Acquire::IndexTargets::deb::DEP-11-icons;
#clear Acquire::IndexTargets::deb::DEP-11-icons-hidpi;
Dir::State %[1]q;
Dir::State::status %[2]q;
Dir::State::lists %[3]q;
Dir::Cache %[1]q;
Debug::NoLocking "true";
APT::Sandbox::User "root";
APT::Architecture "amd64";
APT::Install-Recommends "false";
Acquire::Languages "none";
Acquire::http::Timeout "20";
Acquire::https::Timeout "20";
%[4]s`, dir, status, lists, more), 0o644)
}

func (a apt) run(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "apt-get", append([]string{"-c", a.conf, "-qq"}, args...)...)
	cmd.Dir = a.dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	return output(cmd)
}

// output runs a program, whose error carries the end of what it said.
func output(cmd *exec.Cmd) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w\n%s", filepath.Base(cmd.Path), err, tail(stderr.String()+stdout.String(), 4))
	}
	return stdout.String(), nil
}

// resolve asks which packages the given ones need, all told.
func (a apt) resolve(ctx context.Context, packages, without []string) ([]deb, error) {
	out, err := a.run(ctx, append([]string{"--print-uris", "install"}, packages...)...)
	if err != nil {
		return nil, fmt.Errorf("resolve packages: %w", err)
	}
	var all []deb
	for line := range strings.Lines(out) {
		f := strings.Fields(line) // 'address' file size hash
		if len(f) < 3 || !strings.HasSuffix(f[1], ".deb") {
			continue
		}
		d := deb{file: f[1]}
		parts := strings.Split(strings.TrimSuffix(f[1], ".deb"), "_")
		if len(parts) != 3 {
			return nil, fmt.Errorf("resolve packages: what is %q?", f[1])
		}
		if d.version, err = url.PathUnescape(parts[1]); err != nil {
			return nil, fmt.Errorf("resolve packages: %w", err)
		}
		if d.name = parts[0]; !slices.Contains(without, d.name) {
			all = append(all, d)
		}
	}
	slices.SortFunc(all, func(x, y deb) int { return cmp.Compare(x.file, y.file) })
	return all, nil
}

func (p *preparation) download(ctx context.Context, a apt) (err error) {
	qemu, guest, without, _ := wanted()
	if p.qemu, err = a.resolve(ctx, qemu, without); err != nil {
		return err
	}
	if p.guest, err = a.resolve(ctx, guest, without); err != nil {
		return err
	}
	if p.own, err = ownRelease(); err != nil {
		return err
	}
	p.kernels = map[string][]deb{p.own: slices.DeleteFunc(slices.Clone(p.guest), notKernel)}
	return p.load(ctx, a, slices.Concat(p.qemu, p.guest))
}

// notKernel is of what a kernel's package needs on a real machine.
func notKernel(d deb) bool { return !strings.HasPrefix(d.name, "linux-image-") }

// ownRelease is the code name of this machine's release of Debian.
func ownRelease() (string, error) {
	const file = "/etc/os-release"
	data, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(data)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "VERSION_CODENAME="); ok {
			return strings.Trim(name, `"`), nil
		}
	}
	return "", fmt.Errorf("%s names no release (VERSION_CODENAME)", file)
}

// foreign downloads the kernels of other releases, and nothing else of those. They come from where apt gets this machine's release.
func (p *preparation) foreign(ctx context.Context, own apt) error {
	_, _, _, kernels := wanted()
	delete(kernels, p.own)
	for _, release := range slices.Sorted(maps.Keys(kernels)) {
		list, err := p.sources(ctx, own, release)
		if err != nil {
			return err
		}
		lists := filepath.Join(p.cache, "apt", "lists-"+release)
		if err := os.MkdirAll(filepath.Join(lists, "partial"), 0o755); err != nil {
			return err
		}
		a, err := p.apt("apt-"+release+".conf", lists, fmt.Sprintf("Dir::Etc::sourcelist %q;\nDir::Etc::sourceparts \"-\";\n", list))
		if err != nil {
			return err
		}
		fmt.Fprintf(p.log, "guest: fetching package lists of %s\n", release)
		if _, err := a.run(ctx, "update"); err != nil {
			return fmt.Errorf("package lists of %s: %w", release, err)
		}
		found, err := a.resolve(ctx, []string{kernels[release]}, nil)
		if err != nil {
			return fmt.Errorf("kernel of %s: %w", release, err)
		}
		found = slices.DeleteFunc(found, notKernel)
		if err := p.load(ctx, a, found); err != nil {
			return fmt.Errorf("kernel of %s: %w", release, err)
		}
		p.kernels[release] = found
		p.guest = append(p.guest, found...)
	}
	return nil
}

// sources writes a list of package sources with one release of Debian.
func (p *preparation) sources(ctx context.Context, own apt, release string) (string, error) {
	out, err := own.run(ctx, "indextargets", "--format", "$(ORIGIN) $(LABEL) $(REPO_URI)", "Created-By: Packages", "Component: main")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(out) {
		if uri, ok := strings.CutPrefix(strings.TrimSpace(line), "Debian Debian "); ok {
			file := filepath.Join(p.cache, "apt", "sources-"+release+".list")
			text := fmt.Sprintf("deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n", uri, release)
			return file, os.WriteFile(file, []byte(text), 0o644)
		}
	}
	return "", fmt.Errorf("apt's sources name no archive of Debian, where the kernel of %s would be:\n%s", release, tail(out, 4))
}

// load downloads those of the packages that are not there.
func (p *preparation) load(ctx context.Context, a apt, debs []deb) error {
	var missing []string
	for _, d := range debs {
		// apt downloads to another name first, so what is there is whole.
		if _, err := os.Stat(filepath.Join(a.dir, d.file)); err != nil {
			missing = append(missing, d.name+"="+d.version)
		}
	}
	slices.Sort(missing)
	if missing = slices.Compact(missing); len(missing) == 0 {
		return nil
	}
	fmt.Fprintf(p.log, "guest: downloading %d packages\n", len(missing))
	_, err := a.run(ctx, append([]string{"download"}, missing...)...)
	return err
}

// manifest is the text that says which packages an image has.
func (p *preparation) manifest() string {
	var b strings.Builder
	for _, d := range p.qemu {
		fmt.Fprintf(&b, "qemu %s %s\n", d.name, d.version)
	}
	for _, d := range p.guest {
		fmt.Fprintf(&b, "guest %s %s\n", d.name, d.version)
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
	if err := p.unpack(ctx, filepath.Join(tmp, "qemu"), p.qemu); err != nil {
		return Image{}, err
	}
	root := filepath.Join(tmp, "root")
	if err := p.unpack(ctx, root, p.guest); err != nil {
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

// left out of every package: what people read.
var excluded = []string{
	"./usr/share/doc/*", "./usr/share/man/*", "./usr/share/locale/*", "./usr/share/info/*", "./usr/share/lintian/*", "./usr/share/bug/*",
	"./usr/share/bash-completion/*", "./usr/share/icons/*", "./lib/systemd/system/*", "./usr/lib/systemd/system/*",
}

// unpack lays packages out as they would be installed, without running their scripts.
func (p *preparation) unpack(ctx context.Context, root string, debs []deb) error {
	for _, dir := range []string{"bin", "sbin", "lib", "lib64"} { // where some packages still ship files: all is below usr now
		if err := os.MkdirAll(filepath.Join(root, "usr", dir), 0o755); err != nil {
			return err
		}
		if err := os.Symlink(filepath.Join("usr", dir), filepath.Join(root, dir)); err != nil {
			return err
		}
	}
	args := []string{"-x", "-p", "-C", root, "--keep-directory-symlink", "--warning=no-timestamp", "-f", "-"}
	for _, e := range excluded {
		args = append(args, "--exclude="+e)
	}
	for _, d := range debs {
		if err := pipe(exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", filepath.Join(p.cache, "debs", d.file)), exec.CommandContext(ctx, "tar", args...)); err != nil {
			return fmt.Errorf("unpack %s: %w", d.file, err)
		}
	}
	return nil
}

// pipe runs two programs, the first one's output being the other's input.
func pipe(from, to *exec.Cmd) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	var said bytes.Buffer
	from.Stdout, to.Stdin, to.Stderr = w, r, &said
	err = from.Start()
	w.Close()
	if err == nil {
		if _, oerr := output(to); oerr != nil {
			err = oerr
		}
		r.Close() // or else the first may wait for a reader
		err = errors.Join(err, from.Wait())
		return err
	}
	r.Close()
	return err
}

// links are what the packages' scripts would have made.
var links = map[string]string{
	"usr/bin/sh": "dash", "usr/bin/awk": "mawk", "etc/mtab": "/proc/self/mounts", "var/run": "/run", "var/lock": "/run/lock",
	"usr/sbin/iptables": "iptables-nft", "usr/sbin/ip6tables": "ip6tables-nft", "usr/sbin/iptables-save": "iptables-nft-save",
	"usr/sbin/ip6tables-save": "ip6tables-nft-save", "usr/sbin/iptables-restore": "iptables-nft-restore", "usr/sbin/ip6tables-restore": "ip6tables-nft-restore",
}

// furnish does to an unpacked root what the packages' scripts would do to a system, as far as a guest needs it.
func furnish(root string) error {
	for _, dir := range []string{"proc", "sys", "dev", "run", "tmp", "root", "mnt", "srv", "lariat", "etc", "var/lib/nfs", "var/log", "var/tmp", "usr/local/bin"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return err
		}
	}
	for name, to := range links {
		path := filepath.Join(root, name)
		if _, err := os.Lstat(path); err == nil {
			continue
		}
		if err := os.Symlink(to, path); err != nil {
			return err
		}
	}
	for name, from := range map[string]string{"passwd": "usr/share/base-passwd/passwd.master", "group": "usr/share/base-passwd/group.master"} {
		data, err := os.ReadFile(filepath.Join(root, from))
		if err != nil {
			return err
		}
		switch name { // whom programs in the guest change to
		case "passwd":
			data = append(data, "statd:x:106:65534::/var/lib/nfs:/usr/sbin/nologin\n_rpc:x:107:65534::/run/rpcbind:/usr/sbin/nologin\ntcpdump:x:108:108::/nonexistent:/usr/sbin/nologin\n"...)
		case "group":
			data = append(data, "tcpdump:x:108:\n"...)
		}
		if err := os.WriteFile(filepath.Join(root, "etc", name), data, 0o644); err != nil {
			return err
		}
	}
	for name, text := range map[string]string{"etc/hostname": "guest\n", "etc/hosts": "127.0.0.1 localhost guest\n::1 localhost\n", "etc/resolv.conf": "", "etc/fstab": "",
		"etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\nnetworks: files\nprotocols: files\nservices: files\nrpc: files\n",
		"etc/machine-id":    "00000000000040008000000000000001\n"} {
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(root, "init"), []byte(initScript), 0o755)
}

// bootable takes the kernels out of an unpacked root, to where QEMU finds each by its release, and lists the modules of each.
func (p *preparation) bootable(ctx context.Context, root, to string) error {
	for release, debs := range p.kernels {
		kernel := filepath.Join(to, "vmlinuz-"+release)
		for _, d := range debs {
			version := strings.TrimPrefix(d.name, "linux-image-")
			err := os.Rename(filepath.Join(root, "boot", "vmlinuz-"+version), kernel)
			if errors.Is(err, fs.ErrNotExist) { // a package that only depends on the kernel's
				continue
			}
			if err == nil {
				// depmod decides by its name which of kmod's programs it is.
				_, err = output(own(ctx, root, "depmod", "usr/bin/kmod", "-b", root, version))
			}
			if err != nil {
				return err
			}
		}
		if _, err := os.Stat(kernel); err != nil {
			return fmt.Errorf("no kernel among %d packages of %s: %w", len(debs), release, err)
		}
	}
	return errors.Join(os.Symlink("vmlinuz-"+p.own, filepath.Join(to, "vmlinuz")), os.RemoveAll(filepath.Join(root, "boot")))
}

// own is a program of an unpacked root, run on this machine by the root's own loader and libraries, so that it does not matter which this
// machine has.
func own(ctx context.Context, root, argv0, program string, args ...string) *exec.Cmd {
	lib := filepath.Join(root, "usr/lib/x86_64-linux-gnu")
	return exec.CommandContext(ctx, filepath.Join(lib, "ld-linux-x86-64.so.2"),
		append([]string{"--argv0", argv0, "--library-path", lib + ":" + filepath.Join(lib, "pulseaudio"), filepath.Join(root, program)}, args...)...)
}

// makeFilesystem makes a file with an ext4 of all that is below root, owned by root. There is no journal: nobody keeps what a guest writes.
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
	cmd := own(ctx, root, "mke2fs", "usr/sbin/mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-E", "lazy_itable_init=1,root_owner=0:0", "-d", root,
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
	if _, err := output(cmd); err != nil {
		return fmt.Errorf("make the guest's file system: %w", err)
	}
	return nil
}

// sweep removes what is of no use any more: packages that no image here is made of, half-made images of processes that were killed, and all
// images but this one and the last used other one, unless a guest runs from it.
func (p *preparation) sweep(current Image) {
	keep := map[string]bool{}
	for _, d := range slices.Concat(p.qemu, p.guest) {
		keep[d.file] = true
	}
	for _, path := range glob(p.cache, "debs/*.deb") {
		if !keep[filepath.Base(path)] {
			os.Remove(path)
		}
	}
	for _, path := range glob(p.cache, "making-*") { // ours is renamed, and nobody else holds the lock
		os.RemoveAll(path)
	}
	images := slices.DeleteFunc(glob(p.cache, "image-*"), func(dir string) bool { return dir == current.dir || strings.HasSuffix(dir, ".lock") })
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

// tail is the last lines of a text.
func tail(text string, lines int) string {
	all := strings.Split(strings.TrimRight(text, "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
