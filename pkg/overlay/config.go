// Package overlay is the common part of the main plugins, for every encapsulation. It turns a
// runtime's call into addresses, an endpoint in the kernel, and a result. It also does the reverse.
//
// A plugin adds the name of its encapsulation and the device that it expects. The package decides
// nothing about addresses: the metadata service does. It plans nothing about hosts: the planners
// do. It creates nothing itself: pkg/kernel does.
package overlay

import (
	"encoding/json"

	"github.com/lariat-net/lariat/pkg/cni"
	"github.com/lariat-net/lariat/pkg/ipam"
	"github.com/lariat-net/lariat/pkg/mtu"
)

// Config holds the keys of a main plugin's configuration beyond cni.Conf. All properties of the
// network come from metadata, by the network's name. So hosts share one file.
type Config struct {
	IPAM          json.RawMessage `json:"ipam"`
	Socket        string          `json:"socket,omitempty"`        // of the metadata service
	ManagerSocket string          `json:"managerSocket,omitempty"` // of the network manager
	StateDir      string          `json:"stateDir,omitempty"`      // where the journal is
	// MTU of the container's interface; default: the network's
	MTU int `json:"mtu,omitempty"`
	// bytes below the underlay's MTU; default: the encapsulation's
	LinkMTUOverhead *int `json:"linkMTUOverhead,omitempty"`
	// false: only the network's subnets use this interface
	DefaultRoute *bool `json:"defaultRoute,omitempty"`
	// STATUS also fails for problems that waiting or other hosts may cure
	StrictStatus bool `json:"strictStatus,omitempty"`
	ipam.Definition
}

func decode(r *cni.Request) (Config, error) {
	c, err := cni.Decode[Config](r)
	if err != nil {
		return c, err
	}
	switch {
	case c.MTU != 0 && c.LinkMTUOverhead != nil:
		return c, cni.Errorf(cni.ErrConfig, "keys \"mtu\" and \"linkMTUOverhead\" contradict each other; give one of them")
	case c.MTU != 0 && (c.MTU < 576 || c.MTU > 65535):
		return c, cni.Errorf(cni.ErrConfig, "key \"mtu\": %d is not between 576 and 65535", c.MTU)
	case c.MTU != 0 && c.MTU < mtu.MinIPv6 && c.v6():
		return c, cni.Errorf(cni.ErrConfig, "key \"mtu\": %d: IPv6 needs at least %d", c.MTU, mtu.MinIPv6)
	case c.LinkMTUOverhead != nil && (*c.LinkMTUOverhead < 0 || *c.LinkMTUOverhead > 1000):
		return c, cni.Errorf(cni.ErrConfig, "key \"linkMTUOverhead\": %d is not between 0 and 1000", *c.LinkMTUOverhead)
	}
	return c, nil
}

func (c Config) v6() bool {
	n, err := c.Create("x", "")
	if err != nil || n == nil {
		return false
	}
	for _, s := range n.Subnets {
		if s.Addr().Is6() {
			return true
		}
	}
	return false
}
