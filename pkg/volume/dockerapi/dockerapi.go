// Package dockerapi serves Docker's volume plugin protocol for a volume driver. The protocol is
// HTTP with JSON over a unix socket. Podman speaks it, too.
//
//	docker volume create ─► Create ──► Driver.Create
//	docker run -v v:/d ───► Mount ID ► Driver.Mount, unless the volume has a user
//	the container ends ───► Unmount ID ► Driver.Unmount, after the last user
//	docker volume rm ─────► Remove ──► Driver.Delete
//	docker volume ls ─────► List, Get: answered from memory, even if a server hangs
//
// The package counts the users of a volume. It counts the uses of each volume by each of Docker's
// mount ids. The reason is that Docker uses an id again while it is in use ("docker cp"). The
// counts are in a journal, which is written before the answer leaves. The counts hold for one boot
// of the host. The mount table alone decides whether a volume is mounted. So a restarted process
// recovers the state of a killed process. Its start neither asks the driver nor waits for a server.
//
// The journal also holds a call whose answer may not have reached Docker. Docker repeats that call,
// and the repetition must not count twice.
package dockerapi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/lariat-net/lariat/pkg/volume"
)

// MaxRequest is the size in bytes of the largest request that is read. Docker's own requests have a
// few hundred bytes.
const MaxRequest = 256 << 10

// maxID limits the length of a mount id. Ids of Docker and Podman have 64 digits.
const maxID = 256

// mediaType is the type that Docker requests. Docker accepts any type.
const mediaType = "application/vnd.docker.plugins.v1.1+json"

// request is the body of any call.
type request struct {
	Name string
	ID   string
	Opts map[string]string

	caller context.Context // ends when the caller hangs up
}

// answer is the body of any reply. Nil members are omitted.
type answer struct {
	Implements   []string      `json:",omitempty"`
	Mountpoint   *string       `json:",omitempty"`
	Volume       *info         `json:",omitempty"`
	Volumes      *[]info       `json:",omitempty"`
	Capabilities *capabilities `json:",omitempty"`
	Err          string
}

type info struct {
	Name       string
	Mountpoint string         `json:",omitempty"`
	CreatedAt  string         `json:",omitempty"`
	Status     map[string]any `json:",omitempty"`
}

type capabilities struct{ Scope string }

// verb describes one call of the protocol.
type verb struct {
	name   string
	do     func(*Server, context.Context, request) (answer, error)
	volume bool // the call is about one volume
	locks  bool // one such call at a time for a volume; other verbs do not wait
	long   bool // Docker allows two minutes, and one minute for other verbs
}

// verbs maps paths to verbs.
var verbs = map[string]verb{
	"/Plugin.Activate":           {name: "activate", do: (*Server).activate},
	"/VolumeDriver.Capabilities": {name: "capabilities", do: (*Server).capabilities},
	"/VolumeDriver.Create":       {name: "create", do: (*Server).create, volume: true, locks: true, long: true},
	"/VolumeDriver.Remove":       {name: "remove", do: (*Server).remove, volume: true, locks: true},
	"/VolumeDriver.Mount":        {name: "mount", do: (*Server).mount, volume: true, locks: true, long: true},
	"/VolumeDriver.Unmount":      {name: "unmount", do: (*Server).unmount, volume: true, locks: true},
	"/VolumeDriver.Path":         {name: "path", do: (*Server).path, volume: true},
	"/VolumeDriver.Get":          {name: "get", do: (*Server).lookup, volume: true},
	"/VolumeDriver.List":         {name: "list", do: (*Server).list},
}

// Paths returns the paths of the protocol's calls.
func Paths() []string { return slices.Sorted(maps.Keys(verbs)) }

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	v, known := verbs[r.URL.Path]
	if !known {
		_ = reply(w, http.StatusNotFound,
			answer{Err: fmt.Sprintf("no call %s in Docker's volume plugin protocol", strconv.Quote(cut(r.URL.Path)))})
		return
	}
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		_ = reply(w, http.StatusMethodNotAllowed, answer{Err: r.URL.Path + " takes POST"})
		return
	}
	began := time.Now()
	err := s.serve(w, r, v)
	s.config.Observe(v.name, time.Since(began), err)
}

// serve answers one call, and returns the call's error.
func (s *Server) serve(w http.ResponseWriter, r *http.Request, v verb) error {
	q, err := decode(http.MaxBytesReader(w, r.Body, MaxRequest), v)
	if err != nil {
		s.refuse(w, http.StatusBadRequest, v, q, err)
		return err
	}
	q.caller = r.Context()
	// A call that has begun runs to its own deadline even if the caller hangs up, because half of a
	// mount helps no caller.
	d := volume.Deadlines.Short
	if v.long {
		d = volume.Deadlines.Long
	}
	ctx, cancel := volume.WithDeadline(context.WithoutCancel(r.Context()), d)
	defer cancel()
	if v.locks {
		unlock, err := s.locks.Lock(ctx, q.Name, v.name)
		if err != nil {
			s.refuse(w, http.StatusInternalServerError, v, q, err)
			return err
		}
		defer unlock()
		s.touch(q.Name)
	}
	a, err := v.do(s, ctx, q)
	s.config.Log.Debug(v.name, "volume", q.Name, "id", q.ID, "error", err)
	if err != nil {
		s.refuse(w, http.StatusInternalServerError, v, q, err)
		if v.locks {
			s.answered(q.Name) // Docker repeats no failed call
		}
		return err
	}
	volume.Failpoint("docker-" + v.name + "-done")
	err = reply(w, http.StatusOK, a)
	volume.Failpoint("docker-" + v.name + "-answered")
	if err != nil {
		return fmt.Errorf("answer to Docker's %s of %s: %w", v.name, q.Name, err)
	}
	if v.locks {
		s.answered(q.Name)
	}
	return nil
}

// refuse sends an error to Docker, which shows it to the user. It also logs the error for the
// administrator.
func (s *Server) refuse(w http.ResponseWriter, status int, v verb, q request, err error) {
	level := slog.LevelError
	if errors.Is(err, volume.ErrNotFound) || status == http.StatusBadRequest {
		level = slog.LevelDebug // Docker asks each driver for volumes of others
	}
	s.config.Log.Log(q.context(), level, v.name+" failed", "volume", cut(q.Name), "error", err)
	_ = reply(w, status, answer{Err: err.Error()}) // a caller that hung up misses the reply
}

func (q request) context() context.Context {
	if q.caller != nil {
		return q.caller
	}
	return context.Background()
}

// reply writes the whole answer. It returns only when the kernel has the answer. The caller
// therefore gets the answer even if this process ends afterwards.
func reply(w http.ResponseWriter, status int, a answer) error {
	data, err := json.Marshal(a)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", mediaType)
	w.Header().Set("Content-Length", strconv.Itoa(len(data)+1))
	w.WriteHeader(status)
	if _, err := w.Write(append(data, '\n')); err != nil {
		return err
	}
	if err := http.NewResponseController(w).Flush(); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return err
	}
	return nil
}

// decode reads a request. It ignores unknown members, which a later Docker may send. Errors are
// wrong types, more than one document, and impossible names, ids or options. Of an odd name, an
// error shows only a quoted part.
func decode(body io.Reader, v verb) (q request, err error) {
	data, err := io.ReadAll(body)
	var large *http.MaxBytesError
	if errors.As(err, &large) {
		return q, volume.Errorf(volume.ErrInvalid, "the request is larger than %d octets", large.Limit)
	}
	if err != nil {
		return q, fmt.Errorf("read the request: %w", err)
	}
	if !v.volume {
		return q, nil // Docker sends null, {} or nothing
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	if err := dec.Decode(&q); err != nil {
		return request{}, volume.Errorf(volume.ErrInvalid, "the request is not JSON as it should be, with a Name and "+
			"Opts of strings: %w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return request{}, volume.Errorf(volume.ErrInvalid, "the request is more than one JSON document")
	}
	if err := volume.CheckName(q.Name); err != nil {
		return q, err
	}
	if len(q.ID) > maxID {
		return q, volume.Errorf(volume.ErrInvalid, "volume %s: a mount id of %d octets, at most %d are allowed", q.Name,
			len(q.ID), maxID)
	}
	if err := volume.CheckOptions(map[string]string{"ID": q.ID}); err != nil {
		return q, fmt.Errorf("volume %s: %w", q.Name, err)
	}
	return q, checkOptions(q)
}

// cut shortens a text of any length, for a message.
func cut(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}
