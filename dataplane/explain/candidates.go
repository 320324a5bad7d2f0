package explain

import (
	"cmp"
	"net/http"
	"slices"
	"strings"

	"github.com/raceway-mesh/raceway/dataplane/admin"
)

// maxCandidates keeps an error readable.
const maxCandidates = 5

func (q *Question) unknown(what string, ref reference, services bool) error {
	where := "in the cluster"
	if ref.namespace != "" {
		where = "in namespace " + ref.namespace
	}
	if ref.kind != "" {
		what = strings.ToLower(ref.kind)
	}
	return &admin.Error{
		Status:     http.StatusNotFound,
		Message:    "there is no " + what + " " + ref.name + " " + where,
		Candidates: q.candidates(ref.namespace, ref.name, services),
	}
}

// candidates are the names closest to name: the same in another namespace first, then those
// of its own namespace that resemble it.
func (q *Question) candidates(namespace, name string, services bool) []string {
	type candidate struct {
		text     string
		distance int
	}
	var all []candidate
	add := func(ns, n, text string) {
		d := distance(name, n)
		if ns != namespace && namespace != "" {
			d++
		}
		if !slices.ContainsFunc(all, func(c candidate) bool { return c.text == text }) {
			all = append(all, candidate{text, d})
		}
	}
	for i := range q.Snapshot.Workloads() {
		w := &q.Snapshot.Workloads()[i]
		if !w.Live() {
			continue
		}
		add(w.Name.Namespace, w.Name.Name, w.Name.String())
		if w.Owner.Name != "" && w.Owner.Name != w.Name.Name {
			add(w.Name.Namespace, w.Owner.Name, w.Name.Namespace+"/"+strings.ToLower(w.Owner.Kind)+"/"+w.Owner.Name)
		}
	}
	if services {
		for i := range q.Snapshot.Services() {
			s := &q.Snapshot.Services()[i]
			add(s.Name.Namespace, s.Name.Name, s.Name.String())
		}
	}
	slices.SortStableFunc(all, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(a.distance, b.distance), cmp.Compare(a.text, b.text))
	})
	var texts []string
	for _, c := range all[:min(len(all), maxCandidates)] {
		texts = append(texts, c.text)
	}
	return texts
}

// distance is how many edits (Levenshtein) make b of a; a part of the other is close.
func distance(a, b string) int {
	switch {
	case a == b:
		return 0
	case a != "" && b != "" && (strings.Contains(b, a) || strings.Contains(a, b)):
		return 1
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			substitute := diagonal
			if a[i] != b[j] {
				substitute++
			}
			diagonal = row[j+1]
			row[j+1] = min(substitute, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
