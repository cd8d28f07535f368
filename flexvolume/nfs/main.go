// Command nfs is the FlexVolume driver for NFS: exports, and directories on exports that it makes
// and removes. kubelet finds it as lariat~nfs/nfs. Rancher's storage daemon called such drivers,
// and a person can: see README.md, or --help.
package main

import "github.com/lariat-net/lariat/pkg/volume/flex"

var version = "unknown" // set by the Makefile

func main() { flex.Main(program()) }
