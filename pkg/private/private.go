// Package private writes and reads files that nobody but their owner may read: secrets, keys, backups.
package private

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// Mode is the mode of every file that this package writes, whatever the umask is.
const Mode fs.FileMode = 0o600

// File is a file in the making. It has no name that anybody knows until Publish or Replace gives it one.
type File struct {
	*os.File
	path string
}

// Create returns a file of mode 0600 in the directory of path. Publish or Replace finishes it, and Discard gives it up.
func Create(path string) (*File, error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".")
	if err != nil {
		return nil, err
	}
	out := &File{f, path}
	if err := f.Chmod(Mode); err != nil { // the umask may have taken even the owner's right
		out.Discard()
		return nil, err
	}
	return out, nil
}

// Publish gives the file its name, once its content is on the disk. It fails with fs.ErrExist when the name
// is taken, by a symbolic link too: link(2) neither replaces nor follows one.
func (f *File) Publish() error {
	return f.finish(func(tmp string) error {
		err := os.Link(tmp, f.path)
		if errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("%w, and is left as it is", &fs.PathError{Op: "create", Path: f.path, Err: fs.ErrExist})
		}
		return err
	})
}

// Replace gives the file its name in the place of what has it, once its content is on the disk.
func (f *File) Replace() error {
	return f.finish(func(tmp string) error { return os.Rename(tmp, f.path) })
}

func (f *File) finish(name func(tmp string) error) error {
	defer f.Discard()
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", f.path, err)
	}
	if err := name(f.Name()); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(f.path))
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := dir.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) { // some file systems cannot
		return err
	}
	return nil
}

// Discard removes what has no name yet. It does nothing to a file that is finished.
func (f *File) Discard() {
	_ = f.Close()           // a second time for most
	_ = os.Remove(f.Name()) // gone after Replace
}

// Write makes a new file of mode 0600 appear whole. It fails with fs.ErrExist when there is one.
func Write(path string, content []byte) error { return write(path, content, (*File).Publish) }

// Rewrite is Write in the place of the file that is there.
func Rewrite(path string, content []byte) error { return write(path, content, (*File).Replace) }

func write(path string, content []byte, finish func(*File) error) error {
	f, err := Create(path)
	if err != nil {
		return err
	}
	defer f.Discard()
	if _, err := f.File.Write(content); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return finish(f)
}

// Check returns why a file of that description is not its owner's alone, with the remedy; nil when it is. The
// owner has to be root or the caller.
func Check(path string, info fs.FileInfo) error {
	st, _ := info.Sys().(*syscall.Stat_t)
	switch {
	case !info.Mode().IsRegular():
		return fmt.Errorf("%s is not a regular file", path)
	case info.Mode().Perm()&0o077 != 0:
		return fmt.Errorf("%s can be read or written by others (mode %04o); chmod 600 %s", path, info.Mode().Perm(), path)
	case st != nil && st.Uid != 0 && int(st.Uid) != os.Geteuid():
		return fmt.Errorf("%s belongs to user %d; chown root %s", path, st.Uid, path)
	}
	return nil
}

// MaxRead is how long a file may be that Read reads, in bytes. Keys and secrets are much shorter.
const MaxRead = 64 << 10

// Read returns the content of a file that passes Check and is no longer than MaxRead. No error repeats what is in it.
func Read(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe of that name must not be waited for
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if err := Check(path, info); err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, MaxRead+1))
	switch {
	case err != nil:
		return nil, err
	case len(data) > MaxRead:
		return nil, fmt.Errorf("%s is longer than %d bytes", path, MaxRead)
	}
	return data, nil
}
