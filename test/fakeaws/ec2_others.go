package fakeaws

import (
	"fmt"
	"maps"
	"slices"
	"time"
)

// What instances and volumes are in, or come from: snapshots, subnets, security groups, zones.

type snapshot struct {
	id        string
	gib       int
	tags      map[string]string
	encrypted bool
	at        time.Time
}

type subnet struct{ ID, VPC, Zone string }

type group struct{ ID, VPC string }

// AddSubnet adds one beside those that each zone has.
func (c *Cloud) AddSubnet(id, vpcID, zone string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.subnets = append(c.subnets, subnet{id, vpcID, zone})
}

// AddSecurityGroup adds one beside the default one of the zones' network.
func (c *Cloud) AddSecurityGroup(id, vpcID string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.groups = append(c.groups, group{id, vpcID})
}

// AddSnapshot adds a complete snapshot, of so many GiB.
func (c *Cloud) AddSnapshot(id string, gib int, tags map[string]string, encrypted bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.snapshots = append(c.snapshots, snapshot{id, gib, cloneTags(tags), encrypted, c.o.Now()})
}

func (c *Cloud) snapshot(id string) (snapshot, *apiError) {
	i := slices.IndexFunc(c.snapshots, func(s snapshot) bool { return s.id == id })
	if i < 0 {
		return snapshot{}, fail("InvalidSnapshot.NotFound", "The snapshot '%s' does not exist.", id)
	}
	return c.snapshots[i], nil
}

func (c *Cloud) describeSnapshots(p *params) (any, *apiError) {
	s, e := p.selection("SnapshotId")
	if e != nil {
		return nil, e
	}
	owners := p.texts("Owner")
	page, next, e := choose(s, "InvalidSnapshot.NotFound", c.snapshots, func(s snapshot) fields {
		if len(owners) > 0 && !slices.Contains(owners, "self") && !slices.Contains(owners, Account) {
			return nil
		}
		return fields{"snapshot-id": {s.id}, "status": {"completed"}, "owner-id": {Account}, "encrypted": {fmt.Sprint(s.encrypted)}, "volume-size": {fmt.Sprint(s.gib)}}.withTags(s.tags)
	}, "snapshot-id")
	if e != nil {
		return nil, e
	}
	type snapshotXML struct {
		ID        string       `xml:"snapshotId"`
		Size      int          `xml:"volumeSize"`
		State     string       `xml:"status"`
		Owner     string       `xml:"ownerId"`
		At        time.Time    `xml:"startTime"`
		Progress  string       `xml:"progress"`
		Encrypted bool         `xml:"encrypted"`
		Tags      list[tagXML] `xml:"tagSet"`
	}
	var out struct {
		Snapshots list[snapshotXML] `xml:"snapshotSet"`
		NextToken string            `xml:"nextToken,omitempty"`
	}
	for _, s := range page {
		out.Snapshots.Items = append(out.Snapshots.Items, snapshotXML{s.id, s.gib, "completed", Account, s.at.UTC(), "100%", s.encrypted, tagsXML(s.tags)})
	}
	out.NextToken = next
	return out, nil
}

func (c *Cloud) describeSubnets(p *params) (any, *apiError) {
	s, e := p.selection("SubnetId")
	if e != nil {
		return nil, e
	}
	page, next, e := choose(s, "InvalidSubnetID.NotFound", c.subnets, func(s subnet) fields {
		return fields{"subnet-id": {s.ID}, "vpc-id": {s.VPC}, "availability-zone": {s.Zone}, "availability-zone-id": {c.zones()[s.Zone]}, "state": {"available"}}
	}, "subnet-id")
	if e != nil {
		return nil, e
	}
	type subnetXML struct {
		ID     string `xml:"subnetId"`
		VPC    string `xml:"vpcId"`
		Zone   string `xml:"availabilityZone"`
		ZoneID string `xml:"availabilityZoneId"`
		State  string `xml:"state"`
		Owner  string `xml:"ownerId"`
	}
	var out struct {
		Subnets   list[subnetXML] `xml:"subnetSet"`
		NextToken string          `xml:"nextToken,omitempty"`
	}
	for _, s := range page {
		out.Subnets.Items = append(out.Subnets.Items, subnetXML{s.ID, s.VPC, s.Zone, c.zones()[s.Zone], "available", Account})
	}
	out.NextToken = next
	return out, nil
}

func groupName(id string) string {
	if id == defaultGroup {
		return "default"
	}
	return "name-of-" + id
}

func (c *Cloud) describeSecurityGroups(p *params) (any, *apiError) {
	s, e := p.selection("GroupId")
	if e != nil {
		return nil, e
	}
	page, next, e := choose(s, "InvalidGroup.NotFound", c.groups, func(g group) fields {
		return fields{"group-id": {g.ID}, "group-name": {groupName(g.ID)}, "vpc-id": {g.VPC}}
	}, "group-id")
	if e != nil {
		return nil, e
	}
	type securityGroupXML struct {
		ID          string `xml:"groupId"`
		Name        string `xml:"groupName"`
		Description string `xml:"groupDescription"`
		VPC         string `xml:"vpcId"`
		Owner       string `xml:"ownerId"`
	}
	var out struct {
		Groups    list[securityGroupXML] `xml:"securityGroupInfo"`
		NextToken string                 `xml:"nextToken,omitempty"`
	}
	for _, g := range page {
		out.Groups.Items = append(out.Groups.Items, securityGroupXML{g.ID, groupName(g.ID), "a group", g.VPC, Account})
	}
	out.NextToken = next
	return out, nil
}

func (c *Cloud) describeAvailabilityZones(p *params) (any, *apiError) {
	s, e := p.selection("ZoneName")
	if e != nil {
		return nil, e
	}
	page, _, e := choose(s, "InvalidParameterValue", slices.Sorted(maps.Keys(c.zones())), func(zone string) fields {
		return fields{"zone-name": {zone}, "zone-id": {c.zones()[zone]}, "region-name": {c.o.Region}, "state": {"available"}}
	}, "zone-name")
	if e != nil {
		return nil, e
	}
	type zoneXML struct {
		Name   string `xml:"zoneName"`
		ID     string `xml:"zoneId"`
		Region string `xml:"regionName"`
		State  string `xml:"zoneState"`
		Type   string `xml:"zoneType"`
	}
	var out struct {
		Zones list[zoneXML] `xml:"availabilityZoneInfo"`
	}
	for _, zone := range page {
		out.Zones.Items = append(out.Zones.Items, zoneXML{zone, c.zones()[zone], c.o.Region, "available", "availability-zone"})
	}
	return out, nil
}
