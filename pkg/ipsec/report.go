package ipsec

import (
	"net/netip"
	"time"
)

// States of a tunnel.
const (
	StateEstablished = "established" // both ends hold keys
	StateConnecting  = "connecting"  // IKE is at work
	StateIdle        = "idle"        // no packets yet: the first packet sets the tunnel up
	StateDown        = "down"        // the IKE daemon does not run, or does not know the connection
)

// A Report is the answer of a host's network manager to GET /v1/tunnels.
type Report struct {
	Networks []string `json:"networks"` // encrypted networks, sorted; without any, the other fields are empty

	// Missing names a requirement of all encrypted networks that the host lacks.
	// Examples are a feature of the kernel and the secret. ADD fails in this case.
	Missing string `json:"missing,omitempty"`
	// Problem names a temporary obstacle to tunnels, such as an IKE daemon that does not run.
	Problem string `json:"problem,omitempty"`
	Remedy  string `json:"remedy,omitempty"` // for Missing or Problem

	Daemon     string   `json:"daemon,omitempty"`     // such as "strongSwan 5.9.8"
	Supervised bool     `json:"supervised,omitempty"` // the manager starts and restarts the daemon
	Auth       string   `json:"auth,omitempty"`       // AuthPSK or AuthPubkey
	Keys       []string `json:"keys,omitempty"`       // ids of the secrets, the preferred one first
	Suites     []string `json:"suites,omitempty"`     // ESP suites that this host offers, in strongSwan's words
	Tunnels    []Status `json:"tunnels"`              // one for each peer, sorted
}

// A Status is the status of one tunnel.
type Status struct {
	Peer      string     `json:"peer"`
	Remote    netip.Addr `json:"remote"`
	State     string     `json:"state"`
	Since     time.Time  `json:"since,omitzero"` // time of establishment
	Initiator bool       `json:"initiator,omitempty"`
	Encap     bool       `json:"encap,omitempty"` // ESP in UDP: configured, or IKE found a NAT
	Suite     string     `json:"suite,omitempty"` // of IKE
	Keys      []string   `json:"keys,omitempty"`  // ids, the one in use first

	LastError string    `json:"lastError,omitempty"` // since the last establishment
	ErrorAt   time.Time `json:"errorAt,omitzero"`

	Children []ChildStatus `json:"children"` // sorted by network
}

// A ChildStatus is the status of the part of a tunnel that carries one network.
type ChildStatus struct {
	Network    string    `json:"network"`
	IfID       uint32    `json:"ifID"`
	Device     string    `json:"device"`
	State      string    `json:"state"` // one of the states of a tunnel
	Since      time.Time `json:"since,omitzero"`
	Suite      string    `json:"suite,omitempty"` // of ESP
	BytesIn    uint64    `json:"bytesIn"`
	BytesOut   uint64    `json:"bytesOut"`
	PacketsIn  uint64    `json:"packetsIn"`
	PacketsOut uint64    `json:"packetsOut"`
	RekeyIn    int64     `json:"rekeyInSeconds,omitempty"`
}
