package fakeaws

import (
	"net/netip"
	"slices"
)

// MountTarget is the server of a file system in a zone.
type MountTarget struct {
	ID             string     `json:"MountTargetId"`
	FileSystemID   string     `json:"FileSystemId"`
	State          string     `json:"LifeCycleState"`
	SubnetID       string     `json:"SubnetId"`
	VPCID          string     `json:"VpcId"`
	Zone           string     `json:"AvailabilityZoneName"`
	ZoneID         string     `json:"AvailabilityZoneId"`
	IP             netip.Addr `json:"IpAddress"`
	NIC            string     `json:"NetworkInterfaceId"`
	Owner          string     `json:"OwnerId"`
	SecurityGroups []string   `json:"-"`
}

type mountTarget struct {
	MountTarget
	life progress
}

// MountTargets returns all mount targets that are not deleted.
func (c *Cloud) MountTargets() (all []MountTarget) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, m := range c.efs.mountTargets {
		if s := m.life.truth(); s != "deleting" && s != "deleted" {
			out := m.MountTarget
			out.State, out.SecurityGroups = s, slices.Clone(m.SecurityGroups)
			all = append(all, out)
		}
	}
	return all
}

// MountTargetAddress sets the function for the addresses of new mount targets by subnet. The
// default address is 127.0.0.1.
func (c *Cloud) MountTargetAddress(address func(subnetID string) netip.Addr) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.efs.address = address
}

func (c *Cloud) mountTarget(id string) (*mountTarget, *apiError) {
	return find(c.efs.mountTargets, bare(id), "MountTargetNotFound",
		func(m *mountTarget) (string, *progress) { return m.ID, &m.life })
}

func (c *Cloud) createMountTarget(r *efsRequest) (any, *apiError) {
	var in struct {
		FileSystemId, SubnetId string     //nolint:revive // as the protocol writes it
		IpAddress              netip.Addr //nolint:revive // likewise
		SecurityGroups         []string
	}
	if e := r.decode(&in); e != nil {
		return nil, e
	}
	f, e := c.fileSystem(in.FileSystemId)
	if e != nil {
		return nil, e
	}
	if s := f.life.truth(); s != "available" {
		return nil, fail("IncorrectFileSystemLifeCycleState", "File system '%s' is '%s'", f.ID, s)
	}
	at := slices.IndexFunc(c.subnets, func(s subnet) bool { return s.ID == in.SubnetId })
	if at < 0 {
		return nil, fail("SubnetNotFound", "The subnet ID '%s' does not exist", in.SubnetId)
	}
	subnet := c.subnets[at]
	if f.Zone != "" && f.Zone != subnet.Zone {
		return nil, fail("AvailabilityZonesMismatch", "The file system is in '%s', the subnet in '%s'", f.Zone, subnet.Zone)
	}
	for _, m := range c.efs.mountTargets {
		if m.FileSystemID != f.ID || m.life.truth() == "deleted" {
			continue
		}
		if m.Zone == subnet.Zone {
			return nil, fail("MountTargetConflict", "mount target already exists in this AZ")
		}
		if m.VPCID != subnet.VPC {
			return nil, fail("MountTargetConflict", "requested subnet for new mount target is not in the same VPC as "+
				"existing mount targets")
		}
	}
	if len(in.SecurityGroups) == 0 {
		in.SecurityGroups = []string{defaultGroup}
	} else if e := c.checkGroups(in.SecurityGroups, subnet.VPC); e != nil {
		return nil, e
	}
	ip := in.IpAddress
	if !ip.IsValid() {
		ip = c.efs.address(subnet.ID)
	}
	m := &mountTarget{life: c.begin("creating", "available"), MountTarget: MountTarget{
		ID: newID("fsmt"), FileSystemID: f.ID, SubnetID: subnet.ID, VPCID: subnet.VPC, Zone: subnet.Zone,
		ZoneID: c.zones()[subnet.Zone], IP: ip, NIC: newID("eni"), Owner: Account,
		SecurityGroups: in.SecurityGroups,
	}}
	c.efs.mountTargets = append(c.efs.mountTargets, m)
	out := m.MountTarget
	out.State = m.life.truth()
	return out, nil
}

func (c *Cloud) checkGroups(ids []string, vpc string) *apiError {
	if len(ids) > 5 {
		return fail("SecurityGroupLimitExceeded", "%d are more than 5", len(ids))
	}
	for _, id := range ids {
		if !slices.Contains(c.groups, group{id, vpc}) {
			return fail("SecurityGroupNotFound", "The security group '%s' does not exist in '%s'", id, vpc)
		}
	}
	return nil
}

func (c *Cloud) describeMountTargets(r *efsRequest) (any, *apiError) {
	fs, id := bare(r.text("FileSystemId")), bare(r.text("MountTargetId"))
	if ap := r.text("AccessPointId"); ap != "" && fs == "" && id == "" {
		p, e := c.accessPoint(ap)
		if e != nil {
			return nil, e
		}
		fs = p.FileSystemID
	}
	if (fs == "") == (id == "") {
		return nil, fail("BadRequest", "One of FileSystemId, MountTargetId and AccessPointId must be given")
	}
	if fs != "" {
		if _, e := c.fileSystem(fs); e != nil {
			return nil, e
		}
	}
	shown := []MountTarget{}
	for _, m := range c.efs.mountTargets {
		if m.FileSystemID != fs && m.ID != id {
			continue
		}
		if state := m.life.look(); state != "deleted" {
			out := m.MountTarget
			out.State = state
			shown = append(shown, out)
		}
	}
	if id != "" && len(shown) == 0 {
		return nil, fail("MountTargetNotFound", "Mount target '%s' does not exist.", id)
	}
	part, next, e := page(r, shown, "MaxItems", "Marker")
	return struct {
		MountTargets []MountTarget
		NextMarker   string `json:",omitempty"`
	}{part, next}, e
}

func (c *Cloud) deleteMountTarget(r *efsRequest) (any, *apiError) {
	m, e := c.mountTarget(r.id)
	if e == nil {
		c.remove(&m.life)
	}
	return nil, e
}

type groupsJSON struct{ SecurityGroups []string }

func (c *Cloud) describeMountTargetSecurityGroups(r *efsRequest) (any, *apiError) {
	m, e := c.mountTarget(r.id)
	if e != nil {
		return nil, e
	}
	return groupsJSON{m.SecurityGroups}, nil
}

func (c *Cloud) modifyMountTargetSecurityGroups(r *efsRequest) (any, *apiError) {
	var in groupsJSON
	if e := r.decode(&in); e != nil {
		return nil, e
	}
	m, e := c.mountTarget(r.id)
	if e != nil {
		return nil, e
	}
	if s := m.life.truth(); s != "available" {
		return nil, fail("IncorrectMountTargetState", "Mount target '%s' is '%s'", m.ID, s)
	}
	if e := c.checkGroups(in.SecurityGroups, m.VPCID); e != nil {
		return nil, e
	}
	m.SecurityGroups = in.SecurityGroups
	return nil, nil
}
