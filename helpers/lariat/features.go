package main

import (
	"fmt"

	"github.com/lariat-net/lariat/pkg/doctor"
	"github.com/lariat-net/lariat/pkg/probe"
)

// needed is what Lariat asks of a kernel, and what does not work without it.
var needed = []struct {
	feature      probe.Feature
	name, module string
	need         string
	ipv6         bool
}{
	{probe.Veth, "veth devices", "veth", "containers cannot be connected", false},
	{probe.VXLAN, "VXLAN devices", "vxlan", "hosts cannot tunnel", false},
	{probe.NexthopObjects, "nexthop objects", "", "hosts have no routes to each other; they came with Linux 5.3", false},
	{probe.Nft, "nftables", "nf_tables", "nothing is filtered and no host NAT is made", false},
	{probe.NftFib, "nftables' fib lookup", "nft_fib_inet", "containers can use each other's addresses", false},
	{probe.NftNAT, "NAT in nftables", "nft_masq", "containers do not reach the outside; in family inet it came with Linux 5.2", false},
	{probe.IPv6, "IPv6", "", "networks with IPv6 do not work; look at ipv6.disable on the kernel's command line", true},
}

// features asks the kernel what it can do, by trying it in a namespace that is thrown away.
func features() ([]doctor.Feature, error) {
	if err := probe.Check(probe.NetNS); err != nil {
		return nil, fmt.Errorf("only root may try what the kernel can do: %w", err)
	}
	var out []doctor.Feature
	for _, n := range needed {
		f := doctor.Feature{Name: n.name, OK: true, Need: n.need, IPv6: n.ipv6, Remedy: "run a kernel that can"}
		if n.module != "" {
			f.Remedy = "modprobe " + n.module + "; when there is no such module, install the distribution's package of further modules, or run another kernel"
		}
		if err := probe.Check(n.feature); err != nil {
			f.OK, f.Detail = false, err.Error()
		}
		out = append(out, f)
	}
	return out, nil
}
