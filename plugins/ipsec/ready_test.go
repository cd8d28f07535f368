package main

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lariat-net/lariat/pkg/metadata"
)

// TestUnreachableManager: STATUS names the network manager, and not the metadata service, when the manager is away.
func TestUnreachableManager(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "nobody")
	err := ready(t.Context(), socket)
	if err == nil || strings.Contains(err.Error(), "metadata service") || errors.Is(err, metadata.ErrUnreachable) {
		t.Error(err)
	}
	if err != nil && !strings.Contains(err.Error(), "cannot encrypt") &&
		(!strings.Contains(err.Error(), "network manager") || !strings.Contains(err.Error(), socket)) {
		t.Error(err)
	}
}
