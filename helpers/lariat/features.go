package main

import (
	"fmt"

	"github.com/lariat-net/lariat/pkg/doctor"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/probe"
)

// needed is what Lariat asks of a kernel, and what does not work without it.
var needed = []struct {
	feature probe.Feature
	modules string
	doctor.Feature
}{
	{probe.Veth, "veth", doctor.Feature{Name: "veth devices", Need: "containers cannot be connected"}},
	{probe.VXLAN, "vxlan", doctor.Feature{Name: "VXLAN devices", Need: "hosts cannot tunnel", Encap: metadata.EncapVXLAN}},
	{probe.NexthopObjects, "", doctor.Feature{Name: "nexthop objects",
		Need: "hosts have no routes to each other; they came with Linux 5.3", Encap: metadata.EncapVXLAN}},
	{probe.Nft, "nf_tables", doctor.Feature{Name: "nftables", Need: "nothing is filtered and no host NAT is made"}},
	{probe.NftFib, "nft_fib_inet", doctor.Feature{Name: "nftables' fib lookup",
		Need: "no rule is made: containers can use each other's addresses, and none can be connected"}},
	{probe.NftCT, "nft_ct", doctor.Feature{Name: "connection tracking in nftables",
		Need: "no rule is made: networks are not kept apart, and no container can be connected"}},
	{probe.NftNAT, "nft_masq", doctor.Feature{Name: "NAT in nftables",
		Need: "containers do not reach the outside; in family inet it came with Linux 5.2"}},
	{probe.IPv6, "", doctor.Feature{Name: "IPv6", Need: "networks with IPv6 do not work; look at ipv6.disable on the " +
		"kernel's command line", IPv6: true}},
	{probe.XfrmInterface, "xfrm_interface", doctor.Feature{Name: "XFRM interfaces",
		Need:  "no container of an encrypted network can be connected; they came with Linux 4.19",
		Encap: metadata.EncapIPsec}},
	{probe.ESP, "esp4", doctor.Feature{Name: "ESP over IPv4",
		Need: "no container of an encrypted network can be connected", Encap: metadata.EncapIPsec, Outer: 4}},
	{probe.ESP6, "esp6", doctor.Feature{Name: "ESP over IPv6",
		Need: "no container of an encrypted network can be connected", Encap: metadata.EncapIPsec, Outer: 6}},
	{probe.AESGCM, "-a gcm seqiv", doctor.Feature{Name: "AES-GCM for ESP",
		Need:  "encrypted networks use AES-CBC with SHA-256 instead, which costs more time and space",
		Encap: metadata.EncapIPsec, Fallback: true}},
}

// features asks the kernel what it can do, by trying it in a namespace that is thrown away. What the model
// does not need is not tried: a try loads modules.
func features(s *metadata.Snapshot) ([]doctor.Feature, error) {
	if err := probe.Check(probe.NetNS); err != nil {
		return nil, fmt.Errorf("only root may try what the kernel can do: %w", err)
	}
	var out []doctor.Feature
	for _, n := range needed {
		f := n.Feature
		if !f.Needed(s) {
			continue
		}
		f.OK, f.Remedy = true, "run a kernel that can"
		if n.modules != "" {
			f.Remedy = "modprobe " + n.modules +
				"; when there is no such module, install the distribution's package of further modules, or run another kernel"
		}
		if err := probe.Check(n.feature); err != nil {
			f.OK, f.Detail = false, err.Error()
		}
		out = append(out, f)
	}
	return out, nil
}
