package service

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/pflag"
)

// program is a helper whose work is done when it has been asked what its callers see.
func program(t *testing.T, events *[]string, work func(context.Context, *Server) error) Program {
	note := func(what string) { *events = append(*events, what) }
	return Program{Name: "lariat-x", Version: "v1", Help: "The manual.\n", SocketUsage: "where it listens", MetricsPort: 1,
		Flags: func(f *pflag.FlagSet) { f.Bool("fast", false, "at once") },
		Prepare: func(p *Process) error {
			if p.Socket == "" {
				return errors.New("--socket is missing")
			}
			return nil
		},
		Commands: map[string]func(context.Context, *Process) error{"clean": func(_ context.Context, p *Process) error {
			p.Defer(func() { note("deferred") })
			note("clean")
			return nil
		}},
		Start: func(_ context.Context, p *Process) (*Service, error) {
			p.Defer(func() { note("deferred first") })
			p.Defer(func() { note("deferred last") })
			if work == nil {
				return nil, errors.New("no start")
			}
			api := New(p.Log, Health{Metrics: prometheus.NewRegistry(), Ready: func(context.Context) error { return nil }})
			api.HandleFunc("POST /v1/order", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "done") })
			return &Service{Private: api, Stopped: "stopped",
				Public: Guests{Address: "127.0.0.1:0", Known: func(netip.Addr) bool { return true },
					Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "guest") })},
				Work: func(ctx context.Context) error { return work(ctx, api) },
			}, nil
		}}
}

// TestF161OneSkeleton: Run opens the listeners of every helper, each with its own routes, and takes them away.
func TestF161OneSkeleton(t *testing.T) {
	socket := filepath.Join(folder(t), "s")
	var events []string
	var out, log bytes.Buffer
	status := Run(program(t, &events, func(ctx context.Context, api *Server) error {
		list := api.Listeners()
		if len(list) != 3 || list[0].Callers != Root || list[1].Callers != Everybody || list[2].Callers != Known {
			t.Errorf("%+v", list)
			return nil
		}
		c := from("127.0.0.1")
		for path, want := range map[string]int{"/healthz": 200, "/readyz": 200, "/metrics": 200, "/v1/routes": 404,
			"/v1/order": 404} {
			if status, _ := get(t, c, "http://"+list[1].Address+path); status != want {
				t.Errorf("--listen-metrics: %s: %d, want %d", path, status, want)
			}
			if status, body := get(t, c, "http://"+list[2].Address+path); status != 200 || body != "guest" {
				t.Errorf("guests: %s: %d %s", path, status, body)
			}
		}
		// The process obeys systemd.
		if err := syscall.Kill(os.Getpid(), syscall.SIGTERM); err != nil {
			return err
		}
		<-ctx.Done()
		return nil
	}), []string{"--socket", socket, "--listen-metrics", "127.0.0.1:0", "--log-level", "info"}, &out, &log)
	if status != 0 || strings.Count(log.String(), "msg=stopped") != 1 {
		t.Errorf("status %d: %s", status, &log)
	}
	if fmt.Sprint(events) != "[deferred last deferred first]" {
		t.Error(events)
	}
	if left, err := filepath.Glob(socket + "*"); err != nil || len(left) > 0 {
		t.Error("left behind:", left, err)
	}
}

// TestRunEnds: with the errors of the start, of the work, and of a listener that breaks.
func TestRunEnds(t *testing.T) {
	for name, tc := range map[string]struct {
		work func(context.Context, *Server) error
		want string
	}{
		"start": {nil, "lariat-x: no start\n"},
		"work":  {func(context.Context, *Server) error { return errors.New("no work") }, "lariat-x: no work\n"},
		"listener": {func(ctx context.Context, api *Server) error {
			api.failed <- errors.New("it broke")
			<-ctx.Done()
			return nil
		}, "lariat-x: it broke\n"},
	} {
		var events []string
		var out, log bytes.Buffer
		status := Run(program(t, &events, tc.work), []string{"--socket", filepath.Join(folder(t), "s")}, &out, &log)
		if status != 1 || !strings.HasSuffix(log.String(), tc.want) ||
			fmt.Sprint(events) != "[deferred last deferred first]" {
			t.Errorf("%s: %d %q %v", name, status, &log, events)
		}
	}
}

// TestCommandLine: what Run does with flags and arguments.
func TestCommandLine(t *testing.T) {
	for _, tc := range []struct {
		args   string
		status int
		out    string
		err    string
		events string
	}{
		{"--version", 0, "v1\n", "", "[]"},
		{"--help", 0, "--listen-metrics string", "", "[]"},
		{"-h", 0, "The manual.\n\nFlags:\n      --fast", "", "[]"},
		{"--slow", 1, "", "lariat-x: unknown flag: --slow; see lariat-x --help\n", "[]"},
		{"--log-level loud", 1, "", "lariat-x: --log-level loud: want debug, info, warn or error\n", "[]"},
		{"", 1, "", "lariat-x: --socket is missing\n", "[]"},
		{"cleen", 1, "", "lariat-x: unexpected argument \"cleen\"; see lariat-x --help\n", "[]"},
		{"clean more", 1, "", "lariat-x: unexpected argument \"more\"; see lariat-x --help\n", "[]"},
		{"clean --socket x", 0, "", "", "[clean deferred]"},
	} {
		events := []string{}
		var out, errs bytes.Buffer
		if status := Run(program(t, &events, nil), strings.Fields(tc.args), &out, &errs); status != tc.status ||
			!strings.Contains(out.String(), tc.out) || errs.String() != tc.err || fmt.Sprint(events) != tc.events {
			t.Errorf("%q: %d %q %q %v", tc.args, status, &out, &errs, events)
		}
	}
}
