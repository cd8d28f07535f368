package ike

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"

	"github.com/strongswan/govici/vici"
)

// section is a message of vici, or a part of one: its keys in order.
type section []field

// field is a key with a string, a []string, a secret, some DER or a section.
type field struct {
	key   string
	value any
}

// secret is a value that goes to the daemon and nowhere else.
type secret []byte

// der is binary. It prints as its hash.
type der []byte

func (s section) message() (*vici.Message, error) {
	m := vici.NewMessage()
	for _, f := range s {
		var v any
		switch x := f.value.(type) {
		case section:
			sub, err := x.message()
			if err != nil {
				return nil, err
			}
			v = sub
		case secret:
			v = string(x)
		case []der:
			list := make([]string, len(x))
			for i, d := range x {
				list[i] = string(d)
			}
			v = list
		default:
			v = x
		}
		if err := m.Set(f.key, v); err != nil {
			return nil, fmt.Errorf("%s: %w", f.key, err)
		}
	}
	return m, nil
}

// String prints the section as in swanctl.conf, without its secrets.
func (s section) String() string {
	var b strings.Builder
	s.print(&b, "")
	return b.String()
}

func (s section) print(b *strings.Builder, indent string) {
	for _, f := range s {
		switch x := f.value.(type) {
		case section:
			fmt.Fprintf(b, "%s%s {\n", indent, f.key)
			x.print(b, indent+"  ")
			fmt.Fprintf(b, "%s}\n", indent)
		case []string:
			fmt.Fprintf(b, "%s%s = %s\n", indent, f.key, strings.Join(x, ","))
		case []der:
			sums := make([]string, len(x))
			for i, d := range x {
				sums[i] = fmt.Sprintf("sha256:%x", sha256.Sum256(d))
			}
			fmt.Fprintf(b, "%s%s = %s\n", indent, f.key, strings.Join(sums, ","))
		case secret:
			fmt.Fprintf(b, "%s%s = (%d octets)\n", indent, f.key, len(x))
		default:
			fmt.Fprintf(b, "%s%s = %s\n", indent, f.key, x)
		}
	}
}

// failure is the daemon's own no to a command.
type failure struct{ said string }

func (f *failure) Error() string { return f.said }

// missing reports whether a command failed because there was nothing of that name.
func missing(err error) bool {
	var f *failure
	return errors.As(err, &f) && (strings.Contains(f.said, "not found") || strings.Contains(f.said, "no matching"))
}

// session is one connection to the daemon's socket, on which one command at a time is under way.
type session struct {
	vici *vici.Session
	pace *pace
	lost chan vici.Event // closed when the connection is; nothing is ever sent, for no event is subscribed to
}

func dial(ctx context.Context, socket string) (*session, error) {
	s := &session{lost: make(chan vici.Event)}
	var err error
	s.vici, err = vici.NewSession(vici.WithSocketPath(socket), vici.WithDialContext(func(_ context.Context, network, addr string) (net.Conn, error) {
		c, err := (&net.Dialer{}).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		s.pace = newPace(c)
		return s.pace, nil
	}))
	if err != nil {
		return nil, err
	}
	s.vici.NotifyEvents(s.lost)
	return s, nil
}

func (s *session) close() { _ = s.vici.Close() }

// alive is a guess: false is certain, true may be over by now.
func (s *session) alive() bool {
	select {
	case <-s.lost:
		return false
	default:
		return true
	}
}

// call runs a command. The error is a *failure if the daemon answered.
func (s *session) call(ctx context.Context, cmd string, args section) (*vici.Message, error) {
	m, err := args.message()
	if err != nil {
		return nil, err
	}
	defer s.pace.reset()
	answer, err := s.vici.Call(ctx, cmd, m)
	if err != nil && answer != nil {
		said, _ := answer.Get("errmsg").(string)
		if said == "" {
			said = err.Error()
		}
		return answer, &failure{said}
	}
	return answer, err
}

// list runs a command that answers with a stream of events.
func (s *session) list(ctx context.Context, cmd, event string, args section) (all []*vici.Message, err error) {
	m, err := args.message()
	if err != nil {
		return nil, err
	}
	defer s.pace.reset()
	for answer, err := range s.vici.CallStreaming(ctx, cmd, event, m) {
		if err != nil {
			return nil, err
		}
		s.pace.taken()
		all = append(all, answer)
	}
	return all, nil
}

// pace is a connection whose reader gets a frame only while it has room for it. The library has room for 128 events of a stream
// and drops, silently, what comes when that is full: list-sas with some hundreds of peers would be a gamble.
type pace struct {
	net.Conn
	head   []byte // of the frame being read, up to its 4 octets of length
	left   int    // octets of its body yet to be read
	mu     sync.Mutex
	wake   *sync.Cond
	under  int // frames read and not taken
	closed bool
}

const room = 64

func newPace(c net.Conn) *pace {
	p := &pace{Conn: c}
	p.wake = sync.NewCond(&p.mu)
	return p
}

// Read never reads beyond a frame.
func (p *pace) Read(b []byte) (int, error) {
	if p.left == 0 && len(p.head) == 0 {
		p.mu.Lock()
		for p.under >= room && !p.closed {
			p.wake.Wait()
		}
		p.under++
		closed := p.closed
		p.mu.Unlock()
		if closed {
			return 0, io.EOF
		}
	}
	limit := p.left
	if limit == 0 {
		limit = 4 - len(p.head)
	}
	n, err := p.Conn.Read(b[:min(len(b), limit)])
	if p.left > 0 {
		p.left -= n
		return n, err
	}
	p.head = append(p.head, b[:n]...)
	if len(p.head) == 4 {
		p.left = int(p.head[0])<<24 | int(p.head[1])<<16 | int(p.head[2])<<8 | int(p.head[3])
		p.head = p.head[:0]
	}
	return n, err
}

// Close also ends a Read that waits for room.
func (p *pace) Close() error {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.wake.Broadcast()
	return p.Conn.Close()
}

func (p *pace) taken() {
	p.mu.Lock()
	p.under--
	p.mu.Unlock()
	p.wake.Signal()
}

// reset is when a command is over: nothing of it is under way.
func (p *pace) reset() {
	p.mu.Lock()
	p.under = 0
	p.mu.Unlock()
	p.wake.Signal()
}
