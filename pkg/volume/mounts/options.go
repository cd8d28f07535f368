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

// Flag is a rule for an option without a value, Valued for one with a value, AdminFlag for one that only an
// administrator may say.
func Flag(group string) Rule { return Rule{Group: group} }

// Valued is described with Flag.
func Valued(group string, check func(string) bool) Rule { return Rule{Group: group, Value: check} }

// AdminFlag is described with Flag.
func AdminFlag(group string) Rule { return Rule{Group: group, Admin: true} }

// idle are words that people copy from fstab and that mean nothing to who mounts by a call.
var idle = map[string]bool{
	"defaults": true, "_netdev": true, "auto": true, "noauto": true, "nofail": true,
	"intr": true, "nointr": true, "bg": true, "fg": true,
}

// Rules are all mount options that a driver takes, by name. What is not here is refused: bind, remount,
// context=, helper programs, credentials …
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

// Parse reads a list with commas and refuses what is not among the rules, all of it at once. What
// is where the list comes from, such as MOUNT_OPTS, which is admin's.
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
