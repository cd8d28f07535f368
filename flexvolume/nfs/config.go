package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/flex"
	"github.com/lariat-net/lariat/pkg/volume/nfs"
)

// program is the driver with the environment as its configuration.
func program() flex.Program {
	return flex.Program{
		Name:        "nfs",
		About:       "volumes on NFS servers",
		Version:     version,
		Options:     volume.OptionNames(nfs.Options{}),
		Environment: nfs.Environment,
		Driver: func(log *slog.Logger) (volume.Driver, error) {
			return driver(os.Getenv, log)
		},
	}
}

// driver with an environment that is wrong still answers init, because kubelet does not ask a second time, and still unmounts. All else
// says what is wrong.
func driver(getenv func(string) string, log *slog.Logger) (volume.Driver, error) {
	c, err := nfs.FromEnvironment(getenv)
	if err == nil {
		return nfs.New(c, log)
	}
	d, nerr := nfs.New(nfs.Config{StateDir: c.StateDir, RunDir: c.RunDir}, log)
	return misconfigured{d, fmt.Errorf("the driver's environment: %w", err)}, nerr
}

type misconfigured struct {
	*nfs.Driver
	err error
}

// Create implements volume.Driver.
func (m misconfigured) Create(context.Context, volume.Request) (volume.Reply, error) {
	return volume.Reply{}, m.err
}

// Delete implements volume.Driver.
func (m misconfigured) Delete(context.Context, volume.Request) (volume.Reply, error) {
	return volume.Reply{}, m.err
}

// Mount implements volume.Driver.
func (m misconfigured) Mount(context.Context, string, string, volume.Request) error { return m.err }
