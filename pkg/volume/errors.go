package volume

import (
	"errors"
	"fmt"
)

// What can be wrong, for errors.Is. All but ErrInUse are final.
var (
	// ErrNotSupported is the driver's answer to a verb that it does not have, ever.
	ErrNotSupported = errors.New("not supported")
	// ErrInvalid is a request that cannot be right: a name, an option, a value. Nothing was done.
	ErrInvalid = errors.New("invalid request")
	// ErrConflict is when what was asked for and what is there differ: another volume mounted at the folder,
	// another definition of the name.
	ErrConflict = errors.New("conflict")
	// ErrNotFound is a volume that does not exist, where it must.
	ErrNotFound = errors.New("not found")
	// ErrInUse is a volume that somebody uses: it passes when they end.
	ErrInUse = errors.New("in use")
)

// IsFinal says that an error comes back however often the call is repeated, until a person changes something.
func IsFinal(err error) bool {
	for _, e := range []error{ErrNotSupported, ErrInvalid, ErrConflict, ErrNotFound} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// kindError has a kind for errors.Is without its text.
type kindError struct {
	kind error
	err  error
}

func (e *kindError) Error() string   { return e.err.Error() }
func (e *kindError) Unwrap() []error { return []error{e.kind, e.err} }

// Errorf makes an error of one of the kinds above. Its text is only what is formatted.
func Errorf(kind error, format string, args ...any) error {
	return &kindError{kind, fmt.Errorf(format, args...)}
}
