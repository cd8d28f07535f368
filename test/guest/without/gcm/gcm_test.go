// Package gcm_test runs in a guest whose kernel lacks AES-GCM.
package gcm_test

import (
	"context"
	"encoding/json"
	"strings"
	"testing"

	"github.com/lariat-net/lariat/pkg/ipsec"
	"github.com/lariat-net/lariat/pkg/probe"
	"github.com/lariat-net/lariat/pkg/unixhttp"
	"github.com/lariat-net/lariat/test/guest"
	"github.com/lariat-net/lariat/test/guest/without"
	"github.com/lariat-net/lariat/test/lab"
)

func TestMain(m *testing.M) { without.Main(m, "gcm,aesni_intel") }

// TestF40_FallbackSuite: hosts whose kernels lack AES-GCM agree on AES-CBC with SHA-256, and containers reach
// each other.
func TestF40_FallbackSuite(t *testing.T) {
	if probe.Check(probe.AESGCM) == nil {
		t.Fatal("the kernel has AES-GCM all the same")
	}
	c := without.Cluster(t, 2)
	ctx, cancel := context.WithTimeout(t.Context(), guest.Patience)
	defer cancel()
	var ends []*lab.Container
	for _, h := range c.Hosts {
		ct, err := h.NewContainer("c")
		without.Must(t, err)
		call := without.Call(t, h)
		without.Must(t, ct.AddPatiently(ctx, call))
		defer func() { without.Must(t, ct.Del(context.Background(), call)) }()
		ends = append(ends, ct)
	}
	_, err := ends[0].Ping(ctx, ends[1].Addr(false), 56)
	without.Must(t, err)
	r := report(t, c.Hosts[0])
	if len(r.Tunnels) != 1 || !strings.HasPrefix(r.Tunnels[0].Children[0].Suite, "AES_CBC-256/HMAC_SHA2_256_128") ||
		len(r.Suites) != 1 {
		t.Errorf("%+v", r)
	}
}

func report(t *testing.T, h *lab.Host) (r ipsec.Report) {
	t.Helper()
	_, data, err := unixhttp.Page(t.Context(), h.ManagerSocket(), "GET", "/v1/tunnels", nil)
	without.Must(t, err)
	without.Must(t, json.Unmarshal(data, &r))
	return r
}
