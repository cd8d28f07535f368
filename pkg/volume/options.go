package volume

import (
	"encoding"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Limits of what doors accept.
const (
	MaxName  = 128
	MaxValue = 4096
	MaxPath  = 4095
)

// CheckName refuses names of volumes that could mean something else as one element of a path, an argument or
// a line of a log: they are [A-Za-z0-9][A-Za-z0-9_.-]*, at most MaxName long.
func CheckName(name string) error {
	switch {
	case name == "":
		return Errorf(ErrInvalid, "the volume has no name")
	case len(name) > MaxName:
		return Errorf(ErrInvalid, "volume name %s… is %d octets long, at most %d are allowed", strconv.Quote(name[:20]),
			len(name), MaxName)
	}
	for i, r := range []byte(name) {
		if letter := r >= '0' && r <= '9' || r >= 'A' && r <= 'Z' || r >= 'a' && r <= 'z'; !letter &&
			(i == 0 || !strings.ContainsRune("_.-", rune(r))) {
			return Errorf(ErrInvalid, "volume name %q: only letters, digits and, after the first, _ . - are allowed", name)
		}
	}
	return nil
}

// CheckDir refuses a folder to mount at that is not plainly one: absolute, without dots and double slashes,
// without control characters.
func CheckDir(dir string) error {
	switch {
	case !strings.HasPrefix(dir, "/"):
		return Errorf(ErrInvalid, "folder %s is not an absolute path", Excerpt(dir))
	case dir == "/":
		return Errorf(ErrInvalid, "folder / cannot be a volume's")
	case len(dir) > MaxPath:
		return Errorf(ErrInvalid, "folder %s has %d octets, at most %d are allowed", Excerpt(dir), len(dir), MaxPath)
	case !plain(dir):
		return Errorf(ErrInvalid, "folder %s has control characters", Excerpt(dir))
	}
	for _, part := range strings.Split(strings.TrimSuffix(dir, "/")[1:], "/") {
		if part == "" || part == "." || part == ".." || len(part) > 255 {
			return Errorf(ErrInvalid, "folder %s has the part %s", Excerpt(dir), Excerpt(part))
		}
	}
	return nil
}

// CheckOptions refuses what no option of any driver can be: control characters, values beyond MaxValue.
func CheckOptions(options map[string]string) error {
	for _, k := range slices.Sorted(maps.Keys(options)) {
		v := options[k]
		switch {
		case k == "" || len(k) > 256 || !plain(k):
			return Errorf(ErrInvalid, "option %s: not a name", Excerpt(k))
		case len(v) > MaxValue:
			return Errorf(ErrInvalid, "option %s: %d octets, at most %d are allowed", k, len(v), MaxValue)
		case !plain(v):
			return Errorf(ErrInvalid, "option %s: control characters are not allowed", k)
		}
	}
	return nil
}

// plain text has no control characters and is UTF-8.
func plain(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, unicode.IsControl)
}

// Excerpt is how an odd text is shown: quoted, and not all of it.
func Excerpt(s string) string {
	if len(s) > 60 {
		return strconv.Quote(s[:60]) + "…"
	}
	return strconv.Quote(s)
}

// OneOf is for UnmarshalText of options that take few words.
func OneOf[T ~string](into *T, text []byte, allowed ...T) error {
	if !slices.Contains(allowed, T(text)) {
		return fmt.Errorf("%s is none of %v", Excerpt(string(text)), allowed)
	}
	*into = T(text)
	return nil
}

// Decode fills a struct from a volume's options. A field tagged `option:"size"` takes the option of that
// name; one that is absent leaves the field as it is, which is how defaults are given. Fields are strings,
// bools, integers, or encoding.TextUnmarshalers; bool is true, false, 1, 0, yes or no. Embedded structs count
// as their fields. An option without a field is an error that names the nearest, unless it is among those to
// ignore.
func Decode(options map[string]string, into any, ignore ...string) error {
	if err := CheckOptions(options); err != nil {
		return err
	}
	fields := map[string]reflect.Value{}
	collect(reflect.ValueOf(into).Elem(), fields)
	for _, key := range slices.Sorted(maps.Keys(options)) {
		if slices.Contains(ignore, key) {
			continue
		}
		f, ok := fields[key]
		if !ok {
			hint := ""
			if near := nearest(key, fields); near != "" {
				hint = fmt.Sprintf(", did you mean %q?", near)
			}
			return Errorf(ErrInvalid, "unknown option %q%s", key, hint)
		}
		if err := set(f, options[key]); err != nil {
			return Errorf(ErrInvalid, "option %s: %w", key, err)
		}
	}
	return nil
}

// OptionNames are the options that a struct takes, sorted.
func OptionNames(of any) []string {
	fields := map[string]reflect.Value{}
	v := reflect.New(reflect.TypeOf(of)).Elem()
	collect(v, fields)
	return slices.Sorted(maps.Keys(fields))
}

func collect(v reflect.Value, into map[string]reflect.Value) {
	t := v.Type()
	for i := range t.NumField() {
		if name := t.Field(i).Tag.Get("option"); name != "" {
			into[name] = v.Field(i)
		} else if t.Field(i).Anonymous && t.Field(i).Type.Kind() == reflect.Struct {
			collect(v.Field(i), into)
		}
	}
}

func set(f reflect.Value, text string) error {
	if u, ok := f.Addr().Interface().(encoding.TextUnmarshaler); ok {
		return u.UnmarshalText([]byte(text))
	}
	switch f.Kind() {
	case reflect.String:
		f.SetString(text)
	case reflect.Bool:
		switch strings.ToLower(text) {
		case "true", "1", "yes":
			f.SetBool(true)
		case "false", "0", "no":
			f.SetBool(false)
		default:
			return fmt.Errorf("%s is neither true nor false", Excerpt(text))
		}
	case reflect.Int, reflect.Int32, reflect.Int64:
		n, err := strconv.ParseInt(text, 10, f.Type().Bits())
		if err != nil {
			return fmt.Errorf("%s is not a number that fits", Excerpt(text))
		}
		f.SetInt(n)
	default:
		panic("volume.Decode: no option can be a " + f.Type().String())
	}
	return nil
}

// nearest is the field that was probably meant: at most two edits away, or different in case only.
func nearest(key string, fields map[string]reflect.Value) string {
	best, at := "", 3
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		if d := distance(strings.ToLower(key), strings.ToLower(name)); d < at && d < len(name)-1 {
			best, at = name, d
		}
	}
	return best
}

// distance counts the edits from one word to the other.
func distance(a, b string) int {
	if len(a) > 64 {
		return len(a)
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
