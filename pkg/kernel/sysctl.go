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

// LooseReversePath reports whether settings of this network namespace override the strict
// reverse-path check of a host end, or may override it later.
// The kernel takes the larger value of the device's setting and the setting of all devices.
// The default of new devices may be loose (2, as in systemd's sysctl.d).
// udev then writes this default to each host end, a moment after the ADD.
func LooseReversePath() bool {
	for _, of := range []string{"all", "default"} {
		b, err := os.ReadFile(sysctlRoot + "net/ipv4/conf/" + of + "/rp_filter")
		if err != nil || strings.TrimSpace(string(b)) == "2" {
			return true
		}
	}
	return false
}

// observeSysctls reads the sysctls that want names. It leaves out sysctls that the kernel lacks.
// Apply then reports them.
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

// sysctls writes the sysctls of devices that this difference creates, or all other sysctls.
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

// setSysctls writes settings of single devices. A missing device is no error.
func (n *Netns) setSysctls(list []delta.Sysctl) error {
	return n.do(func() error {
		var errs []error
		for _, s := range list {
			err := os.WriteFile(sysctlRoot+s.Key, []byte(s.Value), 0)
			if err != nil && !errors.Is(err, fs.ErrNotExist) { // a removed device has no settings
				errs = append(errs, fmt.Errorf("set %s: %w", delta.SysctlString(s.Key, s.Value), err))
			}
		}
		return errors.Join(errs...)
	})
}

// ipv6Settings returns the settings that disable or enable a device's IPv6.
// They also reject router advertisements.
// Write the settings before the device is up, so that they apply to the first packet.
func ipv6Settings(dev string, off bool) []delta.Sysctl {
	disable := "0"
	if off {
		disable = "1"
	}
	return []delta.Sysctl{{Key: "net/ipv6/conf/" + dev + "/accept_ra", Value: "0"},
		{Key: "net/ipv6/conf/" + dev + "/disable_ipv6", Value: disable}}
}
