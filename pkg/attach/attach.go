// Package attach plans one container's endpoint: a routed veth pair, its addresses and routes.
//
// The package is pure. It turns the answer of the metadata service or of another IPAM plugin into a
// delta.Endpoint. Package kernel creates the endpoint.
package attach

import (
	"crypto/sha256"
	"encoding/base32"
	"net/netip"
	"slices"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// HostMAC is the MAC of every host end. All host ends share a MAC, because each has its own link.
// Therefore the container's neighbour entry for its gateway is known before the endpoint exists.
var HostMAC = delta.MAC{0x0e, 0xfe, 0, 0, 0, 1}

// Gateway6 is every container's IPv6 gateway: the host end of its endpoint.
var Gateway6 = netip.MustParseAddr("fe80::1")

// Gateway4 is a container's IPv4 gateway on a host without an overlay address of its own.
// Such a host borrows addresses, because no block was free when it joined.
// No host answers for Gateway4. Only the permanent neighbour entry resolves it.
var Gateway4 = netip.MustParseAddr("169.254.1.1")

var encoding = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// digest returns the SHA-256 of an attachment's id. HostName uses 60 bits of it.
func digest(id metadata.AttachmentID) [32]byte {
	return sha256.Sum256([]byte(id.ContainerID + "\x00" + id.IfName))
}

// HostName returns the name of an attachment's host end. It has 15 characters, the kernel's limit.
func HostName(id metadata.AttachmentID) string {
	d := digest(id)
	return delta.VethPrefix + encoding.EncodeToString(d[:])[:12]
}

// MAC returns the container's default MAC. It is locally administered and the same at each retry.
func MAC(id metadata.AttachmentID) delta.MAC {
	d := digest(id)
	return delta.MAC{0x0a, d[8], d[9], d[10], d[11], d[12]}
}

// Config keeps the caller's additions to the answer of the metadata service.
type Config struct {
	ID             metadata.AttachmentID
	Name           string // of the container, for people
	MAC            delta.MAC
	Routes         []delta.EndpointRoute // beyond the default route
	NoDefaultRoute bool                  // only routes to the network's subnets use this interface
}

// Plan turns the answer of the metadata service into an endpoint.
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
