package ebs

import (
	"cmp"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/cloud"
	"github.com/lariat-net/lariat/pkg/volume/mounts"
)

// Options are a volume's options, as users write them.
type Options struct {
	VolumeID         string         `option:"volumeID"`
	Size             int32          `option:"size"` // GiB
	VolumeType       string         `option:"volumeType"`
	IOPS             int32          `option:"iops"`
	Throughput       int32          `option:"throughput"` // MiB/s
	Encrypted        bool           `option:"encrypted"`
	KMSKeyID         string         `option:"kmsKeyId"`
	SnapshotID       string         `option:"snapshotID"`
	Tags             string         `option:"tags"`
	AvailabilityZone string         `option:"availabilityZone"`
	Region           string         `option:"region"`
	FSType           string         `option:"fsType"`
	MntOptions       string         `option:"mntOptions"`
	OnRemove         cloud.OnRemove `option:"onRemove"`
	ForceDetach      bool           `option:"forceDetach"`
	ReadOnly         bool           `option:"readOnly"`
}

// told lists the options of Create's reply that are not options of a volume. Rancher's daemon
// passes them with each later call.
var told = []string{"created", "name", volume.Identity}

// Config holds the administrator's settings for all volumes.
type Config struct {
	// Attach selects the process that attaches volumes: LARIAT_EBS_ATTACH. "controller" is the
	// default. "node" is the node that mounts, for clusters whose controller cannot have the
	// driver.
	Attach   string
	Cluster  string // the owner of the volumes; other clusters have other volumes of the same name: LARIAT_EBS_CLUSTER
	StateDir string // "": volume.DefaultStateDir
	RunDir   string // "": volume.DefaultRunDir
}

// Environment lists the variables of FromEnvironment and of the SDK, with their meanings.
var Environment = slices.Concat([][2]string{
	{"LARIAT_EBS_ATTACH", "controller or node: who attaches; node where a controller cannot be given the driver"},
	{"LARIAT_EBS_CLUSTER", "name of the cluster, if several share the account: volumes are known by it and their " +
		"own name"},
}, volume.Environment, cloud.Environment)

// FromEnvironment reads the configuration. It returns errors of the configuration for callers that
// must stop. New reports the same errors later, at each call.
func FromEnvironment(getenv func(string) string) (Config, error) {
	c := Config{Attach: getenv("LARIAT_EBS_ATTACH"), Cluster: getenv("LARIAT_EBS_CLUSTER"),
		StateDir: getenv("LARIAT_STATE_DIR"), RunDir: getenv("LARIAT_RUN_DIR")}
	return c, c.check()
}

func (c Config) check() error {
	if c.Attach != "" && c.Attach != "controller" && c.Attach != "node" {
		return volume.Errorf(volume.ErrInvalid, "LARIAT_EBS_ATTACH: %s is neither controller nor node",
			volume.Excerpt(c.Attach))
	}
	if c.Cluster == "" {
		return nil
	}
	if err := volume.CheckName(c.Cluster); err != nil {
		return fmt.Errorf("LARIAT_EBS_CLUSTER: %w", err)
	}
	return nil
}

func (c Config) fromNode() bool { return c.Attach == "node" }

// Volume is a parsed request.
type Volume struct {
	Name     string
	DetachAs string // volume.Request's, never ""
	ID       string // of a volume that is not found by its name
	Known    string // id of the only volume that the name may mean here; "": the tag decides
	Region   string // "": the configured one
	New      Specification
	FSType   string // "": the existing one, or else ext4
	Options  []string
	OnRemove cloud.OnRemove
	Said     bool // the user set OnRemove
	Force    bool
	ReadOnly bool
}

// Specification describes a volume to create. AWS chooses the value of a zero member.
type Specification struct {
	Size       int32 // GiB
	Type       string
	IOPS       int32
	Throughput int32
	Encrypted  bool
	KMSKeyID   string
	SnapshotID string
	Tags       map[string]string
	Zone       string
}

var (
	volumeID   = regexp.MustCompile(`^vol-([0-9a-f]{8}|[0-9a-f]{17})$`)
	snapshotID = regexp.MustCompile(`^snap-([0-9a-f]{8}|[0-9a-f]{17})$`)
	zoneName   = regexp.MustCompile(`^[a-z]{2}[a-z0-9-]{1,60}$`)
	keyName    = regexp.MustCompile(`^[A-Za-z0-9:/_-]{1,1000}$`)
)

// FSTypes lists the file systems that the driver makes and mounts.
var FSTypes = []string{"ext4", "ext3", "xfs"}

// volumeTypes lists EBS's types. AWS alone checks sizes, IOPS and throughput of each type, because
// these limits change.
var volumeTypes = []string{"gp3", "gp2", "io2", "io1", "st1", "sc1", "standard"}

// Volume parses a request and checks all its input. It reads nothing but the request and the
// configuration.
func (c Config) Volume(r volume.Request) (Volume, error) {
	if err := c.check(); err != nil {
		return Volume{}, fmt.Errorf("the driver's environment: %w", err)
	}
	if err := volume.CheckName(r.Name); err != nil {
		return Volume{}, err
	}
	o := Options{VolumeType: "gp3", OnRemove: cloud.Retain, FSType: r.FSType}
	if err := volume.Decode(r.Options, &o, told...); err != nil {
		return Volume{}, err
	}
	v := Volume{Name: r.Name, DetachAs: cmp.Or(r.DetachAs, r.Name), ID: o.VolumeID, Region: o.Region, FSType: o.FSType,
		OnRemove: o.OnRemove, Force: o.ForceDetach, ReadOnly: r.ReadOnly || o.ReadOnly,
		New: Specification{o.Size, o.VolumeType, o.IOPS, o.Throughput, o.Encrypted || o.KMSKeyID != "", o.KMSKeyID,
			o.SnapshotID, nil, o.AvailabilityZone}}
	v.Said = r.Options["onRemove"] != ""
	bad := func(format string, args ...any) (Volume, error) {
		return v, volume.Errorf(volume.ErrInvalid, "volume "+v.Name+": "+format, args...)
	}
	if known := r.Options[volume.Identity]; known != "" && v.ID == "" {
		if !volumeID.MatchString(known) {
			return bad("%s %s is no volume's id", volume.Identity, volume.Excerpt(known))
		}
		v.Known = known
	}
	for option, ok := range map[string]bool{
		"volumeID":         v.ID == "" || volumeID.MatchString(v.ID),
		"snapshotID":       o.SnapshotID == "" || snapshotID.MatchString(o.SnapshotID),
		"region":           o.Region == "" || zoneName.MatchString(o.Region),
		"availabilityZone": o.AvailabilityZone == "" || zoneName.MatchString(o.AvailabilityZone),
		"kmsKeyId":         o.KMSKeyID == "" || keyName.MatchString(o.KMSKeyID),
	} {
		if !ok {
			return bad("%s %s is none", option, volume.Excerpt(r.Options[option]))
		}
	}
	switch {
	case !slices.Contains(volumeTypes, o.VolumeType):
		return bad("volumeType %s is none of %v", volume.Excerpt(o.VolumeType), volumeTypes)
	case v.FSType != "" && !slices.Contains(FSTypes, v.FSType):
		return bad("fsType %s is none of %v", volume.Excerpt(v.FSType), FSTypes)
	case o.Size < 0 || o.Size > 65536:
		return bad("size %d: a volume has from 1 to 65536 GiB", o.Size)
	case o.IOPS < 0 || o.IOPS != 0 && !slices.Contains([]string{"gp3", "io1", "io2"}, o.VolumeType):
		return bad("iops %d: only gp3, io1 and io2 are given a number of IOPS", o.IOPS)
	case o.IOPS == 0 && strings.HasPrefix(o.VolumeType, "io"):
		return bad("volumeType %s needs iops", o.VolumeType)
	case o.Throughput < 0 || o.Throughput != 0 && o.VolumeType != "gp3":
		return bad("throughput %d: only gp3 is given a throughput, in MiB/s", o.Throughput)
	case v.ID != "" && o.SnapshotID != "":
		return bad("volumeID and snapshotID exclude each other")
	case v.ID != "" && v.OnRemove == cloud.Purge:
		return bad("onRemove=purge with volumeID: Lariat did not create the volume and never removes it")
	}
	var err error
	if v.New.Tags, err = parseTags(o.Tags); err != nil {
		return bad("tags: %w", err)
	}
	own, err := rules.Parse("mntOptions", o.MntOptions, false)
	if err != nil {
		return v, err
	}
	v.Options = rules.Merge([]string{"nosuid", "nodev"}, own)
	v.ReadOnly = v.ReadOnly || slices.Contains(v.Options, "ro")
	mode := "rw"
	if v.ReadOnly {
		mode = "ro"
	}
	v.Options = rules.Merge(v.Options, []string{mode})
	return v, nil
}

// parseTags parses k=v,k=v, or a JSON object for values with commas.
func parseTags(text string) (map[string]string, error) {
	tags := map[string]string{}
	if strings.HasPrefix(text, "{") {
		if err := json.Unmarshal([]byte(text), &tags); err != nil {
			return nil, fmt.Errorf("%s is not an object of strings", volume.Excerpt(text))
		}
	} else if text != "" {
		for _, pair := range strings.Split(text, ",") {
			key, value, ok := strings.Cut(pair, "=")
			if _, twice := tags[strings.TrimSpace(key)]; !ok || twice {
				return nil, fmt.Errorf("%s is not key=value, or its key comes twice", volume.Excerpt(pair))
			}
			tags[strings.TrimSpace(key)] = strings.TrimSpace(value)
		}
	}
	for key, value := range tags {
		switch low := strings.ToLower(key); {
		case key == "" || len(key) > 127 || len(value) > 255:
			return nil, fmt.Errorf("%s: AWS takes keys of 1 to 127 and values of up to 255 octets", volume.Excerpt(key))
		case strings.HasPrefix(low, "aws:") || strings.HasPrefix(low, tagPrefix):
			return nil, fmt.Errorf("key %s is kept for AWS's or Lariat's own", volume.Excerpt(key))
		}
	}
	if len(tags) > 40 {
		return nil, fmt.Errorf("%d tags, at most 40 are allowed", len(tags))
	}
	return tags, volume.CheckOptions(tags)
}

// rules holds all allowed mount options.
var rules = mounts.Rules{
	"ro": mounts.Flag("ro"), "rw": mounts.Flag("ro"), "sync": mounts.Flag("sync"), "async": mounts.Flag("sync"),
	"dirsync": mounts.Flag("dirsync"),
	"atime":   mounts.Flag("atime"), "noatime": mounts.Flag("atime"), "relatime": mounts.Flag("atime"),
	"strictatime": mounts.Flag("atime"),
	"diratime":    mounts.Flag("diratime"), "nodiratime": mounts.Flag("diratime"), "lazytime": mounts.Flag("lazytime"),
	"nolazytime": mounts.Flag("lazytime"),
	"nosuid":     mounts.Flag("suid"), "nodev": mounts.Flag("dev"), "noexec": mounts.Flag("exec"),
	"discard": mounts.Flag("discard"), "nodiscard": mounts.Flag("discard"),
	// ext3, ext4
	"acl": mounts.Flag("acl"), "noacl": mounts.Flag("acl"), "user_xattr": mounts.Flag("xattr"),
	"nouser_xattr": mounts.Flag("xattr"),
	"commit":       mounts.Valued("commit", mounts.Number(1, 300)),
	"data":         mounts.Valued("data", mounts.Words("journal", "ordered", "writeback")),
	"errors":       mounts.Valued("errors", mounts.Words("continue", "remount-ro")), "delalloc": mounts.Flag("delalloc"),
	"nodelalloc": mounts.Flag("delalloc"),
	// xfs
	"largeio": mounts.Flag("largeio"), "nolargeio": mounts.Flag("largeio"), "inode64": mounts.Flag("inode"),
	"inode32": mounts.Flag("inode"),
	"logbufs": mounts.Valued("logbufs", mounts.Number(2, 8)), "prjquota": mounts.Flag("prjquota"),
	"nouuid": mounts.Flag("nouuid"),
}
