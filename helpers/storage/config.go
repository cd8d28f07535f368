package main

import (
	_ "embed"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/service"
	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/ebs"
	"github.com/lariat-net/lariat/pkg/volume/efs"
	"github.com/lariat-net/lariat/pkg/volume/flex"
	"github.com/lariat-net/lariat/pkg/volume/nfs"
)

//go:embed README.md
var manual string

type config struct {
	driver   string
	name     string
	dialect  string
	stateDir string
	mountDir string
	scope    string
	metadata string
}

// builtIn are the drivers that need no executable: what Swarm is told of their volumes, and what makes one of
// the environment.
var builtIn = map[string]struct {
	scope string
	open  func(getenv func(string) string, log *slog.Logger) (volume.Driver, error)
}{
	"nfs": {"global", func(getenv func(string) string, log *slog.Logger) (volume.Driver, error) {
		conf, err := nfs.FromEnvironment(getenv)
		warn(log, err)
		return nfs.New(conf, log), nil
	}},
	"efs": {"global", func(getenv func(string) string, log *slog.Logger) (volume.Driver, error) {
		return efs.New(efs.FromEnvironment(getenv), log), nil
	}},
	// A name is one volume in the whole region, though one host at a time can have it.
	"ebs": {"global", func(getenv func(string) string, log *slog.Logger) (volume.Driver, error) {
		conf, err := ebs.FromEnvironment(getenv)
		warn(log, err)
		return ebs.New(conf, log), nil
	}},
}

// warn tells the log of an environment that is wrong. It does not keep the process from its start:
// volumes that are mounted must be listed and unmounted all the same, and drivers say what is wrong
// to who creates or mounts.
func warn(log *slog.Logger, err error) {
	if err != nil {
		log.Error("the driver's environment is wrong: volumes can be unmounted, and not be created or mounted", "error", err)
	}
}

// builtInNames are theirs, for a sentence.
func builtInNames() string { return strings.Join(slices.Sorted(maps.Keys(builtIn)), ", ") }

func (c *config) flags(f *pflag.FlagSet) {
	f.StringVar(&c.driver, "driver", "", "one that is built in ("+builtInNames()+
		"), or the path of an executable that speaks FlexVolume")
	f.StringVar(&c.name, "name", "", "what Docker's users call the driver; empty: lariat- and the driver's name")
	f.StringVar(&c.dialect, "dialect", "rancher", "how an executable is called: rancher (create, mount DIR DEVICE "+
		"JSON) or kubernetes (mount DIR JSON)")
	f.StringVar(&c.stateDir, "state-dir", "/var/lib/lariat/storage",
		"the journal of volumes and their users, in a folder for each name")
	f.StringVar(&c.mountDir, "mount-dir", "/run/lariat/storage", "where volumes are mounted: MOUNT-DIR/NAME/VOLUME")
	f.StringVar(&c.scope, "scope", "",
		"what Swarm is told: global, a volume is the same on all hosts, or local; empty: global for nfs, efs and ebs, "+
			"else local")
	f.StringVar(&c.metadata, "metadata-socket", metadata.DefaultSocket,
		"lariat-metadata's unix socket, to list volumes there whenever it answers; empty: never")
}

// prepare fills in what follows from other flags, and refuses contradictions.
func (c *config) prepare(p *service.Process) error {
	switch {
	case c.driver == "":
		return fmt.Errorf("--driver is missing: one of %s, or the path of an executable", builtInNames())
	case c.dialect != "rancher" && c.dialect != "kubernetes":
		return fmt.Errorf("--dialect %q is neither rancher nor kubernetes", c.dialect)
	}
	if c.name == "" {
		c.name = "lariat-" + filepath.Base(c.driver)
	}
	if err := volume.CheckName(c.name); err != nil {
		return fmt.Errorf("--name: %w", err)
	}
	if p.Socket == "" {
		p.Socket = filepath.Join("/run/docker/plugins", c.name+".sock")
	}
	if c.scope == "" {
		c.scope = "local"
		if b, ok := builtIn[c.driver]; ok {
			c.scope = b.scope
		}
	}
	return nil
}

// open makes the driver. It asks neither a server nor the executable.
func (c config) open(log *slog.Logger) (volume.Driver, error) {
	if b, ok := builtIn[c.driver]; ok {
		d, err := b.open(os.Getenv, log.With("driver", c.driver))
		if err != nil {
			return nil, fmt.Errorf("environment of the driver %s: %w", c.driver, err)
		}
		return d, nil
	}
	if !filepath.IsAbs(c.driver) {
		return nil, fmt.Errorf("--driver %q is neither one of %s nor an absolute path", c.driver, builtInNames())
	}
	if err := unix.Access(c.driver, unix.X_OK); err != nil {
		return nil, fmt.Errorf("--driver %s: not an executable: %w", c.driver, err)
	}
	shape := flex.Rancher
	if c.dialect == "kubernetes" {
		shape = flex.Kubernetes
	}
	return flex.Client{Path: c.driver, Shape: shape}, nil
}
