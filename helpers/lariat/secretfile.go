package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/ipsec"
	"github.com/lariat-net/lariat/pkg/private"
)

// isSecret tells a line of a file of secrets from an empty one and from a remark.
func isSecret(line string) bool {
	line = strings.TrimSpace(line)
	return line != "" && line[0] != '#'
}

func secretLines(text []byte) (out []string) {
	for line := range strings.Lines(string(text)) {
		if isSecret(line) {
			out = append(out, strings.TrimSpace(line))
		}
	}
	return out
}

// rewriteSecrets replaces a file of secrets with what change makes of its lines, and returns the ids of what
// is in it then. It is there whole at every moment, the old one or the new; two who change it at once do so
// one after the other. No error tells of a secret.
func rewriteSecrets(file string, change func(have ipsec.Secrets, lines []string) []string) ([]string, error) {
	if _, err := ipsec.ReadSecrets(file); err != nil {
		return nil, err
	}
	file, err := filepath.EvalSymlinks(file) // a rename would replace the link
	if err != nil {
		return nil, fmt.Errorf("secret file: %w", err)
	}
	dir, err := os.Open(filepath.Dir(file))
	if err != nil {
		return nil, fmt.Errorf("secret file %s: %w", file, err)
	}
	defer dir.Close()
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		return nil, fmt.Errorf("secret file %s: lock its folder: %w", file, err)
	}
	have, err := ipsec.ReadSecrets(file)
	if err != nil {
		return nil, err
	}
	old, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	lines := slices.Collect(strings.Lines(strings.TrimRight(string(old), "\n")))
	for i := range lines {
		lines[i] = strings.TrimRight(lines[i], "\n")
	}
	after := change(have, slices.Clone(lines))
	if slices.Equal(after, lines) {
		return have.IDs(), nil
	}
	text := []byte(strings.Join(after, "\n") + "\n")
	now, err := ipsec.ParseSecrets(text)
	if err != nil {
		return nil, fmt.Errorf("secret file %s is left as it was: %w", file, err)
	}
	if err := private.Rewrite(file, text); err != nil {
		return nil, fmt.Errorf("secret file: %w", err)
	}
	return now.IDs(), nil
}
