package main

import (
	"context"
	"io"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/service"
	"github.com/lariat-net/lariat/pkg/volume/dockerapi"
)

// run is the program. It returns the exit code.
func run(args []string, stdout, stderr io.Writer) int {
	var c config
	return service.Run(service.Program{
		Name: "lariat-storage", Version: "lariat-storage " + version, Help: manual,
		SocketUsage: "unix socket for Docker; empty: /run/docker/plugins/NAME.sock", MetricsPort: 9477,
		Flags: c.flags, Prepare: c.prepare, Start: c.start,
	}, args, stdout, stderr)
}

// start opens the driver and the journal of its volumes.
func (c *config) start(_ context.Context, p *service.Process) (*service.Service, error) {
	driver, err := c.open(p.Log)
	if err != nil {
		return nil, err
	}
	m := newMeter()
	publish := &publisher{client: metadata.Client{Socket: c.metadata}, driver: c.name, scope: c.scope, log: p.Log,
		wake: make(chan struct{}, 1)}
	docker, err := dockerapi.New(dockerapi.Config{
		Driver: driver, Name: c.name, Scope: c.scope, Log: p.Log, Observe: m.observe, Changed: publish.changed,
		DetachDevice: c.dialect == "rancher",
		StateDir:     filepath.Join(c.stateDir, c.name), MountDir: filepath.Join(c.mountDir, c.name),
	})
	if err != nil {
		return nil, err
	}
	p.Defer(func() { docker.Close() })
	publish.volumes = docker.Volumes
	registry := prometheus.NewRegistry()
	registry.MustRegister(m.calls, m.took, collector{docker})
	return &service.Service{Private: handler(docker, driver, registry, p.Log),
		Patience: 20 * time.Second, // Docker repeats calls that were cut short
		Work: func(ctx context.Context) error {
			p.Log.Info("started", "socket", p.Socket, "driver", c.driver, "scope", c.scope)
			go docker.Sweep(ctx)
			if c.metadata != "" {
				go publish.run(ctx)
			}
			<-ctx.Done()
			return nil
		},
		Stopped: "stopped; volumes stay mounted",
	}, nil
}
