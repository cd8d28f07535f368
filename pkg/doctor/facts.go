package doctor

import (
	"io/fs"
	"net/netip"
	"time"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/ipsec"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// Facts is what a check-up knows. A group that is nil was not looked at, and its checks are skipped with the
// reason that Unavailable gives for it; an absent fact never passes for a good one.
type Facts struct {
	Self string // the host's name in the metadata

	Metadata *Metadata
	Manager  *Manager
	Kernel   *Kernel
	Features []Feature
	Peers    []Peer
	Secret   *SecretFile
	Own      []metadata.Allocation // this host's addresses, as the metadata service knows them
	Living   []metadata.Allocation // what containers that run have, as the plugins noted; no host and no sequence

	Residents     []Resident // addresses of this host's containers
	Disagreements []string   // of journal, kernel and service, about this host's containers; nil: not compared

	// Unavailable says for a group (metadata, manager, kernel, features, peers, store, entries, usage, forward,
	// tunnels, secret, journal, attachments, passages, containers, agreement) why it is absent.
	Unavailable map[string]string
}

// Metadata is what the metadata service said.
type Metadata struct {
	Socket   string
	Err      error // it did not say anything
	Snapshot *metadata.Snapshot
	Status   []metadata.NetworkStatus
	Store    *Store
	Problems []metadata.Problem // entries of the store that cannot be used; the snapshot's are among them
}

// Store is the state of the store behind the service.
type Store struct {
	Reason      string // why it is not healthy; empty: it is
	Size, Quota int64  // octets; a quota of 0 is not known
}

// Manager is what this host's network manager said.
type Manager struct {
	Socket   string
	Err      error
	Concerns []Concern
	StateDir string        // where it looks for the plugins' journal; empty: it did not say
	Tunnels  *ipsec.Report // of encrypted networks; nil: it did not say
}

// SecretFile is the file that holds the secret of encrypted networks. What is in it is not read.
type SecretFile struct {
	Path  string
	There bool
	Mode  fs.FileMode
}

// Concern is one thing that the manager keeps true.
type Concern struct {
	Name  string `json:"concern"`
	OK    bool   `json:"ok"`
	Error string `json:"error,omitempty"`
}

// Kernel is what was read from this host.
type Kernel struct {
	Sysctls   map[string]string     // keys with slashes: net/ipv4/ip_forward
	Links     map[string]Link       // every interface
	Devices   []Device              // tunnel devices of ours, and those that should be there
	Endpoints []delta.EndpointFault // containers' ports that lack something
	Chains    []Device              // nftables chains that should be there, as text
	Forward   []ForwardChain

	Passages []Passage // packets from port to port; nil: none was sent
}

// Link is an interface.
type Link struct {
	MTU   int
	Up    bool
	Addrs []netip.Prefix
}

// Device compares a device of ours, as text, with what it should be.
type Device struct {
	Name string
	Want string // empty: nothing wants it any more
	Have string // empty: it is not there
}

// ForwardChain is a chain that forwarded packets pass and whose policy is to drop.
type ForwardChain struct {
	Name   string // for people: "iptables filter FORWARD"
	V6     bool   // IPv6 packets; else IPv4
	Both   bool
	Passes bool // a rule of ours lets the networks' packets through
}

// Feature is something that the kernel must be able to do.
type Feature struct {
	Name   string
	OK     bool
	Detail string // what was tried and how it failed
	Remedy string
	Need   string // what does not work without it
	IPv6   bool   // only networks with IPv6 need it

	Encap    string // only networks with this encapsulation need it; empty: all do
	Outer    int    // only an underlay of this family, 4 or 6, needs it; 0: any does
	Fallback bool   // something else takes its place: missing it is a warning
}

// Peer is what probing another host told.
type Peer struct {
	Host string
	Addr netip.Addr

	Echo    error // of a small question; nil: it was answered
	RTT     time.Duration
	Skew    time.Duration // its clock less ours, give or take half of RTT
	WantMTU int           // the largest packet that tunnels to it make here; 0: there is none
	MTU     int           // the largest that came through; 0: not measured
	MTUErr  error

	Overlay []Overlay
}

// Overlay is what came of an echo request to another host's overlay address.
type Overlay struct {
	Network string
	Port    uint16 // UDP; 0: the network is encrypted
	Gateway netip.Addr
	// from which the kernel would send there; not ours on that network: there is no route by the overlay
	Source netip.Addr
	Ours   netip.Addr
	Err    error
}
