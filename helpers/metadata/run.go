package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/pflag"

	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/metadata/server"
	"github.com/lariat-net/lariat/pkg/metadata/store"
	"github.com/lariat-net/lariat/pkg/mtu"
	"github.com/lariat-net/lariat/pkg/plan"
	"github.com/lariat-net/lariat/pkg/printable"
	"github.com/lariat-net/lariat/pkg/private"
	"github.com/lariat-net/lariat/pkg/service"
)

// run is the program; what it returns is the exit code.
func run(args []string, stdout, stderr io.Writer) int {
	fail := func(err error) int {
		fmt.Fprintln(stderr, "lariat-metadata:", printable.Joined(err.Error()))
		return 1
	}
	var err error
	switch {
	case len(args) > 0 && args[0] == "backup":
		err = backup(args[1:], stdout)
	case len(args) > 0 && args[0] == "restore":
		err = restore(args[1:], stdout)
	default:
		err = serve(args, stdout, stderr)
	}
	if errors.Is(err, pflag.ErrHelp) {
		return 0
	}
	if err != nil {
		return fail(err)
	}
	return 0
}

func serve(args []string, stdout, stderr io.Writer) error {
	var c config
	f := pflag.NewFlagSet("lariat-metadata", pflag.ContinueOnError)
	f.SetOutput(stderr)
	c.flags(f)
	show := f.Bool("version", false, "print the version")
	f.Usage = func() { usage(stdout, f) }
	if err := f.Parse(args); err != nil {
		return err
	}
	if *show {
		fmt.Fprintln(stdout, version)
		return nil
	}
	if f.NArg() > 0 {
		return fmt.Errorf("%s: unknown sub-command; there are backup and restore", f.Arg(0))
	}
	if err := c.normalize(); err != nil {
		return err
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.LogLevel)); err != nil {
		return fmt.Errorf("--log-level %s: want debug, info, warn or error", c.LogLevel)
	}
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level}))
	syscall.Umask(0o077) // whatever it was: nothing that the service makes is for others

	if info, err := os.Stat(c.Key); c.Key != "" && err == nil { // one that is not there is an error later
		if err := private.Check(c.Key, info); err != nil {
			log.Warn("others can act as this host: the key of its certificate is not private", "err", err)
		}
	}
	machine, err := readID("machine-id-file", c.MachineIDFile)
	if err != nil {
		return err
	}
	boot, err := readID("boot-id-file", c.BootIDFile)
	if err != nil {
		return err
	}
	underlay, err := c.underlay()
	if err != nil {
		return err
	}
	foreign, err := kernel.Foreign(underlay)
	if err != nil {
		return err
	}

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	// Whoever holds the socket is the service of this host; ask before the store is opened, which would wait for its lock.
	listener, err := service.Listen(c.Socket)
	if err != nil {
		return err
	}
	defer listener.Close()

	start, cancel := context.WithTimeout(ctx, c.StartTimeout)
	defer cancel()
	st, err := c.open(start, log, func(err error) {
		fmt.Fprintln(stderr, "lariat-metadata:", printable.Joined(err.Error()))
		os.Exit(1) //nolint:forbidigo // the store is lost under way, and everything that would return waits for it
	})
	if err != nil {
		return err
	}
	defer st.Close()
	var s *server.Server
	st.Observe = func(op string, took time.Duration, err error) {
		if s != nil {
			s.ObserveStore(op, took, err)
		}
	}
	s, err = server.New(ctx, server.Config{HostName: c.HostName, MachineID: machine, BootID: boot, Underlay: underlay,
		Foreign: foreign,
		Labels:  c.Labels, Version: version, MTU: mtu.Container, Overhead: mtu.Overhead, Device: plan.Device,
		TreeLabels: c.TreeLabels, TreeOrigin: c.TreeOrigin, Kept: filepath.Join(c.StateDir, "entries.json"),
		LeaseTTL: c.LeaseTTL, Log: log,
		Start: c.StartTimeout, Progress: func() { service.Starting(c.StartTimeout) }}, st)
	if err != nil {
		return err
	}
	defer s.Close()

	api := s.API()
	api.Serve(listener)
	if err := errors.Join(api.ListenMetrics(c.ListenMetrics), api.ListenGuests(c.ListenTree, s.Tree())); err != nil {
		return err
	}
	log.Info("serving", "socket", c.Socket, "host", c.HostName)
	service.Ready(ctx, s.Alive)

	select {
	case <-ctx.Done():
		err = nil
	case err = <-api.Failed():
	}
	service.Stopping()
	log.Info("stopping")
	// Requests under way get their answer; watches and waits end with the server.
	go s.Stop()
	if serr := api.Stop(10 * time.Second); serr != nil {
		log.Warn("requests were cut short; they can be repeated", "error", serr)
	}
	return err
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
