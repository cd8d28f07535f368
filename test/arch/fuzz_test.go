package arch_test

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// parsers are all that read what somebody else wrote: whose bytes, by what, and which fuzz target has them. A
// new parser adds a line, and a target.
var parsers = []struct{ bytes, by, pkg, fuzz string }{
	{"entries of the store", "metadata.Decode", "pkg/metadata", "FuzzEntry"},
	{"snapshots: files, and what the service answers", "metadata.Snapshot", "pkg/metadata", "FuzzSnapshot"},
	{"the metadata service's watch", "metadata.Client", "pkg/metadata", "FuzzWatch"},
	{"helpers' answers", "unixhttp.Do", "pkg/unixhttp", "FuzzHead"},
	{"address tables in the store", "allocate.Decode", "pkg/metadata/allocate", "FuzzDecode"},
	{"requests to the metadata service", "server.decode", "pkg/metadata/server", "FuzzDecode"},
	{"containers' requests to the tree", "tree.Get", "pkg/metadata/tree", "FuzzGet"},
	{"snapshots, by the planners", "plan.Desired, ipsec.Tunnels", "pkg/plan", "FuzzDesired"},
	{"the same, built of words that matter", "plan.Desired, ipsec.Tunnels", "pkg/plan", "FuzzDesiredOf"},
	{"text of others, before it is printed", "printable.Line", "pkg/printable", "FuzzLine"},
	{"CNI configuration and environment", "cni.Run", "pkg/cni", "FuzzRun"},
	{"netlink messages of the kernel", "kernel.parseLink and others", "pkg/kernel", "FuzzParse"},
	{"interface aliases", "delta.ParsePortAlias", "pkg/delta", "FuzzPortAlias"},
	{"ICMP messages of other hosts", "doctor.ping", "pkg/doctor", "FuzzICMP"},
	{"other hosts' questions to the echo server", "echo.Server", "pkg/doctor/echo", "FuzzServer"},
	{"other hosts' answers of the echo server", "echo.Prober", "pkg/doctor/echo", "FuzzAnswer"},
	{"files of secrets", "ipsec.ParseSecrets", "pkg/ipsec", "FuzzParseSecrets"},
	{"charon's replies, events and log", "ike.Daemon", "pkg/ike", "FuzzReply"},
	{"credentials in PEM", "ike.LoadCertificates", "pkg/ike", "FuzzCertificates"},
	{"certificates and keys in PEM", "certs.Read", "pkg/certs", "FuzzRead"},
	{"the journal of attachments", "journal.Journal", "pkg/journal", "FuzzJournal"},
	{"the journal of volumes", "volume.Journal", "pkg/volume", "FuzzJournal"},
	{"names of volumes and folders", "volume.CheckName", "pkg/volume", "FuzzNames"},
	{"the mount table", "mounts.Table", "pkg/volume/mounts", "FuzzTable"},
	{"answers of the drivers' children", "mounts", "pkg/volume/mounts", "FuzzAnswer"},
	{"calls of kubelet", "flex.Main", "pkg/volume/flex", "FuzzCall"},
	{"replies of FlexVolume executables", "flex.Client", "pkg/volume/flex", "FuzzReply"},
	{"requests of Docker and Podman", "dockerapi.Server", "pkg/volume/dockerapi", "FuzzDecode"},
	{"options of NFS volumes", "nfs.Config", "pkg/volume/nfs", "FuzzVolume"},
	{"options of EFS volumes", "efs.Config", "pkg/volume/efs", "FuzzUnderstand"},
	{"options of EBS volumes", "ebs.Config", "pkg/volume/ebs", "FuzzVolume"},
	{"NVMe identities, and names in sysfs", "ebs.devices", "pkg/volume/ebs", "FuzzDevices"},
}

var fuzzFunc = regexp.MustCompile(`(?m)^func (Fuzz[A-Z]\w*)\(`)

// TestF163_ParsersHaveFuzzTargets: every target of the list exists and has seeds, every target of the tree is
// in the list, and hack/fuzz runs them all.
func TestF163_ParsersHaveFuzzTargets(t *testing.T) {
	root := "../.."
	var found []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != root && strings.HasPrefix(d.Name(), ".") {
			return fs.SkipDir
		}
		if !strings.HasSuffix(path, "_test.go") {
			return nil
		}
		source, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		dir, err := filepath.Rel(root, filepath.Dir(path))
		for _, m := range fuzzFunc.FindAllSubmatch(source, -1) {
			found = append(found, dir+" "+string(m[1]))
			if body := string(source[strings.Index(string(source), string(m[0])):]); !strings.Contains(body[:strings.Index(body,
				"\n}\n")], "f.Add(") {
				t.Errorf("%s in %s has no seeds", m[1], path)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var listed []string
	for _, p := range parsers {
		at := p.pkg + " " + p.fuzz
		if slices.Contains(listed, at) {
			t.Errorf("%s is listed twice", at)
		}
		listed = append(listed, at)
		if !slices.Contains(found, at) {
			t.Errorf("%s, read by %s: there is no %s in %s", p.bytes, p.by, p.fuzz, p.pkg)
		}
	}
	for _, at := range found {
		if !slices.Contains(listed, at) {
			t.Errorf("%s is not in the list of parsers", at)
		}
	}
	out, err := exec.Command(root+"/hack/fuzz", "list").Output()
	if err != nil {
		t.Fatal(err)
	}
	runs := strings.Split(strings.TrimSpace(string(out)), "\n")
	slices.Sort(runs)
	slices.Sort(found)
	if !slices.Equal(runs, found) {
		t.Errorf("hack/fuzz runs\n%v\nand not\n%v", runs, found)
	}
}
