package main

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"

	"github.com/lariat-net/lariat/pkg/hostid"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/metadata/server"
	"github.com/lariat-net/lariat/pkg/metadata/store"
	"github.com/lariat-net/lariat/pkg/mtu"
	"github.com/lariat-net/lariat/pkg/plan"
)

// identity returns what the service needs to know of its host, and what the flags say.
func (c *config) identity() (conf server.Config, err error) {
	conf = server.Config{HostName: c.HostName, Labels: c.Labels, Version: version, MTU: mtu.Container,
		Overhead: mtu.Overhead, Device: plan.Device, TreeLabels: c.TreeLabels, TreeOrigin: c.TreeOrigin,
		Kept: filepath.Join(c.StateDir, "entries.json"), LeaseTTL: c.LeaseTTL, Start: c.StartTimeout}
	if conf.MachineID, err = hostid.Read(c.MachineIDFile); err != nil {
		return conf, fmt.Errorf("--machine-id-file: %w; `systemd-machine-id-setup` fills /etc/machine-id", err)
	}
	if conf.BootID, err = hostid.Read(c.BootIDFile); err != nil {
		return conf, fmt.Errorf("--boot-id-file: %w", err)
	}
	if conf.Underlay, err = c.underlay(); err != nil {
		return conf, err
	}
	conf.Foreign, err = kernel.Foreign(conf.Underlay)
	return conf, err
}

// open opens the store that the flags describe.
func (c *config) open(ctx context.Context, log *slog.Logger, fatal func(error)) (*store.Etcd, error) {
	if len(c.Endpoints) > 0 {
		t, err := c.tls()
		if err != nil {
			return nil, err
		}
		return store.Dial(ctx, store.External{Endpoints: c.Endpoints, TLS: t, Prefix: c.Prefix, Log: log})
	}
	return store.Open(ctx, store.Embedded{Dir: c.DataDir, Prefix: c.Prefix, Name: c.Name, ListenClient: c.ListenClient,
		ListenPeer: c.ListenPeer, AdvertisePeer: c.AdvertisePeer, InitialCluster: c.InitialCluster, Existing: c.Join,
		CA: c.CA, Cert: c.Cert, Key: c.Key, Quota: c.QuotaMiB << 20, Log: log, Fatal: fatal})
}
