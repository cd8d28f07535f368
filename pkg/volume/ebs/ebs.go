// Package ebs is the volume driver for EBS volumes of Amazon EC2: it creates, attaches, formats,
// mounts, enlarges, detaches and deletes them.
//
//	volumeID              a volume that exists; it is never deleted
//	name, with size …     the volume with the name as a tag; Delete removes only a volume of Create
//
// Tags on a volume show that Lariat created it. All hosts see the tags. A host whose Create made or
// found a volume remembers its id. The reason is that another host may replace the volume with one
// of the same name. The host's journal records all mounts, so that Unmount and Detach need no
// options. Without the journal, the mount table and the tags suffice.
//
// The volume's id identifies a device, because NVMe devices of EBS have the id as their serial
// number. The device's name changes and identifies nothing. A device is formatted only if it is
// proven blank: see format.go.
package ebs

import (
	"cmp"
	"context"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/ec2"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/cloud"
)

// Driver implements volume.Driver. It does not support GetVolumeName, because kubelet's own names
// suffice.
type Driver struct {
	volume.Unsupported
	config  Config
	log     *slog.Logger
	volumes volume.Journal[record]
	mounts  volume.Journal[mountRecord]
	formats volume.Journal[time.Time] // by volume id: mkfs began here on a proven blank device, and has not ended
	locks   volume.Locks
	devices devices

	mu      sync.Mutex
	regions map[string]*region
}

var _ volume.Driver = (*Driver)(nil)

// record describes a volume that this host created or attached.
type record struct {
	ID      string `json:"id"`
	Region  string `json:"region"`
	Cluster string `json:"cluster,omitempty"`
	// Created means that Create has made or found the volume. Then the name means this volume here
	// until Delete. Otherwise it does so until Detach.
	Created  bool `json:"created,omitempty"`
	Deleting bool `json:"deleting,omitempty"`
	// Lost means that the volume no longer exists. Delete found another volume of the name and
	// touched nothing, or a Create has begun to make it again. No Delete touches anything until a
	// Create ends.
	Lost bool      `json:"lost,omitempty"`
	Time time.Time `json:"time"`
}

// understand parses a request, and adds this host's record of the volume's name.
func (d *Driver) understand(req volume.Request) (Volume, error) {
	v, err := d.config.Volume(req)
	if err != nil || v.ID != "" || v.Known != "" {
		return v, err
	}
	rec, _, err := d.volumes.Get(v.Name)
	if rec.Created && !rec.Lost && rec.Cluster == d.config.Cluster && (v.Region == "" || v.Region == rec.Region) {
		v.Known, v.Region = rec.ID, rec.Region
	}
	return v, err
}

// forget drops the record of a detached volume, unless Create or Delete need the record.
func (d *Driver) forget(name string) error {
	rec, known, err := d.volumes.Get(name)
	if err != nil || !known || rec.Created || rec.Deleting || rec.Lost {
		return err
	}
	return d.volumes.Remove(name)
}

// mountRecord describes the mount at a directory. It is written before the mount. It is removed
// after the unmount, and after the detachment if unmount must detach.
type mountRecord struct {
	Name     string    `json:"name"`
	ID       string    `json:"id"`
	Region   string    `json:"region"`
	FromNode bool      `json:"fromNode,omitempty"` // unmount detaches the volume
	BootID   string    `json:"bootID"`
	Pod      string    `json:"pod,omitempty"`
	Time     time.Time `json:"time"`
}

// New returns the driver. It does nothing before the first call. With a wrong configuration, the
// driver still answers Init, because kubelet does not ask again, and still unmounts. All other
// calls return the configuration's error.
func New(c Config, log *slog.Logger) *Driver {
	c.StateDir, c.RunDir = cmp.Or(c.StateDir, volume.DefaultStateDir), cmp.Or(c.RunDir, volume.DefaultRunDir)
	dir := filepath.Join(c.StateDir, "ebs")
	return &Driver{
		config: c, log: log, devices: devices{"/sys", "/dev"}, regions: map[string]*region{},
		volumes: volume.Journal[record]{Dir: filepath.Join(dir, "volumes")},
		mounts:  volume.Journal[mountRecord]{Dir: filepath.Join(dir, "mounts")},
		formats: volume.Journal[time.Time]{Dir: filepath.Join(dir, "formats")},
		locks:   volume.Locks{Dir: filepath.Join(c.RunDir, "ebs")},
	}
}

// Init implements volume.Driver.
func (d *Driver) Init(context.Context) (volume.Capabilities, error) {
	return volume.Capabilities{Attach: !d.config.fromNode(), FSGroup: true, SELinuxRelabel: true, SupportsMetrics: true,
		RequiresFSResize: true}, nil
}

// region is the EC2 service of one region.
type region struct {
	*cloud.Session
	ec2 *ec2.Client
}

func (d *Driver) open(ctx context.Context, name string) (*region, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if r := d.regions[name]; r != nil {
		return r, nil
	}
	s, err := cloud.Open(ctx, name)
	if err != nil {
		return nil, err
	}
	r := &region{s, ec2.NewFromConfig(s.Config)}
	d.regions[name] = r
	return r, nil
}

// pauses are the pauses between requests to AWS. Tests of this package shorten them.
var pauses = cloud.Pauses{First: 250 * time.Millisecond, Most: 5 * time.Second}
