package kubelet_test

import (
	"fmt"
	"path/filepath"
	"testing"

	"github.com/lariat-net/lariat/test/fakeaws"
	"github.com/lariat-net/lariat/test/guest/nfsd"
)

// driver is one of ours, and what stands behind it here.
type driver struct {
	name string
	env  []string // of the driver's processes
	// attaches says that volumes are attached to the node before they are mounted.
	attaches bool
	// volume are the options of a volume of that name.
	volume func(name string) map[string]string
	// source is how what the mount table says of it begins. folder is where the server has it; nil: its data shows only where it is mounted.
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

// ebs is on an instance that has the node's name. EC2 is an emulator, and its volumes are NVMe drives of the guest.
func ebs(t *testing.T) driver {
	ec2 := fakeaws.New(t, fakeaws.Options{Devices: fakeaws.NewNvmet(t, t.TempDir())})
	instance := ec2.AddInstance(fakeaws.Instance{Nitro: true, PrivateDNSName: nodeName})
	return driver{
		name: "ebs", env: ec2.Env(instance.ID), attaches: true,
		volume: func(name string) map[string]string { return map[string]string{"name": name, "size": "1"} },
		source: func(string) string { return "/dev/nvme" },
		wrong:  "volumeTyp", words: "did you mean",
		idle: func() error {
			for _, v := range ec2.Volumes() {
				if v.State != "available" {
					return fmt.Errorf("volume %s is %s", v.ID, v.State)
				}
			}
			return empty("/var/lib/lariat/volumes/ebs/mounts/*", "/run/lariat/volumes/ebs/*")
		},
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
