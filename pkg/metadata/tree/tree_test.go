package tree

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/lariat-net/lariat/pkg/metadata"
)

func model() *metadata.Snapshot {
	return &metadata.Snapshot{Revision: 7,
		Hosts:    []metadata.Host{{Name: "a", MachineID: "h1", Live: true, Underlay: []metadata.Underlay{{Address: netip.MustParsePrefix("192.0.2.11/24")}}}},
		Networks: []metadata.Network{{Name: "lan", IsDefault: true, Subnets: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")}}},
		Containers: []metadata.Container{
			{ID: "c1", UUID: "u1", Name: "App-Web-1", Host: "a", Network: "lan", Addresses: []netip.Addr{netip.MustParseAddr("10.42.0.2")},
				Labels: map[string]string{"lariat.stack": "app", "lariat.service": "web", "a b": "c/d"}, State: "running"},
			{ID: "c2", Host: "a"}}}
}

func TestPathsAndForms(t *testing.T) {
	tr := Build(model())
	self := netip.MustParseAddr("10.42.0.2")
	for _, tc := range []struct {
		path, accept string
		status       int
		want         string
	}{
		{"/", "", 200, "2016-07-29/\nlatest/\n"},
		{"/latest/version", "", 200, "7"},
		{"/latest/self/container/name", "", 200, "app-web-1"},
		{"/latest/self/container/name/", "", 200, "app-web-1"},
		{"/2016-07-29/self/container/primary_ip", "*/*", 200, "10.42.0.2"},
		{"/latest/self/host/agent_ip", "", 200, "192.0.2.11"},
		{"/latest/self/container/service_index", "", 200, "1"},
		{"/latest/self/container/start_count", "", 200, "0"},
		{"/latest/self/container/labels", "", 200, "a+b\nlariat.service\nlariat.stack\n"},
		{"/latest/self/container/labels/a+b", "", 200, "c/d"},
		{"/latest/containers", "", 200, "0=app-web-1\n1=c2\n"},
		{"/latest/containers/1/external_id", "", 200, "c2"},
		{"/latest/containers/u1/state", "", 200, "running"},
		{"/latest/CONTAINERS/App-Web-1/ips", "", 200, "0\n"},
		{"/latest/containers/0/health_state", "", 200, ""},
		{"/latest/networks/lan/is_default", "", 200, "true"},
		{"/latest/self/container/name", "application/json", 200, `"app-web-1"`},
		{"/latest/hosts/7", "", 404, "Not found\n"},
		{"/1999-01-01/version", "application/json", 404, `{"code":404,"message":"Invalid version","type":"error"}` + "\n"},
		{"/latest/%zz", "", 400, "Bad path: %zz\n"},
	} {
		a := tr.Get(tc.path, tc.accept, self)
		if a.Status != tc.status || string(a.Body) != tc.want {
			t.Errorf("%s (%s): %d %q, want %d %q", tc.path, tc.accept, a.Status, a.Body, tc.status, tc.want)
		}
	}
	if a := tr.Get("/latest/self/container", "", netip.MustParseAddr("10.42.0.99")); a.Status != 404 {
		t.Errorf("a stranger has no self: %d", a.Status)
	}
	if a := tr.Get("/latest/self/container/name", "", netip.MustParseAddr("::ffff:10.42.0.2")); string(a.Body) != "app-web-1" {
		t.Errorf("a mapped address is the same caller: %q", a.Body)
	}
	if a := tr.Get("/latest", "", self); !strings.Contains(string(a.Body), "self/\n") {
		t.Errorf("%q", a.Body)
	}
}

func FuzzGet(f *testing.F) {
	tr := Build(model())
	f.Add("/latest/self/container/labels/a+b", "application/json")
	f.Fuzz(func(t *testing.T, path, accept string) {
		if a := tr.Get(path, accept, netip.MustParseAddr("10.42.0.2")); a.Status != 200 && a.Status != 404 && a.Status != 400 {
			t.Errorf("%q: %d", path, a.Status)
		}
	})
}
