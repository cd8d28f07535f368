package fakeaws

import (
	"cmp"
	"slices"
	"time"
)

// coolDown is AWS's minimum time between two changes of a volume.
const coolDown = 6 * time.Hour

func (c *Cloud) modifyVolume(p *params) (any, *apiError) {
	v, e := c.volume(p.text("VolumeId"))
	if e != nil {
		return nil, e
	}
	before := v.truth()
	if before.State != "available" && before.State != "in-use" {
		return nil, fail("IncorrectState", "%s is not 'available' or 'in-use'.", v.ID)
	}
	if m := v.change; m != nil {
		if state := m.truth(); state != "completed" {
			return nil, fail("IncorrectModificationState", "Cannot modify volume %s in modification state %s", v.ID, state)
		}
		if c.o.Now().Sub(m.began) < coolDown {
			return nil, fail("VolumeModificationRateExceeded",
				"You've reached the maximum modification rate per volume limit. Wait at least 6 hours between modifications "+
					"per EBS volume.")
		}
	}
	after := before
	after.Size = cmp.Or(p.number("Size"), before.Size)
	if kind := p.text("VolumeType"); kind != "" && kind != before.Type {
		after.Type, after.IOPS, after.Throughput = kind, 0, 0
	}
	after.IOPS, after.Throughput = cmp.Or(p.number("Iops"), after.IOPS), cmp.Or(p.number("Throughput"), after.Throughput)
	if after.Size < before.Size {
		return nil, fail("InvalidParameterValue", "New size cannot be smaller than existing size")
	}
	if e := after.check(); e != nil {
		return nil, e
	}
	v.change = &modification{before: before, after: after, began: c.o.Now(),
		progress: c.begin("modifying", "optimizing", "completed")}
	return struct {
		Modification modificationXML `xml:"volumeModification"`
	}{v.change.inXML(v.change.truth())}, nil
}

func (c *Cloud) describeVolumesModifications(p *params) (any, *apiError) {
	s, e := p.selection("VolumeId")
	if e != nil {
		return nil, e
	}
	for _, id := range s.ids {
		if _, e := c.volume(id); e != nil {
			return nil, e
		}
	}
	shown := map[*volume]string{}
	for _, v := range c.volumes {
		if v.change == nil || len(s.ids) > 0 && !slices.Contains(s.ids, v.ID) {
			continue
		}
		shown[v], e = c.lookModified(v)
		if e != nil {
			return nil, e
		}
	}
	page, next, e := choose(s, "InvalidVolumeModification.NotFound", c.volumes, func(v *volume) fields {
		state, ok := shown[v]
		if !ok {
			return nil
		}
		return fields{"volume-id": {v.ID}, "modification-state": {state}}
	}, "volume-id")
	if e != nil {
		return nil, e
	}
	var out struct {
		Modifications list[modificationXML] `xml:"volumeModificationSet"`
		NextToken     string                `xml:"nextToken,omitempty"`
	}
	for _, v := range page {
		out.Modifications.Items = append(out.Modifications.Items, v.change.inXML(shown[v]))
	}
	out.NextToken = next
	return out, nil
}

type modificationXML struct {
	VolumeID           string    `xml:"volumeId"`
	State              string    `xml:"modificationState"`
	Progress           int       `xml:"progress"`
	Began              time.Time `xml:"startTime"`
	OriginalSize       int       `xml:"originalSize"`
	OriginalIOPS       int       `xml:"originalIops,omitempty"`
	OriginalThroughput int       `xml:"originalThroughput,omitempty"`
	OriginalType       string    `xml:"originalVolumeType"`
	TargetSize         int       `xml:"targetSize"`
	TargetIOPS         int       `xml:"targetIops,omitempty"`
	TargetThroughput   int       `xml:"targetThroughput,omitempty"`
	TargetType         string    `xml:"targetVolumeType"`
}

func (m *modification) inXML(state string) modificationXML {
	return modificationXML{
		m.after.ID, state, map[string]int{"modifying": 0, "optimizing": 50, "completed": 100}[state], m.began.UTC(),
		m.before.Size, m.before.IOPS, m.before.Throughput, m.before.Type, m.after.Size, m.after.IOPS, m.after.Throughput,
		m.after.Type,
	}
}
