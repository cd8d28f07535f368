// Package printable makes text of others safe for a terminal, a log and a line of a table.
//
// Names of containers, hosts and networks, labels, and errors that quote them come from elsewhere. Raw, they
// can move the cursor, change colours and titles, begin lines of their own, or turn around the order of what
// stands behind them.
package printable

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// Line returns s as one line in which everything shows. What Unicode does not count as printable stands as an
// escape of Go, such as \n, \x1b, \u202e or \xff: controls (C0, DEL, C1), format characters (bidirectional
// ones among them), all spaces but the ASCII one, separators of lines, characters that are not assigned, and
// invalid UTF-8. Line of its own result changes nothing.
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

// Text is Line for a text of several lines: newlines stay.
func Text(s string) string {
	lines := strings.Split(s, "\n")
	for i, l := range lines {
		lines[i] = Line(l)
	}
	return strings.Join(lines, "\n")
}

// Joined is Line for errors, which may be several, joined by newlines: semicolons stand between them.
func Joined(s string) string { return Line(strings.ReplaceAll(strings.TrimSpace(s), "\n", "; ")) }

// JSON returns a JSON document that says the same in printable characters and newlines. Encoders leave DEL,
// C1 and format characters as they are; outside of strings there are none.
func JSON(document string) string {
	return escape(document, func(b *strings.Builder, r rune, bytes string) {
		switch {
		case r == '\n':
			b.WriteByte('\n')
		case r == utf8.RuneError && len(bytes) == 1:
			b.WriteRune(utf8.RuneError) // what every decoder reads there
		default:
			for _, u := range utf16.Encode([]rune{r}) {
				fmt.Fprintf(b, `\u%04x`, u)
			}
		}
	})
}

// escape copies printable runes, and has write say what stands for another one, whose bytes it is told.
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
