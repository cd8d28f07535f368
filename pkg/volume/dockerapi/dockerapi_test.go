package dockerapi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/mounts"
)

// TestMain lets this binary be its own children.
func TestMain(m *testing.M) {
	mounts.RunChild()
	os.Exit(m.Run())
}

// world is a driver and the mount table that it changes.
type world struct {
	volume.Unsupported
	mu      sync.Mutex
	volumes map[string]bool
	mounted map[string]string // volume by folder
	doubles int               // mounts over a mount
	stale   string            // a volume whose mount is stale, until it is mounted anew
	silent  string            // a volume whose server does not answer
	calls   []string
	fail    map[string]error
	clock   time.Duration // ahead of the host's
	hang    chan struct{} // Mount waits for it
	hanging chan struct{}
}

func newWorld() *world {
	return &world{stale: "-", silent: "-", volumes: map[string]bool{}, mounted: map[string]string{},
		fail: map[string]error{}}
}

func (w *world) note(call, name string) error {
	w.calls = append(w.calls, call+" "+name)
	return w.fail[call]
}

func (w *world) Init(context.Context) (volume.Capabilities, error) { return volume.Capabilities{}, nil }

func (w *world) Create(_ context.Context, r volume.Request) (volume.Reply, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.note("create", r.Name); err != nil {
		return volume.Reply{}, err
	}
	w.volumes[r.Name] = true
	return volume.Reply{Options: map[string]string{"volumeID": "vol-" + r.Name}}, nil
}

func (w *world) Delete(_ context.Context, r volume.Request) (volume.Reply, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.note("delete", r.Name); err != nil {
		return volume.Reply{}, err
	}
	delete(w.volumes, r.Name)
	return volume.Reply{}, nil
}

func (w *world) Mount(ctx context.Context, dir, _ string, r volume.Request) error {
	if w.hang != nil && r.Name == "hung" {
		close(w.hanging)
		select {
		case <-w.hang:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.note("mount", r.Name); err != nil {
		return err
	}
	if r.Options["volumeID"] != "vol-"+r.Name {
		return fmt.Errorf("the facts of %s were not given back: %v", r.Name, r.Options)
	}
	if w.mounted[dir] != "" {
		w.doubles++
	}
	w.mounted[dir] = r.Name
	if w.stale == r.Name {
		w.stale = "-"
	}
	return nil
}

func (w *world) Unmount(_ context.Context, dir string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.note("unmount", filepath.Base(dir)); err != nil {
		return err
	}
	delete(w.mounted, dir)
	return nil
}

func (w *world) table() (t mounts.Table, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for dir, name := range w.mounted {
		t = append(t, mounts.Entry{Point: dir, Source: "fake:/" + name, Device: "0:9999", Root: "/"})
	}
	return t, nil
}

// probe says that the mounts of stale volumes are stale, and that those of silent ones do not answer.
func (w *world) probe(_ context.Context, dir string) (stale bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch w.mounted[dir] {
	case w.stale:
		return true, unix.ESTALE
	case w.silent:
		return false, volume.Timeout(time.Second)
	}
	return false, nil
}

func serve(t testing.TB, w *world, dir string) *Server {
	t.Helper()
	s, err := New(Config{Driver: w, Name: "fake", StateDir: dir + "/state", MountDir: dir + "/mnt", Scope: "global",
		table: w.table, probe: w.probe, now: func() time.Time { return time.Now().Add(w.clock) },
		Grace: 20 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// post is a call as Docker makes it, and what it says.
func post(s *Server, call, body string) (int, string) {
	r := httptest.NewRecorder()
	path := "/VolumeDriver." + call
	if call == "Activate" {
		path = "/Plugin.Activate"
	}
	s.ServeHTTP(r, httptest.NewRequest(http.MethodPost, path, strings.NewReader(body)))
	return r.Code, strings.TrimSpace(r.Body.String())
}

func ok(t *testing.T, s *Server, call, body string) string {
	t.Helper()
	code, text := post(s, call, body)
	if code != http.StatusOK || !strings.Contains(text, `"Err":""`) {
		t.Fatalf("%s %s: %d %s", call, body, code, text)
	}
	return text
}

func refused(t *testing.T, s *Server, call, body, want string) {
	t.Helper()
	code, text := post(s, call, body)
	var a answer
	if err := json.Unmarshal([]byte(text), &a); err != nil || code == http.StatusOK || !strings.Contains(a.Err, want) {
		t.Errorf("%s %.80s: %d %s, want an error with %q", call, body, code, text, want)
	}
}

// F104, F159: a mount that is there is not handed out when it is dead. A stale one that no
// container has is made anew, and counts as before.
func TestF104F159DeadMount(t *testing.T) {
	w, dir := newWorld(), t.TempDir()
	s := serve(t, w, dir)
	ok(t, s, "Create", `{"Name":"v"}`)
	ok(t, s, "Mount", `{"Name":"v","ID":"a"}`)
	w.silent = "v"
	refused(t, s, "Mount", `{"Name":"v","ID":"b"}`, "its server does not answer")
	w.silent, w.stale = "-", "v"
	ok(t, s, "Mount", `{"Name":"v","ID":"b"}`)
	if got := strings.Join(w.calls, ", "); got != "create v, mount v, unmount v, mount v" || w.doubles > 0 {
		t.Error(got, w.doubles)
	}
	w.stale = "v"
	w.fail["unmount"] = volume.Errorf(volume.ErrInUse, "in use by sh (1)")
	refused(t, s, "Mount", `{"Name":"v","ID":"c"}`, "is mounted at "+dir+
		"/mnt/v and stale (stale file handle), and in use by sh (1)")
	delete(w.fail, "unmount")
	for _, id := range []string{"a", "b"} {
		ok(t, s, "Unmount", `{"Name":"v","ID":"`+id+`"}`)
	}
	if len(w.mounted) > 0 {
		t.Error(w.mounted)
	}
}

// F103: create, list, inspect and remove, each repeated.
func TestF103Volumes(t *testing.T) {
	w, dir := newWorld(), t.TempDir()
	s := serve(t, w, dir)
	if got := ok(t, s, "Activate", ""); got != `{"Implements":["VolumeDriver"],"Err":""}` {
		t.Error(got)
	}
	if got := ok(t, s, "Capabilities", "{}"); got != `{"Capabilities":{"Scope":"global"},"Err":""}` {
		t.Error(got)
	}
	if got := ok(t, s, "List", "{}"); got != `{"Volumes":[],"Err":""}` {
		t.Error(got)
	}
	for range 2 {
		ok(t, s, "Create", `{"Name":"v","Opts":{"size":"1"}}`)
	}
	ok(t, s, "Create", `{"Name":"w","Opts":null}`)
	refused(t, s, "Create", `{"Name":"v","Opts":{"size":"2"}}`, "volume v exists with other options (size differ)")
	if got := ok(t, s, "List", ""); strings.Count(got, `"Name"`) != 2 || strings.Contains(got, "Mountpoint") {
		t.Error(got)
	}
	if got := ok(t, s, "Get", `{"Name":"v"}`); !strings.Contains(got, `"Status":{"state":"ready","users":0}`) {
		t.Error(got)
	}
	refused(t, s, "Get", `{"Name":"x"}`, "no volume x: docker volume create --driver fake x")
	refused(t, s, "Mount", `{"Name":"x","ID":"a"}`, "no volume x")
	for range 2 {
		ok(t, s, "Remove", `{"Name":"v"}`)
	}
	if got := strings.Join(w.calls, ", "); got != "create v, create v, create w, delete v" {
		t.Error(got)
	}

	// What is remembered is verified: Create asks the driver, which makes anew what another host
	// has removed. What is mounted is there.
	ok(t, s, "Create", `{"Name":"gone"}`)
	delete(w.volumes, "gone")
	w.fail["mount"] = volume.Errorf(volume.ErrNotFound, "it does not exist any more")
	refused(t, s, "Mount", `{"Name":"gone","ID":"a"}`, "it does not exist any more; docker volume rm gone, and "+
		"create it again")
	delete(w.fail, "mount")
	w.fail["create"] = volume.Errorf(volume.ErrConflict, "another is there")
	refused(t, s, "Create", `{"Name":"gone"}`, "another is there")
	delete(w.fail, "create")
	ok(t, s, "Mount", `{"Name":"gone","ID":"a"}`) // which the world refuses if the facts were lost
	w.fail["create"] = errors.New("nobody is to ask")
	ok(t, s, "Create", `{"Name":"gone"}`)
	delete(w.fail, "create")
	ok(t, s, "Unmount", `{"Name":"gone","ID":"a"}`)
	ok(t, s, "Create", `{"Name":"gone"}`)
	if !w.volumes["gone"] {
		t.Error("an empty success")
	}
	ok(t, s, "Remove", `{"Name":"gone"}`)

	// The driver's failure is not the end.
	w.fail["create"] = errors.New("the cloud says no")
	refused(t, s, "Create", `{"Name":"y"}`, "the cloud says no")
	refused(t, s, "Get", `{"Name":"y"}`, "no volume y")
	w.fail["delete"] = errors.New("the cloud sleeps")
	refused(t, s, "Remove", `{"Name":"w"}`, "the cloud sleeps")
	refused(t, s, "Mount", `{"Name":"w","ID":"a"}`, "docker volume rm w")
	delete(w.fail, "delete")
	ok(t, s, "Remove", `{"Name":"w"}`)
	if len(w.volumes) != 0 {
		t.Error(w.volumes)
	}
}

// F103: who is told of changes, and looks, knows the state after each call. No lock is held then, or looking
// would hang.
func TestF103Changed(t *testing.T) {
	s := serve(t, newWorld(), t.TempDir())
	var seen string
	s.config.Changed = func() {
		all, err := s.Volumes()
		seen = fmt.Sprint(err)
		for _, v := range all {
			n := 0
			for _, times := range v.Users {
				n += times
			}
			seen = fmt.Sprintf("%s %s %d %t", v.Name, v.State, n, v.Created.IsZero())
		}
	}
	for _, c := range []struct{ call, body, want string }{
		{"Create", `{"Name":"v"}`, "v ready 0 false"},
		{"Mount", `{"Name":"v","ID":"a"}`, "v ready 1 false"},
		{"Mount", `{"Name":"v","ID":"b"}`, "v ready 2 false"},
		{"Unmount", `{"Name":"v","ID":"a"}`, "v ready 1 false"},
		{"Unmount", `{"Name":"v","ID":"b"}`, "v ready 0 false"},
		{"Remove", `{"Name":"v"}`, "<nil>"},
	} {
		seen = "nothing"
		if ok(t, s, c.call, c.body); seen != c.want {
			t.Errorf("after %s %s it knows %q, want %q", c.call, c.body, seen, c.want)
		}
	}
}

// F104: a volume is unmounted when the last user goes; an id counts as often as it came, and a restart keeps
// the counts.
func TestF104Counts(t *testing.T) {
	w, dir := newWorld(), t.TempDir()
	s := serve(t, w, dir)
	ok(t, s, "Create", `{"Name":"v"}`)
	if got := ok(t, s, "Path", `{"Name":"v"}`); got != `{"Mountpoint":"","Err":""}` {
		t.Error(got)
	}
	at := ok(t, s, "Mount", `{"Name":"v","ID":"a"}`)
	if at != `{"Mountpoint":`+strconv.Quote(dir+"/mnt/v")+`,"Err":""}` || ok(t, s, "Path", `{"Name":"v"}`) != at {
		t.Error(at)
	}
	ok(t, s, "Mount", `{"Name":"v","ID":"a"}`) // docker cp
	ok(t, s, "Mount", `{"Name":"v","ID":"b"}`)
	s.Close()
	s = serve(t, w, dir)
	ok(t, s, "Unmount", `{"Name":"v","ID":"a"}`)
	ok(t, s, "Unmount", `{"Name":"v","ID":"nobody"}`)
	ok(t, s, "Unmount", `{"Name":"v","ID":"a"}`)
	if len(w.mounted) != 1 {
		t.Fatal("unmounted under the user b")
	}
	w.fail["unmount"] = errors.New("the device is busy")
	refused(t, s, "Unmount", `{"Name":"v","ID":"b"}`, "the device is busy")
	delete(w.fail, "unmount")
	ok(t, s, "Unmount", `{"Name":"v","ID":"b"}`)
	if got := strings.Join(w.calls, ", "); len(w.mounted) != 0 || got != "create v, mount v, unmount v, unmount v" {
		t.Error(got)
	}

	// Reboot: nothing is mounted, and the counts are void. An unmount from before is no error.
	ok(t, s, "Mount", `{"Name":"v","ID":"c"}`)
	s.Close()
	clear(w.mounted)
	s = serve(t, w, dir)
	if rec, _ := s.get("v"); rec.users() != 0 {
		t.Errorf("users after a reboot: %v", rec.Users)
	}
	ok(t, s, "Unmount", `{"Name":"v","ID":"c"}`)
	ok(t, s, "Mount", `{"Name":"v","ID":"d"}`)

	// dockerd was killed and has forgotten d: nobody has the volume, so it can go.
	ok(t, s, "Remove", `{"Name":"v"}`)
	if len(w.mounted)+len(w.volumes) != 0 {
		t.Error(w.mounted, w.volumes)
	}
	if _, err := New(Config{Driver: w, Name: "fake", StateDir: dir + "/state", MountDir: dir + "/mnt", Scope: "local",
		table: w.table, probe: w.probe}); err == nil || !strings.Contains(err.Error(), "belongs to another process") {
		t.Errorf("two servers for one journal: %v", err)
	}
}

// F158: killed at every step of every call, and called again as Docker does when it got no answer, everything
// ends as if nothing had happened.
func TestF158KilledAtEveryStep(t *testing.T) {
	type call struct{ verb, body string }
	calls := []call{
		{"Create", `{"Name":"v"}`},
		{"Mount", `{"Name":"v","ID":"a"}`}, {"Mount", `{"Name":"v","ID":"a"}`}, {"Mount", `{"Name":"v","ID":"b"}`},
		{"Unmount", `{"Name":"v","ID":"a"}`}, {"Unmount", `{"Name":"v","ID":"a"}`}, {"Unmount", `{"Name":"v","ID":"b"}`},
		{"Remove", `{"Name":"v"}`},
	}
	users := []int{0, 1, 2, 3, 2, 1, 0, 0}
	t.Cleanup(func() { volume.OnFailpoint = nil })
	for kill := 1; ; kill++ {
		w, dir := newWorld(), t.TempDir()
		s := serve(t, w, dir)
		seen, where := 0, ""
		volume.OnFailpoint = func(name string) {
			if seen++; seen == kill {
				where = name
				runtime.Goexit() // what runs after it are only unlocks, as the kernel would do
			}
		}
		for i, c := range calls {
			for {
				r := httptest.NewRecorder()
				done := make(chan struct{})
				before := where
				go func() {
					defer close(done)
					s.ServeHTTP(r, httptest.NewRequest(http.MethodPost, "/VolumeDriver."+c.verb, strings.NewReader(c.body)))
				}()
				<-done
				if where != before {
					s.Close()
					s = serve(t, w, dir)
				}
				if r.Body.Len() > 0 {
					if where != before {
						w.clock = repeats // Docker has its answer: the same call comes only for another reason, and later
					}
					if r.Code != http.StatusOK {
						t.Fatalf("killed at %s of %d: %s: %s", where, i, c.verb, r.Body)
					}
					break
				}
			}
			rec, known := s.get("v")
			if known != (c.verb != "Remove") || rec.users() != users[i] || len(w.mounted) != min(users[i], 1) || w.doubles > 0 {
				t.Fatalf("killed at %s: after %s %s: known %v, users %v, mounted %v, %d mounts over mounts", where, c.verb, c.body,
					known, rec.Users, w.mounted, w.doubles)
			}
		}
		s.Close()
		if len(w.volumes) > 0 {
			t.Fatalf("killed at %s: left %v", where, w.volumes)
		}
		if where == "" {
			t.Logf("killed at %d steps", kill-1)
			if kill < 30 {
				t.Error("these are fewer than there are")
			}
			return
		}
	}
}

// F158: what was mounted when nobody was there to count it, goes; what the journal lost is found.
func TestF158Orphans(t *testing.T) {
	w, dir := newWorld(), t.TempDir()
	s := serve(t, w, dir)
	ok(t, s, "Create", `{"Name":"orphan"}`)
	ok(t, s, "Create", `{"Name":"used"}`)
	ok(t, s, "Mount", `{"Name":"used","ID":"a"}`)
	w.mounted[dir+"/mnt/orphan"] = "orphan"
	w.mounted[dir+"/mnt/lost"] = "lost"
	s.Close()
	s = serve(t, w, dir)
	if got := ok(t, s, "Get", `{"Name":"lost"}`); !strings.Contains(got, "recovered") ||
		!strings.Contains(got, "/mnt/lost") {
		t.Error(got)
	}
	gone := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	go func() { defer close(gone); s.Sweep(ctx) }()
	for deadline := time.After(10 * time.Second); ; {
		table, _ := w.table()
		if _, known := s.get("lost"); len(table) == 1 && !known { // it is unmounted first and forgotten then
			break
		}
		select {
		case <-deadline:
			t.Fatal("the orphans stay")
		case <-time.After(time.Millisecond):
		}
	}
	cancel()
	<-gone
	if w.mounted[dir+"/mnt/used"] == "" {
		t.Error("unmounted under a user")
	}
	refused(t, s, "Get", `{"Name":"lost"}`, "no volume lost")
}

// F159, F102: while one volume's server hangs, all that concerns others, and every question, is answered.
func TestF159HungMount(t *testing.T) {
	w, dir := newWorld(), t.TempDir()
	w.hang, w.hanging = make(chan struct{}), make(chan struct{})
	s := serve(t, w, dir)
	ok(t, s, "Create", `{"Name":"hung"}`)
	done := make(chan string)
	go func() { _, text := post(s, "Mount", `{"Name":"hung","ID":"a"}`); done <- text }()
	<-w.hanging
	began := time.Now()
	ok(t, s, "List", "")
	ok(t, s, "Get", `{"Name":"hung"}`)
	ok(t, s, "Create", `{"Name":"v"}`)
	ok(t, s, "Mount", `{"Name":"v","ID":"a"}`)
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("%s for what concerns others", took)
	}
	close(w.hang)
	if text := <-done; !strings.Contains(text, `"Err":""`) {
		t.Error(text)
	}
}

// A caller that hung up gets no answer, so it has nothing; if it was Docker's time limit, Docker calls again.
func TestCallerHungUp(t *testing.T) {
	w, dir := newWorld(), t.TempDir()
	s := serve(t, w, dir)
	ok(t, s, "Create", `{"Name":"v"}`)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodPost, "/VolumeDriver.Mount",
		strings.NewReader(`{"Name":"v","ID":"a"}`)).WithContext(ctx))
	if rec, _ := s.get("v"); rec.users() != 0 {
		t.Error("counted")
	}
	ok(t, s, "Mount", `{"Name":"v","ID":"a"}`)
	ok(t, s, "Unmount", `{"Name":"v","ID":"a"}`)
	if len(w.mounted) != 0 {
		t.Error("still mounted")
	}
}

// device is a driver whose volumes are attached, in either way of mounting them.
type device struct {
	*world
	byDevice bool
}

func (d device) Init(context.Context) (volume.Capabilities, error) {
	return volume.Capabilities{Attach: true}, nil
}

func (d device) Attach(_ context.Context, r volume.Request, _ string) (string, error) {
	return "/dev/asked-" + r.Name, d.note("attach", r.Name)
}

func (d device) WaitForAttach(_ context.Context, dev string, _ volume.Request) (string, error) {
	return strings.Replace(dev, "asked", "real", 1), d.note("wait", dev)
}

func (d device) MountDevice(ctx context.Context, dir, dev string, r volume.Request) error {
	if !d.byDevice {
		return volume.ErrNotSupported
	}
	_ = d.note("mountdevice", dev)
	return d.world.Mount(ctx, dir, dev, r)
}

func (d device) UnmountDevice(ctx context.Context, dir string) error {
	_ = d.note("unmountdevice", filepath.Base(dir))
	return d.world.Unmount(ctx, dir)
}

func (d device) Detach(_ context.Context, which, _ string) error { return d.note("detach", which) }

func TestAttachedVolumes(t *testing.T) {
	for byDevice, want := range map[bool]string{
		true: "create v, attach v, wait /dev/asked-v, mountdevice /dev/real-v, mount v, unmountdevice v, unmount v, " +
			"detach v, delete v",
		false: "create v, attach v, wait /dev/asked-v, mount v, unmount v, detach v, delete v",
	} {
		w, dir := newWorld(), t.TempDir()
		s, err := New(Config{Driver: device{w, byDevice}, Name: "fake", StateDir: dir + "/state", MountDir: dir + "/mnt",
			Scope: "local", table: w.table, probe: w.probe})
		if err != nil {
			t.Fatal(err)
		}
		ok(t, s, "Create", `{"Name":"v"}`)
		ok(t, s, "Mount", `{"Name":"v","ID":"a"}`)
		ok(t, s, "Unmount", `{"Name":"v","ID":"a"}`)
		ok(t, s, "Remove", `{"Name":"v"}`)
		if got := strings.Join(w.calls, ", "); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
		s.Close()
	}
}

// F109: hostile requests are refused with a clear word, and nothing is done.
func TestF109HostileRequests(t *testing.T) {
	w, dir := newWorld(), t.TempDir()
	s := serve(t, w, dir)
	for _, name := range []string{"", "../x", "..", "/etc", "a/b", "-o", "a\x00", "a\nb", "@server", ".x",
		strings.Repeat("a", 4096)} {
		for _, call := range []string{"Create", "Mount", "Unmount", "Remove", "Get", "Path"} {
			body, _ := json.Marshal(map[string]any{"Name": name, "ID": "a"})
			refused(t, s, call, string(body), "name")
		}
	}
	for _, tc := range []struct{ body, want string }{
		{"", "not JSON as it should be"},
		{"[]", "not JSON as it should be"},
		{`{"Name":7}`, "not JSON as it should be"},
		{`{"Name":"v","Opts":{"size":5}}`, "not JSON as it should be"},
		{`{"Name":"v","Opts":["a"]}`, "not JSON as it should be"},
		{`{"Name":"v"}{"Name":"w"}`, "more than one JSON document"},
		{strings.Repeat(`{"Opts":`, 20000), "not JSON as it should be"},
		{`{"Name":"v","Opts":{"x":"` + strings.Repeat("a", 10<<20) + `"}}`, "larger than 262144 octets"},
		{`{"Name":"v","Opts":{"x":"` + strings.Repeat("a", 5000) + `"}}`, "5000 octets, at most 4096"},
		{`{"Name":"v","Opts":{"x":"a\nb"}}`, "control characters"},
		{`{"Name":"v","Opts":{"a\u0000b":"x"}}`, "not a name"},
		{`{"Name":"v","Opts":{"kubernetes.io/secret/key":"x"}}`, "is kubelet's, not Docker's"},
		{`{"Name":"v","Opts":{"name":"../w"}}`, "option name says otherwise"},
		{`{"Name":"v","ID":"` + strings.Repeat("a", 300) + `"}`, "mount id of 300 octets"},
		{`{"Name":"v","ID":"a\nb"}`, "control characters"},
	} {
		refused(t, s, "Create", tc.body, tc.want)
	}
	for path, code := range map[string]int{"/VolumeDriver.Format": 404, "/": 404, "/../x": 404,
		"/VolumeDriver.Create/": 404} {
		r := httptest.NewRecorder()
		s.ServeHTTP(r, httptest.NewRequest(http.MethodPost, path, strings.NewReader("{}")))
		if r.Code != code || !strings.Contains(r.Body.String(), `"Err":"no call`) {
			t.Errorf("%s: %d %s", path, r.Code, r.Body)
		}
	}
	r := httptest.NewRecorder()
	s.ServeHTTP(r, httptest.NewRequest(http.MethodGet, "/VolumeDriver.List", nil))
	if r.Code != http.StatusMethodNotAllowed {
		t.Error(r.Code)
	}
	if files, _ := os.ReadDir(dir + "/state/volumes"); len(w.calls)+len(files) != 0 {
		t.Errorf("done: %v, %v", w.calls, files)
	}
}

// F160: an option's value is in no error and no log.
func TestF160NoValuesInLogs(t *testing.T) {
	w, dir := newWorld(), t.TempDir()
	var log bytes.Buffer
	s, err := New(Config{Driver: w, Name: "fake", StateDir: dir + "/state", MountDir: dir + "/mnt", Scope: "local",
		table: w.table, probe: w.probe,
		Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	const secret = "hunter2"
	ok(t, s, "Create", `{"Name":"v","Opts":{"password":"`+secret+`"}}`)
	_, text := post(s, "Create", `{"Name":"v","Opts":{"password":"`+secret+`3"}}`)
	_, more := post(s, "Create", `{"Name":"v","Opts":{"password":"`+secret+`\n"}}`)
	if all := text + more + ok(t, s, "Get", `{"Name":"v"}`) + ok(t, s, "List", "") +
		log.String(); strings.Contains(all, secret) {
		t.Error(all)
	}
	if fi, err := os.Stat(dir + "/state/volumes/v.json"); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("journal: %v %v", fi, err)
	}
}

// Twenty at once on few volumes: nothing is mounted twice, and nothing is left.
func TestManyAtOnce(t *testing.T) {
	w, dir := newWorld(), t.TempDir()
	s := serve(t, w, dir)
	names := []string{"a", "b", "c"}
	for _, n := range names {
		ok(t, s, "Create", `{"Name":"`+n+`"}`)
	}
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			for j := range 5 {
				body := fmt.Sprintf(`{"Name":"%s","ID":"%d"}`, names[(i+j)%3], i)
				for _, call := range []string{"Mount", "Unmount"} {
					if code, text := post(s, call, body); code != http.StatusOK {
						t.Errorf("%s: %s", call, text)
					}
				}
			}
		})
	}
	wg.Wait()
	if len(w.mounted) != 0 || w.doubles != 0 {
		t.Errorf("mounted %v, %d mounts over mounts", w.mounted, w.doubles)
	}
	for _, n := range names {
		if rec, _ := s.get(n); rec.users() != 0 {
			t.Errorf("%s has users %v", n, slices.Collect(maps.Keys(rec.Users)))
		}
	}
}

func FuzzDecode(f *testing.F) {
	for _, seed := range []string{`{"Name":"v","ID":"a","Opts":{"a":"b"}}`, `{"name":"v"}`, `null`, `{"Name":"../x"}`,
		`{"Opts":null,"Name":"v"}`, `{"Name":"v"} x`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		q, err := decode(bytes.NewReader(data), verbs["/VolumeDriver.Create"])
		if err != nil {
			if len(err.Error()) > 2000 || strings.ContainsAny(err.Error(), "\x00\n") {
				t.Errorf("an error that nobody wants in a log: %q", err)
			}
			return
		}
		if volume.CheckName(q.Name) != nil || len(q.ID) > maxID || volume.CheckOptions(q.Opts) != nil {
			t.Errorf("accepted %q", data)
		}
	})
}

// BenchmarkLife is Create, Mount, Unmount and Remove with 1 000 volumes in the journal.
func BenchmarkLife(b *testing.B) {
	for _, at := range []int{1, 20} {
		b.Run(fmt.Sprintf("at-once=%d", at), func(b *testing.B) {
			w, dir := newWorld(), b.TempDir()
			for i := range 1000 {
				j := volume.Journal[record]{Dir: dir + "/state/volumes"}
				if err := j.Put(fmt.Sprintf("old%d", i), record{State: Ready}); err != nil {
					b.Fatal(err)
				}
			}
			s := serve(b, w, dir)
			work := make(chan int)
			var wg sync.WaitGroup
			for range at {
				wg.Go(func() {
					for i := range work {
						for _, call := range []string{"Create", "Mount", "Unmount", "Remove"} {
							if code, text := post(s, call, fmt.Sprintf(`{"Name":"v%d","ID":"a"}`, i)); code != http.StatusOK {
								b.Error(text)
							}
						}
					}
				})
			}
			b.ResetTimer()
			for i := range b.N {
				work <- i
			}
			close(work)
			wg.Wait()
		})
	}
}
