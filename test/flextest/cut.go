package flextest

import (
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/lariat-net/lariat/pkg/volume"
)

// ErrKilled is how a call ended that Cuts killed.
var ErrKilled = errors.New("killed")

// killed is what a call panics with that is killed: nothing of the driver runs behind it.
type killed struct{}

// Cuts has two hosts act in turns, each call of the one cut at one of its steps by calls of the other, or by a kill.
type Cuts struct {
	Rand    *rand.Rand
	Act     func(host int)    // a call by a host, which it makes within Survive
	Tell    func(line string) // what was done, for a failure
	Steps   int               // a call is cut at one of its first so many, or at one that has a name
	Most    int               // calls of the other host in between
	Reached map[string]int    // how often a call was cut at each step, by its name
}

// Next is a call by one of the hosts, and what comes in between.
func (c Cuts) Next() {
	host, at, dies := c.Rand.IntN(2), c.Rand.IntN(c.Steps), c.Rand.IntN(3) == 0
	// By numbers alone, steps that few calls pass would hardly ever be cut.
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

// WantReached fails a test in which no call was cut at one of the steps.
func WantReached(t *testing.T, reached map[string]int, steps ...string) {
	t.Helper()
	for _, step := range steps {
		if reached[step] == 0 {
			t.Errorf("no call was cut at %s: %v", step, slices.Sorted(maps.Keys(reached)))
		}
	}
}
