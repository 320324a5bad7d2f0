package file

import "bytes"

// document is one YAML document of a file.
type document struct {
	line int // of its first line that is neither blank nor a comment, from 1
	from int // the line that text starts on
	text []byte
}

// split cuts a file at its document markers, which YAML recognises at the start of a line
// whatever surrounds them (YAML 1.2 section 9.1.2). Documents of comments alone are left out.
func split(data []byte) []document {
	data = bytes.TrimPrefix(data, []byte("\xef\xbb\xbf"))
	var out []document
	current := document{from: 1}
	number := 0
	for len(data) > 0 {
		number++
		line := data
		if end := bytes.IndexByte(data, '\n'); end >= 0 {
			line = data[:end+1]
		}
		data = data[len(line):]
		start, end := isMarker(line, "---"), isMarker(line, "...")
		if start || end {
			out = appendDocument(out, current)
			current = document{from: number}
			// What follows the marker on its line belongs to the next document; blanks
			// instead of the marker keep lines and columns as they are in the file.
			line = append([]byte("   "), line[3:]...)
		}
		if current.line == 0 && isContent(line) {
			current.line = number
		}
		current.text = append(current.text, line...)
	}
	return appendDocument(out, current)
}

func appendDocument(list []document, d document) []document {
	if d.line == 0 {
		return list
	}
	return append(list, d)
}

func isMarker(line []byte, marker string) bool {
	rest, ok := bytes.CutPrefix(line, []byte(marker))
	return ok && (len(rest) == 0 || bytes.IndexByte([]byte(" \t\r\n"), rest[0]) >= 0)
}

// isContent tells content from blank lines, comments and directives.
func isContent(line []byte) bool {
	line = bytes.TrimSpace(line)
	return len(line) > 0 && line[0] != '#' && line[0] != '%'
}
