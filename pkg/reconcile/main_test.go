package reconcile

import (
	"context"
	"net/netip"
	"testing"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }

var (
	ctx     = context.Background()
	overlay = metadata.Network{Name: "overlay", Encapsulation: metadata.EncapVXLAN, VNI: 1042,
		Subnets: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")}}
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// start returns a host with a real lariat-metadata. These tests run the manager themselves.
func start(t *testing.T) *lab.Host {
	t.Helper()
	return lab.Alone(t, overlay)
}
