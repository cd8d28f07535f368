package metadata

import (
	"errors"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
)

// TestUnreachableIsNamed: an error names the helper that does not answer, and ErrUnreachable is the metadata service's.
func TestUnreachableIsNamed(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "nobody")
	for service, want := range map[string]string{"": "metadata service unreachable: ",
		"network manager": "network manager unreachable: "} {
		err := Client{Socket: socket, Service: service}.Do(t.Context(), "GET", "/v1/tunnels", nil, nil)
		if err == nil || !strings.HasPrefix(err.Error(), want) || !strings.Contains(err.Error(), socket) ||
			errors.Is(err, ErrUnreachable) != (service == "") {
			t.Errorf("%q: %v", service, err)
		}
	}
}

// TestNetworksClash: the rules by which two networks cannot be used together.
func TestNetworksClash(t *testing.T) {
	n := Network{Encapsulation: EncapVXLAN, VNI: 7, Subnets: prefixes("10.42.0.0/16", "fd42::/48")}
	for _, tc := range []struct {
		name  string
		o     Network
		vni   bool
		pairs int
	}{
		{"apart", Network{Encapsulation: EncapVXLAN, VNI: 8, Subnets: prefixes("10.43.0.0/16", "fd43::/48")}, false, 0},
		{"one VNI", Network{Encapsulation: EncapVXLAN, VNI: 7, Subnets: prefixes("10.43.0.0/16")}, true, 0},
		{"both families", Network{Encapsulation: EncapIPsec, VNI: 7, Subnets: prefixes("fd42:0:0:1::/64", "10.0.0.0/8")},
			false, 2},
		{"flat", Network{Encapsulation: EncapNone, VNI: 7, Subnets: prefixes("10.42.0.0/16")}, false, 0},
	} {
		for _, x := range [][2]*Network{{&n, &tc.o}, {&tc.o, &n}} {
			if vni, pairs := x[0].SharesVNI(x[1]), x[0].Overlaps(x[1]); vni != tc.vni || len(pairs) != tc.pairs {
				t.Errorf("%s: %t %v", tc.name, vni, pairs)
			}
		}
	}
	h := Host{Underlay: []Underlay{{Address: prefixes("10.42.9.9/24")[0]}, {Address: prefixes("192.0.2.1/24")[0]}}}
	if pairs := n.OverlapsUnderlay(&h); len(pairs) != 1 || pairs[0][1].String() != "10.42.9.9/24" {
		t.Error(pairs)
	}
	n.Encapsulation = EncapNone
	if pairs := n.OverlapsUnderlay(&h); pairs != nil {
		t.Error(pairs)
	}
}

func prefixes(list ...string) (out []netip.Prefix) {
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}
