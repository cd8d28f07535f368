// Package volume is what a volume driver is, behind whichever door it is called: kubelet's FlexVolume
// (pkg/volume/flex), Docker's volume plugin protocol, a person at a shell.
//
//	kubelet ── argv, JSON ──► flex ──────┐
//	dockerd ── HTTP ────────► dockerapi ─┼─► Driver: nfs, efs, ebs, or any executable that speaks the protocol
//	a person ─ argv, JSON ──► flex ──────┘
//
// Beside the interface it holds what drivers share: options that decode into a struct, checks of names, a
// journal that survives kill -9 and power failures, locks between processes. What mounts is in
// pkg/volume/mounts.
package volume

import "context"

// Driver makes volumes and brings them to folders of this host. One method for each verb of the protocols.
//
// All of it is true for every method:
//   - It may be repeated, with the same arguments, after success, after failure and after its process was
//     killed at any point, and the end is the same as if it had been called once. What is already so is a
//     success.
//   - It may run at the same time in several processes, and for one volume too; drivers lock for each
//     volume, so that one that hangs holds up no other.
//   - It ends when its context does, whatever a server or a kernel thread is waiting for, and the error
//     says what it waited for. A context without a deadline is given one: see Deadlines.
//   - It never acts beyond a failure that it cannot judge: a mount whose end could not be proven is not
//     reported as unmounted, a device not proven blank is not formatted, a folder that Lariat did not
//     create is not purged.
//   - ErrNotSupported is a static fact about the driver: it depends on neither arguments, nor the host,
//     nor the hour. Callers remember it until they restart, and do without the verb.
//   - An error that IsFinal comes back however often the call is repeated: something must change first,
//     and the text says what. All others may pass by themselves.
//   - Errors hold no secret.
type Driver interface {
	// Init says what the driver can do. It is a constant: no network, no file, no look at the host, for kubelet
	// does not ask again after a failure.
	Init(ctx context.Context) (Capabilities, error)

	// Create makes the volume, unless it is there. One that is there and differs from what the request asks for is an
	// ErrConflict. The reply's options are to be kept and given back with each later request; drivers do
	// not depend on that. A creation that was cut short is resumed by the next call.
	Create(ctx context.Context, r Request) (Reply, error)
	// Delete removes the volume, as far as it was made by Create; what was not is kept, and the reply's message says so.
	// A volume that does not exist is a success, one that is mounted here an ErrInUse.
	Delete(ctx context.Context, r Request) (Reply, error)

	// GetVolumeName is the same for two requests if and only if they mean the same volume. It reads nothing but
	// the request.
	GetVolumeName(ctx context.Context, r Request) (string, error)

	// Attach brings the volume to a node, or this one if node is "", and returns its device, which may be "".
	Attach(ctx context.Context, r Request, node string) (device string, err error)
	// WaitForAttach returns the device as this node calls it, when it is there. The device argument is what
	// Attach answered, or "" when the caller has forgotten it.
	WaitForAttach(ctx context.Context, device string, r Request) (string, error)
	// IsAttached says whether a node has the volume.
	IsAttached(ctx context.Context, r Request, node string) (bool, error)
	// Detach is Attach's opposite. The volume is a device, or the volume's name as the orchestrator knows it:
	// there are no options, so drivers find the volume by their own record or by the cloud's. One that is
	// attached nowhere, or elsewhere only, is a success.
	Detach(ctx context.Context, volume, node string) error

	// MountDevice mounts an attached volume for the whole node.
	MountDevice(ctx context.Context, dir, device string, r Request) error
	// UnmountDevice is MountDevice's opposite. As Unmount, it is told nothing but the folder.
	UnmountDevice(ctx context.Context, dir string) error

	// Mount makes the volume appear at a folder, which it creates if need be. A folder where something else is
	// mounted is an ErrConflict. The device is what Attach answered, or "".
	Mount(ctx context.Context, dir, device string, r Request) error
	// Unmount ends what Mount began. Success means that the mount table was read and shows nothing at the folder
	// any more. The folder stays; it is the caller's. A folder with nothing mounted is a success.
	Unmount(ctx context.Context, dir string) error

	// Expand makes the volume larger, or its file system, and returns the size it has now.
	Expand(ctx context.Context, r Request, to Expansion) (size int64, err error)
}

// Capabilities are static facts about a driver.
type Capabilities struct {
	Attach bool // Attach and Detach mean something, and a controller is to call them
	// the caller may walk through the volume and set its group; drivers of shared file systems set it
	// themselves, on top only
	FSGroup          bool
	SELinuxRelabel   bool // the caller may relabel the volume
	SupportsMetrics  bool // statfs of the folder tells the volume's size
	RequiresFSResize bool // after the volume, its file system must be made larger
	Local            bool // a volume of one name is another one on each host; otherwise all hosts see the same
}

// Request is a volume, and how it is wanted.
type Request struct {
	// Name of the volume as the orchestrator knows it. Doors pass it as it came, and drivers check it: see CheckName.
	Name string
	// what Detach will call it; "": Name. kubelet keeps to its own name when the user gives another
	DetachAs string
	Options  map[string]string // the driver's own, as the user wrote them; see Decode
	ReadOnly bool
	FSType   string            // "": the driver's choice
	FSGroup  *int64            // group that the volume is to belong to
	Pod      Pod               // for whom; nothing is allowed or refused on its account, for users can set it
	Secrets  map[string]string // by key, decoded; they are never written or shown
}

// Pod is whom a volume is mounted for, as far as the orchestrator tells.
type Pod struct{ Namespace, Name, UID, ServiceAccount string }

// Reply of Create and Delete.
type Reply struct {
	Options map[string]string // facts about the volume, to be kept with it
	Message string            // what a person should know though all went well, such as that data was kept
}

// Expansion is a wish for more room.
type Expansion struct {
	Size, Old  int64  // bytes; Old is 0 when it is not known
	Device     string // as Attach answered
	Dir        string // where the volume is mounted
	FileSystem bool   // on the node, the file system also; otherwise only the volume, maybe from elsewhere
}

// Unsupported answers every verb with ErrNotSupported. Drivers embed it and override what they can do.
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
