package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// kept are the last valid values of entries that cannot be used, by kind and key, in a file: a service that starts
// finds such an entry in the store, and must not cut hosts and networks off that its predecessor kept. Usually
// there is none, and no file.
type kept map[string]json.RawMessage

// loadKept reads the file. Without one, or with a damaged one, nothing was kept.
func loadKept(file string) (kept, error) {
	out := kept{}
	if file == "" {
		return out, nil
	}
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return out, nil
	}
	if err == nil {
		err = json.Unmarshal(data, &out)
	}
	if err != nil {
		return kept{}, fmt.Errorf("last valid values of entries: %s: %w", file, err)
	}
	return out, nil
}

// write replaces the file, whole or not at all, and removes it when there is nothing to keep.
func (k kept) write(file string) error {
	if len(k) == 0 {
		if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	data, err := json.MarshalIndent(k, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	tmp := file + ".new"
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, file)
}

// writeKept writes the file after each change, until the server ends.
func (s *Server) writeKept() {
	for last := false; !last; {
		select {
		case <-s.view.keeping:
		case <-s.ctx.Done():
			last = true
			select {
			case <-s.view.keeping:
			default:
				continue
			}
		}
		s.view.mu.RLock()
		k := make(kept, len(s.view.kept))
		for at, value := range s.view.kept {
			k[at] = value
		}
		s.view.mu.RUnlock()
		if err := k.write(s.cfg.Kept); err != nil {
			s.log.Error("the last valid values of entries are not kept beyond the next start", "file", s.cfg.Kept, "error", err)
		}
	}
}

// keep notes the last valid value of an entry that has become invalid, forgets it when the entry is valid or gone,
// and puts one that was noted in force when the view knows none. It reports whether a value is in force.
func (v *view) keep(at string, e store.Entry, err error) bool {
	old, noted := v.kept[at]
	if err == nil {
		if noted {
			delete(v.kept, at)
			v.noteKept()
		}
		return false
	}
	good := v.known(at)
	switch {
	case good != nil && !noted:
		data, merr := json.Marshal(good)
		if merr != nil {
			return true
		}
		v.kept[at] = data
		v.noteKept()
	case good == nil && noted:
		if _, err := v.set(store.Entry{Key: e.Key, Value: old, Revision: 1, Created: 1}); err != nil {
			delete(v.kept, at) // of another version, or damaged
			v.noteKept()
			return false
		}
	}
	return good != nil || noted
}

func (v *view) noteKept() {
	select {
	case v.keeping <- struct{}{}:
	default:
	}
}

// known returns the object that is in force under a kind and key; nil: none.
func (v *view) known(at string) any {
	kind, key, _ := strings.Cut(at, "/")
	network, rest, _ := strings.Cut(key, "/")
	switch kind {
	case metadata.KindHost:
		if h, ok := v.hosts[key]; ok {
			return h
		}
	case metadata.KindNetwork:
		if n, ok := v.defined[key]; ok {
			return n
		}
	case metadata.KindBlock:
		if p, err := netip.ParsePrefix(rest); err == nil {
			if b, ok := v.claimed[network][p]; ok {
				return b
			}
		}
	case metadata.KindHostRoute:
		if a, err := netip.ParseAddr(rest); err == nil {
			if p, ok := v.announced[network][a]; ok {
				return p
			}
		}
	}
	return nil
}
