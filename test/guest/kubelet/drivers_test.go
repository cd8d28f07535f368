package kubelet_test

import (
	"fmt"
	"path/filepath"

	"github.com/lariat-net/lariat/test/guest/nfsd"
)

// driver is one of ours, and what a pod may ask of it here.
type driver struct {
	name string
	// volume are the options of a volume of that name, made by its first use or before.
	volume func(name string) map[string]string
	// source is what mountinfo says of it, and folder where the server has it; "": its data is only seen when it is mounted.
	source, folder func(name string) string
	// wrong is an option that is refused, and words of the answer.
	wrong, words string
	// idle returns an error while the driver still knows of a mounted volume.
	idle func() error
}

// drivers under test.
var drivers = []driver{
	{
		name: "nfs",
		volume: func(name string) map[string]string {
			return map[string]string{"name": name, "host": nfsd.Server, "exportBase": nfsd.Export}
		},
		source: func(name string) string { return nfsd.Server + ":" + nfsd.Export + "/" + name },
		folder: func(name string) string { return nfsd.Export + "/" + name },
		wrong:  "exportBasis", words: `did you mean \"exportBase\"?`,
		idle: func() error { return empty("/var/lib/lariat/volumes/nfs/mounts/*", "/run/lariat/volumes/nfs/*") },
	},
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
