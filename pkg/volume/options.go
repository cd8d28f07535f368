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

// Limits for names, values and paths in requests.
const (
	MaxName  = 128
	MaxValue = 4096
	MaxPath  = 4095
)

// CheckName refuses names of volumes that are ambiguous in a path, an argument or a line of a log.
// A name must match [A-Za-z0-9][A-Za-z0-9_.-]* and have at most MaxName bytes.
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

// CheckDir refuses a mount directory that is not a plain path. A plain path is absolute and has no
// dots, double slashes or control characters.
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

// CheckOptions refuses options that no driver can accept: control characters, and values beyond
// MaxValue.
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

// plain reports whether a text is UTF-8 without control characters.
func plain(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, unicode.IsControl)
}

// Excerpt returns an odd text for messages: quoted and shortened.
func Excerpt(s string) string {
	if len(s) > 60 {
		return strconv.Quote(s[:60]) + "…"
	}
	return strconv.Quote(s)
}

// OneOf implements UnmarshalText for options that accept a few words.
func OneOf[T ~string](into *T, text []byte, allowed ...T) error {
	if !slices.Contains(allowed, T(text)) {
		return fmt.Errorf("%s is none of %v", Excerpt(string(text)), allowed)
	}
	*into = T(text)
	return nil
}

// Decode fills a struct from a volume's options. A field tagged `option:"size"` takes the option of
// that name. An absent option does not change its field, so callers set defaults before Decode.
// Fields are strings, bools, integers, or encoding.TextUnmarshalers. A bool is true, false, 1, 0,
// yes or no. Fields of embedded structs count as fields of the struct. An option without a field is
// an error that names the nearest field. Options in ignore are exempt.
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

// OptionNames returns the options that a struct accepts, sorted.
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

// nearest returns the field that the user probably meant. That field is at most two edits away, or
// differs only in case.
func nearest(key string, fields map[string]reflect.Value) string {
	best, at := "", 3
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		if d := distance(strings.ToLower(key), strings.ToLower(name)); d < at && d < len(name)-1 {
			best, at = name, d
		}
	}
	return best
}

// distance returns the number of edits between two words.
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
