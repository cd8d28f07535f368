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
