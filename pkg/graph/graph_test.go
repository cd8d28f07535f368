package graph

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/lariat-net/lariat/pkg/ipsec"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/printable/printabletest"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func fixture(t testing.TB, name string) *metadata.Snapshot {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("../../helpers/lariat/testdata", name+".json"))
	if err != nil {
		t.Fatal(err)
	}
	var s metadata.Snapshot
	if err := json.Unmarshal(b, &s); err != nil {
		t.Fatal(err)
	}
	return &s
}

// cluster makes hosts with so many containers each, on so many networks.
func cluster(hosts, containers, networks int) *metadata.Snapshot {
	s := &metadata.Snapshot{Revision: 99}
	for n := range networks {
		s.Networks = append(s.Networks, metadata.Network{Name: fmt.Sprintf("net%d", n+1), Encapsulation: "vxlan",
			VNI: uint32(1042 + n), HostNAT: true,
			Subnets: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(42 + n), 0, 0}), 16)}})
	}
	for h := range hosts {
		name := fmt.Sprintf("node-%d", h+1)
		s.Hosts = append(s.Hosts, metadata.Host{Name: name, Live: h%13 != 12, Underlay: []metadata.Underlay{{
			Address: netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, byte(2 + h/20), byte(1 + h)}), 24), Device: "ens192",
			MTU: 9000}}})
		for n := range networks {
			at := netip.AddrFrom4([4]byte{10, byte(42 + n), byte(h), 0})
			s.Blocks = append(s.Blocks, metadata.Block{Network: s.Networks[n].Name, Host: name, CIDR: netip.PrefixFrom(at, 26),
				Gateway: at.Next()})
		}
		for c := range containers {
			n := c % max(networks, 1)
			s.Containers = append(s.Containers, metadata.Container{ID: fmt.Sprintf("%064x", h<<16|c),
				Name: fmt.Sprintf("service-%d", c+1), Host: name,
				Network:   fmt.Sprintf("net%d", n+1),
				Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, byte(42 + n), byte(h), byte(2 + c)})}})
		}
	}
	return s
}

func TestF136PictureIsAsRecorded(t *testing.T) {
	many := encrypt(cluster(12, 3, 2))
	for name, s := range map[string]*metadata.Snapshot{
		"ipsec": fixture(t, "ipsec"), "ipsec-known": fixture(t, "ipsec"), "ipsec-many": many,
		"empty": {}, "one": fixture(t, "one"), "three": fixture(t, "three"), "fifty": fixture(t, "fifty"),
		"three-by-hundred": cluster(3, 100, 2), "thirty": cluster(30, 20, 3), "thirty-idle": cluster(30, 0, 1),
	} {
		var o Options
		switch name {
		case "ipsec-known":
			o.Tunnels = report(t)
		case "ipsec-many":
			o.Tunnels = allEstablished(many)
		}
		for ext, got := range map[string]string{"svg": SVG(s, o), "dot": DOT(s, o)} {
			file := filepath.Join("testdata", name+"."+ext)
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
				continue
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if string(want) != got {
				t.Errorf("%s differs; look at it, then go test ./pkg/graph -update", file)
			}
		}
	}
}

// report belongs to the fixture ipsec.
func report(t testing.TB) *ipsec.Report {
	t.Helper()
	b, err := os.ReadFile("../../helpers/lariat/testdata/ipsec.tunnels.json")
	if err != nil {
		t.Fatal(err)
	}
	var r ipsec.Report
	if err := json.Unmarshal(b, &r); err != nil {
		t.Fatal(err)
	}
	return &r
}

// encrypt makes the first network an encrypted one, seen by the first host.
func encrypt(s *metadata.Snapshot) *metadata.Snapshot {
	s.Self, s.Networks[0].Encapsulation, s.Networks[0].VNI = s.Hosts[0].Name, metadata.EncapIPsec, 0
	return s
}

func allEstablished(s *metadata.Snapshot) *ipsec.Report {
	r := &ipsec.Report{}
	for _, h := range s.Hosts[1:] {
		r.Tunnels = append(r.Tunnels, ipsec.Status{Peer: h.Name, State: ipsec.StateEstablished,
			Children: []ipsec.ChildStatus{{Network: s.Networks[0].Name, State: ipsec.StateEstablished,
				Suite: "AES_GCM_16-256/ESN"}}})
	}
	return r
}

func TestF136PictureShowsHowTunnelsFare(t *testing.T) {
	s, o := fixture(t, "ipsec"), Options{Tunnels: report(t)}
	svg, dot := SVG(s, o), DOT(s, o)
	for _, want := range []string{"payroll: IPsec tunnels", ">established<", ">AES_GCM_16-256/ESN<", ">connecting<",
		">with an error<", "tunnel connecting, with an error (the peer says AUTHENTICATION_FAILED: ", ">idle<"} {
		if !strings.Contains(svg, want) {
			t.Errorf("SVG does not show %s", want)
		}
	}
	for pair, label := range map[string]string{
		`"host h1" -- "host h2"`: `label="payroll IPsec\\nestablished, AES_GCM_16-256/ESN"`,
		`"host h1" -- "host h3"`: `fontcolor="#b3261e", style=dashed, label="payroll IPsec\\nconnecting, with an error"`,
		`"host h1" -- "host h4"`: `label="payroll IPsec\\nidle"`,
		`"host h2" -- "host h3"`: `label="payroll IPsec"`, // h1 knows nothing of it
	} {
		if !regexp.MustCompile(regexp.QuoteMeta(pair) + `.*` + label).MatchString(dot) {
			t.Errorf("DOT: %s is not %s", pair, label)
		}
	}
	// Nobody's word becomes an element.
	o.Tunnels.Tunnels[0].Children[0].Suite, o.Tunnels.Tunnels[1].LastError = `</text><script>`, `"]; <script>`
	if svg := SVG(s, o); strings.Contains(svg, "<script") {
		t.Error("a suite became an element")
	}
	if dot := DOT(s, o); strings.Contains(dot, `"];`+" <") {
		t.Error("an error left its quotes")
	}
}

// The order in which the store lists objects is nobody's promise.
func TestF136PictureDoesNotDependOnOrder(t *testing.T) {
	s := fixture(t, "three")
	svg, dot := SVG(s, Options{}), DOT(s, Options{})
	r := rand.New(rand.NewPCG(1, 2))
	for range 20 {
		r.Shuffle(len(s.Hosts), func(i, j int) { s.Hosts[i], s.Hosts[j] = s.Hosts[j], s.Hosts[i] })
		r.Shuffle(len(s.Networks), func(i, j int) { s.Networks[i], s.Networks[j] = s.Networks[j], s.Networks[i] })
		r.Shuffle(len(s.Containers), func(i, j int) { s.Containers[i], s.Containers[j] = s.Containers[j], s.Containers[i] })
		if SVG(s, Options{}) != svg || DOT(s, Options{}) != dot {
			t.Fatal("another order, another picture")
		}
	}
}

func TestF136PictureShowsHostsNetworksContainersTunnels(t *testing.T) {
	s := fixture(t, "three")
	svg, dot := SVG(s, Options{}), DOT(s, Options{})
	for _, want := range []string{"h1", "h2", "h3", "overlay", "backend", "VXLAN 1042", "10.42.1.1", "10.42.1.64/26",
		"web-1", "10.42.1.2", "fd43:0:0:1::2", "192.0.2.1", "198.51.100.0/24"} {
		if !strings.Contains(svg, want) {
			t.Errorf("SVG does not show %s", want)
		}
		if !strings.Contains(dot, want) {
			t.Errorf("DOT does not show %s", want)
		}
	}
	// h1 and h2 share a link and backend wants plain routes there; h3 is elsewhere.
	for pair, way := range map[string]string{`"host h1" -- "host h2"`: "backend direct",
		`"host h1" -- "host h3"`: "backend VXLAN 1043", `"host h2" -- "host h3"`: "overlay VXLAN 1042"} {
		if !regexp.MustCompile(regexp.QuoteMeta(pair) + `.*` + way).MatchString(dot) {
			t.Errorf("DOT: %s is not %s", pair, way)
		}
	}
}

// No string of a snapshot or of a report becomes an element, ends a string, or begins a line.
func TestHostileNamesStayText(t *testing.T) {
	for _, text := range printabletest.Nasty {
		for _, keep := range [][]string{nil, {"Encapsulation", "State"}} {
			for _, name := range []string{"three", "ipsec"} {
				s, o := fixture(t, name), Options{}
				s.Blocks = append(s.Blocks, metadata.Block{Network: "none", Host: "none"}) // "not drawn"
				s.HostRoutes = append(s.HostRoutes, metadata.HostRoute{Network: s.Networks[0].Name, Host: s.Hosts[0].Name,
					Address: netip.MustParseAddr("fe80::1")})
				if name == "ipsec" {
					o.Tunnels = report(t)
				}
				printabletest.Fill(s, text, keep...)
				if o.Tunnels != nil {
					printabletest.Fill(o.Tunnels, text, keep...)
				}
				svg, dot := SVG(s, o), DOT(s, o)
				printabletest.Check(t, "SVG", svg)
				printabletest.Check(t, "DOT", dot)
				allElements(t, svg, "svg", "title", "style", "rect", "text", "tspan", "g", "path", "circle")
				for _, label := range graphvizTokens(t, dot) {
					if html, ok := strings.CutPrefix(label, "<"); ok {
						allElements(t, "<x>"+strings.TrimSuffix(html, ">")+"</x>", "x", "table", "tr", "td", "b", "font")
					}
				}
			}
		}
	}
}

// allElements fails when a text is not XML, or has other elements than these.
func allElements(t *testing.T, text string, known ...string) {
	t.Helper()
	dec := xml.NewDecoder(strings.NewReader(text))
	for {
		token, err := dec.Token()
		if errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			t.Fatalf("not XML: %v", err)
		}
		if e, ok := token.(xml.StartElement); ok && !slices.Contains(known, e.Name.Local) {
			t.Errorf("a name became the element %s", e.Name.Local)
		}
	}
}

// graphvizTokens splits DOT as graphviz does, and returns its strings. What stands between them can only be ours.
func graphvizTokens(t *testing.T, dot string) (labels []string) {
	t.Helper()
	for rest := dot; rest != ""; {
		n := 1
		switch c := rest[0]; {
		case c == '"':
			for n < len(rest) && rest[n] != '"' {
				if rest[n] == '\\' {
					n++
				}
				n++
			}
			n++
			labels = append(labels, rest[:n])
		case c == '<':
			for depth := 1; depth > 0; n++ {
				depth += map[byte]int{'<': 1, '>': -1}[rest[n]]
			}
			labels = append(labels, rest[:n])
		case strings.HasPrefix(rest, "//"):
			n = strings.IndexByte(rest, '\n')
		case !strings.ContainsRune("abcdefghijklmnopqrstuvwxyz_0123456789 \n{}[]=;,-", rune(c)):
			t.Fatalf("a name left its quotes: %.80q", rest)
		}
		rest = rest[n:]
	}
	return labels
}

func TestFolding(t *testing.T) {
	count := func(s *metadata.Snapshot, o Options) int { return strings.Count(SVG(s, o), ">service-") }
	for _, tc := range []struct {
		hosts, containers int
		o                 Options
		want              int
	}{
		{1, 0, Options{}, 0},
		{1, 13, Options{}, 13}, // one more is named rather than counted
		{1, 14, Options{}, 12},
		{3, 100, Options{}, 36},
		{30, 20, Options{}, 90},
		{60, 20, Options{}, 0},
		{2, 20, Options{Containers: 15}, 30},
		{2, 20, Options{Containers: -1}, 0},
	} {
		if got := count(cluster(tc.hosts, tc.containers, 1), tc.o); got != tc.want {
			t.Errorf("%d hosts with %d containers: %d named, want %d", tc.hosts, tc.containers, got, tc.want)
		}
	}
	if !strings.Contains(SVG(cluster(3, 100, 1), Options{}), "and 88 more") {
		t.Error("what is folded is not counted")
	}
}

func TestContainerOnTwoNetworksStandsInBoth(t *testing.T) {
	s := fixture(t, "three")
	s.Containers = []metadata.Container{{ID: "c0ffee", Name: "router", Host: "h1",
		Interfaces: []metadata.ContainerInterface{
			{Network: "overlay", IfName: "eth0", Addresses: []netip.Addr{netip.MustParseAddr("10.42.1.9")}},
			{Network: "backend", IfName: "eth1", Addresses: []netip.Addr{netip.MustParseAddr("10.43.1.9")}},
		}}}
	svg := SVG(s, Options{})
	if strings.Count(svg, ">router<") != 2 || !strings.Contains(svg, ">10.42.1.9<") ||
		!strings.Contains(svg, ">10.43.1.9<") || !strings.Contains(svg, "1 container<") {
		t.Error(svg)
	}
}

func TestNaturalOrder(t *testing.T) {
	for _, tc := range [][2]string{{"h2", "h10"}, {"a", "b"}, {"h1", "h1a"}, {"h01", "h2"}, {"", "a"},
		{"web-9-1", "web-10-0"}} {
		if CompareNames(tc[0], tc[1]) >= 0 || CompareNames(tc[1], tc[0]) <= 0 {
			t.Errorf("%q should stand before %q", tc[0], tc[1])
		}
	}
}

func BenchmarkSVG(b *testing.B) {
	s := cluster(250, 200, 3)
	for b.Loop() {
		SVG(s, Options{})
	}
}
