package cloud

import "github.com/lariat-net/lariat/pkg/volume"

// OnRemove selects the action of Delete on objects that Create made.
type OnRemove string

// The two actions.
const (
	Retain OnRemove = "retain"
	Purge  OnRemove = "purge"
)

// UnmarshalText refuses other words.
func (o *OnRemove) UnmarshalText(text []byte) error { return volume.OneOf(o, text, Retain, Purge) }
