package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/volume/dockerapi"
	"github.com/lariat-net/lariat/pkg/volume/mounts"
)

// The tests run the program itself: this binary, started again under a variable.
const asProgram = "LARIAT_STORAGE_TEST_PROGRAM"

func TestMain(m *testing.M) {
	mounts.RunChild()
	if os.Getenv(asProgram) != "" {
		os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

// driver needs no mounts: volumes are made and removed.
const driver = `#!/bin/sh
case $1 in
init) echo '{"status":"Success","capabilities":{"attach":false}}' ;;
*) echo '{"status":"Success"}' ;;
esac
`

// process is a running executable of ours.
type process struct {
	cmd  *exec.Cmd
	log  bytes.Buffer
	done chan struct{}
}

func start(t *testing.T, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{cmd: cmd, done: make(chan struct{})}
	cmd.Stderr, cmd.SysProcAttr = &p.log, &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { cmd.Wait(); close(p.done) }()
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			t.Logf("%s:\n%s", filepath.Base(cmd.Path), p.log.String())
		}
	})
	return p
}

func (p *process) kill() {
	p.cmd.Process.Kill()
	<-p.done
}

// metadataBinary is the real lariat-metadata: of LARIAT_BIN, or built for the test.
func metadataBinary(t *testing.T) string {
	t.Helper()
	if file := filepath.Join(os.Getenv("LARIAT_BIN"), "lariat-metadata"); filepath.IsAbs(file) &&
		exec.Command(file, "--help").Run() == nil {
		return file
	}
	file := filepath.Join(t.TempDir(), "lariat-metadata")
	if out, err := exec.Command("go", "build", "-o", file, "../metadata").CombinedOutput(); err != nil {
		t.Fatalf("build lariat-metadata: %v\n%s", err, out)
	}
	return file
}

// host is a folder with everything of one host.
type host struct {
	dir    string
	client metadata.Client
	docker http.Client
}

func newHost(t *testing.T) *host {
	t.Helper()
	dir, err := os.MkdirTemp("", "lst") // a socket's path may have 107 octets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	h := &host{dir: dir, client: metadata.Client{Socket: dir + "/m"}}
	h.docker.Transport = &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", dir+"/p")
		}}
	for name, text := range map[string]string{"id": strings.Repeat("1", 32), "shell": driver} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return h
}

func (h *host) metadata(t *testing.T, bin string) *process {
	t.Helper()
	p := start(t, exec.Command(bin, "--host-name", "h1", "--socket", h.client.Socket, "--data-dir", h.dir+"/etcd",
		"--underlay", "127.0.0.1/8", "--machine-id-file", h.dir+"/id"))
	eventually(t, "lariat-metadata", func() error { _, err := h.client.View(t.Context()); return err })
	return p
}

func (h *host) storage(t *testing.T) *process {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "--driver", h.dir+"/shell", "--name", "lariat-shell", "--socket", h.dir+"/p", "--state-dir",
		h.dir+"/state", "--mount-dir", h.dir+"/mounts",
		"--metadata-socket", h.client.Socket, "--log-level", "debug")
	cmd.Env = append(os.Environ(), asProgram+"=1")
	p := start(t, cmd)
	eventually(t, "lariat-storage", func() error {
		r, err := h.docker.Get("http://x/healthz")
		if err == nil {
			r.Body.Close()
		}
		return err
	})
	return p
}

// call is one of Docker's.
func (h *host) call(t *testing.T, verb, name string, opts map[string]string) string {
	t.Helper()
	body, _ := json.Marshal(map[string]any{"Name": name, "Opts": opts})
	r, err := h.docker.Post("http://x/VolumeDriver."+verb, "application/json", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	answer, err := io.ReadAll(r.Body)
	if err != nil || r.StatusCode != http.StatusOK {
		t.Fatalf("%s %s: %v %s", verb, name, err, answer)
	}
	return string(answer)
}

// listed waits until the metadata has these volumes, as driver/name, and no others.
func (h *host) listed(t *testing.T, want ...string) {
	t.Helper()
	eventually(t, fmt.Sprintf("metadata with %v", want), func() error {
		list, err := h.client.Volumes(t.Context(), false)
		var got []string
		for _, v := range list {
			got = append(got, v.Driver+"/"+v.Name)
		}
		if err == nil && !slices.Equal(got, want) {
			err = fmt.Errorf("it has %v", got)
		}
		return err
	})
}

func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	late := time.After(time.Minute)
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("%s: not within a minute: %v", what, err)
		}
	}
}

// F103: volumes are listed in the metadata of a real lariat-metadata when it is there, and Docker's calls do
// not need it.
func TestF103VolumesInMetadata(t *testing.T) {
	const secret = "hunter2-is-a-secret"
	h := newHost(t)
	bin := metadataBinary(t)

	// Without a service. What it does not know yet, it is told later.
	first := h.storage(t)
	h.call(t, "Create", "early", map[string]string{"password": secret})
	service := h.metadata(t, bin)
	h.listed(t, "lariat-shell/early")
	list, err := h.client.Volumes(t.Context(), true)
	if err != nil || len(list) != 1 {
		t.Fatal(err, list)
	}
	if age := time.Since(list[0].Created); age < 0 || age > 5*time.Minute {
		t.Errorf("created %s", list[0].Created)
	}
	list[0].Created = time.Time{}
	if want := (metadata.Volume{Driver: "lariat-shell", Name: "early", Scope: "local", Host: "h1",
		State: "ready"}); list[0] != want {
		t.Errorf("%+v, want %+v", list[0], want)
	}
	h.call(t, "Create", "first", nil)
	h.listed(t, "lariat-shell/early", "lariat-shell/first")
	h.call(t, "Remove", "first", nil)
	h.listed(t, "lariat-shell/early")

	// It dies, and misses a new volume and the end of another.
	service.kill()
	h.call(t, "Create", "second", map[string]string{"password": secret})
	h.call(t, "Remove", "early", nil)
	if all := h.call(t, "List", "", nil); strings.Contains(all, "early") || !strings.Contains(all, "second") {
		t.Error(all)
	}
	service = h.metadata(t, bin)
	h.listed(t, "lariat-shell/second")

	// lariat-storage dies, and has forgotten a volume when it comes back. What other drivers told stays.
	first.kill()
	for _, v := range []metadata.Volume{{Driver: "lariat-shell", Name: "lost"}, {Driver: "lariat-nfs", Name: "lost"}} {
		v.Scope, v.State = "local", "ready"
		if err := h.client.PutVolume(t.Context(), v); err != nil {
			t.Fatal(err)
		}
	}
	h.listed(t, "lariat-nfs/lost", "lariat-shell/lost", "lariat-shell/second")
	second := h.storage(t)
	h.listed(t, "lariat-nfs/lost", "lariat-shell/second")

	// Options are neither in the store's files, which do have the names, nor in any log.
	service.kill()
	found := map[string]bool{}
	err = filepath.WalkDir(h.dir+"/etcd", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		for _, word := range []string{secret, "password", "lariat-shell"} {
			found[word] = found[word] || bytes.Contains(data, []byte(word))
		}
		return err
	})
	if err != nil || found[secret] || found["password"] || !found["lariat-shell"] {
		t.Errorf("%v, found in the store: %v", err, found)
	}
	second.kill()
	if strings.Contains(service.log.String()+first.log.String()+second.log.String(), secret) {
		t.Error("an option is in a log")
	}
}

// F103: a service that takes questions and never answers holds up nobody.
func TestF103MetadataThatHangs(t *testing.T) {
	h := newHost(t)
	l, err := net.Listen("unix", h.client.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	h.storage(t)
	c, err := l.Accept() // the first pass is under way, and stays so
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	began := time.Now()
	h.call(t, "Create", "v", nil)
	h.call(t, "Get", "v", nil)
	h.call(t, "Remove", "v", nil)
	if took := time.Since(began); took > askTime/2 {
		t.Errorf("Docker waited %s", took)
	}
}

func TestDescribe(t *testing.T) {
	p := publisher{driver: "lariat-nfs", scope: "global"}
	created := time.Date(2026, 5, 4, 3, 2, 1, 999, time.FixedZone("", 3600))
	v := dockerapi.Volume{Name: "data", State: dockerapi.Ready, Mounted: true, Users: map[string]int{"a": 2, "b": 1},
		Created: created}
	want := metadata.Volume{Driver: "lariat-nfs", Name: "data", Scope: "global", State: "ready", Users: 3,
		Created: time.Date(2026, 5, 4, 2, 2, 1, 0, time.UTC)}
	if got := p.describe(v); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	// What the service answers is equal to what it was told, or each pass would tell it again.
	data, _ := json.Marshal(want)
	var again metadata.Volume
	if err := json.Unmarshal(data, &again); err != nil || again != want {
		t.Errorf("%v %+v", err, again)
	}
}
