package enroll

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
)

// driver is one Run or ReleaseAll: the only goroutine that touches the pods, and the calls
// of Target that it started.
type driver struct {
	*Reconciler
	releasing bool
	queue     []*pod // pods with a step to take, longest waiting first
	active    int    // calls under way, those overdue not counted
	calls     sync.WaitGroup
	outcomes  chan outcome
}

// outcome is what a call returned; of Publish when pod is nil.
type outcome struct {
	pod *pod
	err error
}

// errDriving refuses a second Run or ReleaseAll beside the first.
var errDriving = errors.New("enrolment is running already")

func (r *Reconciler) drive(ctx context.Context, releasing bool) error {
	r.mu.Lock()
	busy := r.driving
	r.driving = true
	r.mu.Unlock()
	if busy {
		return errDriving
	}
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.driving = false
	}()
	r.seen = nil
	if releasing {
		r.cfg.MaxDrain = r.cfg.MaxDrainAll
	}
	d := &driver{Reconciler: r, releasing: releasing, outcomes: make(chan outcome)}
	err := d.loop(ctx)
	d.join()
	return err
}

func (d *driver) loop(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		snapshot, changed := d.cfg.Store.Load()
		now := time.Now()
		d.lose()
		d.desire(snapshot, now)
		wake := d.advance(ctx, now)
		d.report(now)
		if d.releasing && len(d.pods) == 0 && d.publication.known {
			return nil
		}
		timer.Stop()
		if !wake.IsZero() {
			timer.Reset(wake.Sub(now))
		}
		select {
		case <-ctx.Done():
			return d.stopped(context.Cause(ctx))
		case <-changed:
		case <-d.wake:
		case o := <-d.outcomes:
			d.absorb(o)
		case <-timer.C:
		}
	}
}

func (d *driver) stopped(cause error) error {
	if !d.releasing {
		return nil
	}
	var left []string
	for _, p := range d.pods {
		left = append(left, p.uid)
	}
	slices.Sort(left)
	if len(left) == 0 {
		return fmt.Errorf("publish that no pod is captured: %w", cause)
	}
	return fmt.Errorf("release all pods: %d are left (%s): %w", len(left), strings.Join(left, ", "), cause)
}

// join waits for the calls under way and notes what they brought about.
func (d *driver) join() {
	go func() {
		d.calls.Wait()
		close(d.outcomes)
	}()
	for o := range d.outcomes {
		d.absorb(o)
	}
	for _, p := range d.pods {
		p.queued = false
	}
	d.report(time.Now())
}

// lose takes in which namespaces are gone and which pods are broken. A pod that is not wholly prepared is left to its
// next step, which finds out by itself.
func (d *driver) lose() {
	d.mu.Lock()
	lost, broken := d.lost, d.broken
	d.lost, d.broken = make(map[string]bool), make(map[string]string)
	d.mu.Unlock()
	for uid, why := range broken {
		if p := d.pods[uid]; p != nil && p.prepared == on && p.running == nil && p.want(&d.cfg) {
			p.prepared, p.failure, p.notBefore = unsure, why, time.Time{}
			d.report(time.Now())
		}
	}
	for uid := range lost {
		if p := d.pods[uid]; p != nil && p.prepared == on {
			p.lost = true
			d.cfg.Log.Warn("the pod's network namespace is gone: removing what was in force there", "uid", uid, "netns", p.netns)
		}
	}
}

// desire takes in a snapshot: which pods are wanted, and which exist no more.
func (d *driver) desire(s *dataplane.Snapshot, now time.Time) {
	if s == nil {
		// Run decides nothing before the first complete snapshot; ReleaseAll need not know.
		d.decided = d.decided || d.releasing
		return
	}
	if s == d.seen {
		return
	}
	d.seen, d.decided = s, true
	wanted := make(map[string]*dataplane.Workload)
	if !d.releasing {
		workloads := s.Workloads()
		for i := range workloads {
			if w := &workloads[i]; w.Enrolled && w.Node == d.cfg.Node {
				wanted[w.UID] = w
			}
		}
	}
	for uid := range wanted {
		if d.pods[uid] == nil {
			d.pods[uid] = &pod{uid: uid}
		}
	}
	for uid, p := range d.pods {
		was := p.want(&d.cfg)
		p.workload = wanted[uid]
		w := s.Workload(uid)
		p.gone = w == nil || w.Phase == dataplane.PodSucceeded || w.Phase == dataplane.PodFailed
		if is := p.want(&d.cfg); is != was {
			p.failure, p.failures, p.notBefore = "", 0, time.Time{}
			// Of an earlier agent's pods, those that stay are published from the start.
			p.publish = p.publish || is && p.resumed
		}
	}
	d.report(now) // nobody is said to be captured while the first step of the release runs
}

// advance starts every step that can start, and returns when to look again; zero when only
// an event can change anything.
func (d *driver) advance(ctx context.Context, now time.Time) time.Time {
	if !d.decided {
		return time.Time{}
	}
	var wake time.Time
	for _, p := range d.pods {
		wake = earliest(wake, d.look(p, now))
	}
	for len(d.queue) > 0 && d.active < d.cfg.Concurrency {
		p := d.queue[0]
		d.queue = d.queue[1:]
		p.queued = false
		if next := p.plan(now, &d.cfg, d.occupant(p)); p.running == nil && isCall(next.do) {
			d.start(ctx, p, next.do, now)
			wake = earliest(wake, p.running.deadline)
		}
	}
	return earliest(wake, d.publish(ctx, now))
}

// look lets p take a step that needs no call, queues it for one that does, and returns when
// to look again.
func (d *driver) look(p *pod, now time.Time) time.Time {
	if c := p.running; c != nil {
		if !c.overdue && !now.Before(c.deadline) {
			c.overdue = true
			d.active--
			p.failure = fmt.Sprintf("%s: %s", c.do, overdue(d.cfg.StepTimeout))
		}
		return c.wake()
	}
	if now.Before(p.notBefore) {
		return p.notBefore
	}
	next := p.plan(now, &d.cfg, d.occupant(p))
	switch next.do {
	case rest:
		return next.at
	case poll:
		p.counted(d.cfg.Target.Live(p.uid), now, &d.cfg)
		return d.look(p, now)
	case publish, unpublish:
		if belongs := next.do == publish; p.publish != belongs {
			p.publish = belongs
			return d.look(p, now)
		}
	case forget:
		if !p.nameless(&d.cfg) {
			delete(d.pods, p.uid)
		}
	case prepare, captureOutbound, captureInbound, guard, unguard, releaseInbound, releaseOutbound, remove:
		if !p.queued {
			p.queued = true
			d.queue = append(d.queue, p)
		}
	}
	return time.Time{}
}

func isCall(do step) bool {
	return do != rest && do != publish && do != unpublish && do != poll && do != forget
}

func (d *driver) start(ctx context.Context, p *pod, do step, now time.Time) {
	p.begin(do)
	if do == prepare {
		d.claim(p)
	}
	p.running = &call{do: do, deadline: now.Add(d.cfg.StepTimeout)}
	d.active++
	target, w := d.cfg.Target, p.workload
	d.calls.Go(func() {
		ctx, cancel := context.WithTimeout(ctx, d.cfg.StepTimeout)
		defer cancel()
		d.outcomes <- outcome{pod: p, err: perform(ctx, target, do, p.uid, w)}
	})
}

func perform(ctx context.Context, t Target, do step, uid string, w *dataplane.Workload) error {
	switch do {
	case prepare:
		return t.Prepare(ctx, w)
	case captureOutbound:
		return t.CaptureOutbound(ctx, uid)
	case captureInbound:
		return t.CaptureInbound(ctx, uid)
	case guard:
		return t.Guard(ctx, uid)
	case unguard:
		return t.Unguard(ctx, uid)
	case releaseInbound:
		return t.ReleaseInbound(ctx, uid)
	case releaseOutbound:
		return t.ReleaseOutbound(ctx, uid)
	case remove:
		return t.Remove(ctx, uid)
	case rest, publish, unpublish, poll, forget:
	}
	return fmt.Errorf("%s is no call", do)
}

// absorb takes in the outcome of a call.
func (d *driver) absorb(o outcome) {
	now := time.Now()
	if o.pod == nil {
		d.published(o.err, now)
		return
	}
	p, c := o.pod, o.pod.running
	p.running = nil
	if !c.overdue {
		d.active--
	}
	if o.err != nil {
		p.failures++
		p.failure = fmt.Sprintf("%s: %v", c.do, o.err)
		p.notBefore = now.Add(d.backoff(p.failures))
		return
	}
	p.failure, p.failures, p.notBefore = "", 0, time.Time{}
	if c.do == remove {
		d.unclaim(p)
	}
	p.done(c.do, now)
}

// backoff doubles with every failure; half of it is random, so that pods that failed
// together do not all return together.
func (d *driver) backoff(failures int) time.Duration {
	delay := d.cfg.BackoffMin
	for range failures - 1 {
		if delay >= d.cfg.BackoffMax {
			break
		}
		delay *= 2
	}
	delay = min(delay, d.cfg.BackoffMax)
	return delay/2 + rand.N(delay/2+1)
}

func (r *Reconciler) claim(p *pod) {
	if p.netns != "" && !slices.Contains(r.claims[p.netns], p.uid) {
		r.claims[p.netns] = append(r.claims[p.netns], p.uid)
	}
}

func (r *Reconciler) unclaim(p *pod) {
	left := slices.DeleteFunc(r.claims[p.netns], func(uid string) bool { return uid == p.uid })
	if len(left) == 0 {
		delete(r.claims, p.netns)
		return
	}
	r.claims[p.netns] = left
}

// occupant returns the pod that has to leave p's namespace before p can be prepared there:
// one that is on its way out, or that claimed it first.
func (r *Reconciler) occupant(p *pod) string {
	if p.workload == nil || p.workload.NetNS == "" {
		return ""
	}
	before := true
	for _, uid := range r.claims[p.workload.NetNS] {
		if uid == p.uid {
			before = false
			continue
		}
		if before || !r.pods[uid].want(&r.cfg) {
			return uid
		}
	}
	return ""
}

// report brings Status up to date.
func (r *Reconciler) report(now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	changed := false
	for uid := range r.status {
		if r.pods[uid] == nil {
			r.cfg.Log.Info("pod released", "uid", uid)
			delete(r.status, uid)
			changed = true
		}
	}
	for uid, p := range r.pods {
		old := r.status[uid]
		status := placed{Status: Status{Since: old.Since, InForce: p.inForce(&r.cfg)}, netns: p.netns, addrs: p.addrs}
		status.State, status.Reason = r.judge(p, now)
		if status.State != old.State {
			status.Since = now
			r.logState(p, status.Status)
		}
		changed = changed || status.Status != old.Status || status.netns != old.netns || !slices.Equal(status.addrs, old.addrs)
		r.status[uid] = status
	}
	if changed {
		close(r.told)
		r.told = make(chan struct{})
	}
}

func (r *Reconciler) logState(p *pod, s Status) {
	log := r.cfg.Log.With("uid", p.uid)
	if p.workload != nil {
		log = log.With("pod", p.workload.Name.String())
	}
	switch s.State {
	case dataplane.CaptureFailed:
		log.Warn("pod enrolment", "state", s.State.String(), "reason", s.Reason)
	case dataplane.CaptureNone, dataplane.CapturePending, dataplane.CaptureInForce, dataplane.CaptureReleasing:
		log.Info("pod enrolment", "state", s.State.String())
	}
}

// judge puts p's facts into the words of Status.
func (r *Reconciler) judge(p *pod, now time.Time) (dataplane.CaptureState, string) {
	if p.captured(&r.cfg) {
		return dataplane.CaptureInForce, ""
	}
	if !r.decided {
		return dataplane.CapturePending, "an earlier agent's capture is in force; waiting for the state of the cluster"
	}
	if p.failure != "" {
		return dataplane.CaptureFailed, p.failure
	}
	next := p.plan(now, &r.cfg, r.occupant(p))
	if p.running != nil {
		next.why = p.running.do.String() + " is under way"
	}
	if (next.do == publish || next.do == unpublish) && r.publication.failure != "" {
		return dataplane.CaptureFailed, r.publication.failure
	}
	switch {
	case p.want(&r.cfg):
		return dataplane.CapturePending, next.why
	case next.do == forget && p.nameless(&r.cfg):
		return dataplane.CaptureFailed, fmt.Sprintf("the pod has no annotation %s that names its network namespace", dataplane.NetNSAnnotation)
	}
	return dataplane.CaptureReleasing, next.why
}

func (c *call) wake() time.Time {
	if c.overdue {
		return time.Time{}
	}
	return c.deadline
}

func overdue(limit time.Duration) string {
	return fmt.Sprintf("has not returned within %v", limit)
}

// earliest ignores zero times.
func earliest(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && cmp.Compare(b.UnixNano(), a.UnixNano()) < 0 {
		return b
	}
	return a
}
