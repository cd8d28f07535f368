package nat_test

import (
	"flag"
	"net/netip"
	"os"
	"testing"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/nat"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func prefixes(list ...string) (out []netip.Prefix) {
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// TestF58_F59_Golden checks the rules of each small set of networks against testdata.
func TestF58_F59_Golden(t *testing.T) {
	overlay := metadata.Network{Name: "overlay", Encapsulation: metadata.EncapVXLAN, HostNAT: true,
		Subnets: prefixes("10.42.0.0/16", "fd42::/48")}
	second := metadata.Network{Name: "second", Encapsulation: metadata.EncapVXLAN, HostNAT: true,
		Subnets: prefixes("10.43.0.0/16")}
	bare := metadata.Network{Name: "bare", Encapsulation: metadata.EncapVXLAN, Subnets: prefixes("10.44.0.0/16")}
	flat := metadata.Network{Name: "flat", Encapsulation: metadata.EncapNone, HostNAT: true,
		Subnets: prefixes("192.0.2.0/24")}
	exempt := overlay
	// The prefixes have host bits, nest, repeat, cover the network itself, and use both families.
	exempt.HostNATExempt = prefixes("198.51.100.7/24", "198.51.100.128/25", "198.51.100.0/24", "10.0.0.0/8",
		"2001:db8::/32", "fd00::/8")
	for _, tc := range []struct {
		name     string
		networks []metadata.Network
	}{
		{"none", nil},
		{"dual-stack", []metadata.Network{overlay}},
		{"exempt", []metadata.Network{exempt}},
		{"several", []metadata.Network{overlay, second, bare, flat}},
		{"not-wanted", []metadata.Network{bare, flat}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := nat.Plan(&metadata.Snapshot{Networks: tc.networks}).String()
			golden := "testdata/" + tc.name + ".plan"
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("differs from %s (make update/golden rewrites it):\n%s", golden, got)
			}
		})
	}
}
