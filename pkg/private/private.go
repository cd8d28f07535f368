// Package private writes and reads files that only their owner may read: secrets, keys, backups.
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

// Mode is the mode of every file that this package writes, for any umask.
const Mode fs.FileMode = 0o600

// A File is an unfinished file. Its name is temporary until Publish or Replace sets the final name.
type File struct {
	*os.File
	path string
}

// Create returns a file of mode 0600 in the directory of path. Publish or Replace finishes the
// file, and Discard abandons it.
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

// Publish gives the file its name, once its content is on the disk. It fails with fs.ErrExist when
// the name is taken, even by a symbolic link. link(2) neither replaces nor follows one.
func (f *File) Publish() error {
	return f.finish(func(tmp string) error {
		err := os.Link(tmp, f.path)
		if errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("%w, and is left as it is", &fs.PathError{Op: "create", Path: f.path, Err: fs.ErrExist})
		}
		return err
	})
}

// Replace gives the file its name, once its content is on the disk. It replaces an existing file.
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
	if err := dir.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) { // some file systems cannot sync a directory
		return err
	}
	return nil
}

// Discard removes an unfinished file. It does nothing to a finished file.
func (f *File) Discard() {
	_ = f.Close()           // mostly closed already
	_ = os.Remove(f.Name()) // missing after Replace
}

// Write creates a new file of mode 0600 atomically. It fails with fs.ErrExist when the file exists.
func Write(path string, content []byte) error { return write(path, content, (*File).Publish) }

// Rewrite is Write for a file that may exist, which it replaces.
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

// Check returns an error with the remedy when others than the owner can access a file with that
// description. The owner must be root or the caller.
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

// MaxRead is the maximum length, in bytes, of a file that Read reads. Keys and secrets are much
// shorter.
const MaxRead = 64 << 10

// Read returns the content of a file that passes Check and is no longer than MaxRead. No error
// repeats the content.
func Read(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // do not wait for a pipe of that name
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
