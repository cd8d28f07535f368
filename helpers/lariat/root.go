package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"sigs.k8s.io/yaml"

	"github.com/lariat-net/lariat/pkg/doctor"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/printable"
)

// defaultManagerSocket is lariat-network-manager's own default.
const defaultManagerSocket = "/run/lariat/network-manager.sock"

// app is what every command shares.
type app struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	socket         string
	managerSocket  string
	output         format
	timeout        time.Duration
	now            func() time.Time
}

// exitStatus ends the program with a status and no further word: what there was to say is said.
type exitStatus int

// remedied is an error with what helps, which stands on a line of its own.
type remedied struct {
	error
	remedy string
}

func (e remedied) Unwrap() error { return e.error }

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	a := &app{stdin: stdin, stdout: stdout, stderr: stderr, now: time.Now}
	root := a.root()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	var status exitStatus
	var known remedied
	switch {
	case err == nil:
		return 0
	case errors.As(err, &status):
		return int(status)
	case errors.Is(err, metadata.ErrUnreachable):
		what, remedy := doctor.Unreachable(err, a.client().Socket)
		a.say("lariat: %s", printable.Joined(what))
		a.say("  remedy: %s", remedy)
	default:
		a.say("lariat: %s", printable.Joined(err.Error()))
		if errors.As(err, &known) {
			a.say("  remedy: %s", known.remedy)
		}
	}
	return 1
}

func (a *app) root() *cobra.Command {
	c := &cobra.Command{
		Use:   "lariat",
		Short: "Look at a Lariat cluster, and change it",
		Long: `lariat shows and changes what the hosts of a cluster agree on: networks, hosts, addresses; and which
volumes they have. It asks the metadata service of this host over its unix socket, which is root's.`,
		Example: `  lariat status
  lariat network create overlay --subnet 10.42.0.0/16
  lariat doctor`,
		Version:       versionText(),
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	f := c.PersistentFlags()
	f.StringVar(&a.socket, "socket", cmp.Or(os.Getenv("LARIAT_SOCKET"), metadata.DefaultSocket),
		"unix `path` of the metadata service (env LARIAT_SOCKET)")
	f.StringVar(&a.managerSocket, "manager-socket", cmp.Or(os.Getenv("LARIAT_MANAGER_SOCKET"), defaultManagerSocket),
		"unix `path` of this host's network manager (env LARIAT_MANAGER_SOCKET)")
	f.DurationVar(&a.timeout, "timeout", 10*time.Second, "how long the metadata service may take for an answer")
	a.output = text
	f.VarP(&a.output, "output", "o", "text, json, yaml or table")
	_ = c.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(formats, cobra.ShellCompDirectiveNoFileComp))
	for _, name := range []string{"socket", "manager-socket"} {
		_ = c.MarkPersistentFlagFilename(name, "sock")
	}
	c.AddCommand(a.status(), a.plan(), a.graph(), a.doctor(), a.network(), a.host(), a.ip(), a.entry(), a.volume(),
		a.ipsec(), a.certs())
	return c
}

// version is stamped by the Makefile.
var version string

// versionText is the stamp, or what Go knows of the module.
func versionText() string {
	if version != "" {
		return version
	}
	if b, ok := debug.ReadBuildInfo(); ok && b.Main.Version != "" {
		return b.Main.Version
	}
	return "unknown"
}

func (a *app) client() metadata.Client {
	return metadata.Client{Socket: cmp.Or(a.socket, metadata.DefaultSocket)}
}

// bounded gives a command's questions to the service an end.
func (a *app) bounded(c *cobra.Command) (context.Context, context.CancelFunc) {
	return context.WithTimeout(c.Context(), a.timeout)
}

// snapshot reads the model from a file ("-": standard input), as JSON or YAML, or from the service when there
// is no file.
func (a *app) snapshot(ctx context.Context, file string) (*metadata.Snapshot, error) {
	if file == "" {
		return a.client().Snapshot(ctx)
	}
	var b []byte
	var err error
	if file == "-" {
		b, err = io.ReadAll(a.stdin)
	} else {
		b, err = os.ReadFile(file)
	}
	if err != nil {
		return nil, fmt.Errorf("snapshot: %w", err)
	}
	var s metadata.Snapshot
	if err := yaml.Unmarshal(b, &s); err != nil {
		return nil, fmt.Errorf("snapshot %s: %w; make one with: lariat status --snapshot > FILE", file, err)
	}
	if len(s.Hosts) == 0 {
		return nil, fmt.Errorf("snapshot %s: there is no host in it; make one with: lariat status --snapshot > FILE", file)
	}
	return s.Sane(), nil
}

// tty reports whether a stream is a terminal.
func tty(stream any) bool {
	f, ok := stream.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// confirm asks a person. Where nobody can answer, it is an error that names the flag.
func (a *app) confirm(question string) error {
	if !tty(a.stdin) {
		return fmt.Errorf("%s Say --yes where nobody can be asked", question)
	}
	fmt.Fprint(a.stderr, sprintf("%s [y/N] ", question))
	line, err := bufio.NewReader(a.stdin).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	switch strings.ToLower(strings.TrimSpace(line)) {
	case "y", "yes":
		return nil
	}
	return errors.New("nothing was changed")
}

// Completion of names. It may take a moment, never long, and stays silent when the service is away.

type completion = func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective)

func (a *app) complete(names func(*metadata.Snapshot) []cobra.Completion) completion {
	return func(c *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return a.names(c, names)
	}
}

// completeFlag is complete for a flag's value, whatever arguments stand before it.
func (a *app) completeFlag(names func(*metadata.Snapshot) []cobra.Completion) completion {
	return func(c *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		return a.names(c, names)
	}
}

func (a *app) names(c *cobra.Command,
	names func(*metadata.Snapshot) []cobra.Completion) ([]cobra.Completion, cobra.ShellCompDirective) {
	ctx := c.Context()
	if ctx == nil {
		ctx = context.Background()
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	var snap *metadata.Snapshot
	var err error
	if f := c.Flags().Lookup("metadata"); f != nil && f.Value.String() != "" && f.Value.String() != "-" {
		snap, err = a.snapshot(ctx, f.Value.String())
	} else {
		snap, err = a.client().View(ctx)
	}
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return safe(names(snap)), cobra.ShellCompDirectiveNoFileComp
}

// safe leaves out what cannot be typed, and makes the descriptions of the rest printable.
func safe(list []cobra.Completion) (out []cobra.Completion) {
	for _, c := range list {
		name, description, described := strings.Cut(c, "\t")
		switch {
		case printable.Line(name) != name:
		case described:
			out = append(out, cobra.CompletionWithDesc(name, printable.Line(description)))
		default:
			out = append(out, name)
		}
	}
	return out
}

func networkNames(s *metadata.Snapshot) (out []cobra.Completion) {
	for _, n := range s.Networks {
		out = append(out, cobra.CompletionWithDesc(n.Name, joined(n.Subnets, " ")))
	}
	return out
}

func hostNames(s *metadata.Snapshot) (out []cobra.Completion) {
	for _, h := range s.Hosts {
		desc := "no underlay address"
		if len(h.Underlay) > 0 {
			desc = h.UnderlayAddr().String()
		}
		out = append(out, cobra.CompletionWithDesc(h.Name, desc))
	}
	return out
}
