package flextest

import (
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/lariat-net/lariat/pkg/volume"
)

// ErrKilled is the error of a call that Cuts killed.
var ErrKilled = errors.New("killed")

// killed is the panic value of a killed call, so that no more code of the driver runs.
type killed struct{}

// Cuts lets two hosts act in turns. It cuts each call of one host at a failpoint, by calls of the
// other host or by a kill.
type Cuts struct {
	Rand    *rand.Rand
	Act     func(host int)    // makes a host's call within Survive
	Tell    func(line string) // records an action, for the report of a failure
	Steps   int               // a call is cut at one of its first Steps failpoints, or at a named one
	Most    int               // the most calls of the other host at one cut
	Reached map[string]int    // the number of cuts at each failpoint, by name
}

// Next makes a call of one of the hosts, and cuts it.
func (c Cuts) Next() {
	host, at, dies := c.Rand.IntN(2), c.Rand.IntN(c.Steps), c.Rand.IntN(3) == 0
	// A choice by numbers alone would rarely cut calls at failpoints that few calls pass.
	name := ""
	if known := slices.Sorted(maps.Keys(c.Reached)); len(known) > 0 && c.Rand.IntN(2) == 0 {
		name = slices.MinFunc(known, func(a, b string) int { return c.Reached[a] - c.Reached[b] })
		if c.Rand.IntN(2) == 0 {
			name = known[c.Rand.IntN(len(known))]
		}
	}
	volume.OnFailpoint = func(step string) {
		c.Reached[step] += 0
		if at--; name == "" && at >= 0 || name != "" && name != step {
			return
		}
		c.Reached[step]++
		volume.OnFailpoint = nil
		for range 1 + c.Rand.IntN(c.Most) {
			c.Act(1 - host)
		}
		c.Tell("… at " + step)
		if dies {
			panic(killed{})
		}
	}
	defer func() { volume.OnFailpoint = nil }()
	c.Act(host)
}

// Survive makes a call that Next may kill.
func Survive(call func() error) (err error) {
	defer func() {
		if r := recover(); r == (killed{}) {
			err = ErrKilled
		} else if r != nil {
			panic(r)
		}
	}()
	return call()
}

// WantReached fails a test in which no call was cut at one of the failpoints.
func WantReached(t *testing.T, reached map[string]int, steps ...string) {
	t.Helper()
	for _, step := range steps {
		if reached[step] == 0 {
			t.Errorf("no call was cut at %s: %v", step, slices.Sorted(maps.Keys(reached)))
		}
	}
}
