package fakeaws

import (
	"fmt"
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

// AddSubnet adds a subnet to the default subnets of the zones.
func (c *Cloud) AddSubnet(id, vpcID, zone string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.subnets = append(c.subnets, subnet{id, vpcID, zone})
}

// AddSecurityGroup adds a group to the default group of the zones' network.
func (c *Cloud) AddSecurityGroup(id, vpcID string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.groups = append(c.groups, group{id, vpcID})
}

// AddSnapshot adds a complete snapshot with a size in GiB.
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

func (c *Cloud) describeSnapshots(p *params) (any, *apiError) {
	owners := p.texts("Owner")
	return describe(p, listing[snapshot, snapshotXML]{"SnapshotId", "snapshot-id", "InvalidSnapshot.NotFound",
		"snapshotSet", func(s snapshot) fields {
			if len(owners) > 0 && !slices.Contains(owners, "self") && !slices.Contains(owners, Account) {
				return nil
			}
			return fields{"snapshot-id": {s.id}, "status": {"completed"}, "owner-id": {Account},
				"encrypted": {fmt.Sprint(s.encrypted)}, "volume-size": {fmt.Sprint(s.gib)}}.withTags(s.tags)
		}, func(s snapshot) snapshotXML {
			return snapshotXML{s.id, s.gib, "completed", Account, s.at.UTC(), "100%", s.encrypted, tagsXML(s.tags)}
		}}, c.snapshots)
}

type subnetXML struct {
	ID     string `xml:"subnetId"`
	VPC    string `xml:"vpcId"`
	Zone   string `xml:"availabilityZone"`
	ZoneID string `xml:"availabilityZoneId"`
	State  string `xml:"state"`
	Owner  string `xml:"ownerId"`
}

func (c *Cloud) describeSubnets(p *params) (any, *apiError) {
	return describe(p, listing[subnet, subnetXML]{"SubnetId", "subnet-id", "InvalidSubnetID.NotFound", "subnetSet",
		func(s subnet) fields {
			return fields{"subnet-id": {s.ID}, "vpc-id": {s.VPC}, "availability-zone": {s.Zone},
				"availability-zone-id": {c.zones()[s.Zone]}, "state": {"available"}}
		}, func(s subnet) subnetXML {
			return subnetXML{s.ID, s.VPC, s.Zone, c.zones()[s.Zone], "available", Account}
		}}, c.subnets)
}

func groupName(id string) string {
	if id == defaultGroup {
		return "default"
	}
	return "name-of-" + id
}

type securityGroupXML struct {
	ID          string `xml:"groupId"`
	Name        string `xml:"groupName"`
	Description string `xml:"groupDescription"`
	VPC         string `xml:"vpcId"`
	Owner       string `xml:"ownerId"`
}

func (c *Cloud) describeSecurityGroups(p *params) (any, *apiError) {
	return describe(p, listing[group, securityGroupXML]{"GroupId", "group-id", "InvalidGroup.NotFound",
		"securityGroupInfo", func(g group) fields {
			return fields{"group-id": {g.ID}, "group-name": {groupName(g.ID)}, "vpc-id": {g.VPC}}
		}, func(g group) securityGroupXML {
			return securityGroupXML{g.ID, groupName(g.ID), "a group", g.VPC, Account}
		}}, c.groups)
}

type zoneXML struct {
	Name   string `xml:"zoneName"`
	ID     string `xml:"zoneId"`
	Region string `xml:"regionName"`
	State  string `xml:"zoneState"`
	Type   string `xml:"zoneType"`
}

func (c *Cloud) describeAvailabilityZones(p *params) (any, *apiError) {
	return describe(p, listing[string, zoneXML]{"ZoneName", "zone-name", "InvalidParameterValue", "availabilityZoneInfo",
		func(zone string) fields {
			return fields{"zone-name": {zone}, "zone-id": {c.zones()[zone]}, "region-name": {c.o.Region}, "state": {"available"}}
		}, func(zone string) zoneXML {
			return zoneXML{zone, c.zones()[zone], c.o.Region, "available", "availability-zone"}
		}}, c.zoneNames())
}
