// Package flex implements both sides of the FlexVolume process contract. Main makes an executable
// of a driver. Client makes a driver of an executable.
//
// A call is argv in, one JSON document out. kubelet's current verbs differ from the verbs of
// kubelet up to 1.5, which are also Rancher's. They differ in the number of arguments, so one
// executable answers both:
//
//	verb           today (kubelet and controller)     up to 1.5, and Rancher
//	init           –                                  –
//	create         –                                  JSON
//	delete         –                                  JSON
//	getvolumename  JSON                               –
//	attach         JSON NODE                          JSON
//	waitforattach  DEVICE JSON                        –
//	isattached     JSON NODE                          –
//	mountdevice    DIR DEVICE JSON                    –
//	mount          DIR JSON                           DIR DEVICE JSON
//	unmount        DIR                                DIR [JSON]
//	unmountdevice  DIR                                –
//	detach         NAME NODE                          DEVICE
//	expandvolume   JSON DIR NEW OLD                   –
//	expandfs       JSON DEVICE DIR NEW OLD            –
package flex

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/lariat-net/lariat/pkg/volume"
)

// MaxJSON is the largest accepted JSON argument in bytes. Linux passes no argument beyond 128 KiB.
const MaxJSON = 1 << 20

// Keys that kubelet adds to the options.
const (
	keyFSType         = "kubernetes.io/fsType"
	keyReadWrite      = "kubernetes.io/readwrite"
	keyName           = "kubernetes.io/pvOrVolumeName"
	keyPodName        = "kubernetes.io/pod.name"
	keyPodNamespace   = "kubernetes.io/pod.namespace"
	keyPodUID         = "kubernetes.io/pod.uid"
	keyServiceAccount = "kubernetes.io/serviceAccount.name"
	keyFSGroup        = "kubernetes.io/mounterArgs.FsGroup"
	keyFSGroupOld     = "kubernetes.io/fsGroup"
	prefixSecret      = "kubernetes.io/secret/"
	prefixKubernetes  = "kubernetes.io/"
)

// Call is a parsed command line.
type Call struct {
	Verb    string
	Request volume.Request
	Node    string // attach, isattached, detach
	Device  string // waitforattach, mountdevice, mount, expandfs
	Volume  string // detach: name or device
	Dir     string // mount, unmount, mountdevice, unmountdevice, expandvolume, expandfs
	Size    int64  // expandvolume, expandfs
	Old     int64
}

// errUnknownVerb becomes the answer Not supported, because newer and older callers know other
// verbs.
var errUnknownVerb = volume.Errorf(volume.ErrNotSupported, "unknown verb")

// Parse parses the arguments after the executable's name.
func Parse(args []string) (Call, error) {
	if len(args) == 0 {
		return Call{}, volume.Errorf(volume.ErrInvalid, "no verb; see --help")
	}
	c := Call{Verb: args[0]}
	v, ok := verbs[c.Verb]
	if !ok {
		return c, fmt.Errorf("%w %s", errUnknownVerb, volume.Excerpt(c.Verb))
	}
	rest := args[1:]
	if len(rest) < v.least || len(rest) > v.most {
		return c, volume.Errorf(volume.ErrInvalid, "%s takes %s, and %d arguments came", c.Verb, v.usage, len(rest))
	}
	if err := v.parse(&c, rest); err != nil {
		return c, fmt.Errorf("%s: %w", c.Verb, err)
	}
	return c, nil
}

type verb struct {
	least, most int
	usage       string
	parse       func(c *Call, args []string) error
	long        bool // may take as long as a mount
	about       string
}

// verbs maps each verb to its arguments, their parser and its help.
var verbs = map[string]verb{
	"init": {0, 0, "no arguments", func(*Call, []string) error { return nil }, false,
		"Says what the driver can do."},
	"create": {1, 1, "JSON", func(c *Call, a []string) error { return c.request(a[0]) }, true,
		"Makes the volume, unless it is there. (Rancher's verb; kubelet does not call it.)"},
	"delete": {1, 1, "JSON", func(c *Call, a []string) error { return c.request(a[0]) }, true,
		"Removes what create made, as far as the options and the driver's rules allow. (Rancher's verb.)"},
	"getvolumename": {1, 1, "JSON", func(c *Call, a []string) error { return c.request(a[0]) }, false,
		"Prints a name that is the same for the same volume."},
	"attach": {1, 2, "JSON [NODE]", func(c *Call, a []string) error { c.Node = at(a, 1); return c.request(a[0]) }, true,
		"Brings the volume's device to a node."},
	"waitforattach": {2, 2, "DEVICE JSON", func(c *Call, a []string) error { c.Device = a[0]; return c.request(a[1]) },
		true,
		"Waits until the device is there, and prints its name."},
	"isattached": {1, 2, "JSON NODE", func(c *Call, a []string) error {
		if len(a) == 2 && !isJSON(a[0]) && isJSON(a[1]) { // the order of old documentation
			a = []string{a[1], a[0]}
		}
		c.Node = at(a, 1)
		return c.request(a[0])
	}, false,
		"Says whether a node has the volume's device."},
	"mountdevice": {3, 3, "DIR DEVICE JSON", func(c *Call, a []string) error {
		c.Dir, c.Device = a[0],
			a[1]
		return c.request(a[2])
	}, true,
		"Mounts the device for the whole node."},
	"mount": {2, 3, "DIR [DEVICE] JSON", func(c *Call, a []string) error {
		c.Dir = a[0]
		if len(a) == 3 {
			c.Device = a[1]
		}
		return c.request(a[len(a)-1])
	}, true,
		"Makes the volume appear at a folder."},
	"unmount": {1, 2, "DIR [JSON]", func(c *Call, a []string) error { c.Dir = a[0]; return nil }, false,
		"Takes it away from there. The folder stays."},
	"unmountdevice": {1, 1, "DIR", func(c *Call, a []string) error { c.Dir = a[0]; return nil }, false,
		"Ends what mountdevice began."},
	"detach": {1, 2, "NAME|DEVICE [NODE]", func(c *Call, a []string) error {
		c.Volume, c.Node = a[0],
			at(a, 1)
		return nil
	}, true,
		"Takes the device away from a node."},
	"expandvolume": {4, 4, "JSON DIR NEW OLD", func(c *Call, a []string) error {
		c.Dir = a[1]
		return errors.Join(c.sizes(a[2], a[3]), c.request(a[0]))
	}, true,
		"Makes the volume larger."},
	"expandfs": {5, 5, "JSON DEVICE DIR NEW OLD", func(c *Call, a []string) error {
		c.Device, c.Dir = a[1], a[2]
		return errors.Join(c.sizes(a[3], a[4]), c.request(a[0]))
	}, true,
		"Makes the volume's file system larger."},
}

// order is the order of the verbs in help.
var order = []string{"init", "create", "delete", "getvolumename", "attach", "waitforattach", "isattached",
	"mountdevice", "mount", "unmount", "unmountdevice", "detach", "expandvolume", "expandfs"}

func at(a []string, i int) string {
	if i < len(a) {
		return a[i]
	}
	return ""
}

func isJSON(s string) bool { return strings.HasPrefix(strings.TrimSpace(s), "{") }

func (c *Call) sizes(size, old string) (err error) {
	if c.Size, err = strconv.ParseInt(size, 10, 64); err != nil || c.Size <= 0 {
		return volume.Errorf(volume.ErrInvalid, "new size %s is not a number of bytes", volume.Excerpt(size))
	}
	if c.Old, err = strconv.ParseInt(old, 10, 64); err != nil || c.Old < 0 {
		return volume.Errorf(volume.ErrInvalid, "old size %s is not a number of bytes", volume.Excerpt(old))
	}
	return nil
}

func (c *Call) request(text string) (err error) {
	c.Request, err = DecodeRequest(text)
	return err
}

// DecodeRequest reads the JSON argument: an object of strings, as kubelet and Rancher write it. It
// refuses nested values, other types, repeated keys and text after the object.
func DecodeRequest(text string) (volume.Request, error) {
	r := volume.Request{Options: map[string]string{}}
	flat, err := decodeFlat(text)
	if err != nil {
		return r, err
	}
	for k, v := range flat {
		switch {
		case k == keyFSType:
			r.FSType = v
		case k == keyReadWrite:
			if v != "ro" && v != "rw" && v != "" {
				return r, volume.Errorf(volume.ErrInvalid, "%s is %s, and not ro or rw", k, volume.Excerpt(v))
			}
			r.ReadOnly = v == "ro"
		case k == keyPodName:
			r.Pod.Name = v
		case k == keyPodNamespace:
			r.Pod.Namespace = v
		case k == keyPodUID:
			r.Pod.UID = v
		case k == keyServiceAccount:
			r.Pod.ServiceAccount = v
		case k == keyFSGroup || k == keyFSGroupOld:
			if v == "" {
				break
			}
			g, err := strconv.ParseInt(v, 10, 64)
			if err != nil || g < 0 || g > 1<<32-2 {
				return r, volume.Errorf(volume.ErrInvalid, "%s is %s, and not a group's number", k, volume.Excerpt(v))
			}
			r.FSGroup = &g
		case strings.HasPrefix(k, prefixSecret):
			value, err := base64.StdEncoding.DecodeString(v)
			if err != nil {
				return r, volume.Errorf(volume.ErrInvalid, "%s is not base64", volume.Excerpt(k))
			}
			if r.Secrets == nil {
				r.Secrets = map[string]string{}
			}
			r.Secrets[strings.TrimPrefix(k, prefixSecret)] = string(value)
		case strings.HasPrefix(k, prefixKubernetes), k == "rancher":
			// A future key of kubelet, or the mark of Rancher's daemon.
		case k == "name":
		default:
			r.Options[k] = v
		}
	}
	// The name from a person or from Rancher's daemon takes precedence over kubelet's. So several
	// PersistentVolumes can mean one volume.
	kubelets := flat[keyName]
	if r.Name = flat["name"]; r.Name == "" {
		r.Name = kubelets
	} else if r.Name != kubelets {
		r.DetachAs = kubelets
	}
	return r, volume.CheckOptions(r.Options)
}

// decodeFlat reads an object of strings.
func decodeFlat(text string) (map[string]string, error) {
	bad := func(format string, args ...any) error {
		return volume.Errorf(volume.ErrInvalid, "the options are not an object of strings: "+format, args...)
	}
	if len(text) > MaxJSON {
		return nil, bad("%d octets, at most %d are read", len(text), MaxJSON)
	}
	if !utf8.ValidString(text) {
		return nil, bad("not UTF-8")
	}
	flat := map[string]string{}
	dec := json.NewDecoder(strings.NewReader(text))
	dec.UseNumber()
	first, err := dec.Token()
	if errors.Is(err, io.EOF) {
		return nil, bad("empty")
	}
	if err != nil {
		return nil, bad("%v", err)
	}
	if first != json.Delim('{') {
		return nil, bad("it begins with %s", kind(first))
	}
	for {
		k, err := dec.Token()
		if err != nil {
			return nil, bad("%s", eof(err))
		}
		if k == json.Delim('}') {
			break
		}
		key := k.(string) // otherwise dec.Token would have refused it
		v, err := dec.Token()
		if err != nil {
			return nil, bad("%s: %s", volume.Excerpt(key), eof(err))
		}
		value, ok := v.(string)
		if !ok {
			return nil, bad("%s is %s", volume.Excerpt(key), kind(v))
		}
		if _, twice := flat[key]; twice {
			return nil, bad("%s comes twice", volume.Excerpt(key))
		}
		flat[key] = value
	}
	if rest := strings.TrimSpace(text[dec.InputOffset():]); rest != "" {
		return nil, bad("followed by %s", volume.Excerpt(rest))
	}
	return flat, nil
}

func eof(err error) string {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return "it ends too early"
	}
	return err.Error()
}

func kind(t json.Token) string {
	switch t := t.(type) {
	case json.Delim:
		if t == '{' {
			return "an object"
		}
		return "a list"
	case json.Number:
		return "a number; write it in quotes"
	case bool:
		return "true or false; write it in quotes"
	case nil:
		return "null"
	}
	return "a text"
}
