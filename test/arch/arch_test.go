// Package arch_test holds the rules about what may depend on what.
package arch_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/lariat-net/lariat"

type pkg struct {
	ImportPath string
	Name       string
	Imports    []string
	Deps       []string
}

func list(t *testing.T) []pkg {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Name,Imports,Deps", module+"/...").Output()
	if err != nil {
		t.Fatal(err)
	}
	var all []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); dec.More(); {
		var p pkg
		if err := dec.Decode(&p); err != nil {
			t.Fatal(err)
		}
		p.ImportPath = strings.TrimPrefix(p.ImportPath, module+"/")
		all = append(all, p)
	}
	return all
}

// What a CNI executable links decides how fast a container starts.
var heavy = []string{"go.etcd.io/", "google.golang.org/grpc", "github.com/aws/", "github.com/coredns/",
	"github.com/prometheus/", "go.opentelemetry.io/", "net/http", "crypto/tls", module + "/pkg/metadata/store"}

// TestCNIExecutablesAreLight: plugins and ipam link neither etcd, gRPC, AWS, CoreDNS nor Prometheus, nor net/http.
func TestCNIExecutablesAreLight(t *testing.T) {
	found := 0
	for _, p := range list(t) {
		if p.Name != "main" || !strings.HasPrefix(p.ImportPath, "plugins/") && p.ImportPath != "ipam" {
			continue
		}
		found++
		for _, d := range p.Deps {
			for _, h := range heavy {
				if d == strings.TrimSuffix(h, "/") || strings.HasPrefix(d, h) {
					t.Errorf("%s links %s", p.ImportPath, d)
				}
			}
		}
	}
	if found < 2 {
		t.Fatalf("found %d executables, want lariat-ipam and one plugin at least", found)
	}
}

// TestVolumeDriversAreLight: kubelet starts one for every call; they link neither etcd, gRPC, Prometheus nor
// Kubernetes' own libraries. One door does not know the other, and the core knows neither door nor driver.
func TestVolumeDriversAreLight(t *testing.T) {
	found := 0
	for _, p := range list(t) {
		if p.Name == "main" && strings.HasPrefix(p.ImportPath, "flexvolume/") {
			found++
			for _, d := range p.Deps {
				for _, h := range []string{"go.etcd.io/", "google.golang.org/grpc", "github.com/prometheus/",
					"go.opentelemetry.io/", "k8s.io/"} {
					if strings.HasPrefix(d, h) {
						t.Errorf("%s links %s", p.ImportPath, d)
					}
				}
			}
		}
		if strings.HasPrefix(p.ImportPath, "pkg/volume/flex") || strings.HasPrefix(p.ImportPath, "pkg/volume/dockerapi") ||
			strings.HasPrefix(p.ImportPath, "pkg/volume/mounts") {
			for _, d := range p.Deps {
				if own, ours := strings.CutPrefix(d, module+"/pkg/"); ours && own != "volume" && own != "volume/mounts" &&
					own != "hostid" {
					t.Errorf("%s links %s", p.ImportPath, d)
				}
			}
		}
	}
	if found == 0 {
		t.Fatal("found no volume driver")
	}
}

// TestArrows: planners never import the kernel, and the model imports its client's transport alone.
func TestArrows(t *testing.T) {
	pure := map[string][]string{ // package: all of ours that it may import
		"pkg/metadata":          {"pkg/unixhttp"},
		"pkg/metadata/allocate": {"pkg/metadata"},
		"pkg/metadata/tree":     {"pkg/metadata"},
		"pkg/delta":             {"pkg/metadata", "pkg/printable"},
		"pkg/printable":         {},
		"pkg/private":           {},
		"pkg/mtu":               {"pkg/metadata"},
		"pkg/underlay":          {"pkg/metadata", "pkg/delta"},
		"pkg/vxlan":             {"pkg/metadata", "pkg/delta", "pkg/mtu", "pkg/underlay"},
		"pkg/ipsec":             {"pkg/metadata", "pkg/delta", "pkg/mtu", "pkg/underlay", "pkg/private", "pkg/printable"},
		"pkg/nat":               {"pkg/metadata", "pkg/delta"},
		"pkg/attach":            {"pkg/metadata", "pkg/delta"},
		"pkg/guard":             {"pkg/metadata", "pkg/delta", "pkg/mtu"},
		"pkg/plan":              {"pkg/metadata", "pkg/delta", "pkg/vxlan", "pkg/ipsec", "pkg/guard", "pkg/nat"},
		"pkg/graph":             {"pkg/metadata", "pkg/delta", "pkg/vxlan", "pkg/ipsec", "pkg/mtu", "pkg/printable"},
		"pkg/kernel":            {"pkg/delta", "pkg/metadata"},
		"pkg/volume":            {"pkg/hostid"},
	}
	for _, p := range list(t) {
		allowed, ok := pure[p.ImportPath]
		if !ok {
			continue
		}
		delete(pure, p.ImportPath)
		for _, i := range p.Imports {
			if own, ours := strings.CutPrefix(i, module+"/"); ours && !slices.Contains(allowed, own) {
				t.Errorf("%s imports %s", p.ImportPath, own)
			}
		}
		if p.ImportPath != "pkg/kernel" &&
			slices.ContainsFunc(p.Deps, func(d string) bool {
				return strings.HasPrefix(d, "github.com/vishvananda/") ||
					d == "os/exec"
			}) {
			t.Errorf("%s is to be pure, but reaches the kernel or other programs", p.ImportPath)
		}
	}
	for missing := range pure {
		t.Errorf("package %s is gone; drop it from the rules", missing)
	}
}

// TestOneServer: only pkg/service serves HTTP or listens on TCP. It knows who may call what, and keeps
// callers within limits.
func TestOneServer(t *testing.T) {
	root, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		t.Fatal(err)
	}
	serves := regexp.MustCompile(`\bhttp\.Server\{|\bhttp\.(ListenAnd)?Serve(TLS)?\(|\bnet\.ListenTCP\(|\bnet\.Listen\("tcp|\.Listen\([^)]*"tcp`)
	found := false
	for _, p := range list(t) {
		if strings.HasPrefix(p.ImportPath, "test/") || strings.HasPrefix(p.ImportPath, "hack/") {
			continue
		}
		dir := filepath.Join(strings.TrimSpace(string(root)), p.ImportPath)
		files, err := filepath.Glob(filepath.Join(dir, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			data, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			if strings.HasSuffix(f, "_test.go") || !serves.Match(data) {
				continue
			}
			if found = found || p.ImportPath == "pkg/service"; p.ImportPath != "pkg/service" {
				t.Errorf("%s serves by itself: %s", p.ImportPath, serves.Find(data))
			}
		}
	}
	if !found {
		t.Error("pkg/service does not serve; look for what it does instead")
	}
}

// TestOneFolderPerExecutable: each has a main.go and a manual.
func TestOneFolderPerExecutable(t *testing.T) {
	for _, p := range list(t) {
		if p.Name != "main" || !slices.Contains([]string{"plugins", "helpers", "flexvolume", "."}, path.Dir(p.ImportPath)) {
			continue
		}
		if out, err := exec.Command("go", "list", "-f", "{{.Dir}}", module+"/"+p.ImportPath).Output(); err != nil {
			t.Error(err)
		} else if err := exec.Command("test", "-f", strings.TrimSpace(string(out))+"/README.md").Run(); err != nil {
			t.Error(fmt.Errorf("%s has no README.md", p.ImportPath))
		}
	}
}
