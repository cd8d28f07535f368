package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/reconcile"
	"github.com/lariat-net/lariat/pkg/service"
)

// handler returns what root may ask: health, metrics, the state that is wanted, and some orders.
func handler(m *reconcile.Manager, remover *kernel.LinkReaper, log *slog.Logger, level *slog.LevelVar) *service.Server {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collector{m})
	api := service.New(log, service.Health{Metrics: registry, Ready: func(context.Context) error {
		var bad []error
		for _, h := range m.Health() {
			if !h.OK {
				bad = append(bad, errors.New(h.Concern+": "+h.Error))
			}
		}
		return errors.Join(bad...)
	}})
	api.HandleFunc("GET /ping", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "OK") })
	// The CNI plugins' DEL asks for this: the manager waits for the kernel in their place.
	api.HandleFunc("DELETE /v1/ports/{name}", func(w http.ResponseWriter, r *http.Request) {
		index, _ := strconv.ParseUint(r.URL.Query().Get("index"), 10, 32)
		if err := remover.Remove(r.Context(), r.PathValue("name"), uint32(index)); err != nil {
			w.WriteHeader(http.StatusInternalServerError)
			_ = json.NewEncoder(w).Encode(metadata.Errorf(metadata.CodeInternal, "%v", err))
		}
	})
	api.HandleFunc("GET /v1/tunnels", func(w http.ResponseWriter, r *http.Request) {
		service.WriteJSON(w, m.Tunnels.Report(r.Context(), !r.URL.Query().Has("summary")))
	})
	api.HandleFunc("POST /v1/tunnels/reauth", func(w http.ResponseWriter, r *http.Request) {
		if err := m.Tunnels.Reauth(r.Context()); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		fmt.Fprintln(w, "OK")
	})
	api.HandleFunc("POST /v1/reload", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), reloadTimeout)
		defer cancel()
		if err := m.Reload(ctx); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		fmt.Fprintln(w, "OK")
	})
	api.HandleFunc("GET /v1/log-level", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, level.Level()) })
	api.HandleFunc("PUT /v1/log-level", func(w http.ResponseWriter, r *http.Request) {
		text, err := io.ReadAll(io.LimitReader(r.Body, 100))
		if err == nil {
			err = level.UnmarshalText(bytes.TrimSpace(text))
		}
		if err != nil {
			http.Error(w, fmt.Sprintf("log level %q: want debug, info, warn or error", text), http.StatusBadRequest)
			return
		}
		fmt.Fprintln(w, level.Level())
	})
	api.HandleFunc("GET /v1/state", func(w http.ResponseWriter, _ *http.Request) {
		out := struct {
			Host     string             `json:"host,omitempty"`
			StateDir string             `json:"stateDir"`
			Revision int64              `json:"revision"`
			Health   []reconcile.Health `json:"health"`
			Desired  []string           `json:"desired"`
		}{Health: m.Health(), StateDir: m.Journal.StateDir()}
		if s := m.View(); s != nil {
			out.Host, out.Revision = s.Self, s.Revision
			out.Desired = strings.Split(strings.TrimRight(m.Desired(s).String(), "\n"), "\n")
		}
		service.WriteJSON(w, out)
	})
	return api
}

// reloadTimeout is what POST /v1/reload waits for.
const reloadTimeout = 30 * time.Second
