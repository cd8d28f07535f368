// Package ebs is the volume driver for EBS volumes of Amazon EC2: it creates, attaches, formats,
// mounts, enlarges, detaches and deletes them.
//
//	volumeID              a volume that exists; it is never deleted
//	name, with size …     the volume that has the name as a tag; Create makes it, Delete removes what Create made
//
// What Lariat created is known by tags on the volume, which all hosts see. A host whose Create has
// made or found a volume remembers its id, for another host may delete the volume and make one of
// the same name. The host's journal knows what was mounted where, so that Unmount and Detach need
// no options; without it the mount table and the tags do.
//
// A device is known by the volume's id, which NVMe devices of EBS have as their serial number, and
// never by its name, which changes. It is formatted only if it is proven blank: see format.go.
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

// Driver implements volume.Driver. GetVolumeName is not supported: kubelet's own names serve.
type Driver struct {
	volume.Unsupported
	config  Config
	log     *slog.Logger
	volumes volume.Journal[record]
	mounts  volume.Journal[mountRecord]
	formats volume.Journal[time.Time] // of volumes by id whose mkfs was begun here on a proven blank device, and not ended
	locks   volume.Locks
	devices devices

	mu      sync.Mutex
	regions map[string]*region
}

var _ volume.Driver = (*Driver)(nil)

// record of a volume that this host created or attached.
type record struct {
	ID      string `json:"id"`
	Region  string `json:"region"`
	Cluster string `json:"cluster,omitempty"`
	// Create has made or found it: the name means this volume here until Delete; otherwise until
	// Detach
	Created  bool `json:"created,omitempty"`
	Deleting bool `json:"deleting,omitempty"`
	// it is gone: Delete found another volume of the name and has touched nothing, or a Create has
	// begun to make it anew; no Delete touches anything until a Create ends
	Lost bool      `json:"lost,omitempty"`
	Time time.Time `json:"time"`
}

// understand reads a request, and what this host remembers of the volume's name.
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

// forget drops the record of a volume that is attached no more, unless Create or Delete need it.
func (d *Driver) forget(name string) error {
	rec, known, err := d.volumes.Get(name)
	if err != nil || !known || rec.Created || rec.Deleting || rec.Lost {
		return err
	}
	return d.volumes.Remove(name)
}

// mountRecord says what was mounted at a folder. It is written before the mount and removed after it is gone,
// and after the volume is detached, if that is for unmount to do.
type mountRecord struct {
	Name     string    `json:"name"`
	ID       string    `json:"id"`
	Region   string    `json:"region"`
	FromNode bool      `json:"fromNode,omitempty"` // unmount detaches
	BootID   string    `json:"bootID"`
	Pod      string    `json:"pod,omitempty"`
	Time     time.Time `json:"time"`
}

// New makes the driver. Nothing happens before the first call. With a configuration that is wrong it answers
// Init, because kubelet does not ask a second time, and unmounts. All else says what is wrong.
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

// region is EC2 in one of them.
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

// pauses between looks at AWS. Tests of this package have no time for them.
var pauses = cloud.Pauses{First: 250 * time.Millisecond, Most: 5 * time.Second}
