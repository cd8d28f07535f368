package metadata

import (
	"cmp"
	"strings"
)

// ShortID returns a container's id as its runtime abbreviates it in tables. For a UUID, which Nomad
// uses, that is the first group. For the long ids of Docker, Podman and containerd, that is the
// first twelve digits. Other ids are names that a person chose, and stay whole.
func ShortID(id string) string {
	switch {
	case isUUID(id):
		return id[:8]
	case len(id) > 12 && isHex(id):
		return id[:12]
	}
	return id
}

func isUUID(s string) bool {
	groups := strings.Split(s, "-")
	if len(groups) != 5 || len(s) != 36 {
		return false
	}
	for i, n := range []int{8, 4, 4, 4, 12} {
		if len(groups[i]) != n || !isHex(groups[i]) {
			return false
		}
	}
	return true
}

func isHex(s string) bool { return strings.Trim(s, "0123456789abcdefABCDEF") == "" }

// maxHostName is the longest label of a host name, in bytes (RFC 1123 §2.1, RFC 1035 §2.3.4).
const maxHostName = 63

// HostName returns a host name of one label (RFC 1123) for the container. For a pod it is the pod's
// name, cut as the kubelet cuts it. Otherwise it is the container's name, cut at the front, because
// the end distinguishes instances.
func (c Container) HostName() string {
	if pod := hostLabel(c.Labels[LabelPodName]); pod != "" {
		return strings.TrimRight(pod[:min(len(pod), maxHostName)], "-")
	}
	name := cmp.Or(hostLabel(c.Name), hostLabel(ShortID(c.ID)), "container")
	return strings.TrimLeft(name[max(0, len(name)-maxHostName):], "-")
}

// hostLabel replaces each run of characters that a host name cannot hold with a hyphen, and trims
// hyphens at both ends.
func hostLabel(s string) string {
	words := strings.FieldsFunc(strings.ToLower(s), func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-')
	})
	return strings.Trim(strings.Join(words, "-"), "-")
}
