package reconcile

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lariat-net/lariat/pkg/ike"
	"github.com/lariat-net/lariat/pkg/ipsec"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/probe"
)

// Tunnels keeps the IKE daemon equal to the metadata: one connection to each peer, for all
// encrypted networks. The overlay's plan, not Tunnels, keeps packets from leaving in clear. That
// protection does not depend on Tunnels.
type Tunnels struct {
	View   func() *metadata.Snapshot
	Client metadata.Client
	Kernel XFRM
	Log    *slog.Logger

	// Daemon is the IKE daemon to configure. Charon starts it; with nil, another program starts it.
	Daemon *ike.Daemon
	Charon *ike.Charon

	SecretFile string // of the hosts' common secret, unless
	CertDir    string // certificates are used
	Encap      bool
	Rekey      time.Duration

	// Every is the interval between checks of the state that the daemon and the kernel hold. A pass
	// in between queries neither when nothing changed.
	Every time.Duration

	concern    *Concern
	mu         sync.Mutex // guards the fields that Report returns
	report     ipsec.Report
	tunnels    []ipsec.Tunnel
	creds      ike.Credentials
	loaded     bool // creds have been read once
	verified   time.Time
	flushed    atomic.Bool                       // a flush was seen since the last check
	watched    bool                              // flushes are reported, or cannot be
	unknownSAs map[saKey]time.Time               // our SAs that the daemon did not list, and since when
	reinstalls map[missingState]reinstallAttempt // policies that were reinstalled and are still missing
	// No state of ours is left to remove while there is no encrypted network.
	clean bool
}

type saKey struct{ ifID, spi uint32 }

// unknownFor is how long the daemon must not know an SA before the SA is stale. While keys change,
// the kernel has SAs that the daemon does not list yet, or no longer lists.
const unknownFor = 15 * time.Second

// XFRM is the part of the kernel that Tunnels cleans up.
type XFRM interface {
	XFRM(ctx context.Context, ours func(ifID uint32) bool) ([]kernel.SA, []kernel.XFRMPolicy, error)
	RemoveSA(ctx context.Context, s kernel.SA) error
	RemovePolicy(ctx context.Context, p kernel.XFRMPolicy) error
	Flushes(ctx context.Context, each func()) error
}

// notify makes the IKE daemon trigger the concern when the daemon ends or has news.
func (t *Tunnels) notify(c *Concern) {
	t.concern = c
	t.Daemon.Notify = c.Trigger
	// For a daemon that this process did not start, only the end of the connection is visible.
	t.Daemon.Gone = func() { t.gone(errors.New("the IKE daemon does not answer any more")) }
	if t.Charon != nil {
		t.Charon.OnExit = func() { t.gone(errors.New("the IKE daemon ended and is started again")) }
	}
}

func (t *Tunnels) gone(err error) {
	t.mu.Lock()
	missed := len(t.tunnels) > 0
	t.mu.Unlock()
	if missed {
		t.concern.Broken(err)
	}
}

// Run runs one pass.
func (t *Tunnels) Run(ctx context.Context) ([]string, error) {
	s := t.View()
	if s == nil {
		return nil, errNoView
	}
	r := ipsec.Report{Networks: []string{}, Supervised: t.Charon != nil, Auth: ipsec.AuthPSK}
	for _, n := range s.Networks {
		if n.Encapsulation == metadata.EncapIPsec {
			r.Networks = append(r.Networks, n.Name)
		}
	}
	slices.Sort(r.Networks)
	if t.CertDir != "" {
		r.Auth = ipsec.AuthPubkey
	}
	if len(r.Networks) == 0 {
		t.publish(ipsec.Report{Networks: []string{}, Tunnels: []ipsec.Status{}}, nil) // the daemon is not needed
		return t.disable(ctx)
	}
	changed, tunnels, err := t.reconcile(ctx, s, &r)
	t.publish(r, tunnels)
	return changed, err
}

func (t *Tunnels) publish(r ipsec.Report, tunnels []ipsec.Tunnel) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.report, t.tunnels = r, tunnels
}

// disable removes the state that is left from a time when a network was encrypted.
func (t *Tunnels) disable(ctx context.Context) (changed []string, err error) {
	if t.clean {
		return nil, nil
	}
	if t.Charon == nil || t.Charon.Running() {
		lines, err := t.Daemon.Apply(ctx, nil, ike.Credentials{}, true)
		changed = append(changed, lines...)
		if err != nil && t.Charon != nil {
			return changed, err // the system's own daemon need not run where no network is encrypted
		}
	}
	if t.Charon != nil {
		if err := t.Charon.Stop(ctx); err != nil {
			return changed, err
		}
	}
	l, _ := t.observe(ctx, true) // a kernel without IPsec holds no state of ours
	lines, err := t.removeStale(ctx, nil, l)
	t.clean = err == nil
	return append(changed, lines...), err
}

// reconcile runs a pass while at least one network is encrypted.
func (t *Tunnels) reconcile(ctx context.Context, s *metadata.Snapshot,
	r *ipsec.Report) (changed []string, tunnels []ipsec.Tunnel, err error) {
	t.clean = false
	opts := ipsec.Options{Auth: r.Auth, Encap: t.Encap, Rekey: t.Rekey}
	if err := t.features(s, &opts); err != nil {
		r.Missing, r.Remedy = err.Error(),
			"load the module, or use a kernel that has it; until then nothing is sent, in clear neither"
		return nil, nil, err
	}
	problem := t.credentials()
	if err := problem; err != nil {
		if !t.loaded {
			r.Missing, r.Remedy = err.Error(), "until then nothing is sent, in clear neither"
			return nil, nil, err
		}
		// The credentials that were read before stay in force.
		r.Problem, r.Remedy = err.Error(),
			"what was read before stays in use; lariat-network-manager reads the file again by itself"
	}
	opts.Keys = t.creds.Secrets.IDs()
	if r.Auth == ipsec.AuthPSK {
		r.Keys = opts.Keys
	}
	tunnels = ipsec.Tunnels(s, s.Self, opts)
	if len(tunnels) > 0 && len(tunnels[0].Children) > 0 {
		r.Suites = tunnels[0].Children[0].Proposals
	}
	fail := func(err error) ([]string, []ipsec.Tunnel, error) {
		r.Problem, r.Remedy = err.Error(), "check: lariat ipsec status; the log of lariat-network-manager"
		return changed, tunnels, errors.Join(err, problem)
	}
	if t.Charon != nil {
		t.Charon.Prepare = func(ctx context.Context) error {
			t.concern.Repairing(errors.New("the IKE daemon does not run; it is started"))
			// A new daemon does not know the existing SAs. The kernel would use them until they
			// expire. The peers drop theirs at the first message of the new daemon.
			l, err := t.observe(ctx, true)
			if err != nil {
				return err
			}
			lines, err := t.removeStale(ctx, tunnels, l)
			changed = append(changed, lines...)
			return err
		}
		if err := t.Charon.Ensure(ctx); err != nil {
			return fail(err)
		}
	}
	if !t.watched {
		t.watched = true
		if err := t.Kernel.Flushes(ctx, func() { t.flushed.Store(true); t.concern.Trigger() }); err != nil {
			t.Log.Warn("that others flush policies is seen by the timer only", "error", err)
		}
	}
	if t.flushed.Swap(false) {
		t.verified = time.Time{}
	}
	verify := time.Since(t.verified) >= t.Every
	lines, err := t.Daemon.Apply(ctx, tunnels, t.creds, verify)
	if changed = append(changed, lines...); err != nil {
		return fail(err)
	}
	r.Daemon = t.Daemon.Version()
	if err := t.announce(ctx, s, opts.Keys); err != nil {
		return fail(err)
	}
	if verify || len(changed) > 0 {
		l, err := t.observe(ctx, false)
		if err != nil {
			return fail(err)
		}
		lines, err := t.removeStale(ctx, tunnels, l)
		if changed = append(changed, lines...); err != nil {
			return fail(err)
		}
		lines, err = t.reinstallMissing(ctx, tunnels, l)
		if changed = append(changed, lines...); err != nil {
			return fail(err)
		}
		t.verified = time.Now()
	}
	return changed, tunnels, problem
}

// features probes for the features that every encrypted network needs. Without AES-GCM the fallback
// suite is offered.
func (t *Tunnels) features(s *metadata.Snapshot, o *ipsec.Options) error {
	esp := probe.ESP
	if me, _ := s.Host(s.Self); me.UnderlayAddr().Is6() {
		esp = probe.ESP6
	}
	if err := errors.Join(probe.Check(probe.XfrmInterface), probe.Check(esp)); err != nil {
		return err
	}
	o.NoGCM = probe.Check(probe.AESGCM) != nil
	return nil
}

func (t *Tunnels) credentials() error {
	if t.CertDir != "" {
		c, err := ike.LoadCertificates(t.CertDir)
		if err == nil {
			t.creds, t.loaded = c, true
		}
		return err
	}
	s, err := ipsec.ReadSecrets(cmp.Or(t.SecretFile, ipsec.DefaultSecretFile))
	if err == nil {
		t.creds, t.loaded = ike.Credentials{Secrets: s}, true
	}
	return err
}

// announce publishes the secrets that this host accepts by now. The other hosts use only published
// secrets.
func (t *Tunnels) announce(ctx context.Context, s *metadata.Snapshot, keys []string) error {
	me, ok := s.Host(s.Self)
	if !ok || slices.Equal(me.IKEKeys, keys) {
		return nil
	}
	me.IKEKeys, me.Live = keys, false
	if err := t.Client.Put(ctx, metadata.KindHost, me.Name, me); err != nil {
		return fmt.Errorf("tell the other hosts which secrets are loaded: %w", err)
	}
	return nil
}

// An observation is our state in the kernel and in the daemon.
type observation struct {
	sas      []kernel.SA
	policies []kernel.XFRMPolicy
	dead     bool // there is no daemon, so it knows no SA
	known    []ike.SA
}

func (t *Tunnels) observe(ctx context.Context, dead bool) (l observation, err error) {
	l.dead = dead
	if l.sas, l.policies, err = t.Kernel.XFRM(ctx, ipsec.Owned); err == nil && !dead {
		l.known, err = t.Daemon.SAs(ctx)
	}
	return l, err
}

// removeStale removes from the kernel the state that a killed daemon left behind. This is policies
// of no tunnel and SAs that the daemon does not know. The kernel would use such an SA on and on,
// although the peer has long forgotten it.
func (t *Tunnels) removeStale(ctx context.Context, tunnels []ipsec.Tunnel,
	l observation) (changed []string, err error) {
	wanted := map[uint32]bool{}
	for _, x := range tunnels {
		for _, c := range x.Children {
			wanted[c.IfID] = true
		}
	}
	known := map[uint32]bool{}
	for _, sa := range l.known {
		for _, c := range sa.Children {
			known[c.SPIIn], known[c.SPIOut] = true, true
		}
	}
	var errs []error
	now, before := time.Now(), t.unknownSAs
	t.unknownSAs = map[saKey]time.Time{}
	for _, sa := range l.sas {
		key := saKey{sa.IfID, sa.SPI}
		switch since, seen := before[key]; {
		case known[sa.SPI] && wanted[sa.IfID]:
			continue
		case l.dead:
		case !seen:
			t.unknownSAs[key] = now
			continue
		case now.Sub(since) < unknownFor:
			t.unknownSAs[key] = since
			continue
		}
		if err := t.Kernel.RemoveSA(ctx, sa); err != nil {
			errs = append(errs, err)
			continue
		}
		changed = append(changed, "- "+sa.String())
	}
	for _, p := range l.policies {
		if wanted[p.IfID] {
			continue
		}
		if err := t.Kernel.RemovePolicy(ctx, p); err != nil {
			errs = append(errs, err)
			continue
		}
		changed = append(changed, "- "+p.String())
	}
	return changed, errors.Join(errs...)
}

// reinstallMissing makes the IKE daemon reinstall what the kernel has lost, as after "ip xfrm
// policy flush". The daemon does not check by itself. The tunnel would be dead until its keys are
// renewed.
func (t *Tunnels) reinstallMissing(ctx context.Context, tunnels []ipsec.Tunnel,
	l observation) (changed []string, err error) {
	lost := t.missing(tunnels, l)
	if len(lost) == 0 {
		return nil, nil
	}
	// State that changed between the observation of the kernel and that of the daemon seems lost.
	// So observe twice. State in both lists of the daemon was in the kernel at the second
	// observation of the kernel, or is really lost.
	if l, err = t.observe(ctx, false); err != nil {
		return nil, err
	}
	again := missingStates(tunnels, l)
	lost = slices.DeleteFunc(lost, func(l missingState) bool { return !slices.Contains(again, l) })
	var errs []error
	ended := map[string]bool{} // tunnels
	for _, l := range lost {
		switch g := t.reinstalls[l]; {
		case l.child != 0 && ended[l.tunnel]:
			continue
		case l.child != 0:
			err = t.Daemon.CloseChild(ctx, l.tunnel, l.child)
		case g.times > 0 && time.Since(g.last) < min(t.Every<<g.times, time.Hour):
			// Reinstall ends SAs, which other networks may use. So it must not run at every pass
			// when it does not help.
			errs = append(errs, fmt.Errorf("the kernel has no policies of %s/%s, and did not keep them when it was given "+
				"them %d times; ip xfrm policy lists what it has", l.tunnel, l.network, g.times))
			continue
		default:
			if t.reinstalls == nil {
				t.reinstalls = map[missingState]reinstallAttempt{}
			}
			t.reinstalls[l] = reinstallAttempt{g.times + 1, time.Now()}
			t.concern.Repairing(errors.New("the kernel lost policies; it is given them again"))
			ended[l.tunnel] = true
			err = t.Daemon.Reinstall(ctx, l.tunnel, l.network)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", l, err))
			continue
		}
		changed = append(changed, l.String())
	}
	if len(ended) > 0 {
		errs = append(errs, t.waitInstalled(ctx, tunnels))
	}
	return changed, errors.Join(errs...)
}

// waitInstalled waits, for at most two seconds, until the kernel has the reinstalled policies. The
// daemon ends SAs asynchronously to the command that asks for it.
func (t *Tunnels) waitInstalled(ctx context.Context, tunnels []ipsec.Tunnel) error {
	again := time.NewTicker(50 * time.Millisecond)
	defer again.Stop()
	for range 40 {
		l, err := t.observe(ctx, false)
		if err != nil {
			return err
		}
		if t.missing(tunnels, l); len(t.reinstalls) == 0 {
			return nil
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil // the next check reports what is still missing
}

// missing returns the losses. It forgets reinstalls of everything else, because that has arrived.
func (t *Tunnels) missing(tunnels []ipsec.Tunnel, l observation) []missingState {
	lost := missingStates(tunnels, l)
	maps.DeleteFunc(t.reinstalls, func(l missingState, _ reinstallAttempt) bool { return !slices.Contains(lost, l) })
	return lost
}

// A reinstallAttempt counts the reinstalls without effect, and has the time of the last one.
type reinstallAttempt struct {
	times int
	last  time.Time
}

// A missingState is a part of a tunnel that is in the kernel according to the IKE daemon, but is
// not there.
type missingState struct {
	tunnel, network string
	child           uint64 // the daemon's number of a pair of ESP SAs; 0: policies
	spi             uint32
}

func (l missingState) String() string {
	if l.child == 0 {
		return fmt.Sprintf("~ policies of %s/%s, which the kernel lost", l.tunnel, l.network)
	}
	return fmt.Sprintf("- ESP SA %#08x of %s/%s, which the kernel lost", l.spi, l.tunnel, l.network)
}

// missingStates compares the daemon's state with the kernel's, policies first. Of a pair of SAs it
// checks only the inbound SA, which is the first to appear and the last to vanish. For a packet
// without an outbound SA, the kernel asks for a new one.
func missingStates(tunnels []ipsec.Tunnel, l observation) (out []missingState) {
	type selector struct {
		ifID     uint32
		dir      string
		src, dst netip.Prefix
	}
	have := map[selector]bool{}
	for _, p := range l.policies {
		have[selector{p.IfID, p.Dir, p.Src, p.Dst}] = true
	}
	for _, x := range tunnels {
		for _, c := range x.Children {
			if slices.ContainsFunc(c.Subnets, func(p netip.Prefix) bool { // one subnet of each family, and families do not mix
				return !have[selector{c.IfID, "in", p, p}] || !have[selector{c.IfID, "fwd", p, p}] ||
					!have[selector{c.IfID, "out", p, p}]
			}) {
				out = append(out, missingState{tunnel: x.Name, network: c.Network})
			}
		}
	}
	there := map[saKey]bool{}
	for _, sa := range l.sas {
		there[saKey{sa.IfID, sa.SPI}] = true
	}
	for _, sa := range l.known {
		for _, c := range sa.Children {
			if c.State == ike.Installed && !there[saKey{c.IfID, c.SPIIn}] {
				out = append(out, missingState{sa.Name, c.Network, c.ID, c.SPIIn})
			}
		}
	}
	return out
}

// Reauth makes both ends of every established tunnel authenticate again, with the current secret or
// certificate. The new keys are made beside the old ones.
func (t *Tunnels) Reauth(ctx context.Context) error {
	sas, err := t.Daemon.SAs(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, sa := range sas {
		if sa.State == ike.Established {
			errs = append(errs, t.Daemon.Reauth(ctx, sa.Name))
		}
	}
	return errors.Join(errs...)
}

// Report returns the state of the tunnels. With detail it queries the daemon for each tunnel.
func (t *Tunnels) Report(ctx context.Context, detail bool) ipsec.Report {
	t.mu.Lock()
	r, tunnels := t.report, t.tunnels
	t.mu.Unlock()
	r.Tunnels = []ipsec.Status{}
	if r.Networks == nil {
		r.Networks = []string{}
		r.Problem, r.Remedy = "the network manager has not looked for encrypted networks yet",
			"it does as soon as the metadata service answers it: ask again"
	}
	if !detail || len(tunnels) == 0 {
		return r
	}
	sas, err := t.Daemon.SAs(ctx)
	if err != nil && r.Problem == "" {
		r.Problem, r.Remedy = err.Error(), "lariat-network-manager is about to start it, or to find it again"
	}
	byName := map[string][]ike.SA{}
	for _, sa := range sas {
		byName[sa.Name] = append(byName[sa.Name], sa)
	}
	failures := t.Daemon.LastErrors()
	for _, x := range tunnels {
		r.Tunnels = append(r.Tunnels, status(x, byName[x.Name], failures[x.Name], err == nil, time.Now()))
	}
	return r
}

// status combines the plan of a tunnel with its actual state. While keys change there is more than
// one SA, and the newest counts.
func status(x ipsec.Tunnel, sas []ike.SA, last ike.Failure, running bool, now time.Time) ipsec.Status {
	s := ipsec.Status{Peer: x.Peer, Remote: x.Remote, State: ipsec.StateIdle, Keys: x.Keys, LastError: last.Text,
		ErrorAt: last.At}
	if !running {
		s.State = ipsec.StateDown
	}
	for _, sa := range sas {
		if sa.State != ike.Established {
			if s.State == ipsec.StateIdle && sa.State == "CONNECTING" {
				s.State = ipsec.StateConnecting
			}
			continue
		}
		s.State, s.Since, s.Initiator, s.Encap, s.Suite = ipsec.StateEstablished,
			now.Add(-sa.Age).UTC().Truncate(time.Second), sa.Initiator, sa.NAT, sa.Suite
	}
	for _, c := range x.Children {
		child := ipsec.ChildStatus{Network: c.Network, IfID: c.IfID, Device: ipsec.Device(c.IfID), State: ipsec.StateIdle}
		if !running {
			child.State = ipsec.StateDown
		}
		newest := uint64(0)
		for _, sa := range sas {
			for _, have := range sa.Children {
				if have.Network != c.Network {
					continue
				}
				child.BytesIn += have.BytesIn
				child.BytesOut += have.BytesOut
				child.PacketsIn += have.PacketsIn
				child.PacketsOut += have.PacketsOut
				if have.State == ike.Installed && have.ID >= newest {
					newest = have.ID
					child.State, child.Suite = ipsec.StateEstablished, have.Suite
					child.Since = now.Add(-have.Age).UTC().Truncate(time.Second)
					child.RekeyIn = int64(have.RekeyIn / time.Second)
				}
			}
		}
		s.Children = append(s.Children, child)
	}
	return s
}
