package main

import (
	"context"
	"encoding/json"
	"net"
	"net/netip"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"

	"github.com/lariat-net/lariat/pkg/cni"
	"github.com/lariat-net/lariat/pkg/ipam"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// A call is one verb with its configuration. Keys outside the ipam block belong to the main plugin.
type call struct {
	*cni.Request
	conf    ipam.Config
	network string
	book    ipam.Client
}

func open(r *cni.Request) (*call, error) {
	var outer struct {
		IPAM json.RawMessage `json:"ipam"`
	}
	if err := json.Unmarshal(r.Stdin, &outer); err != nil {
		return nil, cni.Errorf(cni.ErrDecode, "configuration on stdin: %w", err)
	}
	conf, ours, err := ipam.Block(r, outer.IPAM)
	if err != nil {
		return nil, err
	}
	if !ours {
		return nil, cni.Errorf(cni.ErrConfig, "key \"ipam.type\" is %q, but this is %s", conf.Type, ipam.IPAMType)
	}
	network := conf.Network
	if network == "" {
		network = r.Conf.Name
	}
	return &call{Request: r, conf: conf, network: network, book: conf.Client(ipam.IPAMType)}, nil
}

func add(ctx context.Context, r *cni.Request) (*current.Result, error) {
	c, err := open(r)
	if err != nil {
		return nil, err
	}
	length, err := c.conf.PrefixLength()
	if err != nil {
		return nil, err
	}
	create, err := c.conf.Create(c.network, metadata.EncapNone)
	if err != nil {
		return nil, err
	}
	req, explicit, err := ipam.Request(r, c.conf.WaitSeconds, create)
	if err != nil {
		return nil, err
	}
	unlock, err := c.book.Journal.Lock(c.network, r.ID())
	if err != nil {
		return nil, cni.Errorf(cni.ErrIO, "%w", err)
	}
	defer unlock()
	inode, err := cni.NetnsInode(r.Netns)
	if err != nil {
		return nil, cni.Errorf(cni.ErrNetns, "CNI_NETNS: %w", err)
	}
	a, err := c.book.Acquire(ctx, c.network, req, ipam.Netns{Path: r.Netns, Inode: inode}, standIn(c.network, explicit))
	if err != nil {
		return nil, cni.FromMetadata(err)
	}
	return c.result(a, length), nil
}

// standIn returns the attachment that is used while the service is away. Only addresses that the
// caller named with a length are sufficient. The gateway is then the first address of their subnet,
// as with Rancher.
func standIn(network string, explicit []netip.Prefix) *metadata.Attachment {
	if len(explicit) == 0 || slices.ContainsFunc(explicit, netip.Prefix.IsSingleIP) {
		return nil
	}
	a := &metadata.Attachment{Network: network}
	for _, p := range explicit {
		a.Addresses = append(a.Addresses, metadata.AttachmentAddress{Address: p.Addr(), Subnet: p.Masked(),
			Gateway: p.Masked().Addr().Next()})
	}
	return a
}

func (c *call) result(a *metadata.Attachment, length int) *current.Result {
	res := &current.Result{CNIVersion: current.ImplementedSpecVersion}
	for _, addr := range a.Addresses {
		bits := addr.Address.BitLen()
		switch {
		case length > 0 && length <= bits:
			bits = length
		case addr.Subnet.IsValid():
			bits = addr.Subnet.Bits()
		}
		ip := &current.IPConfig{Address: net.IPNet{IP: addr.Address.AsSlice(),
			Mask: net.CIDRMask(bits, addr.Address.BitLen())}}
		if addr.Gateway.IsValid() {
			ip.Gateway = addr.Gateway.AsSlice()
		}
		res.IPs = append(res.IPs, ip)
	}
	for _, r := range c.conf.Routes {
		res.Routes = append(res.Routes, &r)
	}
	if c.conf.DNS != nil {
		res.DNS = *c.conf.DNS
	}
	if d := c.Conf.RuntimeConfig.DNS; d != nil {
		res.DNS = types.DNS{Nameservers: d.Servers, Search: d.Searches, Options: d.Options}
	}
	return res
}

func del(ctx context.Context, r *cni.Request) error {
	c, err := open(r)
	if err != nil {
		return err
	}
	defer c.book.Journal.LockIfPossible(c.network, r.ID())()
	if err := c.book.Release(ctx, c.network, r.ID()); err != nil {
		return cni.FromMetadata(err)
	}
	return nil
}

func check(ctx context.Context, r *cni.Request) error {
	c, err := open(r)
	if err != nil {
		return err
	}
	a, err := c.book.Check(ctx, c.network, r.ID())
	if err != nil {
		return cni.FromMetadata(err)
	}
	var want []string
	for _, ip := range r.Prev.IPs {
		want = append(want, ip.Address.IP.String())
	}
	// Other plugins of a chain may have added addresses. All of ours must be present.
	for _, addr := range a.Addresses {
		if !slices.Contains(want, addr.Address.String()) {
			return cni.Errorf(cni.ErrDiffers, "attachment %s holds %s, which its result does not list", r.ID(), addr.Address)
		}
	}
	return nil
}

func status(ctx context.Context, r *cni.Request) error {
	c, err := open(r)
	if err != nil {
		return err
	}
	_, err = ipam.Status(ctx, c.book, c.network, c.conf.Definition, c.conf.StrictStatus)
	return err
}

func gc(ctx context.Context, r *cni.Request) error {
	c, err := open(r)
	if err != nil {
		return err
	}
	if r.Valid == nil {
		return nil
	}
	return c.book.Collect(ctx, c.network, *r.Valid)
}
