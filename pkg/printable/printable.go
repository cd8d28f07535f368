// Package printable makes foreign text safe for a terminal, a log and a line of a table.
//
// Names of containers, hosts and networks, labels, and errors that quote them come from elsewhere.
// Raw, they can move the cursor, change colours and titles, and begin new lines. They can also
// reverse the order of the text after them.
package printable

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// Line returns s as one line of visible characters. It replaces each character that Unicode does
// not count as printable with an escape of Go, such as \n, \x1b, \u202e or \xff. These are controls
// (C0, DEL, C1), format characters (including bidirectional ones), and all spaces except the ASCII
// space. They are also line separators, unassigned characters and invalid UTF-8. Line does not
// change its own result.
func Line(s string) string {
	return escape(s, func(b *strings.Builder, r rune, bytes string) {
		if r == utf8.RuneError && len(bytes) == 1 {
			fmt.Fprintf(b, `\x%02x`, bytes[0])
			return
		}
		quoted := strconv.QuoteRune(r)
		b.WriteString(quoted[1 : len(quoted)-1])
	})
}

// Text is Line for a text of several lines: it keeps newlines.
func Text(s string) string {
	lines := strings.Split(s, "\n")
	for i, l := range lines {
		lines[i] = Line(l)
	}
	return strings.Join(lines, "\n")
}

// Joined is Line for errors, which may be several joined by newlines. It puts semicolons between
// them.
func Joined(s string) string { return Line(strings.ReplaceAll(strings.TrimSpace(s), "\n", "; ")) }

// JSON returns an equivalent JSON document of printable characters and newlines. Encoders do not
// escape DEL, C1 and format characters. Outside strings there are none.
func JSON(document string) string {
	return escape(document, func(b *strings.Builder, r rune, bytes string) {
		switch {
		case r == '\n':
			b.WriteByte('\n')
		case r == utf8.RuneError && len(bytes) == 1:
			b.WriteRune(utf8.RuneError) // every decoder reads this rune there
		default:
			for _, u := range utf16.Encode([]rune{r}) {
				fmt.Fprintf(b, `\u%04x`, u)
			}
		}
	})
}

// escape copies printable runes. For any other rune it calls write with the rune's bytes.
func escape(s string, write func(b *strings.Builder, r rune, bytes string)) string {
	i := strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) || r == utf8.RuneError })
	if i < 0 {
		return s
	}
	var b strings.Builder
	b.WriteString(s[:i])
	for i < len(s) {
		r, n := utf8.DecodeRuneInString(s[i:])
		if unicode.IsPrint(r) && (r != utf8.RuneError || n > 1) {
			b.WriteString(s[i : i+n])
		} else {
			write(&b, r, s[i:i+n])
		}
		i += n
	}
	return b.String()
}
