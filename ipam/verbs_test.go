package main

import (
	"encoding/json"
	"net/netip"
	"testing"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/lariat-net/lariat/pkg/cni"
	"github.com/lariat-net/lariat/pkg/ipam"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// TestF19_StandIn: what an address that was given with its length tells; one without tells too little.
func TestF19_StandIn(t *testing.T) {
	for _, tc := range []struct {
		name string
		in   []string
		want string // address gateway subnet
	}{
		{"nothing", nil, ""},
		{"with a length", []string{"10.42.1.9/16"}, "10.42.1.9 10.42.0.1 10.42.0.0/16"},
		{"without", []string{"10.42.1.9/32"}, ""},
		{"one of two without", []string{"10.42.1.9/16", "fd42::9/128"}, ""},
		{"IPv6", []string{"fd42::9/64"}, "fd42::9 fd42::1 fd42::/64"},
	} {
		var in []netip.Prefix
		for _, s := range tc.in {
			in = append(in, netip.MustParsePrefix(s))
		}
		got := ""
		if a := standIn("n", in); a != nil {
			x := a.Addresses[0]
			got = x.Address.String() + " " + x.Gateway.String() + " " + x.Subnet.String()
		}
		if got != tc.want {
			t.Errorf("%s: %q, want %q", tc.name, got, tc.want)
		}
	}
}

func TestF20_Result(t *testing.T) {
	a := &metadata.Attachment{Addresses: []metadata.AttachmentAddress{
		{Address: netip.MustParseAddr("10.42.1.9"), Subnet: netip.MustParsePrefix("10.42.0.0/16"),
			Gateway: netip.MustParseAddr("10.42.0.1")},
		{Address: netip.MustParseAddr("fd42::9"), Subnet: netip.MustParsePrefix("fd42::/48")},
		{Address: netip.MustParseAddr("203.0.113.9")}, // outside of all subnets
	}}
	for _, tc := range []struct {
		name   string
		length int
		want   string
	}{
		{"the subnet's length, or its own", 0, `10.42.1.9/16 10.42.0.1, fd42::9/48 <nil>, 203.0.113.9/32 <nil>`},
		{"subnetPrefixSize", 24, `10.42.1.9/24 10.42.0.1, fd42::9/24 <nil>, 203.0.113.9/24 <nil>`},
		{"that only fits IPv6", 64, `10.42.1.9/16 10.42.0.1, fd42::9/64 <nil>, 203.0.113.9/32 <nil>`},
	} {
		c := &call{Request: &cni.Request{}, conf: ipam.Config{DNS: &types.DNS{Nameservers: []string{"192.0.2.53"}}}}
		res := c.result(a, tc.length)
		got := ""
		for i, ip := range res.IPs {
			if i > 0 {
				got += ", "
			}
			got += ip.Address.String() + " " + ip.Gateway.String()
			if ip.Interface != nil {
				t.Errorf("%s: an IPAM plugin knows no interface: %d", tc.name, *ip.Interface)
			}
		}
		if got != tc.want {
			t.Errorf("%s: %s, want %s", tc.name, got, tc.want)
		}
		if res.DNS.Nameservers[0] != "192.0.2.53" {
			t.Errorf("%s: %+v", tc.name, res.DNS)
		}
	}
	// What the runtime asks for by the dns capability wins.
	r := &cni.Request{}
	if err := json.Unmarshal([]byte(`{"runtimeConfig":{"dns":{"servers":["198.51.100.53"],"searches":["x.example"]}}}`),
		&r.Conf); err != nil {
		t.Fatal(err)
	}
	res := (&call{Request: r, conf: ipam.Config{DNS: &types.DNS{Nameservers: []string{"192.0.2.53"}}}}).result(a, 0)
	if res.DNS.Nameservers[0] != "198.51.100.53" || res.DNS.Search[0] != "x.example" {
		t.Errorf("%+v", res.DNS)
	}
}
