package demo

import (
	"strings"
	"unicode"
)

// foldIndent sets what did not fit off from the row that it belongs to.
const foldIndent = "    "

// columnGap is between two columns of a table that the command line prints, at least.
const columnGap = 3

// fold breaks lines that are too long for the page. Tables keep their columns: those that
// do not fit go below their row, prose in the last one is wrapped in its place.
//
//	AGENT   DIRECTION   …   AGE            STEP     RESULT    DETAIL
//	    SOURCE IDENTITY   …                policy   denied    no ALLOW policy matched
//	node1   outbound    …   3s                                a peer without identity
//	    cluster.local/…   …
func fold(text string, width int) []string {
	lines := strings.Split(text, "\n")
	var folded []string
	for len(lines) > 0 {
		n := 1
		if isHeader(lines[0]) {
			for n < len(lines) && lines[n] != "" {
				n++
			}
			folded = append(folded, foldTable(runes(lines[:n]), width)...)
		} else {
			folded = append(folded, foldLine([]rune(lines[0]), width)...)
		}
		lines = lines[n:]
	}
	return folded
}

func runes(lines []string) [][]rune {
	all := make([][]rune, len(lines))
	for i, l := range lines {
		all[i] = []rune(l)
	}
	return all
}

// isHeader knows the first line of a table by its capitals and its gaps.
func isHeader(line string) bool {
	return strings.Contains(line, strings.Repeat(" ", columnGap)) && line == strings.ToUpper(line) &&
		strings.IndexFunc(line, unicode.IsUpper) == 0
}

// foldLine breaks a line at a space or behind a comma, as a metric's labels have it.
func foldLine(line []rune, width int) []string {
	var folded []string
	lead := ""
	for len(lead)+len(line) > width {
		cut := width - len(lead)
		for i := cut; i > cut/2; i-- {
			if line[i] == ' ' || line[i-1] == ',' {
				cut = i
				break
			}
		}
		folded = append(folded, lead+strings.TrimRight(string(line[:cut]), " "))
		line, lead = []rune(strings.TrimLeft(string(line[cut:]), " ")), foldIndent
	}
	return append(folded, lead+string(line))
}

func foldTable(table [][]rune, width int) []string {
	starts := columnStarts(table)
	split := len(starts) // the first column that does not fit
	for i := range starts {
		if columnEnd(table, starts, i) > width {
			split = i
			break
		}
	}
	var folded []string
	switch {
	case split == len(starts):
		for _, row := range table {
			folded = append(folded, string(row))
		}
	case split == 0 || split == len(starts)-1 && isProse(table, starts[split], width):
		for _, row := range table {
			folded = append(folded, wrapColumn(row, starts[split], width)...)
		}
	default:
		var below [][]rune
		for _, row := range table {
			below = append(below, part(row, starts[split], len(row)))
		}
		rest := foldTable(below, width-len(foldIndent))
		if len(rest) != len(table) { // it was folded again: rows can no longer be told apart
			rest = rows(below)
		}
		for i, row := range table {
			folded = append(folded, strings.TrimRight(string(part(row, 0, starts[split])), " "))
			if below := strings.TrimRight(rest[i], " "); below != "" {
				folded = append(folded, foldIndent+below)
			}
		}
	}
	return folded
}

func rows(table [][]rune) []string {
	lines := make([]string, len(table))
	for i, row := range table {
		lines[i] = string(row)
	}
	return lines
}

// columnStarts are where the header's words begin, leaving out those that are aligned to
// the right of a gap that rows fill.
func columnStarts(table [][]rune) []int {
	var starts []int
	blank := columnGap
	for i := range table[0] {
		gap := true
		for _, row := range table {
			if i < len(row) && row[i] != ' ' {
				gap = false
			}
		}
		if !gap && blank >= columnGap {
			starts = append(starts, i)
		}
		if gap {
			blank++
		} else {
			blank = 0
		}
	}
	return starts
}

// columnEnd is where the longest cell of a column ends.
func columnEnd(table [][]rune, starts []int, column int) int {
	end := 0
	for _, row := range table {
		to := len(row)
		if column+1 < len(starts) {
			to = starts[column+1]
		}
		cell := strings.TrimRight(string(part(row, starts[column], to)), " ")
		if cell != "" {
			end = max(end, starts[column]+len([]rune(cell)))
		}
	}
	return end
}

// isProse reports whether the column from start on is text with enough room to be wrapped.
func isProse(table [][]rune, start, width int) bool {
	if start > width*2/3 {
		return false
	}
	for _, row := range table[1:] {
		if strings.Contains(strings.TrimSpace(string(part(row, start, len(row)))), " ") {
			return true
		}
	}
	return false
}

func wrapColumn(row []rune, start, width int) []string {
	head := string(part(row, 0, start))
	var wrapped []string
	for i, l := range wrap(string(part(row, start, len(row))), width-start) {
		if i > 0 {
			head = strings.Repeat(" ", start)
		}
		wrapped = append(wrapped, strings.TrimRight(head+l, " "))
	}
	return wrapped
}

// part is row[from:to], as far as the row goes.
func part(row []rune, from, to int) []rune {
	return row[min(from, len(row)):min(to, len(row))]
}
