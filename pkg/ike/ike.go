// Package ike keeps an IKE daemon, strongSwan's charon, equal to the planned tunnels.
// It uses vici, the daemon's own protocol, and can start and supervise the daemon.
//
// Package ike changes only objects with Lariat's prefix.
// The system's own connections, keys and certificates may be in the same daemon.
// Package ike caches the loaded objects as long as the connection to the daemon lasts.
// Therefore it sends no commands while nothing changes.
// A restarted daemon has lost all objects, and the restart also ends the connection.
//
// Package ike has no routes or rules. Without it the kernel drops packets of encrypted networks.
package ike

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/strongswan/govici/vici"

	"github.com/lariat-net/lariat/pkg/ipsec"
)

// SystemSocket is the vici socket of the system's own charon.
const SystemSocket = "/var/run/charon.vici"

// ErrTooOld is wrapped when the daemon is older than 5.9.
var ErrTooOld = errors.New("strongSwan is too old")

var errNotConnected = errors.New("IKE daemon: not connected")

// A Daemon is an IKE daemon behind its socket. It connects on demand and keeps the connection.
type Daemon struct {
	Socket string       // the vici socket; "": SystemSocket
	Log    *slog.Logger // nil: no log

	// Another goroutine calls Notify when a tunnel came up or failed.
	// Another goroutine calls Gone when the connection to the daemon has ended for any reason.
	// Notify and Gone must not block.
	Notify, Gone func()

	// ReauthOnRotation makes established tunnels reauthenticate when the key to send has changed.
	// Otherwise a tunnel uses the new key at its next setup, and established SAs remain.
	// Their own keys derive from Diffie-Hellman, not from that key.
	// A reauthentication makes new SAs before it ends the old ones.
	// But the peer uses the new SAs as soon as the peer has them.
	// This end loses the packets that arrive before it has the new SAs: some milliseconds' worth.
	ReauthOnRotation bool

	// Timeout limits one command. 0: 20 seconds.
	Timeout time.Duration

	calls atomic.Uint64

	mu      sync.Mutex // held during a command
	session *session
	events  *vici.Session
	ended   chan struct{} // closed when events is
	version string
	have    map[string]held
	private string   // id of the loaded private key
	digest  [32]byte // digest of the loaded private key

	errMu sync.Mutex
	errs  map[string]Failure
}

// A Failure is the last failure of a tunnel.
type Failure struct {
	Text string
	At   time.Time
}

// Calls returns the number of commands that were sent to the daemon.
func (d *Daemon) Calls() uint64 { return d.calls.Load() }

// Version returns the daemon's name and version at the last connection, such as "strongSwan 5.9.8".
// It returns an empty string when there was no connection yet.
func (d *Daemon) Version() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.version
}

// Close ends the connection. The daemon keeps its objects.
func (d *Daemon) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.drop()
	return nil
}

// Apply makes Lariat's connections and keys in the daemon equal to want.
// It returns its changes as lines for the log.
// The error names tunnels that cannot be loaded. The next Apply retries them.
// A failed tunnel does not affect other tunnels.
//
// Apply sends no commands when want and creds are unchanged.
// With verify it lists connections, keys, traps and SAs.
// It then repairs objects that somebody else has removed or added under Lariat's prefix.
func (d *Daemon) Apply(ctx context.Context, want []ipsec.Tunnel, creds Credentials,
	verify bool) (changed []string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	fresh, err := d.connect(ctx)
	if err != nil {
		return nil, err
	}
	if line, err := d.loadPrivate(ctx, want, creds); err != nil {
		return nil, err
	} else if line != "" {
		changed = append(changed, line)
	}
	wishes := map[string]wish{}
	var errs []error
	for _, t := range want {
		conn := connection(t, creds)
		ks, err := keys(t, creds)
		if err != nil {
			errs = append(errs, err)
			ks = d.have[t.Name].keys // keep the old keys
		}
		wishes[t.Name] = wish{tunnel: t, conn: conn, text: conn.String(), keys: ks}
	}
	var seen *observed
	if fresh || verify {
		if seen, err = d.observe(ctx); err != nil {
			return changed, err
		}
		d.forget(seen)
	}
	todo := steps(wishes, d.have, seen)
	failed := map[string]bool{}
	for _, s := range todo {
		if s.cmd == "rekey" && !d.ReauthOnRotation {
			continue
		}
		if failed[s.tunnel] && s.tunnel != "" {
			continue
		}
		_, err := d.call(ctx, s.cmd, s.args)
		switch {
		case err == nil:
			if s.line != "" {
				changed = append(changed, s.line)
			}
		case s.soft && missing(err):
		default:
			failed[s.tunnel] = true
			errs = append(errs, explain(s, err))
		}
		if d.session == nil {
			return changed, errors.Join(errs...)
		}
	}
	// The daemon loads a connection even when it cannot install the traps.
	// Only the list of traps shows this failure.
	if slices.ContainsFunc(todo, func(s step) bool { return s.cmd == "load-conn" }) {
		errs = append(errs, d.checkTraps(ctx, wishes, failed)...)
	}
	if d.session == nil {
		return changed, errors.Join(errs...)
	}
	for name, w := range wishes {
		switch {
		case failed[name]:
			// The daemon's objects are unknown: the next Apply loads all of them again.
			d.have[name] = held{tunnel: d.have[name].tunnel, keys: d.have[name].keys}
		default:
			d.have[name] = held{tunnel: w.tunnel, conn: w.text, keys: w.keys}
		}
	}
	for name := range d.have {
		if _, wanted := wishes[name]; !wanted && !failed[name] {
			delete(d.have, name)
		}
	}
	d.errMu.Lock()
	maps.DeleteFunc(d.errs, func(name string, _ Failure) bool { _, wanted := wishes[name]; return !wanted })
	d.errMu.Unlock()
	return changed, errors.Join(errs...)
}

// explain adds the purpose of a command and a remedy to its error.
func explain(s step, err error) error {
	switch s.cmd {
	case "load-conn":
		return fmt.Errorf("load connection %s: %w; charon's plugins may lack a suite: see its log", s.tunnel, err)
	case "load-shared":
		return fmt.Errorf("load a key of %s: %w", s.tunnel, err)
	case "install":
		return fmt.Errorf("install the trap of %s: %w; does the kernel have ESP and XFRM? charon's log says more", s.tunnel,
			err)
	}
	if s.tunnel == "" {
		return fmt.Errorf("%s: %w", s.cmd, err)
	}
	return fmt.Errorf("%s %s: %w", s.cmd, s.tunnel, err)
}

// checkTraps checks that every child has a trap, and installs missing traps.
func (d *Daemon) checkTraps(ctx context.Context, wishes map[string]wish, failed map[string]bool) (errs []error) {
	traps, err := d.traps(ctx)
	if err != nil {
		return []error{err}
	}
	for _, name := range slices.Sorted(maps.Keys(wishes)) {
		if failed[name] {
			continue
		}
		for _, c := range wishes[name].tunnel.Children {
			if traps[name+"/"+c.Network] {
				continue
			}
			s := step{cmd: "install", tunnel: name, args: section{{"child", c.Network}, {"ike", name}}}
			if _, err := d.call(ctx, s.cmd, s.args); err != nil {
				failed[name] = true
				errs = append(errs, explain(s, err))
			}
		}
	}
	return errs
}

// alive reports whether both connections are open. A daemon that dies closes them one by one.
func (d *Daemon) alive() bool {
	if d.session == nil || !d.session.alive() {
		return false
	}
	select {
	case <-d.ended:
		return false
	default:
		return true
	}
}

// connect ensures a connection to a daemon of a sufficient version.
// fresh says that the connection is new.
func (d *Daemon) connect(ctx context.Context) (fresh bool, err error) {
	if d.alive() {
		return false, nil
	}
	d.drop()
	s, err := dial(d.socket())
	if err != nil {
		return false, fmt.Errorf("IKE daemon: %w; is charon running?", err)
	}
	d.session, d.have, d.private = s, map[string]held{}, ""
	m, err := d.call(ctx, "version", nil)
	if err != nil {
		d.drop()
		return false, fmt.Errorf("IKE daemon at %s: %w", d.socket(), err)
	}
	v, _ := m.Get("version").(string)
	d.version = "strongSwan " + v
	if !recent(v) {
		d.drop()
		return false, fmt.Errorf("%w: version %s at %s; 5.9 or later is needed", ErrTooOld, v, d.socket())
	}
	if err := d.listen(); err != nil {
		d.drop()
		return false, fmt.Errorf("IKE daemon at %s: log: %w", d.socket(), err)
	}
	return true, nil
}

// recent reports whether a version is 5.9 or later.
func recent(version string) bool {
	major, rest, _ := strings.Cut(version, ".")
	minor, _, _ := strings.Cut(rest, ".")
	if i := strings.IndexFunc(minor, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
		minor = minor[:i] // 0dr4
	}
	a, err1 := strconv.Atoi(major)
	b, err2 := strconv.Atoi(minor)
	return err1 == nil && err2 == nil && (a > 5 || a == 5 && b >= 9)
}

func (d *Daemon) socket() string {
	if d.Socket == "" {
		return SystemSocket
	}
	return d.Socket
}

func (d *Daemon) drop() {
	if d.session != nil {
		d.session.close()
		d.session = nil
	}
	if d.events != nil {
		_ = d.events.Close()
		d.events = nil
	}
	d.have, d.private = nil, ""
}

func (d *Daemon) limit(ctx context.Context) (context.Context, context.CancelFunc) {
	limit := d.Timeout
	if limit == 0 {
		limit = 20 * time.Second
	}
	return context.WithTimeout(ctx, limit)
}

func (d *Daemon) call(ctx context.Context, cmd string, args section) (*vici.Message, error) {
	if d.session == nil {
		return nil, errNotConnected
	}
	ctx, cancel := d.limit(ctx)
	defer cancel()
	d.calls.Add(1)
	m, err := d.session.call(ctx, cmd, args)
	var f *failure
	if err != nil && !errors.As(err, &f) {
		d.drop() // the state of the connection is unknown
	}
	return m, err
}

func (d *Daemon) list(ctx context.Context, cmd, event string, args section) ([]*vici.Message, error) {
	if d.session == nil {
		return nil, errNotConnected
	}
	ctx, cancel := d.limit(ctx)
	defer cancel()
	d.calls.Add(1)
	all, err := d.session.list(ctx, cmd, event, args)
	if err != nil {
		d.drop()
		return nil, fmt.Errorf("%s: %w", cmd, err)
	}
	return all, nil
}

// loadPrivate loads the private key of the certificate and unloads the previous one.
func (d *Daemon) loadPrivate(ctx context.Context, want []ipsec.Tunnel, c Credentials) (line string, err error) {
	if len(want) == 0 || want[0].Auth != ipsec.AuthPubkey {
		c.Key = nil
	}
	digest := sha256.Sum256(c.Key)
	if c.Key == nil && d.private == "" || d.private != "" && d.digest == digest {
		return "", nil
	}
	before := d.private
	if c.Key != nil {
		m, err := d.call(ctx, "load-key", section{{"type", "any"}, {"data", secret(c.Key)}})
		if err != nil {
			return "", fmt.Errorf("load the private key: %w; charon may lack the plugins pkcs8 and openssl", err)
		}
		id, _ := m.Get("id").(string)
		d.private, d.digest, line = id, digest, "+ private key "+id
	} else {
		d.private = ""
	}
	if before != "" && before != d.private {
		if _, err := d.call(ctx, "unload-key", section{{"id", before}}); err != nil && !missing(err) {
			return line, fmt.Errorf("unload the private key before: %w", err)
		}
		if line == "" {
			line = "- private key " + before
		}
	}
	return line, nil
}

// observe lists Lariat's objects in the daemon.
func (d *Daemon) observe(ctx context.Context) (*observed, error) {
	seen := &observed{sas: map[string][]SA{}}
	var err error
	if seen.conns, err = d.names(ctx, "get-conns", "conns"); err != nil {
		return nil, err
	}
	if seen.keys, err = d.names(ctx, "get-shared", "keys"); err != nil {
		return nil, err
	}
	if seen.traps, err = d.traps(ctx); err != nil {
		return nil, err
	}
	sas, err := d.sas(ctx)
	for _, sa := range sas {
		seen.sas[sa.Name] = append(seen.sas[sa.Name], sa)
	}
	return seen, err
}

func (d *Daemon) names(ctx context.Context, cmd, in string) ([]string, error) {
	m, err := d.call(ctx, cmd, nil)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", cmd, err)
	}
	all, _ := m.Get(in).([]string)
	return slices.DeleteFunc(all, func(name string) bool { return !strings.HasPrefix(name, ipsec.ConnPrefix) }), nil
}

// traps returns the installed traps as connection/child. The daemon waits for packets of a trap.
func (d *Daemon) traps(ctx context.Context) (map[string]bool, error) {
	all, err := d.list(ctx, "list-policies", eventPolicy, section{{"trap", "yes"}})
	traps := map[string]bool{}
	for _, m := range all {
		for _, name := range m.Keys() {
			if strings.HasPrefix(name, ipsec.ConnPrefix) {
				traps[name] = true
			}
		}
	}
	return traps, err
}

// forget removes from the cache the objects that the daemon no longer has.
func (d *Daemon) forget(seen *observed) {
	for name, h := range d.have {
		if !slices.Contains(seen.conns, name) {
			h.conn = ""
		}
		h.keys = slices.DeleteFunc(slices.Clone(h.keys), func(k key) bool { return !slices.Contains(seen.keys, k.id) })
		slices.SortStableFunc(h.keys,
			func(a, b key) int { return slices.Index(seen.keys, a.id) - slices.Index(seen.keys, b.id) })
		d.have[name] = h
	}
}

// Terminate ends a tunnel's SAs. The next packet sets them up again.
// With force the daemon informs the peer and does not wait for an answer.
func (d *Daemon) Terminate(ctx context.Context, name string, force bool) error {
	args := terminateIKE(name)
	if !force {
		args = section{{"ike", name}, {"timeout", "-1"}}
	}
	return d.command(ctx, "terminate", name, args)
}

// Initiate sets up a tunnel's part for a network. It waits neither for a packet nor for the result.
func (d *Daemon) Initiate(ctx context.Context, name, network string) error {
	return d.command(ctx, "initiate", name, section{{"ike", name}, {"child", network}, {"timeout", "-1"}})
}

// Reinstall installs a tunnel's policies for a network in the kernel again.
// The daemon wrongly assumes that the kernel has these policies.
// Reinstall ends the tunnel's SAs: the daemon installs no policies that an SA already holds.
// The next packet sets the SAs up again.
func (d *Daemon) Reinstall(ctx context.Context, name, network string) error {
	trap := section{{"child", network}, {"ike", name}}
	for _, s := range []step{
		{cmd: "terminate", args: terminateIKE(name), soft: true},
		{cmd: "uninstall", args: trap, soft: true},
		{cmd: "install", args: trap},
	} {
		if err := d.command(ctx, s.cmd, name, s.args); err != nil && (!s.soft || !missing(err)) {
			return err
		}
	}
	return nil
}

// CloseChild ends one pair of ESP SAs by the daemon's number.
func (d *Daemon) CloseChild(ctx context.Context, name string, id uint64) error {
	err := d.command(ctx, "terminate", name, section{{"child-id", fmt.Sprint(id)}, {"timeout", "-1"}})
	if missing(err) {
		return nil
	}
	return err
}

// Reauth makes the ends of a tunnel reauthenticate.
// The daemon makes the new SAs before it ends the old ones.
func (d *Daemon) Reauth(ctx context.Context, name string) error {
	return d.command(ctx, "rekey", name, section{{"ike", name}, {"reauth", "yes"}})
}

// RekeyChild makes new ESP keys for a network.
func (d *Daemon) RekeyChild(ctx context.Context, name, network string) error {
	return d.command(ctx, "rekey", name, section{{"ike", name}, {"child", network}})
}

func (d *Daemon) command(ctx context.Context, cmd, name string, args section) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.alive() {
		return errNotConnected
	}
	_, err := d.call(ctx, cmd, args)
	if err == nil {
		return nil
	}
	return explain(step{cmd: cmd, tunnel: name}, err)
}
