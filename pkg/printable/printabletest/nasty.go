// Package printabletest fills values with hostile text, and finds it again in what is printed.
package printabletest

import (
	"net/netip"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/lariat-net/lariat/pkg/printable"
)

// evil begins a line that foreign text made.
const evil = "EVIL"

// Nasty are texts that do harm when they are printed raw. Each has a newline with a forged line behind it.
var Nasty = []string{
	"\n" + evil + " remedy: rm -rf /",
	"\r\n" + evil + "\t\v\f",
	"\x1b[2J\x1b]0;title\x07\n" + evil,
	"\u009b31m\u0085" + evil + "\n" + evil,
	"\x9b31m\xff\xc3\n" + evil,
	"\x00\x7f\n" + evil,
	"\u202e\u2066\u200f\u061c\n" + evil,
	"\u2028" + evil + "\u2029\n" + evil,
	"</text><script>\"&'\n" + evil,
	"\\\"]; } //\n" + evil + "\\",
	`"; x [label=<<b>` + "\n" + evil,
}

// Fill appends text to every string that v points to, and the zone of every IPv6 address. Empty slices, maps
// and pointers get an element. Fields that are named in keep stay as they are.
func Fill(v any, text string, keep ...string) { fill(reflect.ValueOf(v).Elem(), text, keep) }

func fill(v reflect.Value, text string, keep []string) {
	switch v.Kind() {
	case reflect.String:
		v.SetString(v.String() + text)
	case reflect.Pointer:
		if v.IsNil() {
			v.Set(reflect.New(v.Type().Elem()))
		}
		fill(v.Elem(), text, keep)
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			return
		}
		if v.Len() == 0 {
			v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		}
		for i := range v.Len() {
			fill(v.Index(i), text, keep)
		}
	case reflect.Map:
		old := v
		if old.Len() == 0 {
			old = reflect.MakeMap(v.Type())
			old.SetMapIndex(reflect.Zero(v.Type().Key()), reflect.Zero(v.Type().Elem()))
		}
		filled := reflect.MakeMap(v.Type())
		for _, k := range old.MapKeys() {
			key, value := reflect.New(k.Type()).Elem(), reflect.New(v.Type().Elem()).Elem()
			key.Set(k)
			value.Set(old.MapIndex(k))
			fill(key, text, keep)
			fill(value, text, keep)
			filled.SetMapIndex(key, value)
		}
		v.Set(filled)
	case reflect.Struct:
		if addr, ok := v.Addr().Interface().(*netip.Addr); ok {
			if addr.Is6() {
				*addr = addr.WithZone(text)
			}
			return
		}
		for i := range v.NumField() {
			if f := v.Type().Field(i); f.IsExported() && !slices.Contains(keep, f.Name) {
				fill(v.Field(i), text, keep)
			}
		}
	}
}

// ours are the only escape sequences that may be printed.
var ours = regexp.MustCompile("\x1b\\[[0-9]{1,2}m")

// Check reports lines that are not printable, or that foreign text made. It fails too when nothing foreign was printed.
func Check(t testing.TB, what, printed string) {
	t.Helper()
	if !strings.Contains(printed, evil) {
		t.Errorf("%s: nothing foreign was printed:\n%s", what, cut(printed))
	}
	Lines(t, what, printed)
}

// Lines reports lines that are not printable, or that foreign text made.
func Lines(t testing.TB, what, printed string) {
	t.Helper()
	for line := range strings.SplitSeq(ours.ReplaceAllString(printed, ""), "\n") {
		if printable.Line(line) != line {
			t.Errorf("%s: raw: %q", what, cut(line))
		}
		if strings.HasPrefix(strings.TrimSpace(line), evil) {
			t.Errorf("%s: a line of foreign making: %q", what, cut(line))
		}
	}
}

// cut returns the beginning of a text: what was printed may be a whole picture.
func cut(s string) string { return s[:min(len(s), 500)] }
