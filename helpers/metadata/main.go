// Command lariat-metadata is the metadata service of one host: which hosts and networks there are, and who uses which
// address. See README.md.
package main

import "os"

var version = "unknown" // set by the Makefile

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }
