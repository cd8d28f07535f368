// Package unixhttp asks the helpers of this host over their unix sockets.
//
// It writes HTTP/1.0 by hand: one request per connection, the body ends with the connection. That is the least
// that does the job; net/http would add half a millisecond and four megabytes to the start of every container.
package unixhttp

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// Response is an answer. Its body is read from the Reader; it ends with the connection.
type Response struct {
	Status int
	*bufio.Reader
	conn *conn
}

// Close implements io.Closer.
func (r *Response) Close() error { return r.conn.Close() }

// Do sends one request and reads the head of the answer. A payload is JSON; nil means none. The request ends with the
// context. When nobody answers at the socket the error is an *os.PathError.
func Do(ctx context.Context, socket, method, path string, payload []byte) (*Response, error) {
	conn, err := dial(ctx, socket)
	if err != nil {
		return nil, err
	}
	req := make([]byte, 0, 256+len(payload))
	req = fmt.Appendf(req, "%s %s HTTP/1.0\r\nHost: lariat\r\nAccept: application/json\r\n", method, path)
	if payload != nil {
		req = fmt.Appendf(req, "Content-Type: application/json\r\nContent-Length: %d\r\n", len(payload))
	}
	req = append(append(req, "\r\n"...), payload...)
	r := &Response{Reader: bufio.NewReaderSize(conn, 16<<10), conn: conn}
	if _, err = conn.Write(req); err == nil {
		r.Status, err = readHead(r.Reader)
	}
	if err != nil {
		_ = conn.Close()
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, fmt.Errorf("%s %s on %s: %w", method, path, socket, err)
	}
	return r, nil
}

// maxPage bounds a page, so that a confused peer cannot fill memory.
const maxPage = 64 << 20

// Page sends one request and returns the status and the whole body of the answer. See Do.
func Page(ctx context.Context, socket, method, path string, payload []byte) (status int, body []byte, err error) {
	r, err := Do(ctx, socket, method, path, payload)
	if err != nil {
		return 0, nil, err
	}
	defer r.Close()
	if body, err = io.ReadAll(io.LimitReader(r, maxPage)); err != nil {
		err = fmt.Errorf("%s %s on %s: reading the answer: %w", method, path, socket, err)
	}
	return r.Status, body, err
}

// maxHead bounds the lines of an answer's head.
const maxHead = 100

// readHead reads the head of an answer and returns its status, of three digits. A line of it fits the reader's buffer.
func readHead(r *bufio.Reader) (status int, err error) {
	line, err := r.ReadSlice('\n')
	if err != nil {
		return 0, err
	}
	if f := strings.Fields(string(line)); len(f) < 2 || !strings.HasPrefix(f[0], "HTTP/1.") {
		return 0, fmt.Errorf("answer %.200q is not HTTP", line)
	} else if status, err = strconv.Atoi(f[1]); err != nil || status < 100 || status > 999 {
		return 0, fmt.Errorf("answer %.200q has no status", line)
	}
	for range maxHead {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return 0, err
		}
		if len(bytes.TrimSpace(line)) == 0 {
			return status, nil
		}
	}
	return 0, fmt.Errorf("the answer's head has more than %d lines", maxHead)
}
