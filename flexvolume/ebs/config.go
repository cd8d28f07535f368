package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/ebs"
	"github.com/lariat-net/lariat/pkg/volume/flex"
)

// program is the driver with the environment as its configuration.
func program() flex.Program {
	return flex.Program{
		Name:        "ebs",
		About:       "EBS volumes of Amazon EC2",
		Version:     version,
		Options:     volume.OptionNames(ebs.Options{}),
		Environment: ebs.Environment,
		Driver: func(log *slog.Logger) (volume.Driver, error) {
			return driver(os.Getenv, log)
		},
	}
}

// driver with an environment that is wrong still answers init, because kubelet does not ask a second time, and still unmounts. All else
// says what is wrong.
func driver(getenv func(string) string, log *slog.Logger) (volume.Driver, error) {
	c, err := ebs.FromEnvironment(getenv)
	if err == nil {
		return ebs.New(c, log)
	}
	d, nerr := ebs.New(ebs.Config{FromNode: c.FromNode, StateDir: c.StateDir, RunDir: c.RunDir}, log)
	return misconfigured{d, volume.Unsupported{}, fmt.Errorf("the driver's environment: %w", err)}, nerr
}

type misconfigured struct {
	driver *ebs.Driver
	volume.Unsupported
	err error
}

// Init implements volume.Driver.
func (m misconfigured) Init(ctx context.Context) (volume.Capabilities, error) {
	return m.driver.Init(ctx)
}

// Unmount implements volume.Driver.
func (m misconfigured) Unmount(ctx context.Context, dir string) error {
	return m.driver.Unmount(ctx, dir)
}

// UnmountDevice implements volume.Driver.
func (m misconfigured) UnmountDevice(ctx context.Context, dir string) error {
	return m.driver.UnmountDevice(ctx, dir)
}

// Create implements volume.Driver.
func (m misconfigured) Create(context.Context, volume.Request) (volume.Reply, error) {
	return volume.Reply{}, m.err
}

// Delete implements volume.Driver.
func (m misconfigured) Delete(context.Context, volume.Request) (volume.Reply, error) {
	return volume.Reply{}, m.err
}

// Attach implements volume.Driver.
func (m misconfigured) Attach(context.Context, volume.Request, string) (string, error) {
	return "", m.err
}

// WaitForAttach implements volume.Driver.
func (m misconfigured) WaitForAttach(context.Context, string, volume.Request) (string, error) {
	return "", m.err
}

// IsAttached implements volume.Driver.
func (m misconfigured) IsAttached(context.Context, volume.Request, string) (bool, error) {
	return false, m.err
}

// Detach implements volume.Driver.
func (m misconfigured) Detach(context.Context, string, string) error { return m.err }

// MountDevice implements volume.Driver.
func (m misconfigured) MountDevice(context.Context, string, string, volume.Request) error {
	return m.err
}

// Mount implements volume.Driver.
func (m misconfigured) Mount(context.Context, string, string, volume.Request) error { return m.err }

// Expand implements volume.Driver.
func (m misconfigured) Expand(context.Context, volume.Request, volume.Expansion) (int64, error) {
	return 0, m.err
}
