// Package runtimes holds tests in which real container runtimes call our executables: containerd through CRI,
// Podman, and dockerd with its volumes.
//
// Two hosts are two network namespaces with a wire between them, each with its own runtime, lariat-metadata
// and lariat-network-manager, all with directories of their own and in one mount namespace that belongs to
// the test. Images are made here, from busybox; no registry is asked. The tests need real root, because runc
// does.
package runtimes
