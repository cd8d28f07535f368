package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/doctor"
	"github.com/lariat-net/lariat/pkg/ipsec"
	"github.com/lariat-net/lariat/pkg/kernel/netnstest"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// fakeManager is what of the network manager these commands ask: it answers with a report, and on a reload
// does what it is told.
type fakeManager struct {
	socket string
	mu     sync.Mutex
	report ipsec.Report
	reload func() error
	loaded int
}

func newFakeManager(t testing.TB, r ipsec.Report) *fakeManager {
	t.Helper()
	dir, err := os.MkdirTemp("", "lariat") // a socket's path may have 107 octets
	if err != nil {
		t.Fatal(err)
	}
	m := &fakeManager{socket: filepath.Join(dir, "nm.sock"), report: r}
	l, err := net.Listen("unix", m.socket)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/tunnels", func(w http.ResponseWriter, _ *http.Request) {
		m.mu.Lock()
		defer m.mu.Unlock()
		_ = json.NewEncoder(w).Encode(m.report)
	})
	mux.HandleFunc("GET /v1/state", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `{"health":[{"concern":"overlay","ok":true}]}`)
	})
	mux.HandleFunc("POST /v1/tunnels/reauth", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "OK") })
	mux.HandleFunc("POST /v1/reload", func(w http.ResponseWriter, _ *http.Request) {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.loaded++
		if m.reload != nil {
			if err := m.reload(); err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
			}
		}
	})
	server := &http.Server{Handler: mux}
	done := make(chan struct{})
	go func() { defer close(done); server.Serve(l) }()
	t.Cleanup(func() { server.Close(); <-done; os.RemoveAll(dir) })
	return m
}

func (m *fakeManager) set(change func(r *ipsec.Report)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	change(&m.report)
}

// fixtureReport is the report that belongs to testdata/ipsec.json.
func fixtureReport(t testing.TB) ipsec.Report {
	t.Helper()
	b, err := os.ReadFile("testdata/ipsec.tunnels.json")
	if err != nil {
		t.Fatal(err)
	}
	var r ipsec.Report
	if err := json.Unmarshal(b, &r); err != nil {
		t.Fatal(err)
	}
	return r
}

func secretFile(t testing.TB, lines ...string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "ipsec.secret")
	if err := os.WriteFile(file, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func idsOf(t testing.TB, file string) []string {
	t.Helper()
	s, err := ipsec.ReadSecrets(file)
	if err != nil {
		t.Fatal(err)
	}
	return s.IDs()
}

func TestF43SecretIsNewEachTimeAndLong(t *testing.T) {
	one, two := must(t, "ipsec", "secret"), must(t, "ipsec", "secret")
	raw, err := base64.StdEncoding.DecodeString(strings.TrimSpace(one))
	if err != nil || len(raw) != 32 || one == two || strings.Count(one, "\n") != 1 {
		t.Errorf("%v, %d octets", err, len(raw))
	}
	if _, err := ipsec.ParseSecrets([]byte(one)); err != nil {
		t.Error(err)
	}
}

// In a file a secret is its owner's alone, whatever the umask is, and no other file is touched.
func TestF43SecretOutIsPrivate(t *testing.T) {
	dir := t.TempDir()
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	file := filepath.Join(dir, "new.secret")
	if out := must(t, "ipsec", "secret", "--out", file); out != "" {
		t.Errorf("it prints %d bytes too", len(out))
	}
	if info, err := os.Lstat(file); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v: mode %v", err, info.Mode())
	}
	ids := idsOf(t, file)
	link := filepath.Join(dir, "link")
	if err := os.Symlink(filepath.Join(dir, "elsewhere"), link); err != nil {
		t.Fatal(err)
	}
	for _, taken := range []string{file, link} {
		if out, errs, status := lariat(t, "ipsec", "secret", "--out", taken); status != 1 || out != "" ||
			!strings.Contains(errs, "exists") {
			t.Errorf("%s: status %d: %s", taken, status, errs)
		}
	}
	if left, _ := os.ReadDir(dir); len(left) != 2 || !slices.Equal(idsOf(t, file), ids) {
		t.Errorf("%d files are there, or the secret is another one", len(left))
	}
	// What a shell opened for all to read gets nothing. A private file does.
	for _, tc := range []struct {
		mode   os.FileMode
		status int
	}{{0o666, 1}, {0o640, 1}, {0o600, 0}} {
		f, err := os.OpenFile(filepath.Join(dir, fmt.Sprintf("shell-%o", tc.mode)), os.O_CREATE|os.O_RDWR, tc.mode)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		var errs bytes.Buffer
		if status := run([]string{"ipsec", "secret"}, strings.NewReader(""), f, &errs); status != tc.status || status == 1 &&
			!strings.Contains(errs.String(), "--out FILE") {
			t.Errorf("mode %o: status %d: %s", tc.mode, status, &errs)
		}
		if info, err := f.Stat(); err != nil || info.Size() > 0 != (tc.status == 0) {
			t.Errorf("mode %o: %v: %d bytes are in the file", tc.mode, err, info.Size())
		}
	}
}

func TestF46IPsecStatusIsAsRecorded(t *testing.T) {
	m := newFakeManager(t, fixtureReport(t))
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	show := func(f format) string {
		var out bytes.Buffer
		a := &app{stdout: &out, managerSocket: m.socket, output: f, now: func() time.Time { return now }}
		r, err := a.tunnels(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := a.print(r, func(w *writer) { a.writeTunnels(w, r) }); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	golden(t, "ipsec.tunnels", show(text))
	golden(t, "ipsec.tunnels.table", show(table))
	var r ipsec.Report
	if err := json.Unmarshal([]byte(must(t, "ipsec", "status", "-o", "json", "--manager-socket", m.socket)),
		&r); err != nil || len(r.Tunnels) != 3 || r.Tunnels[0].Children[0].BytesIn == 0 {
		t.Errorf("%v %+v", err, r)
	}
	must(t, "ipsec", "status", "-o", "yaml", "--manager-socket", m.socket)
}

func TestF46IPsecStatusSaysWhatIsWrong(t *testing.T) {
	m := newFakeManager(t, ipsec.Report{Networks: []string{}})
	status := func() (string, int) {
		out, errs, status := lariat(t, "ipsec", "status", "--manager-socket", m.socket)
		return out + errs, status
	}
	if out, s := status(); s != 0 || !strings.Contains(out, "No network is encrypted") {
		t.Errorf("status %d: %s", s, out)
	}
	m.set(func(r *ipsec.Report) { r.Problem, r.Remedy = "it has not looked yet", "ask again" })
	if out, s := status(); s != 1 || out != "problem   it has not looked yet\n          remedy: ask again\n" {
		t.Errorf("status %d: %s", s, out)
	}
	m.set(func(r *ipsec.Report) { *r = ipsec.Report{Networks: []string{"secure"}} })
	if out, s := status(); s != 0 || !strings.Contains(out, "No other host takes part yet") {
		t.Errorf("status %d: %s", s, out)
	}
	m.set(func(r *ipsec.Report) { r.Missing, r.Remedy = "xfrmi: operation not supported", "load the module" })
	if out, s := status(); s != 1 || !strings.Contains(out,
		"missing   xfrmi: operation not supported\n          remedy: load the module") {
		t.Errorf("status %d: %s", s, out)
	}
	m.set(func(r *ipsec.Report) { r.Missing, r.Problem, r.Remedy = "", "charon does not\x1b[2J run", "install it" })
	if out, s := status(); s != 1 || !strings.Contains(out,
		"problem   charon does not\\x1b[2J run\n          remedy: install it") {
		t.Errorf("status %d: %s", s, out)
	}
	out, errs, s := lariat(t, "ipsec", "status", "--manager-socket", m.socket+".none")
	if s != 1 || out != "" || !strings.Contains(errs, "the network manager is not running: there is no socket") ||
		!strings.Contains(errs, "systemctl start lariat-network-manager") {
		t.Errorf("status %d: %s", s, errs)
	}
}

const (
	oldSecret = "the-old-secret-of-the-hosts-0123456789abcdef"
	newSecret = "the-new-secret-of-the-hosts-fedcba9876543210"
)

// rotate runs the command, which must never tell a secret.
func (s *service) rotate(t testing.TB, m *fakeManager, stdin string, args ...string) (string, int) {
	t.Helper()
	out, errs, status := lariatWith(t, strings.NewReader(stdin), append([]string{"--socket", s.socket, "--manager-socket",
		m.socket, "ipsec", "rotate"}, args...)...)
	for _, secret := range []string{oldSecret, newSecret} {
		if strings.Contains(out+errs, secret[:20]) {
			t.Errorf("rotate %v tells the secret: %s%s", args, out, errs)
		}
	}
	return out + errs, status
}

func TestF43RotationWithRealService(t *testing.T) {
	ns, binary := netnstest.New(t), metadataBinary(t)
	netnstest.Veth(t, ns, "192.0.2.1/24", ns, "192.0.2.2/24")
	const store = "http://127.0.0.1:2379"
	h1 := serve(t, ns, binary, "h1", "192.0.2.1/24", "--listen-client", store)
	h2 := serve(t, ns, binary, "h2", "192.0.2.2/24", "--etcd-endpoints", store)
	file1, file2 := secretFile(t, "# of our hosts", oldSecret), secretFile(t, oldSecret)
	m1, m2 := newFakeManager(t, ipsec.Report{}), newFakeManager(t, ipsec.Report{})
	// What the network manager does with it.
	for _, x := range []struct {
		s          *service
		m          *fakeManager
		host, file string
	}{{h1, m1, "h1", file1}, {h2, m2, "h2", file2}} {
		x.m.reload = func() error {
			s, err := ipsec.ReadSecrets(x.file)
			if err != nil {
				return err
			}
			c := metadata.Client{Socket: x.s.socket}
			var h metadata.Host
			if err := c.Get(t.Context(), metadata.KindHost, x.host, &h); err != nil {
				return err
			}
			h.IKEKeys, h.Live = s.IDs(), false
			return c.Put(t.Context(), metadata.KindHost, x.host, h)
		}
	}
	if out, status := h1.rotate(t, m1, "", "--secret-file", file1); status != 0 || !strings.Contains(out,
		"no network is encrypted") {
		t.Fatalf("status %d: %s", status, out)
	}
	h1.must(t, "network", "create", "secure", "--subnet", "10.44.0.0/16", "--encapsulation", "ipsec")
	h2.await(t, has("secure"))
	if out, status := h2.rotate(t, m2, "", "--secret-file", file2); status != 0 {
		t.Fatalf("status %d: %s", status, out)
	}
	old := idsOf(t, file1)[0]
	announced := func(host, key string) func(*metadata.Snapshot) bool {
		return func(v *metadata.Snapshot) bool {
			h, _ := v.Host(host)
			return slices.Contains(h.IKEKeys, key)
		}
	}
	h1.await(t, announced("h2", old))
	h1.await(t, announced("h1", old))

	// The first host: from a file.
	fresh := secretFile(t, newSecret)
	out, status := h1.rotate(t, m1, "", fresh, "--secret-file", file1)
	id := idsOf(t, fresh)[0]
	if status != 0 || !strings.Contains(out, "secret "+id+" stands first in "+file1+" now, before "+old) {
		t.Errorf("status %d: %s", status, out)
	}
	if text, err := os.ReadFile(file1); err != nil || string(text) != "# of our hosts\n"+newSecret+"\n"+oldSecret+"\n" {
		t.Errorf("%v: the file is not as it should be", err)
	}
	h1.await(t, announced("h1", id))
	if out, status := h1.rotate(t, m1, "", "--secret-file", file1); status != 0 || !strings.Contains(out,
		"have it:   h1\nlack it:   h2\n") {
		t.Errorf("status %d: %s", status, out)
	}

	// Nobody drops what another one needs.
	out, status = h1.rotate(t, m1, "", "--finish", "--secret-file", file1)
	if status != 1 || !strings.Contains(out, "secret "+id+" is not on every live host: h2") || len(idsOf(t, file1)) != 2 {
		t.Errorf("status %d: %s", status, out)
	}
	if out, status := h1.rotate(t, m1, "", "--wait", "50ms", "--secret-file", file1); status != 1 || !strings.Contains(out,
		"lack it:   h2\n") {
		t.Errorf("status %d: %s", status, out)
	}

	// The second host gets it over standard input while the first one waits.
	waited := make(chan error, 1)
	go func() {
		var r rotation
		var out, errs bytes.Buffer
		status := run([]string{"--socket", h1.socket, "--manager-socket", m1.socket, "ipsec", "rotate", "--wait", "1m",
			"--secret-file", file1, "-o", "json"}, strings.NewReader(""), &out, &errs)
		if err := json.Unmarshal(out.Bytes(), &r); err != nil || status != 0 || !slices.Equal(r.Have, []string{"h1", "h2"}) ||
			len(r.Lack) != 0 {
			waited <- fmt.Errorf("status %d, %w: %s%s", status, err, out.String(), errs.String())
			return
		}
		waited <- nil
	}()
	if out, status := h2.rotate(t, m2, newSecret+"\n", "-", "--secret-file", file2); status != 0 || !strings.Contains(out,
		"secret "+id+" stands first") {
		t.Errorf("status %d: %s", status, out)
	}
	if err := <-waited; err != nil {
		t.Error(err)
	}

	// Done, and once more.
	for range 2 {
		if out, status := h1.rotate(t, m1, "", "--finish", "--secret-file", file1); status != 0 || !strings.Contains(out,
			"secret "+id+" is the only one in "+file1) {
			t.Errorf("status %d: %s", status, out)
		}
		if text, err := os.ReadFile(file1); err != nil || string(text) != "# of our hosts\n"+newSecret+"\n" {
			t.Errorf("%v: the file is not as it should be", err)
		}
	}
	h2.await(t, func(v *metadata.Snapshot) bool { h, _ := v.Host("h1"); return slices.Equal(h.IKEKeys, []string{id}) })

	// A manager that cannot load it says why, and the file is what it became.
	m2.reload = func() error { return errors.New("vici: no such socket") }
	if out, status := h2.rotate(t, m2, "", "--finish", "--force", "--secret-file", file2); status != 1 ||
		!strings.Contains(out, "dropped: "+old) || !strings.Contains(out, "has not loaded it: vici: no such socket") {
		t.Errorf("status %d: %s", status, out)
	}
	if !slices.Equal(idsOf(t, file2), []string{id}) {
		t.Error("it did not finish")
	}
}

// The real network manager gives the same answers as the fake one. Tunnels of its own need a kernel with
// IPsec and strongSwan: those are tested in guests.
func TestF46IPsecWithRealManager(t *testing.T) {
	ns := netnstest.New(t)
	netnstest.Veth(t, ns, "192.0.2.1/24", ns, "")
	s := serve(t, ns, metadataBinary(t), "h1", "192.0.2.1/24")
	s.must(t, "network", "create", "payroll", "--subnet", "10.44.0.0/16", "--encapsulation", "ipsec")
	s.await(t, has("payroll"))
	dir := filepath.Dir(s.socket)
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer notify.Close()
	file, socket := secretFile(t, oldSecret), filepath.Join(dir, "nm.sock")
	cmd := exec.Command(helper(t, "network-manager"), "--metadata-socket", s.socket, "--socket", socket, "--state-dir",
		filepath.Join(dir, "state"),
		"--metadata-address", "", "--ipsec-secret", file, "--ike-dir", filepath.Join(dir, "ike"))
	var log bytes.Buffer
	cmd.Stderr = &log
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+filepath.Join(dir, "notify"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	ns.Do(t, func() { err = cmd.Start() })
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
		for _, secret := range []string{oldSecret, newSecret} {
			if strings.Contains(log.String(), secret[:20]) {
				t.Error("the log tells a secret")
			}
		}
	}()
	if err := notify.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	for b := make([]byte, 4096); ; {
		n, err := notify.Read(b)
		if err != nil {
			t.Fatalf("the network manager does not come up: %v\n%s", err, log.String())
		}
		if strings.Contains(string(b[:n]), "READY=1") {
			break
		}
	}
	m := &fakeManager{socket: socket} // which it is not
	out, status := s.rotate(t, m, newSecret, "-", "--secret-file", file)
	if !strings.Contains(out, "stands first in "+file+" now") || status != 0 && !strings.Contains(out,
		"this host's network manager has not loaded it: ") {
		t.Errorf("status %d: %s", status, out)
	}
	var r ipsec.Report
	var errs string
	for deadline := time.Now().Add(time.Minute); ; {
		r = ipsec.Report{}
		out, errs, status = lariat(t, "--socket", s.socket, "--manager-socket", socket, "ipsec", "status", "-o", "json")
		err = json.Unmarshal([]byte(out), &r)
		if err != nil || len(r.Networks) > 0 || r.Problem == "" || time.Now().After(deadline) {
			break // only "I have not looked yet" is worth asking again
		}
	}
	if err != nil || !slices.Equal(r.Networks, []string{"payroll"}) || r.Auth != ipsec.AuthPSK ||
		status != map[bool]int{true: 1}[r.Missing != "" || r.Problem != ""] {
		t.Errorf("status %d, %v: %s%s", status, err, out, errs)
	}
	if r.Missing == "" && !slices.Equal(r.Keys, idsOf(t, file)) {
		t.Errorf("it has the secrets %v", r.Keys)
	}
	t.Logf("missing %q, problem %q", r.Missing, r.Problem)
}

func TestF43RotationLeavesTheFileAloneWhenSomethingIsWrong(t *testing.T) {
	m := newFakeManager(t, ipsec.Report{})
	s := &service{socket: m.socket + ".none"}
	file, fresh := secretFile(t, oldSecret), secretFile(t, newSecret)
	open := secretFile(t, newSecret)
	if err := os.Chmod(open, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		stdin, want string
		args        []string
	}{
		{"", "no such file", []string{"/nonexistent/new"}},
		{"", "can be read or written by others", []string{open}},
		{newSecret[:20], "a secret of 20 characters", []string{"-"}},
		{"", "no secret in it", []string{"-"}},
		{oldSecret + "\n" + newSecret, "has 2 secrets in it; want one", []string{"-"}},
		{"", "takes no new secret", []string{fresh, "--finish"}},
		{"", "accepts at most 1 arg", []string{fresh, fresh}},
	} {
		if out, status := s.rotate(t, m, tc.stdin, append(tc.args, "--secret-file", file)...); status != 1 ||
			!strings.Contains(out, tc.want) {
			t.Errorf("rotate %v: status %d: %s, want %s", tc.args, status, out, tc.want)
		}
	}
	if out, status := s.rotate(t, m, "", fresh, "--secret-file", file+".none"); status != 1 || !strings.Contains(out,
		"lariat ipsec secret --out") {
		t.Errorf("status %d: %s", status, out)
	}
	if text, err := os.ReadFile(file); err != nil || string(text) != oldSecret+"\n" || m.loaded != 0 {
		t.Errorf("%v: the file changed, or %d reloads", err, m.loaded)
	}

	// Without metadata nobody knows who has the new one: nothing is dropped.
	both := secretFile(t, newSecret, oldSecret)
	if out, status := s.rotate(t, m, "", "--finish", "--secret-file", both); status != 1 || !strings.Contains(out,
		"systemctl start lariat-metadata") || len(idsOf(t, both)) != 2 {
		t.Errorf("status %d: %s", status, out)
	}
	// The change is told although what follows fails.
	if out, status := s.rotate(t, m, "", fresh, "--secret-file", file); status != 1 || !strings.Contains(out,
		"stands first in "+file+" now") || !strings.Contains(out, "systemctl start lariat-metadata") {
		t.Errorf("status %d: %s", status, out)
	}
}

func TestF43SecretFileIsRewrittenWhole(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "real.secret")
	if err := os.WriteFile(file, []byte("# old one\n"+oldSecret+"\n\n# kept\n  "+newSecret+" \n"), 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link.secret")
	if err := os.Symlink("real.secret", link); err != nil {
		t.Fatal(err)
	}
	a := &app{stdin: strings.NewReader(newSecret)}
	var r rotation
	if err := a.beginRotation("-", link, &r); err != nil || r.Change != "moved" || len(r.Keys) != 2 {
		t.Fatalf("%v %+v", err, r)
	}
	text, err := os.ReadFile(file)
	if err != nil || string(text) != "# old one\n"+newSecret+"\n"+oldSecret+"\n\n# kept\n" {
		t.Errorf("%v: the file is not as it should be", err)
	}
	if info, err := os.Lstat(link); err != nil || info.Mode()&fs.ModeSymlink == 0 {
		t.Errorf("%v: the link was replaced", err)
	}
	info, err := os.Stat(file)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v: mode %v", err, info.Mode())
	}
	// Once more: nothing is written.
	a.stdin = strings.NewReader(newSecret)
	if err := a.beginRotation("-", link, &r); err != nil {
		t.Fatal(err)
	}
	if again, err := os.Stat(file); err != nil || !os.SameFile(info, again) {
		t.Errorf("%v: the same file was written again", err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
	// Many at once: each change is there in the end.
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			var r rotation
			a := &app{stdin: strings.NewReader(fmt.Sprintf("%s-%d", newSecret, i))}
			if err := a.beginRotation("-", link, &r); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := len(idsOf(t, file)); n != 10 {
		t.Errorf("%d secrets, want 10", n)
	}
}

func TestF46StatusCountsTunnels(t *testing.T) {
	var s metadata.Snapshot
	b, err := os.ReadFile("testdata/ipsec.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &s); err != nil {
		t.Fatal(err)
	}
	report := fixtureReport(t)
	facts := func() *doctor.Facts {
		return &doctor.Facts{Self: "h1", Metadata: &doctor.Metadata{Snapshot: &s}, Manager: &doctor.Manager{Tunnels: &report},
			Unavailable: map[string]string{}}
	}
	show := func() string {
		w := &writer{}
		newStatus(facts(), nil).write(w)
		return w.String()
	}
	golden(t, "ipsec.status", show())
	if out, err := json.Marshal(newStatus(facts(), nil)); err != nil || !strings.Contains(string(out),
		`"tunnels":{"networks":["payroll","vault"]`) {
		t.Errorf("%v: %s", err, out)
	}
	report.Problem, report.Remedy = "charon does not run", "install it"
	if out := show(); !strings.Contains(out, "TUNNELS  not kept on this host") || !strings.Contains(out,
		"error    this host's tunnels are not kept: charon does not run\n         remedy: install it") {
		t.Error(out)
	}
	// Without an encrypted network there is nothing to tell.
	report = ipsec.Report{}
	s.Networks = s.Networks[:1]
	if out := show(); strings.Contains(out, "TUNNELS") {
		t.Error(out)
	}
}

func TestF135PlanHasTheTunnelsOfThisHost(t *testing.T) {
	var s metadata.Snapshot
	b, err := os.ReadFile("testdata/ipsec.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &s); err != nil {
		t.Fatal(err)
	}
	m := newFakeManager(t, fixtureReport(t))
	a := &app{managerSocket: m.socket}
	show := func() string { return a.tunnelPlan(t.Context(), &s, "h1") }
	if out := show(); strings.Contains(out, "#") || strings.Count(out, "conn  ") != 3 ||
		strings.Count(out, "child ") != 6 || !strings.Contains(out, "auth psk keys 5f0c1d2e,a1b2c3d4 ") ||
		!strings.Contains(out, "esp aes256gcm16") {
		t.Error(out)
	}
	m.set(func(r *ipsec.Report) {
		r.Auth, r.Keys, r.Suites = ipsec.AuthPubkey, nil, []string{"aes256-sha256-x25519-esn"}
	})
	if out := show(); !strings.Contains(out, "auth pubkey rekey") || strings.Contains(out, "esp aes256gcm16") {
		t.Error(out)
	}
	a.managerSocket += ".none"
	if out := show(); !strings.HasPrefix(out, "# tunnels, with the defaults of lariat-network-manager") ||
		!strings.Contains(out, "keys 5f0c1d2e,a1b2c3d4 ") {
		t.Error(out)
	}
	s.Networks = s.Networks[:1]
	if out := show(); out != "" {
		t.Error(out)
	}
}
