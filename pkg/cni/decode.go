package cni

import (
	"encoding/json"
	"reflect"
	"slices"
	"strings"
)

// Decode reads a plugin's own keys, which stand beside those of Conf. Outside of DEL and GC, which must not fail for a word, a key that the struct
// does not know is an error that names it and the nearest one that it knows.
func Decode[T any](r *Request) (T, error) {
	var conf T
	if err := json.Unmarshal(r.Stdin, &conf); err != nil {
		return conf, decodeError(r.Stdin, err)
	}
	if r.Command == "DEL" || r.Command == "GC" {
		return conf, nil
	}
	return conf, unknownKeys(r.Stdin, "", reflect.TypeFor[T](), reflect.TypeFor[Conf]())
}

// DecodeBlock does the same for a part of it, as the ipam block.
func DecodeBlock[T any](r *Request, raw json.RawMessage, path string) (T, error) {
	var conf T
	if err := json.Unmarshal(raw, &conf); err != nil {
		return conf, decodeError(raw, err)
	}
	if r.Command == "DEL" || r.Command == "GC" {
		return conf, nil
	}
	return conf, unknownKeys(raw, path+".", reflect.TypeFor[T]())
}

// unknownKeys looks at one level, and into nested structs; maps, raw messages and what runtimes fill in are free.
func unknownKeys(data []byte, path string, types ...reflect.Type) error {
	var doc map[string]json.RawMessage
	if json.Unmarshal(data, &doc) != nil {
		return nil
	}
	known := map[string]reflect.Type{}
	for _, t := range types {
		collect(t, known)
	}
	for _, key := range slices.Sorted(mapKeys(doc)) {
		field, ok := known[key]
		if !ok {
			e := Errorf(ErrConfig, "unknown key %q", path+key)
			if near := nearest(key, known); near != "" {
				e.Msg += ", did you mean \"" + path + near + "\"?"
			}
			return e
		}
		if key == "runtimeConfig" || key == "args" || key == "dns" {
			continue
		}
		if field.Kind() == reflect.Pointer {
			field = field.Elem()
		}
		if field.Kind() == reflect.Struct && !field.Implements(reflect.TypeFor[json.Unmarshaler]()) {
			if err := unknownKeys(doc[key], path+key+".", field); err != nil {
				return err
			}
		}
	}
	return nil
}

func mapKeys(m map[string]json.RawMessage) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

func collect(t reflect.Type, into map[string]reflect.Type) {
	for i := range t.NumField() {
		f := t.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case f.Anonymous && name == "":
			collect(f.Type, into)
		case name != "" && name != "-":
			into[name] = f.Type
		}
	}
}

func nearest(key string, known map[string]reflect.Type) string {
	best, bestDistance := "", 4
	for k := range known {
		if d := distance(strings.ToLower(key), strings.ToLower(k)); d < bestDistance || d == bestDistance && k < best {
			best, bestDistance = k, d
		}
	}
	return best
}

// distance is Levenshtein's.
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
