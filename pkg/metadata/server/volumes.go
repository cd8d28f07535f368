package server

import (
	"context"
	"encoding/json"
	"errors"
	"strings"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
	"github.com/lariat-net/lariat/pkg/metadata/store"
)

// volumeKey is an object for each host that has the volume: two hosts' local volumes of one name are two, and
// none writes what another one knows.
func volumeKey(host, driver, name string) string {
	return entry.VolumePrefix + metadata.VolumeKey(metadata.Volume{Host: host, Driver: driver, Name: name})
}

// PutVolume writes a volume of this host. Nobody else writes it, so the last word counts.
func (s *Server) PutVolume(ctx context.Context, v metadata.Volume) error {
	if err := v.Validate(); err != nil {
		return metadata.Errorf(metadata.CodeInvalid, "%s", err)
	}
	if v.Host != "" && v.Host != s.cfg.HostName {
		return metadata.Errorf(metadata.CodeInvalid, "volume %s of host %s: each host writes its own, and this is %s", v.Name,
			v.Host, s.cfg.HostName)
	}
	v.Host = s.cfg.HostName
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	ctx, cancel := s.timeout(ctx)
	defer cancel()
	_, err = store.One(ctx, s.store, store.Change{Key: volumeKey(v.Host, v.Driver, v.Name), Value: data,
		Revision: store.Any})
	return err
}

// DeleteVolume removes this host's object of a volume.
func (s *Server) DeleteVolume(ctx context.Context, driver, name string) error {
	if err := errors.Join(metadata.ValidVolumeName(driver), metadata.ValidVolumeName(name)); err != nil {
		return metadata.Errorf(metadata.CodeInvalid, "%s", err)
	}
	ctx, cancel := s.timeout(ctx)
	defer cancel()
	_, err := store.One(ctx, s.store, store.Change{Key: volumeKey(s.cfg.HostName, driver, name), Revision: store.Any})
	return err
}

// Volumes lists those of all hosts, or of this one, by host, driver and name.
func (s *Server) Volumes(ctx context.Context, self bool) ([]metadata.Volume, error) {
	prefix := entry.VolumePrefix
	if self {
		prefix += s.cfg.HostName + "/"
	}
	list, _, err := s.list(ctx, prefix)
	if err != nil {
		return nil, err
	}
	out := []metadata.Volume{}
	for _, e := range list {
		v, err := metadata.Decode[metadata.Volume](strings.TrimPrefix(e.Key, entry.VolumePrefix), e.Value)
		if err != nil {
			s.log.Warn("volume left out", "entry", metadata.Problem{Key: e.Key}.Name(), "error", err)
			continue
		}
		out = append(out, v)
	}
	return out, nil
}
