package doctor

import (
	"io/fs"
	"net/netip"
	"time"

	"github.com/lariat-net/lariat/pkg/delta"
	"github.com/lariat-net/lariat/pkg/ipsec"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// Facts is the input of a check-up. A nil group was not gathered. Its checks are skipped with the
// reason in Unavailable. An absent fact never counts as a good one.
type Facts struct {
	Self string // the host's name in the metadata

	Metadata *Metadata
	Manager  *Manager
	Kernel   *Kernel
	Features []Feature
	Peers    []Peer
	Secret   *SecretFile
	Own      []metadata.Allocation // this host's addresses, according to the metadata service
	Living   []metadata.Allocation // of running containers, by the journals; no host and no sequence

	Residents     []Resident // addresses of this host's containers
	Disagreements []string   // between journal, kernel and service, about this host's containers; nil: not compared

	// Unavailable has the reason why a group is absent. Groups are metadata, manager, kernel,
	// features, peers, store, entries, usage, forward, tunnels, secret, journal, attachments,
	// passages, containers and agreement.
	Unavailable map[string]string
}

// Metadata is the answer of the metadata service.
type Metadata struct {
	Socket   string
	Err      error // set when the service did not answer
	Snapshot *metadata.Snapshot
	Status   []metadata.NetworkStatus
	Store    *Store
	Problems []metadata.Problem // entries of the store that cannot be used; includes those of the snapshot
}

// Store is the state of the store behind the service.
type Store struct {
	Reason      string // empty: healthy
	Size, Quota int64  // bytes; quota 0: not known
}

// Manager is the answer of this host's network manager.
type Manager struct {
	Socket   string
	Err      error
	Concerns []Concern
	StateDir string        // directory of the journal that it reads; empty: not in the answer
	Tunnels  *ipsec.Report // of encrypted networks; nil: not in the answer
}

// SecretFile describes the file with the secret of encrypted networks. Its content is not read.
type SecretFile struct {
	Path  string
	There bool
	Mode  fs.FileMode
}

// A Concern is one reconcile loop of the manager.
type Concern struct {
	Name  string `json:"concern"`
	OK    bool   `json:"ok"`
	Error string `json:"error,omitempty"`
}

// Kernel is the state that was read from this host.
type Kernel struct {
	Sysctls   map[string]string     // keys with slashes: net/ipv4/ip_forward
	Links     map[string]Link       // every interface
	Devices   []Device              // our tunnel devices, existing and desired
	Endpoints []delta.EndpointFault // endpoints that lack something
	Chains    []Device              // desired nftables chains, as text
	Forward   []ForwardChain

	Passages []Passage // packets between endpoints; nil: none was sent
}

// Link is an interface.
type Link struct {
	MTU   int
	Up    bool
	Addrs []netip.Prefix
}

// Device compares one of our devices, as text, with its desired state.
type Device struct {
	Name string
	Want string // empty: not wanted any more
	Have string // empty: missing
}

// A ForwardChain sees forwarded packets, and its policy is to drop.
type ForwardChain struct {
	Name   string // as shown to people: "iptables filter FORWARD"
	V6     bool   // IPv6 packets; else IPv4
	Both   bool
	Passes bool // one of our rules accepts the networks' packets
}

// A Feature is an ability that the kernel must have.
type Feature struct {
	Name   string
	OK     bool
	Detail string // the test and its failure
	Remedy string
	Need   string // what fails without the feature
	IPv6   bool   // only networks with IPv6 need it

	Encap    string // only networks with this encapsulation need it; empty: all do
	Outer    int    // only an underlay of this family, 4 or 6, needs it; 0: any does
	Fallback bool   // a replacement exists, so its absence is a warning
}

// Peer is the result of probing another host.
type Peer struct {
	Host string
	Addr netip.Addr

	Echo    error // of a small echo request; nil: answered
	RTT     time.Duration
	Skew    time.Duration // its clock minus ours, plus or minus half of RTT
	WantMTU int           // the largest packet that tunnels to it make here; 0: no tunnel
	MTU     int           // the largest packet that arrived; 0: not measured
	MTUErr  error

	Overlay []Overlay
}

// Overlay is the result of an echo request to another host's overlay address.
type Overlay struct {
	Network string
	Port    uint16 // UDP; 0: the network is encrypted
	Gateway netip.Addr
	// The kernel's source address for this destination. When it differs from Ours, no overlay route
	// exists.
	Source netip.Addr
	Ours   netip.Addr
	Err    error
}
