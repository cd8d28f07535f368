package kubelet_test

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/lariat-net/lariat/test/fakeaws"
	"github.com/lariat-net/lariat/test/guest/nfsd"
)

// driver is one of ours, and what stands behind it here.
type driver struct {
	name string
	// attaches says that volumes are attached to the node before they are mounted.
	attaches bool
	// volume are the options of a volume of that name.
	volume func(name string) map[string]string
	// source is how what the mount table says of it begins. folder is where the server has it; nil: its data
	// shows only where it is mounted.
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

// aws is an emulator with one instance, which has the node's name, and the environment of processes there.
func aws(t *testing.T) (*fakeaws.Cloud, []string) {
	c := fakeaws.New(t, fakeaws.Options{Devices: fakeaws.NewNvmet(t, t.TempDir())})
	c.MountTargetAddress(func(string) netip.Addr { return netip.MustParseAddr(nfsd.Server) })
	return c, c.Env(c.AddInstance(fakeaws.Instance{Nitro: true, PrivateDNSName: nodeName}).ID)
}

// efs has a file system for each volume. All are the guest's export.
func efs(t *testing.T, env []string) driver {
	nfsd.Serve(t)
	return driver{
		name: "efs",
		volume: func(name string) map[string]string {
			call(t, env, "efs", "create", `{"name":"`+name+`"}`) // kubelet has no verb for it
			return map[string]string{"name": name, "export": nfsd.Export}
		},
		source: func(string) string { return nfsd.Server + ":" + nfsd.Export },
		folder: func(string) string { return nfsd.Export },
		wrong:  "exports", words: "did you mean",
		idle: func() error { return empty("/var/lib/lariat/volumes/efs/mounts/*", "/run/lariat/volumes/efs/*") },
	}
}

// ebs has NVMe drives of the guest.
func ebs(ec2 *fakeaws.Cloud) driver {
	return driver{
		name: "ebs", attaches: true,
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

// call calls a driver as a controller does: again, until it succeeds.
func call(t *testing.T, env []string, driver string, args ...string) {
	t.Helper()
	eventually(t, func() error {
		cmd := exec.Command(filepath.Join(os.Getenv("LARIAT_BIN"), driver), args...)
		cmd.Env = append(os.Environ(), env...)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s %v: %w: %s", driver, args, err, out)
		}
		return nil
	})
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
