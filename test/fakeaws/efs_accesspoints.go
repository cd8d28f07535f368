package fakeaws

import (
	"reflect"
	"regexp"
)

// AccessPoint is a directory of a file system under a name, optionally with a user of its own.
type AccessPoint struct {
	ID            string `json:"AccessPointId"`
	ARN           string `json:"AccessPointArn"`
	ClientToken   string
	FileSystemID  string         `json:"FileSystemId"`
	State         string         `json:"LifeCycleState"`
	Name          string         `json:",omitempty"`
	Owner         string         `json:"OwnerId"`
	PosixUser     *PosixUser     `json:",omitempty"`
	RootDirectory *RootDirectory `json:",omitempty"`
	Tags          Tags
}

// PosixUser is the user of all clients of an access point.
type PosixUser struct {
	Uid, Gid      int64   //nolint:revive // as the protocol writes it
	SecondaryGids []int64 `json:",omitempty"`
}

// RootDirectory is the directory of an access point, with the properties for its creation.
type RootDirectory struct {
	Path         string        `json:",omitempty"`
	CreationInfo *CreationInfo `json:",omitempty"`
}

// CreationInfo holds the properties of a directory to create.
type CreationInfo struct {
	OwnerUid, OwnerGid int64 //nolint:revive // as the protocol writes it
	Permissions        string
}

type accessPoint struct {
	AccessPoint
	asked createAccessPoint
	life  progress
}

type createAccessPoint struct {
	ClientToken   string
	FileSystemId  string //nolint:revive // as the protocol writes it
	PosixUser     *PosixUser
	RootDirectory *RootDirectory
	Tags          Tags
}

// AccessPoints returns all access points that are not deleted.
func (c *Cloud) AccessPoints() (all []AccessPoint) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range c.efs.accessPoints {
		if s := p.life.truth(); s != "deleting" && s != "deleted" {
			all = append(all, p.describe(s))
		}
	}
	return all
}

func (p *accessPoint) describe(state string) AccessPoint {
	out := p.AccessPoint
	out.State, out.Tags, out.Name = state, cloneTags(p.Tags), p.Tags["Name"]
	return out
}

func (c *Cloud) accessPoint(id string) (*accessPoint, *apiError) {
	return find(c.efs.accessPoints, bare(id), "AccessPointNotFound",
		func(p *accessPoint) (string, *progress) { return p.ID, &p.life })
}

// rootPath is the pattern of RootDirectory's path in AWS's documentation.
var rootPath = regexp.MustCompile(`^(/|(/[^.$#<>;` + "`" + `|&?{}^*/\n][^$#<>;` + "`" + `|&?{}^*/\n]*){1,4})$`)

var permissions = regexp.MustCompile(`^[0-7]{3,4}$`)

func (c *Cloud) createAccessPoint(r *efsRequest) (any, *apiError) {
	var in createAccessPoint
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
	for _, p := range c.efs.accessPoints {
		if p.ClientToken != in.ClientToken || p.life.truth() == "deleted" {
			continue
		}
		if reflect.DeepEqual(p.asked, in) {
			return p.describe(p.life.truth()), nil
		}
		e := fail("AccessPointAlreadyExists", "Access point already exists with client token '%s'", in.ClientToken)
		e.More = map[string]string{"AccessPointId": p.ID}
		return nil, e
	}
	root := RootDirectory{Path: "/"}
	if in.RootDirectory != nil {
		root = *in.RootDirectory
	}
	switch info := root.CreationInfo; {
	case in.ClientToken == "" || len(in.ClientToken) > 64:
		return nil, fail("BadRequest", "ClientToken must have 1 to 64 characters")
	case len(root.Path) > 100 || !rootPath.MatchString(root.Path):
		return nil, fail("BadRequest", "Value '%s' at 'rootDirectory.path' failed to satisfy constraint: Member must "+
			"satisfy regular expression pattern: "+
			`^(\/|(\/(?!\.)+[^$#<>;`+"`"+`|&?{}^*/\n]+){1,4})$`, root.Path)
	case info != nil && !permissions.MatchString(info.Permissions):
		return nil, fail("BadRequest", "Permissions '%s' must be octal, of three or four digits", info.Permissions)
	}
	id := newID("fsap")
	p := &accessPoint{asked: in, life: c.begin("creating", "available"), AccessPoint: AccessPoint{
		ID: id, ARN: c.arn("access-point", id), ClientToken: in.ClientToken, FileSystemID: f.ID, Owner: Account,
		PosixUser: in.PosixUser, RootDirectory: &root, Tags: cloneTags(in.Tags),
	}}
	c.efs.accessPoints = append(c.efs.accessPoints, p)
	return p.describe(p.life.truth()), nil
}

func (c *Cloud) describeAccessPoints(r *efsRequest) (any, *apiError) {
	fs, id := bare(r.text("FileSystemId")), bare(r.text("AccessPointId"))
	if fs != "" && id != "" {
		return nil, fail("BadRequest", "FileSystemId and AccessPointId exclude each other")
	}
	if fs != "" {
		if _, e := c.fileSystem(fs); e != nil {
			return nil, e
		}
	}
	shown := []AccessPoint{}
	for _, p := range c.efs.accessPoints {
		if fs != "" && p.FileSystemID != fs || id != "" && p.ID != id {
			continue
		}
		if state := p.life.look(); state != "deleted" {
			shown = append(shown, p.describe(state))
		}
	}
	if id != "" && len(shown) == 0 {
		return nil, fail("AccessPointNotFound", "Access point '%s' does not exist.", id)
	}
	part, next, e := page(r, shown, "MaxResults", "NextToken")
	return struct {
		AccessPoints []AccessPoint
		NextToken    string `json:",omitempty"`
	}{part, next}, e
}

func (c *Cloud) deleteAccessPoint(r *efsRequest) (any, *apiError) {
	p, e := c.accessPoint(r.id)
	if e == nil {
		c.remove(&p.life)
	}
	return nil, e
}
