package runtimes

import (
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/certs"
	"github.com/lariat-net/lariat/test/lab"
)

// startLariat starts metadata and network manager on both hosts. The store is embedded in host a; host b
// joins it by TLS.
func startLariat(t *testing.T, bin string, a, b *host) {
	t.Helper()
	certDir := filepath.Join(a.dir, "certs")
	if _, err := certs.Init(certDir, "runtimes", time.Now()); err != nil {
		t.Fatal(err)
	}
	endpoint := "https://" + a.underlay + ":2379"
	for _, h := range []*host{a, b} {
		if _, err := certs.Host(certDir, certs.Request{Name: h.name, IPs: []netip.Addr{netip.MustParseAddr(h.underlay)}},
			time.Now()); err != nil {
			t.Fatal(err)
		}
		args := []string{filepath.Join(bin, "lariat-metadata"), "--host-name", h.name, "--socket", h.socket, "--underlay",
			h.underlay + "/24",
			"--machine-id-file", filepath.Join(h.dir, "machine-id"), "--etcd-ca", filepath.Join(certDir, certs.CACert),
			"--etcd-cert", filepath.Join(certDir, h.name+".crt"), "--etcd-key", filepath.Join(certDir, h.name+".key")}
		if h == a {
			args = append(args, "--data-dir", filepath.Join(h.dir, "etcd"), "--listen-client", endpoint)
		} else {
			args = append(args, "--etcd-endpoints", endpoint)
		}
		ns := lab.Netns{Name: h.name, Path: h.netns}
		for _, args := range [][]string{args, {filepath.Join(bin, "lariat-network-manager"), "--metadata-socket", h.socket,
			"--socket", filepath.Join(h.dir, "manager.sock"), "--state-dir", h.state}} {
			p, err := ns.Start(t.Context(), h.dir, nil, args...)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := p.Stop(); err != nil {
					t.Error(err)
				}
				if t.Failed() {
					t.Logf("last words of %s:\n%s", p.Name, tail([]byte(p.Log()), 3000))
				}
			})
		}
	}
}
