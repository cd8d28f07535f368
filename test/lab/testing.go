package lab

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"sync"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/plan"
	"github.com/lariat-net/lariat/pkg/probe"
)

// live are the clusters that were made, for Main to take down.
var live []*Cluster

// Main is TestMain: it runs the tests inside of new namespaces and takes their clusters down at the end.
// Where namespaces are forbidden the tests run outside, as they do under -short; those that say with
// probe.Need what they need are then skipped, with the reason.
func Main(m interface{ Run() int }) {
	flag.Parse()
	if os.Getenv(marker) != "" || !probe.Short() && probe.Check(probe.UserNS) == nil {
		Enter()
	}
	code := m.Run()
	for _, c := range live {
		if err := c.Down(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code) //nolint:forbidigo // it stands in for main
}

var alone struct {
	sync.Once
	host *Host
	err  error
}

// Alone returns a host with a real lariat-metadata and without a manager. All tests of a process share the host. The
// first call starts it and defines the networks. It skips the test where the host cannot run.
func Alone(t probe.TB, networks ...metadata.Network) *Host {
	t.Helper()
	probe.Need(t, probe.UserNS, probe.Veth, probe.Bridge)
	alone.Do(func() { alone.host, alone.err = startAlone(networks) })
	if alone.err != nil {
		t.Fatalf("start a host: %v", alone.err)
	}
	return alone.host
}

func startAlone(networks []metadata.Network) (*Host, error) {
	ctx := context.Background()
	c, err := New(Options{Hosts: 1})
	if err != nil {
		return nil, err
	}
	if err := c.Up(ctx); err != nil {
		return nil, err
	}
	h := c.Hosts[0]
	if err := h.Manager.Stop(); err != nil {
		return nil, err
	}
	h.Manager = nil
	for _, n := range networks {
		if err := h.Client().Put(ctx, metadata.KindNetwork, n.Name, n); err != nil {
			return nil, err
		}
	}
	return h, nil
}

// Settled returns an error that names everything in which the host's kernel differs from what its metadata wants.
func (h *Host) Settled(ctx context.Context) error {
	snap, err := h.Client().View(ctx)
	if err != nil {
		return err
	}
	var d *delta.Difference
	err = h.Do(func() error {
		want := plan.Desired(snap, h.Name, kernel.LooseReversePath())
		k, err := kernel.New()
		if err != nil {
			return err
		}
		have, err := k.Observe(ctx, want)
		if err == nil {
			d = delta.Between(want, have)
		}
		return errors.Join(err, k.Close())
	})
	if err == nil && !d.Empty() {
		err = fmt.Errorf("host %s is not settled:\n%s", h.Name, d)
	}
	return err
}
