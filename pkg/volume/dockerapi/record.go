package dockerapi

import (
	"maps"
	"time"

	"github.com/lariat-net/lariat/pkg/volume"
)

// State of a volume.
type State string

// The four.
const (
	Creating  State = "creating"  // the process was killed in Create; the next Create or Mount goes on
	Ready     State = "ready"     //
	Removing  State = "removing"  // Delete did not end well; nothing but Remove is allowed
	Recovered State = "recovered" // it is mounted and nothing else is known: the journal was lost
)

// record of a volume in the journal. Records are values: who changes Users makes a new map.
type record struct {
	State   State             `json:"state"`
	Options map[string]string `json:"options,omitempty"` // as the user gave them
	Facts   map[string]string `json:"facts,omitempty"`   // as the driver's Create answered
	Created time.Time         `json:"created"`

	// What follows is about one boot, and void in the next.
	BootID   string         `json:"bootID,omitempty"`
	Users    map[string]int `json:"users,omitempty"`    // how often each mount id has it
	Device   string         `json:"device,omitempty"`   // what Attach answered
	Attached bool           `json:"attached,omitempty"` // Attach was called, and Detach did not end well since
	ByDevice bool           `json:"byDevice,omitempty"` // MountDevice was called, not Mount
	Open     *call          `json:"open,omitempty"`     // counted, and nobody knows whether the answer arrived
}

// call is one that Docker may repeat.
type call struct {
	Verb string    `json:"verb"`
	ID   string    `json:"id"`
	Time time.Time `json:"time"`
}

// repeats is for how long a call may be one that Docker repeats. It does so for half a minute, and may have
// to wait for its turn.
const repeats = time.Minute

// is says that a call is the one that was counted already. It is wrong if the process was killed just after
// an answer and Docker then really makes the same call of the same id anew ("docker cp" into a container that
// has just started): then one count is missing, and the volume is unmounted on the host early, though not in
// the container, which has its own mount. The other mistake would be a volume that nobody can remove.
func (c *call) is(verb, id string, now time.Time) bool {
	return c != nil && c.Verb == verb && c.ID == id && now.Sub(c.Time) < repeats
}

// in is the record as it stands in a boot.
func (r record) in(boot string) record {
	if r.BootID != boot {
		r.BootID, r.Users, r.Device, r.Attached, r.ByDevice, r.Open = boot, nil, "", false, false, nil
	}
	return r
}

// users is the sum of the counts.
func (r record) users() (n int) {
	for _, c := range r.Users {
		n += c
	}
	return n
}

// count adds to an id's count, which does not fall below zero.
func (r *record) count(id string, add int) {
	r.Users = maps.Clone(r.Users)
	if r.Users == nil {
		r.Users = map[string]int{}
	}
	if r.Users[id] += add; r.Users[id] <= 0 {
		delete(r.Users, id)
	}
}

// request for the driver. The user's words win over facts of the same name.
func (r record) request(name string) volume.Request {
	options := maps.Clone(r.Facts)
	if options == nil {
		options = map[string]string{}
	}
	maps.Copy(options, r.Options)
	return volume.Request{Name: name, Options: options}
}
