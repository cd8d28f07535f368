package main

import (
	"log/slog"
	"os"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/ebs"
	"github.com/lariat-net/lariat/pkg/volume/flex"
)

// program returns the driver's program, configured by the environment.
func program() flex.Program {
	return flex.Program{
		Name:        "ebs",
		About:       "EBS volumes of Amazon EC2",
		Version:     version,
		Options:     volume.OptionNames(ebs.Options{}),
		Environment: ebs.Environment,
		Driver: func(log *slog.Logger) (volume.Driver, error) {
			c, _ := ebs.FromEnvironment(os.Getenv) // the driver reports errors of the configuration: see New
			return ebs.New(c, log), nil
		},
	}
}
