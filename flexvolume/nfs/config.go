package main

import (
	"log/slog"
	"os"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/flex"
	"github.com/lariat-net/lariat/pkg/volume/nfs"
)

// program returns the driver's program, configured by the environment.
func program() flex.Program {
	return flex.Program{
		Name:        "nfs",
		About:       "volumes on NFS servers",
		Version:     version,
		Options:     volume.OptionNames(nfs.Options{}),
		Environment: nfs.Environment,
		Driver: func(log *slog.Logger) (volume.Driver, error) {
			c, _ := nfs.FromEnvironment(os.Getenv) // the driver reports errors of the configuration: see New
			return nfs.New(c, log), nil
		},
	}
}
