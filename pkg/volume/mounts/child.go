package mounts

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/lariat-net/lariat/pkg/volume"
)

// argv0 marks a child process. Callers of a driver choose its arguments, but cannot choose argv[0].
const argv0 = "lariat-volume-child"

// tasks maps names to the tasks that a child can run.
var tasks = map[string]func(args []byte) (any, error){}

// Task registers a task for children, at the start of the program. It returns a function that runs
// the task in a child until the context ends. The arguments travel through a pipe, because every
// user can read argv. The error of a task keeps its kind (volume.ErrConflict …) or its errno on the
// way.
func Task[A, R any](name string, task func(A) (R, error)) func(context.Context, A) (R, error) {
	return register(name, 0, task)
}

// PrivateTask is a Task in a mount namespace of its own. Its mounts are visible nowhere else. They
// vanish when the task ends, even by a kill.
func PrivateTask[A, R any](name string, task func(A) (R, error)) func(context.Context, A) (R, error) {
	return register(name, syscall.CLONE_NEWNS, task)
}

func register[A, R any](name string, unshare uintptr, task func(A) (R, error)) func(context.Context, A) (R, error) {
	if tasks[name] != nil {
		panic("mounts: two tasks are called " + name)
	}
	tasks[name] = func(data []byte) (any, error) {
		var args A
		if err := json.Unmarshal(data, &args); err != nil {
			return nil, fmt.Errorf("arguments of %s: %w", name, err)
		}
		return task(args)
	}
	return func(ctx context.Context, args A) (R, error) {
		var r R
		data, err := json.Marshal(args)
		if err != nil {
			return r, err
		}
		cmd := exec.Command("/proc/self/exe")
		cmd.Args = []string{argv0, name}
		cmd.Stdin = bytes.NewReader(data)
		said, err := run(ctx, cmd, unshare, &r)
		if err != nil && said != "" && !errors.As(err, new(*answer)) {
			err = fmt.Errorf("%s", said) // the words of an executed program explain more than its exit status
			if ctx.Err() != nil {
				err = fmt.Errorf("%w (%s)", context.Cause(ctx), said)
			}
		}
		return r, err
	}
}

// answer is the message that a child writes to descriptor 3. As an error, answer is the error that
// the task returned.
type answer struct {
	Reply json.RawMessage `json:"reply,omitempty"`
	Text  string          `json:"error,omitempty"`
	Kind  int             `json:"kind,omitempty"`  // index in kinds, from 1
	Errno syscall.Errno   `json:"errno,omitempty"` // the errno inside the error
}

var kinds = []error{volume.ErrNotSupported, volume.ErrInvalid, volume.ErrConflict, volume.ErrNotFound, volume.ErrInUse}

func (a *answer) Error() string { return a.Text }

func (a *answer) Unwrap() []error {
	var causes []error
	if a.Kind > 0 && a.Kind <= len(kinds) {
		causes = append(causes, kinds[a.Kind-1])
	}
	if a.Errno != 0 {
		causes = append(causes, a.Errno)
	}
	return causes
}

// RunChild runs the task and ends the process, if this process is a child. Otherwise RunChild
// returns. Every program that calls a driver in its own process must call RunChild first in main.
// flex.Main does so.
func RunChild() {
	if len(os.Args) != 2 || os.Args[0] != argv0 || tasks[os.Args[1]] == nil {
		return
	}
	out := os.NewFile(3, "answer")
	syscall.CloseOnExec(3)
	var a answer
	args, err := io.ReadAll(os.Stdin)
	if err == nil {
		var reply any
		if reply, err = tasks[os.Args[1]](args); err == nil {
			a.Reply, err = json.Marshal(reply)
		}
	}
	code := 0
	if err != nil {
		code, a.Text = 1, err.Error()
		for i, kind := range kinds {
			if errors.Is(err, kind) {
				a.Kind = i + 1
			}
		}
		errors.As(err, &a.Errno)
	}
	if err := json.NewEncoder(out).Encode(a); err != nil {
		code = 2
	}
	exit(code)
}

// exit ends a child at once, because the rest of main is not for a child.
func exit(code int) { syscall.Exit(code) }

// grace is the time in which a killed process must end. A process that does not end is blocked in
// the kernel, where no signal reaches it.
const grace = 3 * time.Second

// Run runs a command that dies with the context and with this process. It replaces the output
// streams of cmd. It returns standard output and standard error, each up to a mebibyte.
func Run(ctx context.Context, cmd *exec.Cmd) (stdout []byte, stderr string, err error) {
	var out, words limited
	cmd.Stdout, cmd.Stderr = &out, &words
	_, err = run(ctx, cmd, 0, nil)
	return out.raw(), words.String(), err
}

// run is Run for children. It also reads a child's answer, and joins both output streams unless cmd
// has its own.
func run(ctx context.Context, cmd *exec.Cmd, unshare uintptr, reply any) (said string, err error) {
	if err := ctx.Err(); err != nil {
		return "", context.Cause(ctx)
	}
	var words, ans limited
	if cmd.Stdout == nil {
		cmd.Stdout, cmd.Stderr = &words, &words
	}
	if cmd.Env == nil {
		cmd.Env = os.Environ()
	}
	cmd.Env = append(cmd.Env, "LC_ALL=C")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL, Unshareflags: unshare}
	cmd.WaitDelay = time.Second // for processes that outlive the command and hold its pipes open
	r, w, err := os.Pipe()
	if err != nil {
		return "", err
	}
	defer r.Close()
	cmd.ExtraFiles = []*os.File{w}

	started, ended, read := make(chan error, 1), make(chan struct{}), make(chan struct{})
	var werr error // the command's error, valid after the end
	go func() {
		// The kernel sends the death signal when the thread that started the process ends, not when
		// this process ends.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		w.Close()
		started <- err
		if err == nil {
			// ErrWaitDelay means that the command succeeded. A process that it left behind, or a
			// busy machine, keeps the pipes open.
			if werr = cmd.Wait(); errors.Is(werr, exec.ErrWaitDelay) {
				werr = nil
			}
			close(ended)
		}
	}()
	if err := <-started; err != nil {
		return "", fmt.Errorf("start a child: %w", err)
	}
	go func() {
		defer close(read)
		_, _ = io.Copy(&ans, r)
	}()
	select {
	case <-ended:
	case <-ctx.Done():
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		late := time.NewTimer(grace)
		defer late.Stop()
		select {
		case <-ended: // either killed or just finished: there is no way to know which
			return words.String(), context.Cause(ctx)
		case <-late.C:
			return words.String(), fmt.Errorf("%w; process %d is stuck in the kernel", context.Cause(ctx), cmd.Process.Pid)
		}
	}
	// Kill all processes that the command left behind.
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	_ = r.SetReadDeadline(time.Now().Add(time.Second))
	<-read
	if text := ans.raw(); len(text) > 0 {
		var a answer
		if err := json.Unmarshal(text, &a); err != nil {
			return words.String(), fmt.Errorf("answer of a child: %w", err)
		}
		if a.Text != "" {
			return words.String(), &a
		}
		if reply != nil {
			return words.String(), json.Unmarshal(a.Reply, reply)
		}
		return words.String(), nil
	}
	return words.String(), werr
}

// limited collects the output of a process up to maxSaid bytes.
type limited struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

const maxSaid = 1 << 20

// Write never fails, so that a talkative process is not stopped by its own output.
func (l *limited) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if room := maxSaid - l.buf.Len(); room > 0 {
		l.buf.Write(p[:min(len(p), room)])
	}
	return len(p), nil
}

func (l *limited) raw() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Clone(l.buf.Bytes())
}

// String returns the output as one line for a message.
func (l *limited) String() string {
	text := strings.TrimSpace(string(l.raw()))
	if len(text) > 2000 {
		text = text[:2000] + "…"
	}
	lines := strings.FieldsFunc(text, func(r rune) bool { return r == '\n' || r == '\r' })
	for i := range lines {
		lines[i] = strings.TrimSpace(lines[i])
	}
	return strings.Join(lines, "; ")
}
