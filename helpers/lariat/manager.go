package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"

	"github.com/lariat-net/lariat/pkg/doctor"
	"github.com/lariat-net/lariat/pkg/ipsec"
)

// askManager sends one request to this host's network manager.
func (a *app) askManager(ctx context.Context, method, path string) ([]byte, error) {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _,
		_ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", a.managerSocket)
	}}}
	req, err := http.NewRequestWithContext(ctx, method, "http://lariat"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) {
			err = op // without the URL, which means nothing here
		}
		what, remedy := doctor.ManagerUnreachable(err, a.managerSocket)
		return nil, remedied{errors.New(what), remedy}
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	switch {
	case err != nil:
		return nil, fmt.Errorf("answer of the network manager: %w", err)
	case resp.StatusCode == http.StatusNotFound:
		return nil, remedied{fmt.Errorf("the network manager does not know %s: it is older than this program", path),
			"update lariat-network-manager, and restart it"}
	case resp.StatusCode != http.StatusOK:
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
