package enroll

import (
	"context"
	"fmt"
	"slices"
	"time"
)

// publication keeps the published set equal to the set of the pods that belong into it. One
// call is under way at a time; what changes meanwhile goes out with the next.
type publication struct {
	running   *call
	sent      []string // by the call under way
	confirmed []string // what is published
	known     bool     // confirmed is true: the last call succeeded
	failure   string
	failures  int
	notBefore time.Time
}

// publish starts a call when the set has changed or its last call failed, and returns when
// to look again, zero when only an event can change anything.
func (d *driver) publish(ctx context.Context, now time.Time) time.Time {
	pub := &d.publication
	if pub.running != nil {
		if !pub.running.overdue && !now.Before(pub.running.deadline) {
			pub.running.overdue = true
			pub.failure = overdue(d.cfg.StepTimeout)
		}
		return pub.running.wake()
	}
	var set []string
	for uid, p := range d.pods {
		if p.publish {
			set = append(set, uid)
		}
	}
	slices.Sort(set)
	if pub.known && slices.Equal(set, pub.confirmed) {
		return time.Time{}
	}
	if now.Before(pub.notBefore) {
		return pub.notBefore
	}
	for _, p := range d.pods {
		if p.publish != (p.published == on) {
			p.published = unsure
		}
	}
	pub.sent, pub.known = set, false
	pub.running = &call{deadline: now.Add(d.cfg.StepTimeout)}
	target := d.cfg.Target
	d.calls.Go(func() {
		ctx, cancel := context.WithTimeout(ctx, d.cfg.StepTimeout)
		defer cancel()
		d.outcomes <- outcome{err: target.Publish(ctx, slices.Clone(set))}
	})
	return pub.running.wake()
}

// published takes in the outcome of a call.
func (d *driver) published(err error, now time.Time) {
	pub := &d.publication
	pub.running = nil
	if err != nil {
		pub.failures++
		pub.failure = fmt.Sprintf("publish the captured pods: %v", err)
		pub.notBefore = now.Add(d.backoff(pub.failures))
		d.cfg.Log.Warn("publish the captured pods", "error", err, "attempts", pub.failures)
		return
	}
	pub.failure, pub.failures, pub.notBefore = "", 0, time.Time{}
	pub.confirmed, pub.known = pub.sent, true
	for uid, p := range d.pods {
		_, in := slices.BinarySearch(pub.sent, uid)
		switch {
		case in && p.published != on:
			p.published, p.publishedAt = on, now
		case !in && p.published != off:
			p.published, p.unpublishedAt, p.drained = off, now, false
		}
	}
}
