//go:debug containermaxprocs=0

// Command lariat-ipam is the CNI IPAM plugin that allocates addresses from the metadata service.
// The address is the one that the model assigned to the container, or one of this host's blocks.
// The plugin works under any main plugin. lariat-vxlan does the same work in-process. See
// README.md.
package main

import (
	_ "embed"

	"github.com/lariat-net/lariat/pkg/cni"
	"github.com/lariat-net/lariat/pkg/ipam"
)

//go:embed README.md
var help string

// version is stamped by the linker.
var version = "devel"

func main() {
	cni.Main(cni.Plugin{Name: ipam.IPAMType, Version: version, Help: help, Add: add, Del: del, Check: check,
		Status: status, GC: gc})
}
