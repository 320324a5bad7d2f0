package main

import (
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// tone is what a cell's colour says on a terminal.
type tone int

const (
	toneNone tone = iota
	toneGood
	toneBad
	toneWarn
)

func (t tone) escape() string {
	return [...]string{toneNone: "", toneGood: "\x1b[32m", toneBad: "\x1b[31m", toneWarn: "\x1b[33m"}[t]
}

const escapeReset = "\x1b[0m"

// cell is text without line breaks.
type cell struct {
	text string
	tone tone
}

func plain(text string) cell { return cell{text: text} }

// column describes one attribute of a row.
type column[T any] struct {
	name  string
	wide  bool // only in the wide form
	right bool // aligned to the right, for numbers
	width int  // at least, in a stream
	cell  func(T) cell
}

// layout pads cells to columns. text/tabwriter would count colours as width. Widths only
// grow, so that a stream that has no end stays nearly aligned.
type layout struct {
	right  []bool
	widths []int
	color  bool
}

const columnGap = "   "

// fit makes room for a line.
func (l *layout) fit(line []cell) {
	for i, c := range line {
		l.widths[i] = max(l.widths[i], utf8.RuneCountInString(c.text))
	}
}

func (l *layout) write(w io.Writer, line []cell) error {
	var b strings.Builder
	blank := 0 // padding that is written only if something follows
	for i, c := range line {
		pad := l.widths[i] - utf8.RuneCountInString(c.text)
		if i > 0 {
			blank += len(columnGap)
		}
		if l.right[i] {
			blank, pad = blank+pad, 0
		}
		if c.text != "" {
			b.WriteString(strings.Repeat(" ", blank))
			b.WriteString(l.paint(c))
			blank = 0
		}
		blank += pad
	}
	_, err := fmt.Fprintln(w, b.String())
	return err
}

func (l *layout) paint(c cell) string {
	if !l.color || c.tone == toneNone {
		return c.text
	}
	return c.tone.escape() + c.text + escapeReset
}

// visible are the columns of the form that was asked for.
func visible[T any](columns []column[T], wide bool) []column[T] {
	var v []column[T]
	for _, c := range columns {
		if !c.wide || wide {
			v = append(v, c)
		}
	}
	return v
}

func newLayout[T any](columns []column[T], color bool) *layout {
	l := &layout{widths: make([]int, len(columns)), right: make([]bool, len(columns)), color: color}
	for i, c := range columns {
		l.right[i] = c.right
	}
	return l
}

func header[T any](columns []column[T]) []cell {
	line := make([]cell, len(columns))
	for i, c := range columns {
		line[i] = plain(c.name)
	}
	return line
}

func cells[T any](columns []column[T], row T) []cell {
	line := make([]cell, len(columns))
	for i, c := range columns {
		line[i] = c.cell(row)
		line[i].text = oneLine(line[i].text)
	}
	return line
}

// oneLine keeps what others wrote (errors, names) from breaking the table or talking to
// the terminal.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n', r == '\t':
			return ' '
		case r < ' ', r == 0x7f, 0x80 <= r && r < 0xa0:
			return -1
		}
		return r
	}, s)
}

// writeTable prints rows with or without their header.
func writeTable[T any](c *cli, columns []column[T], all []T) error {
	columns = visible(columns, c.flags.output == formatWide)
	l := newLayout(columns, c.color)
	var lines [][]cell
	if !c.flags.noHeaders {
		lines = append(lines, header(columns))
	}
	for _, row := range all {
		lines = append(lines, cells(columns, row))
	}
	for _, line := range lines {
		l.fit(line)
	}
	for _, line := range lines {
		if err := l.write(c.out, line); err != nil {
			return err
		}
	}
	return nil
}
