package metadata

import (
	"maps"
	"net/netip"
	"slices"
)

// Attach adds an interface to a container's object. It changes no existing map or slice of the
// object, because a cache may share them.
func (c *Container) Attach(host, network string, req *AttachRequest, addresses []netip.Addr) {
	if len(c.Interfaces) == 0 {
		c.PreAssigned = c.Written && len(c.Addresses) > 0
	}
	if c.ID == "" {
		c.ID = req.ContainerID
	}
	c.Host = host
	if c.UUID == "" {
		c.UUID = req.UUID
	}
	if req.Name != "" {
		c.Name = req.Name
	}
	if c.Network == "" {
		c.Network = network
	}
	if c.MAC.IsZero() {
		c.MAC = req.MAC
	}
	if len(req.Labels) > 0 {
		all := maps.Clone(c.Labels)
		if all == nil {
			all = map[string]string{}
		}
		maps.Copy(all, req.Labels)
		c.Labels = all
	}
	c.State = "running"
	c.Interfaces = slices.Clone(c.Interfaces)
	at := c.interfaceIndex(network, req.IfName)
	if at < 0 {
		at, c.Interfaces = len(c.Interfaces), append(c.Interfaces, ContainerInterface{})
	}
	c.Interfaces[at] = ContainerInterface{Network: network, IfName: req.IfName, Addresses: addresses}
	c.uniteAddresses()
}

// Detach removes an interface, and reports whether the object still holds data worth keeping.
func (c *Container) Detach(network, ifname string) (keep bool) {
	c.Normalize()
	c.Interfaces = slices.DeleteFunc(slices.Clone(c.Interfaces), func(i ContainerInterface) bool {
		return i.Network == network && i.IfName == ifname
	})
	if len(c.Interfaces) == 0 {
		c.State = ""
		return c.PreAssigned
	}
	c.uniteAddresses()
	return true
}

// Attached reports whether the object lists an interface.
func (c *Container) Attached(network, ifname string) bool {
	return c.interfaceIndex(network, ifname) >= 0
}

func (c *Container) interfaceIndex(network, ifname string) int {
	return slices.IndexFunc(c.Interfaces, func(i ContainerInterface) bool {
		return i.Network == network && i.IfName == ifname
	})
}

// Normalize converts an object of an earlier version into the form of this version. It reports
// whether to keep the object.
func (c *Container) Normalize() (keep bool) {
	if c.Written = c.IsWritten(); !c.Written {
		c.PreAssigned = false
		c.uniteAddresses()
	}
	return c.Written || len(c.Interfaces) > 0
}

// Overwrite returns the object that results when a client PUTs c over the stored object. old is nil
// when none is stored. A client cannot change the fields that the service maintains.
func (c Container) Overwrite(old *Container) Container {
	c.Interfaces, c.PreAssigned = nil, false
	if old == nil || len(old.Interfaces) == 0 {
		return c
	}
	old.Normalize()
	c.Interfaces = old.Interfaces
	assigned := c.Addresses
	c.uniteAddresses()
	c.PreAssigned = old.PreAssigned
	if len(assigned) > 0 && !slices.Equal(assigned, c.Addresses) {
		c.Addresses, c.PreAssigned = assigned, true
	}
	return c
}

// uniteAddresses derives a container's addresses from its interfaces, unless the model assigned them.
func (c *Container) uniteAddresses() {
	if c.PreAssigned {
		return
	}
	c.Addresses = nil
	for _, i := range c.Interfaces {
		c.Addresses = append(c.Addresses, i.Addresses...)
	}
}
