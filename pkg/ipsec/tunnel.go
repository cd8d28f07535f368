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

// ConnPrefix begins the name of every IKE connection, and of every secret, that Lariat gives to the IKE
// daemon. Others are never touched.
const ConnPrefix = "lariat-"

// How hosts prove to each other who they are.
const (
	AuthPSK    = "psk"    // a key for each pair of hosts, derived from the secret that all of them share
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

// Options are what a host knows beside the metadata.
type Options struct {
	Auth  string // AuthPSK or AuthPubkey
	Encap bool   // ESP in UDP always, not only behind NAT

	// NoGCM says that this host's kernel lacks AES-GCM for ESP: only the fallback is offered.
	NoGCM bool

	Rekey time.Duration // of the ESP keys; those of IKE live four times as long. 0: DefaultRekey
	DPD   time.Duration // how long a silent peer is believed in. 0: DefaultDPD

	// Keys are the ids of this host's secrets (Secrets.IDs), the one to use first at the front.
	Keys []string
}

// Tunnel is one IKE connection: to one peer, for all networks.
type Tunnel struct {
	Name          string // ConnPrefix and the peer's name
	Peer          string
	PeerBoot      string // the boot id of the peer: under another one it has forgotten all its keys
	Local, Remote netip.Addr
	LocalID       string // IKE identities, by which the peers know each other
	RemoteID      string
	Auth          string
	Keys          []string // ids of the secrets this pair's keys derive from: the first to send, all to accept
	Encap         bool
	Proposals     []string // of IKE, in strongSwan's words
	Rekey         time.Duration
	DPD           time.Duration
	Children      []Child // sorted by network
}

// Child is the ESP part of a tunnel for one network.
type Child struct {
	Network   string
	IfID      uint32
	Subnets   []netip.Prefix // the selectors of both sides
	Proposals []string
	Rekey     time.Duration
}

// Suites in strongSwan's words: x25519 for forward secrecy, extended sequence numbers. An AES-NI core does
// AES-256-GCM at nearly the speed of AES-128-GCM, so the longer key is offered first. CBC with SHA-256 is for
// kernels without GCM.
var (
	ikeSuites = []string{"aes256gcm16-prfsha256-x25519", "aes128gcm16-prfsha256-x25519", "aes256-sha256-x25519"}
	espGCM    = []string{"aes256gcm16-x25519-esn", "aes128gcm16-x25519-esn"}
	espCBC    = []string{"aes256-sha256-x25519-esn"}
)

// Identity is the IKE identity of a host: its name, unless the metadata says otherwise.
func Identity(h metadata.Host) string { return cmp.Or(h.IKEIdentity, h.Name) }

// Tunnels returns the connections that host self has to offer, sorted by name. What cannot be planned is left
// out, as in Plan, which tells why.
//
// Of a pair's keys, the first of this host's that the peer has announced too comes first: a peer that does
// not have a new secret yet is still spoken to with the old one, and both ends change over on their own.
// Whatever the snapshot holds, Tunnels plans from what is sane of it.
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

// preferred puts the keys that the peer has as well in front.
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
