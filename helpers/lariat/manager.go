package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/lariat-net/lariat/pkg/doctor"
	"github.com/lariat-net/lariat/pkg/ipsec"
	"github.com/lariat-net/lariat/pkg/unixhttp"
)

// askManager sends one request to this host's network manager.
func (a *app) askManager(ctx context.Context, method, path string) ([]byte, error) {
	status, b, err := unixhttp.Page(ctx, a.managerSocket, method, path, nil)
	switch {
	case err != nil && status == 0:
		what, remedy := doctor.ManagerUnreachable(err, a.managerSocket)
		return nil, remedied{errors.New(what), remedy}
	case err != nil:
		return nil, fmt.Errorf("answer of the network manager: %w", err)
	case status == http.StatusNotFound:
		return nil, remedied{fmt.Errorf("the network manager does not know %s: it is older than this program", path),
			"update lariat-network-manager, and restart it"}
	case status != http.StatusOK:
		return nil, errors.New(strings.TrimSpace(string(b)))
	}
	return b, nil
}

// tunnels is how this host's tunnels fare.
func (a *app) tunnels(ctx context.Context) (*ipsec.Report, error) {
	b, err := a.askManager(ctx, http.MethodGet, "/v1/tunnels")
	if err != nil {
		return nil, err
	}
	var r ipsec.Report
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, fmt.Errorf("answer of the network manager: %w", err)
	}
	return &r, nil
}
