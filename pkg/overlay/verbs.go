package overlay

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"

	"github.com/lariat-net/lariat/pkg/attach"
	"github.com/lariat-net/lariat/pkg/cni"
	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/ipam"
	"github.com/lariat-net/lariat/pkg/journal"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/plan"
)

// DefaultManagerSocket is where the network manager of this host answers.
const DefaultManagerSocket = "/run/lariat/network-manager.sock"

// ManagerClient asks the network manager of this host.
func ManagerClient(socket string) metadata.Client {
	return metadata.Client{Socket: cmp.Or(socket, DefaultManagerSocket), Service: "network manager"}
}

// Plugin is what tells one main plugin from another.
type Plugin struct {
	Name          string // of the executable
	Version       string // of the build
	Help          string
	Encapsulation string

	// Ready reports what keeps the encapsulation from working on this host, as a *cni.Error: with code
	// cni.ErrNotAvailable no ADD is begun, with any other only STATUS tells. nil: nothing can. It asks the
	// network manager at the socket, when that answers.
	Ready func(ctx context.Context, managerSocket string) error

	// Kernel opens the namespace that the plugin runs in.
	Kernel func() (kernel.Kernel, error)
}

// CNI is the plugin as the process contract wants it.
func (p Plugin) CNI() cni.Plugin {
	return cni.Plugin{Name: p.Name, Version: p.Version, Help: p.Help, Add: p.add, Del: p.del, Check: p.check,
		Status: p.status, GC: p.gc}
}

// call is one verb at work.
type call struct {
	Plugin
	*cni.Request
	conf   Config
	ipam   ipam.Config
	owned  bool // the ipam block is ours, and its work is done in-process
	client ipam.Client
	boot   string // id of this host's boot, as the metadata service says
}

func (p Plugin) open(r *cni.Request) (*call, error) {
	conf, err := decode(r)
	if err != nil {
		return nil, err
	}
	block, owned, err := ipam.Block(r, conf.IPAM)
	if err != nil {
		return nil, err
	}
	if block.Socket == "" {
		block.Socket = conf.Socket
	}
	if block.StateDir == "" {
		block.StateDir = conf.StateDir
	}
	if block.Network != "" && block.Network != r.Conf.Name {
		return nil, cni.Errorf(cni.ErrConfig, "key \"ipam.network\": %q differs from the name %q; under %s they are one "+
			"and the same", block.Network, r.Conf.Name, p.Name)
	}
	if block.Subnet == "" && block.Subnets == nil {
		block.Definition = conf.Definition
	}
	return &call{Plugin: p, Request: r, conf: conf, ipam: block, owned: owned, client: block.Client(p.Name)}, nil
}

func (p Plugin) add(ctx context.Context, r *cni.Request) (res *current.Result, err error) {
	c, err := p.open(r)
	if err != nil {
		return nil, err
	}
	var e *cni.Error
	if err := c.ready(ctx); errors.As(err, &e) && e.Code == cni.ErrNotAvailable {
		return nil, err
	}
	unlock, err := c.client.Journal.Lock(r.Conf.Name, r.ID())
	if err != nil {
		return nil, cni.Errorf(cni.ErrIO, "%w", err)
	}
	defer unlock()
	earlier, again, err := c.client.Journal.Get(r.Conf.Name, r.ID())
	if err != nil {
		return nil, cni.Errorf(cni.ErrIO, "%w", err)
	}
	// A released one only waits for the service to be told, and of one that is leaving the interface may go at any moment.
	again = again && earlier.State != journal.Released && !earlier.Terminating
	k, err := p.Kernel()
	if err != nil {
		return nil, cni.Errorf(cni.ErrKernel, "%w", err)
	}
	defer k.Close()
	// Before anything is changed: a container that runs with this id keeps its port, its address
	// and its record.
	if err := k.VethFree(ctx, r.Netns, attach.HostName(r.ID()), r.IfName, r.Conf.Name); err != nil {
		return nil, cni.Errorf(cni.ErrKernel, "connect %s: %w", r.ID(), err)
	}
	var undo []func() error
	defer func() {
		if err != nil && !again { // what an earlier ADD of the same interface made is not ours to undo
			for _, f := range slices.Backward(undo) {
				err = errors.Join(err, f())
			}
		}
		if err != nil && again {
			err = errors.Join(err, c.client.Journal.Put(earlier))
		}
	}()
	port, fromIPAM, err := c.connect(ctx, k, again, &undo)
	if errors.Is(err, kernel.ErrTaken) && !again && c.owned {
		// The service gave an address that a container of this host has: its store has lost it, and the network
		// manager has not told it yet. What runs is registered, and the service chooses again.
		for _, f := range slices.Backward(undo) {
			err = errors.Join(err, f())
		}
		undo = nil
		if rerr := c.client.RegisterAll(ctx, r.Conf.Name, c.boot); rerr != nil {
			return nil, cni.FromMetadata(errors.Join(err, rerr))
		}
		port, fromIPAM, err = c.connect(ctx, k, again, &undo)
	}
	if err != nil {
		return nil, err
	}
	if earlier.Terminating {
		// if it stays, the next ADD makes the interface anew, and no harm is done
		_ = c.client.Journal.SetTerminating(r.Conf.Name, r.ID(), false)
	}
	return cni.After(r.Prev, c.result(port, fromIPAM)), nil
}

// connect gets the interface's addresses and makes its port.
func (c *call) connect(ctx context.Context, k kernel.Kernel, again bool, undo *[]func() error) (
	port delta.Endpoint, fromIPAM *current.Result, err error) {
	a, fromIPAM, err := c.addresses(ctx, again, undo)
	if err != nil {
		return port, nil, err
	}
	c.boot = a.BootID
	if a.Encapsulation != c.Encapsulation {
		return port, nil, cni.Errorf(cni.ErrConfig, "network %s uses the encapsulation %s, which is not this plugin's",
			c.Conf.Name, a.Encapsulation).WithDetails("use the plugin lariat-%s", a.Encapsulation)
	}
	if err := c.join(ctx, k, a); err != nil {
		return port, nil, err
	}
	if port, err = c.port(a, fromIPAM); err != nil {
		return port, nil, err
	}
	if !again || k.CheckEndpoint(ctx, c.Netns, port) != nil {
		if err := k.AddEndpoint(ctx, c.Netns, port); err != nil {
			return port, nil, cni.Errorf(cni.ErrKernel, "connect %s: %w", c.ID(), err)
		}
	}
	return port, fromIPAM, nil
}

func (c *call) ready(ctx context.Context) error {
	if c.Ready == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	return c.Ready(ctx, cmp.Or(c.conf.ManagerSocket, DefaultManagerSocket))
}

// addresses asks our own IPAM in-process, or executes another one and announces what it chose.
func (c *call) addresses(ctx context.Context, again bool, undo *[]func() error) (*metadata.Attachment, *current.Result,
	error) {
	create, err := c.ipam.Create(c.Conf.Name, c.Encapsulation)
	if err != nil {
		return nil, nil, err
	}
	req, _, err := ipam.Request(c.Request, c.ipam.WaitSeconds, create)
	if err != nil {
		return nil, nil, err
	}
	var res *current.Result
	if !c.owned {
		res, err = c.delegate(ctx, "ADD", c.ID())
		switch {
		case err != nil && again: // host-local refuses to answer twice; a DEL would free what a running container has
			return nil, nil, err
		case err != nil:
			return nil, nil, errors.Join(err, c.delegateDel(ctx))
		}
		*undo = append(*undo, func() error { return c.delegateDel(ctx) })
		if len(res.IPs) == 0 {
			return nil, nil, cni.Errorf(cni.ErrConfig, "the IPAM plugin %s gave no address", c.ipam.Type)
		}
		req.Foreign, req.Requested, req.WaitSeconds = true, nil, 0
		for _, ip := range res.IPs {
			addr, _ := netip.AddrFromSlice(ip.Address.IP)
			req.Requested = append(req.Requested, addr.Unmap())
		}
	}
	inode, err := cni.NetnsInode(c.Netns)
	if err != nil {
		return nil, nil, cni.Errorf(cni.ErrNetns, "CNI_NETNS: %w", err)
	}
	a, err := c.client.Acquire(ctx, c.Conf.Name, req, ipam.Netns{Path: c.Netns, Inode: inode}, nil)
	if err != nil {
		return nil, nil, cni.FromMetadata(err)
	}
	*undo = append(*undo, func() error { return c.client.Release(ctx, c.Conf.Name, c.ID()) })
	return a, res, nil
}

// join makes sure that the host takes part in the network. Usually the manager has seen to it long ago. When
// it has not, or does not run, the whole plan is applied here, so that a host works before, and without, the
// manager.
func (c *call) join(ctx context.Context, k kernel.Kernel, a *metadata.Attachment) error {
	var own []netip.Addr
	for _, addr := range a.Addresses {
		if addr.Gateway.IsValid() {
			own = append(own, addr.Gateway)
		}
	}
	ok, err := k.Joined(ctx, a.Device, own)
	if err != nil {
		return cni.Errorf(cni.ErrKernel, "%w", err)
	}
	if ok && !c.client.Journal.HostSetupPending(c.Conf.Name) {
		return nil
	}
	snap, err := c.client.Service.View(ctx)
	if err != nil {
		return cni.FromMetadata(err)
	}
	// The device stands long before the routes and the filters do, so the device alone does not tell a later ADD
	// that this one came to its end.
	if err := c.client.Journal.BeginHostSetup(c.Conf.Name); err != nil {
		return cni.Errorf(cni.ErrIO, "%w", err)
	}
	if _, err := kernel.Reconcile(ctx, k, plan.Desired(snap, a.Host, kernel.LooseReversePath())); err != nil {
		return cni.Errorf(cni.ErrKernel, "set up network %s on this host: %w", c.Conf.Name,
			err).WithDetails("check: lariat doctor; lariat plan --diff")
	}
	return c.client.Journal.EndHostSetup(c.Conf.Name)
}

// port plans the container's interface.
func (c *call) port(a *metadata.Attachment, fromIPAM *current.Result) (delta.Endpoint, error) {
	name, _, _ := c.Owner()
	mac, err := c.MAC()
	if err != nil {
		return delta.Endpoint{}, err
	}
	conf := attach.Config{ID: c.ID(), Name: name, MAC: mac, NoDefaultRoute: c.conf.DefaultRoute != nil &&
		!*c.conf.DefaultRoute}
	routes := c.ipam.Routes
	if fromIPAM != nil {
		routes = nil
		for _, r := range fromIPAM.Routes {
			routes = append(routes, *r)
		}
	}
	for _, r := range routes {
		dst, err := netip.ParsePrefix(r.Dst.String())
		if err != nil {
			return delta.Endpoint{}, cni.Errorf(cni.ErrConfig, "route %s: %w", r.Dst.String(), err)
		}
		pr := delta.EndpointRoute{Dst: dst.Masked(), MTU: r.MTU, AdvMSS: r.AdvMSS, Priority: r.Priority}
		if r.Table != nil {
			pr.Table = *r.Table
		}
		conf.Routes = append(conf.Routes, pr)
	}
	p := attach.Plan(a, conf)
	overhead := c.conf.LinkMTUOverhead
	if v := c.Arg("LinkMTUOverhead"); v != "" { // Rancher's, and it wins as it did there
		n, err := strconv.Atoi(v)
		if err != nil || n < 0 || n > 1000 {
			return p, cni.Errorf(cni.ErrEnvironment, "CNI_ARGS LinkMTUOverhead=%s: want a number of octets, 0 to 1000", v)
		}
		overhead = &n
	}
	switch {
	case overhead != nil:
		p.MTU = a.MTU + a.Overhead - *overhead
	case c.conf.MTU != 0:
		p.MTU = c.conf.MTU
	}
	return p, nil
}

func (c *call) result(p delta.Endpoint, fromIPAM *current.Result) *current.Result {
	res := &current.Result{CNIVersion: current.ImplementedSpecVersion, DNS: c.Conf.DNS, Interfaces: []*current.Interface{
		{Name: p.HostName, Mac: p.HostMAC.String(), Mtu: p.MTU},
		{Name: p.IfName, Mac: p.MAC.String(), Mtu: p.MTU, Sandbox: c.Netns},
	}}
	for _, addr := range p.Addrs {
		ip := &current.IPConfig{Interface: current.Int(1), Address: net.IPNet{IP: addr.AsSlice(),
			Mask: net.CIDRMask(addr.BitLen(), addr.BitLen())}}
		for _, g := range p.Gateways {
			if g.BitLen() == addr.BitLen() {
				ip.Gateway = g.AsSlice()
			}
		}
		res.IPs = append(res.IPs, ip)
	}
	for _, r := range p.Routes {
		route := &types.Route{Dst: net.IPNet{IP: r.Dst.Addr().AsSlice(), Mask: net.CIDRMask(r.Dst.Bits(),
			r.Dst.Addr().BitLen())},
			GW: r.Via.AsSlice(), MTU: r.MTU, AdvMSS: r.AdvMSS, Priority: r.Priority}
		if r.Table != 0 {
			route.Table = &r.Table
		}
		res.Routes = append(res.Routes, route)
	}
	empty := func() bool {
		return len(res.DNS.Nameservers)+len(res.DNS.Search)+len(res.DNS.Options) == 0 && res.DNS.Domain == ""
	}
	if fromIPAM != nil && empty() {
		res.DNS = fromIPAM.DNS
	}
	if c.ipam.DNS != nil && empty() {
		res.DNS = *c.ipam.DNS
	}
	if d := c.Conf.RuntimeConfig.DNS; d != nil {
		res.DNS = types.DNS{Nameservers: d.Servers, Search: d.Searches, Options: d.Options}
	}
	return res
}

func (p Plugin) del(ctx context.Context, r *cni.Request) error {
	c, err := p.open(r)
	if err != nil {
		return err
	}
	defer c.client.Journal.LockIfPossible(r.Conf.Name, r.ID())()
	// The interface first: an address that is free must not be in use anywhere. With the kernel not letting go of it the
	// address stays taken, and the runtime comes again.
	noted := c.client.Journal.SetTerminating(r.Conf.Name, r.ID(), true) == nil
	if err := c.disconnect(ctx, attach.HostName(r.ID()), noted); err != nil {
		return cni.Errorf(cni.ErrKernel, "disconnect %s: %w", r.ID(), err)
	}
	var errs []error
	if !c.owned {
		errs = append(errs, c.delegateDel(ctx))
	}
	if err := c.client.Release(ctx, r.Conf.Name, r.ID()); err != nil {
		errs = append(errs, cni.FromMetadata(err))
	}
	return join(errs)
}

// disconnect removes the port, unless it is that of another network. It asks the manager to, who
// waits for the kernel's house-keeping in our place and for many at once. Whatever came of that,
// the port is then removed here: that of one which is gone costs nothing, and a manager may be
// down, or serve another network namespace. Where the journal could not note that a DEL has begun
// (a full disk) nobody is asked: what was asked for outlives the one who asked.
func (c *call) disconnect(ctx context.Context, hostName string, noted bool) error {
	k, err := c.Kernel()
	if err != nil {
		return err
	}
	defer k.Close()
	if network, err := k.PortNetwork(ctx, hostName); err != nil || network != "" && network != c.Conf.Name {
		return err
	}
	if index := kernel.VethIndex(hostName); index != 0 && noted {
		ask, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		_ = ManagerClient(c.conf.ManagerSocket).Do(ask, "DELETE", fmt.Sprintf("/v1/ports/%s?index=%d", hostName, index), nil,
			nil)
	}
	return k.DelEndpoint(ctx, hostName)
}

// join keeps a single error as it is, with its code.
func join(errs []error) error {
	errs = slices.DeleteFunc(errs, func(err error) bool { return err == nil })
	if len(errs) == 1 {
		return errs[0]
	}
	return errors.Join(errs...)
}

func (p Plugin) check(ctx context.Context, r *cni.Request) error {
	c, err := p.open(r)
	if err != nil {
		return err
	}
	if !c.owned {
		if _, err := c.delegate(ctx, "CHECK", c.ID()); err != nil {
			return err
		}
	}
	a, err := c.client.Check(ctx, r.Conf.Name, r.ID())
	if err != nil {
		return cni.FromMetadata(err)
	}
	var named []string
	for _, ip := range r.Prev.IPs {
		if ip.Interface == nil || *ip.Interface >= 0 && *ip.Interface < len(r.Prev.Interfaces) &&
			r.Prev.Interfaces[*ip.Interface].Name == r.IfName {
			named = append(named, ip.Address.IP.String())
		}
	}
	for _, addr := range a.Addresses {
		if !slices.Contains(named, addr.Address.String()) {
			return cni.Errorf(cni.ErrDiffers, "attachment %s holds %s, but its result lists %s", r.ID(), addr.Address,
				strings.Join(named, ", "))
		}
	}
	k, err := p.Kernel()
	if err != nil {
		return cni.Errorf(cni.ErrKernel, "%w", err)
	}
	defer k.Close()
	port, err := c.port(a, nil)
	if err != nil {
		return err
	}
	c.asResulted(&port)
	if err := k.CheckEndpoint(ctx, r.Netns, port); err != nil {
		return cni.Errorf(cni.ErrDiffers, "attachment %s: %w", r.ID(), err)
	}
	if ok, err := k.Joined(ctx, a.Device, nil); err != nil || !ok {
		return cni.Errorf(cni.ErrDiffers, "network %s: device %s is missing on this host", r.Conf.Name,
			a.Device).WithDetails("check: systemctl status lariat-network-manager; lariat plan --diff")
	}
	return nil
}

// asResulted judges only what this plugin made and the result still says: plugins behind it may have changed
// MTU, MAC and routes, and recorded that in the result.
func (c *call) asResulted(p *delta.Endpoint) {
	gateways := p.Gateways
	p.MTU = 0 // not compared: the reference "tuning" changes it and leaves the result as it was
	for _, i := range c.Prev.Interfaces {
		if i.Name == c.IfName && i.Sandbox != "" {
			if m, err := metadata.ParseMAC(strings.ToLower(i.Mac)); err == nil {
				if p.MAC != m {
					p.Gateways = nil // with the address the kernel drops the neighbour entries, and learns them anew
				}
				p.MAC = m
			}
		}
	}
	p.Routes = nil
	for _, r := range c.Prev.Routes {
		dst, err := netip.ParsePrefix(r.Dst.String())
		gw, ok := netip.AddrFromSlice(r.GW)
		if err == nil && ok && slices.Contains(gateways, gw.Unmap()) {
			pr := delta.EndpointRoute{Dst: dst, Via: gw.Unmap()}
			if r.Table != nil {
				pr.Table = *r.Table
			}
			p.Routes = append(p.Routes, pr)
		}
	}
}

func (p Plugin) status(ctx context.Context, r *cni.Request) error {
	c, err := p.open(r)
	if err != nil {
		return err
	}
	if !c.owned {
		if _, err := c.delegate(ctx, "STATUS", c.ID()); err != nil {
			return err
		}
	}
	strict := c.conf.StrictStatus || c.ipam.StrictStatus
	s, err := ipam.Status(ctx, c.client, r.Conf.Name, c.ipam.Definition, strict)
	if err != nil {
		return err
	}
	var e *cni.Error
	if err := c.ready(ctx); err != nil && (strict || !errors.As(err, &e) || e.Code != cni.ErrLimited) {
		return err
	}
	if s == nil || s.Device == "" {
		return nil // not in use yet: the first ADD makes it
	}
	if v, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward"); err == nil && strings.TrimSpace(string(v)) == "0" {
		return cni.Errorf(cni.ErrLimited, "net.ipv4.ip_forward is 0: no container's packet leaves this host").
			WithDetails("sysctl -w net.ipv4.ip_forward=1, or start lariat-network-manager, which sets it")
	}
	k, err := p.Kernel()
	if err != nil {
		return cni.Errorf(cni.ErrNotAvailable, "%w", err)
	}
	defer k.Close()
	if !strict {
		return nil // a device that is missing is made by the manager, or by the next ADD
	}
	if ok, err := k.Joined(ctx, s.Device, nil); err != nil || !ok {
		return cni.Errorf(cni.ErrLimited, "network %s: device %s is missing on this host", r.Conf.Name,
			s.Device).WithDetails("check: systemctl status lariat-network-manager; lariat plan --diff")
	}
	return nil
}

func (p Plugin) gc(ctx context.Context, r *cni.Request) error {
	c, err := p.open(r)
	if err != nil {
		return err
	}
	if r.Valid == nil {
		return nil // no list is not an empty list: cnitool calls like this
	}
	k, err := p.Kernel()
	if err != nil {
		return cni.Errorf(cni.ErrKernel, "%w", err)
	}
	defer k.Close()
	names, records, err := c.unlisted(ctx, k)
	errs := []error{err}
	if err := k.DelEndpoints(ctx, names); err != nil {
		// Their addresses are in use still: nothing is released this time.
		return join(append(errs, cni.Errorf(cni.ErrKernel, "remove %d ports: %w", len(names), err)))
	}
	keep := *r.Valid
	if !c.owned {
		_, err := c.delegate(ctx, "GC", metadata.AttachmentID{})
		errs = append(errs, err)
		// None of the reference IPAM plugins has a GC of its own, and their library answers one with success. A DEL
		// they have.
		for _, id := range records {
			if _, err := c.delegate(ctx, "DEL", id); err != nil {
				errs = append(errs, err)
				keep = append(keep, id) // so that the record is there for the next GC
			}
		}
	}
	return join(append(errs, c.client.Collect(ctx, r.Conf.Name, keep)))
}

// unlisted are the host ends of this network's ports that the list does not name: by their alias, and, for
// one whose ADD was killed before it had an alias, by the journal. The journal's unlisted attachments are
// told too.
func (c *call) unlisted(ctx context.Context, k kernel.Kernel) (names []string, ids []metadata.AttachmentID, err error) {
	keep, listed := make(map[string]bool, len(*c.Valid)), make(map[metadata.AttachmentID]bool, len(*c.Valid))
	for _, id := range *c.Valid {
		keep[attach.HostName(id)], listed[id] = true, true
	}
	ports, err := k.Veths(ctx)
	records, jerr := c.client.Journal.List(c.Conf.Name)
	drop := map[string]bool{}
	for _, p := range ports {
		if p.Alias.Network != c.Conf.Name {
			keep[p.Name] = true
		} else if !keep[p.Name] {
			drop[p.Name] = true
		}
	}
	for _, r := range records {
		if !listed[r.AttachmentID] {
			if name := attach.HostName(r.AttachmentID); !keep[name] {
				drop[name] = true
			}
			ids = append(ids, r.AttachmentID)
		}
	}
	return slices.Sorted(maps.Keys(drop)), ids, errors.Join(err, jerr)
}
