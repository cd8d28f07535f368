package delta

import "fmt"

// Problemf adds a Problem about an entry that could not be planned.
func (s *State) Problemf(format string, a ...any) {
	s.Problems = append(s.Problems, fmt.Sprintf(format, a...))
}
