package ipsec

import (
	"net/netip"
	"time"
)

// States of a tunnel.
const (
	StateEstablished = "established" // both ends hold keys
	StateConnecting  = "connecting"  // IKE is at work
	StateIdle        = "idle"        // nothing was sent yet: the first packet sets it up
	StateDown        = "down"        // the IKE daemon does not run, or does not know the connection
)

// Report is what a host's network manager tells of its encrypted networks: GET /v1/tunnels.
type Report struct {
	Networks []string `json:"networks"` // that are encrypted, sorted; with none, the rest is empty

	// Missing says what the host lacks so that none of them can work: a feature of the kernel, the secret. ADD
	// is refused for it.
	Missing string `json:"missing,omitempty"`
	// Problem says what keeps tunnels from being set up or kept for now: the IKE daemon does not run, say.
	Problem string `json:"problem,omitempty"`
	Remedy  string `json:"remedy,omitempty"` // for either

	Daemon     string   `json:"daemon,omitempty"`     // such as "strongSwan 5.9.8"
	Supervised bool     `json:"supervised,omitempty"` // the manager started it, and starts it again
	Auth       string   `json:"auth,omitempty"`       // AuthPSK or AuthPubkey
	Keys       []string `json:"keys,omitempty"`       // ids of the secrets, the preferred one first
	Suites     []string `json:"suites,omitempty"`     // of ESP that this host offers, in strongSwan's words
	Tunnels    []Status `json:"tunnels"`              // one for each peer, sorted
}

// Status is how one tunnel fares.
type Status struct {
	Peer      string     `json:"peer"`
	Remote    netip.Addr `json:"remote"`
	State     string     `json:"state"`
	Since     time.Time  `json:"since,omitzero"` // that it has been established
	Initiator bool       `json:"initiator,omitempty"`
	Encap     bool       `json:"encap,omitempty"` // ESP goes in UDP: asked for, or a NAT was found
	Suite     string     `json:"suite,omitempty"` // of IKE
	Keys      []string   `json:"keys,omitempty"`  // ids, the one in use first

	LastError string    `json:"lastError,omitempty"` // since it was last established
	ErrorAt   time.Time `json:"errorAt,omitzero"`

	Children []ChildStatus `json:"children"` // sorted by network
}

// ChildStatus is the part of a tunnel that carries one network.
type ChildStatus struct {
	Network    string    `json:"network"`
	IfID       uint32    `json:"ifID"`
	Device     string    `json:"device"`
	State      string    `json:"state"` // as of the tunnel
	Since      time.Time `json:"since,omitzero"`
	Suite      string    `json:"suite,omitempty"` // of ESP
	BytesIn    uint64    `json:"bytesIn"`
	BytesOut   uint64    `json:"bytesOut"`
	PacketsIn  uint64    `json:"packetsIn"`
	PacketsOut uint64    `json:"packetsOut"`
	RekeyIn    int64     `json:"rekeyInSeconds,omitempty"`
}
