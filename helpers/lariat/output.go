package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"unicode/utf8"

	"sigs.k8s.io/yaml"

	"github.com/lariat-net/lariat/pkg/printable"
)

// format is how a list is written.
type format string

const (
	text  format = "text"  // for people: colours, remarks
	table format = "table" // columns alone
)

var formats = []string{"text", "json", "yaml", "table"}

func (f *format) String() string { return string(*f) }

// Set implements pflag.Value.
func (f *format) Set(s string) error {
	if !slices.Contains(formats, s) {
		return errors.New("want text, json, yaml or table")
	}
	*f = format(s)
	return nil
}

// Type implements pflag.Value.
func (f *format) Type() string { return "format" }

// print writes v as the person asked: as JSON, as YAML, or by what writes the text.
func (a *app) print(v any, asText func(w *writer)) error {
	if a.output == "json" || a.output == "yaml" {
		b, err := json.MarshalIndent(v, "", "  ")
		if err != nil {
			return err
		}
		out := printable.JSON(string(b)) + "\n"
		if a.output == "yaml" {
			y, err := yaml.JSONToYAML([]byte(out))
			if err != nil {
				return err
			}
			if printable.Text(string(y)) == string(y) { // else it stays JSON, which is YAML too and has escapes for everything
				out = string(y)
			}
		}
		_, err = io.WriteString(a.stdout, out)
		return err
	}
	w := &writer{plain: a.output == table, colour: a.output == text && useColor(a.stdout)}
	asText(w)
	_, err := io.WriteString(a.stdout, w.String())
	return err
}

// colourful: on a terminal that has colours, unless the person wants none (https://no-color.org).
func useColor(w io.Writer) bool {
	return os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb" && tty(w)
}

// style is a colour by what it says.
type style string

const (
	plain  style = ""
	bold   style = "1"
	dim    style = "2"
	bad    style = "31"
	good   style = "32"
	uneasy style = "33"
)

// writer collects text. What it is given comes from elsewhere and is made printable; markup alone is taken as it is.
type writer struct {
	strings.Builder
	plain  bool // columns alone
	colour bool
}

// markup is text that is printable already, but for our own colours.
type markup string

// sprintf formats what is printable: every operand but numbers and markup is made so. The format itself is ours.
func sprintf(format string, a ...any) markup {
	safe := make([]any, len(a))
	for i, v := range a {
		switch v.(type) {
		case markup, int, int64, uint64:
			safe[i] = v
		default:
			safe[i] = printable.Line(fmt.Sprint(v))
		}
	}
	return markup(fmt.Sprintf(format, safe...))
}

func (w *writer) paint(s style, text string) markup {
	out := sprintf("%s", text)
	if !w.colour || s == plain || text == "" {
		return out
	}
	return "\x1b[" + markup(s) + "m" + out + "\x1b[0m"
}

func (w *writer) line(format string, a ...any) { w.WriteString(string(sprintf(format, a...)) + "\n") }

// say writes a line for people to where errors go.
func (a *app) say(format string, args ...any) { fmt.Fprintln(a.stderr, sprintf(format, args...)) }

// cell is one field of a table.
type cell struct {
	text  string
	style style
	right bool
}

func txt(s string) cell             { return cell{text: s} }
func num[T int | int64](n T) cell   { return cell{text: amount(int64(n)), right: true} }
func styled(s style, t string) cell { return cell{text: t, style: s} }

// columns writes a table. A column is as wide as its widest cell; an empty cell is a dash, so that fields can
// be counted.
func (w *writer) columns(head []string, rows [][]cell) {
	width := make([]int, len(head))
	right := make([]bool, len(head))
	for i, h := range head {
		width[i] = runes(h)
		for _, r := range rows {
			right[i] = right[i] || r[i].right
			width[i] = max(width[i], runes(r[i].text))
		}
	}
	write := func(cells []cell) {
		var b strings.Builder
		for i, c := range cells {
			if c.text == "" {
				c.text = "-"
			}
			space := strings.Repeat(" ", max(width[i]-runes(c.text), 0))
			painted := string(w.paint(c.style, c.text))
			switch {
			case right[i]:
				painted = space + painted
			case i < len(cells)-1:
				painted += space
			}
			if i > 0 {
				b.WriteString("  ")
			}
			b.WriteString(painted)
		}
		w.line("%s", markup(strings.TrimRight(b.String(), " ")))
	}
	header := make([]cell, len(head))
	for i, h := range head {
		header[i] = cell{text: h, style: bold}
	}
	write(header)
	for _, r := range rows {
		write(r)
	}
}

// runes is how wide a text is once it is printable.
func runes(s string) int { return utf8.RuneCountInString(printable.Line(s)) }

// amount writes a number; beyond what anyone counts, its magnitude.
func amount(n int64) string {
	switch {
	case n >= 1e15:
		return "plenty"
	case n >= 1e9:
		return fmt.Sprintf("%.1fG", float64(n)/1e9)
	case n >= 1e7:
		return fmt.Sprintf("%.1fM", float64(n)/1e6)
	}
	return fmt.Sprint(n)
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	if strings.HasSuffix(what, "s") {
		return fmt.Sprintf("%d %ses", n, what)
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func joined[T fmt.Stringer](list []T, sep string) string {
	out := make([]string, len(list))
	for i, v := range list {
		out[i] = v.String()
	}
	return strings.Join(out, sep)
}
