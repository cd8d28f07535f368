package ebs_test

import (
	"encoding/json"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/volume/dockerapi"
)

// F102, F104, F106: Docker's calls, as lariat-storage with the driver ebs takes them; it is started anew between.
func TestF104Docker(t *testing.T) {
	l := newLab(t, -1)
	l.enter(t)
	c := dockerapi.Config{Driver: l.inProcess, Name: "lariat-ebs", StateDir: t.TempDir(), MountDir: t.TempDir(),
		Scope: "local"}
	dir := c.MountDir + "/db"
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	do := func(verb, id, words string) {
		t.Helper()
		s, err := dockerapi.New(c)
		must(t, err)
		defer s.Close()
		body, _ := json.Marshal(map[string]any{"Name": "db", "ID": id,
			"Opts": map[string]string{"size": "1", "onRemove": "purge"}})
		w := httptest.NewRecorder()
		s.ServeHTTP(w, httptest.NewRequest("POST", "/VolumeDriver."+verb, strings.NewReader(string(body))))
		var a struct{ Err string }
		must(t, json.Unmarshal(w.Body.Bytes(), &a))
		if words == "" && a.Err != "" || words != "" && !strings.Contains(a.Err, words) {
			t.Fatalf("%s: %q, want %q", verb, a.Err, words)
		}
	}
	do("Create", "", "")
	do("Mount", "one", "")
	do("Mount", "two", "")
	if m := at(t, dir); len(m) != 1 || m[0].FSType != "ext4" || l.volume(t).Attachment.Instance != self {
		t.Fatalf("mounted: %+v, %+v", m, l.volume(t))
	}
	must(t, os.WriteFile(dir+"/f", []byte("data"), 0o644))
	do("Unmount", "one", "")
	if len(at(t, dir)) != 1 {
		t.Error("unmounted under the second")
	}
	do("Unmount", "two", "")
	nothingAt(t, dir)
	if v := l.volume(t); v.State != "available" {
		t.Errorf("nobody has it: %+v", v)
	}
	do("Mount", "three", "")
	if data, err := os.ReadFile(dir + "/f"); err != nil || string(data) != "data" {
		t.Errorf("the data: %q %v", data, err)
	}
	do("Unmount", "three", "")
	do("Remove", "", "")
	if len(l.Volumes()) != 0 {
		t.Errorf("removed: %+v", l.Volumes())
	}
	l.NoRecords(t)
}
