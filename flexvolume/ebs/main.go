// Command ebs is the FlexVolume driver for EBS volumes of Amazon EC2. It creates, attaches,
// formats, mounts, enlarges, detaches and deletes volumes. kubelet and its controller find it as
// lariat~ebs/ebs. Rancher's storage daemon called such drivers, and a person can: see README.md, or
// --help.
package main

import "github.com/lariat-net/lariat/pkg/volume/flex"

var version = "unknown" // set by the Makefile

func main() { flex.Main(program()) }
