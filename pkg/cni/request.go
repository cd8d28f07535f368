package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"

	"github.com/lariat-net/lariat/pkg/metadata"
)

// Request is one checked call of a runtime.
type Request struct {
	Command     string
	ContainerID string
	Netns       string // empty at DEL when the namespace no longer exists
	IfName      string
	Path        string            // CNI_PATH: directories of delegates
	Args        map[string]string // CNI_ARGS
	Conf        Conf
	Stdin       []byte          // the configuration as received
	Prev        *current.Result // nil when there is none
	doc         document
	Valid       *[]metadata.AttachmentID // GC: nil when the runtime sent no list, which frees nothing
}

// Conf holds the keys that the spec puts into every plugin's configuration.
type Conf struct {
	CNIVersion   string          `json:"cniVersion"`
	Name         string          `json:"name"`
	Type         string          `json:"type"`
	Capabilities map[string]bool `json:"capabilities,omitempty"`
	DNS          types.DNS       `json:"dns,omitzero"`
	Args         *struct {
		CNI struct {
			IPs    []string        `json:"ips,omitempty"`
			MAC    string          `json:"mac,omitempty"`
			Labels json.RawMessage `json:"labels,omitempty"`
		} `json:"cni,omitempty"`
	} `json:"args,omitempty"`
	RuntimeConfig    RuntimeConfig   `json:"runtimeConfig,omitzero"`
	Annotations      []string        `json:"annotations,omitempty"` // become labels: names, or prefix*
	PrevResult       json.RawMessage `json:"prevResult,omitempty"`
	ValidAttachments json.RawMessage `json:"cni.dev/valid-attachments,omitempty"`
	Attachments      json.RawMessage `json:"cni.dev/attachments,omitempty"` // the older key
}

// RuntimeConfig holds the capability arguments that Lariat understands. A runtime sends those that
// the list declares.
type RuntimeConfig struct {
	IPs         []string          `json:"ips,omitempty"`
	MAC         string            `json:"mac,omitempty"`
	DNS         *RuntimeDNS       `json:"dns,omitempty"`
	Annotations map[string]string `json:"io.kubernetes.cri.pod-annotations,omitempty"`
}

// RuntimeDNS is the dns capability.
type RuntimeDNS struct {
	Servers  []string `json:"servers,omitempty"`
	Searches []string `json:"searches,omitempty"`
	Options  []string `json:"options,omitempty"`
}

// ID returns the attachment's id.
func (r *Request) ID() metadata.AttachmentID {
	return metadata.AttachmentID{ContainerID: r.ContainerID, IfName: r.IfName}
}

// read reads environment and stdin. It refuses calls that cannot be served, before anything is
// changed.
func (r *Request) read(getenv func(string) string, stdin io.Reader) error {
	data, err := io.ReadAll(stdin)
	if err != nil {
		return wrap(ErrIO, err, "read the configuration from stdin")
	}
	r.Stdin = data
	if r.doc, err = parse(data); err != nil {
		return err
	}
	if err := r.doc.into(&r.Conf, "", false, nil); err != nil {
		return err
	}
	version := r.Conf.CNIVersion
	if version == "" {
		version = "0.1.0" // the spec's meaning of an absent version
	}
	if !slices.Contains(Versions, version) {
		return Errorf(ErrIncompatibleVersion, "cniVersion %s is not spoken here", version).WithDetails("supported: %s",
			strings.Join(Versions, ", "))
	}
	if since := map[string]string{"CHECK": "0.4.0", "STATUS": "1.1.0", "GC": "1.1.0"}[r.Command]; since != "" &&
		version < since {
		return Errorf(ErrIncompatibleVersion, "cniVersion %s has no %s; it came with %s", version, r.Command, since)
	}
	if err := r.environment(getenv); err != nil {
		return err
	}
	if err := metadata.ValidName(r.Conf.Name); err != nil {
		return Errorf(ErrConfig, "key \"name\": %w", err)
	}
	if len(r.Conf.PrevResult) > 0 && string(r.Conf.PrevResult) != "null" {
		prev, err := create.Create(version, r.Conf.PrevResult)
		if err == nil {
			r.Prev, err = current.NewResultFromResult(prev)
		}
		// A DEL works without prevResult: the journal has all that DEL needs.
		if err != nil && r.Command != "DEL" {
			return Errorf(ErrDecode, "key \"prevResult\": %w", err)
		}
	}
	if r.Command == "CHECK" && r.Prev == nil {
		return Errorf(ErrConfig, "CHECK needs the result of the ADD as prevResult")
	}
	if r.Command == "GC" {
		return r.attachments()
	}
	return nil
}

func (r *Request) environment(getenv func(string) string) error {
	r.ContainerID, r.Netns, r.IfName, r.Path = getenv("CNI_CONTAINERID"), getenv("CNI_NETNS"), getenv("CNI_IFNAME"),
		getenv("CNI_PATH")
	var missing []string
	need := func(name, value string, verbs ...string) {
		if value == "" && slices.Contains(verbs, r.Command) {
			missing = append(missing, name)
		}
	}
	need("CNI_CONTAINERID", r.ContainerID, "ADD", "DEL", "CHECK")
	need("CNI_IFNAME", r.IfName, "ADD", "DEL", "CHECK")
	need("CNI_NETNS", r.Netns, "ADD", "CHECK")
	if len(missing) > 0 {
		return Errorf(ErrEnvironment, "%s needs %s in the environment", r.Command, strings.Join(missing, ", "))
	}
	if r.ContainerID != "" && !validID(r.ContainerID) {
		return Errorf(ErrEnvironment, "CNI_CONTAINERID %q: want letters, digits, and (not first) . _ -, at most 200",
			r.ContainerID)
	}
	if r.IfName != "" && !validIfName(r.IfName) {
		return Errorf(ErrEnvironment, "CNI_IFNAME %q is no interface name: want 1 to 15 characters without / : and "+
			"space, and not . or ..", r.IfName)
	}
	// Malformed arguments do not matter for a DEL: container id and interface name identify the
	// attachment. Only ADD and CHECK use the arguments.
	var err error
	if r.Args, err = parseArgs(getenv("CNI_ARGS")); err != nil && (r.Command == "ADD" || r.Command == "CHECK") {
		return err
	}
	if (r.Command == "ADD" || r.Command == "CHECK") && getenv("CNI_NETNS_OVERRIDE") == "" {
		return checkNetns(r.Netns)
	}
	return nil
}

func validID(s string) bool {
	if len(s) > 200 {
		return false
	}
	for i, c := range s {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || i > 0 &&
			strings.ContainsRune("._-", c)) {
			return false
		}
	}
	return true
}

func validIfName(s string) bool {
	return len(s) <= 15 && s != "." && s != ".." &&
		!strings.ContainsFunc(s, func(c rune) bool { return c <= ' ' || c == '/' || c == ':' || c == 0x7f })
}

// parseArgs returns the valid pairs, even together with an error. Unknown keys are for other
// plugins of the list, see docs/design/cni.md.
func parseArgs(s string) (args map[string]string, err error) {
	args = map[string]string{}
	for _, pair := range strings.Split(s, ";") {
		if pair == "" {
			continue
		}
		k, v, ok := strings.Cut(pair, "=")
		if !ok {
			err = Errorf(ErrEnvironment, "CNI_ARGS: %q is not KEY=VALUE", pair)
			continue
		}
		args[k] = v
	}
	return args, err
}

// Magic numbers of nsfs (linux/magic.h) and of proc. Old kernels had the namespace files in proc.
const (
	nsfsMagic = 0x6e736673
	procMagic = 0x9fa0
)

// nsGetType is NS_GET_NSTYPE of linux/nsfs.h.
const nsGetType = 0xb703

// checkNetns refuses a path that is no network namespace, and the plugin's own namespace, before
// anything is changed.
func checkNetns(path string) error {
	ino, err := NetnsInode(path)
	if err != nil {
		return Errorf(ErrNetns, "CNI_NETNS: %w", err)
	}
	if own, err := NetnsInode("/proc/thread-self/ns/net"); err == nil && own == ino {
		return Errorf(ErrNetns, "CNI_NETNS %s is the network namespace that the plugin itself runs in", path)
	}
	// Namespace files of all kinds are on the same file system. lariat-ipam never enters the
	// namespace. Without this check it would allocate addresses to a uts namespace.
	f, err := os.Open(path)
	if err != nil {
		return Errorf(ErrNetns, "CNI_NETNS: %w", err)
	}
	defer f.Close()
	kind, _, errno := syscall.Syscall(syscall.SYS_IOCTL, f.Fd(), nsGetType, 0)
	if errno == 0 && kind != syscall.CLONE_NEWNET { // Linux before 4.11 has no NS_GET_NSTYPE
		return Errorf(ErrNetns, "CNI_NETNS %s is a namespace, but not one of network", path)
	}
	return nil
}

// NetnsInode returns the inode of the namespace behind a path. When the namespace no longer exists,
// the error wraps fs.ErrNotExist.
func NetnsInode(path string) (uint64, error) {
	var fsys syscall.Statfs_t
	if err := syscall.Statfs(path, &fsys); err != nil {
		return 0, &fs.PathError{Op: "statfs", Path: path, Err: err}
	}
	if fsys.Type != nsfsMagic && fsys.Type != procMagic {
		return 0, fmt.Errorf("%s is no network namespace (a file left over by a dead container?): %w", path, fs.ErrNotExist)
	}
	info, err := os.Stat(path)
	if err != nil {
		return 0, err
	}
	return info.Sys().(*syscall.Stat_t).Ino, nil
}

func (r *Request) attachments() error {
	raw := r.Conf.ValidAttachments
	if raw == nil {
		raw = r.Conf.Attachments
	}
	if raw == nil {
		return nil
	}
	var list []struct {
		ContainerID string `json:"containerID"`
		IfName      string `json:"ifname"`
	}
	if err := json.Unmarshal(raw, &list); err != nil {
		return Errorf(ErrConfig, "key \"cni.dev/valid-attachments\": %w", err)
	}
	valid := make([]metadata.AttachmentID, 0, len(list)) // CRI-O sends null when no pod lives
	for _, a := range list {
		valid = append(valid, metadata.AttachmentID(a))
	}
	r.Valid = &valid
	return nil
}

// Arg returns the value of the first name that is set in CNI_ARGS.
func (r *Request) Arg(names ...string) string {
	for _, n := range names {
		if v := r.Args[n]; v != "" {
			return v
		}
	}
	return ""
}

// Addresses returns the addresses that the caller asks for. The order is capability ips,
// args.cni.ips, then CNI_ARGS IP= or Rancher's IPAddress=. An address without a prefix length gets
// its full length.
func (r *Request) Addresses() ([]netip.Prefix, error) {
	list, from := r.Conf.RuntimeConfig.IPs, "runtimeConfig.ips"
	if len(list) == 0 && r.Conf.Args != nil {
		list, from = r.Conf.Args.CNI.IPs, "args.cni.ips"
	}
	if len(list) == 0 {
		if v := r.Arg("IP", "IPAddress"); v != "" {
			list, from = strings.Split(v, ","), "CNI_ARGS"
		}
	}
	var out []netip.Prefix
	for _, s := range list {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			a, aerr := netip.ParseAddr(s)
			if aerr != nil {
				return nil, Errorf(ErrConfig, "%s: %q is no IP address: %w", from, s, aerr)
			}
			p = netip.PrefixFrom(a, a.BitLen())
		}
		out = append(out, p)
	}
	return out, nil
}

// MAC returns the MAC that the caller asks for. The order is capability mac, args.cni.mac, then
// CNI_ARGS MAC= or Rancher's MACAddress=.
func (r *Request) MAC() (metadata.MAC, error) {
	s, from := r.Conf.RuntimeConfig.MAC, "runtimeConfig.mac"
	if s == "" && r.Conf.Args != nil {
		s, from = r.Conf.Args.CNI.MAC, "args.cni.mac"
	}
	if s == "" {
		s, from = r.Arg("MAC", "MACAddress"), "CNI_ARGS"
	}
	if s == "" {
		return metadata.MAC{}, nil
	}
	m, err := metadata.ParseMAC(strings.ToLower(s))
	switch {
	case err != nil:
		return m, Errorf(ErrConfig, "%s: %w", from, err)
	case m[0]&1 != 0 || m.IsZero():
		return m, Errorf(ErrConfig, "%s: MAC address %s is not a unicast address", from, s)
	}
	return m, nil
}

// Owner describes the container for people and for service discovery. It returns a name, a uuid and
// labels, as far as the runtime sends them. Of the pod's annotations it takes only those that are
// public, or that the configuration names. Other annotations may hold secrets.
func (r *Request) Owner() (name, uuid string, labels map[string]string) {
	labels = map[string]string{}
	if r.Conf.Args != nil && len(r.Conf.Args.CNI.Labels) > 0 {
		// Accept {"a":"b"} and [{"key":"a","value":"b"}]: both are in use.
		var list []struct{ Key, Value string }
		if json.Unmarshal(r.Conf.Args.CNI.Labels, &labels) != nil && json.Unmarshal(r.Conf.Args.CNI.Labels, &list) == nil {
			for _, l := range list {
				labels[l.Key] = l.Value
			}
		}
		if labels == nil { // labels was null
			labels = map[string]string{}
		}
	}
	maps.Copy(labels, metadata.PublicLabels(r.Conf.RuntimeConfig.Annotations, r.Conf.Annotations))
	for arg, label := range map[string]string{
		"K8S_POD_NAMESPACE": metadata.LabelPodNamespace, "K8S_POD_NAME": metadata.LabelPodName,
		"K8S_POD_UID":  metadata.LabelPodUID,
		"NOMAD_JOB_ID": metadata.LabelNomadJob, "NOMAD_GROUP_NAME": metadata.LabelNomadGroup,
		"NOMAD_NAMESPACE": metadata.LabelNomadNamespace,
		"NOMAD_REGION":    metadata.LabelNomadRegion, "NOMAD_ALLOC_ID": metadata.LabelNomadAlloc,
	} {
		if v := r.Args[arg]; v != "" {
			labels[label] = v
		}
	}
	switch {
	case r.Args["K8S_POD_NAME"] != "":
		name = r.Args["K8S_POD_NAME"]
		if ns := r.Args["K8S_POD_NAMESPACE"]; ns != "" {
			name = ns + "/" + name
		}
	case r.Args["NOMAD_JOB_ID"] != "" || r.Args["NOMAD_ALLOC_ID"] != "":
		// Nomad leaves out values with a semicolon. The allocation id distinguishes the allocations
		// of one group.
		parts := []string{r.Args["NOMAD_JOB_ID"], r.Args["NOMAD_GROUP_NAME"], metadata.ShortID(r.Args["NOMAD_ALLOC_ID"])}
		name = strings.Join(slices.DeleteFunc(parts, func(p string) bool { return p == "" }), "/")
	default:
		name = r.Arg("CONTAINER_NAME")
	}
	uuid = r.Arg("RancherContainerUUID", "K8S_POD_UID", "NOMAD_ALLOC_ID")
	return name, uuid, labels
}

// FromMetadata returns an error of the metadata service with its CNI code.
func FromMetadata(err error) error {
	var e *metadata.Error
	if errors.Is(err, metadata.ErrUnreachable) || !errors.As(err, &e) {
		if errors.Is(err, metadata.ErrUnreachable) {
			if metadata.IsCode(err, metadata.CodeUnavailable) { // the service of this host works
				return Errorf(ErrTryAgain, "%w", err).WithDetails("check the store and the way to it: lariat doctor; " +
					"journalctl -u lariat-metadata")
			}
			return Errorf(ErrTryAgain, "%w", err).WithDetails("check: systemctl status lariat-metadata; lariat doctor")
		}
		return err
	}
	code := uint(ErrMetadata)
	switch e.Code {
	case metadata.CodeInvalid, metadata.CodeNotFound, metadata.CodeConflict:
		code = ErrConfig
	case metadata.CodeHeld:
		code = ErrAddressHeld
	case metadata.CodeExhausted:
		code = ErrExhausted
	case metadata.CodeNotYet:
		code = ErrTryAgain
	}
	return &Error{Code: code, Msg: e.Message, Details: e.Details, cause: err}
}
