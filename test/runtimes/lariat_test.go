package runtimes

import "testing"

// startLariat starts the service and the manager on both hosts; b joins the store of a.
func startLariat(t *testing.T, bin string, a, b *host) {
	t.Helper()
}
