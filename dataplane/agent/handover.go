package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane/handover"
	"github.com/raceway-mesh/raceway/dataplane/kernel"
)

// How a node goes from one agent to the next, while both run:
//
//	waiting ──Take──► reigning ──successor asks──► superseded ──no connection left, ctx ends──► ended
//	                     ▲                             │
//	                     └── Serve: successor is gone ─┘  (a new Agent, in the same process)
//
// waiting prepares whatever can be prepared beside another agent. superseded accepts until the
// successor has opened every pod, and carries what it has accepted.

// succession is an agent's place between the one before and the one after it.
type succession struct {
	predecessor *handover.Predecessor // of another process; nil when there was none
	earlier     *Agent                // of this process; nil when there was none
	listener    *handover.Listener    // for a successor
	metrics     *metricsServer        // nil when there is none
	warm        []spiffe.ID           // whose certificates were asked for before any pod was opened

	yielded  atomic.Bool              // a successor has the node
	heir     chan *handover.Successor // delivers it to Serve, which closes it
	relieved chan struct{}            // closed when a later agent of this process serves all pods
	ears     atomic.Int32             // whether this agent accepts, as one that has yielded
}

// The states of ears.
const (
	earsOpen   = iota // until the successor serves every pod
	earsNeeded        // the successor is gone: until a later agent of this process does
	earsShut
)

const (
	// acceptGrace is how long connections whose handshake was under way when the listeners
	// were replaced are still accepted.
	acceptGrace = time.Second
	// certificatesWait is how long a node is not taken over for want of some certificates. For
	// want of all of them it never is: the other agent may do better.
	certificatesWait = 30 * time.Second
	// handoverTimeout bounds the wait for a predecessor to let go: calls that are under way
	// come to their end first.
	handoverTimeout = time.Minute
	// comeBackInterval is how often a superseded agent whose successor is gone looks whether
	// the node is free.
	comeBackInterval = 250 * time.Millisecond
)

// Serve runs agents on the node until ctx ends: one, and when the successor that took the node
// from it is gone, another one in its place. An agent that was superseded goes on until its
// connections have ended.
func Serve(ctx context.Context, cfg Config) error {
	a, err := New(cfg)
	if err != nil {
		return err
	}
	agents, ctx := errgroup.WithContext(ctx)
	for a != nil {
		ended, this := make(chan struct{}), a
		agents.Go(func() error {
			defer close(ended)
			return errors.Join(this.Run(ctx), this.Close())
		})
		var next *Agent
		select {
		case <-ended:
		case heir := <-a.heir:
			next = a.comeBack(ctx, heir)
		}
		a = next
	}
	return agents.Wait()
}

// comeBack waits for the end of the successor, and returns an agent that has the node again;
// nil when ctx ended first.
func (a *Agent) comeBack(ctx context.Context, heir *handover.Successor) *Agent {
	log := a.cfg.Log.With("successor", heir.Version, "pid", heir.PID)
	select {
	case <-ctx.Done():
	case <-heir.Gone():
		log.Warn("the agent that took this node over is gone: taking the node back")
	}
	if err := heir.Close(); err != nil {
		log.Debug("close the connection to the successor", "error", err)
	}
	a.closeMetrics() // it is the next one's
	// The listeners first: that takes no time. Nobody would accept from those of an agent that
	// has stopped.
	accepts := a.ears.CompareAndSwap(earsOpen, earsNeeded)
	for told := ""; ctx.Err() == nil; {
		var err error
		if accepts {
			err = a.datapath.Reclaim()
		}
		if err == nil {
			var next *Agent
			if next, err = newAgent(a.cfg, a); err == nil {
				return next
			}
		}
		if err.Error() != told {
			told = err.Error()
			log.Warn("the node cannot be taken back yet", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(comeBackInterval):
		}
	}
	return nil
}

// socketName is that of the socket for successors: in the state directory, since that is what
// they contend for.
const socketName = "handover"

func (a *Agent) self() (handover.Agent, error) {
	self := handover.Agent{Node: a.cfg.Node, Version: a.cfg.Version, PID: os.Getpid()}
	var netns syscall.Stat_t
	if err := syscall.Stat("/proc/self/ns/net", &netns); err != nil {
		return self, fmt.Errorf("look at the agent's network namespace: %w", err)
	}
	self.NetNS = netns.Ino
	return self, nil
}

// meet looks for an agent that serves the node.
func (a *Agent) meet(earlier *Agent) error {
	a.heir, a.relieved, a.earlier = make(chan *handover.Successor, 1), make(chan struct{}), earlier
	if earlier != nil || !a.cfg.Takeover {
		return nil
	}
	self, err := a.self()
	if err != nil {
		return err
	}
	a.predecessor, err = handover.Meet(filepath.Join(a.cfg.StateDir, socketName), self)
	if err != nil || a.predecessor == nil {
		return err
	}
	a.own(a.predecessor)
	if err := kernel.Loadable(); err != nil {
		return fmt.Errorf("another agent serves this node, and this one could not: %w", err)
	}
	return nil
}

// waits reports whether the node is another agent's.
func (a *Agent) waits() bool { return a.predecessor != nil }

// newListener is for successors.
func (a *Agent) newListener() error {
	self, err := a.self()
	if err != nil {
		return err
	}
	a.listener, err = handover.Listen(filepath.Join(a.cfg.StateDir, socketName), self, a.cfg.Log.With("part", "handover"))
	if err != nil {
		return err
	}
	a.own(a.listener)
	a.lead(a.listener.Run, a.relieve)
	return nil
}

// takeOver takes the node from the predecessor, if there is one, once this agent can serve it.
func (a *Agent) takeOver(ctx context.Context) error {
	if !a.waits() {
		return nil
	}
	log := a.cfg.Log.With("predecessor", a.predecessor.Version, "pid", a.predecessor.PID)
	log.Info("another agent serves this node: getting ready to take over")
	began := time.Now()
	if !a.warmUp(ctx) {
		return nil // ctx ended
	}
	bounded, cancel := context.WithTimeout(ctx, handoverTimeout)
	defer cancel()
	if err := a.predecessor.Take(bounded); err != nil {
		return err
	}
	log.Info("taking the node over", "after", time.Since(began).Round(time.Millisecond))
	return inOrder(append([]func() error{a.newAdmin}, a.takeSteps()...))
}

// warmUp waits for the cluster and the certificates of the node's pods, unless the predecessor
// ends: then nobody else serves. It reports whether the node is to be taken.
func (a *Agent) warmUp(ctx context.Context) bool {
	alone, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // ends with alone
		select {
		case <-a.predecessor.Gone():
			cancel()
		case <-alone.Done():
		}
	}()
	for {
		s, changed := a.store.Load()
		if s != nil {
			seen := map[spiffe.ID]bool{}
			for _, w := range s.Workloads() {
				if w.Node == a.cfg.Node && w.Enrolled && !seen[w.Identity] {
					seen[w.Identity] = true
					a.warm = append(a.warm, w.Identity)
					a.keeper.Want(w.Identity)
				}
			}
			break
		}
		select {
		case <-changed:
		case <-alone.Done():
			return ctx.Err() == nil
		}
	}
	for len(a.warm) > 0 && alone.Err() == nil && !a.certified(alone) {
		a.cfg.Log.Warn("no certificate of any pod could be got: the node stays with the other agent")
	}
	return ctx.Err() == nil
}

// certified waits for the certificates of all pods, or for that of one for certificatesWait.
func (a *Agent) certified(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, certificatesWait)
	defer cancel()
	some := false
	for _, id := range a.warm {
		if err := a.keeper.Ready(ctx, id); err != nil {
			a.cfg.Log.Warn("taking over without a certificate", "identity", id, "error", err)
			continue
		}
		some = true
	}
	return some
}

// relieve tells the agent before this one, once, that every pod is served here.
func (a *Agent) relieve(ctx context.Context) error {
	if a.predecessor == nil && a.earlier == nil {
		return nil
	}
	ticker := time.NewTicker(readyInterval)
	defer ticker.Stop()
	for a.ready.get() != nil {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
	a.pods.forgetUnused(a.warm)
	if a.earlier != nil {
		close(a.earlier.relieved)
		a.earlier = nil // it may be forgotten once its connections have ended
		return nil
	}
	if err := a.predecessor.Done(); err != nil {
		a.cfg.Log.Warn("the predecessor may accept for longer than it needs", "error", err)
	}
	return nil
}

// forgetUnused gives up certificates that no pod was opened for.
func (p *pods) forgetUnused(ids []spiffe.ID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	used := make(map[spiffe.ID]bool)
	for _, s := range p.served {
		used[s.identity] = true
	}
	for _, id := range ids {
		if !used[id] {
			p.keeper.Forget(id)
		}
	}
}

// reign does what the agent that has the node does, until ctx ends or a successor asks for it,
// and then carries on what lives.
func (a *Agent) reign(ctx, parts context.Context) error {
	a.cfg.Log.Info("serving", "node", a.cfg.Node, "version", a.cfg.Version, "inbound", a.datapath.InboundMode())
	leading, stopLeading := context.WithCancel(parts)
	defer stopLeading()
	leads, leading := errgroup.WithContext(leading)
	enrolling, stopEnrolling := context.WithCancel(ctx)
	defer stopEnrolling()
	context.AfterFunc(leading, stopEnrolling) // a part that failed ends it all
	for _, part := range a.leads {
		leads.Go(func() error { return part(leading) })
	}
	asked := make(chan *handover.Successor, 1)
	leads.Go(func() error {
		select {
		case s := <-a.listener.Asked():
			asked <- s
			stopEnrolling()
		case <-leading.Done():
		}
		return nil
	})
	err := a.enrol(enrolling)
	yield := func() {
		stopLeading()
		a.yielded.Store(true)
		err = errors.Join(err, leads.Wait(), a.datapath.Yield())
	}
	select {
	case s := <-asked:
		yield()
		a.grant(s)
		a.carryOn(ctx, parts, s)
		return err
	default:
	}
	if a.canGiveBack() {
		a.cfg.Log.Info("giving the node back to the agent that had it before")
		a.closeMetrics()
		yield()
		err = errors.Join(err, a.predecessor.Close())
		pause(parts, acceptGrace)
		a.drain(parts)
		return err
	}
	drained := make(chan struct{})
	go func() { // joined below
		defer close(drained)
		a.drain(parts)
	}()
	select {
	case s := <-asked: // in time to spare its clients the drain
		yield()
		a.grant(s)
		<-drained
		return errors.Join(err, s.Close())
	case <-drained:
		stopLeading()
		return errors.Join(err, leads.Wait())
	}
}

// grant gives the node to s. If s is gone, Serve will notice.
func (a *Agent) grant(s *handover.Successor) {
	log := a.cfg.Log.With("successor", s.Version, "pid", s.PID)
	if self, err := a.self(); err != nil || self.NetNS == s.NetNS {
		a.closeMetrics() // s wants the address
	}
	log.Info("another agent takes this node over", "connections", a.telemetry.Live())
	if err := s.Grant(); err != nil {
		log.Warn("the successor went away", "error", err)
	}
}

// carryOn accepts until the successor, or another agent of this process in its place, serves
// every pod, and carries what was accepted until it has ended or ctx ends.
func (a *Agent) carryOn(ctx, parts context.Context, s *handover.Successor) {
	a.heir <- s
	wait := func(done <-chan struct{}) {
		select {
		case <-done:
		case <-a.relieved:
		case <-ctx.Done():
		case <-parts.Done():
		}
		pause(parts, acceptGrace)
	}
	wait(s.Done())
	if !a.ears.CompareAndSwap(earsOpen, earsShut) {
		wait(nil)
	}
	a.stopServing()
	a.cfg.Log.Info("every pod is served by another agent", "connections", a.telemetry.Live())
	idle := make(chan struct{})
	go func() { // ends when drain has ended
		defer close(idle)
		a.pods.wait()
	}()
	select {
	case <-idle:
		return
	case <-ctx.Done():
	case <-parts.Done():
	}
	a.drain(parts)
	<-idle
}

// canGiveBack reports whether a predecessor is there that would take the node back.
func (a *Agent) canGiveBack() bool {
	if a.predecessor == nil {
		return false
	}
	select {
	case <-a.predecessor.Gone():
		return false
	default:
		return true
	}
}

func (a *Agent) closeMetrics() {
	if a.metrics == nil {
		return
	}
	if err := a.metrics.stop(); err != nil {
		a.cfg.Log.Warn("stop serving metrics", "error", err)
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
