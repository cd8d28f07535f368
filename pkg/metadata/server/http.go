package server

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/server/entry"
	"github.com/lariat-net/lariat/pkg/metadata/store"
	"github.com/lariat-net/lariat/pkg/service"
)

// maxRequest bounds a request's body, in octets: a GC list of a hundred thousand attachments fits.
const maxRequest = 32 << 20

// API returns the control API, ready to be served.
func (s *Server) API() *service.Server {
	mux := service.New(s.log, service.Health{Ready: s.unready, Metrics: s.metrics.registry})
	write := func(pattern string, h func(*http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			r.Body = http.MaxBytesReader(w, r.Body, maxRequest)
			v, err := h(r)
			answer(w, v, err)
		})
	}
	read := func(pattern string, h func(*http.Request) (any, error)) {
		mux.HandleFunc("GET "+pattern, func(w http.ResponseWriter, r *http.Request) {
			v, err := h(r)
			answer(w, v, err)
		})
	}

	write("POST /v1/networks/{network}/attachments", func(r *http.Request) (any, error) {
		var req metadata.AttachRequest
		if err := decode(r.Body, &req); err != nil {
			return nil, err
		}
		return s.Attach(r.Context(), r.PathValue("network"), req)
	})
	attachmentID := func(r *http.Request) metadata.AttachmentID {
		return metadata.AttachmentID{ContainerID: r.PathValue("id"), IfName: r.PathValue("ifname")}
	}
	write("DELETE /v1/networks/{network}/attachments/{id}/{ifname}", func(r *http.Request) (any, error) {
		var sequence uint64
		if q := r.URL.Query().Get("sequence"); q != "" {
			var err error
			if sequence, err = strconv.ParseUint(q, 10, 64); err != nil {
				return nil, metadata.Errorf(metadata.CodeInvalid, "sequence %q: want a number", q)
			}
		}
		return nil, s.Release(r.Context(), r.PathValue("network"), attachmentID(r), sequence)
	})
	read("/v1/networks/{network}/attachments/{id}/{ifname}", func(r *http.Request) (any, error) {
		return s.Attachment(r.Context(), r.PathValue("network"), attachmentID(r))
	})
	read("/v1/networks/{network}/attachments", func(r *http.Request) (any, error) {
		return s.Allocations(r.Context(), r.PathValue("network"), r.URL.Query().Get("all") == "true")
	})
	write("POST /v1/networks/{network}/join", func(r *http.Request) (any, error) {
		return nil, s.Join(r.Context(), r.PathValue("network"))
	})
	write("POST /v1/networks/{network}/gc", func(r *http.Request) (any, error) {
		var req metadata.GCRequest
		if err := decode(r.Body, &req); err != nil {
			return nil, err
		}
		if req.Valid == nil {
			return nil, metadata.Errorf(metadata.CodeInvalid, "gc without a list of valid attachments: nothing is "+
				"released; an empty list releases all of this host")
		}
		return s.GC(r.Context(), r.PathValue("network"), *req.Valid)
	})
	read("/v1/networks/{network}/status",
		func(r *http.Request) (any, error) { return s.Status(r.Context(), r.PathValue("network")) })

	read("/v1/networks", func(*http.Request) (any, error) { return s.view.topology().Sane().Networks, nil })
	read("/v1/networks/{network}", func(r *http.Request) (any, error) {
		n, _, ok := s.view.Network(r.PathValue("network"))
		if !ok {
			return nil, s.view.Unknown(r.PathValue("network"))
		}
		return n, nil
	})
	write("PUT /v1/networks/{network}", func(r *http.Request) (any, error) {
		var n metadata.Network
		if err := decode(r.Body, &n); err != nil {
			return nil, err
		}
		if err := sameName(&n.Name, r.PathValue("network")); err != nil {
			return nil, err
		}
		// ?create=true leaves a network that is there as it is, and returns it; ?force=true takes addresses that hosts have
		// other ways to.
		q := r.URL.Query()
		return s.PutNetwork(r.Context(), n, q.Get("create") == "true", q.Get("force") == "true")
	})
	write("DELETE /v1/networks/{network}", func(r *http.Request) (any, error) {
		return nil, s.DeleteNetwork(r.Context(), r.PathValue("network"))
	})

	read("/v1/hosts", func(*http.Request) (any, error) { return s.view.hostList(), nil })
	read("/v1/hosts/{host}", func(r *http.Request) (any, error) {
		h, ok := s.view.host(r.PathValue("host"))
		if !ok {
			var names []string
			for _, h := range s.view.hostList() {
				names = append(names, h.Name)
			}
			return nil, metadata.Errorf(metadata.CodeNotFound, "there is no host %s; known: %s", r.PathValue("host"),
				strings.Join(names, ", "))
		}
		return h, nil
	})
	write("PUT /v1/hosts/{host}", func(r *http.Request) (any, error) {
		var h metadata.Host
		if err := decode(r.Body, &h); err != nil {
			return nil, err
		}
		if err := sameName(&h.Name, r.PathValue("host")); err != nil {
			return nil, err
		}
		return nil, s.PutHost(r.Context(), h)
	})
	write("DELETE /v1/hosts/{host}", func(r *http.Request) (any, error) {
		return nil, s.DeleteHost(r.Context(), r.PathValue("host"), r.URL.Query().Get("force") == "true")
	})

	read("/v1/blocks", func(*http.Request) (any, error) { return s.view.snapshot().Sane().Blocks, nil })
	read("/v1/endpoints", func(*http.Request) (any, error) {
		return append([]metadata.HostRoute{}, s.view.snapshot().Sane().HostRoutes...), nil
	})

	read("/v1/containers", func(r *http.Request) (any, error) { return s.listContainers(r.Context(), "") })
	read("/v1/containers/{host}",
		func(r *http.Request) (any, error) { return s.listContainers(r.Context(), r.PathValue("host")+"/") })
	read("/v1/containers/{host}/{id}", func(r *http.Request) (any, error) {
		ctx, cancel := s.timeout(r.Context())
		defer cancel()
		key := r.PathValue("host") + "/" + r.PathValue("id")
		e, err := s.store.Get(ctx, entry.ContainerPrefix+key)
		if errors.Is(err, store.ErrNotFound) {
			return nil, metadata.Errorf(metadata.CodeNotFound, "there is no container %s at host %s", r.PathValue("id"),
				r.PathValue("host"))
		} else if err != nil {
			return nil, err
		}
		c, err := metadata.Decode[metadata.Container](key, e.Value)
		if err != nil {
			p := metadata.NewProblem(e.Key, err)
			return nil, metadata.Errorf(metadata.CodeConflict, "%s; %s", p, p.Remedy())
		}
		return c, nil
	})
	write("PUT /v1/containers/{host}/{id}", func(r *http.Request) (any, error) {
		var c metadata.Container
		if err := decode(r.Body, &c); err != nil {
			return nil, err
		}
		err := errors.Join(sameName(&c.Host, r.PathValue("host")), sameName(&c.ID, r.PathValue("id")))
		c.Written = true
		if err = cmp.Or(err, c.Check(metadata.ContainerKey(c))); err != nil {
			return nil, metadata.Errorf(metadata.CodeInvalid, "%s", err)
		}
		ctx, cancel := s.timeout(r.Context())
		defer cancel()
		return nil, s.changeContainer(ctx, metadata.ContainerKey(c), func(old *metadata.Container) bool {
			*old = c.Overwrite(old)
			return true
		})
	})
	write("DELETE /v1/containers/{host}/{id}", func(r *http.Request) (any, error) {
		ctx, cancel := s.timeout(r.Context())
		defer cancel()
		ch := store.Change{Key: entry.ContainerPrefix + r.PathValue("host") + "/" + r.PathValue("id"), Revision: store.Any}
		revision, err := store.One(ctx, s.store, ch)
		if err == nil {
			s.containers.wrote(ch, revision)
		}
		return nil, err
	})

	read("/v1/volumes", func(r *http.Request) (any, error) {
		return s.Volumes(r.Context(),
			r.URL.Query().Get("self") == "true")
	})
	write("PUT /v1/volumes/{driver}/{name}", func(r *http.Request) (any, error) {
		var v metadata.Volume
		if err := decode(r.Body, &v); err != nil {
			return nil, err
		}
		if err := errors.Join(sameName(&v.Driver, r.PathValue("driver")),
			sameName(&v.Name, r.PathValue("name"))); err != nil {
			return nil, metadata.Errorf(metadata.CodeInvalid, "%s", err)
		}
		return nil, s.PutVolume(r.Context(), v)
	})
	write("DELETE /v1/volumes/{driver}/{name}", func(r *http.Request) (any, error) {
		return nil, s.DeleteVolume(r.Context(), r.PathValue("driver"), r.PathValue("name"))
	})

	read("/v1/snapshot", func(r *http.Request) (any, error) {
		snap := s.view.snapshot().Sane()
		if lost, _ := s.store.Lost(); lost != nil {
			snap.Away = lost.Error()
		}
		if r.URL.Query().Get("view") == "network" {
			return snap, nil
		}
		if snap.Away != "" { // at least this host's
			snap.Containers = s.containers.list()
			return snap, nil
		}
		var err error
		snap.Containers, err = s.listContainers(r.Context(), "")
		return snap, err
	})
	read("/v1/problems", func(r *http.Request) (any, error) { return s.Problems(r.Context()) })
	write("DELETE /v1/problems", func(r *http.Request) (any, error) {
		return nil, s.RemoveEntry(r.Context(), r.URL.Query().Get("key"))
	})
	mux.HandleFunc("GET /v1/watch", s.serveWatch)
	mux.HandleFunc("GET /v1/backup", s.serveBackup)

	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		answer(w, nil, metadata.Errorf(metadata.CodeNotFound, "there is no %s %s; kinds are networks, hosts, blocks, "+
			"endpoints, containers and volumes", r.Method, r.URL.Path))
	})
	return mux
}

func sameName(field *string, path string) error {
	if *field != "" && *field != path {
		return metadata.Errorf(metadata.CodeInvalid, "the object says %q, the path %q", *field, path)
	}
	*field = path
	return nil
}

func (s *Server) listContainers(ctx context.Context, prefix string) ([]metadata.Container, error) {
	list, _, err := s.list(ctx, entry.ContainerPrefix+prefix)
	if err != nil {
		return nil, err
	}
	out := make([]metadata.Container, 0, len(list))
	for _, e := range list {
		c, err := metadata.Decode[metadata.Container](strings.TrimPrefix(e.Key, entry.ContainerPrefix), e.Value)
		if err != nil {
			s.log.Warn("container left out", "entry", metadata.Problem{Key: e.Key}.Name(), "error", err)
			continue
		}
		out = append(out, c)
	}
	return out, nil
}

var statuses = map[string]int{
	metadata.CodeInvalid:     http.StatusBadRequest,
	metadata.CodeNotFound:    http.StatusNotFound,
	metadata.CodeHeld:        http.StatusConflict,
	metadata.CodeConflict:    http.StatusConflict,
	metadata.CodeExhausted:   http.StatusInsufficientStorage,
	metadata.CodeNotYet:      http.StatusGatewayTimeout,
	metadata.CodeUnavailable: http.StatusServiceUnavailable,
	metadata.CodeInternal:    http.StatusInternalServerError,
}

func answer(w http.ResponseWriter, v any, err error) {
	status := http.StatusOK
	if err != nil {
		var e *metadata.Error
		switch {
		case errors.As(err, &e):
			status = statuses[e.Code]
		case errors.Is(err, store.ErrUnavailable), errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled),
			errors.Is(err, store.ErrNoSpace):
			e, status = metadata.Errorf(metadata.CodeUnavailable, "%s", err), http.StatusServiceUnavailable
		case errors.Is(err, store.ErrConflict):
			e, status = metadata.Errorf(metadata.CodeConflict, "%s", err), http.StatusConflict
		default:
			e, status = metadata.Errorf(metadata.CodeInternal, "%s", err), http.StatusInternalServerError
		}
		v = e
	}
	if v == nil {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	data, err := json.Marshal(v)
	if err != nil {
		status, data = http.StatusInternalServerError, []byte(`{"code":"internal","message":"the answer cannot be encoded"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(data)+1))
	w.WriteHeader(status)
	w.Write(append(data, '\n')) //nolint:errcheck // the caller hung up
}

// serveWatch streams changes of the network view as lines of JSON.
func (s *Server) serveWatch(w http.ResponseWriter, r *http.Request) {
	revision, err := strconv.ParseInt("0"+r.URL.Query().Get("revision"), 10, 64)
	if err != nil {
		answer(w, nil, metadata.Errorf(metadata.CodeInvalid, "revision %q: want a number", r.URL.Query().Get("revision")))
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	rc := http.NewResponseController(w)
	// A peer that does not read is cut off rather than kept in memory.
	send := func(lines ...[]byte) bool {
		if err := rc.SetWriteDeadline(time.Now().Add(30 * time.Second)); err != nil {
			return false
		}
		for _, l := range lines {
			if _, err := w.Write(l); err != nil {
				return false
			}
		}
		return rc.Flush() == nil
	}
	lost, storeChanged := s.store.Lost()
	away := func() string {
		if lost, storeChanged = s.store.Lost(); lost != nil {
			return lost.Error()
		}
		return ""
	}
	snapshot := func() (uint64, bool) {
		snap, index := s.view.position()
		snap.Away = away()
		data, err := json.Marshal(snap)
		if err != nil {
			return 0, false
		}
		line, err := json.Marshal(metadata.Event{Type: metadata.EventSnapshot, Revision: snap.Revision, Object: data})
		return index, err == nil && send(append(line, '\n'))
	}
	index, ok := uint64(0), false
	if revision > 0 {
		index, ok = s.view.since(revision)
	}
	if !ok {
		if index, ok = snapshot(); !ok {
			return
		}
	}
	s.metrics.watchers.Inc()
	defer s.metrics.watchers.Dec()
	t := time.NewTicker(s.cfg.Bookmark)
	defer t.Stop()
	bookmark := func() bool {
		line, _ := json.Marshal(metadata.Event{Type: metadata.EventBookmark, Revision: s.view.upTo(index), Away: away()})
		return send(append(line, '\n'))
	}
	if revision > 0 && !bookmark() { // the head of the answer leaves at once
		return
	}
	for {
		events, next, changed, ok := s.view.next(index)
		if !ok {
			if index, ok = snapshot(); !ok {
				return
			}
			continue
		}
		if len(events) > 0 {
			lines := make([][]byte, len(events))
			for i, e := range events {
				lines[i] = e.line
			}
			if !send(lines...) {
				return
			}
			index = next
			continue
		}
		select {
		case <-changed:
		case <-storeChanged:
			if !bookmark() {
				return
			}
		case <-t.C:
			if !bookmark() {
				return
			}
		case <-r.Context().Done():
			return
		case <-s.stopping.Done():
			return
		}
	}
}

// serveBackup streams the whole store.
func (s *Server) serveBackup(w http.ResponseWriter, r *http.Request) {
	if !service.Privileged(r) {
		service.Forbid(w, "a backup is for root only")
		return
	}
	b, ok := s.store.Store.(interface {
		Backup(context.Context, io.Writer) error
	})
	if !ok {
		answer(w, nil, metadata.Errorf(metadata.CodeInvalid, "this store has no backup"))
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	if err := b.Backup(r.Context(), w); err != nil {
		s.log.Error("backup failed", "error", err)
		panic(http.ErrAbortHandler) // the reader finds the checksum missing
	}
}
