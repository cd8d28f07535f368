package printable_test

import (
	"encoding/json"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"github.com/lariat-net/lariat/pkg/printable"
)

// nasty holds names that did harm raw, with what Line makes of them.
var nasty = map[string]string{
	"web-1":                "web-1",
	"grün 漢字 é …":          "grün 漢字 é …",
	`C:\x\n "q"`:           `C:\x\n "q"`,
	"":                     "",
	"a\nb\r\n\tc":          `a\nb\r\n\tc`,
	"\x1b[2J\x1b]0;t\x07":  `\x1b[2J\x1b]0;t\a`,
	"nul\x00 del\x7f":      `nul\x00 del\x7f`,
	"\u009b31m \u0085":     `\u009b31m \u0085`,
	"\u202eexe.txt\u2066":  `\u202eexe.txt\u2066`,
	"\u200b\ufeff\u00ad":   `\u200b\ufeff\u00ad`,
	"\u2028\u2029\u00a0":   `\u2028\u2029\u00a0`,
	"\xff\xc3 \xe2\x80":    `\xff\xc3 \xe2\x80`,
	"\x9b31m":              `\x9b31m`,
	"\ufffd":               "\ufffd",
	"\U000e0041\U000f0000": `\U000e0041\U000f0000`,
	"\uffff\u0378":         `\uffff\u0378`,
}

func TestLine(t *testing.T) {
	for s, want := range nasty {
		if got := printable.Line(s); got != want {
			t.Errorf("%q is %q, want %q", s, got, want)
		}
	}
}

func TestEveryRune(t *testing.T) {
	for r := range rune(unicode.MaxRune + 1) {
		if got := printable.Line(string(r)); strings.ContainsFunc(got, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Fatalf("%U is %q", r, got)
		}
	}
}

func TestTextAndJoined(t *testing.T) {
	if got := printable.Text("a\x1b\n\nb\r\n"); got != "a\\x1b\n\nb\\r\n" {
		t.Errorf("%q", got)
	}
	if got := printable.Joined("a: b\nc\x1b\n"); got != `a: b; c\x1b` {
		t.Errorf("%q", got)
	}
}

func TestJSONSaysTheSame(t *testing.T) {
	for s := range nasty {
		b, err := json.MarshalIndent(map[string]string{s: s}, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		got := printable.JSON(string(b))
		var before, after map[string]string
		if err := json.Unmarshal(b, &before); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal([]byte(got), &after); err != nil {
			t.Fatalf("%q: %v", got, err)
		}
		if len(after) != 1 || len(before) != 1 {
			t.Fatal(after)
		}
		for k, v := range before {
			if after[k] != v {
				t.Errorf("%q became %q", before, after)
			}
		}
		if i := strings.IndexFunc(got, func(r rune) bool { return r != '\n' && !unicode.IsPrint(r) }); i >= 0 {
			t.Errorf("%q is not printable", got)
		}
	}
}

// FuzzLine: whatever is in it, the result is one line of printable, valid text; printable text stays as it is.
func FuzzLine(f *testing.F) {
	for s := range nasty {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got := printable.Line(s)
		if !utf8.ValidString(got) || strings.ContainsFunc(got, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Fatalf("%q is %q", s, got)
		}
		for _, r := range got {
			if r < 0x20 || r >= 0x7f && r < 0xa0 || unicode.In(r, unicode.Bidi_Control, unicode.Cf, unicode.Zl, unicode.Zp) {
				t.Fatalf("%q: %U is left", s, r)
			}
		}
		if printable.Line(got) != got {
			t.Fatalf("%q: a second time it is %q", s, printable.Line(got))
		}
		if utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) && got != s {
			t.Fatalf("%q is printable, and became %q", s, got)
		}
		for l := range strings.SplitSeq(printable.Text(s), "\n") {
			if printable.Line(l) != l {
				t.Fatalf("%q: a line of Text is %q", s, l)
			}
		}
	})
}
