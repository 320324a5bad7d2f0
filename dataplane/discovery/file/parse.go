package file

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	k8sjson "k8s.io/apimachinery/pkg/util/json"
	strictjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	"github.com/raceway-mesh/raceway/dataplane/discovery/object"
)

// maxListDepth bounds lists of lists.
const maxListDepth = 4

// maxFaults bounds how many faults of one file are reported.
const maxFaults = 10

// fault is what is wrong at one place of a file.
type fault struct {
	line  int
	cause string
}

// located is an object and where it was found.
type located struct {
	object.Object
	line int
}

// manifest is what a file of Kubernetes YAML holds.
type manifest struct {
	objects []located
	ignored []string // kinds that are not read
}

// parseManifest reads the documents of a file. With any fault, the manifest counts for
// nothing: the caller keeps the one it had.
func parseManifest(_ string, data []byte) (manifest, []fault) {
	var m manifest
	var faults []fault
	for _, doc := range split(data) {
		if f := m.document(doc); f != nil {
			faults = append(faults, f...)
		}
		if len(faults) >= maxFaults {
			break
		}
	}
	return m, faults
}

// header is what every object starts with, and a list's items.
type header struct {
	object.TypeMeta
	Metadata struct {
		Namespace string `json:"namespace"`
		Name      string `json:"name"`
	} `json:"metadata"`
	Items []json.RawMessage `json:"items"`
}

func (m *manifest) document(doc document) []fault {
	raw, f := toJSON(doc)
	if f != nil {
		return []fault{*f}
	}
	if bytes.Equal(raw, []byte("null")) {
		return nil
	}
	lines := itemLines(doc)
	return m.add(raw, object.TypeMeta{}, 0, func(i, count int) int {
		if len(lines) == count && i >= 0 {
			return lines[i]
		}
		return doc.line
	})
}

// add reads one object or a list of them; line tells where an item of it stands, or for -1
// the object itself.
func (m *manifest) add(raw []byte, of object.TypeMeta, depth int, line func(i, count int) int) []fault {
	var head header
	if err := k8sjson.Unmarshal(raw, &head); err != nil {
		return []fault{{line(-1, 0), "not a Kubernetes object: " + oneLine(err.Error())}}
	}
	if head.Kind == "" {
		head.TypeMeta = of
	}
	switch {
	case head.Kind == "":
		return []fault{{line(-1, 0), "not a Kubernetes object: it has no kind"}}
	case head.APIVersion == "":
		return []fault{{line(-1, 0), head.Kind + ": it has no apiVersion"}}
	case head.Kind == "List" || head.Items != nil && strings.HasSuffix(head.Kind, "List"):
		return m.list(head, depth, line)
	}
	o, err := object.Decode(head.TypeMeta, raw)
	switch {
	case errors.Is(err, object.ErrIgnored):
		m.ignored = append(m.ignored, head.String())
		return nil
	case err != nil:
		name := head.Metadata.Name
		if head.Metadata.Namespace != "" {
			name = head.Metadata.Namespace + "/" + name
		}
		return []fault{{line(-1, 0), oneLine(fmt.Sprintf("%s %s: %v", head.Kind, name, err))}}
	}
	m.objects = append(m.objects, located{Object: o, line: line(-1, 0)})
	return nil
}

func (m *manifest) list(head header, depth int, line func(i, count int) int) []fault {
	if depth == maxListDepth {
		return []fault{{line(-1, 0), fmt.Sprintf("lists are nested deeper than %d", maxListDepth)}}
	}
	var of object.TypeMeta
	if kind := strings.TrimSuffix(head.Kind, "List"); kind != "" {
		of = object.TypeMeta{APIVersion: head.APIVersion, Kind: kind} // items of a typed list need not say
	}
	var faults []fault
	for i, item := range head.Items {
		here := line(-1, 0)
		if depth == 0 {
			here = line(i, len(head.Items))
		}
		for _, f := range m.add(item, of, depth+1, func(int, int) int { return here }) {
			f.cause = fmt.Sprintf("items[%d]: %s", i, f.cause)
			faults = append(faults, f)
		}
		if len(faults) >= maxFaults {
			break
		}
	}
	return faults
}

// itemLines finds where the items of a list start, in the form that kubectl prints: a dash
// in the first column. In any other form the count will not match, and the line is the document's.
func itemLines(doc document) []int {
	var lines []int
	number := doc.from
	for line := range bytes.Lines(doc.text) {
		if bytes.HasPrefix(line, []byte("- ")) {
			lines = append(lines, number)
		}
		number++
	}
	return lines
}

// yamlLine finds the line in an error of the YAML library.
var yamlLine = regexp.MustCompile(`^(?:error converting YAML to JSON: )?yaml: (?:unmarshal errors:\s+)?(?:line (\d+): )?`)

// toJSON converts a document. A key that is there twice is an error: which of the two
// counts would be a guess.
func toJSON(doc document) ([]byte, *fault) {
	raw, err := yaml.YAMLToJSONStrict(doc.text)
	if err == nil {
		return bytes.TrimSpace(raw), nil
	}
	if isStrictJSON(doc.text) {
		return doc.text, nil
	}
	f := &fault{line: doc.line, cause: err.Error()}
	if m := yamlLine.FindStringSubmatch(f.cause); m != nil {
		f.cause = f.cause[len(m[0]):]
		if n, err := strconv.Atoi(m[1]); err == nil && n >= 1 && n <= bytes.Count(doc.text, []byte("\n"))+1 {
			f.line = doc.from + n - 1
		}
	}
	f.cause = "not valid YAML: " + oneLine(f.cause)
	return nil, f
}

// isStrictJSON knows JSON that is not YAML: the library does not take every escape.
func isStrictJSON(text []byte) bool {
	var value any
	repeated, err := strictjson.UnmarshalStrict(text, &value, strictjson.DisallowDuplicateFields)
	return err == nil && len(repeated) == 0
}

// maxCause bounds what is quoted of a file in a log line.
const maxCause = 500

func oneLine(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > maxCause {
		s = strings.ToValidUTF8(s[:maxCause], "") + "…"
	}
	return s
}
