package object

import (
	"cmp"
	"slices"

	"github.com/raceway-mesh/raceway/dataplane"
)

// list holds the objects of one kind, by name and in the order of their names. A nil list is
// empty.
type list struct {
	entries map[dataplane.Name]*entry
	sorted  []*entry // as of the last call of ordered
	added   []*entry // since then, in no order
	gone    bool     // some entries of sorted or added are
}

type entry struct {
	name  dataplane.Name
	value any // nil: it is gone
}

func (l *list) get(n dataplane.Name) any {
	if l == nil || l.entries[n] == nil {
		return nil
	}
	return l.entries[n].value
}

func (l *list) put(n dataplane.Name, value any) {
	if e := l.entries[n]; e != nil {
		e.value = value
		return
	}
	if l.entries == nil {
		l.entries = make(map[dataplane.Name]*entry)
	}
	e := &entry{n, value}
	l.entries[n] = e
	l.added = append(l.added, e)
}

func (l *list) remove(n dataplane.Name) {
	l.entries[n].value = nil
	delete(l.entries, n)
	l.gone = true
}

// ordered returns all entries in the order of their names, until the next call. Sorting is
// only of what is new.
func (l *list) ordered() []*entry {
	if l == nil {
		return nil
	}
	if l.gone {
		gone := func(e *entry) bool { return e.value == nil }
		l.sorted, l.added = slices.DeleteFunc(l.sorted, gone), slices.DeleteFunc(l.added, gone)
		l.gone = false
	}
	if len(l.added) > 0 {
		slices.SortFunc(l.added, compareEntries)
		l.sorted, l.added = merge(l.sorted, l.added), nil
	}
	return l.sorted
}

func compareEntries(a, b *entry) int {
	return cmp.Or(cmp.Compare(a.name.Namespace, b.name.Namespace), cmp.Compare(a.name.Name, b.name.Name))
}

func merge(a, b []*entry) []*entry {
	out := make([]*entry, 0, len(a)+len(b))
	for len(a) > 0 && len(b) > 0 {
		from := &a
		if compareEntries(b[0], a[0]) < 0 {
			from = &b
		}
		out, *from = append(out, (*from)[0]), (*from)[1:]
	}
	return append(append(out, a...), b...)
}
