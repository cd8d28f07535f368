package metadata

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/lariat-net/lariat/pkg/unixhttp"
)

// Client sends requests to the metadata service of its own host over the unix socket.
type Client struct {
	// Socket is the path of the service's unix socket; empty means DefaultSocket.
	Socket string
	// Service is the name, in errors, of another helper that answers at the socket. Empty means the
	// metadata service. Of the methods, only Do works with all helpers.
	Service string
}

// ErrUnreachable is in every error which means that the service cannot serve the request now. It
// did not answer, or it answered that its store is away. IsCode with CodeUnavailable reports the
// latter.
var ErrUnreachable = errors.New("metadata service unreachable")

// unavailableError is the service's own answer that it cannot serve now. Its text names the cause
// that the service named.
type unavailableError struct{ answer *Error }

func (e unavailableError) Error() string { return e.answer.Error() }

func (e unavailableError) Unwrap() error { return e.answer }

func (e unavailableError) Is(target error) bool { return target == ErrUnreachable }

// maxBody bounds an answer, so that a confused peer cannot fill memory. A view of 16 000 blocks is 2 MiB.
const maxBody = 256 << 20

func (c Client) socket() string {
	if c.Socket == "" {
		return DefaultSocket
	}
	return c.Socket
}

func (c Client) service() string { return cmp.Or(c.Service, "metadata service") }

// Attach acquires addresses for the interface. Errors are *Error (held, exhausted, not-yet,
// invalid, not-found) or wrap ErrUnreachable.
func (c Client) Attach(ctx context.Context, network string, req AttachRequest) (*Attachment, error) {
	if req.StateDir == DefaultStateDir {
		// The service assumes this directory. Without it tables stay short, and a service that does
		// not know the key does not refuse the request.
		req.StateDir = ""
	}
	var a Attachment
	return &a, c.Do(ctx, "POST", "/v1/networks/"+url.PathEscape(network)+"/attachments", req, &a)
}

// Release frees the addresses of an interface. A sequence above 0 frees only addresses that were
// allocated no later than it, so a late release does no harm. Releasing nothing is no error.
func (c Client) Release(ctx context.Context, network string, id AttachmentID, sequence uint64) error {
	return c.Do(ctx, "DELETE", fmt.Sprintf("/v1/networks/%s/attachments/%s/%s?sequence=%d",
		url.PathEscape(network), url.PathEscape(id.ContainerID), url.PathEscape(id.IfName), sequence), nil, nil)
}

// Attachment returns the interface's addresses, without allocating. It returns an *Error with
// CodeNotFound when the interface holds nothing.
func (c Client) Attachment(ctx context.Context, network string, id AttachmentID) (*Attachment, error) {
	var a Attachment
	return &a, c.Do(ctx, "GET", fmt.Sprintf("/v1/networks/%s/attachments/%s/%s",
		url.PathEscape(network), url.PathEscape(id.ContainerID), url.PathEscape(id.IfName)), nil, &a)
}

// Allocations lists the addresses of a network that attachments of this host hold. With all set it
// lists those of all hosts.
func (c Client) Allocations(ctx context.Context, network string, all bool) ([]Allocation, error) {
	var out []Allocation
	return out, c.Do(ctx, "GET", fmt.Sprintf("/v1/networks/%s/attachments?all=%t", url.PathEscape(network), all), nil,
		&out)
}

// Join claims the first block of each of the network's subnets for this host, and with it the host's own
// overlay address. Joining again changes nothing. An *Error with CodeExhausted when all blocks are taken.
func (c Client) Join(ctx context.Context, network string) error {
	return c.Do(ctx, "POST", "/v1/networks/"+url.PathEscape(network)+"/join", nil, nil)
}

// GC releases everything that this host holds on the network and valid does not list.
func (c Client) GC(ctx context.Context, network string, valid []AttachmentID) (*GCResult, error) {
	if valid == nil {
		valid = []AttachmentID{}
	}
	var r GCResult
	return &r, c.Do(ctx, "POST", "/v1/networks/"+url.PathEscape(network)+"/gc", GCRequest{Valid: &valid}, &r)
}

// Status asks whether an ADD on the network could be served now.
func (c Client) Status(ctx context.Context, network string) (*NetworkStatus, error) {
	var s NetworkStatus
	return &s, c.Do(ctx, "GET", "/v1/networks/"+url.PathEscape(network)+"/status", nil, &s)
}

// PutVolume writes a volume of this host. An empty Host means this host.
func (c Client) PutVolume(ctx context.Context, v Volume) error {
	return c.Put(ctx, "volumes", v.Driver+"/"+v.Name, v)
}

// RemoveVolume removes a volume of this host. A missing volume is no error. Volumes of that name on
// other hosts stay.
func (c Client) RemoveVolume(ctx context.Context, driver, name string) error {
	return c.Delete(ctx, "volumes", driver+"/"+name)
}

// Volumes lists the volumes of all hosts. With self set it lists those of this host.
func (c Client) Volumes(ctx context.Context, self bool) ([]Volume, error) {
	var out []Volume
	return out, c.Do(ctx, "GET", fmt.Sprintf("/v1/volumes?self=%t", self), nil, &out)
}

// View returns the network view: hosts, networks, blocks, host routes. It contains only valid
// objects.
func (c Client) View(ctx context.Context) (*Snapshot, error) {
	return c.snapshot(ctx, "?view=network")
}

// Snapshot returns the whole model. It contains only valid objects.
func (c Client) Snapshot(ctx context.Context) (*Snapshot, error) {
	return c.snapshot(ctx, "")
}

func (c Client) snapshot(ctx context.Context, query string) (*Snapshot, error) {
	var s Snapshot
	err := c.Do(ctx, "GET", "/v1/snapshot"+query, nil, &s)
	return s.Sane(), err
}

// Problems returns the entries of the store that cannot be used, of all kinds. The service reads
// the whole store to answer.
func (c Client) Problems(ctx context.Context) ([]Problem, error) {
	var out []Problem
	return out, c.Do(ctx, "GET", "/v1/problems", nil, &out)
}

// RemoveEntry removes an entry that is among the Problems, by the Problem's key. The service
// refuses other entries.
func (c Client) RemoveEntry(ctx context.Context, key string) error {
	return c.Do(ctx, "DELETE", "/v1/problems?key="+url.QueryEscape(key), nil, nil)
}

// Put creates or replaces an object. kind and key are as in the API's path. Get reads one, Delete
// removes one.
func (c Client) Put(ctx context.Context, kind, key string, object any) error {
	return c.Do(ctx, "PUT", "/v1/"+kind+"/"+escapeKey(key), object, nil)
}

// Get reads one object. See Put.
func (c Client) Get(ctx context.Context, kind, key string, object any) error {
	return c.Do(ctx, "GET", "/v1/"+kind+"/"+escapeKey(key), nil, object)
}

// Delete removes one object. A missing object is no error. See Put.
func (c Client) Delete(ctx context.Context, kind, key string) error {
	return c.Do(ctx, "DELETE", "/v1/"+kind+"/"+escapeKey(key), nil, nil)
}

func escapeKey(key string) string {
	parts := strings.Split(key, "/")
	for i := range parts {
		parts[i] = url.PathEscape(parts[i])
	}
	return strings.Join(parts, "/")
}

// Watch calls fn with a first snapshot of the network view, and again after each change and each
// reconnection. It ends when the context ends or fn returns an error. It reconnects with back-off
// and resumes at its last revision. The view never goes back to empty while the service is away. fn
// may keep the snapshot: it is never changed afterwards. Watch calls onError, when not nil, with
// each failed connection.
func (c Client) Watch(ctx context.Context, fn func(*Snapshot) error, onError func(error)) error {
	var view viewState
	backoff := 50 * time.Millisecond
	for {
		err := c.watchOnce(ctx, &view, fn, func() { backoff = 50 * time.Millisecond })
		if ctx.Err() != nil {
			return ctx.Err()
		}
		var stop *stopError
		if errors.As(err, &stop) {
			return stop.err
		}
		if onError != nil {
			onError(err)
		}
		view.dirty = view.hosts != nil
		t := time.NewTimer(backoff)
		select {
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		case <-t.C:
		}
		backoff = min(2*backoff, 2*time.Second)
	}
}

// stopError carries an error of the callback out of the reconnect loop.
type stopError struct{ err error }

func (s *stopError) Error() string { return s.err.Error() }

func (c Client) watchOnce(ctx context.Context, view *viewState, fn func(*Snapshot) error, progress func()) error {
	r, err := c.roundTrip(ctx, "GET", "/v1/watch?revision="+strconv.FormatInt(view.revision, 10), nil)
	if err != nil {
		return err
	}
	defer r.Close()
	return follow(r.Reader, view, fn, progress)
}

// follow applies the lines of a watch. It ends at an invalid line, at the end of the stream, or at
// an error of fn.
func follow(body *bufio.Reader, view *viewState, fn func(*Snapshot) error, progress func()) error {
	for {
		line, err := readLine(body, maxBody)
		if err != nil {
			return fmt.Errorf("%w: watch ended: %w", ErrUnreachable, err)
		}
		var ev Event
		if err := json.Unmarshal(line, &ev); err != nil {
			return fmt.Errorf("watch: line %q: %w", clip(line), err)
		}
		changed, err := view.apply(ev)
		if err != nil {
			return err
		}
		progress()
		// Combine the events that have already arrived into one call.
		if changed {
			view.dirty = true
		}
		if view.dirty && body.Buffered() == 0 {
			snap := view.snapshot()
			view.dirty, view.anew = false, false
			if err := fn(snap); err != nil {
				return &stopError{err}
			}
		}
	}
}

// Do sends one request and decodes the answer into out, unless out is nil. An error answer is
// returned as *Error.
func (c Client) Do(ctx context.Context, method, path string, in, out any) error {
	var payload []byte
	if in != nil {
		var err error
		if payload, err = json.Marshal(in); err != nil {
			return fmt.Errorf("%s: %s %s: %w", c.service(), method, path, err)
		}
	}
	r, err := c.roundTrip(ctx, method, path, payload)
	if err != nil {
		return err
	}
	defer r.Close()
	data, err := io.ReadAll(io.LimitReader(r, maxBody))
	if err != nil {
		return c.unreachable(fmt.Errorf("%s %s: reading the answer: %w", method, path, err))
	}
	if out == nil || len(bytes.TrimSpace(data)) == 0 {
		return nil
	}
	if err := json.Unmarshal(data, out); err != nil {
		return fmt.Errorf("%s: %s %s: answer %q: %w", c.service(), method, path, clip(data), err)
	}
	return nil
}

// roundTrip sends a request. The caller reads the body of the answer until it ends.
func (c Client) roundTrip(ctx context.Context, method, path string, payload []byte) (*unixhttp.Response, error) {
	r, err := unixhttp.Do(ctx, c.socket(), method, path, payload)
	if err != nil {
		if _, dialed := errors.AsType[*os.PathError](err); dialed {
			err = fmt.Errorf("%w; is the service running?", err)
		}
		return nil, c.unreachable(err)
	}
	if r.Status/100 == 2 {
		return r, nil
	}
	defer r.Close()
	data, _ := io.ReadAll(io.LimitReader(r, 1<<20))
	var e Error
	if json.Unmarshal(data, &e) != nil || e.Message == "" {
		e = Error{Code: CodeInternal, Message: fmt.Sprintf("%s: %s %s: status %d: %s", c.service(), method, path, r.Status,
			clip(data))}
	}
	if e.Code == CodeUnavailable {
		return nil, unavailableError{&e}
	}
	return nil, &e
}

// unreachable returns an error that names the service. Only errors of the metadata service wrap
// ErrUnreachable.
func (c Client) unreachable(err error) error {
	if c.Service != "" {
		return fmt.Errorf("%s unreachable: %w", c.Service, err)
	}
	return fmt.Errorf("%w: %w", ErrUnreachable, err)
}

// readLine returns the next line with its end, of at most the given number of bytes.
func readLine(r *bufio.Reader, most int) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		line = append(line, part...)
		switch {
		case len(line) > most:
			return nil, fmt.Errorf("a line of more than %d bytes: %q", most, clip(line))
		case err == nil:
			return line, nil
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, err
		}
	}
}

func clip(b []byte) string {
	if len(b) > 200 {
		return string(b[:200]) + "…"
	}
	return string(b)
}

// Errors that the callers of the client tell apart.

// IsCode reports whether err is an answer of the service with that code.
func IsCode(err error, code string) bool {
	var e *Error
	return errors.As(err, &e) && e.Code == code
}
