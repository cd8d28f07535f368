package main

import (
	"log/slog"
	"os"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/efs"
	"github.com/lariat-net/lariat/pkg/volume/flex"
)

// program returns the driver's program, configured by the environment.
func program() flex.Program {
	return flex.Program{
		Name:        "efs",
		About:       "volumes on AWS's Elastic File System",
		Version:     version,
		Options:     volume.OptionNames(efs.Options{}),
		Environment: efs.Environment,
		Driver: func(log *slog.Logger) (volume.Driver, error) {
			return efs.New(efs.FromEnvironment(os.Getenv), log), nil
		},
	}
}
