package demo

import (
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

const (
	// pageWidth is what fits every terminal and log; a narrower terminal gets its own width.
	pageWidth = 100
	minWidth  = 60
	indent    = "  "
)

const (
	styleReset = "\x1b[0m"
	styleBold  = "\x1b[1m"
	styleDim   = "\x1b[2m"
	styleGood  = "\x1b[32m"
	styleBad   = "\x1b[31m"
)

// page is where the story is told. The first error of writing is kept and ends the story:
// nobody reads on.
type page struct {
	out   io.Writer
	color bool
	width int
	blank bool // the last line is
	err   error
}

func newPage(out io.Writer, color bool, width int) *page {
	if width == 0 || width > pageWidth {
		width = pageWidth
	}
	return &page{out: out, color: color, width: max(width, minWidth)}
}

func (p *page) line(text string) {
	p.blank = text == ""
	if p.err == nil {
		_, p.err = fmt.Fprintln(p.out, text)
	}
}

// gap sets off what follows, once.
func (p *page) gap() {
	if !p.blank {
		p.line("")
	}
}

func (p *page) paint(style, text string) string {
	if !p.color {
		return text
	}
	return style + text + styleReset
}

// heading begins a part of the story.
func (p *page) heading(text string) {
	p.gap()
	rule := strings.Repeat("─", max(0, p.width-utf8.RuneCountInString(text)-4))
	p.line(p.paint(styleBold, "─ "+text) + " " + p.paint(styleDim, rule))
}

// say tells what is going on.
func (p *page) say(format string, args ...any) {
	p.marked(indent, "", fmt.Sprintf(format, args...))
}

// good is something that was to be shown, and was.
func (p *page) good(format string, args ...any) {
	p.marked(indent+"✓ ", styleGood, fmt.Sprintf(format, args...))
}

// note is something that the reader should know about the demo itself.
func (p *page) note(format string, args ...any) {
	p.marked(indent+"· ", styleDim, fmt.Sprintf(format, args...))
}

// bad is something that was to be shown, and was not.
func (p *page) bad(format string, args ...any) {
	p.marked(indent+"✗ ", styleBad, fmt.Sprintf(format, args...))
}

// marked wraps text behind a mark, which alone is painted.
func (p *page) marked(mark, style, text string) {
	hang := utf8.RuneCountInString(mark)
	for i, l := range wrap(text, p.width-hang) {
		lead := strings.Repeat(" ", hang)
		if i == 0 {
			lead = mark
			if style != "" {
				lead = p.paint(style, mark)
			}
		}
		p.line(lead + l)
	}
}

// command is a line that the reader could type, and what it printed.
func (p *page) command(line, output string) {
	p.gap()
	p.line(indent + p.paint(styleBold, "$ "+line))
	p.lines(output)
}

// block shows text as it is, set off and folded to the page.
func (p *page) block(text string) {
	p.gap()
	p.lines(text)
}

func (p *page) lines(text string) {
	for _, l := range fold(strings.TrimRight(text, "\n"), p.width-len(indent)) {
		p.line(strings.TrimRight(indent+l, " "))
	}
	p.line("")
}

// wrap breaks text at spaces. A word that is longer than the width stays whole.
func wrap(text string, width int) []string {
	var lines []string
	var current strings.Builder
	used := 0
	for word := range strings.FieldsSeq(text) {
		n := utf8.RuneCountInString(word)
		if used > 0 && used+1+n > width {
			lines = append(lines, current.String())
			current.Reset()
			used = 0
		}
		if used > 0 {
			current.WriteByte(' ')
			used++
		}
		current.WriteString(word)
		used += n
	}
	return append(lines, current.String())
}
