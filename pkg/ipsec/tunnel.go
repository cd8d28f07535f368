package ipsec

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/printable"
)

// ConnPrefix begins the names of Lariat's connections and keys in the IKE daemon.
// Lariat never changes foreign connections and keys.
const ConnPrefix = "lariat-"

// These are the ways of authentication between hosts.
const (
	AuthPSK    = "psk"    // a key for each pair of hosts, derived from the secret that all hosts share
	AuthPubkey = "pubkey" // X.509 certificates
)

// Defaults of Options.
const (
	DefaultRekey = time.Hour
	DefaultDPD   = 30 * time.Second
)

// ReplayWindow is the number of packets that may arrive out of order (RFC 4303 §3.4.3). The kernel's default
// of 32 drops packets as soon as several queues are busy.
const ReplayWindow = 1024

// Options keeps the local settings of a host beside the metadata.
type Options struct {
	Auth  string // AuthPSK or AuthPubkey
	Encap bool   // always ESP in UDP, not only behind NAT

	// NoGCM says that this host's kernel lacks AES-GCM for ESP.
	// Tunnels then offers only the fallback.
	NoGCM bool

	Rekey time.Duration // lifetime of ESP keys; IKE keys live four times as long. 0: DefaultRekey
	DPD   time.Duration // silence after which the daemon checks a peer. 0: DefaultDPD

	// Keys are the ids of this host's secrets (Secrets.IDs). The preferred one comes first.
	Keys []string
}

// A Tunnel is one IKE connection to one peer, for all networks.
type Tunnel struct {
	Name          string // ConnPrefix and the peer's name
	Peer          string
	PeerBoot      string // the boot id of the peer: a peer loses all keys with a reboot
	Local, Remote netip.Addr
	LocalID       string // IKE identities
	RemoteID      string
	Auth          string
	Keys          []string // ids of the secrets of this pair's keys: the first is sent, all are accepted
	Encap         bool
	Proposals     []string // IKE suites in strongSwan's words
	Rekey         time.Duration
	DPD           time.Duration
	Children      []Child // sorted by network
}

// A Child is the ESP part of a tunnel for one network.
type Child struct {
	Network   string
	IfID      uint32
	Subnets   []netip.Prefix // the selectors of both sides
	Proposals []string
	Rekey     time.Duration
}

// The suites are in strongSwan's words.
// They have x25519 for forward secrecy, and ESP has extended sequence numbers.
// With AES-NI, AES-256-GCM is nearly as fast as AES-128-GCM, so the longer key comes first.
// CBC with SHA-256 is for kernels without GCM.
var (
	ikeSuites = []string{"aes256gcm16-prfsha256-x25519", "aes128gcm16-prfsha256-x25519", "aes256-sha256-x25519"}
	espGCM    = []string{"aes256gcm16-x25519-esn", "aes128gcm16-x25519-esn"}
	espCBC    = []string{"aes256-sha256-x25519-esn"}
)

// Identity returns the IKE identity of a host. The default is the host's name.
func Identity(h metadata.Host) string { return cmp.Or(h.IKEIdentity, h.Name) }

// Tunnels returns the connections of host self, sorted by name.
// It leaves out entries that cannot be planned. Plan names these entries in Problems.
//
// Keys that the peer has announced come first among a pair's keys, in this host's order.
// Therefore this host uses the old secret with a peer that lacks the new one.
// Both ends change to the new secret without help.
// Tunnels plans from the sane entries of the snapshot.
func Tunnels(snap *metadata.Snapshot, self string, o Options) []Tunnel {
	l, ok := layOut(snap.Sane(), self, delta.NewState())
	if !ok {
		return nil
	}
	rekey := cmp.Or(o.Rekey, DefaultRekey)
	esp := slices.Concat(espGCM, espCBC)
	if o.NoGCM {
		esp = espCBC
	}
	out := make([]Tunnel, 0, len(l.peers))
	for _, p := range l.peers {
		t := Tunnel{
			Name: ConnPrefix + p.Name, Peer: p.Name, PeerBoot: p.BootID, Local: l.me.UnderlayAddr(), Remote: p.Addr,
			LocalID: Identity(l.me), RemoteID: Identity(p.Host), Auth: cmp.Or(o.Auth, AuthPSK), Encap: o.Encap,
			Proposals: ikeSuites, Rekey: 4 * rekey, DPD: cmp.Or(o.DPD, DefaultDPD),
		}
		if t.Auth == AuthPSK {
			t.Keys = preferred(o.Keys, p.IKEKeys)
		}
		for _, n := range l.networks {
			t.Children = append(t.Children, Child{Network: n.Name, IfID: l.ids[[2]string{n.Name, p.Name}], Subnets: n.Subnets,
				Proposals: esp, Rekey: rekey})
		}
		out = append(out, t)
	}
	return out
}

// preferred returns mine with the peer's keys first.
func preferred(mine, peers []string) []string {
	out := slices.Clone(mine)
	slices.SortStableFunc(out, func(a, b string) int {
		hasA, hasB := slices.Contains(peers, a), slices.Contains(peers, b)
		switch {
		case hasA == hasB:
			return 0
		case hasA:
			return -1
		}
		return 1
	})
	return out
}

// String prints a line for the connection and one for each child. Keys show as their ids.
func (t Tunnel) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "conn  %s local %s id %s remote %s id %s auth %s", printable.Line(t.Name), t.Local,
		printable.Line(t.LocalID), t.Remote, printable.Line(t.RemoteID), t.Auth)
	if len(t.Keys) > 0 {
		fmt.Fprintf(&b, " keys %s", printable.Line(strings.Join(t.Keys, ",")))
	}
	if t.Encap {
		b.WriteString(" encap")
	}
	fmt.Fprintf(&b, " rekey %s dpd %s ike %s\n", t.Rekey, t.DPD, strings.Join(t.Proposals, ","))
	for _, c := range t.Children {
		fmt.Fprintf(&b, "child %s/%s if_id %#x subnets %s rekey %s esp %s\n", printable.Line(t.Name),
			printable.Line(c.Network), c.IfID, join(c.Subnets), c.Rekey, strings.Join(c.Proposals, ","))
	}
	return b.String()
}

func join(prefixes []netip.Prefix) string {
	words := make([]string, len(prefixes))
	for i, p := range prefixes {
		words[i] = p.String()
	}
	return strings.Join(words, ",")
}
