package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/pflag"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/server"
	"github.com/lariat-net/lariat/pkg/printable"
	"github.com/lariat-net/lariat/pkg/service"
)

// run is the program. It returns the exit code.
func run(args []string, stdout, stderr io.Writer) int {
	commands := map[string]func([]string, io.Writer) error{"backup": backup, "restore": restore}
	if len(args) > 0 && commands[args[0]] != nil { // each has flags of its own
		if err := commands[args[0]](args[1:], stdout); err != nil && !errors.Is(err, pflag.ErrHelp) {
			fmt.Fprintln(stderr, "lariat-metadata:", printable.Joined(err.Error()))
			return 1
		}
		return 0
	}
	var c config
	return service.Run(service.Program{
		Name: "lariat-metadata", Version: version, Help: help, Socket: metadata.DefaultSocket,
		SocketUsage: "unix socket of the control API", MetricsPort: 9475,
		Flags: c.flags, Prepare: c.prepare, Start: c.start,
	}, args, stdout, stderr)
}

// start opens the store and joins the cluster.
func (c *config) start(ctx context.Context, p *service.Process) (*service.Service, error) {
	conf, err := c.identity()
	if err != nil {
		return nil, err
	}
	wait, cancel := context.WithTimeout(ctx, c.StartTimeout)
	defer cancel()
	st, err := c.open(wait, p.Log, func(err error) {
		fmt.Fprintln(p.Stderr, "lariat-metadata:", printable.Joined(err.Error()))
		os.Exit(1) //nolint:forbidigo // the store is lost under way, and everything that would return waits for it
	})
	if err != nil {
		return nil, err
	}
	p.Defer(func() { _ = st.Close() })
	var s *server.Server
	st.Observe = func(op string, took time.Duration, err error) {
		if s != nil {
			s.ObserveStore(op, took, err)
		}
	}
	conf.Log, conf.Progress = p.Log, func() { service.Starting(c.StartTimeout) }
	if s, err = server.New(ctx, conf, st); err != nil {
		return nil, err
	}
	p.Defer(s.Close)
	tree := s.Tree()
	tree.Address = c.ListenTree
	return &service.Service{Private: s.API(), Public: tree, Alive: s.Alive, Patience: 10 * time.Second,
		Work: func(ctx context.Context) error {
			p.Log.Info("serving", "socket", p.Socket, "host", c.HostName)
			<-ctx.Done()
			p.Log.Info("stopping")
			return nil
		},
		Stop: s.Stop, // requests under way get their answer; watches and waits end with the server
	}, nil
}
