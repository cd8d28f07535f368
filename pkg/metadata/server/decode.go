package server

import (
	"bytes"
	"encoding"
	"encoding/json"
	"errors"
	"io"
	"reflect"
	"strings"

	"github.com/lariat-net/lariat/pkg/metadata"
)

// decode reads one JSON object and refuses keys that its type does not have: a misspelt key must not be a
// silent default.
func decode(r io.Reader, out any) error {
	data, err := io.ReadAll(r)
	if err != nil {
		return metadata.Errorf(metadata.CodeInvalid, "request body: %s", err)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(out); err != nil {
		if _, key, ok := strings.Cut(err.Error(), "unknown field "); ok {
			key = strings.Trim(key, `"`)
			e := metadata.Errorf(metadata.CodeInvalid, "unknown key %q", key)
			if near := nearest(key, keys(reflect.TypeOf(out), nil)); near != "" {
				e.Message += `, did you mean "` + near + `"?`
			}
			return e
		}
		return metadata.Errorf(metadata.CodeInvalid, "request body: %s", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return metadata.Errorf(metadata.CodeInvalid, "request body: something follows the object")
	}
	return nil
}

var textual = reflect.TypeFor[encoding.TextUnmarshaler]()

// keys lists the JSON keys of a type and of the types in it.
func keys(t reflect.Type, out []string) []string {
	for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice || t.Kind() == reflect.Map {
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct || reflect.PointerTo(t).Implements(textual) {
		return out
	}
	for i := range t.NumField() {
		if name, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ","); name != "" && name != "-" {
			out = keys(t.Field(i).Type, append(out, name))
		}
	}
	return out
}

// nearest is the known key with the fewest edits, when there are few.
func nearest(key string, known []string) string {
	best, fewest := "", 1+len(key)/3
	for _, k := range known {
		if d := distance(strings.ToLower(key), strings.ToLower(k)); d <= fewest {
			best, fewest = k, d-1
		}
	}
	return best
}

// distance counts the edits (Levenshtein) between two words.
func distance(a, b string) int {
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
