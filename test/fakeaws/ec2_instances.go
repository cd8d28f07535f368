package fakeaws

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Account is the owner of all objects.
const Account = "123456789012"

const (
	rootDevice   = "/dev/xvda"
	defaultVPC   = "vpc-0000000000000000a"
	defaultGroup = "sg-0000000000000000a"
)

// Instance is a machine. AddInstance sets zero members.
type Instance struct {
	ID             string
	Type           string // "": m7i.large, or m4.large without Nitro
	Zone           string // "": the subnet's, or the first
	ZoneID         string // follows from Zone
	SubnetID       string // "": the zone's own
	VPCID          string
	SecurityGroups []string
	PrivateIP      netip.Addr
	PrivateDNSName string // follows from PrivateIP
	NICs           int    // 0: 1
	MaxVolumes     int    // the limit of attachments, with the root volume. 0: 28, or 40 without Nitro
	Dedicated      bool   // NICs do not count against MaxVolumes, as they do on most Nitro types
	State          string // "": running
	Nitro          bool   // volumes are NVMe drives; otherwise Xen's
}

type instance struct {
	Instance
	mac, imds string
	root      string // the root volume, which is in no other list
}

// others returns the part of MaxVolumes that is not for volumes.
func (in *instance) others() int {
	if in.Dedicated {
		return 0
	}
	return in.NICs
}

// AddInstance starts an instance and its metadata service. It also adds the instance's subnet and
// groups if they do not exist.
func (c *Cloud) AddInstance(i Instance) *Instance {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := len(c.instances) + 1
	i.ID = cmp.Or(i.ID, newID("i"))
	if at := slices.IndexFunc(c.subnets, func(s subnet) bool { return s.ID == i.SubnetID }); at >= 0 {
		i.Zone, i.VPCID = cmp.Or(i.Zone, c.subnets[at].Zone), cmp.Or(i.VPCID, c.subnets[at].VPC)
	}
	i.Zone, i.VPCID = cmp.Or(i.Zone, c.zoneNames()[0]), cmp.Or(i.VPCID, defaultVPC)
	i.ZoneID = cmp.Or(i.ZoneID, c.zones()[i.Zone])
	if i.SubnetID == "" {
		i.SubnetID = c.subnets[slices.IndexFunc(c.subnets, func(s subnet) bool { return s.Zone == i.Zone })].ID
	} else if !slices.ContainsFunc(c.subnets, func(s subnet) bool { return s.ID == i.SubnetID }) {
		c.subnets = append(c.subnets, subnet{i.SubnetID, i.VPCID, i.Zone})
	}
	if i.SecurityGroups == nil {
		i.SecurityGroups = []string{defaultGroup}
	}
	for _, id := range i.SecurityGroups {
		if !slices.ContainsFunc(c.groups, func(g group) bool { return g.ID == id }) {
			c.groups = append(c.groups, group{id, i.VPCID})
		}
	}
	if !i.PrivateIP.IsValid() {
		i.PrivateIP = netip.AddrFrom4([4]byte{10, 0, byte(n >> 8), byte(n)})
	}
	i.PrivateDNSName = cmp.Or(i.PrivateDNSName, "ip-"+strings.ReplaceAll(i.PrivateIP.String(), ".", "-")+"."+c.o.Region+
		".compute.internal")
	i.State, i.NICs = cmp.Or(i.State, "running"), cmp.Or(i.NICs, 1)
	if i.Nitro {
		i.Type, i.MaxVolumes = cmp.Or(i.Type, "m7i.large"), cmp.Or(i.MaxVolumes, 28)
	} else {
		i.Type, i.MaxVolumes, i.Dedicated = cmp.Or(i.Type, "m4.large"), cmp.Or(i.MaxVolumes, 40), true
	}
	in := &instance{Instance: i, mac: fmt.Sprintf("0e:fa:ce:00:%02x:%02x", n>>8, n&0xff), root: newID("vol")}
	in.imds = listen(c.t, c.metadata(in.Instance, in.mac))
	c.instances = append(c.instances, in)
	return &i
}

// SetInstanceState moves an instance to a state of EC2: pending, running, stopping, stopped,
// shutting-down, terminated. Volumes of a terminated instance are detached, as in AWS. Other
// volumes stay.
func (c *Cloud) SetInstanceState(id, state string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	in, e := c.instance(id)
	c.must(e)
	in.State = state
	for _, v := range c.volumes {
		if state == "terminated" && v.attached != nil && v.attached.instance == id {
			c.must(c.release(v))
		}
	}
}

func (c *Cloud) instance(id string) (*instance, *apiError) {
	i := slices.IndexFunc(c.instances, func(in *instance) bool { return in.ID == id })
	if i < 0 {
		return nil, fail("InvalidInstanceID.NotFound", "The instance ID '%s' does not exist", id)
	}
	return c.instances[i], nil
}

// noAccount unsets AWS's variables of a developer's environment, so that no test reaches a real
// account.
var noAccount = []string{
	"AWS_CONFIG_FILE=/dev/null", "AWS_SHARED_CREDENTIALS_FILE=/dev/null", "AWS_PROFILE=", "AWS_REGION=",
	"AWS_DEFAULT_REGION=", "AWS_SESSION_TOKEN=",
	"AWS_ENDPOINT_URL_EC2=", "AWS_ENDPOINT_URL_EFS=", "AWS_ROLE_ARN=", "AWS_WEB_IDENTITY_TOKEN_FILE=",
	"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI=",
	"AWS_CONTAINER_CREDENTIALS_FULL_URI=", "AWS_EC2_METADATA_DISABLED=",
}

// Env returns the environment of a process on an instance: the endpoints and a user's keys. The
// metadata service supplies the region.
func (c *Cloud) Env(instanceID string) []string {
	return append(c.RoleEnv(instanceID), "AWS_ACCESS_KEY_ID="+AccessKeyID, "AWS_SECRET_ACCESS_KEY="+SecretAccessKey)
}

// RoleEnv returns Env without keys, so that the keys come from the instance's role.
func (c *Cloud) RoleEnv(instanceID string) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	in, e := c.instance(instanceID)
	c.must(e)
	return append(slices.Clone(noAccount),
		"AWS_ENDPOINT_URL="+c.url, "AWS_EC2_METADATA_SERVICE_ENDPOINT="+in.imds, "AWS_ACCESS_KEY_ID=",
		"AWS_SECRET_ACCESS_KEY=")
}

type reservationXML struct {
	ID        string            `xml:"reservationId"`
	Owner     string            `xml:"ownerId"`
	Instances list[instanceXML] `xml:"instancesSet"`
}

func (c *Cloud) describeInstances(p *params) (any, *apiError) {
	return describe(p, listing[*instance, reservationXML]{"InstanceId", "instance-id", "InvalidInstanceID.NotFound",
		"reservationSet", func(in *instance) fields {
			return fields{
				"instance-id": {in.ID}, "instance-state-name": {in.State}, "instance-type": {in.Type},
				"availability-zone": {in.Zone}, "subnet-id": {in.SubnetID},
				"vpc-id": {in.VPCID}, "private-dns-name": {in.PrivateDNSName}, "private-ip-address": {in.PrivateIP.String()},
			}
		}, func(in *instance) reservationXML {
			return reservationXML{"r-" + strings.TrimPrefix(in.ID, "i-"), Account,
				list[instanceXML]{[]instanceXML{c.instanceXML(in)}}}
		}}, c.instances)
}

type instanceXML struct {
	ID    string `xml:"instanceId"`
	Type  string `xml:"instanceType"`
	State struct {
		Code int    `xml:"code"`
		Name string `xml:"name"`
	} `xml:"instanceState"`
	Zone       string          `xml:"placement>availabilityZone"`
	ZoneID     string          `xml:"placement>availabilityZoneId"`
	DNSName    string          `xml:"privateDnsName"`
	IP         string          `xml:"privateIpAddress"`
	SubnetID   string          `xml:"subnetId"`
	VPCID      string          `xml:"vpcId"`
	Hypervisor string          `xml:"hypervisor"`
	RootDevice string          `xml:"rootDeviceName"`
	Volumes    list[deviceXML] `xml:"blockDeviceMapping"`
	NICs       list[nicXML]    `xml:"networkInterfaceSet"`
	Groups     list[groupXML]  `xml:"groupSet"`
}

type deviceXML struct {
	Name     string `xml:"deviceName"`
	VolumeID string `xml:"ebs>volumeId"`
	State    string `xml:"ebs>status"`
}

type nicXML struct {
	ID       string         `xml:"networkInterfaceId"`
	MAC      string         `xml:"macAddress"`
	SubnetID string         `xml:"subnetId"`
	VPCID    string         `xml:"vpcId"`
	Index    int            `xml:"attachment>deviceIndex"`
	Groups   list[groupXML] `xml:"groupSet"`
}

type groupXML struct {
	ID   string `xml:"groupId"`
	Name string `xml:"groupName"`
}

var stateCodes = map[string]int{"pending": 0, "running": 16, "shutting-down": 32, "terminated": 48, "stopping": 64,
	"stopped": 80}

func (c *Cloud) instanceXML(in *instance) instanceXML {
	// EC2 reports "xen" for both kinds here. Only the type's description distinguishes the kinds.
	out := instanceXML{
		ID: in.ID, Type: in.Type, Zone: in.Zone, ZoneID: in.ZoneID, DNSName: in.PrivateDNSName, IP: in.PrivateIP.String(),
		SubnetID: in.SubnetID, VPCID: in.VPCID, Hypervisor: "xen", RootDevice: rootDevice,
	}
	out.State.Code, out.State.Name = stateCodes[in.State], in.State
	out.Volumes.Items = []deviceXML{{rootDevice, in.root, "attached"}}
	for _, v := range c.volumes {
		if v.attached == nil || v.attached.instance != in.ID {
			continue
		}
		device := v.attached.device
		if state := v.lookAttached(); state != "" {
			out.Volumes.Items = append(out.Volumes.Items, deviceXML{device, v.ID, state})
		}
	}
	for _, id := range in.SecurityGroups {
		out.Groups.Items = append(out.Groups.Items, groupXML{id, groupName(id)})
	}
	for i := range in.NICs {
		out.NICs.Items = append(out.NICs.Items, nicXML{fmt.Sprintf("eni-%s%x", strings.TrimPrefix(in.ID, "i-")[:16], i),
			in.mac, in.SubnetID, in.VPCID, i, out.Groups})
	}
	return out
}

type typeXML struct {
	Type       string `xml:"instanceType"`
	Hypervisor string `xml:"hypervisor"`
	NVMe       string `xml:"ebsInfo>nvmeSupport"`
	Max        int    `xml:"ebsInfo>maximumEbsAttachments"`
	Limit      string `xml:"ebsInfo>attachmentLimitType"`
	MaxNICs    int    `xml:"networkInfo>maximumNetworkInterfaces"`
}

func (c *Cloud) describeInstanceTypes(p *params) (any, *apiError) {
	var kinds []*instance
	for _, in := range c.instances {
		if !slices.ContainsFunc(kinds, func(k *instance) bool { return k.Type == in.Type }) {
			kinds = append(kinds, in)
		}
	}
	return describe(p, listing[*instance, typeXML]{"InstanceType", "instance-type", "InvalidInstanceType",
		"instanceTypeSet", func(in *instance) fields {
			return fields{"instance-type": {in.Type}}
		}, func(in *instance) typeXML {
			x := typeXML{in.Type, "xen", "unsupported", in.MaxVolumes, "shared", 3}
			if in.Nitro {
				x.Hypervisor, x.NVMe = "nitro", "required"
			}
			if in.Dedicated {
				x.Limit = "dedicated"
			}
			return x
		}}, kinds)
}
