package dockerapi

import (
	"maps"
	"time"

	"github.com/lariat-net/lariat/pkg/volume"
)

// State is the state of a volume.
type State string

// The four states.
const (
	Creating  State = "creating"  // the process was killed in Create; the next Create or Mount continues
	Ready     State = "ready"     //
	Removing  State = "removing"  // Delete failed; only Remove is allowed
	Recovered State = "recovered" // it is mounted, but the journal was lost, so nothing else is known
)

// record describes a volume in the journal. Records are values. A function that changes Users makes
// a new map.
type record struct {
	State   State             `json:"state"`
	Options map[string]string `json:"options,omitempty"` // as the user wrote them
	Facts   map[string]string `json:"facts,omitempty"`   // the answer of the driver's Create
	Created time.Time         `json:"created"`

	// The following members apply to one boot, and are void in the next.
	BootID   string         `json:"bootID,omitempty"`
	Users    map[string]int `json:"users,omitempty"`    // the number of uses by each mount id
	Device   string         `json:"device,omitempty"`   // the answer of Attach
	Attached bool           `json:"attached,omitempty"` // Attach was called, and no Detach has succeeded since
	ByDevice bool           `json:"byDevice,omitempty"` // MountDevice was called, not Mount
	Open     *call          `json:"open,omitempty"`     // counted, but the answer may not have arrived
}

// call is a call that Docker may repeat.
type call struct {
	Verb string    `json:"verb"`
	ID   string    `json:"id"`
	Time time.Time `json:"time"`
}

// repeats is the time in which Docker may repeat a call. Docker repeats calls for half a minute,
// and a call may have to wait for its turn.
const repeats = time.Minute

// is reports whether a call is the call that was counted already. The answer is wrong in one case.
// The process is killed just after an answer, and Docker makes the same call with the same id
// again. An example is "docker cp" into a container that has just started. Then one count is
// missing, and the volume is unmounted early on the host. The container has its own mount and keeps
// the volume. The opposite error would leave a volume that no user can remove.
func (c *call) is(verb, id string, now time.Time) bool {
	return c != nil && c.Verb == verb && c.ID == id && now.Sub(c.Time) < repeats
}

// in returns the record as it applies in a boot.
func (r record) in(boot string) record {
	if r.BootID != boot {
		r.BootID, r.Users, r.Device, r.Attached, r.ByDevice, r.Open = boot, nil, "", false, false, nil
	}
	return r
}

// users returns the sum of the counts.
func (r record) users() (n int) {
	for _, c := range r.Users {
		n += c
	}
	return n
}

// count adds to the count of an id. The count does not fall below zero.
func (r *record) count(id string, add int) {
	r.Users = maps.Clone(r.Users)
	if r.Users == nil {
		r.Users = map[string]int{}
	}
	if r.Users[id] += add; r.Users[id] <= 0 {
		delete(r.Users, id)
	}
}

// request returns the request for the driver. The user's options override facts of the same name.
func (r record) request(name string) volume.Request {
	options := maps.Clone(r.Facts)
	if options == nil {
		options = map[string]string{}
	}
	maps.Copy(options, r.Options)
	return volume.Request{Name: name, Options: options}
}
