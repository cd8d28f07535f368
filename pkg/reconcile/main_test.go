package reconcile

import (
	"context"
	"net/netip"
	"sync"
	"testing"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/probe"
	"github.com/lariat-net/lariat/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }

var (
	ctx     = context.Background()
	cluster *lab.Cluster
	once    sync.Once
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// start is a host with a real lariat-metadata; the manager is what is tested.
func start(t *testing.T) *lab.Host {
	t.Helper()
	probe.Need(t, probe.UserNS, probe.Veth, probe.Bridge)
	once.Do(func() {
		c, err := lab.New(lab.Options{Hosts: 1})
		must(t, err)
		cluster = c
		must(t, c.Up(ctx))
		must(t, c.Hosts[0].Manager.Stop())
		c.Hosts[0].Manager = nil
		must(t, c.Hosts[0].Client().Put(ctx, metadata.KindNetwork, "overlay",
			metadata.Network{Name: "overlay", Encapsulation: metadata.EncapVXLAN, VNI: 1042,
				Subnets: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")}}))
	})
	if cluster == nil {
		t.Fatal("the host did not start")
	}
	return cluster.Hosts[0]
}
