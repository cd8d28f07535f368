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

// DefaultDir is where a charon of our own has its configuration, socket and log.
const DefaultDir = "/run/lariat/ipsec"

// Charon is a charon of Lariat's own, apart from the system's: with its own configuration and socket. It
// outlives this process: the tunnels stay while the network manager is started anew, and the next Ensure
// finds it again.
type Charon struct {
	Path string // of charon-systemd or charon; "": the first of those where distributions have it
	Dir  string // "": DefaultDir
	Log  *slog.Logger

	// Prepare, when not nil, is called by Ensure before it starts one, while there is none for sure. If it fails
	// none is started.
	Prepare func(ctx context.Context) error

	// OnExit is called, by another goroutine, when a charon that this process started is gone.
	OnExit func()

	// Port and PortNATT are UDP's. 0: 500 and 4500. All hosts need the same.
	Port, PortNATT uint16

	mu      sync.Mutex    // held while one is started or stopped, which takes its time
	child   chan struct{} // closed when the one this process started is gone; nil: it started none
	stopped *atomic.Bool  // the one that was started last was asked to end

	lives   sync.Mutex // guards what follows, and is held for a moment only
	started time.Time
	short   int   // lives in a row that were short
	died    error // how the last one ended
}

// Files in the folder.
const (
	confFile   = "strongswan.conf"
	socketFile = "charon.vici"
	logFile    = "charon.log"
	lockFile   = "charon.pid"
)

// maxLog is how large the log may grow; the folder is in memory, usually.
const maxLog = 4 << 20

// candidates are where distributions have it: Debian and Ubuntu, RHEL and Fedora, Alpine and openSUSE.
// charon-systemd comes first: charon insists on being the only one of its machine.
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

// Socket is where it listens for vici.
func (c *Charon) Socket() string { return filepath.Join(c.dir(), socketFile) }

// LogFile is where it says what it does.
func (c *Charon) LogFile() string { return filepath.Join(c.dir(), logFile) }

func (c *Charon) dir() string { return cmp.Or(c.Dir, DefaultDir) }

// Running reports whether there is one, whoever started it.
func (c *Charon) Running() bool {
	f, err := c.lock()
	if err == nil {
		f.Close()
	}
	return errors.Is(err, unix.EWOULDBLOCK)
}

// Pid is the process, 0 if there is none.
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

// lock is held by charon itself, which inherits it open and never touches it, so it is free exactly when
// charon is dead: no pid has to be believed, and no two of them can ever be started.
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

// Ensure makes sure that charon runs and answers: it takes the one that runs, or starts one. One that keeps
// dying is started less and less often, and the error tells what it said last.
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

// A life shorter than this counts against it.
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
		return err // the dead one's
	}
	out, err := os.OpenFile(c.LogFile(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command(path)
	cmd.Dir = "/"
	// Nothing of this process's environment: NOTIFY_SOCKET above all, by which charon-systemd would speak to
	// systemd in our name.
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "STRONGSWAN_CONF=" + conf}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.ExtraFiles = []*os.File{lock}
	// A session of its own: what ends this process, or its terminal, is not meant for charon.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	// Its memory holds keys. It has none yet.
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

// portsFree tells of another IKE daemon, such as the system's own, which Debian starts when charon-systemd is
// installed. charon itself runs on without its ports, deaf, and says so in its log alone.
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

// ended is told of each that was started here, when it is gone. Whoever holds mu may be starting the next one
// by then; that there is none is to be known meanwhile.
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

// tail is the end of the log, as part of an error.
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

// answer waits until it listens. It is quick, but not at once.
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
		if !c.Running() { // what held the lock was about to die
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

// Stop ends it, and waits for that. It says goodbye to its peers, so their packets do not go into the void.
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
	if c.Pid() != pid { // the number may have been another's by the time it was opened
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

// hasEnded waits for a process.
func hasEnded(ctx context.Context, pidfd int, limit time.Duration) bool {
	for end := time.Now().Add(limit); time.Now().Before(end) && ctx.Err() == nil; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 100)
		if err == nil && n > 0 {
			return true
		}
	}
	return false
}

// trimLog puts a large log aside. charon appends, so an emptied file is filled from its start.
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

// config is charon's configuration.
//
// A request is repeated after 1, 1.5, 2.3, 3.4, 4 and 4 s and given up after 20: a peer that is just booting
// is found at most 4 s after it listens, and one that is dead is known for dead 20 s after DPD asked, where
// strongSwan's defaults take 165. The kernel asks for a tunnel once, and again only when it has forgotten
// that (xfrm_acq_expires): so long does it take to try again what the peer has refused.
//
// No line of the log at level 1 holds a key; from 4 on they would.
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
