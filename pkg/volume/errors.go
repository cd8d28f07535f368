package volume

import (
	"errors"
	"fmt"
)

// Kinds of errors, for errors.Is. All kinds but ErrInUse are final.
var (
	// ErrNotSupported is the driver's answer to a verb that it never supports.
	ErrNotSupported = errors.New("not supported")
	// ErrInvalid means that the request cannot be right: a name, an option or a value. The driver
	// changed nothing.
	ErrInvalid = errors.New("invalid request")
	// ErrConflict means that the request differs from the existing state. Examples: another volume
	// is mounted at the directory, or the name has another definition.
	ErrConflict = errors.New("conflict")
	// ErrNotFound means that a required volume does not exist.
	ErrNotFound = errors.New("not found")
	// ErrInUse means that a process uses the volume. The error passes when the use ends.
	ErrInUse = errors.New("in use")
)

// IsFinal reports whether an error recurs with every call until a person changes something.
func IsFinal(err error) bool {
	for _, e := range []error{ErrNotSupported, ErrInvalid, ErrConflict, ErrNotFound} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// kindError gives an error a kind for errors.Is, without the kind's text.
type kindError struct {
	kind error
	err  error
}

func (e *kindError) Error() string   { return e.err.Error() }
func (e *kindError) Unwrap() []error { return []error{e.kind, e.err} }

// Errorf makes an error of one of the kinds above. The error's text is the formatted text alone.
func Errorf(kind error, format string, args ...any) error {
	return &kindError{kind, fmt.Errorf(format, args...)}
}
