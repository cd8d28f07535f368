package docs_test

import (
	"encoding/json"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/ebs"
	"github.com/lariat-net/lariat/pkg/volume/efs"
	"github.com/lariat-net/lariat/pkg/volume/flex"
	"github.com/lariat-net/lariat/pkg/volume/nfs"
)

// volumeDrivers are the FlexVolume drivers: what understands their options, and the struct of these.
var volumeDrivers = map[string]struct {
	understand  func(volume.Request) error
	options     any
	environment [][2]string
}{
	"ebs": {func(r volume.Request) error { _, err := ebs.Config{}.Volume(r); return err }, ebs.Options{}, ebs.Environment},
	"efs": {func(r volume.Request) error { _, err := efs.ParseVolume(r); return err }, efs.Options{}, efs.Environment},
	"nfs": {func(r volume.Request) error { _, err := nfs.Config{}.Volume(r); return err }, nfs.Options{}, nfs.Environment},
}

// TestVolumeExamples: the driver understands each JSON of its manual, and what pods and PersistentVolumes
// among the examples say.
func TestVolumeExamples(t *testing.T) {
	for name, d := range volumeDrivers {
		found := 0
		for _, b := range jsonBlock.FindAllStringSubmatch(read(t, filepath.Join(root, "flexvolume", name, "README.md")), -1) {
			found++
			r, err := flex.DecodeRequest(b[1])
			if err == nil {
				err = d.understand(r)
			}
			if err != nil {
				t.Errorf("%s: %v\n%s", name, err, b[1])
			}
		}
		if found < 2 {
			t.Errorf("the manual of %s has %d examples", name, found)
		}
	}
	files, _ := filepath.Glob(filepath.Join(root, "examples/kubernetes/*.yaml"))
	found := 0
	for _, f := range files {
		for _, doc := range strings.Split(read(t, f), "\n---\n") {
			var object struct {
				Metadata struct{ Name string }
				Spec     struct {
					FlexVolume *source
					Volumes    []struct {
						Name       string
						FlexVolume *source
					}
				}
			}
			if err := yaml.Unmarshal([]byte(doc), &object); err != nil {
				t.Fatalf("%s: %v", f, err)
			}
			check := func(name string, s *source) {
				if s == nil {
					return
				}
				found++
				driver, ours := strings.CutPrefix(s.Driver, "lariat/")
				d, known := volumeDrivers[driver]
				if !ours || !known {
					t.Fatalf("%s: no driver %s", f, s.Driver)
				}
				text, _ := json.Marshal(s.Options)
				r, err := flex.DecodeRequest(string(text))
				if r.Name == "" {
					r.Name = name
				}
				if err == nil {
					err = d.understand(r)
				}
				if err != nil {
					t.Errorf("%s: %v", f, err)
				}
			}
			check(object.Metadata.Name, object.Spec.FlexVolume)
			for _, v := range object.Spec.Volumes {
				check(v.Name, v.FlexVolume)
			}
		}
	}
	if found < 2 {
		t.Errorf("%d volumes in the examples", found)
	}
}

type source struct {
	Driver  string
	Options map[string]string
}

var optionRow = regexp.MustCompile("(?m)^\\| `([A-Za-z]+)` \\| (string|list|bool|number) \\|")

// TestVolumeOptionTables: the manual's table of options and the struct that takes them name the same.
func TestVolumeOptionTables(t *testing.T) {
	for name, d := range volumeDrivers {
		var table []string
		for _, row := range optionRow.FindAllStringSubmatch(read(t, filepath.Join(root, "flexvolume", name, "README.md")),
			-1) {
			table = append(table, row[1])
		}
		slices.Sort(table)
		if known := volume.OptionNames(d.options); !reflect.DeepEqual(table, known) {
			t.Errorf("%s: the manual has %v\nthe driver has %v", name, table, known)
		}
	}
}

// TestVolumeHelp: F155, every verb and option of --help is in the manual.
func TestVolumeHelp(t *testing.T) {
	for name, d := range volumeDrivers {
		p := flex.Program{Name: name, Options: volume.OptionNames(d.options), Environment: d.environment}
		manual := read(t, filepath.Join(root, "flexvolume", name, "README.md"))
		for _, line := range strings.Split(p.Help(), "\n") {
			word, _, _ := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(line, "  "), name+" "), " ")
			if strings.HasPrefix(line, "  ") && !strings.HasPrefix(line, "   ") && !strings.Contains(line, ", ") &&
				!strings.Contains(manual, "`"+word) {
				t.Errorf("the manual of %s does not tell of %q", name, word)
			}
		}
	}
}

// TestComposeExample: the driver understands the options of the volumes in the compose file.
func TestComposeExample(t *testing.T) {
	var file struct {
		Volumes map[string]struct {
			Driver  string
			Options map[string]string `json:"driver_opts"`
		}
	}
	if err := yaml.Unmarshal([]byte(read(t, filepath.Join(root, "examples/docker/compose.yaml"))), &file); err != nil ||
		len(file.Volumes) == 0 {
		t.Fatalf("%v %v", file, err)
	}
	for name, v := range file.Volumes {
		driver, ours := strings.CutPrefix(v.Driver, "lariat-")
		d, known := volumeDrivers[driver]
		if !ours || !known {
			t.Fatalf("no driver %s", v.Driver)
		}
		if err := d.understand(volume.Request{Name: name, Options: v.Options}); err != nil {
			t.Error(err)
		}
	}
}
