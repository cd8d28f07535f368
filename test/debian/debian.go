// Package debian fetches packages of Debian's releases and lays them out as a root directory. Nothing is installed, and
// no maintainer script runs.
package debian

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// Machine is where apt keeps the package lists of this machine.
const Machine = "/var/lib/apt/lists"

// Package is a package as apt names it.
type Package struct{ Name, Version, File string }

// Apt calls apt-get with a state of its own: as if nothing were installed, so that it resolves everything, and without
// the right to anything, so that it changes nothing.
type Apt struct{ conf, debs string }

// New keeps apt's state in dir, and packages in debs. It reads the given package lists, or its own if lists is empty:
// these come with Update. The release is the machine's, or that of the codename: then the machine's sources are read
// with this codename in place of the machine's.
func New(dir, debs, lists, codename string) (Apt, error) {
	for _, d := range []string{filepath.Join(dir, "lists", "partial"), filepath.Join(dir, "archives", "partial"), debs} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return Apt{}, err
		}
	}
	if lists == "" {
		lists = filepath.Join(dir, "lists")
	}
	status := filepath.Join(dir, "status")
	if err := os.WriteFile(status, nil, 0o644); err != nil {
		return Apt{}, err
	}
	text := fmt.Sprintf(`// written anew by each call
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
`, dir, status, lists)
	if codename != "" {
		sources := filepath.Join(dir, "sources")
		if err := translateSources("/etc/apt", sources, codename); err != nil {
			return Apt{}, err
		}
		list := filepath.Join(sources, "sources.list")
		text += fmt.Sprintf("Dir::Etc::sourcelist %q;\nDir::Etc::sourceparts %q;\n", list, list+".d")
	}
	conf := filepath.Join(dir, "apt.conf")
	return Apt{conf, debs}, os.WriteFile(conf, []byte(text), 0o644)
}

// translateSources writes the sources of this machine's release as those of another one. Sources that do not name the
// release are left out.
func translateSources(from, to, codename string) error {
	here, err := Release()
	if err != nil {
		return err
	}
	if err := os.RemoveAll(to); err != nil {
		return err
	}
	found := false
	for pattern, entries := range map[string]string{"sources.list": "\n", "sources.list.d/*.list": "\n",
		"sources.list.d/*.sources": "\n\n"} {
		files, err := filepath.Glob(filepath.Join(from, pattern))
		if err != nil {
			return err
		}
		for _, f := range files {
			data, err := os.ReadFile(f)
			if err != nil {
				return err
			}
			var kept []string
			for _, entry := range strings.Split(string(data), entries) {
				if strings.Contains(entry, here) {
					kept = append(kept, strings.ReplaceAll(entry, here, codename))
				}
			}
			name := filepath.Join(to, strings.TrimPrefix(f, from))
			if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
				return err
			}
			if err := os.WriteFile(name, []byte(strings.Join(kept, entries)+"\n"), 0o644); err != nil {
				return err
			}
			found = found || len(kept) > 0
		}
	}
	if !found {
		return fmt.Errorf("no package source below %s is for %s", from, here)
	}
	return nil
}

// Release is the codename of this machine's release.
func Release() (string, error) {
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
	return "", fmt.Errorf("%s has no VERSION_CODENAME: this is no release of Debian", file)
}

func (a Apt) run(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "apt-get", append([]string{"-c", a.conf, "-qq"}, args...)...)
	cmd.Dir = a.debs
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	return Output(cmd)
}

// Output runs a program, whose error carries the end of what it said.
func Output(cmd *exec.Cmd) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w\n%s", filepath.Base(cmd.Path), err, Tail(stderr.String()+stdout.String(), 4))
	}
	return stdout.String(), nil
}

// Tail is the last lines of a text.
func Tail(text string, lines int) string {
	all := strings.Split(strings.TrimRight(text, "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// Update fetches package lists.
func (a Apt) Update(ctx context.Context) error {
	_, err := a.run(ctx, "update")
	return err
}

// Resolve asks which packages the given ones need, all told.
func (a Apt) Resolve(ctx context.Context, packages, without []string) ([]Package, error) {
	out, err := a.run(ctx, append([]string{"--print-uris", "install"}, packages...)...)
	if err != nil {
		return nil, fmt.Errorf("resolve packages: %w", err)
	}
	var all []Package
	for line := range strings.Lines(out) {
		f := strings.Fields(line) // 'address' file size hash
		if len(f) < 3 || !strings.HasSuffix(f[1], ".deb") {
			continue
		}
		p := Package{File: f[1]}
		parts := strings.Split(strings.TrimSuffix(f[1], ".deb"), "_")
		if len(parts) != 3 {
			return nil, fmt.Errorf("resolve packages: what is %q?", f[1])
		}
		if p.Version, err = url.PathUnescape(parts[1]); err != nil {
			return nil, fmt.Errorf("resolve packages: %w", err)
		}
		if p.Name = parts[0]; !slices.Contains(without, p.Name) {
			all = append(all, p)
		}
	}
	slices.SortFunc(all, func(x, y Package) int { return cmp.Compare(x.File, y.File) })
	return all, nil
}

// Download fetches those of the packages that are not there yet, and calls report with their number before.
func (a Apt) Download(ctx context.Context, packages []Package, report func(int)) error {
	var missing []string
	for _, p := range packages {
		// apt downloads to another name first, so what is there is whole.
		if _, err := os.Stat(filepath.Join(a.debs, p.File)); err != nil {
			missing = append(missing, p.Name+"="+p.Version)
		}
	}
	slices.Sort(missing)
	if missing = slices.Compact(missing); len(missing) == 0 {
		return nil
	}
	report(len(missing))
	_, err := a.run(ctx, append([]string{"download"}, missing...)...)
	return err
}

// Unpack lays packages out below root as they would be installed, without running their scripts. What people read is
// left out, and what matches the patterns, as tar knows them.
func Unpack(ctx context.Context, debs, root string, packages []Package, excluded ...string) error {
	// where some packages still ship files: all is below usr now
	for _, dir := range []string{"bin", "sbin", "lib", "lib64"} {
		if err := os.MkdirAll(filepath.Join(root, "usr", dir), 0o755); err != nil {
			return err
		}
		if err := os.Symlink(filepath.Join("usr", dir), filepath.Join(root, dir)); err != nil {
			return err
		}
	}
	args := []string{"-x", "-p", "-C", root, "--keep-directory-symlink", "--warning=no-timestamp", "-f", "-"}
	for _, dir := range []string{"doc", "man", "locale", "info", "lintian", "bug", "bash-completion", "icons"} {
		args = append(args, "--exclude=./usr/share/"+dir+"/*")
	}
	for _, e := range excluded {
		args = append(args, "--exclude="+e)
	}
	for _, p := range packages {
		deb := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", filepath.Join(debs, p.File))
		if err := pipe(deb, exec.CommandContext(ctx, "tar", args...)); err != nil {
			return fmt.Errorf("unpack %s: %w", p.File, err)
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
		if _, oerr := Output(to); oerr != nil {
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
	"usr/bin/sh": "dash", "usr/bin/awk": "mawk", "etc/mtab": "/proc/self/mounts", "var/run": "/run",
	"var/lock":          "/run/lock",
	"usr/sbin/iptables": "iptables-nft", "usr/sbin/ip6tables": "ip6tables-nft",
	"usr/sbin/iptables-save":  "iptables-nft-save",
	"usr/sbin/ip6tables-save": "ip6tables-nft-save", "usr/sbin/iptables-restore": "iptables-nft-restore",
	"usr/sbin/ip6tables-restore": "ip6tables-nft-restore",
}

// Furnish does to an unpacked root what the packages' scripts would do to a system, as far as programs need it. The
// further users are lines of passwd, the further groups of group.
func Furnish(root, hostname, users, groups string) error {
	for _, dir := range []string{"proc", "sys", "dev", "run", "tmp", "root", "mnt", "srv", "etc", "var/lib", "var/log",
		"var/tmp", "usr/local/bin"} {
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
	files := map[string]string{"hostname": hostname + "\n", "hosts": "127.0.0.1 localhost " + hostname +
		"\n::1 localhost\n", "resolv.conf": "", "fstab": "",
		"nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\nnetworks: files\nprotocols: files\nservices: " +
			"files\nrpc: files\n"}
	for name, more := range map[string]string{"passwd": users, "group": groups} {
		data, err := os.ReadFile(filepath.Join(root, "usr/share/base-passwd", name+".master"))
		if err != nil {
			return err
		}
		files[name] = string(data) + more
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(root, "etc", name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}
