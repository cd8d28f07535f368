package mounts

import (
	"slices"
	"strconv"
	"strings"

	"github.com/lariat-net/lariat/pkg/volume"
)

// Rule is for one mount option that is allowed.
type Rule struct {
	Group string            // of each, the last one counts
	Value func(string) bool // checks the value; nil: it has none
	Admin bool              // only where an administrator says it
}

// Flag is a rule for an option without a value, Valued for one with a value, AdminFlag for one that only an administrator may say.
func Flag(group string) Rule { return Rule{Group: group} }

// Valued is described with Flag.
func Valued(group string, check func(string) bool) Rule { return Rule{Group: group, Value: check} }

// AdminFlag is described with Flag.
func AdminFlag(group string) Rule { return Rule{Group: group, Admin: true} }

// Rules are all mount options that a driver takes, by name. What is not here is refused: bind, remount, context=, helper programs, credentials …
type Rules map[string]Rule

// Number checks values that are numbers.
func Number(least, most int) func(string) bool {
	return func(s string) bool {
		n, err := strconv.Atoi(s)
		return err == nil && n >= least && n <= most && !strings.HasPrefix(s, "+")
	}
}

// Words checks values that are one of some words.
func Words(allowed ...string) func(string) bool {
	return func(s string) bool { return slices.Contains(allowed, s) }
}

// Parse reads a list with commas and refuses what is not among the rules. What is where the list comes from, such as MOUNT_OPTS, which is admin's.
func (r Rules) Parse(what, text string, admin bool) (list []string, err error) {
	if text == "" {
		return nil, nil
	}
	for _, o := range strings.Split(text, ",") {
		if o = strings.TrimSpace(o); o == "" {
			continue
		}
		key, value, has := strings.Cut(o, "=")
		rule, ok := r[key]
		switch {
		case !ok:
			return nil, volume.Errorf(volume.ErrInvalid, "%s: %s is not among the mount options that are allowed", what, volume.Excerpt(o))
		case rule.Admin && !admin:
			return nil, volume.Errorf(volume.ErrInvalid, "%s: %s is allowed only in the administrator's MOUNT_OPTS", what, o)
		case has != (rule.Value != nil), has && !rule.Value(value):
			return nil, volume.Errorf(volume.ErrInvalid, "%s: %s does not have a value that is allowed", what, volume.Excerpt(o))
		}
		list = append(list, o)
	}
	return list, nil
}

// Merge joins lists of checked options; of those that exclude each other the last one stays.
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
