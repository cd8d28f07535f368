package main

import (
	"context"
	"log/slog"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/lariat-net/lariat/pkg/service"
	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/dockerapi"
)

// handler returns Docker's protocol, and what people and monitors ask.
func handler(docker *dockerapi.Server, driver volume.Driver, registry *prometheus.Registry,
	log *slog.Logger) *service.Server {
	api := service.New(log, service.Health{Metrics: registry, Ready: func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		_, err := driver.Init(ctx)
		if err == nil {
			_, err = docker.Volumes()
		}
		return err
	}})
	for _, path := range dockerapi.Paths() {
		api.Handle("POST "+path, docker)
	}
	api.Handle("/", docker) // says what is wrong with the call
	api.HandleFunc("GET /v1/volumes", func(w http.ResponseWriter, _ *http.Request) {
		all, err := docker.Volumes()
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		service.WriteJSON(w, all)
	})
	return api
}
