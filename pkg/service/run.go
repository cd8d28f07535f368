package service

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os/signal"
	"slices"
	"syscall"
	"time"

	"github.com/spf13/pflag"

	"github.com/lariat-net/lariat/pkg/printable"
)

// Program describes a helper to Run.
type Program struct {
	Name        string // of the executable
	Version     string // what --version prints
	Help        string // what --help prints above the flags
	Socket      string // default of --socket
	SocketUsage string // of --socket
	MetricsPort int    // in the example of --listen-metrics

	// Flags declares the helper's own flags. Those of Run are there already.
	Flags func(*pflag.FlagSet)
	// Prepare completes what the flags say and refuses contradictions, before anything is opened.
	Prepare func(*Process) error
	// Commands run instead of the service, by their name on the command line.
	Commands map[string]func(context.Context, *Process) error
	// Start starts the service. The process holds its socket already, so it is the only one on this host.
	Start func(context.Context, *Process) (*Service, error)
}

// Process is a helper that runs.
type Process struct {
	Command string // one of Program.Commands, or empty
	Socket  string // value of --socket
	Log     *slog.Logger
	Level   *slog.LevelVar // of Log
	Stdout  io.Writer
	Stderr  io.Writer

	listenMetrics string
	deferred      []func()
}

// Defer runs f when the process ends, also when Start fails. The last one runs first.
func (p *Process) Defer(f func()) { p.deferred = append(p.deferred, f) }

// Service is what Program.Start has started. Its two handlers have different types, so that they cannot be mixed up.
type Service struct {
	Private *Server // answers root on the unix socket
	Public  Guests  // answers containers on TCP

	Alive    func() bool                 // whether systemd's watchdog hears of the process; nil: always
	Work     func(context.Context) error // runs until the context ends
	Stop     func()                      // ends requests that wait; runs beside the end of the listeners; nil: none wait
	Patience time.Duration               // what requests get to end
	Stopped  string                      // the last line of the log; empty: none
}

// Run runs a helper and returns its exit code. It parses the flags, logs, obeys SIGTERM and SIGINT, listens on the unix
// socket and on TCP, answers monitors, speaks systemd's protocol, and stops in good order.
func Run(p Program, args []string, stdout, stderr io.Writer) int {
	h := &Process{Stdout: stdout, Stderr: stderr, Level: new(slog.LevelVar)}
	h.Log = slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: h.Level}))
	done, err := p.parse(h, args)
	if err == nil && !done {
		err = p.run(h)
	}
	if err != nil {
		fmt.Fprintf(stderr, "%s: %s\n", p.Name, printable.Joined(err.Error()))
		return 1
	}
	return 0
}

// parse reads the flags. It reports whether that was all there is to do.
func (p Program) parse(h *Process, args []string) (done bool, err error) {
	f := pflag.NewFlagSet(p.Name, pflag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.StringVar(&h.Socket, "socket", p.Socket, p.SocketUsage)
	f.StringVar(&h.listenMetrics, "listen-metrics", "", fmt.Sprintf("TCP address for /metrics, /healthz and /readyz, "+
		"such as 127.0.0.1:%d; empty: the unix socket alone", p.MetricsPort))
	level := f.String("log-level", "info", "debug, info, warn or error")
	version := f.Bool("version", false, "print the version")
	help := f.BoolP("help", "h", false, "print the manual")
	p.Flags(f)
	switch err := f.Parse(args); {
	case err != nil:
		return false, fmt.Errorf("%w; see %s --help", err, p.Name)
	case *help:
		fmt.Fprintf(h.Stdout, "%s\nFlags:\n%s", p.Help, f.FlagUsages())
		return true, nil
	case *version:
		fmt.Fprintln(h.Stdout, p.Version)
		return true, nil
	case f.NArg() > 0:
		if h.Command = f.Arg(0); p.Commands[h.Command] == nil || f.NArg() > 1 {
			return false, fmt.Errorf("unexpected argument %q; see %s --help", f.Arg(f.NArg()-1), p.Name)
		}
	}
	if err := h.Level.UnmarshalText([]byte(*level)); err != nil {
		return false, fmt.Errorf("--log-level %s: want debug, info, warn or error", *level)
	}
	return false, p.Prepare(h)
}

func (p Program) run(h *Process) error {
	signals, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	ctx, cancel := context.WithCancel(signals)
	defer cancel()
	end := func() {
		for _, f := range slices.Backward(h.deferred) {
			f()
		}
	}
	if command := p.Commands[h.Command]; command != nil {
		defer end()
		return command(ctx, h)
	}
	// Whoever holds the socket is this helper on this host. Ask before the helper opens what only one process may have.
	socket, err := Listen(h.Socket)
	if err != nil {
		return err
	}
	defer socket.Close()
	defer end()
	s, err := p.Start(ctx, h)
	if err != nil {
		return err
	}
	s.Private.Serve(socket)
	if err := errors.Join(s.Private.listenMetrics(h.listenMetrics), s.Private.listenGuests(s.Public)); err != nil {
		return errors.Join(err, s.Private.Stop(0))
	}
	ready(ctx, s.Alive)
	worked := make(chan error, 1)
	go func() { worked <- s.Work(ctx) }()
	select {
	case err = <-s.Private.failed:
		cancel()
		err = errors.Join(err, <-worked)
	case err = <-worked:
		cancel()
	}
	stopping()
	if s.Stop != nil {
		go s.Stop()
	}
	if serr := s.Private.Stop(s.Patience); serr != nil {
		h.Log.Warn("requests were cut short; they can be repeated", "error", serr)
	}
	if s.Stopped != "" {
		h.Log.Info(s.Stopped)
	}
	return err
}
