package flex

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os/exec"
	"strconv"
	"strings"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/mounts"
)

// Shape is the dialect that a Client speaks.
type Shape int

// The two dialects. See the package's comment.
const (
	Rancher    Shape = iota // attach JSON, mount DIR DEVICE JSON, detach DEVICE; with create and delete
	Kubernetes              // attach JSON NODE, mount DIR JSON, detach NAME NODE
)

// Client makes a driver of any executable that speaks the protocol. A shell script of twenty lines
// is enough. Client accepts the habits of such scripts: keys in any case, unknown fields, words on
// standard error. It also accepts an exit status without JSON.
//
// Each call ends with its context, which kills the executable and its child processes. A program
// that answers "not supported" for one argument is asked again each time. Callers may remember the
// answer.
//
// Secrets in argv would be readable for every user of the host. Therefore Client refuses requests
// with secrets unless AllowSecrets is set.
type Client struct {
	Path         string
	Shape        Shape
	Env          []string // the complete environment; nil: this process's own
	AllowSecrets bool
}

var _ volume.Driver = Client{}

// call executes the program with a verb and its arguments, and returns the parsed answer.
func (c Client) call(ctx context.Context, args ...string) (Reply, error) {
	verb := args[0]
	d := volume.Deadlines.Short
	if v, ok := verbs[verb]; ok && v.long {
		d = volume.Deadlines.Long
	}
	ctx, cancel := volume.WithDeadline(ctx, d)
	defer cancel()
	cmd := exec.Command(c.Path, args...)
	cmd.Env = c.Env
	out, words, err := mounts.Run(ctx, cmd)
	said := words
	if text := oneLine(string(bytes.TrimSpace(out))); text != "" {
		said = strings.TrimPrefix(said+"; "+text, "; ")
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		if said != "" {
			return Reply{}, fmt.Errorf("%s %s: %w; it said: %s", c.Path, verb, err, oneLine(said))
		}
		return Reply{}, fmt.Errorf("%s %s: %w", c.Path, verb, err)
	}
	status := 0
	if exit != nil {
		status = exit.ExitCode()
	}
	r, perr := ParseReply(out)
	switch {
	case perr != nil && status != 0 && said != "":
		return r, fmt.Errorf("%s %s: exit status %d: %s", c.Path, verb, status, oneLine(said))
	case perr != nil && words != "":
		return r, fmt.Errorf("%s %s: exit status %d, %w; it said: %s", c.Path, verb, status, perr, oneLine(words))
	case perr != nil:
		return r, fmt.Errorf("%s %s: exit status %d, %w", c.Path, verb, status, perr)
	case r.Status == NotSupported:
		return r, volume.ErrNotSupported
	case r.Status == Failure && r.Message == "":
		return r, fmt.Errorf("%s %s failed and does not say why; it said: %s", c.Path, verb, oneLine(words))
	case r.Status == Failure:
		return r, errors.New(oneLine(r.Message))
	case status != 0:
		return r, fmt.Errorf("%s %s: says Success, with exit status %d", c.Path, verb, status)
	}
	return r, nil
}

// ParseReply parses a driver's answer. Keys may be in any case, and unknown keys are ignored. More
// than one document is an error. So is a status other than the three.
func ParseReply(out []byte) (r Reply, err error) {
	if len(bytes.TrimSpace(out)) == 0 {
		return r, errors.New("the answer is empty, where one JSON document is due")
	}
	dec := json.NewDecoder(bytes.NewReader(out))
	if err := dec.Decode(&r); err != nil {
		return Reply{}, fmt.Errorf("the answer is not JSON as it should be: %w: %s", err, volume.Excerpt(string(out)))
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return Reply{}, fmt.Errorf("the answer is more than one JSON document: %s", volume.Excerpt(string(out)))
	}
	switch r.Status {
	case Success, Failure, NotSupported:
		return r, nil
	}
	return Reply{}, fmt.Errorf("the answer's status is %s, and not Success, Failure or Not supported",
		volume.Excerpt(r.Status))
}

// EncodeRequest reverses DecodeRequest.
func EncodeRequest(r volume.Request, shape Shape) string {
	flat := maps.Clone(r.Options)
	if flat == nil {
		flat = map[string]string{}
	}
	if shape == Rancher {
		flat["rancher"] = "true"
	}
	if shape == Rancher || r.DetachAs != "" {
		flat["name"] = r.Name
	}
	flat[keyName], flat[keyFSType] = cmp.Or(r.DetachAs, r.Name), r.FSType
	flat[keyReadWrite] = "rw"
	if r.ReadOnly {
		flat[keyReadWrite] = "ro"
	}
	if r.FSGroup != nil {
		flat[keyFSGroup] = strconv.FormatInt(*r.FSGroup, 10)
	}
	for k, v := range map[string]string{keyPodName: r.Pod.Name, keyPodNamespace: r.Pod.Namespace, keyPodUID: r.Pod.UID,
		keyServiceAccount: r.Pod.ServiceAccount} {
		if v != "" {
			flat[k] = v
		}
	}
	for k, v := range r.Secrets {
		flat[prefixSecret+k] = base64.StdEncoding.EncodeToString([]byte(v))
	}
	data, _ := json.Marshal(flat) // encoding a map of strings cannot fail
	return string(data)
}

func (c Client) encode(r volume.Request) (string, error) {
	if err := volume.CheckName(r.Name); err != nil {
		return "", err
	}
	if err := volume.CheckOptions(r.Options); err != nil {
		return "", err
	}
	if len(r.Secrets) > 0 && !c.AllowSecrets {
		return "", volume.Errorf(volume.ErrInvalid, "%s is called with its options as arguments, which every user of "+
			"the host can read: it gets no secrets", c.Path)
	}
	return EncodeRequest(r, c.Shape), nil
}

// Init implements volume.Driver. Capabilities missing from the answer have kubelet's defaults.
func (c Client) Init(ctx context.Context) (volume.Capabilities, error) {
	r, err := c.call(ctx, "init")
	if err != nil {
		return volume.Capabilities{}, err
	}
	caps := r.Capabilities
	if caps == nil {
		caps = &Capabilities{Attach: true, FSGroup: true, SELinuxRelabel: true, RequiresFSResize: true}
	}
	return volume.Capabilities{Attach: caps.Attach, FSGroup: caps.FSGroup, SELinuxRelabel: caps.SELinuxRelabel,
		SupportsMetrics: caps.SupportsMetrics, RequiresFSResize: caps.RequiresFSResize}, nil
}

// UnmarshalJSON sets missing members to kubelet's defaults.
func (c *Capabilities) UnmarshalJSON(data []byte) error {
	type plain Capabilities
	p := plain{Attach: true, FSGroup: true, SELinuxRelabel: true, RequiresFSResize: true}
	if err := json.Unmarshal(data, &p); err != nil {
		return err
	}
	*c = Capabilities(p)
	return nil
}

// Create implements volume.Driver.
func (c Client) Create(ctx context.Context, r volume.Request) (volume.Reply, error) {
	return c.change(ctx, "create", r)
}

// Delete implements volume.Driver.
func (c Client) Delete(ctx context.Context, r volume.Request) (volume.Reply, error) {
	return c.change(ctx, "delete", r)
}

func (c Client) change(ctx context.Context, verb string, r volume.Request) (volume.Reply, error) {
	arg, err := c.encode(r)
	if err != nil {
		return volume.Reply{}, err
	}
	said, err := c.call(ctx, verb, arg)
	return volume.Reply{Options: said.Options, Message: said.Message}, err
}

// GetVolumeName implements volume.Driver.
func (c Client) GetVolumeName(ctx context.Context, r volume.Request) (string, error) {
	arg, err := c.encode(r)
	if err != nil {
		return "", err
	}
	said, err := c.call(ctx, "getvolumename", arg)
	return said.VolumeName, err
}

// Attach implements volume.Driver.
func (c Client) Attach(ctx context.Context, r volume.Request, node string) (string, error) {
	arg, err := c.encode(r)
	if err != nil {
		return "", err
	}
	args := []string{"attach", arg}
	if c.Shape == Kubernetes {
		args = append(args, node)
	}
	said, err := c.call(ctx, args...)
	return said.Device, err
}

// WaitForAttach implements volume.Driver.
func (c Client) WaitForAttach(ctx context.Context, device string, r volume.Request) (string, error) {
	arg, err := c.encode(r)
	if err != nil {
		return "", err
	}
	said, err := c.call(ctx, "waitforattach", device, arg)
	return said.Device, err
}

// IsAttached implements volume.Driver.
func (c Client) IsAttached(ctx context.Context, r volume.Request, node string) (bool, error) {
	arg, err := c.encode(r)
	if err != nil {
		return false, err
	}
	said, err := c.call(ctx, "isattached", arg, node)
	return said.Attached != nil && *said.Attached, err
}

// Detach implements volume.Driver.
func (c Client) Detach(ctx context.Context, vol, node string) error {
	args := []string{"detach", vol}
	if c.Shape == Kubernetes {
		args = append(args, node)
	}
	_, err := c.call(ctx, args...)
	return err
}

// MountDevice implements volume.Driver.
func (c Client) MountDevice(ctx context.Context, dir, device string, r volume.Request) error {
	arg, err := c.encode(r)
	if err != nil {
		return err
	}
	_, err = c.call(ctx, "mountdevice", dir, device, arg)
	return err
}

// Mount implements volume.Driver.
func (c Client) Mount(ctx context.Context, dir, device string, r volume.Request) error {
	arg, err := c.encode(r)
	if err != nil {
		return err
	}
	args := []string{"mount", dir, device, arg}
	if c.Shape == Kubernetes {
		args = []string{"mount", dir, arg}
	}
	_, err = c.call(ctx, args...)
	return err
}

// Unmount implements volume.Driver.
func (c Client) Unmount(ctx context.Context, dir string) error {
	_, err := c.call(ctx, "unmount", dir)
	return err
}

// UnmountDevice implements volume.Driver.
func (c Client) UnmountDevice(ctx context.Context, dir string) error {
	_, err := c.call(ctx, "unmountdevice", dir)
	return err
}

// Expand implements volume.Driver.
func (c Client) Expand(ctx context.Context, r volume.Request, to volume.Expansion) (int64, error) {
	arg, err := c.encode(r)
	if err != nil {
		return 0, err
	}
	size, old := strconv.FormatInt(to.Size, 10), strconv.FormatInt(to.Old, 10)
	args := []string{"expandvolume", arg, to.Dir, size, old}
	if to.FileSystem {
		args = []string{"expandfs", arg, to.Device, to.Dir, size, old}
	}
	said, err := c.call(ctx, args...)
	return said.VolumeNewSize, err
}
