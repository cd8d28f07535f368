package volume

// Identity is a key of the options that Create answers. Its value says which volume it was that
// Create made or found: a name may mean another one by now. Callers give it back with each later
// request; drivers that get it act on that volume and on no other.
const Identity = "identity"

// Remembered returns the identity that a request is about: the one that the caller gives back, else
// the one that this host has on record. "" means that the name is all that is known.
func Remembered(r Request, record string) string {
	if said := r.Options[Identity]; said != "" {
		return said
	}
	return record
}
