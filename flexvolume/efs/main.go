// Command efs is the FlexVolume driver for AWS's Elastic File System. kubelet finds it as
// lariat~efs/efs. Rancher's storage daemon called such drivers, and a person can: see README.md, or
// --help.
package main

import "github.com/lariat-net/lariat/pkg/volume/flex"

var version = "unknown" // set by the Makefile

func main() { flex.Main(program()) }
