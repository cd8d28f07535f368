package fakeaws

import (
	"cmp"
	"fmt"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Volume is the real state of an EBS volume, visible or not. Sizes are GiB, throughput MiB/s.
type Volume struct {
	ID, State   string // "": of AddVolume, a new id, "available"
	Zone        string
	Size        int
	Type        string
	IOPS        int
	Throughput  int
	Encrypted   bool
	KMSKeyID    string
	SnapshotID  string
	ClientToken string
	Tags        map[string]string
	Attachment  Attachment // zero: none
}

// Attachment is the attachment of a volume.
type Attachment struct {
	Instance, Device, State string
}

// volume is a Volume with its changes in progress.
type volume struct {
	Volume             // without State and Attachment, which follow from the rest
	created  time.Time // by Options.Now
	asked    Volume    // the request of CreateVolume, for its token
	life     progress
	attached *attachment
	change   *modification
	never    bool   // its next device never appears
	stuck    string // the state in which its attachment stays
}

type attachment struct {
	instance, device string
	since            time.Time
	noDevice         bool // it has no device, or has lost it
	progress
}

type modification struct {
	before, after Volume
	began         time.Time
	progress
	applied bool
}

// state returns a volume's state, from the visible or real states of its parts.
func (v *volume) state(life, attached string) string {
	if life == "available" && attached != "" {
		return "in-use"
	}
	return life
}

// truth returns the real state of the volume.
func (v *volume) truth() Volume {
	out := v.Volume
	out.Tags = maps.Clone(v.Tags)
	attached := ""
	if v.attached != nil {
		attached = v.attached.truth()
		out.Attachment = Attachment{v.attached.instance, v.attached.device, attached}
	}
	out.State = v.state(v.life.truth(), attached)
	return out
}

// look returns the volume as an answer shows it now, and advances its state. State "" means that
// the volume is not visible.
func (c *Cloud) look(v *volume) (out Volume, e *apiError) {
	life, attached := v.life.look(), ""
	if v.attached != nil {
		attached = v.lookAttached()
	}
	if v.change != nil {
		if _, e := c.lookModified(v); e != nil {
			return out, e
		}
	}
	out = v.Volume
	if v.attached != nil && attached != "" {
		out.Attachment = Attachment{v.attached.instance, v.attached.device, attached}
	}
	out.State = v.state(life, attached)
	if life == "deleted" {
		out.State = ""
	}
	return out, nil
}

// lookAttached returns the visible state of the attachment, or "" if none is visible.
func (v *volume) lookAttached() string {
	if v.stuck != "" && v.attached.truth() == v.stuck {
		return v.stuck
	}
	state := v.attached.look()
	if state == "detached" {
		v.attached, state = nil, ""
	}
	return state
}

// lookModified returns the visible state of the modification. The changes are complete once it is
// optimizing.
func (c *Cloud) lookModified(v *volume) (state string, e *apiError) {
	m := v.change
	if state = m.look(); state == "modifying" || m.applied {
		return state, nil
	}
	m.applied = true
	v.Size, v.Type, v.IOPS, v.Throughput = m.after.Size, m.after.Type, m.after.IOPS, m.after.Throughput
	if c.o.Devices != nil && m.after.Size != m.before.Size {
		if err := c.o.Devices.Resize(v.ID, inBytes(v.Size)); err != nil {
			return state, fail("InternalError", "resize the device of %s: %v", v.ID, err)
		}
	}
	return state, nil
}

func inBytes(gib int) int64 { return int64(gib) << 30 }

// Volumes returns all volumes that are not deleted, in the order of their creation.
func (c *Cloud) Volumes() (all []Volume) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, v := range c.volumes {
		if t := v.truth(); t.State != "deleting" && t.State != "deleted" {
			all = append(all, t)
		}
	}
	return all
}

// AddVolume adds a volume of another creator. The volume is visible at once, as available, or
// attached as v.Attachment says, but without a device. Zero members have the values of a gp3 of 1
// GiB in the first zone.
func (c *Cloud) AddVolume(v Volume) {
	c.mu.Lock()
	defer c.mu.Unlock()
	v.ID, v.Type, v.Zone, v.Size = cmp.Or(v.ID, newID("vol")), cmp.Or(v.Type, "gp3"), cmp.Or(v.Zone, c.zoneNames()[0]),
		cmp.Or(v.Size, 1)
	n := &volume{created: c.o.Now(), life: c.begin(cmp.Or(v.State, "available"))}
	if a := v.Attachment; a.Instance != "" {
		n.attached = &attachment{instance: a.Instance, device: a.Device, since: c.o.Now(),
			progress: c.begin(cmp.Or(a.State, "attached"))}
		n.life = c.begin("available")
	}
	v.State, v.Attachment, v.Tags = "", Attachment{}, cloneTags(v.Tags)
	n.Volume = v
	c.volumes = append(c.volumes, n)
}

func cloneTags(tags map[string]string) map[string]string {
	out := map[string]string{}
	maps.Copy(out, tags)
	return out
}

// NeverAppears makes later attachments of the volume succeed without a device.
func (c *Cloud) NeverAppears(volumeID string) {
	c.mustVolume(volumeID, func(v *volume) { v.never = true })
}

// Stick keeps the volume's attachment in a state once it has reached that state. The state is
// "attaching" or "busy". EC2 uses "busy" for a detachment that the instance blocks because it has
// mounted the volume. Stick(volumeID, "") ends this, and so does a DetachVolume, which must use
// force for a busy attachment.
func (c *Cloud) Stick(volumeID, state string) {
	c.mustVolume(volumeID, func(v *volume) {
		v.stuck = state
		if v.attached != nil && v.attached.truth() == "busy" && state == "" {
			c.must(c.release(v))
		}
	})
}

func (c *Cloud) mustVolume(id string, do func(*volume)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	v, e := c.volume(id)
	c.must(e)
	do(v)
}

// must ends the test on an error of the test's own request.
func (c *Cloud) must(e *apiError) {
	if e != nil {
		c.t.Helper()
		c.t.Fatal("fakeaws: ", e)
	}
}

var volumeID = regexp.MustCompile(`^vol-([0-9a-f]{8}|[0-9a-f]{17})$`)

// volume returns an existing volume, visible or not.
func (c *Cloud) volume(id string) (*volume, *apiError) {
	if !volumeID.MatchString(id) {
		return nil, fail("InvalidParameterValue", "Value (%s) for parameter volumeId is invalid. Expected: 'vol-...'.", id)
	}
	i := slices.IndexFunc(c.volumes, func(v *volume) bool { return v.ID == id && v.life.truth() != "deleted" })
	if i < 0 {
		return nil, fail("InvalidVolume.NotFound", "The volume '%s' does not exist.", id)
	}
	return c.volumes[i], nil
}

// kind holds AWS's limits for a type of volumes: sizes in GiB, IOPS in total and for each GiB.
type kind struct {
	minSize, maxSize           int
	minIOPS, maxIOPS, ioPerGiB int // 0: a request may not set IOPS
	mustIOPS                   bool
}

var kinds = map[string]kind{
	"standard": {minSize: 1, maxSize: 1024},
	"gp2":      {minSize: 1, maxSize: 16384},
	"gp3":      {minSize: 1, maxSize: 65536, minIOPS: 3000, maxIOPS: 80000, ioPerGiB: 500},
	"io1":      {minSize: 4, maxSize: 16384, minIOPS: 100, maxIOPS: 64000, ioPerGiB: 50, mustIOPS: true},
	"io2":      {minSize: 4, maxSize: 65536, minIOPS: 100, maxIOPS: 256000, ioPerGiB: 1000, mustIOPS: true},
	"st1":      {minSize: 125, maxSize: 16384},
	"sc1":      {minSize: 125, maxSize: 16384},
}

// check returns AWS's objection to a volume, and sets AWS's defaults.
func (v *Volume) check() *apiError {
	k, ok := kinds[v.Type]
	bad := func(format string, args ...any) *apiError { return fail("InvalidParameterValue", format, args...) }
	switch {
	case !ok:
		return fail("UnknownVolumeType", "Unsupported volume type '%s' for volume creation.", v.Type)
	case v.Size < k.minSize:
		return bad("Volume of %dGiB is too small for volume type %s; minimum is %dGiB.", v.Size, v.Type, k.minSize)
	case v.Size > k.maxSize:
		return bad("Volume of %dGiB is too large for volume type %s; maximum is %dGiB.", v.Size, v.Type, k.maxSize)
	case v.IOPS != 0 && k.maxIOPS == 0:
		return fail("InvalidParameterCombination", "The parameter iops is not supported for %s volumes.", v.Type)
	case v.IOPS == 0 && k.mustIOPS:
		return fail("MissingParameter", "The request must contain the parameter iops for volume type %s", v.Type)
	case v.Throughput != 0 && v.Type != "gp3":
		return fail("InvalidParameterCombination", "The parameter throughput is not supported for %s volumes.", v.Type)
	}
	if v.Type == "gp3" {
		v.IOPS, v.Throughput = cmp.Or(v.IOPS, 3000), cmp.Or(v.Throughput, 125)
	}
	switch {
	case v.IOPS < k.minIOPS || v.IOPS > k.maxIOPS:
		return bad("Volume iops of %d is out of range; %s allows %d to %d.", v.IOPS, v.Type, k.minIOPS, k.maxIOPS)
	case v.IOPS > max(k.minIOPS, v.Size*k.ioPerGiB):
		return bad("Iops to volume size ratio of %f is too high; maximum is %d.", float64(v.IOPS)/float64(v.Size), k.ioPerGiB)
	case v.Type == "gp3" && (v.Throughput < 125 || v.Throughput > 2000):
		return bad("Throughput of %d MiBps is out of range; gp3 allows 125 to 2000.", v.Throughput)
	case v.Throughput*4 > v.IOPS:
		return bad("Throughput (MiBps) to iops ratio of %f is too high; maximum is 0.25.",
			float64(v.Throughput)/float64(v.IOPS))
	}
	return nil
}

func (c *Cloud) createVolume(p *params) (any, *apiError) {
	asked := Volume{
		Zone: p.text("AvailabilityZone"), Size: p.number("Size"), Type: cmp.Or(p.text("VolumeType"), "gp2"),
		IOPS: p.number("Iops"), Throughput: p.number("Throughput"),
		Encrypted: p.yes("Encrypted"), KMSKeyID: p.text("KmsKeyId"), SnapshotID: p.text("SnapshotId"),
		ClientToken: p.text("ClientToken"), Tags: map[string]string{},
	}
	p.each("TagSpecification", func(at string) {
		if p.text(at+".ResourceType") == "volume" {
			asked.Tags = p.tags(at + ".Tag")
		}
	})
	// A token returns the volume that was made with it, even a deleted one.
	if i := slices.IndexFunc(c.volumes, func(v *volume) bool {
		return asked.ClientToken != "" &&
			v.asked.ClientToken == asked.ClientToken
	}); i >= 0 {
		v := c.volumes[i]
		if !reflect.DeepEqual(v.asked, asked) {
			return nil, fail("IdempotentParameterMismatch", "The client token you have provided is associated with a "+
				"resource for which the parameters are different.")
		}
		return c.volumeXML(v, v.truth()), nil
	}
	v := asked
	v.Tags = cloneTags(asked.Tags)
	if e := checkTags(v.Tags); e != nil {
		return nil, e
	}
	if v.Zone == "" {
		return nil, fail("MissingParameter", "The request must contain the parameter availabilityZone")
	}
	if _, ok := c.zones()[v.Zone]; !ok {
		return nil, fail("InvalidZone.NotFound", "The zone '%s' does not exist.", v.Zone)
	}
	if v.KMSKeyID != "" && !v.Encrypted {
		return nil, fail("InvalidParameterDependency", "The parameter KmsKeyId requires the parameter Encrypted to be set.")
	}
	if v.SnapshotID != "" {
		s, e := c.snapshot(v.SnapshotID)
		if e != nil {
			return nil, e
		}
		if v.Size = cmp.Or(v.Size, s.gib); v.Size < s.gib {
			return nil, fail("InvalidParameterValue", "Volume of %dGiB is smaller than snapshot '%s', expect size >= %dGiB.",
				v.Size, v.SnapshotID, s.gib)
		}
		v.Encrypted = v.Encrypted || s.encrypted
	} else if v.Size == 0 {
		return nil, fail("MissingParameter", "The request must contain the parameter size/snapshotId")
	}
	if e := v.check(); e != nil {
		return nil, e
	}
	v.ID = newID("vol")
	n := &volume{Volume: v, asked: asked, created: c.o.Now(), life: c.begin("", "creating", "available")}
	c.volumes = append(c.volumes, n)
	return c.volumeXML(n, n.truth()), nil
}

func (c *Cloud) deleteVolume(p *params) (any, *apiError) {
	v, e := c.volume(p.text("VolumeId"))
	if e != nil {
		return nil, e
	}
	switch state := v.truth().State; state {
	case "in-use":
		return nil, fail("VolumeInUse", "Volume %s is currently attached to %s", v.ID, v.attached.instance)
	case "available", "error":
	default:
		return nil, fail("IncorrectState", "The volume '%s' is in the '%s' state.", v.ID, state)
	}
	v.life = c.begin("deleting", "deleted")
	if c.o.Devices != nil {
		if err := c.o.Devices.Delete(v.ID); err != nil {
			return nil, fail("InternalError", "delete the data of %s: %v", v.ID, err)
		}
	}
	return done{true}, nil
}

func (c *Cloud) describeVolumes(p *params) (any, *apiError) {
	s, e := p.selection("VolumeId")
	if e != nil {
		return nil, e
	}
	for _, id := range s.ids {
		if !volumeID.MatchString(id) {
			return nil, fail("InvalidParameterValue", "Value (%s) for parameter volumeId is invalid. Expected: 'vol-...'.", id)
		}
	}
	shown := map[*volume]Volume{}
	for _, v := range c.volumes {
		if len(s.ids) > 0 && !slices.Contains(s.ids, v.ID) {
			continue
		}
		look, e := c.look(v)
		if e != nil {
			return nil, e
		}
		if look.State != "" {
			shown[v] = look
		}
	}
	page, next, e := choose(s, "InvalidVolume.NotFound", c.volumes, func(v *volume) fields {
		look, ok := shown[v]
		if !ok {
			return nil
		}
		f := fields{
			"volume-id": {v.ID}, "status": {look.State}, "size": {fmt.Sprint(look.Size)}, "volume-type": {look.Type},
			"encrypted":   {fmt.Sprint(look.Encrypted)},
			"snapshot-id": {look.SnapshotID}, "availability-zone": {look.Zone}, "attachment.instance-id": nil,
			"attachment.device": nil, "attachment.status": nil,
		}
		if a := look.Attachment; a.Instance != "" {
			f["attachment.instance-id"], f["attachment.device"], f["attachment.status"] = []string{a.Instance},
				[]string{a.Device}, []string{a.State}
		}
		return f.withTags(look.Tags)
	}, "volume-id")
	if e != nil {
		return nil, e
	}
	var out struct {
		Volumes   list[volumeXML] `xml:"volumeSet"`
		NextToken string          `xml:"nextToken,omitempty"`
	}
	for _, v := range page {
		out.Volumes.Items = append(out.Volumes.Items, c.volumeXML(v, shown[v]))
	}
	out.NextToken = next
	return out, nil
}

func (c *Cloud) createTags(p *params) (any, *apiError) {
	set := p.tags("Tag")
	if e := checkTags(set); e != nil {
		return nil, e
	}
	return c.changeTags(p, func(tags map[string]string) { maps.Copy(tags, set) })
}

func (c *Cloud) deleteTags(p *params) (any, *apiError) {
	return c.changeTags(p, func(tags map[string]string) {
		p.each("Tag", func(at string) {
			// Delete a tag with any value, unless the request names a value.
			key, withValue := p.text(at+".Key"), p.has(at+".Value")
			if value := p.text(at + ".Value"); !withValue || tags[key] == value {
				delete(tags, key)
			}
		})
	})
}

// changeTags changes the tags of volumes, if all volumes exist. The emulator keeps no changeable
// tags of other objects.
func (c *Cloud) changeTags(p *params, change func(map[string]string)) (any, *apiError) {
	var all []*volume
	for _, id := range p.texts("ResourceId") {
		v, e := c.volume(id)
		if e != nil {
			return nil, e
		}
		all = append(all, v)
	}
	for _, v := range all {
		change(v.Tags)
	}
	return done{true}, nil
}

func checkTags(tags map[string]string) *apiError {
	if len(tags) > 50 {
		return fail("TagLimitExceeded", "More than 50 tags specified")
	}
	for key, value := range tags {
		switch {
		case strings.HasPrefix(strings.ToLower(key), "aws:"):
			return fail("InvalidParameterValue", "Tag keys starting with 'aws:' are reserved for internal use")
		case key == "" || len([]rune(key)) > 127:
			return fail("InvalidParameterValue", "Tag key exceeds the maximum length of 127 characters, or is empty")
		case len([]rune(value)) > 255:
			return fail("InvalidParameterValue", "Tag value exceeds the maximum length of 255 characters")
		}
	}
	return nil
}

type tagXML struct {
	Key   string `xml:"key"`
	Value string `xml:"value"`
}

func tagsXML(tags map[string]string) (l list[tagXML]) {
	for _, key := range slices.Sorted(maps.Keys(tags)) {
		l.Items = append(l.Items, tagXML{key, tags[key]})
	}
	return l
}

type volumeXML struct {
	ID          string              `xml:"volumeId"`
	Size        int                 `xml:"size"`
	SnapshotID  string              `xml:"snapshotId"`
	Zone        string              `xml:"availabilityZone"`
	ZoneID      string              `xml:"availabilityZoneId"`
	State       string              `xml:"status"`
	Created     time.Time           `xml:"createTime"`
	Attachments list[attachmentXML] `xml:"attachmentSet"`
	Tags        list[tagXML]        `xml:"tagSet"`
	Type        string              `xml:"volumeType"`
	IOPS        int                 `xml:"iops,omitempty"`
	Throughput  int                 `xml:"throughput,omitempty"`
	Encrypted   bool                `xml:"encrypted"`
	KMSKeyID    string              `xml:"kmsKeyId,omitempty"`
	MultiAttach bool                `xml:"multiAttachEnabled"`
}

func (c *Cloud) volumeXML(v *volume, look Volume) volumeXML {
	out := volumeXML{
		ID: look.ID, Size: look.Size, SnapshotID: look.SnapshotID, Zone: look.Zone, ZoneID: c.zones()[look.Zone],
		State: look.State, Created: v.created.UTC(),
		Tags: tagsXML(look.Tags), Type: look.Type, IOPS: look.IOPS, Throughput: look.Throughput, Encrypted: look.Encrypted,
		KMSKeyID: look.KMSKeyID,
	}
	if look.Attachment.Instance != "" {
		out.Attachments.Items = []attachmentXML{v.attached.inXML(look.ID, look.Attachment.State)}
	}
	return out
}
