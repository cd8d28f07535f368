package allocator

import (
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/allocate"
)

// release plans the release of an attachment's entries. A sequence number other than 0 spares later entries. With the
// last entry the container's object loses the interface. It loses it also when nothing is left to release, because a
// killed process may have written one without the other.
func (b *batch) release(res *result, id metadata.AttachmentID, entries []allocate.Entry, sequence uint64) {
	a := b.a
	for _, e := range entries {
		if sequence != 0 && e.Sequence > sequence {
			continue
		}
		t := a.tables[allocate.TableFor(b.net, e.Address)]
		table := b.edit(t)
		res.touched[t.cidr] = true
		res.freed[t.cidr] = append(res.freed[t.cidr],
			table.Release(b.now, func(x allocate.Entry) bool { return x.Address == e.Address && x.ID == e.ID })...)
	}
	key := a.host + "/" + id.ContainerID
	if c, _ := b.container(key); c == nil || !c.Attached(a.network, id.IfName) || len(b.entriesOf(id)) > 0 {
		return
	}
	b.changeContainer(res, key, func(c *metadata.Container) bool { return c.Detach(a.network, id.IfName) })
}

// collectGarbage plans the release of all attachments that are not valid. It finds them in the tables and in the
// containers' objects.
func (b *batch) collectGarbage(res *result) {
	valid := res.request.valid
	for id := range b.a.held {
		if !valid[id] {
			b.release(res, id, b.entriesOf(id), 0)
		}
	}
	for id := range b.a.containers.Attachments(b.a.network) {
		if !valid[id] {
			b.release(res, id, nil, 0)
		}
	}
}
