package volumes_test

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lariat-net/lariat/test/guest/nfsd"
)

// storage is lariat-storage with the driver nfs, as a process that Docker would call.
type storage struct {
	cmd    *exec.Cmd
	client http.Client
}

const pluginSocket = "/run/docker/plugins/lariat-nfs.sock"

func startStorage(t *testing.T, bin string) *storage {
	t.Helper()
	s := &storage{cmd: exec.Command(bin, "--driver", "nfs"), client: http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", pluginSocket)
		},
	}}}
	s.cmd.Stdout, s.cmd.Stderr = os.Stdout, os.Stderr
	must(t, s.cmd.Start())
	t.Cleanup(func() { s.cmd.Process.Kill(); s.cmd.Wait() })
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for range 500 {
		if r, err := s.client.Get("http://x/readyz"); err == nil {
			r.Body.Close()
			return s
		}
		<-tick.C
	}
	t.Fatal("lariat-storage does not answer")
	return nil
}

func (s *storage) kill() {
	s.cmd.Process.Signal(syscall.SIGKILL)
	s.cmd.Wait()
}

// call is one of Docker's, and returns the mount point and the error's text.
func (s *storage) call(t *testing.T, verb, name, id string, opts map[string]string) (string, string) {
	t.Helper()
	body, _ := json.Marshal(map[string]any{"Name": name, "ID": id, "Opts": opts})
	r, err := s.client.Post("http://x/VolumeDriver."+verb, "application/json", strings.NewReader(string(body)))
	must(t, err)
	defer r.Body.Close()
	var a struct{ Mountpoint, Err string }
	must(t, json.NewDecoder(r.Body).Decode(&a))
	return a.Mountpoint, a.Err
}

// F102, F103, F104, F158: Docker's calls on the kernel's NFS server, with kill -9 of lariat-storage between.
// The twin with a dockerd is in test/runtimes.
func TestF104Docker(t *testing.T) {
	nfsd.Serve(t)
	bin := filepath.Join(os.Getenv("LARIAT_BIN"), "lariat-storage")
	if !exists(bin) {
		t.Skip("bin/lariat-storage is not built: make build")
	}
	s := startStorage(t, bin)
	opts := map[string]string{"host": server, "exportBase": export, "onRemove": "purge", "mntOptions": "vers=4.0"}
	do := func(verb, id string) string {
		t.Helper()
		at, err := s.call(t, verb, "docked", id, opts)
		if err != "" {
			t.Fatalf("%s: %s", verb, err)
		}
		return at
	}
	if _, err := s.call(t, "Create", "bad", "", map[string]string{"host": server, "exportBase": export,
		"mntOptions": "suid"}); !strings.Contains(err, "suid") {
		t.Errorf("an option that is not allowed: %q", err)
	}
	do("Create", "")
	s.kill()
	s = startStorage(t, bin)
	do("Create", "")
	dir := do("Mount", "one")
	if do("Mount", "two") != dir || do("Path", "") != dir {
		t.Error("another place for the second")
	}
	s.kill()
	s = startStorage(t, bin)
	if stack := at(t, dir); len(stack) != 1 || stack[0].Source != server+":"+export+"/docked" {
		t.Fatalf("mounted: %+v", stack)
	}
	must(t, os.WriteFile(dir+"/f", []byte("data"), 0o644))
	do("Unmount", "one")
	if data, err := os.ReadFile(export + "/docked/f"); err != nil || string(data) != "data" || len(at(t, dir)) != 1 {
		t.Errorf("while the second has it: %q %v %+v", data, err, at(t, dir))
	}
	do("Unmount", "two")
	nothingAt(t, dir)
	do("Remove", "")
	do("Remove", "")
	if exists(export+"/docked") || exists(dir) {
		t.Error("left on the server, or here")
	}
	noLeftovers(t)
}
