package volume

import (
	"errors"
	"strings"
	"testing"
	"time"
)

// F109: unsafe names are refused.
func TestF109UnsafeNames(t *testing.T) {
	for _, name := range []string{"", ".", "..", "../x", "a/b", "/a", "-o", "a\x00b", "a\nb", "a b", "é", ".hidden", "_x",
		"a,b", "a:b", "$(id)", strings.Repeat("a", 129), strings.Repeat("a", 4096)} {
		err := CheckName(name)
		if !errors.Is(err, ErrInvalid) || !IsFinal(err) {
			t.Errorf("%q: %v", name, err)
		} else if len(err.Error()) > 300 || strings.ContainsAny(err.Error(), "\n\x00") {
			t.Errorf("%q: an error that nobody wants in a log: %q", name, err)
		}
	}
	for _, name := range []string{"a", "0", "pvc-7f9c1d7e-3a4b-4c5d-8e6f-001122334455", "stack_data_a1b2c", "v1.2",
		strings.Repeat("a", 128)} {
		if err := CheckName(name); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestF109UnsafeFolders(t *testing.T) {
	for _, dir := range []string{"", "x", "../x", "/", "//", "/a//b", "/a/../b", "/a/.", "/a/..", "/a\nb", "/a\x00", "-o",
		"/" + strings.Repeat("a", 256), "/" + strings.Repeat("a/", 2100)} {
		if err := CheckDir(dir); !errors.Is(err, ErrInvalid) || len(err.Error()) > 300 {
			t.Errorf("%q: %v", dir, err)
		}
	}
	for _, dir := range []string{"/a", "/a/", "/var/lib/kubelet/pods/x/volumes/lariat~nfs/data", "/a b"} {
		if err := CheckDir(dir); err != nil {
			t.Errorf("%q: %v", dir, err)
		}
	}
}

type seconds struct{ time.Duration }

func (s *seconds) UnmarshalText(text []byte) (err error) {
	s.Duration, err = time.ParseDuration(string(text) + "s")
	return err
}

func TestDecode(t *testing.T) {
	type common struct {
		Host string `option:"host"`
	}
	type config struct {
		common
		Size   int     `option:"size"`
		Secure bool    `option:"secure"`
		Wait   seconds `option:"wait"`
	}
	for _, tc := range []struct {
		name    string
		options map[string]string
		want    string // an error's text, or ""
	}{
		{"nothing at all", nil, ""},
		{"one of each kind", map[string]string{"host": "h", "size": "5", "secure": "yes", "wait": "3"}, ""},
		{"ignores what it was told to", map[string]string{"created": "true"}, ""},
		{"knows no key it was not told about", map[string]string{"hots": "h"}, `unknown option "hots", did you mean "host"?`},
		{"nor one in another case", map[string]string{"Host": "h"}, `unknown option "Host", did you mean "host"?`},
		{"makes no wild guesses", map[string]string{"zzzzzz": "h"}, `unknown option "zzzzzz"`},
		{"a number that is none", map[string]string{"size": "5G"}, `option size: "5G" is not a number that fits`},
		{"a number beyond all bounds", map[string]string{"size": "99999999999999999999"},
			`option size: "99999999999999999999" is not a number that fits`},
		{"a truth that is none", map[string]string{"secure": "maybe"}, `option secure: "maybe" is neither true nor false`},
		{"a newline", map[string]string{"host": "a\nb"}, "option host: control characters are not allowed"},
		{"a NUL", map[string]string{"host": "a\x00b"}, "option host: control characters are not allowed"},
		{"octets that are no text", map[string]string{"host": "\xff"}, "option host: control characters are not allowed"},
		{"a long value", map[string]string{"host": strings.Repeat("a", 4097)},
			"option host: 4097 octets, at most 4096 are allowed"},
		{"a name that is none", map[string]string{"a\nb": ""}, `option "a\nb": not a name`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := config{Size: 7}
			err := Decode(tc.options, &c, "created")
			if got := errText(err); got != tc.want || err != nil && !errors.Is(err, ErrInvalid) {
				t.Errorf("got  %s\nwant %s", got, tc.want)
			}
			if len(tc.options) == 0 && c.Size != 7 {
				t.Error("the default is gone")
			}
			if len(tc.options) == 4 && (c.Host != "h" || c.Size != 5 || !c.Secure || c.Wait.Duration != 3*time.Second) {
				t.Errorf("decoded %+v", c)
			}
		})
	}
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func FuzzNames(f *testing.F) {
	f.Add("a")
	f.Add("../x")
	f.Fuzz(func(t *testing.T, s string) {
		if CheckName(s) == nil && (strings.ContainsAny(s, "/\\ \n\x00,:") || s[0] == '-' || s[0] == '.') {
			t.Errorf("accepted %q", s)
		}
		if CheckDir(s) == nil && (s[0] != '/' || strings.Contains(s+"/", "/../") || strings.ContainsAny(s, "\n\x00")) {
			t.Errorf("accepted %q", s)
		}
	})
}
