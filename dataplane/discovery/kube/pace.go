package kube

import (
	"context"
	"time"
)

// urgency is how soon a change is to be published.
type urgency int

const (
	never    urgency = iota
	whenever         // another node's pod, a service: within the budget
	soon             // who takes tunnels: peers have moments to learn of it
	urgent           // this node's pods, what enrols, policy
)

// pace bounds what publishing costs. Building a snapshot takes the longer the larger the
// cluster is, so the pauses are multiples of what the last ones took.
type pace struct {
	gather  [urgent + 1]time.Duration // how long changes gather at least
	factor  [urgent + 1]time.Duration // pause after a snapshot, in times what it took
	saving  time.Duration             // between two writes of the snapshot file, at least
	mending time.Duration             // between two repairs of annotations

	// trust is how long an API server that answers has to tell of the whole cluster before
	// the file of the last good snapshot stands in for it.
	trust time.Duration

	campaign time.Duration // until an agent wants to write the status of policies, at most
	term     time.Duration // how long the one that does may take

	retry, retryMax time.Duration // after an error, doubling
	starting        time.Duration // that an API server may refuse watches without a list anew
	absent          time.Duration // until a kind that the cluster does not have is asked for again
}

func defaultPace() pace {
	p := pace{
		saving: time.Second, mending: time.Second, trust: 3 * time.Second, campaign: 3 * time.Second, term: time.Minute,
		retry: 500 * time.Millisecond, retryMax: 5 * time.Second, starting: 30 * time.Second, absent: 30 * time.Second,
	}
	p.gather[urgent], p.factor[urgent] = 20*time.Millisecond, 1
	p.gather[soon], p.factor[soon] = 50*time.Millisecond, 4
	// A tenth of a core, and less than that while nothing but this happens.
	p.gather[whenever], p.factor[whenever] = 100*time.Millisecond, 10
	return p
}

// schedule is what is to be published, and when.
type schedule struct {
	since [urgent + 1]time.Time // the first change of that urgency; zero: none
	end   time.Time             // of the last snapshot's building
	cost  time.Duration         // of building one, smoothed
}

func (d *schedule) add(how urgency, now time.Time) {
	if d.since[how].IsZero() {
		d.since[how] = now
	}
}

// at is when to publish, and whether there is anything to.
func (d *schedule) at(p pace) (at time.Time, something bool) {
	for how, since := range d.since {
		if since.IsZero() {
			continue
		}
		when := since.Add(p.gather[how])
		if rested := d.end.Add(p.factor[how] * d.cost); rested.After(when) {
			when = rested
		}
		if !something || when.Before(at) {
			at, something = when, true
		}
	}
	return at, something
}

// done takes what is due for being published: what comes now is for the next.
func (d *schedule) done() { d.since = [urgent + 1]time.Time{} }

func (d *schedule) published(start, end time.Time) {
	took := end.Sub(start)
	if d.cost == 0 {
		d.cost = took
	}
	d.cost, d.end = (3*d.cost+took)/4, end
}

// signal wakes one reader, once for however many times it was given.
type signal chan struct{}

func newSignal() signal { return make(signal, 1) }

func (s signal) give() {
	select {
	case s <- struct{}{}:
	default:
	}
}

// sleep waits, and reports false when ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
