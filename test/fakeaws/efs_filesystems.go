package fakeaws

import (
	"cmp"
	"slices"
)

// FileSystem is a file system of EFS. Answers describe it in the same form.
type FileSystem struct {
	ID              string `json:"FileSystemId"`
	ARN             string `json:"FileSystemArn"`
	CreationToken   string
	State           string `json:"LifeCycleState"`
	Name            string `json:",omitempty"`
	Created         int64  `json:"CreationTime"` // seconds since 1970
	Zone            string `json:"AvailabilityZoneName,omitempty"`
	ZoneID          string `json:"AvailabilityZoneId,omitempty"`
	Encrypted       bool
	KMSKeyID        string `json:"KmsKeyId,omitempty"`
	PerformanceMode string
	ThroughputMode  string
	Provisioned     float64               `json:"ProvisionedThroughputInMibps,omitempty"`
	MountTargets    int                   `json:"NumberOfMountTargets"`
	Owner           string                `json:"OwnerId"`
	Size            struct{ Value int64 } `json:"SizeInBytes"`
	Tags            Tags
}

type fileSystem struct {
	FileSystem
	life progress
}

// FileSystems returns all file systems that are not deleted.
func (c *Cloud) FileSystems() (all []FileSystem) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, f := range c.efs.fileSystems {
		if s := f.life.truth(); s != "deleting" && s != "deleted" {
			all = append(all, c.describe(f, s))
		}
	}
	return all
}

func (c *Cloud) describe(f *fileSystem, state string) FileSystem {
	out := f.FileSystem
	out.State, out.Tags, out.Name = state, cloneTags(f.Tags), f.Tags["Name"]
	for _, m := range c.efs.mountTargets {
		if m.FileSystemID == f.ID && m.life.truth() != "deleted" {
			out.MountTargets++
		}
	}
	return out
}

func (c *Cloud) fileSystem(id string) (*fileSystem, *apiError) {
	return find(c.efs.fileSystems, bare(id), "FileSystemNotFound", func(f *fileSystem) (string, *progress) {
		return f.ID,
			&f.life
	})
}

func (c *Cloud) createFileSystem(r *efsRequest) (any, *apiError) {
	var in struct {
		CreationToken                string
		AvailabilityZoneName         string
		Encrypted                    bool
		KmsKeyId                     string //nolint:revive // as the protocol writes it
		PerformanceMode              string
		ThroughputMode               string
		ProvisionedThroughputInMibps float64
		Tags                         Tags
	}
	if e := r.decode(&in); e != nil {
		return nil, e
	}
	for _, f := range c.efs.fileSystems {
		if f.CreationToken == in.CreationToken && f.life.truth() != "deleted" {
			e := fail("FileSystemAlreadyExists", "File system '%s' already exists with creation token '%s'", f.ID,
				in.CreationToken)
			e.More = map[string]string{"FileSystemId": f.ID}
			return nil, e
		}
	}
	id := newID("fs")
	f := &fileSystem{life: c.begin("creating", "available"), FileSystem: FileSystem{
		ID: id, ARN: c.arn("file-system", id), CreationToken: in.CreationToken, Created: c.o.Now().Unix(),
		Zone: in.AvailabilityZoneName, ZoneID: c.zones()[in.AvailabilityZoneName],
		Encrypted: in.Encrypted, KMSKeyID: in.KmsKeyId, PerformanceMode: cmp.Or(in.PerformanceMode, "generalPurpose"),
		ThroughputMode: cmp.Or(in.ThroughputMode, "bursting"),
		Provisioned:    in.ProvisionedThroughputInMibps, Owner: Account, Tags: in.Tags,
	}}
	bad := func(text string) (any, *apiError) { return nil, fail("BadRequest", "%s", text) }
	switch {
	case in.CreationToken == "" || len(in.CreationToken) > 64:
		return bad("CreationToken must have 1 to 64 characters")
	case in.AvailabilityZoneName != "" && f.ZoneID == "":
		return nil, fail("UnsupportedAvailabilityZone", "'%s' is not supported", in.AvailabilityZoneName)
	case in.KmsKeyId != "" && !in.Encrypted:
		return bad("KmsKeyId can be specified only if Encrypted is true")
	case !slices.Contains([]string{"generalPurpose", "maxIO"}, f.PerformanceMode):
		return bad("PerformanceMode must be generalPurpose or maxIO")
	case !slices.Contains([]string{"bursting", "provisioned", "elastic"}, f.ThroughputMode):
		return bad("ThroughputMode must be bursting, provisioned or elastic")
	case (f.ThroughputMode == "provisioned") != (f.Provisioned > 0):
		return bad("ProvisionedThroughputInMibps goes with ThroughputMode provisioned")
	case f.PerformanceMode == "maxIO" && (f.ThroughputMode == "elastic" || f.Zone != ""):
		return bad("maxIO goes neither with elastic throughput nor with One Zone")
	}
	c.efs.fileSystems = append(c.efs.fileSystems, f)
	return c.describe(f, f.life.truth()), nil
}

func (c *Cloud) arn(kind, id string) string {
	partition, _ := c.partition()
	return "arn:" + partition + ":elasticfilesystem:" + c.o.Region + ":" + Account + ":" + kind + "/" + id
}

func (c *Cloud) describeFileSystems(r *efsRequest) (any, *apiError) {
	id, token := bare(r.text("FileSystemId")), r.text("CreationToken")
	if id != "" && token != "" {
		return nil, fail("BadRequest", "FileSystemId and CreationToken exclude each other")
	}
	shown := []FileSystem{}
	for _, f := range c.efs.fileSystems {
		if id != "" && f.ID != id || token != "" && f.CreationToken != token {
			continue
		}
		if state := f.life.look(); state != "deleted" {
			shown = append(shown, c.describe(f, state))
		}
	}
	if id != "" && len(shown) == 0 {
		return nil, fail("FileSystemNotFound", "File system '%s' does not exist.", id)
	}
	part, next, e := page(r, shown, "MaxItems", "Marker")
	return struct {
		FileSystems []FileSystem
		NextMarker  string `json:",omitempty"`
	}{part, next}, e
}

func (c *Cloud) deleteFileSystem(r *efsRequest) (any, *apiError) {
	f, e := c.fileSystem(r.id)
	if e != nil {
		return nil, e
	}
	if n := c.describe(f, "").MountTargets; n > 0 {
		return nil, fail("FileSystemInUse", "You cannot delete a file system that has mount targets: there are %d", n)
	}
	f.life = c.begin("deleting", "deleted")
	for _, p := range c.efs.accessPoints {
		if p.FileSystemID == f.ID {
			p.life = c.begin("deleted")
		}
	}
	return nil, nil
}
