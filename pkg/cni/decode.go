package cni

import (
	"encoding/json"
	"errors"
	"maps"
	"reflect"
	"slices"
	"strings"
)

// A document is a JSON object that is decoded by one level. Each key is decoded separately, into
// the field of that name. A plugin process lives for four milliseconds. encoding/json would spend a
// tenth of that to analyse whole types for the first time.
type document map[string]json.RawMessage

// Decode reads a plugin's own keys, which are beside the keys of Conf. An unknown key is an error
// that names the key and the nearest known key. DEL and GC ignore unknown keys, because they must
// not fail for a word.
func Decode[T any](r *Request) (T, error) {
	var conf T
	return conf, r.doc.into(&conf, "", r.strict(), reflect.TypeFor[Conf]())
}

// DecodeBlock does the same for a part of the configuration, as the ipam block.
func DecodeBlock[T any](r *Request, raw json.RawMessage, path string) (T, error) {
	var conf T
	doc, err := parse(raw)
	if err != nil {
		return conf, Errorf(ErrConfig, "key %q: %w", path, err)
	}
	return conf, doc.into(&conf, path+".", r.strict(), nil)
}

func (r *Request) strict() bool { return r.Command != "DEL" && r.Command != "GC" }

func parse(data []byte) (document, error) {
	var doc document
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, decodeError(data, err)
	}
	return doc, nil
}

// into decodes the document into the struct that target points to. It skips the keys of the struct
// type others.
func (d document) into(target any, path string, strict bool, others reflect.Type) error {
	v := reflect.ValueOf(target).Elem()
	known := map[string][]int{}
	collect(v.Type(), nil, known)
	foreign := map[string][]int{}
	if others != nil {
		collect(others, nil, foreign)
	}
	for _, key := range slices.Sorted(maps.Keys(d)) {
		index, ok := known[key]
		if !ok {
			if _, other := foreign[key]; other || !strict {
				continue
			}
			maps.Copy(known, foreign)
			e := Errorf(ErrConfig, "unknown key %q", path+key)
			if near := nearest(key, known); near != "" {
				e.Msg += ", did you mean \"" + path + near + "\"?"
			}
			return e
		}
		if err := decodeField(d[key], v.FieldByIndex(index), path+key, strict); err != nil {
			return err
		}
	}
	return nil
}

// decodeField decodes one value. It checks the keys inside a struct of ours too. It does not check
// keys that runtimes fill in, nor types that decode themselves.
func decodeField(raw json.RawMessage, field reflect.Value, path string, strict bool) error {
	t := field.Type()
	ours := t.Name() == "" || strings.HasPrefix(t.PkgPath(), module)
	if t.Kind() == reflect.Struct && strict && ours && t != reflect.TypeFor[RuntimeConfig]() {
		doc, err := parse(raw)
		if err != nil {
			return Errorf(ErrConfig, "key %q: %w", path, err)
		}
		return doc.into(field.Addr().Interface(), path+".", strict, nil)
	}
	err := json.Unmarshal(raw, field.Addr().Interface())
	var typ *json.UnmarshalTypeError
	if errors.As(err, &typ) {
		if typ.Field != "" {
			path += "." + typ.Field
		}
		return Errorf(ErrConfig, "key %q: a %s is not a %s", path, typ.Value, typ.Type)
	}
	if err != nil {
		return Errorf(ErrConfig, "key %q: %w", path, err)
	}
	return nil
}

const module = "github.com/lariat-net/lariat/"

// collect maps the JSON names of a struct's fields to their indexes.
func collect(t reflect.Type, at []int, into map[string][]int) {
	for i := range t.NumField() {
		f := t.Field(i)
		index := append(slices.Clone(at), i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case f.Anonymous && name == "":
			collect(f.Type, index, into)
		case name != "" && name != "-":
			into[name] = index
		}
	}
}

func nearest(key string, known map[string][]int) string {
	best, bestDistance := "", 4
	for k := range known {
		if d := distance(strings.ToLower(key), strings.ToLower(k)); d < bestDistance || d == bestDistance && k < best {
			best, bestDistance = k, d
		}
	}
	return best
}

// distance returns the Levenshtein distance.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := diagonal
			if a[i-1] != b[j-1] {
				cost = 1 + min(diagonal, row[j], row[j-1])
			}
			diagonal, row[j] = row[j], cost
		}
	}
	return row[len(b)]
}
