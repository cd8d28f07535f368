// Package docs_test keeps the manuals true: their sections, examples, keys, flags and links.
package docs_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"sigs.k8s.io/yaml"

	"github.com/lariat-net/lariat/pkg/cni"
	"github.com/lariat-net/lariat/pkg/ipam"
	"github.com/lariat-net/lariat/pkg/overlay"
)

const root = "../.."

// manuals are the READMEs of executables.
func manuals(t *testing.T) []string {
	t.Helper()
	var out []string
	for _, pattern := range []string{"plugins/*/README.md", "helpers/*/README.md", "flexvolume/*/README.md",
		"ipam/README.md"} {
		found, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, found...)
	}
	if len(out) < 5 {
		t.Fatalf("found only the manuals %v", out)
	}
	return out
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func bin(t *testing.T, name string) string {
	t.Helper()
	dir := os.Getenv("LARIAT_BIN")
	if dir == "" {
		dir = filepath.Join(root, "bin")
	}
	path, err := filepath.Abs(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Skipf("%s is not built: make build", name)
	}
	return path
}

func TestManualsHaveTheirSections(t *testing.T) {
	want := []string{"Name", "Synopsis", "Description", "Configuration", "Examples", "Verbs", "What it owns", "Errors",
		"Limits", "See also"}
	for _, m := range manuals(t) {
		text := read(t, m)
		at := 0
		for _, section := range want {
			i := strings.Index(text[at:], "\n## "+section+"\n")
			if i < 0 {
				if section == "Verbs" && strings.Contains(m, "helpers/metadata") {
					continue // it has none, and says so nowhere better
				}
				t.Errorf("%s: no section %q (in this order)", m, section)
				continue
			}
			at += i
		}
	}
}

var jsonBlock = regexp.MustCompile("(?s)```json\n(.*?)```")

// lists are the CNI configurations in the plugins' manuals, in docs, and under examples, by where they are.
func lists(t *testing.T) map[string]string {
	t.Helper()
	found := map[string]string{}
	for _, pattern := range []string{"plugins/*/README.md", "ipam/README.md", "docs/*.md"} {
		manuals, _ := filepath.Glob(filepath.Join(root, pattern))
		for _, m := range manuals {
			for i, b := range jsonBlock.FindAllStringSubmatch(read(t, m), -1) {
				if strings.Contains(b[1], `"plugins"`) {
					found[fmt.Sprintf("%s, example %d", m, i+1)] = b[1]
				}
			}
		}
	}
	files, _ := filepath.Glob(filepath.Join(root, "examples/cni/*.conflist"))
	for _, f := range files {
		found[f] = read(t, f)
	}
	if len(found) < 10 || len(files) < 3 {
		t.Fatalf("found only %d examples, of them %d files", len(found), len(files))
	}
	return found
}

// debianSpeaks is the newest version of CNI that containerd, Podman and the reference plugins of Debian 12 and 13
// accept. What has a newer one starts no container there, although the runtime says that its network is ready.
const debianSpeaks = "1.0.0"

// debianPlugins are where Debian has the reference plugins.
const debianPlugins = "/usr/lib/cni"

// TestExamplesSuitDebian: Debian's runtimes read every list, and every reference plugin that a list names speaks
// its version.
func TestExamplesSuitDebian(t *testing.T) {
	ours := filepath.Dir(bin(t, "lariat-vxlan"))
	_, missing := os.Stat(filepath.Join(debianPlugins, "portmap"))
	for where, text := range lists(t) {
		list, err := libcni.ConfListFromBytes([]byte(text))
		if err != nil {
			t.Errorf("%s: %v", where, err)
			continue
		}
		if list.CNIVersion != debianSpeaks {
			t.Errorf("%s: cniVersion %s, not %s", where, list.CNIVersion, debianSpeaks)
		}
		if missing != nil {
			continue // the constant was found with it: test/runtimes
		}
		if _, err := libcni.NewCNIConfig([]string{ours, debianPlugins}, nil).ValidateNetworkList(t.Context(),
			list); err != nil {
			t.Errorf("%s: %v", where, err)
		}
	}
}

// TestNewerListOfThreeHosts: the page's command makes of the shipped list one of CNI 1.1.0, which today's
// reference plugins speak.
func TestNewerListOfThreeHosts(t *testing.T) {
	var command string
	const conf = "/etc/cni/net.d/10-lariat.conflist"
	for line := range strings.Lines(read(t, filepath.Join(root, "docs/three-hosts.md"))) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, "sed -i ") {
			command = line
		}
	}
	if !strings.HasSuffix(command, " "+conf) {
		t.Fatalf("%q is no command that changes %s", command, conf)
	}
	mine := filepath.Join(t.TempDir(), "list")
	if err := os.WriteFile(mine, []byte(read(t, filepath.Join(root, "examples/cni/10-lariat.conflist"))),
		0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("sh", "-c", strings.ReplaceAll(command, conf, mine)).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", command, err, out)
	}
	list, err := libcni.ConfListFromFile(mine)
	if err != nil || list.CNIVersion != "1.1.0" {
		t.Fatalf("%+v %v", list, err)
	}
	peers := os.Getenv("LARIAT_PEERS")
	if peers == "" {
		peers = filepath.Join(root, "bin/peers")
	}
	if _, err := os.Stat(filepath.Join(peers, "portmap")); err != nil {
		t.Skip("the reference plugins are not built: make peers")
	}
	path := []string{filepath.Dir(bin(t, "lariat-vxlan")), peers}
	if _, err := libcni.NewCNIConfig(path, nil).ValidateNetworkList(t.Context(), list); err != nil {
		t.Error(err)
	}
}

// TestExamplesAreValid: each example is a list that libcni reads and whose parts the plugin accepts: asked for its
// STATUS it complains about the service that is not there, and about nothing else.
func TestExamplesAreValid(t *testing.T) {
	for _, l := range lists(t) {
		list, err := libcni.ConfListFromBytes([]byte(l))
		if err != nil {
			t.Errorf("%v:\n%s", err, l)
			continue
		}
		for _, p := range list.Plugins {
			name := p.Network.Type
			if !strings.HasPrefix(name, "lariat-") {
				if name = p.Network.IPAM.Type; name != ipam.IPAMType {
					continue
				}
			}
			var conf map[string]any
			if err := json.Unmarshal(p.Bytes, &conf); err != nil {
				t.Fatal(err)
			}
			conf["cniVersion"], conf["name"] = "1.1.0", list.Name
			if block, ok := conf["ipam"].(map[string]any); ok && block["type"] == ipam.IPAMType {
				block["socket"] = "/nonexistent/metadata.sock"
			} else if ok {
				continue // its IPAM plugin would be executed
			}
			stdin, _ := json.Marshal(conf)
			cmd := exec.Command(bin(t, name))
			cmd.Env = []string{"CNI_COMMAND=STATUS", "CNI_PATH=/nonexistent"}
			cmd.Stdin = bytes.NewReader(stdin)
			out, _ := cmd.Output()
			var e types.Error
			if err := json.Unmarshal(out, &e); err != nil || e.Code != cni.ErrNotAvailable {
				t.Errorf("%s does not accept its example: %s\n%s", name, out, l)
			}
		}
	}
}

// keys are the JSON names of a struct's fields.
func keys(t reflect.Type) (out []string) {
	for i := range t.NumField() {
		f := t.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if f.Anonymous && name == "" {
			out = append(out, keys(f.Type)...)
		} else if name != "" && name != "-" {
			out = append(out, name)
		}
	}
	return out
}

var tableKey = regexp.MustCompile("(?m)^\\| (`[^|]*`) \\|")

// TestKeyTables: the table of keys and the struct that decodes them name the same.
func TestKeyTables(t *testing.T) {
	for manual, typ := range map[string]reflect.Type{"plugins/vxlan/README.md": reflect.TypeFor[overlay.Config](),
		"ipam/README.md": reflect.TypeFor[ipam.Config]()} {
		text := read(t, filepath.Join(root, manual))
		from := strings.Index(text, "\n## Configuration")
		section := text[from : from+strings.Index(text[from+5:], "\n## ")]
		var told []string
		for _, row := range tableKey.FindAllStringSubmatch(section, -1) {
			for _, k := range strings.Split(row[1], ",") {
				told = append(told, strings.Trim(k, " `"))
			}
		}
		known := keys(typ)
		for _, k := range known {
			if !slices.Contains(told, k) {
				t.Errorf("%s: key %q is not in the table", manual, k)
			}
		}
		for _, k := range told {
			if !slices.Contains(known, k) && !slices.Contains(keys(reflect.TypeFor[cni.Conf]()), k) {
				t.Errorf("%s: key %q is in the table, and nothing decodes it", manual, k)
			}
		}
	}
}

var flagName = regexp.MustCompile("--([a-z][a-z-]+)")

// TestFlagTables: every flag that --help lists is in the manual's table, and the other way round.
func TestFlagTables(t *testing.T) {
	for manual, name := range map[string]string{"helpers/metadata/README.md": "lariat-metadata",
		"helpers/network-manager/README.md": "lariat-network-manager", "helpers/storage/README.md": "lariat-storage"} {
		out, err := exec.Command(bin(t, name), "--help").CombinedOutput()
		if err != nil {
			t.Fatalf("%s --help: %v\n%s", name, err, out)
		}
		help := map[string]bool{}
		for _, line := range strings.Split(string(out), "\n") {
			if f := flagName.FindStringSubmatch(line); f != nil &&
				strings.HasPrefix(strings.TrimLeft(strings.TrimPrefix(strings.TrimSpace(line), "-h, "), " "), "--") {
				help[f[1]] = true
			}
		}
		delete(help, "help")
		table := map[string]bool{}
		for _, row := range tableKey.FindAllStringSubmatch(read(t, filepath.Join(root, manual)), -1) {
			if f := flagName.FindStringSubmatch(row[1]); f != nil {
				table[f[1]] = true
			}
		}
		for f := range help {
			if !table[f] {
				t.Errorf("%s: --%s is not in the table", manual, f)
			}
		}
		for f := range table {
			if !help[f] {
				t.Errorf("%s: --%s is in the table, and %s does not know it", manual, f, name)
			}
		}
	}
}

var mdLink = regexp.MustCompile(`\]\(([^)#\s]+)(#[^)]*)?\)`)

// TestLinksLead: relative links of all documents lead to something.
func TestLinksLead(t *testing.T) {
	out, err := exec.Command("git", "-C", root, "ls-files", "*.md").Output()
	if err != nil {
		t.Skip("not a git checkout")
	}
	for _, f := range strings.Fields(string(out)) {
		for _, l := range mdLink.FindAllStringSubmatch(read(t, filepath.Join(root, f)), -1) {
			if strings.Contains(l[1], "://") {
				continue
			}
			if _, err := os.Stat(filepath.Join(root, filepath.Dir(f), l[1])); err != nil {
				t.Errorf("%s: link to %s leads nowhere", f, l[1])
			}
		}
	}
}

// TestUnitsNameWhatExists: the systemd units call executables that are built, with flags that they know.
func TestUnitsNameWhatExists(t *testing.T) {
	units, _ := filepath.Glob(filepath.Join(root, "examples/systemd/*.service"))
	if len(units) < 2 {
		t.Fatalf("found only %v", units)
	}
	for _, u := range units {
		for _, line := range strings.Split(read(t, u), "\n") {
			command, ok := strings.CutPrefix(line, "ExecStart=")
			if !ok {
				continue
			}
			name := filepath.Base(strings.Fields(command)[0])
			help, err := exec.Command(bin(t, name), "--help").CombinedOutput()
			if err != nil {
				t.Errorf("%s: %s: %v", u, name, err)
			}
			for _, f := range flagName.FindAllString(command, -1) {
				if !strings.Contains(string(help), f) {
					t.Errorf("%s: %s does not know %s", u, name, f)
				}
			}
		}
	}
}

// TestRecipesAgree: what the pages tell Kubernetes and Nomad is what they tell Lariat.
func TestRecipesAgree(t *testing.T) {
	page := read(t, filepath.Join(root, "docs/kubernetes.md"))
	var proxy struct{ APIVersion, Kind, Mode, ClusterCIDR, DetectLocalMode string }
	_, text, _ := strings.Cut(page, "```yaml\n")
	text, _, _ = strings.Cut(text, "```")
	if err := yaml.UnmarshalStrict([]byte(text), &proxy); err != nil || proxy.Kind != "KubeProxyConfiguration" ||
		proxy.DetectLocalMode != "ClusterCIDR" {
		t.Fatalf("%+v %v", proxy, err)
	}
	for _, command := range []string{"kubeadm init --pod-network-cidr ", "lariat network create overlay --subnet "} {
		if !strings.Contains(page, "\n    "+command+proxy.ClusterCIDR+"\n") {
			t.Errorf("no %q with kube-proxy's clusterCIDR %s", command, proxy.ClusterCIDR)
		}
	}
	list, err := libcni.ConfListFromFile(filepath.Join(root, "examples/cni/10-lariat.conflist"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(read(t, filepath.Join(root, "docs/nomad.md")), `mode = "cni/`+list.Name+`"`) {
		t.Errorf("Nomad's job does not use the network %s of the list", list.Name)
	}
}
