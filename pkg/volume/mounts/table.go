// Package mounts reads the mount table and changes it without ever waiting for a server.
//
// What is mounted is told by /proc/self/mountinfo, never by stat, which hangs when a server does. Whatever
// may touch a remote file system happens in a child process with a deadline, for a stuck thread cannot be
// ended and a child can: waits of the NFS client give way to SIGKILL, and a killed mount leaves nothing
// behind.
package mounts

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/volume"
)

// Entry is a line of the table.
type Entry struct {
	ID      int
	Point   string
	Source  string
	FSType  string
	Root    string // what of the file system is mounted
	Device  string // major:minor, as in /sys/dev/block
	Options string // of this mount: ro, nosuid, …
	Super   string // of the file system, as the kernel shows them
	Shared  bool   // mounts below it propagate
}

// ReadOnly says that nothing can be written through this mount.
func (m Entry) ReadOnly() bool {
	return strings.HasPrefix(m.Options+",", "ro,") || strings.HasPrefix(m.Super+",", "ro,")
}

// Table is all that is mounted in this process's mount namespace, in the order of mounting.
type Table []Entry

// Read reads the table.
func Read() (Table, error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("read the mount table: %w", err)
	}
	return Parse(data)
}

// Parse reads what /proc/self/mountinfo holds.
func Parse(data []byte) (Table, error) {
	infos, err := mountinfo.GetMountsFromReader(bytes.NewReader(data), nil)
	if err != nil {
		return nil, fmt.Errorf("read the mount table: %w", err)
	}
	t := make(Table, 0, len(infos))
	for _, i := range infos {
		t = append(t, Entry{
			ID: i.ID, Point: i.Mountpoint, Source: i.Source, FSType: i.FSType, Root: i.Root, Options: i.Options,
			Super:  i.VFSOptions,
			Device: strconv.Itoa(i.Major) + ":" + strconv.Itoa(i.Minor), Shared: strings.Contains(i.Optional, "shared:"),
		})
	}
	return t, nil
}

// At are the mounts at a folder, the uppermost last. The folder is as Resolve gives it.
func (t Table) At(dir string) (stack []Entry) {
	for _, m := range t {
		if m.Point == dir {
			stack = append(stack, m)
		}
	}
	return stack
}

// Of are the mounts of a source.
func (t Table) Of(source string) (all []Entry) {
	for _, m := range t {
		if m.Source == source {
			all = append(all, m)
		}
	}
	return all
}

// Resolve gives a folder the name that the mount table uses: without symbolic links in its parents. It does
// not look at the folder itself, where a dead server's volume may be mounted, and which need not exist, nor
// need its parents.
func Resolve(dir string) (string, error) {
	if err := volume.CheckDir(dir); err != nil {
		return "", err
	}
	dir = filepath.Clean(dir)
	parent, base := filepath.Dir(dir), filepath.Base(dir)
	// O_PATH does not ask the server, not even one that the parent is mounted from.
	fd, err := unix.Open(parent, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	for errors.Is(err, unix.ENOENT) && parent != "/" {
		parent, base = filepath.Dir(parent), filepath.Join(filepath.Base(parent), base)
		fd, err = unix.Open(parent, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return "", fmt.Errorf("open %s: %w", parent, err)
	}
	defer unix.Close(fd)
	named, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return "", fmt.Errorf("resolve %s: %w", parent, err)
	}
	return filepath.Join(named, base), nil
}
