// Package attach plans one container's connection to its host: a routed veth pair, its addresses and routes.
//
// Pure: from what the metadata service or another IPAM plugin answered to a delta.Endpoint, which the kernel
// package makes.
package attach

import (
	"crypto/sha256"
	"encoding/base32"
	"net/netip"
	"slices"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// HostMAC is the MAC of the host's end of every port. All may share one, for no two ports share a link; the container's
// neighbour entry for its gateway is then known before the port exists.
var HostMAC = delta.MAC{0x0e, 0xfe, 0, 0, 0, 1}

// Gateway6 is every container's IPv6 gateway: the host's end of its port.
var Gateway6 = netip.MustParseAddr("fe80::1")

// Gateway4 is a container's IPv4 gateway on a host that has no overlay address of its own (all blocks were
// taken when it joined, so it borrows). Nobody answers for it but the permanent neighbour entry.
var Gateway4 = netip.MustParseAddr("169.254.1.1")

var encoding = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// digest names an attachment in few characters: 60 bits of SHA-256 over the pair.
func digest(id metadata.AttachmentID) [32]byte {
	return sha256.Sum256([]byte(id.ContainerID + "\x00" + id.IfName))
}

// HostName is the name of the host's end of an attachment's port: 15 characters, the kernel's limit.
func HostName(id metadata.AttachmentID) string {
	d := digest(id)
	return delta.VethPrefix + encoding.EncodeToString(d[:])[:12]
}

// MAC is the container's MAC when nobody asked for one: locally administered, the same at each try.
func MAC(id metadata.AttachmentID) delta.MAC {
	d := digest(id)
	return delta.MAC{0x0a, d[8], d[9], d[10], d[11], d[12]}
}

// Config is what the caller adds to the metadata's answer.
type Config struct {
	ID             metadata.AttachmentID
	Name           string // of the container, for people
	MAC            delta.MAC
	Routes         []delta.EndpointRoute // beyond the default route
	NoDefaultRoute bool                  // only the network's subnets go by this interface
}

// Plan turns the answer of the metadata service into a port.
func Plan(a *metadata.Attachment, c Config) delta.Endpoint {
	p := delta.Endpoint{
		Network: a.Network, ContainerID: c.ID.ContainerID, IfName: c.ID.IfName,
		HostName: HostName(c.ID), HostMAC: HostMAC, MAC: c.MAC, MTU: a.MTU,
		Alias: delta.EndpointAlias{Network: a.Network, ContainerID: c.ID.ContainerID, IfName: c.ID.IfName,
			Name: c.Name}.String(),
	}
	if p.MAC == (delta.MAC{}) {
		p.MAC = a.MAC
	}
	if p.MAC == (delta.MAC{}) {
		p.MAC = MAC(c.ID)
	}
	for _, addr := range a.Addresses {
		p.Addrs = append(p.Addrs, addr.Address)
		gw := addr.Gateway
		if addr.Address.Is6() {
			gw = Gateway6
		} else if !gw.IsValid() {
			gw = Gateway4
		}
		if slices.Contains(p.Gateways, gw) {
			continue
		}
		p.Gateways = append(p.Gateways, gw)
		if a.Device != "" && addr.Gateway.IsValid() {
			p.Sources = append(p.Sources, addr.Gateway)
		}
		if !c.NoDefaultRoute {
			p.Routes = append(p.Routes, delta.EndpointRoute{Dst: netip.PrefixFrom(zero(gw), 0), Via: gw})
			continue
		}
		for _, s := range a.Subnets {
			if s.Addr().BitLen() == gw.BitLen() {
				p.Routes = append(p.Routes, delta.EndpointRoute{Dst: s, Via: gw})
			}
		}
	}
	for _, r := range c.Routes {
		r.Via = gatewayFor(r.Dst, p.Gateways)
		if r.Via.IsValid() && !slices.ContainsFunc(p.Routes, func(o delta.EndpointRoute) bool {
			return o.Dst == r.Dst &&
				o.Table == r.Table
		}) {
			p.Routes = append(p.Routes, r)
		}
	}
	return p
}

func gatewayFor(dst netip.Prefix, gateways []netip.Addr) netip.Addr {
	for _, g := range gateways {
		if g.BitLen() == dst.Addr().BitLen() {
			return g
		}
	}
	return netip.Addr{}
}

func zero(a netip.Addr) netip.Addr {
	if a.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}
