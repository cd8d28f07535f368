// Command lariat-network-manager keeps one host's kernel equal to the metadata: the overlay's devices,
// routes, neighbours and forwarding entries, host NAT, leftovers of dead containers. See README.md.
package main

import "os"

var version = "unknown" // set by the Makefile

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }
