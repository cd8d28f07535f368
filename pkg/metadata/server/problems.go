package server

import (
	"context"
	"slices"
	"strings"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// outsider is a kind of entries: where they stand, and what is wrong with one of them.
type outsider struct {
	prefix string
	check  func(store.Entry) error
}

// outside are the kinds of entries that no view holds: only a look into the store tells what is wrong with them.
var outside = []outsider{
	{entry.ContainerPrefix, func(e store.Entry) error {
		_, err := metadata.Decode[metadata.Container](strings.TrimPrefix(e.Key, entry.ContainerPrefix), e.Value)
		return err
	}},
	{entry.VolumePrefix, func(e store.Entry) error {
		_, err := metadata.Decode[metadata.Volume](strings.TrimPrefix(e.Key, entry.VolumePrefix), e.Value)
		return err
	}},
	{entry.TablePrefix, func(e store.Entry) error {
		_, err := entry.DecodeTable(e)
		return err
	}},
}

// Problems returns the entries of the store that cannot be used. It reads all that the view does not hold.
func (s *Server) Problems(ctx context.Context) ([]metadata.Problem, error) {
	out := append([]metadata.Problem{}, s.view.snapshot().Sane().Problems...)
	for _, o := range outside {
		list, _, err := s.list(ctx, o.prefix)
		if err != nil {
			return nil, err
		}
		for _, e := range list {
			if err := o.check(e); err != nil {
				out = append(out, metadata.NewProblem(e.Key, err))
			}
		}
	}
	return out, nil
}

// RemoveEntry removes an entry of the store that cannot be used.
func (s *Server) RemoveEntry(ctx context.Context, key string) error {
	all, err := s.Problems(ctx)
	if err != nil {
		return err
	}
	at := slices.IndexFunc(all, func(p metadata.Problem) bool { return p.Key == key || p.Name() == key })
	if at < 0 {
		return metadata.Errorf(metadata.CodeConflict, "nothing is wrong with an entry %s, so it stays; lariat status "+
			"lists those that can be removed", metadata.Problem{Key: key}.Name())
	}
	key = all[at].Key
	if name, ok := strings.CutPrefix(key, metadata.KindNetwork+"/"); ok && metadata.ValidName(name) == nil {
		return s.DeleteNetwork(ctx, name) // and its blocks and its VNI
	}
	ch := store.Change{Key: key, Revision: store.Any}
	inView := !slices.ContainsFunc(outside, func(o outsider) bool { return strings.HasPrefix(key, o.prefix) })
	if inView {
		ch.Key = entry.ViewPrefix + key
	}
	ctx, cancel := s.timeout(ctx)
	defer cancel()
	revision, err := store.One(ctx, s.store, ch)
	if err != nil {
		return err
	}
	s.log.Info("entry removed that could not be used", "entry", all[at].Name(), "problem", all[at].What)
	if inView {
		return s.seen(ctx, revision)
	}
	return nil
}
