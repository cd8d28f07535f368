package cloud

import "github.com/lariat-net/lariat/pkg/volume"

// OnRemove is what Delete does with what Create made.
type OnRemove string

// The two.
const (
	Retain OnRemove = "retain"
	Purge  OnRemove = "purge"
)

// UnmarshalText refuses other words.
func (o *OnRemove) UnmarshalText(text []byte) error { return volume.OneOf(o, text, Retain, Purge) }
