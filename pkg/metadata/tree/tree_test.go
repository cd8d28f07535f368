package tree

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
)

func model() *metadata.Snapshot {
	return &metadata.Snapshot{Revision: 7, Self: "a",
		Hosts: []metadata.Host{
			{Name: "a", MachineID: "machine-of-a", Live: true,
				Underlay: []metadata.Underlay{{Address: netip.MustParsePrefix("192.0.2.11/24")}}},
			{Name: "b", MachineID: "machine-of-b",
				Underlay: []metadata.Underlay{{Address: netip.MustParsePrefix("192.0.2.12/24")}}}},
		Networks: []metadata.Network{{Name: "lan", IsDefault: true,
			Subnets:   []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")},
			CNIConfig: map[string]json.RawMessage{"10-lan.conflist": json.RawMessage(`{"psk":"hunter2"}`)}}},
		Blocks: []metadata.Block{
			{Network: "lan", CIDR: netip.MustParsePrefix("10.42.0.0/26"), Host: "a", Gateway: netip.MustParseAddr("10.42.0.1")},
			{Network: "lan", CIDR: netip.MustParsePrefix("10.42.0.64/26"), Host: "b",
				Gateway: netip.MustParseAddr("10.42.0.65")}},
		Containers: []metadata.Container{
			{ID: "c1", UUID: "u1", Name: "App-Web-1", Host: "a", Network: "lan",
				Addresses: []netip.Addr{netip.MustParseAddr("10.42.0.2")},
				Labels: map[string]string{"lariat.stack": "app", "lariat.service": "web", "a b": "c/d",
					"last-applied-configuration": "hunter2"}, State: "running"},
			{ID: "c2", Host: "b", Addresses: []netip.Addr{netip.MustParseAddr("10.42.0.66")}}}}
}

func TestPathsAndForms(t *testing.T) {
	tr := Build(model(), "a b")
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
		{"/latest/self/container/hostname", "", 200, "app-web-1"},
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
	if a := tr.Get("/latest/self/container/name", "",
		netip.MustParseAddr("::ffff:10.42.0.2")); string(a.Body) != "app-web-1" {
		t.Errorf("a mapped address is the same caller: %q", a.Body)
	}
	if a := tr.Get("/latest", "", self); !strings.Contains(string(a.Body), "self/\n") {
		t.Errorf("%q", a.Body)
	}
}

// TestWhoIsAnswered: containers of all hosts, and this host by every address of its own. Nobody else, not
// even another host, learns anything.
func TestWhoIsAnswered(t *testing.T) {
	tr := Build(model())
	for caller, want := range map[string]string{
		"10.42.0.2": "a", "10.42.0.66": "b", "127.0.0.1": "a", "::1": "a", "192.0.2.11": "a", "10.42.0.1": "a",
		"::ffff:10.42.0.2": "a",
		"10.42.0.99":       "", "192.0.2.12": "", "10.42.0.65": "", "192.0.2.99": "", "169.254.1.1": "", "fe80::1": "",
		"2001:db8::1": "",
	} {
		addr := netip.MustParseAddr(caller)
		if tr.Known(addr) != (want != "") {
			t.Errorf("%s: known %t", caller, tr.Known(addr))
		}
		for _, path := range []string{"/", "/latest", "/latest/version", "/latest/containers", "/latest/self/host/name",
			"/1999-01-01", "/latest/%zz"} {
			a := tr.Get(path, "", addr)
			if (a.Status == 403) != (want == "") {
				t.Errorf("%s asks for %s: %d %q", caller, path, a.Status, a.Body)
			}
			if path == "/latest/self/host/name" && want != "" && string(a.Body) != want {
				t.Errorf("%s is on host %q, want %q", caller, a.Body, want)
			}
		}
	}
	if a := tr.Get("/latest/version", "application/json",
		netip.MustParseAddr("192.0.2.99")); !strings.Contains(string(a.Body), "192.0.2.99") || !json.Valid(a.Body) {
		t.Errorf("%s", a.Body)
	}
	if a := tr.Get("/latest/version", "", netip.Addr{}); a.Status != 403 {
		t.Errorf("nobody: %d", a.Status)
	}
}

// TestHolderOfAnAddress: a caller is the container that has its address now, and no other shows
// that address, whatever was written before, elsewhere, or about a host's own address, and in
// whichever order.
func TestHolderOfAnAddress(t *testing.T) {
	mine, old := netip.MustParseAddr("10.42.0.2"), netip.MustParseAddr("10.42.0.3")
	iface := func(a netip.Addr) []metadata.ContainerInterface {
		return []metadata.ContainerInterface{{Network: "lan", IfName: "eth0", Addresses: []netip.Addr{a}}}
	}
	s := model()
	s.HostRoutes = []metadata.HostRoute{{Network: "lan", Address: netip.MustParseAddr("10.42.0.70"), Host: "a"}}
	s.Containers = []metadata.Container{
		{ID: "m", Name: "holder", Host: "a", Addresses: []netip.Addr{mine}, Interfaces: iface(mine), State: "running"},
		{ID: "a", Name: "assigned", Host: "a", Addresses: []netip.Addr{mine}},
		{ID: "z", Name: "assigned-too", Host: "a", Addresses: []netip.Addr{mine}, Created: time.Unix(1<<31, 0)},
		{ID: "y", Name: "moved", Host: "a", Addresses: []netip.Addr{mine}, PreAssigned: true, Interfaces: iface(old)},
		{ID: "x", Name: "elsewhere", Host: "b", Addresses: []netip.Addr{mine}, Interfaces: iface(mine)},
		{ID: "w", Name: "on-the-gateway", Host: "a",
			Addresses: []netip.Addr{netip.MustParseAddr("10.42.0.1"), netip.MustParseAddr("192.0.2.11")}},
		{ID: "n", Name: "borrower", Host: "a", Interfaces: iface(netip.MustParseAddr("10.42.0.70"))},
		{ID: "o", Name: "lender", Host: "b", Interfaces: iface(netip.MustParseAddr("10.42.0.70"))},
	}
	for range len(s.Containers) {
		s.Containers = append(s.Containers[1:], s.Containers[0])
		tr := Build(s)
		for caller, want := range map[string]string{"10.42.0.2": "holder", "10.42.0.3": "moved", "10.42.0.70": "borrower"} {
			if a := tr.Get("/latest/self/container/name", "", netip.MustParseAddr(caller)); string(a.Body) != want {
				t.Errorf("%s is %d %q, want %s", caller, a.Status, a.Body, want)
			}
		}
		for path, want := range map[string]string{"holder": "10.42.0.2", "moved": "10.42.0.3",
			"assigned": "", "assigned-too": "", "elsewhere": ""} {
			if a := tr.Get("/latest/containers/"+path+"/primary_ip", "", mine); string(a.Body) != want {
				t.Errorf("%s has %d %q, want %q", path, a.Status, a.Body, want)
			}
		}
		for _, own := range []string{"10.42.0.1", "192.0.2.11"} {
			if a := tr.Get("/latest/self/container/name", "", netip.MustParseAddr(own)); a.Status != 404 {
				t.Errorf("the host by %s is a container: %d %q", own, a.Status, a.Body)
			}
		}
	}
}

// TestNothingSecretIsShown: neither labels that nobody allowed, such as pods' annotations that an older
// plugin wrote, nor machine ids, nor, to containers, what configures runtimes.
func TestNothingSecretIsShown(t *testing.T) {
	for _, tc := range []struct {
		caller string
		labels []string
		shown  string // of the three secrets
	}{
		{"10.42.0.2", nil, ""},
		{"10.42.0.2", []string{"a b"}, "c/d"},
		{"10.42.0.2", []string{"a*"}, "c/d"},
		{"10.42.0.2", []string{"*"}, "c/d hunter2"},
		{"127.0.0.1", []string{"lariat.*"}, "hunter2"}, // the host configures its runtimes by it
	} {
		tr := Build(model(), tc.labels...)
		body := string(tr.Get("/latest", "application/json", netip.MustParseAddr(tc.caller)).Body)
		var shown []string
		for _, secret := range []string{"c/d", "hunter2", "machine-of"} {
			if strings.Contains(body, secret) {
				shown = append(shown, secret)
			}
		}
		if strings.Join(shown, " ") != tc.shown {
			t.Errorf("%s with %q is shown %q, want %q:\n%s", tc.caller, tc.labels, shown, tc.shown, body)
		}
		// Services are found all the same, and a container's host by its host_uuid.
		for path, want := range map[string]string{"containers/app-web-1/labels/lariat.service": "web",
			"containers/app-web-1/stack_name": "app",
			"containers/app-web-1/host_uuid":  "a", "hosts/a/uuid": "a", "self/host/uuid": "a"} {
			if a := tr.Get("/latest/"+path, "", netip.MustParseAddr(tc.caller)); string(a.Body) != want {
				t.Errorf("%s: %d %q, want %q", path, a.Status, a.Body, want)
			}
		}
	}
}

func FuzzGet(f *testing.F) {
	tr := Build(model())
	f.Add("/latest/self/container/labels/a+b", "application/json")
	f.Fuzz(func(t *testing.T, path, accept string) {
		if a := tr.Get(path, accept, netip.MustParseAddr("10.42.0.2")); a.Status != 200 && a.Status != 404 &&
			a.Status != 400 {
			t.Errorf("%q: %d", path, a.Status)
		}
	})
}
