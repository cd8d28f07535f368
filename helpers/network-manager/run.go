package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/lariat-net/lariat/pkg/hostid"
	"github.com/lariat-net/lariat/pkg/journal"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/overlay"
	"github.com/lariat-net/lariat/pkg/reconcile"
	"github.com/lariat-net/lariat/pkg/service"
)

// run is the program. It returns the exit code.
func run(args []string, stdout, stderr io.Writer) int {
	var c config
	return service.Run(service.Program{
		Name: "lariat-network-manager", Version: "lariat-network-manager " + version, Help: manual,
		Socket:      overlay.DefaultManagerSocket,
		SocketUsage: "unix socket for health, metrics, state, and the plugins' DEL", MetricsPort: 9476,
		Flags: c.flags, Prepare: c.prepare, Start: c.start,
		Commands: map[string]func(context.Context, *service.Process) error{"teardown": c.teardown},
	}, args, stdout, stderr)
}

// start sets up what the manager works with.
func (c *config) start(ctx context.Context, p *service.Process) (*service.Service, error) {
	boot, err := hostid.Read(c.bootIDFile)
	if err != nil {
		return nil, fmt.Errorf("--boot-id-file: %w", err)
	}
	k, err := kernel.New()
	if err != nil {
		return nil, err
	}
	p.Defer(func() { _ = k.Close() })
	events, err := kernel.Watch(ctx)
	if err != nil {
		return nil, err
	}
	m := &reconcile.Manager{
		Client: metadata.Client{Socket: c.metadataSocket}, Journal: journal.New(c.stateDir), Kernel: k,
		BootID: boot, Log: p.Log, Every: c.every, Grace: c.grace, MetadataAddress: c.metadataAddress,
	}
	m.Tunnels = c.tunnels(k, m, p.Log)
	p.Defer(func() { _ = m.Tunnels.Daemon.Close() })
	reaper, err := kernel.NewLinkReaper(ctx)
	if err != nil {
		return nil, err
	}
	if c.probe {
		m.OnView = (&responder{ctx: ctx, view: m.View, log: p.Log}).follow
	}
	return &service.Service{Private: handler(m, reaper, p.Log, p.Level), Patience: 5 * time.Second,
		Work: func(ctx context.Context) error {
			p.Log.Info("started", "socket", p.Socket, "metadata", c.metadataSocket, "state", c.stateDir)
			return m.Run(ctx, events)
		},
		Stopped: "stopped; the network stays as it is",
	}, nil
}
