//go:debug containermaxprocs=0

// Command lariat-ipsec is the CNI plugin that joins a container to an encrypted network between
// hosts.
//
// The container gets a routed veth and an address that is unique in the cluster. The metadata
// service knows the hosts and their addresses. The container's packets to other hosts leave as ESP
// or not at all. See README.md.
package main

import (
	_ "embed"

	"github.com/lariat-net/lariat/pkg/cni"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/overlay"
)

//go:embed README.md
var help string

// version is stamped by the linker.
var version = "devel"

func main() {
	cni.Main(overlay.Plugin{
		Name:          "lariat-ipsec",
		Version:       version,
		Help:          help,
		Encapsulation: metadata.EncapIPsec,
		Ready:         ready,
		Kernel:        func() (kernel.Kernel, error) { return kernel.New() },
	}.CNI())
}
