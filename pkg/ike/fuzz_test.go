package ike

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/strongswan/govici/vici"

	"github.com/lariat-net/lariat/pkg/certs"
)

// Types of vici's packets, and of the elements of a message.
const (
	cmdRequest, cmdResponse, eventRegister, eventConfirm, event      = 0, 1, 3, 5, 7
	sectionStart, sectionEnd, keyValue, listStart, listItem, listEnd = 1, 2, 3, 4, 5, 6
)

func element(typ byte, name string) []byte { return append([]byte{typ, byte(len(name))}, name...) }

func value(name, v string) []byte {
	return append(binary.BigEndian.AppendUint16(element(keyValue, name), uint16(len(v))), v...)
}

func join(parts ...[]byte) (out []byte) {
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}

// anSA is a short answer of charon to list-sas.
var anSA = join(element(sectionStart, "lariat-b"), value("uniqueid", "7"), value("state", "ESTABLISHED"),
	value("local-host", "192.0.2.1"), value("local-port", "500"),
	value("remote-host", "192.0.2.2"), value("encr-alg", "AES_GCM_16"), value("encr-keysize", "256"),
	value("established", "12"),
	element(listStart, "tasks-active"), []byte{listItem, 0, 3}, []byte("FOO"), []byte{listEnd},
	element(sectionStart, "child-sas"), element(sectionStart, "red-1"), value("name", "red"),
	value("if-id-in", "4c000001"), value("spi-in", "c0ffee"), value("bytes-in", "99"), []byte{sectionEnd},
	[]byte{sectionEnd},
	[]byte{sectionEnd})

func packet(typ byte, name string, body []byte) []byte {
	b := []byte{typ}
	if typ == event {
		b = element(typ, name)
	}
	b = append(b, body...)
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)
}

// fakeCharon answers every command on a socket with an event of list-sa and with a response.
// The bodies hold the event and the response.
func fakeCharon(f *testing.F, bodies <-chan [2][]byte) (socket string) {
	dir, err := os.MkdirTemp("", "vici")
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { os.RemoveAll(dir) })
	socket = filepath.Join(dir, "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { l.Close() })
	serve := func(c net.Conn) {
		defer c.Close()
		for {
			var head [5]byte
			if _, err := io.ReadFull(c, head[:]); err != nil {
				return
			}
			if _, err := io.CopyN(io.Discard, c, int64(binary.BigEndian.Uint32(head[:]))-1); err != nil {
				return
			}
			if head[4] == eventRegister {
				c.Write(packet(eventConfirm, "", nil)) //nolint:errcheck // the other end has closed
				continue
			}
			said := <-bodies
			c.Write(packet(event, eventSA, said[0]))  //nolint:errcheck // the other end has closed
			c.Write(packet(cmdResponse, "", said[1])) //nolint:errcheck // the other end has closed
		}
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go serve(c)
		}
	}()
	return socket
}

// FuzzReply checks that any output of charon yields SAs of Lariat's connections, or an error.
func FuzzReply(f *testing.F) {
	f.Add(anSA, value("success", "yes"), "received AUTHENTICATION_FAILED notify error")
	f.Add(join(anSA, anSA[:20]), []byte{}, "giving up after 5 retransmits")
	f.Add(join(element(sectionStart, "lariat-b"), element(listStart, "state"), []byte{listEnd}, value("child-sas", "none"),
		[]byte{sectionEnd}), value("errmsg", "no"), "IKE_SA x established")
	f.Add([]byte{sectionStart, 255}, join(value("success", "no"), value("errmsg", "not found")), "no trusted \x1b[31m")
	bodies := make(chan [2][]byte, 1)
	socket := fakeCharon(f, bodies)
	f.Fuzz(func(t *testing.T, told, answer []byte, line string) {
		if len(told) > 1<<16 || len(answer) > 1<<16 {
			return
		}
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		s, err := dial(socket)
		if err != nil {
			t.Fatal(err)
		}
		d := &Daemon{session: s}
		bodies <- [2][]byte{told, answer}
		sas, err := d.sas(ctx)
		s.close()
		if err != nil && errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		for _, sa := range sas {
			if !strings.HasPrefix(sa.Name, "lariat-") || "lariat-"+sa.Peer != sa.Name {
				t.Errorf("%+v", sa)
			}
			_ = sa.String()
			sa.settled()
			sa.idle()
		}
		judge(line)
	})
}

// TestFakeCharonIsUnderstood checks that the seed of FuzzReply yields an SA.
// Therefore the fuzzer starts after the first checks.
func TestFakeCharonIsUnderstood(t *testing.T) {
	m := vici.NewMessage()
	if err := m.Set("uniqueid", "7"); err != nil {
		t.Fatal(err)
	}
	if sa := parseSA("lariat-b", m); sa.Peer != "b" || sa.ID != 7 {
		t.Errorf("%+v", sa)
	}
}

// FuzzCertificates checks that LoadCertificates accepts a host's files completely or refuses them.
// Errors hold nothing of the key.
func FuzzCertificates(f *testing.F) {
	pki := f.TempDir()
	at := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	if _, err := certs.Init(pki, "lariat", at); err != nil {
		f.Fatal(err)
	}
	if _, err := certs.Host(pki, certs.Request{Name: "h1"}, at); err != nil {
		f.Fatal(err)
	}
	file := func(name string) []byte {
		b, err := os.ReadFile(filepath.Join(pki, name))
		if err != nil {
			f.Fatal(err)
		}
		return b
	}
	f.Add(file(certs.CACert), file("h1.crt"), file("h1.key"))
	f.Add(join(file(certs.CACert), file(certs.CACert)), join(file("h1.crt"), []byte("x"), file(certs.CACert)),
		file(certs.CAKey))
	f.Add(file("h1.key"), file("h1.crt"), []byte("-----BEGIN EC PRIVATE KEY-----\nMAA=\n-----END EC PRIVATE KEY-----\n"))
	f.Add([]byte{}, []byte{}, []byte("-----BEGIN RSA PRIVATE KEY-----\nMAA=\n-----END RSA PRIVATE KEY-----\n"))
	f.Fuzz(func(t *testing.T, ca, cert, key []byte) {
		dir := t.TempDir()
		for name, b := range map[string][]byte{certs.CACert: ca, "h1.crt": cert, "h1.key": key} {
			if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		c, err := LoadCertificates(dir)
		if err != nil {
			if len(key) > 60 && strings.Contains(err.Error(), string(key[30:60])) || len(c.CAs)+len(c.Certificate)+
				len(c.Key) > 0 {
				t.Errorf("%v", err)
			}
			return
		}
		if len(c.CAs) == 0 || len(c.Certificate) == 0 || len(c.Key) == 0 {
			t.Errorf("%v", c)
		}
	})
}
