// Command lariat is how a person looks at a Lariat cluster and changes what it is made of. See README.md.
package main

import "os"

func main() { os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }
