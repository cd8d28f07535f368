package journal_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lariat-net/lariat/pkg/journal"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// FuzzJournal: whatever a file of the journal says, it is the record of its name or none, and can be replaced
// and removed.
func FuzzJournal(f *testing.F) {
	f.Add("c1:eth0", []byte(`{"containerID":"c1","ifname":"eth0","attachment":{"network":"overlay","addresses":[{"address":"10.42.0.2","sequence":7}]},"state":"held","bootID":"b1"}`))
	f.Add("c1:eth0", []byte(`{"containerID":"c1","ifname":"eth0","attachment":{"network":"../../etc"},"state":"held"}`))
	f.Add("c1:eth0", []byte(`{"containerID":"c2","ifname":"eth0"}`))
	f.Add(".tmp-c1:eth0", []byte(`{"containerID":"c1"`))
	f.Add("c1", []byte("\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, name string, data []byte) {
		if name == "" || len(name) > 100 || strings.ContainsAny(name, "/\x00") || name == "." || name == ".." {
			return
		}
		dir := t.TempDir()
		j := journal.Journal{Dir: filepath.Join(dir, "attachments")}
		if err := os.MkdirAll(filepath.Join(j.Dir, "overlay"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(j.Dir, "overlay", name), data, 0o600); err != nil {
			t.Skip(err) // a name that the file system does not take
		}
		list, err := j.List("overlay")
		if err != nil || len(list) > 1 {
			t.Fatalf("%v %v", list, err)
		}
		for _, r := range list {
			if r.ContainerID+":"+r.IfName != name || r.Attachment.Network != "overlay" {
				t.Errorf("%q is the record of %s of network %q", name, r.AttachmentID, r.Attachment.Network)
			}
			if err := j.SetTerminating("overlay", r.AttachmentID, true); err != nil {
				t.Error(err)
			}
			if got, ok, err := j.Get("overlay", r.AttachmentID); err != nil || ok && !got.Terminating {
				t.Errorf("%+v %v", got, err)
			}
			if err := j.Remove("overlay", r.AttachmentID); err != nil {
				t.Error(err)
			}
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
			t.Errorf("it left the journal: %v %v", entries, err)
		}
		r := journal.Record{AttachmentID: metadata.AttachmentID{ContainerID: "c1", IfName: "eth0"},
			Attachment: metadata.Attachment{Network: "overlay"}, State: journal.Held}
		if err := j.Put(r); err != nil {
			t.Error(err)
		}
		if got, ok, err := j.Get("overlay", r.AttachmentID); err != nil || !ok || got.State != journal.Held {
			t.Errorf("%+v %t %v", got, ok, err)
		}
	})
}
