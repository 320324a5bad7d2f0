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
		if d < far-1 && ns != namespace && namespace != "" {
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
			add(w.Name.Namespace, w.Owner.Name, ownerName(w))
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
	if near := slices.IndexFunc(all, func(c candidate) bool { return c.distance >= far }); near > 0 {
		all = all[:near] // what resembles nothing is listed only when nothing resembles
	}
	var texts []string
	for _, c := range all[:min(len(all), maxCandidates)] {
		texts = append(texts, c.text)
	}
	return texts
}

// far is the distance of names that do not resemble each other.
const far = 4

// distance is how many edits (insert, delete, replace, swap neighbours) make b of a, at most
// far. A part of the other is close.
func distance(a, b string) int {
	switch longer := max(len(a), len(b)); {
	case a == b:
		return 0
	case a != "" && b != "" && (strings.Contains(b, a) || strings.Contains(a, b)):
		return 1
	case longer-min(len(a), len(b)) >= far:
		return far
	}
	before, last, row := []int(nil), []int(nil), ascending(len(b)+1)
	for i := range len(a) {
		before, last, row = last, row, make([]int, len(b)+1)
		row[0] = i + 1
		for j := range len(b) {
			replace := last[j]
			if a[i] != b[j] {
				replace++
			}
			row[j+1] = min(replace, row[j]+1, last[j+1]+1)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				row[j+1] = min(row[j+1], before[j-1]+1)
			}
		}
	}
	// Of a short name more than half must be right.
	if d := row[len(b)]; 2*d <= max(len(a), len(b)) {
		return min(d, far)
	}
	return far
}

func ascending(n int) []int {
	s := make([]int, n)
	for i := range s {
		s[i] = i
	}
	return s
}
