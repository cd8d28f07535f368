// Package cni is the process contract of a CNI plugin (spec 0.3.1 to 1.1.0). It reads the
// environment and stdin, refuses invalid calls before anything is changed, and writes results and
// errors.
//
// It replaces the reference library's skel. That library answers an error without cniVersion, and a
// verb that was never written with success. It reports a wrong netns after the act, with a second
// document on stdout. Here the plugin writes every verb, and everything is checked first. Exactly
// one JSON document is written to stdout, even after a panic.
package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"

	"github.com/lariat-net/lariat/pkg/printable"
)

// Versions of the spec that every Lariat plugin speaks.
var Versions = []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"}

// A Plugin has the verbs of one executable. The package answers VERSION itself. A nil verb is
// answered with an error, never with success.
type Plugin struct {
	Name    string // of the executable
	Version string // of the build
	Help    string // what --help prints
	Add     func(ctx context.Context, r *Request) (*current.Result, error)
	Del     func(ctx context.Context, r *Request) error
	Check   func(ctx context.Context, r *Request) error
	Status  func(ctx context.Context, r *Request) error
	GC      func(ctx context.Context, r *Request) error
}

// Main runs the verb that the environment names and ends the process: exit code 0, or 1 with an error object on stdout.
func Main(p Plugin) {
	if len(os.Args) > 1 {
		os.Exit(p.byHand(os.Args[1:], os.Stdout, os.Stderr))
	}
	os.Exit(p.Run(os.Getenv, os.Stdin, os.Stdout, os.Stderr))
}

func (p Plugin) byHand(args []string, stdout, stderr io.Writer) int {
	switch args[0] {
	case "-h", "--help", "help":
		fmt.Fprintf(stdout, "%s %s\n\n%s", p.Name, p.Version, p.Help)
		return 0
	case "--version", "version":
		fmt.Fprintf(stdout, "%s %s, CNI %s\n", p.Name, p.Version, strings.Join(Versions, ", "))
		return 0
	}
	fmt.Fprintf(stderr, "%s: unknown argument %q; a CNI plugin is driven by CNI_COMMAND and JSON on stdin, see --help\n",
		p.Name, args[0])
	return 2
}

// Run is Main with the environment, files and exit code passed explicitly.
func (p Plugin) Run(getenv func(string) string, stdin io.Reader, stdout, stderr io.Writer) (code int) {
	start := time.Now()
	r := &Request{Command: getenv("CNI_COMMAND")}
	if r.Command == "" && !slices.ContainsFunc(variables, func(name string) bool { return getenv(name) != "" }) {
		p.about(stderr)
		return 0
	}
	result, err := p.answer(r, getenv, stdin)
	if err != nil {
		e := asError(err)
		e.CNIVersion = r.outputVersion()
		result, code = e, 1
	}
	if result != nil {
		data, merr := json.Marshal(result)
		if merr != nil { // cannot happen with these types; still write exactly one document
			data, code = fmt.Appendf(nil, `{"cniVersion":%q,"code":%d,"msg":"encode the answer: %s"}`, r.outputVersion(),
				ErrInternal, merr), 1
		}
		if _, werr := stdout.Write(append(data, '\n')); werr != nil {
			code = 1
		}
	}
	if r.Command != "VERSION" && r.Command != "STATUS" { // a runtime asks STATUS every few seconds
		outcome := "ok"
		if err != nil {
			outcome = printable.Joined(err.Error())
		}
		fmt.Fprintf(stderr, "%s: %s network=%s attachment=%s/%s took=%s: %s\n", p.Name, printable.Line(r.Command),
			printable.Line(r.Conf.Name), printable.Line(r.ContainerID), printable.Line(r.IfName),
			time.Since(start).Round(10*time.Microsecond), outcome)
	}
	return code
}

// variables lists the variables of the specification, except CNI_COMMAND.
var variables = []string{"CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS", "CNI_PATH"}

// about prints the same text as the reference plugins when they are started without a command:
// name, version, and versions of the specification. Nomad takes the first word that is a semantic
// version as the plugin's version.
func (p Plugin) about(w io.Writer) {
	fmt.Fprintf(w, "CNI %s plugin %s\nCNI protocol versions supported: %s\n",
		p.Name, semantic(p.Version), strings.Join(Versions, ", "))
}

// semantic returns the version of a build as a semantic version. The version of a build between
// releases may be only a commit. It becomes build metadata of version 0.0.0.
func semantic(version string) string {
	s := strings.TrimPrefix(version, "v")
	core, _, _ := strings.Cut(s, "-")
	core, _, _ = strings.Cut(core, "+")
	parts := strings.Split(core, ".")
	number := func(p string) bool {
		return p != "" && strings.Trim(p, "0123456789") == "" && (p == "0" || p[0] != '0')
	}
	if len(parts) == 3 && number(parts[0]) && number(parts[1]) && number(parts[2]) {
		return "v" + s
	}
	build := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, version)
	return strings.TrimSuffix("v0.0.0+"+build, "+")
}

// answer runs the verb. A nil result with a nil error means that the verb has no output.
func (p Plugin) answer(r *Request, getenv func(string) string, stdin io.Reader) (result any, err error) {
	defer func() {
		if v := recover(); v != nil {
			err = &Error{Code: ErrInternal, Msg: fmt.Sprintf("%s panicked: %v", p.Name, v), Details: string(debug.Stack())}
		}
	}()
	switch r.Command {
	case "":
		return nil, Errorf(ErrEnvironment, "CNI_COMMAND is not set; this is a CNI plugin, see --help")
	case "VERSION":
		return p.version(r, stdin)
	}
	if err := r.read(getenv, stdin); err != nil {
		return nil, err
	}
	ctx := context.Background()
	switch r.Command {
	case "ADD":
		if p.Add == nil {
			return nil, notImplemented(r)
		}
		res, err := p.Add(ctx, r)
		if err != nil {
			return nil, err
		}
		return render(res, r.Conf.CNIVersion)
	case "DEL":
		return nil, run(ctx, p.Del, r)
	case "CHECK":
		return nil, run(ctx, p.Check, r)
	case "STATUS":
		return nil, run(ctx, p.Status, r)
	case "GC":
		return nil, run(ctx, p.GC, r)
	}
	return nil, Errorf(ErrEnvironment, "CNI_COMMAND %q is unknown; want ADD, DEL, CHECK, STATUS, GC or VERSION", r.Command)
}

func run(ctx context.Context, verb func(context.Context, *Request) error, r *Request) error {
	if verb == nil {
		return notImplemented(r)
	}
	return verb(ctx, r)
}

func notImplemented(r *Request) error {
	return Errorf(ErrUnsupportedField, "%s is not implemented by this plugin", r.Command)
}

func (p Plugin) version(r *Request, stdin io.Reader) (any, error) {
	// The spec requires a configuration here. Older runtimes send none, and people just press
	// control-D.
	data, err := io.ReadAll(stdin)
	if err != nil {
		return nil, wrap(ErrIO, err, "read the configuration from stdin")
	}
	var conf struct {
		CNIVersion string `json:"cniVersion"`
	}
	if len(bytes.TrimSpace(data)) > 0 {
		if err := json.Unmarshal(data, &conf); err != nil {
			return nil, decodeError(data, err)
		}
	}
	r.Conf.CNIVersion = conf.CNIVersion
	return struct {
		CNIVersion        string   `json:"cniVersion"`
		SupportedVersions []string `json:"supportedVersions"`
	}{r.outputVersion(), Versions}, nil
}

// Error codes of the spec, and of the reference library where the spec has none.
const (
	ErrIncompatibleVersion = 1
	ErrUnsupportedField    = 2
	ErrUnknownContainer    = 3
	ErrEnvironment         = 4
	ErrIO                  = 5
	ErrDecode              = 6
	ErrConfig              = 7
	ErrNetns               = 8
	ErrTryAgain            = 11
	ErrNotAvailable        = 50 // STATUS: an ADD would fail
	ErrLimited             = 51 // STATUS: also, running containers may have lost connectivity
	ErrAddressHeld         = 101
	ErrExhausted           = 102
	ErrDiffers             = 103 // CHECK: the state differs from the result
	ErrKernel              = 104
	ErrMetadata            = 105
	ErrInternal            = 999
)

// Error is the error object of the spec.
type Error struct {
	CNIVersion string `json:"cniVersion"`
	Code       uint   `json:"code"`
	Msg        string `json:"msg"`
	Details    string `json:"details,omitempty"`

	cause error
}

func (e *Error) Error() string {
	if e.Details == "" {
		return e.Msg
	}
	return e.Msg + "; " + e.Details
}

// Unwrap returns the cause of the error.
func (e *Error) Unwrap() error { return e.cause }

// Errorf returns an error with a code.
func Errorf(code uint, format string, a ...any) *Error {
	err := fmt.Errorf(format, a...)
	return &Error{Code: code, Msg: err.Error(), cause: err}
}

func wrap(code uint, err error, doing string) *Error {
	return &Error{Code: code, Msg: doing + ": " + err.Error(), cause: err}
}

// WithDetails adds the remedy.
func (e *Error) WithDetails(format string, a ...any) *Error {
	e.Details = fmt.Sprintf(format, a...)
	return e
}

func asError(err error) *Error {
	var e *Error
	if !errors.As(err, &e) {
		if te := (*types.Error)(nil); errors.As(err, &te) { // from a delegate
			return &Error{Code: te.Code, Msg: err.Error(), Details: te.Details, cause: err}
		}
		return &Error{Code: ErrInternal, Msg: err.Error(), cause: err}
	}
	c := *e
	if front := err.Error(); front != e.Error() { // a wrapper added a prefix
		c.Msg = strings.TrimSuffix(front, "; "+e.Details)
	}
	return &c
}

// decodeError adds the position of the mistake in the document.
func decodeError(data []byte, err error) *Error {
	var syntax *json.SyntaxError
	if errors.As(err, &syntax) {
		line := 1 + bytes.Count(data[:min(int(syntax.Offset), len(data))], []byte{'\n'})
		return Errorf(ErrDecode, "configuration on stdin is not JSON: line %d, offset %d: %w", line, syntax.Offset, err)
	}
	var typ *json.UnmarshalTypeError
	if errors.As(err, &typ) {
		return Errorf(ErrConfig, "key %q: a %s is not a %s", typ.Field, typ.Value, typ.Type)
	}
	return wrap(ErrDecode, err, "configuration on stdin")
}

func (r *Request) outputVersion() string {
	if slices.Contains(Versions, r.Conf.CNIVersion) {
		return r.Conf.CNIVersion
	}
	return Versions[len(Versions)-1]
}
