package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/lariat-net/lariat/pkg/delta"
)

const sysctlRoot = "/proc/sys/"

// LooseReversePath reports whether settings of this network namespace override the strict reverse-path check
// of a container's port, or may do so behind Lariat's back: the kernel takes the larger of a device's value
// and that of all devices, and where new devices are meant to be loose (2, as systemd's own sysctl.d has it),
// udev writes that into each port a moment after its ADD.
func LooseReversePath() bool {
	for _, of := range []string{"all", "default"} {
		b, err := os.ReadFile(sysctlRoot + "net/ipv4/conf/" + of + "/rp_filter")
		if err != nil || strings.TrimSpace(string(b)) == "2" {
			return true
		}
	}
	return false
}

// observeSysctls reads what want names. One that the kernel does not have is left out: Apply will name it.
func (n *Netns) observeSysctls(s, want *delta.State) error {
	if len(want.Sysctls) == 0 {
		return nil
	}
	return n.do(func() error {
		for key := range want.Sysctls {
			b, err := os.ReadFile(sysctlRoot + key)
			switch {
			case errors.Is(err, fs.ErrNotExist):
			case err != nil:
				return fmt.Errorf("sysctl %s: %w", key, err)
			default:
				s.Sysctls[key] = strings.TrimSpace(string(b))
			}
		}
		return nil
	})
}

// sysctls writes those of devices that this difference makes, or all others.
func (a *application) sysctls(ofNewDevices bool) {
	d := a.d
	if len(d.Sysctls.Set) == 0 {
		return
	}
	made := map[string]bool{}
	for _, e := range d.Links.Set {
		made[e.Key] = true
	}
	err := a.n.do(func() error {
		var errs []error
		for _, e := range d.Sysctls.Set {
			if made[delta.SysctlDevice(e.Key)] != ofNewDevices {
				continue
			}
			if err := os.WriteFile(sysctlRoot+e.Key, []byte(e.Value), 0); err != nil {
				errs = append(errs, fmt.Errorf("set %s: %w", delta.SysctlString(e.Key, e.Value), err))
			}
		}
		return errors.Join(errs...)
	})
	if err != nil {
		a.errs = append(a.errs, err)
	}
}

// setSysctls writes settings of single devices. One whose device is gone is no error.
func (n *Netns) setSysctls(list []delta.Sysctl) error {
	return n.do(func() error {
		var errs []error
		for _, s := range list {
			err := os.WriteFile(sysctlRoot+s.Key, []byte(s.Value), 0)
			if err != nil && !errors.Is(err, fs.ErrNotExist) { // the device is gone, and its settings with it
				errs = append(errs, fmt.Errorf("set %s: %w", delta.SysctlString(s.Key, s.Value), err))
			}
		}
		return errors.Join(errs...)
	})
}

// ipv6Settings returns the settings that keep the device's IPv6 off, or on, and router
// advertisements out. Write them before the device is up: they hold from its first packet then.
func ipv6Settings(dev string, off bool) []delta.Sysctl {
	disable := "0"
	if off {
		disable = "1"
	}
	return []delta.Sysctl{{Key: "net/ipv6/conf/" + dev + "/accept_ra", Value: "0"},
		{Key: "net/ipv6/conf/" + dev + "/disable_ipv6", Value: disable}}
}
