// Command empty is the least that a CNI plugin written in Go could be: it decodes JSON from its input and answers with
// JSON. What it takes to start is the floor for the start of ours.
package main

import (
	"encoding/json"
	"os"
)

func main() {
	var conf struct {
		CNIVersion string `json:"cniVersion"`
		Name       string `json:"name"`
		Type       string `json:"type"`
	}
	if err := json.NewDecoder(os.Stdin).Decode(&conf); err != nil {
		os.Exit(1)
	}
	if err := json.NewEncoder(os.Stdout).Encode(&conf); err != nil {
		os.Exit(1)
	}
}
