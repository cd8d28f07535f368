package reconcile

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/lariat-net/lariat/pkg/ike"
	"github.com/lariat-net/lariat/pkg/ipsec"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// TestF46NothingIsKnownBeforeTheFirstPass: that no network is encrypted is said by who has looked.
func TestF46NothingIsKnownBeforeTheFirstPass(t *testing.T) {
	var view *metadata.Snapshot
	tunnels := &Tunnels{View: func() *metadata.Snapshot { return view }, clean: true}
	ask := func(known bool) {
		t.Helper()
		for _, detail := range []bool{false, true} {
			r := tunnels.Report(t.Context(), detail)
			if r.Networks == nil || r.Tunnels == nil || (r.Problem == "") != known || (r.Remedy == "") != known {
				t.Errorf("detail %v: %+v", detail, r)
			}
		}
	}
	ask(false)
	if _, err := tunnels.Run(t.Context()); !errors.Is(err, errNoView) {
		t.Error(err)
	}
	ask(false)
	view = &metadata.Snapshot{}
	if _, err := tunnels.Run(t.Context()); err != nil {
		t.Error(err)
	}
	ask(true)
}

// TestF42_LossesOfTheKernel: what the IKE daemon has and the kernel has not is found, whole networks'
// policies and single SAs; what others have, and what is on its way, is left alone.
func TestF42_LossesOfTheKernel(t *testing.T) {
	v4, v6, other := netip.MustParsePrefix("10.44.0.0/16"), netip.MustParsePrefix("fd44::/48"),
		netip.MustParsePrefix("10.45.0.0/16")
	tunnels := []ipsec.Tunnel{
		{Name: "lariat-b", Children: []ipsec.Child{{Network: "one", IfID: 1, Subnets: []netip.Prefix{v4, v6}},
			{Network: "two", IfID: 2, Subnets: []netip.Prefix{other}}}},
		{Name: "lariat-c", Children: []ipsec.Child{{Network: "one", IfID: 3, Subnets: []netip.Prefix{v4, v6}}}},
	}
	policies := func(ifID uint32, subnets ...netip.Prefix) (out []kernel.XFRMPolicy) {
		for _, p := range subnets {
			for _, dir := range []string{"in", "fwd", "out"} {
				out = append(out, kernel.XFRMPolicy{IfID: ifID, Dir: dir, Src: p, Dst: p})
			}
		}
		return out
	}
	child := func(network string, ifID uint32, id uint64, state string) ike.ChildSA {
		return ike.ChildSA{Network: network, ID: id, IfID: ifID, State: state, SPIIn: 0x100 + uint32(id), SPIOut: 0x200 +
			uint32(id)}
	}
	whole := func() observation {
		return observation{
			policies: append(append(policies(1, v4, v6), policies(2, other)...), policies(3, v4, v6)...),
			known: []ike.SA{{Name: "lariat-b", Children: []ike.ChildSA{child("one", 1, 1, ike.Installed),
				child("two", 2, 2, ike.Installed),
				child("one", 1, 3, "REKEYED"), child("one", 1, 4, "INSTALLING")}}},
			// of what goes out none is there, and one is strange
			sas: []kernel.SA{{IfID: 1, SPI: 0x101}, {IfID: 2, SPI: 0x102}, {IfID: 2, SPI: 0x900}},
		}
	}
	for _, tc := range []struct {
		name string
		lose func(l *observation)
		want string
	}{
		{"nothing", func(*observation) {}, ""},
		{"all policies", func(l *observation) { l.policies = nil },
			"~ policies of lariat-b/one, ~ policies of lariat-b/two, ~ policies of lariat-c/one"},
		{"one policy of IPv6", func(l *observation) { l.policies = l.policies[:len(l.policies)-1] },
			"~ policies of lariat-c/one"},
		{"a network's under another id", func(l *observation) {
			l.policies = append(policies(1, v4, v6), append(policies(4, other), policies(3, v4, v6)...)...)
		}, "~ policies of lariat-b/two"},
		{"all SAs", func(l *observation) { l.sas = nil }, "- ESP SA 0x00000101 of lariat-b/one, - ESP SA 0x00000102 of " +
			"lariat-b/two"},
		{"an SPI of another's", func(l *observation) { l.sas[0].IfID = 9 }, "- ESP SA 0x00000101 of lariat-b/one"},
		{"policies and SAs", func(l *observation) { l.policies, l.sas = policies(3, v4, v6), l.sas[1:] },
			"~ policies of lariat-b/one, ~ policies of lariat-b/two, - ESP SA 0x00000101 of lariat-b/one"},
	} {
		l := whole()
		tc.lose(&l)
		var got []string
		for _, x := range missingStates(tunnels, l) {
			got = append(got, strings.TrimSuffix(fmt.Sprint(x), ", which the kernel lost"))
		}
		if text := strings.Join(got, ", "); text != tc.want {
			t.Errorf("%s: %s; want %s", tc.name, text, tc.want)
		}
	}
}
