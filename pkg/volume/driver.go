// Package volume defines a volume driver, independent of its callers: kubelet's FlexVolume
// (pkg/volume/flex), Docker's volume plugin protocol, and a person at a shell.
//
//	kubelet ── argv, JSON ──► flex ──────┐
//	dockerd ── HTTP ────────► dockerapi ─┼─► Driver: nfs, efs, ebs, or any executable that speaks the protocol
//	a person ─ argv, JSON ──► flex ──────┘
//
// The package also holds code that drivers share. It decodes options into a struct and checks
// names. Its journal survives kill -9 and power failures. Its locks work between processes. The
// code that mounts is in pkg/volume/mounts.
package volume

import "context"

// Driver makes volumes and mounts them at directories of this host. It has one method for each verb
// of the protocols.
//
// These rules hold for every method:
//   - A caller may repeat a method with the same arguments, after success, after failure and after
//     a kill at any point. The result is the same as after one call. A state that is already
//     reached is a success.
//   - Several processes may run a method at the same time, even for one volume. Drivers lock each
//     volume separately, so that a hanging volume delays no other.
//   - A method ends when its context ends, even if a server or a kernel thread still blocks. The
//     error names the cause of the wait. A context without a deadline gets one: see Deadlines.
//   - A method does not continue after a failure that it cannot judge. A mount whose end is not
//     proven is not reported as unmounted. A device that is not proven blank is not formatted. A
//     directory that Lariat did not create is not purged.
//   - ErrNotSupported is a static fact about the driver. It depends neither on arguments, nor on
//     the host, nor on time. Callers remember it until they restart, and do without the verb.
//   - An error that IsFinal recurs with every call until something changes. The text says which
//     change is needed. All other errors may pass by themselves.
//   - Errors hold no secret.
type Driver interface {
	// Init returns the driver's capabilities. They are a constant and use no network, no file and
	// no state of the host. The reason is that kubelet does not ask again after a failure.
	Init(ctx context.Context) (Capabilities, error)

	// Create makes the volume, unless it exists. An existing volume that differs from the request
	// is an ErrConflict. Callers keep the reply's options and pass them with each later request.
	// Drivers do not depend on that. The next call resumes a creation that was cut short.
	Create(ctx context.Context, r Request) (Reply, error)
	// Delete removes the parts of the volume that Create made. It keeps all other parts, and the
	// reply's message says so. A volume that does not exist is a success. A volume that is mounted
	// here is an ErrInUse.
	Delete(ctx context.Context, r Request) (Reply, error)

	// GetVolumeName returns equal names for two requests if and only if they mean the same volume.
	// It reads only the request.
	GetVolumeName(ctx context.Context, r Request) (string, error)

	// Attach attaches the volume to a node and returns its device, which may be "". If node is "",
	// Attach uses this node.
	Attach(ctx context.Context, r Request, node string) (device string, err error)
	// WaitForAttach waits for the device and returns this node's name for it. The device argument
	// is the answer of Attach, or "" when the caller has forgotten that answer.
	WaitForAttach(ctx context.Context, device string, r Request) (string, error)
	// IsAttached reports whether a node has the volume.
	IsAttached(ctx context.Context, r Request, node string) (bool, error)
	// Detach reverses Attach. The volume argument is a device, or the orchestrator's name of the
	// volume. Detach gets no options, so drivers find the volume by their own record or the
	// cloud's. A volume that is attached nowhere, or only elsewhere, is a success.
	Detach(ctx context.Context, volume, node string) error

	// MountDevice mounts an attached volume for the whole node.
	MountDevice(ctx context.Context, dir, device string, r Request) error
	// UnmountDevice reverses MountDevice. Like Unmount, it knows only the directory.
	UnmountDevice(ctx context.Context, dir string) error

	// Mount mounts the volume at a directory and creates the directory if necessary. If something
	// else is mounted at the directory, Mount returns an ErrConflict. The device argument is the
	// answer of Attach, or "".
	Mount(ctx context.Context, dir, device string, r Request) error
	// Unmount reverses Mount. Success means that the mount table was read and shows nothing at the
	// directory. The directory stays, because it belongs to the caller. A directory with nothing
	// mounted is a success.
	Unmount(ctx context.Context, dir string) error

	// Expand enlarges the volume or its file system, and returns the current size.
	Expand(ctx context.Context, r Request, to Expansion) (size int64, err error)
}

// Capabilities are static facts about a driver.
type Capabilities struct {
	Attach bool // Attach and Detach have an effect, and a controller must call them
	// The caller may walk through the volume and set its group. Drivers of shared file systems set
	// the group themselves, on the top directory only.
	FSGroup          bool
	SELinuxRelabel   bool // the caller may relabel the volume
	SupportsMetrics  bool // statfs of the directory returns the volume's size
	RequiresFSResize bool // the file system must be enlarged after the volume
	Local            bool // one name means a different volume on each host; otherwise all hosts share it
}

// Request names a volume and its desired properties.
type Request struct {
	// Name of the volume in the orchestrator. Callers pass the name unchanged, and drivers check
	// it: see CheckName.
	Name string
	// DetachAs is the name that Detach will use. "" means Name. kubelet keeps its own name when the
	// user gives another.
	DetachAs string
	Options  map[string]string // the driver's own, as the user wrote them; see Decode
	ReadOnly bool
	FSType   string            // "": the driver's choice
	FSGroup  *int64            // group that is to own the volume
	Pod      Pod               // the consumer; it grants and denies nothing, because users can set it
	Secrets  map[string]string // by key, decoded; never written or shown
}

// Pod is the consumer of a mount, as far as the orchestrator reports it.
type Pod struct{ Namespace, Name, UID, ServiceAccount string }

// Reply is the answer of Create and Delete.
type Reply struct {
	Options map[string]string // facts about the volume, for the caller to keep
	Message string            // a notice for a person after a success, such as that data was kept
}

// Expansion is a request for more space.
type Expansion struct {
	Size, Old  int64  // bytes; Old is 0 when it is not known
	Device     string // the answer of Attach
	Dir        string // the directory where the volume is mounted
	FileSystem bool   // true: on the node, also the file system; false: only the volume, maybe from another host
}

// Unsupported answers every verb with ErrNotSupported. Drivers embed it and override the verbs that
// they support.
type Unsupported struct{}

var _ Driver = Unsupported{}

// Init implements Driver.
func (Unsupported) Init(context.Context) (Capabilities, error) {
	return Capabilities{}, ErrNotSupported
}

// Create implements Driver.
func (Unsupported) Create(context.Context, Request) (Reply, error) { return Reply{}, ErrNotSupported }

// Delete implements Driver.
func (Unsupported) Delete(context.Context, Request) (Reply, error) { return Reply{}, ErrNotSupported }

// GetVolumeName implements Driver.
func (Unsupported) GetVolumeName(context.Context, Request) (string, error) {
	return "", ErrNotSupported
}

// Attach implements Driver.
func (Unsupported) Attach(context.Context, Request, string) (string, error) {
	return "", ErrNotSupported
}

// WaitForAttach implements Driver.
func (Unsupported) WaitForAttach(context.Context, string, Request) (string, error) {
	return "", ErrNotSupported
}

// IsAttached implements Driver.
func (Unsupported) IsAttached(context.Context, Request, string) (bool, error) {
	return false, ErrNotSupported
}

// Detach implements Driver.
func (Unsupported) Detach(context.Context, string, string) error { return ErrNotSupported }

// MountDevice implements Driver.
func (Unsupported) MountDevice(context.Context, string, string, Request) error {
	return ErrNotSupported
}

// UnmountDevice implements Driver.
func (Unsupported) UnmountDevice(context.Context, string) error { return ErrNotSupported }

// Mount implements Driver.
func (Unsupported) Mount(context.Context, string, string, Request) error { return ErrNotSupported }

// Unmount implements Driver.
func (Unsupported) Unmount(context.Context, string) error { return ErrNotSupported }

// Expand implements Driver.
func (Unsupported) Expand(context.Context, Request, Expansion) (int64, error) {
	return 0, ErrNotSupported
}
