package ike

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/strongswan/govici/vici"

	"github.com/lariat-net/lariat/pkg/ipsec"
)

// These are the daemon's states of working SAs.
const (
	Established = "ESTABLISHED" // of an IKE SA
	Installed   = "INSTALLED"   // of a child
)

// An SA is an IKE SA of Lariat.
type SA struct {
	Name          string // of the connection
	Peer          string
	ID            uint64 // the daemon's number
	State         string // the daemon's word, such as Established, CONNECTING, DELETING
	Initiator     bool
	Local, Remote netip.AddrPort
	NAT           bool          // a NAT is on the path, or encap simulates one
	Suite         string        // such as AES_GCM_16-256/PRF_HMAC_SHA2_256/CURVE_25519
	Age           time.Duration // since it was established
	RekeyIn       time.Duration
	Tasks         []string // active and queued tasks, such as IKE_REAUTH
	Children      []ChildSA
}

// settled reports whether the SA has no tasks.
func (s SA) settled() bool { return len(s.Tasks) == 0 }

// idle returns the time since any child of the SA sent a packet.
func (s SA) idle() time.Duration {
	idle := s.Age
	for _, c := range s.Children {
		idle = min(idle, c.IdleOut)
	}
	return idle
}

// A ChildSA is a pair of ESP SAs.
type ChildSA struct {
	Network               string
	ID                    uint64
	IfID                  uint32
	State                 string // the daemon's word, such as Installed, REKEYED
	SPIIn, SPIOut         uint32
	Encap                 bool   // in UDP
	Suite                 string // such as AES_GCM_16-256/ESN
	BytesIn, BytesOut     uint64
	PacketsIn, PacketsOut uint64
	IdleOut               time.Duration // time since the last sent packet; without packets the age
	Age                   time.Duration
	RekeyIn               time.Duration
}

// SAs lists the IKE SAs of Lariat's connections, sorted by name and age.
func (d *Daemon) SAs(ctx context.Context) ([]SA, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.alive() {
		return nil, errNotConnected
	}
	return d.sas(ctx)
}

func (d *Daemon) sas(ctx context.Context) ([]SA, error) {
	// Do not use noblock, which leaves out busy SAs.
	// The cleanup of SAs that the daemon does not list would then remove busy SAs.
	all, err := d.list(ctx, "list-sas", eventSA, nil)
	if err != nil {
		return nil, err
	}
	var out []SA
	for _, m := range all {
		for _, name := range m.Keys() {
			if sub, ok := m.Get(name).(*vici.Message); ok && strings.HasPrefix(name, ipsec.ConnPrefix) {
				out = append(out, parseSA(name, sub))
			}
		}
	}
	slices.SortFunc(out, func(a, b SA) int {
		if c := strings.Compare(a.Name, b.Name); c != 0 {
			return c
		}
		return int(a.ID) - int(b.ID)
	})
	return out, nil
}

func parseSA(name string, m *vici.Message) SA {
	sa := SA{
		Name: name, Peer: strings.TrimPrefix(name, ipsec.ConnPrefix), ID: number(m, "uniqueid", 10), State: str(m, "state"),
		Initiator: str(m, "initiator") == "yes", NAT: str(m, "nat-any") == "yes",
		Suite: suite(m, "encr", "integ", "prf", "dh-group"),
		Local: addrPort(m, "local"), Remote: addrPort(m, "remote"), Age: since(m, "established"),
		RekeyIn: since(m, "rekey-time"),
	}
	for _, k := range []string{"tasks-active", "tasks-queued", "tasks-passive"} {
		list, _ := m.Get(k).([]string)
		sa.Tasks = append(sa.Tasks, list...)
	}
	children, _ := m.Get("child-sas").(*vici.Message)
	if children == nil {
		return sa
	}
	for _, k := range children.Keys() {
		c, ok := children.Get(k).(*vici.Message)
		if !ok {
			continue
		}
		s := suite(c, "encr", "integ", "dh-group")
		if str(c, "esn") != "" {
			s += "/ESN"
		}
		idle := since(c, "use-out")
		if str(c, "use-out") == "" {
			idle = since(c, "install-time")
		}
		sa.Children = append(sa.Children, ChildSA{
			Network: str(c, "name"), ID: number(c, "uniqueid", 10), IfID: uint32(number(c, "if-id-in", 16)),
			State: str(c, "state"),
			SPIIn: uint32(number(c, "spi-in", 16)), SPIOut: uint32(number(c, "spi-out", 16)), Encap: str(c, "encap") == "yes",
			Suite:   s,
			BytesIn: number(c, "bytes-in", 10), BytesOut: number(c, "bytes-out", 10),
			PacketsIn: number(c, "packets-in", 10), PacketsOut: number(c, "packets-out", 10),
			IdleOut: idle, Age: since(c, "install-time"), RekeyIn: since(c, "rekey-time"),
		})
	}
	slices.SortFunc(sa.Children, func(a, b ChildSA) int {
		if c := strings.Compare(a.Network, b.Network); c != 0 {
			return c
		}
		return int(a.ID) - int(b.ID)
	})
	return sa
}

func str(m *vici.Message, k string) string {
	s, _ := m.Get(k).(string)
	return s
}

func number(m *vici.Message, k string, base int) uint64 {
	n, _ := strconv.ParseUint(str(m, k), base, 64)
	return n
}

func since(m *vici.Message, k string) time.Duration {
	n, _ := strconv.ParseInt(str(m, k), 10, 64)
	return time.Duration(n) * time.Second
}

func addrPort(m *vici.Message, end string) netip.AddrPort {
	a, _ := netip.ParseAddr(str(m, end+"-host"))
	return netip.AddrPortFrom(a, uint16(number(m, end+"-port", 10)))
}

func suite(m *vici.Message, kinds ...string) string {
	var words []string
	for _, k := range kinds {
		alg := str(m, k+"-alg")
		if k == "dh-group" {
			alg = str(m, k)
		}
		if alg == "" {
			continue
		}
		if size := str(m, k+"-keysize"); size != "" {
			alg += "-" + size
		}
		words = append(words, alg)
	}
	return strings.Join(words, "/")
}

// LastErrors returns the last failures, by the connection's name.
// It leaves out tunnels that have come up since.
func (d *Daemon) LastErrors() map[string]Failure {
	d.errMu.Lock()
	defer d.errMu.Unlock()
	return maps.Clone(d.errs)
}

// listen follows the daemon's log on a separate connection.
// The library blocks for ever when an event arrives during a further subscription.
// Therefore this connection subscribes to a single kind of events.
// Vici's other events announce tunnels that come up or end, but give no reason.
func (d *Daemon) listen() error {
	s, err := vici.NewSession(vici.WithSocketPath(d.socket()))
	if err != nil {
		return err
	}
	events := make(chan vici.Event, 1024)
	s.NotifyEvents(events)
	if err := s.Subscribe("log"); err != nil {
		_ = s.Close()
		return err
	}
	ended := make(chan struct{})
	d.events, d.ended = s, ended
	go func() {
		d.follow(events)
		close(ended)
		if d.Gone != nil {
			d.Gone()
		}
	}()
	return nil
}

// follow records failures from the daemon's log until the connection ends.
func (d *Daemon) follow(events <-chan vici.Event) {
	for e := range events {
		name, said := str(e.Message, "ikesa-name"), str(e.Message, "msg")
		if !strings.HasPrefix(name, ipsec.ConnPrefix) {
			continue
		}
		what, up := judge(said)
		switch {
		case up:
			d.errMu.Lock()
			delete(d.errs, name)
			d.errMu.Unlock()
		case what != "":
			d.errMu.Lock()
			if d.errs == nil {
				d.errs = map[string]Failure{}
			}
			news := d.errs[name].Text != what
			d.errs[name] = Failure{Text: what, At: e.Timestamp}
			d.errMu.Unlock()
			if !news {
				continue // the tunnel is retried every few seconds while there are packets
			}
			if d.Log != nil {
				d.Log.Warn("tunnel failed", "tunnel", name, "error", what)
			}
		default:
			continue
		}
		if d.Notify != nil {
			d.Notify()
		}
	}
}

// judgements maps lines of the daemon's log to their meanings. The first match counts.
// The lines are the same in 5.9 and 6.0.
var judgements = []struct {
	line *regexp.Regexp
	mean string // "": the tunnel is up
}{
	{regexp.MustCompile(`^(IKE|CHILD)_SA \S+ established`), ""},
	{regexp.MustCompile(`^received AUTHENTICATION_FAILED`),
		"the peer says AUTHENTICATION_FAILED: its key or certificate does not match; do both hosts have the same secret?"},
	{regexp.MustCompile(`^received NO_PROPOSAL_CHOSEN`), "the peer says NO_PROPOSAL_CHOSEN: it has no suite in " +
		"common, or does not know this host yet"},
	{regexp.MustCompile(`^received TS_UNACCEPTABLE`), "the peer says TS_UNACCEPTABLE: the network has other " +
		"subnets there"},
	{regexp.MustCompile(`^received (\w+) notify error`), "the peer says $1"},
	{regexp.MustCompile(`^giving up after (\d+) retransmits`),
		"no answer: gave up after $1 retransmits; is UDP 500 and 4500 open between the hosts, and charon running there?"},
	{regexp.MustCompile(`^tried \d+ shared keys? for .* but MAC mismatched`),
		"authentication failed: the peer's key does not match; do both hosts have the same secret?"},
	{regexp.MustCompile(`^(no shared key found for .*)`), "$1"},
	{regexp.MustCompile(`^(no trusted .*|no private key found .*|no issuer certificate found .*|constraint check failed.*|.*certificate .* (expired|not valid).*|signature validation failed.*)`), "$1"},
	{regexp.MustCompile(`^(no acceptable .* found|no matching CHILD_SA config found.*|no IKE config found.*|traffic selectors .* unacceptable|selected peer config .* unacceptable.*)`), "$1"},
	{regexp.MustCompile(`^(unable to install .*|failed to establish CHILD_SA.*|installing .* failed.*)`), "$1"},
}

// judge returns the meaning of a line of the daemon's log for its tunnel.
// The tunnel is up, it has a failure, or the line has no meaning.
func judge(line string) (wrong string, up bool) {
	for _, j := range judgements {
		m := j.line.FindStringSubmatchIndex(line)
		if m == nil {
			continue
		}
		if j.mean == "" {
			return "", true
		}
		return string(j.line.ExpandString(nil, j.mean, line, m)), false
	}
	return "", false
}

// String returns a line for people.
func (s SA) String() string {
	return fmt.Sprintf("%s[%d] %s %s to %s %s, %d children", s.Name, s.ID, s.State, s.Local, s.Remote, s.Suite,
		len(s.Children))
}
