package volume

// Identity is a key of the options that Create answers. Its value identifies the volume that Create
// made or found, because the name may mean another volume later. Callers pass the identity with
// each later request. Drivers that receive an identity act on that volume and on no other.
const Identity = "identity"

// Remembered returns the identity of the volume that a request is about. The caller's identity
// comes first, then the identity that this host has on record. "" means that only the name is
// known.
func Remembered(r Request, record string) string {
	if said := r.Options[Identity]; said != "" {
		return said
	}
	return record
}
