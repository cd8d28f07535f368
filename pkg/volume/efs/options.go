package efs

import (
	"crypto/sha256"
	"encoding/hex"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/cloud"
	"github.com/lariat-net/lariat/pkg/volume/nfs"
)

// Options are a volume's options, as users write them.
type Options struct {
	Region string `option:"region"`
	FSID   string `option:"fsid"`
	Export string `option:"export"`

	AccessPoint    string `option:"accessPoint"`
	BasePath       string `option:"basePath"`
	UID            int64  `option:"uid"`
	GID            int64  `option:"gid"`
	DirectoryPerms string `option:"directoryPerms"`

	Subnets        string `option:"subnets"`
	SecurityGroups string `option:"securityGroups"`

	PerformanceMode       string `option:"performanceMode"`
	ThroughputMode        string `option:"throughputMode"`
	ProvisionedThroughput int64  `option:"provisionedThroughput"`
	Encrypted             Switch `option:"encrypted"`
	KMSKeyID              string `option:"kmsKeyId"`
	Tags                  string `option:"tags"`

	TLS           Switch         `option:"tls"`
	IAM           bool           `option:"iam"`
	MountTargetIP string         `option:"mountTargetIp"`
	MntOptions    string         `option:"mntOptions"`
	OnRemove      cloud.OnRemove `option:"onRemove"`
	OnHang        nfs.OnHang     `option:"onHang"`
	ReadOnly      bool           `option:"readOnly"`
	FSGroup       int64          `option:"fsGroup"`
}

// told lists the options of Create's reply beside fsid, which Rancher's daemon passes with each
// later call. The tags, not these options, show the work of Create.
var told = []string{"created", "name", "accessPointId", "mountTargetId", "mountTargetSGID", volume.Identity}

// Switch is a bool that may be unset.
type Switch string

// UnmarshalText accepts the words of a bool.
func (s *Switch) UnmarshalText(text []byte) error {
	switch strings.ToLower(string(text)) {
	case "1", "yes":
		text = []byte("true")
	case "0", "no":
		text = []byte("false")
	}
	return volume.OneOf(s, []byte(strings.ToLower(string(text))), "true", "false")
}

// Config names the directories of the driver's state. All other settings belong to a volume, or to
// AWS's own configuration.
type Config struct {
	StateDir string // "": volume.DefaultStateDir
	RunDir   string // "": volume.DefaultRunDir
}

// Environment lists the variables that FromEnvironment and the SDK read, with their meanings.
var Environment = slices.Concat(cloud.Environment, volume.Environment)

// FromEnvironment reads the configuration.
func FromEnvironment(getenv func(string) string) Config {
	return Config{StateDir: getenv("LARIAT_STATE_DIR"), RunDir: getenv("LARIAT_RUN_DIR")}
}

// Volume is a parsed request.
type Volume struct {
	Name        string  `json:"name"`
	Region      string  `json:"region,omitempty"`      // "": from AWS's configuration or the instance
	FileSystem  string  `json:"fileSystem,omitempty"`  // "": the volume's own
	AccessPoint string  `json:"accessPoint,omitempty"` // an existing access point
	Folder      *Folder `json:"folder,omitempty"`      // the directory of the volume's own access point
	Address     string  `json:"address,omitempty"`     // of the mount target, if AWS must not be asked
	// Subnets is sorted. Empty means the instance's subnet, if the file system is the volume's own.
	Subnets  []string       `json:"subnets,omitempty"`
	Groups   []string       `json:"groups,omitempty"` // likewise
	Make     Make           `json:"make,omitzero"`
	TLS      bool           `json:"tls,omitempty"`
	IAM      bool           `json:"iam,omitempty"`
	OnRemove cloud.OnRemove `json:"onRemove"`
	Tags     []Tag          `json:"tags,omitempty"` // sorted
	Mount    nfs.Volume     `json:"mount"`          // without host and ID
	// Known is the id of the only own file system or access point that the name may mean here. ""
	// means that the token decides.
	Known string `json:"-"`
}

// Folder describes the directory of a volume's own access point.
type Folder struct {
	Path  string `json:"path"`
	UID   *int64 `json:"uid,omitempty"` // the user of all clients, with GID; nil: each client's own
	GID   *int64 `json:"gid,omitempty"`
	Perms string `json:"perms"` // octal
}

// Make describes a file system to create. AWS chooses zero values, except that an unset Encrypted
// means true.
type Make struct {
	PerformanceMode string `json:"performanceMode,omitempty"`
	ThroughputMode  string `json:"throughputMode,omitempty"`
	Throughput      int64  `json:"throughput,omitempty"` // MiB/s
	Encrypted       Switch `json:"encrypted,omitempty"`
	KMSKey          string `json:"kmsKey,omitempty"`
}

// Tag is a tag of AWS.
type Tag struct{ Key, Value string }

// recommended lists the mount options that AWS recommends.
var recommended = []string{"nfsvers=4.1", "rsize=1048576", "wsize=1048576", "hard", "timeo=600", "retrans=2",
	"noresvport"}

var (
	fileSystemID  = regexp.MustCompile(`^fs-([0-9a-f]{8}|[0-9a-f]{17})$`)
	ownID         = regexp.MustCompile(`^(fs|fsap)-([0-9a-f]{8}|[0-9a-f]{17})$`)
	accessPointID = regexp.MustCompile(`^fsap-([0-9a-f]{8}|[0-9a-f]{17})$`)
	subnetID      = regexp.MustCompile(`^subnet-[0-9a-z]{1,32}$`)
	groupID       = regexp.MustCompile(`^sg-[0-9a-z]{1,32}$`)
	regionName    = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$`)
	permissions   = regexp.MustCompile(`^[0-7]{3,4}$`)
	// From AWS's documentation of the path of RootDirectory.
	accessPointPath = regexp.MustCompile(`^(/[^.$#<>;` + "`" + `|&?{}^*/\n][^$#<>;` + "`" + `|&?{}^*/\n]*){1,4}$`)
	keyID           = regexp.MustCompile(`^[A-Za-z0-9:/_-]+$`)
)

// ParseVolume parses a request and checks all its input. It reads nothing else.
func ParseVolume(r volume.Request) (Volume, error) {
	if err := volume.CheckName(r.Name); err != nil {
		return Volume{}, err
	}
	o := Options{Export: "/", UID: -1, GID: -1, OnRemove: cloud.Retain, OnHang: nfs.Force, FSGroup: -1}
	if err := volume.Decode(r.Options, &o, told...); err != nil {
		return Volume{}, err
	}
	o.Export, o.BasePath = nfs.Trimmed(o.Export), nfs.Trimmed(o.BasePath)
	known := r.Options[volume.Identity]
	if known != "" && known == o.FSID {
		o.FSID = "" // Create's answer, which names the volume's own file system
	}
	v := Volume{Name: r.Name, Known: known, Region: o.Region, FileSystem: o.FSID, AccessPoint: o.AccessPoint,
		Address: o.MountTargetIP, IAM: o.IAM, OnRemove: o.OnRemove,
		Make: Make{o.PerformanceMode, o.ThroughputMode, o.ProvisionedThroughput, o.Encrypted, o.KMSKeyID},
		Mount: nfs.Volume{Name: r.Name, Path: o.Export, OnHang: o.OnHang, ReadOnly: r.ReadOnly || o.ReadOnly,
			FSGroup: r.FSGroup}}
	bad := func(format string, args ...any) (Volume, error) {
		return v, volume.Errorf(volume.ErrInvalid, "volume "+v.Name+": "+format, args...)
	}
	for _, c := range []struct {
		option, value string
		form          *regexp.Regexp
	}{
		{"region", o.Region, regionName}, {"fsid", o.FSID, fileSystemID}, {"accessPoint", o.AccessPoint, accessPointID},
		{"directoryPerms", o.DirectoryPerms, permissions}, {volume.Identity, known, ownID}, {"kmsKeyId", o.KMSKeyID, keyID},
	} {
		if c.value != "" && !c.form.MatchString(c.value) {
			return bad("%s %s is none", c.option, volume.Excerpt(c.value))
		}
	}
	if err := nfs.CheckPath("export", o.Export); err != nil {
		return v, err
	}
	var err error
	if v.Subnets, err = ids("subnets", o.Subnets, subnetID); err != nil {
		return v, err
	}
	if v.Groups, err = ids("securityGroups", o.SecurityGroups, groupID); err != nil {
		return v, err
	}
	if v.Tags, err = tags(o.Tags); err != nil {
		return v, err
	}
	if o.MountTargetIP != "" {
		a, err := netip.ParseAddr(nfs.Bare(o.MountTargetIP))
		if err != nil || a.Zone() != "" {
			return bad("mountTargetIp %s is no address", volume.Excerpt(o.MountTargetIP))
		}
		v.Address = a.Unmap().String()
	}
	points := o.AccessPoint != "" || o.BasePath != ""
	v.TLS = o.TLS == "true" || o.TLS == "" && (points || o.IAM)
	switch {
	case o.AccessPoint != "" && o.BasePath != "":
		return bad("accessPoint and basePath exclude each other: basePath is for an access point that Lariat makes")
	case points && o.FSID == "":
		return bad("an access point is one of a file system: fsid is missing")
	case points && !v.TLS:
		return bad("AWS lets nobody through an access point without TLS: tls=false cannot be")
	case o.IAM && !v.TLS:
		return bad("iam needs tls: who one is, is in the certificate of TLS")
	case v.TLS && o.MountTargetIP != "" && o.FSID == "":
		return bad("tls needs fsid")
	case o.BasePath == "" && (o.UID >= 0 || o.GID >= 0 || o.DirectoryPerms != ""):
		return bad("uid, gid and directoryPerms are those of a folder that is made, below basePath")
	case (o.UID >= 0) != (o.GID >= 0):
		return bad("uid and gid belong together")
	case o.UID > 1<<32-1 || o.GID > 1<<32-1 || o.FSGroup > 1<<32-1:
		return bad("a user or group beyond 32 bits")
	case o.ProvisionedThroughput < 0, (o.ThroughputMode == "provisioned") != (o.ProvisionedThroughput > 0):
		return bad("throughputMode=provisioned and provisionedThroughput, in MiB/s, belong together")
	case o.KMSKeyID != "" && o.Encrypted == "false":
		return bad("kmsKeyId and encrypted=false contradict each other")
	}
	if o.PerformanceMode != "" {
		if err := volume.OneOf(&v.Make.PerformanceMode, []byte(o.PerformanceMode), "generalPurpose", "maxIO"); err != nil {
			return bad("performanceMode: %w", err)
		}
	}
	if o.ThroughputMode != "" {
		if err := volume.OneOf(&v.Make.ThroughputMode, []byte(o.ThroughputMode), "bursting", "elastic",
			"provisioned"); err != nil {
			return bad("throughputMode: %w", err)
		}
	}
	if known != "" && strings.HasPrefix(known, "fsap-") != (o.BasePath != "") {
		return bad("%s %s: an access point goes with basePath, and a file system with neither that nor another fsid",
			volume.Identity, known)
	}
	if o.BasePath != "" {
		if err := nfs.CheckPath("basePath", o.BasePath); err != nil {
			return v, err
		}
		f := Folder{Path: path.Join(o.BasePath, v.Name), Perms: "0755"}
		if len(f.Path) > 100 || !accessPointPath.MatchString(f.Path) {
			return bad("%s: AWS takes paths of access points of at most 100 bytes and four directories, whose names do "+
				"not begin "+
				"with a dot and have none of $ # < > ; ` | & ? { } ^ *", f.Path)
		}
		if o.DirectoryPerms != "" {
			f.Perms = o.DirectoryPerms
		}
		if o.UID >= 0 {
			f.UID, f.GID = &o.UID, &o.GID
		}
		v.Folder = &f
	}
	if o.FSGroup >= 0 {
		v.Mount.FSGroup = &o.FSGroup
	}
	if o.FSID != "" || o.MountTargetIP != "" {
		v.Mount.FSGroup = nil // Lariat does not manage the directory
	}
	if err := v.Mount.SetOptions(recommended, o.MntOptions); err != nil {
		return v, err
	}
	for _, m := range v.Mount.Options {
		key, value, _ := strings.Cut(m, "=")
		switch {
		case (key == "vers" || key == "nfsvers") && value != "4.1" && value != "4.0" && value != "4":
			return bad("mntOptions: EFS speaks NFS 4.0 and 4.1, not %s", value)
		case key == "udp", key == "proto" && !strings.HasPrefix(value, "tcp"), key == "sec" && value != "sys":
			return bad("mntOptions: EFS does not speak %s", m)
		}
	}
	return v, nil
}

func ids(option, text string, form *regexp.Regexp) (all []string, err error) {
	for _, id := range strings.FieldsFunc(text, func(r rune) bool { return r == ',' || r == ' ' }) {
		if !form.MatchString(id) {
			return nil, volume.Errorf(volume.ErrInvalid, "%s: %s is no id", option, volume.Excerpt(id))
		}
		all = append(all, id)
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

// tags parses key=value, with commas. It refuses tags of Lariat and of AWS.
func tags(text string) (all []Tag, err error) {
	for _, t := range strings.Split(text, ",") {
		if t = strings.TrimSpace(t); t == "" {
			continue
		}
		key, value, has := strings.Cut(t, "=")
		if !has || key == "" || len(key) > 128 || len(value) > 256 || strings.HasPrefix(key, "aws:") ||
			strings.HasPrefix(key, "lariat:") || key == "Name" {
			return nil, volume.Errorf(volume.ErrInvalid, "tags: %s is no key=value, or its key is not a user's",
				volume.Excerpt(t))
		}
		if slices.ContainsFunc(all, func(o Tag) bool { return o.Key == key }) {
			return nil, volume.Errorf(volume.ErrInvalid, "tags: %s is there twice", volume.Excerpt(key))
		}
		all = append(all, Tag{key, value})
	}
	slices.SortFunc(all, func(a, b Tag) int { return strings.Compare(a.Key, b.Key) })
	return all, nil
}

// token returns the creation token of a volume's own file system or access point. AWS answers a
// repeated call with the same object. AWS accepts 64 bytes.
func (v Volume) token() string {
	if v.FileSystem != "" && v.Folder == nil {
		return ""
	}
	sum := sha256.Sum256([]byte(v.FileSystem + "/" + v.Name))
	return "lariat-" + hex.EncodeToString(sum[:16])
}
