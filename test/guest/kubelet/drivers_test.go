package kubelet_test

import (
	"fmt"
	"path/filepath"
	"testing"

	"github.com/lariat-net/lariat/test/guest/nfsd"
)

// driver is one of ours, and what stands behind it here.
type driver struct {
	name string
	env  []string // of the driver's processes
	// volume are the options of a volume of that name.
	volume func(name string) map[string]string
	// source is what the mount table says of it. folder is where the server has it; nil: its data shows only where it is mounted.
	source, folder func(name string) string
	// wrong is an option that is refused, and words of the answer.
	wrong, words string
	// idle returns an error while the driver knows of a volume in use.
	idle func() error
}

func nfs(t *testing.T) driver {
	nfsd.Serve(t)
	return driver{
		name: "nfs",
		volume: func(name string) map[string]string {
			return map[string]string{"name": name, "host": nfsd.Server, "exportBase": nfsd.Export}
		},
		source: func(name string) string { return nfsd.Server + ":" + nfsd.Export + "/" + name },
		folder: func(name string) string { return nfsd.Export + "/" + name },
		wrong:  "exportBasis", words: "did you mean",
		idle: func() error { return empty("/var/lib/lariat/volumes/nfs/mounts/*", "/run/lariat/volumes/nfs/*") },
	}
}

// empty is an error if there are files.
func empty(patterns ...string) error {
	for _, pattern := range patterns {
		if found, _ := filepath.Glob(pattern); len(found) > 0 {
			return fmt.Errorf("left over: %v", found)
		}
	}
	return nil
}
