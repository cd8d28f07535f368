package metadata

import (
	"encoding/json"
	"fmt"
	"net/netip"
)

// DefaultSocket is where the metadata service listens for its own host.
const DefaultSocket = "/run/lariat/metadata.sock"

// DefaultStateDir is where the CNI plugins of a host keep what must survive their processes.
const DefaultStateDir = "/var/lib/lariat"

// AttachRequest asks for the addresses of one interface of one container. The answer to the same container id
// and interface name is always the same, however often it is asked, until the pair is released.
type AttachRequest struct {
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifname"`

	// Requested addresses are given or refused, never replaced.
	Requested []netip.Addr `json:"requested,omitempty"`

	// Foreign says that another IPAM plugin chose the requested addresses. They are recorded and announced
	// (also outside of the network's subnets), and never handed out by us.
	Foreign bool `json:"foreign,omitempty"`

	// WaitSeconds: how long to wait until the model lists the container with an address. 0 does not wait: an
	// address that the model assigned is used, otherwise one is allocated.
	WaitSeconds int `json:"waitSeconds,omitempty"`

	UUID   string            `json:"uuid,omitempty"` // how the model may know the container before it runs
	Name   string            `json:"name,omitempty"`
	Labels map[string]string `json:"labels,omitempty"`
	MAC    MAC               `json:"mac,omitzero"`

	// StateDir is the folder in which the caller keeps its record of the interface: only a network manager that
	// looks there can know that nobody uses the addresses any more. Empty: DefaultStateDir.
	StateDir string `json:"stateDir,omitempty"`

	// Create defines the network when it does not exist yet.
	Create *Network `json:"create,omitempty"`
}

// Attachment is all that an ADD needs to know: one round trip.
type Attachment struct {
	Network       string `json:"network"`
	Encapsulation string `json:"encapsulation"`
	Device        string `json:"device,omitempty"` // that carries the network on this host
	MTU           int    `json:"mtu"`              // for the container's interface
	// octets that the encapsulation takes of the underlay's MTU
	Overhead    int                 `json:"overhead,omitempty"`
	MAC         MAC                 `json:"mac,omitzero"` // that the model assigned; zero: the caller's choice
	Addresses   []AttachmentAddress `json:"addresses"`    // IPv4 before IPv6
	Subnets     []netip.Prefix      `json:"subnets"`      // of the network
	Host        string              `json:"host"`         // that owns the attachment
	BootID      string              `json:"bootID"`       // under which it was recorded
	PreAssigned bool                `json:"preAssigned,omitempty"`
}

// AttachmentAddress is one address of an interface.
type AttachmentAddress struct {
	Address  netip.Addr   `json:"address"`
	Subnet   netip.Prefix `json:"subnet,omitzero"`  // of the network that holds it; unset for a foreign address outside
	Gateway  netip.Addr   `json:"gateway,omitzero"` // the host's overlay address, or the LAN's router
	Sequence uint64       `json:"sequence,omitempty"`
}

// GCRequest lists what is alive; everything else that this host holds on the network is released. An absent list
// and an empty one are different things, so the field is a pointer and nil is refused.
type GCRequest struct {
	Valid *[]AttachmentID `json:"valid"`
}

// AttachmentID names an interface of a container.
type AttachmentID struct {
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifname"`
}

func (a AttachmentID) String() string { return a.ContainerID + "/" + a.IfName }

// GCResult says what was released.
type GCResult struct {
	Released []Allocation `json:"released"`
}

// NetworkStatus is the answer to "could you serve an ADD now?".
type NetworkStatus struct {
	Network  string        `json:"network"`
	Ready    bool          `json:"ready"`
	Reason   string        `json:"reason,omitempty"` // why not, with a remedy
	Local    bool          `json:"local,omitempty"`  // the reason is this host's, and waiting does not cure it
	Usage    []SubnetUsage `json:"usage"`            // one per subnet
	Device   string        `json:"device,omitempty"` // that ADD expects on this host
	Revision int64         `json:"revision"`
}

// SubnetUsage counts one subnet's addresses. Free counts what this host could still hand out: the rest of its own
// blocks, unclaimed blocks, and, without strict affinity, what other hosts' blocks have left.
type SubnetUsage struct {
	Subnet     netip.Prefix `json:"subnet"`
	Blocks     int          `json:"blocks"`     // claimed, by all hosts
	BlocksFree int          `json:"blocksFree"` // not claimed
	Used       int          `json:"used"`       // allocated in this host's blocks
	Free       int          `json:"free"`
}

// Event is one line of a watch.
type Event struct {
	// put, delete, snapshot (start over from it), bookmark (nothing new up to Revision)
	Type     string          `json:"type"`
	Kind     string          `json:"kind,omitempty"`
	Key      string          `json:"key,omitempty"` // within the kind, as in the API's path
	Revision int64           `json:"revision"`
	Object   json.RawMessage `json:"object,omitempty"`
	Away     string          `json:"away,omitempty"` // of a bookmark: as that of a Snapshot
}

// Event types and kinds.
const (
	EventPut      = "put"
	EventDelete   = "delete"
	EventSnapshot = "snapshot"
	EventBookmark = "bookmark"

	KindHost      = "hosts"
	KindNetwork   = "networks"
	KindBlock     = "blocks"
	KindHostRoute = "endpoints"
	KindContainer = "containers"
	KindVolume    = "volumes"
	KindTable     = "addresses" // of a block: which of its addresses are in use
	KindLive      = "live"      // hosts whose service holds its lease
	KindProblem   = "problems"  // of a watch: the key is that of a Problem, the object says what is wrong
)

// Error codes of the control API.
const (
	CodeInvalid     = "invalid"     // 400: the request can never succeed
	CodeNotFound    = "not-found"   // 404
	CodeHeld        = "held"        // 409: another attachment, or a host, holds the address
	CodeConflict    = "conflict"    // 409: the object exists and differs
	CodeExhausted   = "exhausted"   // 507: no address left
	CodeNotYet      = "not-yet"     // 504: the model does not list the container yet
	CodeUnavailable = "unavailable" // 503: the store does not answer
	CodeInternal    = "internal"    // 500
)

// Error is how the control API says no.
type Error struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Details string `json:"details,omitempty"`
}

func (e *Error) Error() string {
	if e.Details == "" {
		return e.Message
	}
	return e.Message + "; " + e.Details
}

// Errorf makes an Error.
func Errorf(code, format string, a ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, a...)}
}
