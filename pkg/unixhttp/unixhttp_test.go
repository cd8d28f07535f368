package unixhttp

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// FuzzHead: whatever a socket says, there is a status of three digits or an error.
func FuzzHead(f *testing.F) {
	f.Add([]byte("HTTP/1.0 200 OK\r\nContent-Type: application/x-ndjson\r\n\r\nbody"))
	f.Add([]byte("HTTP/1.1 404 Not Found\r\n\r\n"))
	f.Add([]byte("HTTP/1.0\r\n"))
	f.Add([]byte("HTTP/1.0 99999 x\r\n\r\n"))
	f.Add([]byte("SSH-2.0-OpenSSH\r\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		status, err := readHead(bufio.NewReaderSize(bytes.NewReader(data), 4096))
		if err == nil && (status < 100 || status > 999) {
			t.Errorf("status %d", status)
		}
	})
}

// TestEndlessHead: a head that has no end is given up.
func TestEndlessHead(t *testing.T) {
	for name, text := range map[string]string{"status": strings.Repeat("x", 1<<20), "line": "HTTP/1.0 200 OK\r\n" +
		strings.Repeat("x", 1<<20), "head": "HTTP/1.0 200 OK\r\n" + strings.Repeat("a: b\r\n", 1000)} {
		r := strings.NewReader(text)
		if _, err := readHead(bufio.NewReader(r)); err == nil || r.Len() == 0 || len(err.Error()) > 1000 {
			t.Errorf("%s: %v, %d bytes left", name, err, r.Len())
		}
	}
}

// TestErrors: of a socket where nobody listens, and of one where somebody listens and says nothing.
func TestErrors(t *testing.T) {
	dir, err := os.MkdirTemp("", "u")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "s")
	ask := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		_, _, err := Page(ctx, socket, "GET", "/x", nil)
		return err
	}
	if err := ask(); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), socket) {
		t.Error(err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := ask(); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "GET /x on "+socket) {
		t.Error(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			r := bufio.NewReader(c)
			for line := ""; line != "\r\n"; {
				if line, err = r.ReadString('\n'); err != nil {
					break
				}
			}
			io.WriteString(c, "HTTP/1.0 503 No\r\nA: b\r\n\r\nwhy")
			c.Close()
		}
	}()
	status, body, err := Page(t.Context(), socket, "GET", "/x", nil)
	if status != 503 || string(body) != "why" || err != nil {
		t.Errorf("%d %q %v", status, body, err)
	}
}
