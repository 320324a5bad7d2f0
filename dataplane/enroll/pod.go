package enroll

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
)

// fact is whether something is in force.
type fact int8

const (
	off    fact = iota
	unsure      // doing or undoing it failed, or an earlier agent did it
	on
)

// step is one thing to do for a pod.
type step int8

const (
	rest step = iota // until plan.at, or until something happens
	prepare
	publish // publish and unpublish change the set that the publication keeps
	captureOutbound
	captureInbound
	guard
	unguard
	releaseInbound
	unpublish
	releaseOutbound
	poll // count the pod's live connections
	remove
	forget // nothing is in force and nothing is wanted
)

var steps = [...]string{
	"rest", "prepare", "publish", "capture outbound", "capture inbound", "guard",
	"unguard", "release inbound", "unpublish", "release outbound", "poll", "remove", "forget",
}

func (s step) String() string { return steps[s] }

// plan is what a pod's facts ask for next.
type plan struct {
	do  step
	at  time.Time // with rest: when to look again; zero: when something happens
	why string    // what the pod waits for, for its Status
}

// pod is one pod's machine.
type pod struct {
	uid string

	// What is wanted.
	workload *dataplane.Workload // the latest that is enrolled on this node, nil when it is not
	gone     bool                // the pod does not exist any more: nothing to be gentle to

	// What is in force.
	netns     string       // where it was prepared
	addrs     []netip.Addr // with which addresses, sorted
	announced bool         // the node told them, before the cluster knew
	lost      bool         // that namespace is gone
	resumed   bool         // an earlier agent had captured it, and this one is about to
	prepared  fact
	published fact
	outbound  fact
	inbound   fact
	guard     fact

	publish       bool // it belongs into the published set
	publishedAt   time.Time
	unpublishedAt time.Time
	outboundAt    time.Time
	outboundOffAt time.Time
	nextPoll      time.Time
	drained       bool // no connection was live when they were counted last

	// What is under way.
	running   *call
	queued    bool
	failure   string // of the last attempt, "" when it succeeded
	failures  int
	notBefore time.Time
}

// call is a call of Target that has not returned.
type call struct {
	do       step
	deadline time.Time
	overdue  bool
}

func (p *pod) want(cfg *Config) bool {
	return p.workload != nil && !p.misplaced() && !p.nameless(cfg)
}

// nameless pods cannot be captured for want of a network namespace.
func (p *pod) nameless(cfg *Config) bool {
	return cfg.RequireNetNS && p.workload != nil && p.workload.NetNS == ""
}

// misplaced reports that what is in force is for another namespace, or one that is gone, or
// other addresses than the pod has now: it has to go before the pod can be prepared anew.
func (p *pod) misplaced() bool {
	if p.workload == nil || p.prepared == off {
		return false
	}
	return p.lost || p.moved() || p.readdressed()
}

// readdressed reports that the pod has other addresses than it was prepared with. Of those
// that the node told, a cluster need not come to know all.
func (p *pod) readdressed() bool {
	if p.announced {
		return slices.ContainsFunc(p.workload.Addrs, func(a netip.Addr) bool { return !slices.Contains(p.addrs, a) })
	}
	return p.addrs != nil && !slices.Equal(p.addrs, sorted(p.workload.Addrs))
}

func (p *pod) moved() bool {
	return p.workload != nil && p.netns != "" && p.workload.NetNS != "" && p.netns != p.workload.NetNS
}

func sorted(addrs []netip.Addr) []netip.Addr {
	s := slices.Clone(addrs)
	slices.SortFunc(s, netip.Addr.Compare)
	return s
}

// inForce is the claim that nothing gets past the agent, of the pod as it is now.
func (p *pod) inForce(cfg *Config) bool {
	return p.want(cfg) && p.prepared == on && p.outbound == on && p.inbound == on && p.guard == on
}

// captured is the claim of Status: it is in force, and other agents are told.
func (p *pod) captured(cfg *Config) bool {
	return p.inForce(cfg) && p.publish && p.published == on
}

// plan is the machine. occupant is the pod whose namespace p would take, "" when it is free.
func (p *pod) plan(now time.Time, cfg *Config, occupant string) plan {
	if p.want(cfg) {
		return p.forward(now, cfg, occupant)
	}
	return p.backward(now, cfg)
}

func (p *pod) forward(now time.Time, cfg *Config, occupant string) plan {
	awaited := plan{do: publish, why: "waiting to be published as ready for tunnels"}
	running := !p.workload.Starting // there may be connections to be gentle to
	switch {
	case p.prepared != on && occupant != "":
		return plan{why: fmt.Sprintf("its network namespace is still in use for pod %s", occupant)}
	case p.prepared != on:
		return plan{do: prepare, why: "being prepared"}
	case !p.publish || running && p.published != on:
		return awaited
	case running && now.Before(p.publishedAt.Add(cfg.Settle)):
		return plan{at: p.publishedAt.Add(cfg.Settle), why: "waiting for peers to learn that it is ready for tunnels"}
	case p.outbound != on:
		return plan{do: captureOutbound, why: "outbound traffic is about to be captured"}
	case running && now.Before(p.outboundAt.Add(cfg.Settle)):
		return plan{at: p.outboundAt.Add(cfg.Settle), why: "outbound traffic is captured, inbound is next"}
	case p.inbound != on:
		return plan{do: captureInbound, why: "inbound traffic is about to be captured"}
	case p.guard != on:
		return plan{do: guard, why: "the guard is about to be set"}
	case p.published != on:
		return awaited
	}
	return plan{}
}

func (p *pod) backward(now time.Time, cfg *Config) plan {
	gone := p.gone || p.moved() || p.lost
	inForce := p.published != off || p.publish
	switch {
	case p.prepared != on && inForce:
		return plan{do: unpublish, why: "waiting to be unpublished"}
	case p.prepared == off:
		return plan{do: forget, why: "nothing of it is in force any more"}
	case p.prepared == unsure:
		// Not prepared by this process, or not wholly: there is nothing to release gently,
		// and it is Remove that undoes it.
		return plan{do: remove, why: "what an earlier attempt or agent left is about to be removed"}
	case p.guard != off:
		return plan{do: unguard, why: "the guard is about to be lifted"}
	case p.inbound != off:
		return plan{do: releaseInbound, why: "inbound traffic is about to be released"}
	case inForce:
		return plan{do: unpublish, why: "waiting to be unpublished"}
	case !gone && now.Before(p.unpublishedAt.Add(cfg.Settle)):
		return plan{at: p.unpublishedAt.Add(cfg.Settle), why: "waiting for peers to learn that it takes no more tunnels"}
	case p.outbound != off:
		return plan{do: releaseOutbound, why: "outbound traffic is about to be released"}
	}
	if !gone {
		if wait := p.drain(now, cfg); wait.why != "" {
			return wait
		}
	}
	return plan{do: remove, why: "about to be removed"}
}

// drain returns the zero plan once the pod's connections are done with or out of time.
func (p *pod) drain(now time.Time, cfg *Config) plan {
	released := p.unpublishedAt
	if p.outboundOffAt.After(released) {
		released = p.outboundOffAt
	}
	if look := released.Add(cfg.Grace); now.Before(look) {
		return plan{at: look, why: "connections may still arrive"}
	}
	deadline := released.Add(cfg.MaxDrain)
	if !now.Before(deadline) {
		return plan{}
	}
	const why = "new connections are plain, earlier ones go on through the agent until they end"
	switch {
	case !now.Before(p.nextPoll):
		return plan{do: poll, why: why}
	case p.drained:
		return plan{}
	}
	return plan{at: earliest(p.nextPoll, deadline), why: why}
}

// counted takes in how many connections are live.
func (p *pod) counted(live int, now time.Time, cfg *Config) {
	p.drained = live == 0
	p.nextPoll = now.Add(cfg.DrainPoll)
}

// begin notes what becomes uncertain while a step is under way.
func (p *pod) begin(do step) {
	if f := p.fact(do); f != nil {
		*f = unsure
	}
	switch do {
	case prepare:
		p.addrs, p.announced = sorted(p.workload.Addrs), p.workload.Starting
		if p.workload.NetNS != "" {
			p.netns = p.workload.NetNS
		}
	case unguard, releaseInbound, releaseOutbound, remove:
		p.resumed = false
	case captureOutbound, captureInbound, guard, rest, publish, unpublish, poll, forget:
	}
}

// done notes what a step that succeeded has brought about.
func (p *pod) done(do step, now time.Time) {
	switch do {
	case captureOutbound:
		p.outbound = on
		if !p.resumed {
			p.outboundAt = now
		}
	case releaseOutbound:
		p.outbound, p.outboundOffAt, p.drained = off, now, false
	case remove:
		p.prepared, p.outbound, p.inbound, p.guard = off, off, off, off
		p.netns, p.addrs, p.announced, p.lost, p.drained = "", nil, false, false, false
		p.publishedAt, p.unpublishedAt, p.outboundAt, p.outboundOffAt = time.Time{}, time.Time{}, time.Time{}, time.Time{}
	case prepare:
		p.prepared = on
	case captureInbound:
		p.inbound = on
	case guard:
		p.guard, p.resumed = on, false
	case unguard:
		p.guard = off
	case releaseInbound:
		p.inbound = off
	case rest, publish, unpublish, poll, forget:
	}
}

// fact is what a step changes.
func (p *pod) fact(do step) *fact {
	switch do {
	case prepare, remove:
		return &p.prepared
	case captureOutbound, releaseOutbound:
		return &p.outbound
	case captureInbound, releaseInbound:
		return &p.inbound
	case guard, unguard:
		return &p.guard
	case rest, publish, unpublish, poll, forget:
	}
	return nil
}
