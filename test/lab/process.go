package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containernetworking/cni/pkg/types"
)

// Process is a program that stays up, in a namespace.
type Process struct {
	Name string
	cmd  *exec.Cmd
	log  *tail
	done chan struct{}
	err  error
}

// tail keeps what a process said last.
type tail struct {
	mu  sync.Mutex
	buf bytes.Buffer
	to  io.Writer
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf.Write(p)
	if over := t.buf.Len() - 64<<10; over > 0 {
		t.buf.Next(over)
	}
	if t.to != nil {
		t.to.Write(p)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.buf.String()
}

// Start runs a program in the namespace and waits until it says READY=1 by sd_notify, as it would to systemd.
func (n Netns) Start(ctx context.Context, dir string, log io.Writer, args ...string) (*Process, error) {
	p := &Process{Name: n.Name + " " + filepath.Base(args[0]), log: &tail{to: log}, done: make(chan struct{})}
	socket := filepath.Join(dir, "notify-"+filepath.Base(args[0]))
	os.Remove(socket)
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		return nil, err
	}
	defer os.Remove(socket)
	defer notify.Close()
	p.cmd = exec.Command(args[0], args[1:]...)
	p.cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+socket)
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error, 1)
	go n.Do(func() error {
		err := p.cmd.Start()
		started <- err
		if err != nil {
			return nil
		}
		p.err = p.cmd.Wait() // on this thread: it must outlive the process, whose death signal hangs on it
		close(p.done)
		notify.SetReadDeadline(time.Unix(1, 0))
		return nil
	})
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", p.Name, err)
	}
	deadline := time.Now().Add(60 * time.Second)
	if d, ok := ctx.Deadline(); ok {
		deadline = d
	}
	notify.SetReadDeadline(deadline)
	buf := make([]byte, 4096)
	for {
		k, err := notify.Read(buf)
		if err != nil {
			select {
			case <-p.done:
				return nil, fmt.Errorf("%s ended before it was ready: %w\n%s", p.Name, p.err, p.log)
			default:
			}
			p.Kill()
			return nil, fmt.Errorf("%s was not ready in time: %w\n%s", p.Name, err, p.log)
		}
		if strings.Contains(string(buf[:k]), "READY=1") {
			return p, nil
		}
	}
}

// Stop asks the process to end and waits for it.
func (p *Process) Stop() error {
	if p == nil {
		return nil
	}
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(20 * time.Second):
		p.Kill()
		return fmt.Errorf("%s did not stop within 20 s:\n%s", p.Name, p.log)
	}
	var exit *exec.ExitError
	if errors.As(p.err, &exit) && exit.ExitCode() != 0 {
		return fmt.Errorf("%s: %w\n%s", p.Name, p.err, p.log)
	}
	return nil
}

// Kill ends the process as kill -9 does.
func (p *Process) Kill() {
	if p == nil {
		return
	}
	p.cmd.Process.Kill()
	<-p.done
}

// Pid of the process.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Log is what it said last.
func (p *Process) Log() string { return p.log.String() }

// Output runs a program in the namespace to its end and returns its standard output.
func (n Netns) Output(ctx context.Context, args ...string) (string, error) {
	var out, errs bytes.Buffer
	err := n.Do(func() error {
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.Stdout, cmd.Stderr = &out, &errs
		return cmd.Run()
	})
	if err != nil {
		return out.String(), fmt.Errorf("%s in %s: %w: %s", strings.Join(args, " "), n.Name, err,
			strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

// Exec runs a CNI plugin in the namespace with stdin and environment, and returns its standard output. A CNI
// error object comes back as *types.Error.
func (n Netns) Exec(ctx context.Context, path, stdin string, env ...string) (string, error) {
	var out, errs bytes.Buffer
	err := n.Do(func() error {
		cmd := exec.CommandContext(ctx, path)
		cmd.Env = append(os.Environ(), env...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
		return cmd.Run()
	})
	if err == nil {
		return out.String(), nil
	}
	var e types.Error
	if json.Unmarshal(out.Bytes(), &e) == nil && e.Code != 0 {
		return out.String(), &e
	}
	return out.String(), fmt.Errorf("%s: %w: %s%s", path, err, out.String(), errs.String())
}
