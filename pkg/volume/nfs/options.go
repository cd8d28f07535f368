package nfs

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/lariat-net/lariat/pkg/volume"
	"github.com/lariat-net/lariat/pkg/volume/mounts"
)

// Options are a volume's options, as users write them.
type Options struct {
	Host       string   `option:"host"`
	Export     string   `option:"export"`
	ExportBase string   `option:"exportBase"`
	MntOptions string   `option:"mntOptions"`
	OnRemove   OnRemove `option:"onRemove"`
	OnHang     OnHang   `option:"onHang"`
	ReadOnly   bool     `option:"readOnly"`
	FSGroup    int64    `option:"fsGroup"`
}

// told lists the options of Create's reply, which Rancher's daemon passes with each later call. The
// mark on the export, not these options, shows the work of Create.
var told = []string{"created", "name", volume.Identity}

// OnRemove selects the action of Delete on a directory that Create made.
type OnRemove string

// The three actions.
const (
	Retain  OnRemove = "retain"
	Purge   OnRemove = "purge"
	Archive OnRemove = "archive"
)

// UnmarshalText refuses other words.
func (o *OnRemove) UnmarshalText(text []byte) error {
	return volume.OneOf(o, text, Retain, Purge, Archive)
}

// cautious returns the word that keeps more of the data.
func cautious(a, b OnRemove) OnRemove {
	for _, o := range []OnRemove{Retain, Archive} {
		if a == o || b == o {
			return o
		}
	}
	return cmp.Or(a, b)
}

// OnHang limits the means of Unmount when the server does not answer.
type OnHang string

// The two limits.
const (
	Force OnHang = "force"
	Lazy  OnHang = "lazy"
)

// UnmarshalText refuses other words.
func (o *OnHang) UnmarshalText(text []byte) error { return volume.OneOf(o, text, Force, Lazy) }

// Config holds the administrator's settings for all volumes.
type Config struct {
	Server    string   // for volumes without a host: NFS_SERVER
	Base      string   // directory on Server, for volumes without export and exportBase: MOUNT_DIR
	MountOpts string   // placed before each volume's own: MOUNT_OPTS. It may have suid, dev and exec
	OnRemove  OnRemove // for volumes without the option: ON_REMOVE; "": retain
	StateDir  string   // "": volume.DefaultStateDir
	RunDir    string   // "": volume.DefaultRunDir
}

// Environment lists the variables that FromEnvironment reads, with their meanings.
var Environment = append([][2]string{
	{"NFS_SERVER", "server of volumes that name no host"},
	{"MOUNT_DIR", "folder on the server below which volumes without export and exportBase are"},
	{"MOUNT_OPTS", "mount options for all volumes, before their own"},
	{"ON_REMOVE", "retain, purge or archive, for volumes that do not say"},
}, volume.Environment...)

// FromEnvironment reads the configuration as Rancher's driver did. It returns errors of the
// configuration for callers that must stop. New reports the same errors later, at each call.
func FromEnvironment(getenv func(string) string) (Config, error) {
	c := Config{Server: getenv("NFS_SERVER"), Base: getenv("MOUNT_DIR"), MountOpts: getenv("MOUNT_OPTS"),
		OnRemove: OnRemove(getenv("ON_REMOVE")),
		StateDir: getenv("LARIAT_STATE_DIR"), RunDir: getenv("LARIAT_RUN_DIR")}
	return c, c.check()
}

func (c Config) check() error {
	var errs []error
	if c.Server != "" {
		errs = append(errs, checkHost("NFS_SERVER", Bare(c.Server)))
	}
	if c.Base != "" {
		errs = append(errs, CheckPath("MOUNT_DIR", Trimmed(c.Base)))
	}
	if c.OnRemove != "" {
		if err := new(OnRemove).UnmarshalText([]byte(c.OnRemove)); err != nil {
			errs = append(errs, volume.Errorf(volume.ErrInvalid, "ON_REMOVE: %w", err))
		}
	}
	if _, err := parse("MOUNT_OPTS", c.MountOpts, true); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Volume is a parsed request: the location of the data and the way to mount it.
type Volume struct {
	Name string `json:"name"`
	Host string `json:"host"`
	Path string `json:"path"` // on the server
	// Base is the parent of Path, which is the directory Name. "" means that Path is an export that
	// Lariat does not manage.
	Base     string   `json:"base,omitempty"`
	Options  []string `json:"options,omitempty"`
	OnRemove OnRemove `json:"onRemove,omitempty"`
	OnHang   OnHang   `json:"onHang"`
	ReadOnly bool     `json:"readOnly,omitempty"`
	FSGroup  *int64   `json:"fsGroup,omitempty"` // of the top directory; nil: do not set it

	// The members below are for drivers whose volumes are more than a host and a path. See Mounter.
	// ID identifies the volume, which may be mounted from different hosts at different times.
	ID      string   `json:"id,omitempty"`
	Through *Through `json:"through,omitempty"`
}

// Through describes a program that mounts a volume instead of mount.nfs. The program runs a proxy
// of its own on this host. Source and Options are the program's arguments. The mount table shows
// the proxy.
type Through struct {
	FSType  string   `json:"fsType"`
	Source  string   `json:"source"`
	Options []string `json:"options"`
	Pin     string   `json:"pin,omitempty"` // the option that passes one of several addresses
}

// Source returns the mount table's name of the volume.
func (v Volume) Source() string {
	if v.Through != nil {
		return source("127.0.0.1", v.Path)
	}
	return source(v.Host, v.Path)
}

// String returns the volume's name for messages.
func (v Volume) String() string {
	if v.ID != "" {
		return v.ID + ":" + v.Path
	}
	return v.Source()
}

// spec returns the volume's mount at a directory.
func (v Volume) spec(dir string, at server) mounts.Spec {
	if v.Through != nil {
		options := v.Through.Options
		if v.Through.Pin != "" && at.several {
			options = append(slices.Clone(options), v.Through.Pin+"="+at.addr)
		}
		return mounts.Spec{Source: v.Through.Source, Shown: v.Source(), Dir: dir, FSType: v.Through.FSType, Options: options}
	}
	return spec(v.Host, v.Path, dir, v.Options, at)
}

func spec(host, path, dir string, options []string, at server) mounts.Spec {
	fstype := "nfs"
	if strings.HasPrefix(value(options, "vers", "nfsvers"), "4") {
		fstype = "nfs4"
	}
	return mounts.Spec{Source: source(host, path), Dir: dir, FSType: fstype, Options: options, Address: at.addr,
		Pinned: at.several}
}

func source(host, path string) string {
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	return host + ":" + path
}

// Volume parses a request and checks all its input. It reads nothing but the request and the
// configuration.
func (c Config) Volume(r volume.Request) (Volume, error) {
	if err := c.check(); err != nil {
		return Volume{}, fmt.Errorf("the driver's environment: %w", err)
	}
	if err := volume.CheckName(r.Name); err != nil {
		return Volume{}, err
	}
	o := Options{Host: c.Server, OnRemove: c.OnRemove, OnHang: Force, FSGroup: -1}
	if o.OnRemove == "" {
		o.OnRemove = Retain
	}
	if err := volume.Decode(r.Options, &o, told...); err != nil {
		return Volume{}, err
	}
	c.Server, c.Base = Bare(c.Server), Trimmed(c.Base)
	o.Host, o.Export, o.ExportBase = Bare(o.Host), Trimmed(o.Export), Trimmed(o.ExportBase)
	v := Volume{Name: r.Name, Host: o.Host, OnRemove: o.OnRemove, OnHang: o.OnHang, ReadOnly: r.ReadOnly || o.ReadOnly,
		FSGroup: r.FSGroup}
	if o.FSGroup >= 0 {
		v.FSGroup = &o.FSGroup
	}
	if o.Host == "" {
		return v, volume.Errorf(volume.ErrInvalid, "volume %s: no host, and no NFS_SERVER in the environment", v.Name)
	}
	if err := checkHost("host", o.Host); err != nil {
		return v, err
	}
	switch {
	case o.Export != "" && o.ExportBase != "":
		return v, volume.Errorf(volume.ErrInvalid, "volume %s: export and exportBase exclude each other", v.Name)
	case o.Export != "":
		if err := CheckPath("export", o.Export); err != nil {
			return v, err
		}
		if r.Options["onRemove"] != "" && o.OnRemove != Retain {
			return v, volume.Errorf(volume.ErrInvalid, "volume %s: onRemove=%s with export: Lariat did not create the "+
				"export and never removes it; use exportBase", v.Name, o.OnRemove)
		}
		v.Path, v.OnRemove = o.Export, Retain
	default:
		if o.ExportBase == "" {
			// MOUNT_DIR belongs to NFS_SERVER. On another server it would be a guess.
			if o.ExportBase = c.Base; o.ExportBase == "" || o.Host != c.Server {
				return v, volume.Errorf(volume.ErrInvalid, "volume %s: neither export nor exportBase is given", v.Name)
			}
		}
		if err := CheckPath("exportBase", o.ExportBase); err != nil {
			return v, err
		}
		v.Base, v.Path = o.ExportBase, path.Join(o.ExportBase, v.Name)
	}
	if v.Base == "" {
		v.FSGroup = nil // Lariat does not manage the directory
	}
	all, err := parse("MOUNT_OPTS", c.MountOpts, true)
	if err != nil {
		return v, err
	}
	return v, v.SetOptions(all, o.MntOptions)
}

// parse parses mount options. It joins a minor version with its major version, or with version 4,
// into one option. Later options can then replace that option.
func parse(what, text string, admin bool) ([]string, error) {
	list, err := rules.Parse(what, text, admin)
	minor := value(list, "minorversion")
	if err != nil || minor == "" {
		return list, err
	}
	switch vers := value(list, "vers", "nfsvers"); vers {
	case "", "4", "4." + minor:
		list = slices.DeleteFunc(list, func(o string) bool { return o == "minorversion="+minor })
		return rules.Merge(list, []string{"vers=4." + minor}), nil
	default:
		return nil, volume.Errorf(volume.ErrInvalid,
			"%s: minorversion=%s and version %s contradict each other", what, minor, vers)
	}
}

// SetOptions sets a volume's mount options: the defaults, then the user's options, which SetOptions
// checks.
func (v *Volume) SetOptions(defaults []string, mntOptions string) error {
	own, err := parse("mntOptions", mntOptions, false)
	if err != nil {
		return err
	}
	v.Options = rules.Merge([]string{"nosuid", "nodev", "retry=0"}, defaults, own)
	v.ReadOnly = v.ReadOnly || slices.Contains(v.Options, "ro")
	mode := "rw"
	if v.ReadOnly {
		mode = "ro"
	}
	v.Options = rules.Merge(v.Options, []string{mode})
	return nil
}

var hostName = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?)*\.?$`)

// zoneName matches names of interfaces that have no other meaning to a kernel or a program.
var zoneName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}$`)

func checkHost(what, host string) error {
	a, err := netip.ParseAddr(host)
	if err == nil && (a.Zone() == "" || a.IsLinkLocalUnicast() && zoneName.MatchString(a.Zone())) {
		return nil
	}
	if len(host) > 253 || !hostName.MatchString(host) {
		return volume.Errorf(volume.ErrInvalid, "%s %s is neither an address nor a host name", what, volume.Excerpt(host))
	}
	return nil
}

// Bare returns a host without the brackets of IPv6 addresses in URLs and in fstab.
func Bare(host string) string {
	if inner, ok := strings.CutPrefix(host, "["); ok && strings.HasSuffix(inner, "]") && strings.Contains(inner, ":") {
		return strings.TrimSuffix(inner, "]")
	}
	return host
}

// Trimmed returns a path without the slash at its end, which means nothing.
func Trimmed(p string) string {
	if len(p) > 1 {
		return strings.TrimSuffix(p, "/")
	}
	return p
}

// CheckPath refuses a path that is not a plain path on a server.
func CheckPath(what, p string) error {
	if !strings.HasPrefix(p, "/") || path.Clean(p) != p || len(p) > 1024 {
		return volume.Errorf(volume.ErrInvalid, "%s %s is not a plain absolute path", what, volume.Excerpt(p))
	}
	return volume.CheckOptions(map[string]string{what: p})
}

// rules holds all allowed mount options. All others are refused: bind, remount, context=, helper
// programs, credentials …
var rules = mounts.Rules{
	"vers":         mounts.Valued("vers", mounts.Words("3", "4", "4.0", "4.1", "4.2")),
	"nfsvers":      mounts.Valued("vers", mounts.Words("3", "4", "4.0", "4.1", "4.2")),
	"minorversion": mounts.Valued("minorversion", mounts.Words("0", "1", "2")),
	"hard":         mounts.Flag("hard"), "soft": mounts.Flag("hard"), "softerr": mounts.Flag("hard"),
	"timeo": mounts.Valued("timeo", mounts.Number(1, 6000)), "retrans": mounts.Valued("retrans", mounts.Number(0, 100)),
	"retry": mounts.Valued("retry", mounts.Number(0, 10000)),
	"rsize": mounts.Valued("rsize", mounts.Number(1024, 1<<20)),
	"wsize": mounts.Valued("wsize", mounts.Number(1024, 1<<20)),
	"ac":    mounts.Flag("ac"), "noac": mounts.Flag("ac"), "actimeo": mounts.Valued("actimeo", mounts.Number(0, 86400)),
	"acregmin":    mounts.Valued("acregmin", mounts.Number(0, 86400)),
	"acregmax":    mounts.Valued("acregmax", mounts.Number(0, 86400)),
	"acdirmin":    mounts.Valued("acdirmin", mounts.Number(0, 86400)),
	"acdirmax":    mounts.Valued("acdirmax", mounts.Number(0, 86400)),
	"lookupcache": mounts.Valued("lookupcache", mounts.Words("all", "none", "pos", "positive")),
	"cto":         mounts.Flag("cto"), "nocto": mounts.Flag("cto"),
	"lock": mounts.Flag("lock"), "nolock": mounts.Flag("lock"),
	"local_lock": mounts.Valued("local_lock", mounts.Words("all", "none", "flock", "posix")),
	"acl":        mounts.Flag("acl"), "noacl": mounts.Flag("acl"),
	"rdirplus": mounts.Flag("rdirplus"), "nordirplus": mounts.Flag("rdirplus"),
	"sharecache": mounts.Flag("sharecache"), "nosharecache": mounts.Flag("sharecache"),
	"resvport": mounts.Flag("resvport"), "noresvport": mounts.Flag("resvport"),
	"fsc": mounts.Flag("fsc"), "nofsc": mounts.Flag("fsc"),
	"nconnect":    mounts.Valued("nconnect", mounts.Number(1, 16)),
	"max_connect": mounts.Valued("max_connect", mounts.Number(1, 16)),
	"proto":       mounts.Valued("proto", mounts.Words("tcp", "tcp6", "udp", "udp6", "rdma", "rdma6")),
	"tcp":         mounts.Flag("proto"), "udp": mounts.Flag("proto"),
	"mountproto": mounts.Valued("mountproto", mounts.Words("tcp", "tcp6", "udp", "udp6")),
	"mountvers":  mounts.Valued("mountvers", mounts.Words("3")),
	"port":       mounts.Valued("port", mounts.Number(1, 65535)),
	"mountport":  mounts.Valued("mountport", mounts.Number(1, 65535)),
	"sec":        mounts.Valued("sec", mounts.Words("sys", "krb5", "krb5i", "krb5p")),
	"ro":         mounts.Flag("ro"), "rw": mounts.Flag("ro"), "sync": mounts.Flag("sync"), "async": mounts.Flag("sync"),
	"atime": mounts.Flag("atime"), "noatime": mounts.Flag("atime"), "relatime": mounts.Flag("atime"),
	"strictatime": mounts.Flag("atime"),
	"diratime":    mounts.Flag("diratime"), "nodiratime": mounts.Flag("diratime"),
	"nosuid": mounts.Flag("suid"), "nodev": mounts.Flag("dev"), "noexec": mounts.Flag("exec"),
	"suid": mounts.AdminFlag("suid"), "dev": mounts.AdminFlag("dev"), "exec": mounts.AdminFlag("exec"),
}

// value returns the value of an option in a list of checked options.
func value(options []string, keys ...string) string {
	for _, o := range options {
		if k, v, _ := strings.Cut(o, "="); slices.Contains(keys, k) {
			return v
		}
	}
	return ""
}

// dialed returns the kind of addresses that the server may be mounted from, and a port. Silence of
// that port proves that the server is down. The port is "" if a connection proves nothing.
func (v Volume) dialed() (network, port string) {
	proto := value(v.Options, "proto")
	switch {
	case strings.HasSuffix(proto, "6"):
		network = "ip6"
	case proto != "":
		network = "ip4" // mount.nfs and the kernel mean IPv4
	default:
		network = "ip"
	}
	if slices.Contains(v.Options, "udp") || proto != "" && !strings.HasPrefix(proto, "tcp") {
		return network, ""
	}
	return network, cmp.Or(value(v.Options, "port"), "2049")
}
