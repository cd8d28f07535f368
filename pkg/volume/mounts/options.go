package mounts

import (
	"slices"
	"strconv"
	"strings"

	"github.com/lariat-net/lariat/pkg/volume"
)

// Rule describes one allowed mount option.
type Rule struct {
	Group string            // of each group, the last option counts
	Value func(string) bool // checks the value; nil: the option has no value
	Admin bool              // allowed only in the administrator's configuration
}

// Flag returns a rule for an option without a value.
func Flag(group string) Rule { return Rule{Group: group} }

// Valued returns a rule for an option with a value that check accepts.
func Valued(group string, check func(string) bool) Rule { return Rule{Group: group, Value: check} }

// AdminFlag returns a rule for an option without a value that only an administrator may set.
func AdminFlag(group string) Rule { return Rule{Group: group, Admin: true} }

// idle lists words that people copy from fstab. These words mean nothing to mount calls.
var idle = map[string]bool{
	"defaults": true, "_netdev": true, "auto": true, "noauto": true, "nofail": true,
	"intr": true, "nointr": true, "bg": true, "fg": true,
}

// Rules holds all mount options that a driver accepts, by name. Parse refuses all others: bind,
// remount, context=, helper programs, credentials …
type Rules map[string]Rule

// Number returns a check for numeric values from least to most.
func Number(least, most int) func(string) bool {
	return func(s string) bool {
		n, err := strconv.Atoi(s)
		return err == nil && n >= least && n <= most && !strings.HasPrefix(s, "+")
	}
}

// Words returns a check for values from a list of words.
func Words(allowed ...string) func(string) bool {
	return func(s string) bool { return slices.Contains(allowed, s) }
}

// Parse reads a list with commas. One error reports all the options that the rules refuse. The
// argument what names the source of the list, such as MOUNT_OPTS. With admin, the list comes from
// the administrator.
func (r Rules) Parse(what, text string, admin bool) (list []string, err error) {
	if text == "" {
		return nil, nil
	}
	var wrong []string
	for _, o := range strings.Split(text, ",") {
		if o = strings.TrimSpace(o); o == "" || idle[o] {
			continue
		}
		key, value, has := strings.Cut(o, "=")
		rule, ok := r[key]
		switch {
		case !ok:
			wrong = append(wrong, volume.Excerpt(o)+" is not among the mount options that are allowed")
		case rule.Admin && !admin:
			wrong = append(wrong, o+" is allowed only in the administrator's MOUNT_OPTS")
		case has != (rule.Value != nil), has && !rule.Value(value):
			wrong = append(wrong, volume.Excerpt(o)+" does not have a value that is allowed")
		}
		list = append(list, o)
	}
	const most = 10
	if n := len(wrong); n > most {
		wrong = append(wrong[:most], "and "+strconv.Itoa(n-most)+" more")
	}
	if len(wrong) > 0 {
		return nil, volume.Errorf(volume.ErrInvalid, "%s: %s", what, strings.Join(wrong, "; "))
	}
	return list, nil
}

// Merge joins lists of checked options. Of options that exclude each other, the last one stays.
func (r Rules) Merge(lists ...[]string) (merged []string) {
	group := func(o string) string {
		key, _, _ := strings.Cut(o, "=")
		return r[key].Group
	}
	for _, list := range lists {
		for _, o := range list {
			merged = append(slices.DeleteFunc(merged, func(m string) bool { return group(m) == group(o) }), o)
		}
	}
	return merged
}
