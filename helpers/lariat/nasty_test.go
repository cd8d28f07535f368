package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/lariat-net/lariat/pkg/certs"
	"github.com/lariat-net/lariat/pkg/doctor"
	"github.com/lariat-net/lariat/pkg/ipsec"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/printable"
	"github.com/lariat-net/lariat/pkg/printable/printabletest"
)

// nastySnapshot is a fixture whose every string is followed by text, but for those of the fields in keep.
func nastySnapshot(t testing.TB, text string, keep ...string) *metadata.Snapshot {
	t.Helper()
	b, err := os.ReadFile("testdata/ipsec.json")
	if err != nil {
		t.Fatal(err)
	}
	var s metadata.Snapshot
	if err := json.Unmarshal(b, &s); err != nil {
		t.Fatal(err)
	}
	s.HostRoutes = append(s.HostRoutes, metadata.HostRoute{Network: s.Networks[0].Name, Host: s.Hosts[0].Name,
		Address: netip.MustParseAddr("fe80::1")})
	printabletest.Fill(&s, text, keep...)
	return &s
}

// filled is a value whose every string, at any depth, is text.
func filled[T any](text string) *T {
	v := new(T)
	printabletest.Fill(v, text)
	return v
}

// Nothing that a command writes for people holds a control character of others, or a line that others made:
// as text, with colours, as columns.
func TestNothingForeignIsPrintedRaw(t *testing.T) {
	a := &app{now: time.Now}
	for _, text := range printabletest.Nasty {
		snap := nastySnapshot(t, text)
		broken := &doctor.Facts{Self: snap.Self, Metadata: &doctor.Metadata{Snapshot: snap,
			Store: &doctor.Store{Reason: "lost" + text}},
			Manager: &doctor.Manager{Err: errors.New("no" + text)}, Unavailable: map[string]string{}}
		tunnels := fixtureReport(t)
		printabletest.Fill(&tunnels, text, "Missing", "Problem")
		kept := &doctor.Facts{Self: snap.Self, Metadata: broken.Metadata, Manager: &doctor.Manager{Tunnels: &tunnels},
			Unavailable: map[string]string{}}
		address := netip.MustParseAddr("fe80::1").WithZone(text)
		held := filled[ipRow](text)
		held.Address = address
		done, unused := filled[rotation](text), filled[rotation](text)
		unused.Unused = true
		for what, write := range map[string]func(w *writer){
			"status":           newStatus(broken, nil).write,
			"status, tunnels":  newStatus(kept, nil).write,
			"host list":        newStatus(broken, nil).hosts,
			"host show":        filled[hostDetails](text).write,
			"network list":     func(w *writer) { writeNetworks(w, snap) },
			"network show":     filled[networkDetails](text).write,
			"ip list":          func(w *writer) { writeIPs(w, []ipRow{*held}) },
			"ip show":          (&ipDetails{Address: address, State: text, Network: text, Note: text, Use: held}).write,
			"volume list":      func(w *writer) { writeVolumes(w, *filled[[]metadata.Volume](text)) },
			"doctor":           func(w *writer) { writeReport(w, filled[doctor.Report](text)) },
			"doctor, of names": func(w *writer) { writeReport(w, doctor.Check(broken)) },
			"ipsec status":     func(w *writer) { a.writeTunnels(w, &tunnels) },
			"ipsec status, without": func(w *writer) {
				a.writeTunnels(w, &ipsec.Report{Networks: []string{text}, Missing: text, Problem: text, Remedy: text})
			},
			"ipsec rotate":         done.write,
			"ipsec rotate, unused": unused.write,
			"certs show":           func(w *writer) { writeCerts(w, *filled[[]certs.Info](text)) },
			"line": func(w *writer) {
				w.line("%s %v %s %s", text, errors.New(text), address, w.paint(bad, text))
			},
		} {
			for _, w := range []*writer{{}, {colour: true}, {plain: true}} {
				if w.plain && what == "ipsec status, without" {
					continue // columns of nothing
				}
				write(w)
				printabletest.Check(t, fmt.Sprintf("%s (colour %t, plain %t)", what, w.colour, w.plain), w.String())
			}
		}
	}
}

// checked are the fields of a snapshot whose text is checked where it is read: an entry with a hostile one is left out.
var checked = []string{"Self", "Hosts", "Networks", "Blocks", "Endpoints", "ID", "Host", "Network", "Addresses"}

// The same for whole commands: what they print of a file, in every format, their errors, and what shells
// complete. Of each text there are two files. In one it stands everywhere, and what is printed is why entries
// are left out. In the other it stands where it may stand.
func TestNothingForeignLeavesACommandRaw(t *testing.T) {
	dir, err := os.MkdirTemp("", "lariat") // a socket's path may have 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	answer := ""
	socket := filepath.Join(dir, "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w,
			answer, http.StatusInternalServerError)
	}))
	server.Listener.Close()
	server.Listener = l
	server.Start()
	defer server.Close()
	for i, text := range printabletest.Nasty {
		answer = "refused" + text
		for _, args := range [][]string{
			{"ipsec", "status", "--manager-socket", socket}, {"network", "list", "--socket", socket},
			{"host", "show", "x", "--socket", socket}, {"ip", "list", "--socket", socket},
			{"volume", "list", "--socket", socket}, {"certs", "show", filepath.Join(dir, "none"+text)}, {"certs", "host", dir,
				text},
			{"plan", "--metadata", "testdata/ipsec.json", "--host", "none" + text},
		} {
			out, errs, _ := lariat(t, args...)
			printabletest.Check(t, strings.Join(args[:2], " "), out+errs)
		}
		for kind, keep := range map[string][]string{"everywhere": {"Encapsulation"}, "allowed": checked} {
			snap := nastySnapshot(t, text, keep...)
			b, err := json.Marshal(snap)
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(dir, fmt.Sprintf("%d-%s.json", i, kind))
			if err := os.WriteFile(file, []byte(printable.JSON(string(b))), 0o600); err != nil {
				t.Fatal(err)
			}
			printed := map[string]string{}
			for _, command := range []string{"status", "status -o table", "status -o json", "status -o yaml",
				"status --snapshot", "plan", "graph", "graph --format dot"} {
				out, errs, _ := lariat(t, append(strings.Fields(command), "--metadata", file)...)
				printed[command] = out + errs
				switch what := command + ", " + kind; command {
				case "status -o table": // it shows checked words alone
					printabletest.Lines(t, what, out+errs)
				case "status -o yaml": // a text of several lines may stand on several, further in
					if printable.Text(out) != out || strings.Contains(out, "\nEVIL") || !strings.Contains(out, "EVIL") {
						t.Errorf("%s: %.500q", what, out)
					}
				default:
					printabletest.Check(t, what, out+errs)
				}
			}
			var back, same statusReport
			if err := errors.Join(yaml.Unmarshal([]byte(printed["status -o yaml"]), &back),
				json.Unmarshal([]byte(printed["status -o json"]), &same)); err != nil || !reflect.DeepEqual(back, same) {
				t.Errorf("%s: %v: YAML and JSON differ: %.500q", kind, err, printed["status -o yaml"])
			}
			// A name that cannot be typed is not offered.
			want := ":4\n"
			if kind == "allowed" {
				want = "h1\t192.0.2.1\nh2\t192.0.2.2\nh3\t192.0.2.3\nh4\t198.51.100.4\n:4\n"
				if len(back.Hosts) != len(snap.Hosts) {
					t.Errorf("status of %d hosts shows %d", len(snap.Hosts), len(back.Hosts))
				}
			}
			out, _, status := lariat(t, "__complete", "plan", "--metadata", file, "--host", "")
			if status != 0 || out != want {
				t.Errorf("%s: status %d: completions %.500q", kind, status, out)
			}
		}
	}
}

// Completions hold no name that cannot be typed, whoever names it, and their descriptions are printable.
func TestCompletionsAreSafe(t *testing.T) {
	for _, text := range printabletest.Nasty {
		got := safe([]cobra.Completion{"h1" + text, "h2", "h3" + text + "\twhat", "h4\twhat" + text})
		if len(got) != 2 || got[0] != "h2" || !strings.HasPrefix(got[1], "h4\twhat") {
			t.Errorf("%.500q", got)
		}
		_, description, _ := strings.Cut(got[len(got)-1], "\t")
		printabletest.Check(t, "description", description)
	}
}
