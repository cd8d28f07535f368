package fakeaws

import (
	"regexp"
	"slices"
	"time"
)

var deviceName = regexp.MustCompile(`^/dev/(sd[a-z]([1-9]|1[0-5])?|xvd[a-d]?[a-z])$`)

// attachVolume makes the device at once. In AWS too, an instance may see the device while EC2 still
// says "attaching".
func (c *Cloud) attachVolume(p *params) (any, *apiError) {
	v, e := c.volume(p.text("VolumeId"))
	if e != nil {
		return nil, e
	}
	in, e := c.instance(p.text("InstanceId"))
	if e != nil {
		return nil, e
	}
	device := p.text("Device")
	switch state := v.truth().State; {
	case state == "in-use":
		return nil, fail("VolumeInUse", "%s is already attached to an instance", v.ID)
	case state != "available":
		return nil, fail("IncorrectState", "%s is not 'available'.", v.ID)
	case v.change != nil && v.change.truth() == "modifying":
		return nil, fail("OperationNotPermitted", "Cannot attach volume %s when it is in modification state: MODIFYING", v.ID)
	case in.State != "running" && in.State != "stopped" && in.State != "stopping":
		return nil, fail("IncorrectState", "Instance '%s' is not 'running'.", in.ID)
	case v.Zone != in.Zone:
		return nil, fail("InvalidVolume.ZoneMismatch", "The volume '%s' is not in the same availability zone as "+
			"instance '%s'", v.ID, in.ID)
	case !deviceName.MatchString(device):
		return nil, fail("InvalidParameterValue", "Value (%s) for parameter device is invalid. %s is not a valid EBS "+
			"device name.", device, device)
	case slices.Contains(c.devices(in), device):
		return nil, fail("InvalidParameterValue", "Invalid value '%s' for unixDevice. Attachment point %s is already in use",
			device, device)
	case len(c.devices(in))+in.others() >= in.MaxVolumes:
		return nil, fail("AttachmentLimitExceeded", "%s is at its limit of %d attachments", in.ID, in.MaxVolumes)
	}
	v.attached = &attachment{instance: in.ID, device: device, since: c.o.Now(), noDevice: v.never,
		progress: c.begin("", "attaching", "attached")}
	if c.o.Devices != nil && !v.never {
		if err := c.o.Devices.Attach(v.ID, in.ID, device, inBytes(v.Size)); err != nil {
			v.attached = nil
			return nil, fail("InternalError", "attach the device of %s: %v", v.ID, err)
		}
	}
	return v.attached.inXML(v.ID, v.attached.truth()), nil
}

// devices returns the device names that an instance uses, with its root volume's name.
func (c *Cloud) devices(in *instance) []string {
	all := []string{rootDevice}
	for _, v := range c.volumes {
		if v.attached != nil && v.attached.instance == in.ID {
			all = append(all, v.attached.device)
		}
	}
	return all
}

func (c *Cloud) detachVolume(p *params) (any, *apiError) {
	v, e := c.volume(p.text("VolumeId"))
	if e != nil {
		return nil, e
	}
	instance, device, force := p.text("InstanceId"), p.text("Device"), p.yes("Force")
	a := v.attached
	switch {
	case a == nil:
		return nil, fail("IncorrectState", "Volume '%s' is in the '%s' state.", v.ID, v.truth().State)
	case instance != "" && instance != a.instance, device != "" && device != a.device:
		return nil, fail("InvalidAttachment.NotFound", "The volume '%s' is not attached to instance '%s' as device '%s'",
			v.ID, instance, device)
	case !force && (a.truth() == "busy" || a.truth() == "detaching"):
		return nil, fail("IncorrectState", "Cannot detach volume '%s' when it is in '%s' state.", v.ID, a.truth())
	}
	if v.stuck == "busy" && !force {
		a.progress = c.begin("busy")
	} else if e := c.release(v); e != nil {
		return nil, e
	}
	return a.inXML(v.ID, a.truth()), nil
}

// release removes the device. The attachment ends afterwards.
func (c *Cloud) release(v *volume) *apiError {
	if c.o.Devices != nil && !v.attached.noDevice {
		if err := c.o.Devices.Detach(v.ID); err != nil {
			return fail("InternalError", "detach the device of %s: %v", v.ID, err)
		}
		v.attached.noDevice = true
	}
	v.stuck = ""
	v.attached.progress = c.begin("detaching", "detached")
	if v.attached.truth() == "detached" {
		v.attached = nil
	}
	return nil
}

type attachmentXML struct {
	VolumeID   string    `xml:"volumeId"`
	InstanceID string    `xml:"instanceId"`
	Device     string    `xml:"device"`
	State      string    `xml:"status"`
	Since      time.Time `xml:"attachTime"`
	Delete     bool      `xml:"deleteOnTermination"`
}

func (a *attachment) inXML(volumeID, state string) attachmentXML {
	return attachmentXML{volumeID, a.instance, a.device, state, a.since.UTC(), false}
}
