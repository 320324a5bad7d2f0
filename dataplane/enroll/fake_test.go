package enroll

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
)

// fakePod is the truth about one pod: what is really in force.
type fakePod struct {
	netns                              string
	prepared, outbound, inbound, guard bool
	ours                               bool // prepared by this process
	starting                           bool // nothing runs in it: nobody has to be waited for
	busy                               bool
	preparedAs                         []netip.Addr
	outboundAt, outboundOff            time.Time
	publishedAt, unpublishedAt         time.Time
	live                               int
	gone, moved                        bool
}

// fakeTarget checks the order of enrolment at every call.
type fakeTarget struct {
	t      *testing.T
	cfg    Config
	status func() map[string]Status

	mu         sync.Mutex
	pods       map[string]*fakePod
	published  []string
	publishing bool
	log        []string
	start      time.Time
	// hook decides how a call goes: it may sleep and fail. It is called without mu.
	hook func(ctx context.Context, call, uid string) error
	// halfDone says whether a call that fails takes effect all the same.
	halfDone func() bool
}

func newFake(t *testing.T) *fakeTarget {
	return &fakeTarget{
		t: t, pods: make(map[string]*fakePod), start: time.Now(),
		hook:     func(context.Context, string, string) error { return nil },
		halfDone: func() bool { return false },
	}
}

func (f *fakeTarget) podLocked(uid string) *fakePod {
	p := f.pods[uid]
	if p == nil {
		p = &fakePod{}
		f.pods[uid] = p
	}
	return p
}

// edit changes the truth about a pod behind the reconciler's back.
func (f *fakeTarget) edit(uid string, change func(*fakePod)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(f.podLocked(uid))
}

// during has every call from now on go as hook says.
func (f *fakeTarget) during(hook func(ctx context.Context, call, uid string) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hook = hook
}

func (f *fakeTarget) forgetLog() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.log = nil
}

// sortLog is for calls whose order among each other is open.
func (f *fakeTarget) sortLog() {
	f.mu.Lock()
	defer f.mu.Unlock()
	slices.Sort(f.log)
}

func (f *fakeTarget) require(ok bool, format string, args ...any) {
	if !ok {
		f.t.Errorf("%v: %s", time.Since(f.start), fmt.Sprintf(format, args...))
	}
}

// do runs one call on a pod: check before, effect after.
func (f *fakeTarget) do(ctx context.Context, call, uid string, check, effect func(*fakePod)) error {
	f.mu.Lock()
	p := f.podLocked(uid)
	f.log = append(f.log, fmt.Sprintf("%v %s %s", time.Since(f.start), call, uid))
	f.require(!p.busy, "%s %s overlaps another call", call, uid)
	check(p)
	f.checkClaimsLocked()
	p.busy = true
	hook := f.hook
	f.mu.Unlock()

	err := hook(ctx, call, uid)

	f.mu.Lock()
	defer f.mu.Unlock()
	p.busy = false
	if err == nil || f.halfDone() {
		effect(p)
	}
	return err
}

// checkClaimsLocked: whoever is said to be captured is.
func (f *fakeTarget) checkClaimsLocked() {
	if f.status == nil {
		return
	}
	for uid, s := range f.status() {
		p := f.podLocked(uid)
		all := p.prepared && p.outbound && p.inbound && p.guard && slices.Contains(f.published, uid)
		f.require(s.State != dataplane.CaptureInForce || all, "%s is said to be captured and is %+v", uid, *p)
		f.require(!s.InForce || p.prepared && p.outbound && p.inbound && p.guard, "%s is said to be in force and is %+v", uid, *p)
		f.require(s.State == dataplane.CaptureInForce || s.Reason != "", "%s is %v without a reason", uid, s.State)
	}
}

func (f *fakeTarget) since(at time.Time) time.Duration { return time.Since(at) }

func (f *fakeTarget) Prepare(ctx context.Context, w *dataplane.Workload) error {
	return f.do(ctx, "prepare", w.UID, func(p *fakePod) {
		for uid, other := range f.pods {
			f.require(uid == w.UID || !other.prepared || other.netns != w.NetNS, "%s prepared in the namespace of %s", w.UID, uid)
		}
		f.require(!p.ours || !p.prepared || p.netns == w.NetNS, "%s prepared while it is in force in %s", w.UID, p.netns)
		f.require(!p.ours || !p.prepared || slices.Equal(p.preparedAs, w.Addrs), "%s prepared while it is in force with other addresses", w.UID)
	}, func(p *fakePod) {
		p.prepared, p.ours, p.netns, p.preparedAs, p.starting = true, true, w.NetNS, w.Addrs, w.Starting
	})
}

func (f *fakeTarget) Publish(ctx context.Context, uids []string) error {
	f.mu.Lock()
	f.log = append(f.log, fmt.Sprintf("%v publish %v", time.Since(f.start), uids))
	f.require(!f.publishing, "two publications overlap")
	f.publishing = true
	f.require(slices.IsSorted(uids), "%v is not sorted", uids)
	for _, uid := range uids {
		f.require(f.podLocked(uid).prepared, "%s published before it is prepared", uid)
	}
	for _, uid := range f.published {
		p := f.podLocked(uid)
		gentle := !p.guard && !p.inbound
		f.require(slices.Contains(uids, uid) || gentle || !p.ours, "%s unpublished while inbound is captured", uid)
	}
	hook := f.hook
	f.mu.Unlock()

	err := hook(ctx, "publish", "")

	f.mu.Lock()
	defer f.mu.Unlock()
	f.publishing = false
	if err == nil || f.halfDone() {
		for _, uid := range uids {
			if !slices.Contains(f.published, uid) {
				f.podLocked(uid).publishedAt = time.Now()
			}
		}
		for _, uid := range f.published {
			if !slices.Contains(uids, uid) {
				f.podLocked(uid).unpublishedAt = time.Now()
			}
		}
		f.published = uids
	}
	return err
}

func (f *fakeTarget) CaptureOutbound(ctx context.Context, uid string) error {
	return f.do(ctx, "capture-outbound", uid, func(p *fakePod) {
		f.require(p.prepared && (p.starting || slices.Contains(f.published, uid)), "%s: outbound before it is prepared and published", uid)
		f.require(p.starting || f.since(p.publishedAt) >= f.cfg.Settle, "%s: outbound %v after it was published", uid, f.since(p.publishedAt))
	}, func(p *fakePod) {
		if !p.outbound {
			p.outbound, p.outboundAt = true, time.Now()
		}
	})
}

func (f *fakeTarget) CaptureInbound(ctx context.Context, uid string) error {
	return f.do(ctx, "capture-inbound", uid, func(p *fakePod) {
		f.require(p.prepared && p.outbound && (p.starting || slices.Contains(f.published, uid)), "%s: inbound before outbound", uid)
		f.require(p.starting || f.since(p.outboundAt) >= f.cfg.Settle, "%s: inbound %v after outbound", uid, f.since(p.outboundAt))
	}, func(p *fakePod) { p.inbound = true })
}

func (f *fakeTarget) Guard(ctx context.Context, uid string) error {
	return f.do(ctx, "guard", uid, func(p *fakePod) {
		f.require(p.prepared && p.outbound && p.inbound && (p.starting || slices.Contains(f.published, uid)), "%s guarded before it is captured", uid)
	}, func(p *fakePod) { p.guard = true })
}

func (f *fakeTarget) Unguard(ctx context.Context, uid string) error {
	return f.do(ctx, "unguard", uid, func(p *fakePod) {
		f.require(p.ours, "%s is not ours to unguard", uid)
	}, func(p *fakePod) { p.guard = false })
}

func (f *fakeTarget) ReleaseInbound(ctx context.Context, uid string) error {
	return f.do(ctx, "release-inbound", uid, func(p *fakePod) {
		f.require(p.ours && !p.guard, "%s: inbound released under its guard", uid)
	}, func(p *fakePod) { p.inbound = false })
}

func (f *fakeTarget) ReleaseOutbound(ctx context.Context, uid string) error {
	return f.do(ctx, "release-outbound", uid, func(p *fakePod) {
		f.require(p.ours && !p.guard && !p.inbound && !slices.Contains(f.published, uid), "%s: outbound released first", uid)
		f.require(p.gone || p.moved || f.since(p.unpublishedAt) >= f.cfg.Settle, "%s: outbound released %v after it was unpublished", uid, f.since(p.unpublishedAt))
	}, func(p *fakePod) { p.outbound, p.outboundOff = false, time.Now() })
}

func (f *fakeTarget) Live(uid string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.podLocked(uid).live
}

func (f *fakeTarget) Remove(ctx context.Context, uid string) error {
	return f.do(ctx, "remove", uid, func(p *fakePod) {
		f.require(!slices.Contains(f.published, uid), "%s removed while published", uid)
		if !p.ours {
			return
		}
		f.require(!p.guard && !p.inbound && !p.outbound, "%s removed before it is released", uid)
		if p.gone || p.moved || p.outboundOff.IsZero() {
			return
		}
		f.require(f.since(p.outboundOff) >= f.cfg.Grace, "%s removed %v after outbound was released", uid, f.since(p.outboundOff))
		f.require(p.live == 0 || f.since(p.outboundOff) >= f.cfg.MaxDrain, "%s removed with %d live connections", uid, p.live)
	}, func(p *fakePod) {
		p.prepared, p.outbound, p.inbound, p.guard, p.ours = false, false, false, false, false
		p.outboundOff = time.Time{}
	})
}

// chaos makes calls slow, failing and half done.
func (f *fakeTarget) chaos(rng *rand.Rand, failing func() bool) {
	var mu sync.Mutex
	chance := func(n int) bool {
		mu.Lock()
		defer mu.Unlock()
		return rng.IntN(n) == 0
	}
	f.hook = func(ctx context.Context, _, _ string) error {
		delay := 5 * time.Millisecond
		if chance(4) {
			delay = 700 * time.Millisecond
		}
		if failing() && chance(30) {
			delay = time.Hour // hangs until the step's timeout
		}
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return ctx.Err()
		}
		if failing() && chance(4) {
			return errors.New("the kernel said no")
		}
		return nil
	}
	f.halfDone = func() bool { return chance(2) }
}
