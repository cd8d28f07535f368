// Command lariat-storage lets Docker and Podman use a volume driver: the built-in nfs, or any executable that
// speaks FlexVolume. See README.md.
package main

import (
	"os"

	"github.com/lariat-net/lariat/pkg/volume/mounts"
)

var version = "unknown" // set by the Makefile

func main() {
	mounts.RunChild()
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}
