// Package ipam acquires, releases, checks and garbage-collects the addresses of attachments. It
// uses the metadata service when it answers, and the host's journal when it does not.
package ipam

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/lariat-net/lariat/pkg/cni"
	"github.com/lariat-net/lariat/pkg/journal"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// IPAMType is the IPAM plugin whose work the main plugins do in-process.
const IPAMType = "lariat-ipam"

// Config is the ipam block of a configuration whose type is lariat-ipam.
type Config struct {
	Type     string `json:"type"`
	Network  string `json:"network,omitempty"`  // in metadata; default: the configuration's name
	Socket   string `json:"socket,omitempty"`   // of the metadata service
	StateDir string `json:"stateDir,omitempty"` // where the journal is
	// seconds to wait until the model lists the container with an address
	WaitSeconds int `json:"waitSeconds,omitempty"`
	// "/24": length of the address in the result; default: the subnet's
	SubnetPrefixSize string        `json:"subnetPrefixSize,omitempty"`
	Routes           []types.Route `json:"routes,omitempty"`
	DNS              *types.DNS    `json:"dns,omitempty"`
	// STATUS also fails without a store, and without free addresses
	StrictStatus bool `json:"strictStatus,omitempty"`
	Definition
}

// Definition describes a network in a configuration, so that its first use creates the network.
// Once the network exists, only metadata counts.
type Definition struct {
	Subnet        string   `json:"subnet,omitempty"`  // one subnet
	Subnets       []string `json:"subnets,omitempty"` // or one of each family
	VNI           uint32   `json:"vni,omitempty"`
	Port          uint16   `json:"port,omitempty"`
	HostNAT       *bool    `json:"hostNAT,omitempty"` // default true
	DirectRouting bool     `json:"directRouting,omitempty"`
	BlockSizeV4   int      `json:"blockSizeV4,omitempty"`
	BlockSizeV6   int      `json:"blockSizeV6,omitempty"`
	Gateways      []string `json:"gateways,omitempty"` // of a flat network
	Exclude       []string `json:"exclude,omitempty"`
}

// Create returns the network to create on first use, or nil when the configuration does not define
// one.
func (d Definition) Create(name, encapsulation string) (*metadata.Network, error) {
	list := d.Subnets
	if d.Subnet != "" {
		if len(list) > 0 {
			return nil, cni.Errorf(cni.ErrConfig, "keys \"subnet\" and \"subnets\" contradict each other; give one of them")
		}
		list = []string{d.Subnet}
	}
	if len(list) == 0 {
		return nil, nil
	}
	n := &metadata.Network{Name: name, Encapsulation: encapsulation, VNI: d.VNI, Port: d.Port, HostNAT: d.HostNAT == nil ||
		*d.HostNAT,
		DirectRouting: d.DirectRouting, BlockSizeV4: d.BlockSizeV4, BlockSizeV6: d.BlockSizeV6, Exclude: d.Exclude}
	for _, s := range list {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, cni.Errorf(cni.ErrConfig, "key \"subnet\": %w", err)
		}
		n.Subnets = append(n.Subnets, p)
	}
	if encapsulation == metadata.EncapNone && len(d.Gateways) == 0 {
		// As with host-local: ptp needs a gateway. bridge takes the first address of the subnet for
		// itself, so no container may have it.
		for _, p := range n.Subnets {
			if !p.IsSingleIP() {
				n.Gateways = append(n.Gateways, p.Masked().Addr().Next())
			}
		}
	}
	for _, s := range d.Gateways {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return nil, cni.Errorf(cni.ErrConfig, "key \"gateways\": %w", err)
		}
		n.Gateways = append(n.Gateways, a)
	}
	return n, nil
}

// PrefixLength returns subnetPrefixSize as a number, or 0 when it is not set.
func (c Config) PrefixLength() (int, error) {
	if c.SubnetPrefixSize == "" {
		return 0, nil
	}
	var n int
	s, slash := strings.CutPrefix(c.SubnetPrefixSize, "/")
	if k, err := fmt.Sscanf(s, "%d", &n); !slash || k != 1 || err != nil || fmt.Sprint(n) != s || n < 1 || n > 128 {
		return 0, cni.Errorf(cni.ErrConfig, "key \"ipam.subnetPrefixSize\": %q is not a slash and a length, as \"/24\"",
			c.SubnetPrefixSize)
	}
	return n, nil
}

// Client returns a client of the journal and the service that the block names.
func (c Config) Client(pluginType string) Client {
	return Client{Service: metadata.Client{Socket: c.Socket}, Journal: journal.New(c.StateDir), Type: pluginType}
}

// Request turns a runtime's call into a request to the metadata service. It also returns the
// addresses that the caller named, with their lengths. They replace the answer when the service is
// away.
func Request(r *cni.Request, waitSeconds int,
	create *metadata.Network) (req metadata.AttachRequest, explicit []netip.Prefix, err error) {
	if waitSeconds < 0 || waitSeconds > 600 {
		return req, nil, cni.Errorf(cni.ErrConfig, "key \"ipam.waitSeconds\": %d is not between 0 and 600", waitSeconds)
	}
	req = metadata.AttachRequest{ContainerID: r.ContainerID, IfName: r.IfName, WaitSeconds: waitSeconds, Create: create}
	if explicit, err = r.Addresses(); err != nil {
		return req, nil, err
	}
	for _, p := range explicit {
		req.Requested = append(req.Requested, p.Addr())
	}
	if req.MAC, err = r.MAC(); err != nil {
		return req, nil, err
	}
	req.Name, req.UUID, req.Labels = r.Owner()
	return req, explicit, nil
}

// Block decodes the ipam block when its type is lariat-ipam. ok is false when another plugin must
// be executed.
func Block(r *cni.Request, raw json.RawMessage) (c Config, ok bool, err error) {
	var head struct {
		Type string `json:"type"`
	}
	if len(raw) > 0 {
		if err := json.Unmarshal(raw, &head); err != nil {
			return c, false, cni.Errorf(cni.ErrConfig, "key \"ipam\": %w", err)
		}
	}
	if head.Type == "" {
		return c, false, cni.Errorf(cni.ErrConfig, "key \"ipam.type\" is missing; the usual one is %q", IPAMType)
	}
	if head.Type != IPAMType {
		return Config{Type: head.Type}, false, nil
	}
	c, err = cni.DecodeBlock[Config](r, raw, "ipam")
	return c, true, err
}
