// Package mounts reads and changes the mount table without waiting for a server.
//
// The package learns of mounts from /proc/self/mountinfo. It does not use stat, which hangs when a
// server hangs. All work that may touch a remote file system runs in a child process with a
// deadline. The reason is that a stuck thread cannot be ended, but a child can. Waits of the NFS
// client give way to SIGKILL, and a killed mount leaves nothing behind.
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

// Entry is one line of the mount table.
type Entry struct {
	ID      int
	Point   string
	Source  string
	FSType  string
	Root    string // the mounted part of the file system
	Device  string // major:minor, as in /sys/dev/block
	Options string // of this mount: ro, nosuid, …
	Super   string // of the file system, as the kernel shows them
	Shared  bool   // mounts below this one propagate
}

// ReadOnly reports whether this mount prevents writes.
func (m Entry) ReadOnly() bool {
	return strings.HasPrefix(m.Options+",", "ro,") || strings.HasPrefix(m.Super+",", "ro,")
}

// Table holds all mounts of this process's mount namespace, in the order of mounting.
type Table []Entry

// Read returns the mount table of this process.
func Read() (Table, error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("read the mount table: %w", err)
	}
	return Parse(data)
}

// Parse parses the content of /proc/self/mountinfo.
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

// At returns the mounts at a directory, the uppermost last. The directory must be a result of
// Resolve.
func (t Table) At(dir string) (stack []Entry) {
	for _, m := range t {
		if m.Point == dir {
			stack = append(stack, m)
		}
	}
	return stack
}

// Of returns the mounts of a source.
func (t Table) Of(source string) (all []Entry) {
	for _, m := range t {
		if m.Source == source {
			all = append(all, m)
		}
	}
	return all
}

// Resolve returns the mount table's name of a directory: the path without symbolic links in its
// parents. It does not examine the directory itself, because a dead server's volume may be mounted
// there. Neither the directory nor its parents need to exist.
func Resolve(dir string) (string, error) {
	if err := volume.CheckDir(dir); err != nil {
		return "", err
	}
	dir = filepath.Clean(dir)
	parent, base := filepath.Dir(dir), filepath.Base(dir)
	// O_PATH asks no server, not even the server of the parent's mount.
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
