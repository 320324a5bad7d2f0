package agent

import (
	"net/netip"
	"sync"

	"github.com/raceway-mesh/raceway/dataplane/kernel"
)

// translationRounds is in how many rounds of watchPods after a pod's capture those of its connections
// have ended that were short and older.
const translationRounds = 10

// translations has the node forget how connections of pods were translated before their capture.
// Whoever comes while a table is read shares the next reading.
type translations struct {
	forget func(addrs []netip.Addr) (uint, error)

	turn chan struct{} // holds one while somebody reads

	mu   sync.Mutex
	next *reading
	told string // the last error
}

type reading struct {
	addrs []netip.Addr
	done  bool
	err   error
}

func newTranslations(d *kernel.Datapath) *translations {
	return &translations{forget: d.ForgetTranslations, turn: make(chan struct{}, 1), next: &reading{}}
}

// of returns when a reading has ended that began after the call.
func (t *translations) of(addrs []netip.Addr) error {
	t.mu.Lock()
	r := t.next
	r.addrs = append(r.addrs, addrs...)
	t.mu.Unlock()
	t.turn <- struct{}{}
	defer func() { <-t.turn }()
	if r.done {
		return r.err
	}
	t.mu.Lock()
	t.next = &reading{}
	t.mu.Unlock()
	_, r.err = t.forget(r.addrs)
	r.done = true
	return r.err
}

// forgetTranslations is for a pod that may have spoken before its capture: what it goes to by the
// kernel must not be taken for more of the same.
func (p *pods) forgetTranslations(addrs []netip.Addr) {
	t := p.translations
	if t == nil {
		return
	}
	if err := t.of(addrs); err != nil && t.news(err) {
		p.log.Warn("where the node translates addresses, a connection by the kernel may be cut for what its pod did before its capture", "err", err)
	}
}

// news reports whether err is another than the last one.
func (t *translations) news(err error) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	defer func() { t.told = err.Error() }()
	return t.told != err.Error()
}

// forgetLaterTranslations does it for those that were captured some rounds ago.
func (p *pods) forgetLaterTranslations() {
	var addrs []netip.Addr
	for _, s := range p.all() {
		if s.rounds.Load() > 0 && s.rounds.Add(-1) == 0 {
			addrs = append(addrs, s.Addrs()...)
		}
	}
	if len(addrs) > 0 {
		p.forgetTranslations(addrs)
	}
}
