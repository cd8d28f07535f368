package ike

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"

	"github.com/strongswan/govici/vici"
)

// A section is a message of vici, or a part of a message: its keys in order.
type section []field

// A field is a key with a string, a []string, a secret, a []der or a section.
type field struct {
	key   string
	value any
}

// A secret is a value that goes only to the daemon.
type secret []byte

// A der is binary. It prints as its hash.
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

// A failure is the daemon's refusal of a command.
type failure struct{ said string }

func (f *failure) Error() string { return f.said }

// missing reports whether a command failed because no object has that name.
func missing(err error) bool {
	var f *failure
	return errors.As(err, &f) && (strings.Contains(f.said, "not found") || strings.Contains(f.said, "no matching"))
}

// A session is one connection to the daemon's socket. It runs one command at a time.
type session struct {
	vici *vici.Session
	// events holds the events of list commands. It is closed with the connection.
	// The library's reader fills events in the order of arrival.
	// Therefore events holds all events of a command when the command's answer arrives.
	// The library's own streams (0.8.0) read events and the answer from two channels in random order.
	// They lose the remaining events.
	events chan vici.Event
}

// maxEvents limits the events of one command. The library silently drops further events.
const maxEvents = 1 << 14

// These are the events of list-sas and list-policies.
const (
	eventSA     = "list-sa"
	eventPolicy = "list-policy"
)

func dial(socket string) (*session, error) {
	v, err := vici.NewSession(vici.WithSocketPath(socket))
	if err != nil {
		return nil, err
	}
	s := &session{vici: v, events: make(chan vici.Event, maxEvents)}
	v.NotifyEvents(s.events)
	// Subscribe while no such event can arrive.
	// During a subscription the library cannot receive one.
	if err := v.Subscribe(eventSA, eventPolicy); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *session) close() { _ = s.vici.Close() }

// alive reports whether the connection is open. A result of true may already be outdated.
func (s *session) alive() bool {
	for {
		select {
		case _, ok := <-s.events:
			if !ok {
				return false
			}
		default:
			return true
		}
	}
}

// call runs a command. The error is a *failure if the daemon answered.
func (s *session) call(ctx context.Context, cmd string, args section) (*vici.Message, error) {
	m, err := args.message()
	if err != nil {
		return nil, err
	}
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

// list runs a command that answers with events.
func (s *session) list(ctx context.Context, cmd, event string, args section) (all []*vici.Message, err error) {
	if !s.alive() {
		return nil, errNotConnected
	}
	if _, err := s.call(ctx, cmd, args); err != nil {
		return nil, err
	}
	if len(s.events) == maxEvents {
		return nil, fmt.Errorf("more than %d answers", maxEvents)
	}
	for {
		select {
		case e, ok := <-s.events:
			if !ok {
				return nil, errNotConnected
			}
			if e.Name == event {
				all = append(all, e.Message)
			}
		default:
			return all, nil
		}
	}
}
