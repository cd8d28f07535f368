package volume

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Default directories of a host for the drivers' journals and locks.
const (
	DefaultStateDir = "/var/lib/lariat/volumes"
	DefaultRunDir   = "/run/lariat/volumes"
)

// Environment lists the variables that all drivers read, with their meanings.
var Environment = [][2]string{
	{"LARIAT_STATE_DIR", "where the journal is; default " + DefaultStateDir},
	{"LARIAT_RUN_DIR", "where locks are; default " + DefaultRunDir},
}

// Journal is a directory of small records, one file for each key. Put replaces a record as a whole
// or not at all. When Put returns, the record is on the disk. The journal of attachments does not
// need that, but this journal describes data that outlives a power failure.
//
// A writer holds the record's lock (see Locks). Readers need no lock. A journal is not the truth.
// Without a record, drivers use the mount table, the export's marks or the cloud's tags. Therefore
// a damaged record is set aside and counts as missing.
type Journal[T any] struct{ Dir string }

// entry is the content of a file. entry holds the key because the file's name may be a hash.
type entry[T any] struct {
	Key   string `json:"key"`
	Value T      `json:"value"`
}

func (j Journal[T]) path(key string) string { return filepath.Join(j.Dir, fileName(key)+".json") }

// fileName returns the key if the key is a proper name. For other keys, such as directories, it
// returns a hash.
func fileName(key string) string {
	if CheckName(key) == nil {
		return key
	}
	sum := sha256.Sum256([]byte(key))
	return "@" + hex.EncodeToString(sum[:16])
}

// Put writes a record and returns when the record is on the disk.
func (j Journal[T]) Put(key string, value T) error {
	data, err := json.MarshalIndent(entry[T]{key, value}, "", "  ")
	if err != nil {
		return fmt.Errorf("journal %s: %w", key, err)
	}
	if err := os.MkdirAll(j.Dir, 0o700); err != nil {
		return fmt.Errorf("journal %s: %w", key, err)
	}
	path := j.path(key)
	tmp := filepath.Join(j.Dir, ".new-"+filepath.Base(path))
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err == nil {
		_, err = f.Write(append(data, '\n'))
		if err == nil {
			err = f.Sync()
		}
		err = errors.Join(err, f.Close())
	}
	if err == nil {
		Failpoint("journal-written")
		err = os.Rename(tmp, path)
	}
	if err != nil {
		os.Remove(tmp)
		return fmt.Errorf("journal %s: %w", key, err)
	}
	return j.sync()
}

// sync makes renames and removals durable.
func (j Journal[T]) sync() error {
	dir, err := os.Open(j.Dir)
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	defer dir.Close()
	if err := dir.Sync(); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	return nil
}

// Get reads a record.
func (j Journal[T]) Get(key string) (value T, found bool, err error) {
	e, found, err := j.read(j.path(key))
	return e.Value, found, err
}

func (j Journal[T]) read(path string) (e entry[T], found bool, err error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return e, false, nil
	}
	if err != nil {
		return e, false, fmt.Errorf("journal: %w", err)
	}
	if err := json.Unmarshal(data, &e); err != nil || fileName(e.Key)+".json" != filepath.Base(path) {
		// Keep the damaged file for a person to examine. The new name hides the file from List.
		if err := os.Rename(path, filepath.Join(j.Dir, ".damaged-"+filepath.Base(path))); err != nil &&
			!errors.Is(err, fs.ErrNotExist) {
			return entry[T]{}, false, fmt.Errorf("journal: set the damaged %s aside: %w", path, err)
		}
		return entry[T]{}, false, nil
	}
	return e, true, nil
}

// Remove deletes a record. A missing record is no error.
func (j Journal[T]) Remove(key string) error {
	err := os.Remove(j.path(key))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	return j.sync()
}

// Prune deletes the records for which old returns true. A record that cannot be deleted does not
// stop the others.
func (j Journal[T]) Prune(old func(T) bool) error {
	all, err := j.List()
	errs := []error{err}
	for key, value := range all {
		if old(value) {
			errs = append(errs, j.Remove(key))
		}
	}
	return errors.Join(errs...)
}

// List returns all records by key.
func (j Journal[T]) List() (map[string]T, error) {
	all := map[string]T{}
	files, err := os.ReadDir(j.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return all, nil
	}
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	for _, f := range files {
		if strings.HasPrefix(f.Name(), ".") || !strings.HasSuffix(f.Name(), ".json") {
			continue
		}
		e, found, err := j.read(filepath.Join(j.Dir, f.Name()))
		if err != nil {
			return nil, err
		}
		if found {
			all[e.Key] = e.Value
		}
	}
	return all, nil
}
