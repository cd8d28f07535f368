package certs

import (
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

var now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func TestAuthorityAndHostCertificates(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pki")
	ca, err := Init(dir, "lariat", now)
	if err != nil {
		t.Fatal(err)
	}
	if !ca.CA || !ca.HasKey || ca.Problem != "" || ca.NotAfter != now.Add(CALifetime) {
		t.Errorf("authority: %+v", ca)
	}
	h, err := Host(dir, Request{Name: "h1", IPs: []netip.Addr{netip.MustParseAddr("192.0.2.1")},
		DNS: []string{"h1.example.org"}}, now)
	if err != nil {
		t.Fatal(err)
	}
	if h.CA || h.Problem != "" || h.Issuer != "lariat" || h.NotAfter != now.Add(HostLifetime) {
		t.Errorf("host: %+v", h)
	}
	if got := strings.Join(append(h.DNS, h.IPs...), " "); got != "h1 localhost h1.example.org 127.0.0.1 ::1 192.0.2.1" {
		t.Errorf("names: %s", got)
	}
	for _, f := range []string{CACert, CAKey, "h1.crt", "h1.key"} {
		st, err := os.Stat(filepath.Join(dir, f))
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %o", f, st.Mode().Perm())
		}
	}
	cert, err := readCert(filepath.Join(dir, CACert))
	if err != nil {
		t.Fatal(err)
	}
	if k, ok := cert.PublicKey.(*ecdsa.PublicKey); !ok || k.Curve.Params().Name != "P-256" {
		t.Error("the authority's key is not P-256")
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) != 0 {
		t.Errorf("left over: %v", left)
	}
}

// Whatever the umask is, every file is its owner's alone, and a key that others can read is not used.
func TestKeysArePrivate(t *testing.T) {
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	dir := filepath.Join(t.TempDir(), "pki")
	if _, err := Init(dir, "lariat", now); err != nil {
		t.Fatal(err)
	}
	if _, err := Host(dir, Request{Name: "h1"}, now); err != nil {
		t.Fatal(err)
	}
	files := []string{CACert, CAKey, "h1.crt", "h1.key"}
	for _, f := range append(files, ".") {
		if st, err := os.Stat(filepath.Join(dir, f)); err != nil || st.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: %v: mode %o", f, err, st.Mode().Perm())
		}
	}
	for _, f := range []string{CAKey, "h1.key"} {
		if err := os.Chmod(filepath.Join(dir, f), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	remedy := "can be read or written by others (mode 0644); chmod 600 " + filepath.Join(dir, CAKey)
	if _, err := Host(dir, Request{Name: "h2"}, now); err == nil || !strings.Contains(err.Error(), remedy) {
		t.Errorf("an authority whose key others can read signs: %v", err)
	}
	list, err := ReadDir(dir, now)
	if err != nil || len(list) != 2 {
		t.Fatalf("%v %+v", err, list)
	}
	for _, i := range list {
		if i.HasKey || !strings.Contains(i.Problem, "can be read or written by others") {
			t.Errorf("%s: problem %q", i.File, i.Problem)
		}
	}
}

// A handshake with both ends checked, as between etcd's members and from client to member.
func TestMutualTLS(t *testing.T) {
	dir := t.TempDir()
	clock := time.Now()
	if _, err := Init(dir, "lariat", clock); err != nil {
		t.Fatal(err)
	}
	for _, h := range []string{"h1", "h2"} {
		if _, err := Host(dir, Request{Name: h}, clock); err != nil {
			t.Fatal(err)
		}
	}
	pem, err := os.ReadFile(filepath.Join(dir, CACert))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	pair := func(name string) []tls.Certificate {
		c, err := tls.LoadX509KeyPair(filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key"))
		if err != nil {
			t.Fatal(err)
		}
		return []tls.Certificate{c}
	}
	try := func(client *tls.Config) error {
		a, b := net.Pipe()
		srv := tls.Server(a, &tls.Config{Certificates: pair("h1"), ClientCAs: pool,
			ClientAuth: tls.RequireAndVerifyClientCert})
		done := make(chan error, 1)
		go func() { err := srv.Handshake(); a.Close(); done <- err }()
		cli := tls.Client(b, client)
		err := cli.Handshake()
		b.Close()
		if serr := <-done; err == nil {
			err = serr
		}
		return err
	}
	if err := try(&tls.Config{Certificates: pair("h2"), RootCAs: pool, ServerName: "h1"}); err != nil {
		t.Errorf("h2 to h1: %v", err)
	}
	if err := try(&tls.Config{Certificates: pair("h2"), RootCAs: pool, ServerName: "h3"}); err == nil {
		t.Error("h1 passed for h3")
	}
	if err := try(&tls.Config{RootCAs: pool, ServerName: "h1"}); err == nil {
		t.Error("a client without certificate was let in")
	}
}

func TestRefusals(t *testing.T) {
	dir := t.TempDir()
	if _, err := Host(dir, Request{Name: "h1"}, now); err == nil || !strings.Contains(err.Error(), "lariat certs init") {
		t.Errorf("no authority: %v", err)
	}
	if _, err := Init(dir, "lariat", now); err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(filepath.Join(dir, CAKey))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Init(dir, "lariat", now); err == nil || !strings.Contains(err.Error(), "there already") {
		t.Errorf("second authority: %v", err)
	}
	if again, _ := os.ReadFile(filepath.Join(dir, CAKey)); string(again) != string(key) {
		t.Error("the authority's key was replaced")
	}
	for name, want := range map[string]string{
		"ca": "authority's own", "CA": "authority's own", "../h1": "not a DNS name", "": "1 to 253", "a..b": "not a DNS name",
		".": "not a DNS name",
	} {
		if _, err := Host(dir, Request{Name: name}, now); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("name %q: %v", name, err)
		}
	}
	if _, err := Host(dir, Request{Name: "h1", IPs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}}, now); err != nil {
		t.Fatal(err)
	}
	if _, err := Host(dir, Request{Name: "h1"}, now); err == nil || !strings.Contains(err.Error(), "--renew") {
		t.Errorf("second certificate: %v", err)
	}
	h, err := Host(dir, Request{Name: "h1", Renew: true}, now.Add(time.Hour))
	if err != nil || strings.Join(h.IPs, " ") != "127.0.0.1 ::1 192.0.2.1" {
		t.Errorf("renewal keeps the addresses: %+v, %v", h, err)
	}
	if _, err := Host(dir, Request{Name: "h2"}, now.Add(CALifetime+time.Hour)); err == nil ||
		!strings.Contains(err.Error(), "expired") {
		t.Errorf("expired authority: %v", err)
	}
	h, err = Host(dir, Request{Name: "h3"}, now.Add(CALifetime-time.Hour))
	if err != nil || h.NotAfter != now.Add(CALifetime) {
		t.Errorf("a host's certificate outlives its authority: %+v, %v", h, err)
	}
}

func TestShowNamesWhatIsWrong(t *testing.T) {
	dir := t.TempDir()
	if _, err := Init(dir, "lariat", now); err != nil {
		t.Fatal(err)
	}
	for _, h := range []string{"a", "b"} {
		if _, err := Host(dir, Request{Name: h}, now); err != nil {
			t.Fatal(err)
		}
	}
	// b gets a's key, c is rubbish.
	key, _ := os.ReadFile(filepath.Join(dir, "a.key"))
	os.WriteFile(filepath.Join(dir, "b.key"), key, 0o600)
	os.WriteFile(filepath.Join(dir, "c.crt"), []byte("rubbish"), 0o600)
	for _, tc := range []struct {
		at   time.Time
		want []string
	}{
		{now, []string{"", "", "another certificate", "no PEM block"}},
		{now.Add(HostLifetime - 24*time.Hour), []string{"", "expires on 2028-02-29", "another certificate", "no PEM"}},
		{now.Add(HostLifetime + 24*time.Hour), []string{"", "expired on 2028", "expired on 2028", "no PEM"}},
		{now.Add(-24 * time.Hour), []string{"not valid before", "not valid before", "not valid before", "no PEM"}},
	} {
		list, err := ReadDir(dir, tc.at)
		if err != nil || len(list) != 4 || !list[0].CA {
			t.Fatalf("%+v, %v", list, err)
		}
		for i, want := range tc.want {
			if got := list[i].Problem; (want == "") != (got == "") || !strings.Contains(got, want) {
				t.Errorf("at %s, %s: %q, want %q", tc.at, list[i].File, got, want)
			}
		}
	}
	if _, err := ReadDir(filepath.Join(dir, "nowhere"), now); err == nil {
		t.Error("a folder that is not there was shown")
	}
}

// FuzzRead: whatever stands in a certificate's, a key's and the authority's file, reading them ends with an
// answer or an error that says nothing of the key.
func FuzzRead(f *testing.F) {
	pki := f.TempDir()
	if _, err := Init(pki, "lariat", now); err != nil {
		f.Fatal(err)
	}
	if _, err := Host(pki, Request{Name: "h1"}, now); err != nil {
		f.Fatal(err)
	}
	file := func(name string) []byte {
		b, err := os.ReadFile(filepath.Join(pki, name))
		if err != nil {
			f.Fatal(err)
		}
		return b
	}
	f.Add(file("h1.crt"), file("h1.key"), file(CACert))
	f.Add(file("h1.crt"), file(CAKey), file("h1.crt"))
	f.Add(file("h1.key"), file("h1.crt"), []byte{})
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n"),
		[]byte("-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----\n"), []byte("x"))
	f.Fuzz(func(t *testing.T, cert, key, ca []byte) {
		dir := t.TempDir()
		for name, b := range map[string][]byte{"h1.crt": cert, "h1.key": key, CACert: ca} {
			if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		info, err := Read(filepath.Join(dir, "h1.crt"), now)
		if (info == nil) == (err == nil) {
			t.Errorf("%+v %v", info, err)
		}
		said := ""
		if err != nil {
			said = err.Error()
		} else {
			said = info.Problem
		}
		if len(key) > 40 && strings.Contains(said, string(key[20:40])) {
			t.Errorf("%q", said)
		}
		if all, err := ReadDir(dir, now); err != nil || len(all) != 2 {
			t.Errorf("%v %v", all, err)
		}
		authority(dir, now) //nolint:errcheck // must not panic
	})
}
