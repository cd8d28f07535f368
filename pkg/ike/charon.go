package ike

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/private"
)

// DefaultDir is the directory of the configuration, socket and log of Lariat's own charon.
const DefaultDir = "/run/lariat/ipsec"

// A Charon is Lariat's own charon, separate from the system's.
// It has its own configuration and socket. charon outlives this process.
// The tunnels remain while the network manager restarts.
// The next Ensure finds the running charon.
type Charon struct {
	Path string // of charon-systemd or charon; "": the first of candidates that exists
	Dir  string // "": DefaultDir
	Log  *slog.Logger

	// Ensure calls Prepare, when not nil, before it starts charon. No charon runs at that time.
	// If Prepare fails, Ensure starts no charon.
	Prepare func(ctx context.Context) error

	// Another goroutine calls OnExit when a charon of this process has ended.
	OnExit func()

	// Port and PortNATT are UDP ports. 0: 500 and 4500. All hosts need the same ports.
	Port, PortNATT uint16

	mu      sync.Mutex    // held during a start or stop, which may take long
	child   chan struct{} // closed when this process's charon has ended; nil: this process started none
	stopped *atomic.Bool  // Stop has ended the last charon

	lives   sync.Mutex // guards the fields below, and is held only briefly
	started time.Time
	short   int   // number of short lives in a row
	died    error // how the last charon ended
}

// These are the files in the directory.
const (
	confFile   = "strongswan.conf"
	socketFile = "charon.vici"
	logFile    = "charon.log"
	lockFile   = "charon.pid"
)

// maxLog is the maximal size of the log in bytes. The directory is usually in memory.
const maxLog = 4 << 20

// candidates are the paths of charon in distributions: Debian and Ubuntu, RHEL and Fedora, Alpine
// and openSUSE. charon-systemd comes first, because charon refuses to run twice on a machine.
var candidates = []string{
	"/usr/sbin/charon-systemd", "/usr/bin/charon-systemd", "/usr/local/sbin/charon-systemd",
	"/usr/lib/ipsec/charon", "/usr/libexec/ipsec/charon", "/usr/libexec/strongswan/charon", "/usr/lib/strongswan/charon",
	"/usr/local/libexec/ipsec/charon",
}

// FindCharon returns the path of the IKE daemon's executable.
func FindCharon() (string, error) {
	for _, p := range candidates {
		if fi, err := os.Stat(p); err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 {
			return p, nil
		}
	}
	for _, name := range []string{"charon-systemd", "charon"} {
		if p, err := exec.LookPath(name); err == nil {
			return p, nil
		}
	}
	return "", errors.New("charon-systemd is not installed; on Debian: apt-get install charon-systemd; or have the " +
		"system's own charon used")
}

// Socket returns the path of charon's vici socket.
func (c *Charon) Socket() string { return filepath.Join(c.dir(), socketFile) }

// LogFile returns the path of charon's log.
func (c *Charon) LogFile() string { return filepath.Join(c.dir(), logFile) }

func (c *Charon) dir() string { return cmp.Or(c.Dir, DefaultDir) }

// Running reports whether a charon runs. Any process may have started it.
func (c *Charon) Running() bool {
	f, err := c.lock()
	if err == nil {
		f.Close()
	}
	return errors.Is(err, unix.EWOULDBLOCK)
}

// Pid returns charon's process id, or 0 when no charon runs.
func (c *Charon) Pid() int {
	if !c.Running() {
		return 0
	}
	text, err := os.ReadFile(filepath.Join(c.dir(), lockFile))
	if err != nil {
		return 0
	}
	pid, _ := strconv.Atoi(strings.TrimSpace(string(text)))
	return pid
}

// lock takes the lock file. charon inherits the open lock file and never uses it.
// Therefore the lock is free exactly when no charon runs.
// Lariat need not trust a pid, and can never start two charons.
func (c *Charon) lock() (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(c.dir(), lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Ensure makes sure that charon runs and answers. It uses a running charon or starts one.
// It starts a charon that repeatedly dies with back-off.
// The error then holds the last lines of charon's log.
func (c *Charon) Ensure(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := os.MkdirAll(c.dir(), 0o700); err != nil {
		return fmt.Errorf("charon: %w", err)
	}
	if err := os.Chmod(c.dir(), 0o700); err != nil {
		return fmt.Errorf("charon: %w", err)
	}
	if err := c.trimLog(); err != nil {
		return fmt.Errorf("charon's log: %w", err)
	}
	lock, err := c.lock()
	switch {
	case errors.Is(err, unix.EWOULDBLOCK):
		return c.answer(ctx)
	case err != nil:
		return fmt.Errorf("charon: %w", err)
	}
	defer lock.Close()
	if wait, died := c.backOff(); wait > 0 {
		return fmt.Errorf("%w; started again in %s", died, wait.Round(time.Second))
	}
	if c.Prepare != nil {
		if err := c.Prepare(ctx); err != nil {
			return fmt.Errorf("before charon is started: %w", err)
		}
	}
	if err := c.start(lock); err != nil {
		return fmt.Errorf("start charon: %w", err)
	}
	return c.answer(ctx)
}

// shortLife is the limit below which a life of charon counts for the back-off.
const shortLife = 10 * time.Second

func (c *Charon) backOff() (time.Duration, error) {
	c.lives.Lock()
	defer c.lives.Unlock()
	if c.short == 0 {
		return 0, nil
	}
	return time.Until(c.started.Add(min(250*time.Millisecond<<min(c.short, 10), 30*time.Second))), c.died
}

func (c *Charon) start(lock *os.File) error {
	path := c.Path
	if path == "" {
		var err error
		if path, err = FindCharon(); err != nil {
			return err
		}
	}
	if err := c.portsFree(); err != nil {
		return err
	}
	conf := filepath.Join(c.dir(), confFile)
	if err := private.Rewrite(conf, []byte(c.config())); err != nil {
		return err
	}
	if err := os.Remove(c.Socket()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err // the socket of the earlier charon
	}
	out, err := os.OpenFile(c.LogFile(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command(path)
	cmd.Dir = "/"
	// Do not pass on this process's environment.
	// With NOTIFY_SOCKET charon-systemd would notify systemd in place of this process.
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "STRONGSWAN_CONF=" + conf}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.ExtraFiles = []*os.File{lock}
	// Use a new session: signals for this process or its terminal must not reach charon.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	// Disable core dumps, because charon's memory holds keys. It holds none yet.
	if err := unix.Prlimit(cmd.Process.Pid, unix.RLIMIT_CORE, &unix.Rlimit{}, nil); err != nil {
		c.say(slog.LevelWarn, "charon may dump core, with its keys", "error", err)
	}
	begun, stopped := time.Now(), new(atomic.Bool)
	c.stopped = stopped
	c.lives.Lock()
	c.started = begun
	c.lives.Unlock()
	if err := errors.Join(lock.Truncate(0), writeAt(lock, strconv.Itoa(cmd.Process.Pid)+"\n")); err != nil {
		c.say(slog.LevelWarn, "charon's pid is not written down", "error", err)
	}
	c.say(slog.LevelInfo, "charon started", "pid", cmd.Process.Pid, "path", path)
	gone := make(chan struct{})
	c.child = gone
	go func() {
		err := cmd.Wait()
		close(gone)
		c.ended(begun, stopped, err)
	}()
	return nil
}

// portsFree returns an error when another IKE daemon has the ports.
// For example, Debian starts the system's own daemon at the installation of charon-systemd.
// charon itself runs without its ports, receives nothing, and reports this only in its log.
func (c *Charon) portsFree() error {
	for _, port := range []uint16{cmp.Or(c.Port, 500), cmp.Or(c.PortNATT, 4500)} {
		l, err := net.ListenUDP("udp", &net.UDPAddr{Port: int(port)})
		switch {
		case err == nil:
			_ = l.Close()
		case errors.Is(err, unix.EADDRINUSE):
			return fmt.Errorf("UDP port %d is taken by another IKE daemon; stop it (systemctl disable --now strongswan), "+
				"or have it used in place of one of our own", port)
		}
	}
	return nil
}

func writeAt(f *os.File, text string) error {
	_, err := f.WriteAt([]byte(text), 0)
	return err
}

// ended records the end of a charon that this process started.
// It does not take mu, because the holder of mu may be starting the next charon.
func (c *Charon) ended(begun time.Time, stopped *atomic.Bool, how error) {
	if stopped.Load() {
		return
	}
	what := "ended"
	if how != nil {
		what = how.Error()
	}
	died := fmt.Errorf("charon is gone: %s%s", what, c.tail())
	c.say(slog.LevelError, "charon is gone", "how", what)
	c.lives.Lock()
	c.died = died
	if time.Since(begun) < shortLife {
		c.short++
	} else {
		c.short = 0
	}
	c.lives.Unlock()
	if c.OnExit != nil {
		c.OnExit()
	}
}

// tail returns the last lines of the log, as part of an error.
func (c *Charon) tail() string {
	text, err := os.ReadFile(c.LogFile())
	if err != nil {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	if lines = lines[max(0, len(lines)-3):]; lines[0] == "" {
		return ""
	}
	return "; its last words: " + strings.Join(lines, " | ")
}

// answer waits until charon listens. charon needs a moment after its start.
func (c *Charon) answer(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", c.Socket())
		if err == nil {
			return conn.Close()
		}
		if !c.Running() { // the holder of the lock has ended
			return fmt.Errorf("charon is gone%s", c.tail())
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("charon does not listen at %s: %w%s", c.Socket(), err, c.tail())
		case <-c.child:
			c.child = nil
			return fmt.Errorf("charon ended as soon as it was started%s", c.tail())
		case <-again.C:
		}
	}
}

// Stop ends charon and waits for its end.
// charon informs its peers, so that they do not send packets to a dead tunnel.
func (c *Charon) Stop(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	pid := c.Pid()
	if pid == 0 {
		return nil
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		if errors.Is(err, unix.ESRCH) {
			return nil
		}
		return fmt.Errorf("stop charon: %w", err)
	}
	defer unix.Close(fd)
	if c.Pid() != pid { // another process may have the pid by now
		return nil
	}
	if c.stopped != nil {
		c.stopped.Store(true)
	}
	for _, s := range []struct {
		signal unix.Signal
		wait   time.Duration
	}{{unix.SIGTERM, 5 * time.Second}, {unix.SIGKILL, 5 * time.Second}} {
		if err := unix.PidfdSendSignal(fd, s.signal, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("stop charon: %w", err)
		}
		if hasEnded(ctx, fd, s.wait) {
			c.lives.Lock()
			c.short = 0
			c.lives.Unlock()
			c.say(slog.LevelInfo, "charon stopped", "pid", pid)
			return nil
		}
	}
	return fmt.Errorf("stop charon: process %d does not end", pid)
}

// hasEnded waits for the end of a process and reports whether it ended within limit.
func hasEnded(ctx context.Context, pidfd int, limit time.Duration) bool {
	for end := time.Now().Add(limit); time.Now().Before(end) && ctx.Err() == nil; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 100)
		if err == nil && n > 0 {
			return true
		}
	}
	return false
}

// trimLog moves the newer half of a large log to another file and empties the log.
// charon appends, so its next write starts at the beginning of the empty file.
func (c *Charon) trimLog() error {
	fi, err := os.Stat(c.LogFile())
	if err != nil || fi.Size() < maxLog {
		if errors.Is(err, os.ErrNotExist) {
			err = nil
		}
		return err
	}
	text, err := os.ReadFile(c.LogFile())
	if err != nil {
		return err
	}
	if i := bytes.IndexByte(text[len(text)/2:], '\n'); i >= 0 {
		text = text[len(text)/2+i+1:]
	}
	return errors.Join(private.Rewrite(c.LogFile()+".1", text), os.Truncate(c.LogFile(), 0))
}

func (c *Charon) say(level slog.Level, msg string, args ...any) {
	if c.Log != nil {
		c.Log.Log(context.Background(), level, msg, args...)
	}
}

// config returns charon's configuration.
//
// charon retries a request after 1, 1.5, 2.3, 3.4, 4 and 4 s, and gives up after 20 s.
// Therefore charon finds a booting peer at most 4 s after the peer listens.
// charon detects a dead peer 20 s after a DPD request. strongSwan's defaults take 165 s.
// The kernel requests a tunnel once, and again only after xfrm_acq_expires.
// A tunnel that the peer has refused is retried after that time.
//
// At level 1 no line of the log holds a key. From level 4 on the log would hold keys.
func (c *Charon) config() string {
	return fmt.Sprintf(`# Written by lariat-network-manager each time it starts charon; changes are lost.
charon {
  load = random nonce x509 pubkey pkcs1 pkcs8 pem openssl aes sha1 sha2 hmac kdf gcm curve25519 constraints kernel-netlink socket-default vici
  port = %d
  port_nat_t = %d

  # The routes are Lariat's own.
  install_routes = no
  install_virtual_ip = no

  make_before_break = yes
  ignore_acquire_ts = yes
  retransmit_timeout = 1
  retransmit_base = 1.5
  retransmit_limit = 4
  retransmit_tries = 6
  send_vendor_id = no

  # For some hundreds of peers.
  ikesa_table_size = 256
  ikesa_table_segments = 16

  plugins {
    vici {
      socket = unix://%s
    }
    kernel-netlink {
      xfrm_acq_expires = 2
    }
  }
  filelog {
    lariat {
      path = %s
      append = yes
      flush_line = yes
      time_format = %%Y-%%m-%%dT%%H:%%M:%%S
      default = 1
      enc = 0
      net = 0
    }
  }
  journal {
    default = -1
  }
}
`, cmp.Or(c.Port, 500), cmp.Or(c.PortNATT, 4500), c.Socket(), c.LogFile())
}
