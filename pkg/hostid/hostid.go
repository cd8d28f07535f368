// Package hostid reads the ids by which a host is known: one of its installation, and one of each boot.
package hostid

import (
	"fmt"
	"os"
	"strings"
)

// BootFile has the kernel's id of this boot.
const BootFile = "/proc/sys/kernel/random/boot_id"

// Boot returns the kernel's id of this boot; empty when it cannot be read.
func Boot() string {
	id, _ := Read(BootFile) // it is always there
	return id
}

// Read returns the id in a file.
func Read(file string) (string, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	id := strings.TrimSpace(string(data))
	if id == "" {
		return "", fmt.Errorf("%s is empty", file)
	}
	return id, nil
}
