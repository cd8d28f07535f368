package metadata

import (
	"encoding/json"
	"fmt"
	"net/netip"
)

// DefaultSocket is the socket where the metadata service listens for its own host.
const DefaultSocket = "/run/lariat/metadata.sock"

// DefaultStateDir is the directory of the CNI plugins' persistent files.
const DefaultStateDir = "/var/lib/lariat"

// AttachRequest asks for the addresses of one interface of one container. The answer to the same
// container id and interface name is always the same, until the pair is released.
type AttachRequest struct {
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifname"`

	// Requested addresses are allocated or refused, never replaced.
	Requested []netip.Addr `json:"requested,omitempty"`

	// Foreign says that another IPAM plugin chose the requested addresses. They are recorded and
	// announced (also outside the network's subnets). Lariat never allocates them itself.
	Foreign bool `json:"foreign,omitempty"`

	// WaitSeconds is how long to wait until the model lists the container with an address. With 0
	// there is no wait: an address that the model assigned is used, otherwise one is allocated.
	WaitSeconds int `json:"waitSeconds,omitempty"`

	UUID   string            `json:"uuid,omitempty"` // how the model may know the container before it runs
	Name   string            `json:"name,omitempty"`
	Labels map[string]string `json:"labels,omitempty"`
	MAC    MAC               `json:"mac,omitzero"`

	// StateDir is the directory in which the caller keeps its record of the interface. Only a
	// network manager that reads this directory can know that the addresses are not used any more.
	// Empty means DefaultStateDir.
	StateDir string `json:"stateDir,omitempty"`

	// Create defines the network when it does not exist yet.
	Create *Network `json:"create,omitempty"`
}

// Attachment is the complete input of an ADD, so that one round trip is enough.
type Attachment struct {
	Network       string `json:"network"`
	Encapsulation string `json:"encapsulation"`
	Device        string `json:"device,omitempty"` // carries the network on this host
	MTU           int    `json:"mtu"`              // for the container's interface
	// bytes that the encapsulation takes of the underlay's MTU
	Overhead    int                 `json:"overhead,omitempty"`
	MAC         MAC                 `json:"mac,omitzero"` // assigned by the model; zero: the caller's choice
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

// GCRequest lists the live attachments. Everything else that this host holds on the network is
// released. An absent list differs from an empty one, so the field is a pointer and nil is refused.
type GCRequest struct {
	Valid *[]AttachmentID `json:"valid"`
}

// AttachmentID identifies an interface of a container.
type AttachmentID struct {
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifname"`
}

func (a AttachmentID) String() string { return a.ContainerID + "/" + a.IfName }

// GCResult lists the released allocations.
type GCResult struct {
	Released []Allocation `json:"released"`
}

// NetworkStatus says whether the service could serve an ADD now.
type NetworkStatus struct {
	Network  string        `json:"network"`
	Ready    bool          `json:"ready"`
	Reason   string        `json:"reason,omitempty"` // why not, with a remedy
	Local    bool          `json:"local,omitempty"`  // the reason is on this host, and waiting does not cure it
	Usage    []SubnetUsage `json:"usage"`            // one per subnet
	Device   string        `json:"device,omitempty"` // that ADD expects on this host
	Revision int64         `json:"revision"`
}

// SubnetUsage counts one subnet's addresses. Free counts the addresses that this host could still
// allocate. These are the rest of its own blocks, unclaimed blocks and, without strict affinity,
// the rest of other hosts' blocks.
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
	KindTable     = "addresses" // of a block: its addresses in use
	KindLive      = "live"      // hosts whose service holds its lease
	KindProblem   = "problems"  // in a watch: the key is the Problem's key, the object describes the problem
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

// Error is an error answer of the control API.
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

// Errorf returns an Error.
func Errorf(code, format string, a ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, a...)}
}
