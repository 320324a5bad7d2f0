package kernelpath

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/authz"
	"github.com/raceway-mesh/raceway/dataplane/kernel"
	"github.com/raceway-mesh/raceway/dataplane/samenode"
	"github.com/raceway-mesh/raceway/dataplane/telemetry"
)

// connection is one that lives, with the records of both its ends.
type connection struct {
	kernel.DirectConnection
	source, destination *telemetry.Conn
	request             authz.Request
	server              string                  // the destination's UID
	dryRun              map[dataplane.Name]bool // dry-run policies that would deny it, as counted
	cut                 error                   // why it is being ended
	missed              int                     // how often it was not listed
}

// Run serves until ctx ends. Connections live on then, for the next agent to follow.
func (p *Paths) Run(ctx context.Context) error {
	if err := p.cfg.Kernel.Direct(); err != nil {
		p.cfg.Log.Info("pods of this node talk through tunnels: the kernel cannot do it alone", "cause", err)
		return nil
	}
	p.cfg.Store.Before(p.renew)
	defer p.end()
	select {
	case <-p.renewed: // before that nobody knows whose connections there are
	case <-ctx.Done():
		return nil
	}
	events := make(chan kernel.DirectConnection, 256)
	following, stop := context.WithCancel(ctx)
	var followed error
	var followers sync.WaitGroup
	followers.Go(func() {
		followed = p.cfg.Kernel.FollowDirect(following, func(c kernel.DirectConnection) {
			select {
			case events <- c:
			case <-following.Done():
			}
		})
		close(events)
	})
	p.adopt()
	p.serve(ctx, events)
	stop()
	followers.Wait()
	for _, c := range p.connections {
		c.source.HandOver()
		c.destination.HandOver()
	}
	return followed
}

func (p *Paths) serve(ctx context.Context, events <-chan kernel.DirectConnection) {
	sample := time.NewTicker(p.cfg.Interval)
	defer sample.Stop()
	for {
		select {
		case c, ok := <-events:
			if !ok {
				return
			}
			p.handle(c)
		case <-p.renewed:
			p.rejudge()
			p.recheck()
		case <-sample.C:
			p.sample()
		case <-ctx.Done():
			return
		}
	}
}

func (p *Paths) handle(c kernel.DirectConnection) {
	switch c.Event {
	case kernel.DirectOpened:
		p.touch(ask{c.Client, c.Asked})
		p.opened(c, false)
	case kernel.DirectClosed:
		p.closed(c)
	case kernel.DirectFailed:
		p.failed(c)
	case kernel.DirectUnanswered:
		p.block(c)
	case kernel.DirectLive:
	}
}

// now is who judges, nil when nobody does.
func (p *Paths) now() *samenode.Judge {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.judge
}

// attempts are what the source's and the destination's side tell.
func attempts(j *samenode.Judge, c kernel.DirectConnection) (source, destination telemetry.Attempt) {
	from, to := telemetry.Peer{Addr: c.From}, telemetry.Peer{Addr: c.To}
	var svc *dataplane.Service
	if j != nil {
		from.Workload, to.Workload = j.Snapshot.Workload(c.Client), j.Snapshot.Workload(c.Server)
		svc = j.Snapshot.ServiceAt(c.Asked.Addr())
	}
	for _, p := range []*telemetry.Peer{&from, &to} {
		if p.Workload != nil {
			p.Identity = p.Workload.Identity
		}
	}
	started := time.Now().Add(c.Started - kernel.Monotonic())
	source = telemetry.Attempt{
		Direction: telemetry.Outbound, Kernel: true, Source: from, Destination: to, Service: svc, Started: started,
	}
	destination = source
	destination.Direction = telemetry.Inbound
	return source, destination
}

// opened tells of a connection, and judges it by the policy of now: it may have changed since
// the kernel let it go.
func (p *Paths) opened(d kernel.DirectConnection, adopted bool) *connection {
	if c := p.connections[d.ID]; c != nil {
		return c
	}
	j := p.now()
	source, destination := attempts(j, d)
	c := &connection{DirectConnection: d, server: d.Server}
	c.request = authz.Request{Peer: source.Source.Identity, Source: d.From.Addr(), Destination: d.To}
	var denied error
	if w := destination.Destination.Workload; w != nil {
		v := j.Rules(w).Evaluate(c.request)
		destination.Policy = policyText(v)
		p.count(c, v, true)
		if !v.Allowed {
			denied = denial("policy denied", v)
		}
	}
	open := p.cfg.Telemetry.Open
	if adopted {
		open = func(a telemetry.Attempt) *telemetry.Conn { return p.cfg.Telemetry.Resume(a, d.Sent, d.Received) }
	}
	c.source, c.destination = open(source), open(destination)
	p.connections[d.ID] = c
	if d.Event == kernel.DirectOpened && !d.Arrived && denied == nil {
		denied = errTranslated
	}
	if denied != nil {
		p.cut(c, denied)
	}
	return c
}

func (p *Paths) closed(d kernel.DirectConnection) {
	c := p.opened(d, false) // whose opening was not told
	delete(p.connections, d.ID)
	c.take(d)
	flags, err := telemetry.FlagsNone, c.cut
	switch {
	case errors.Is(err, errTranslated):
		flags = telemetry.FlagsConnect
	case err != nil:
		flags = telemetry.FlagsDeny
	case d.Err != nil:
		flags, err = telemetry.FlagsReset, fmt.Errorf("the source's socket: %w", d.Err)
	case !d.Clean:
		flags, err = telemetry.FlagsReset, errBrokenOff
	}
	c.source.Close(flags, err)
	c.destination.Close(flags, err)
}

// errBrokenOff is a source that closed before it had sent or read everything.
var errBrokenOff = errors.New("the source closed before both ends had finished")

// errTranslated is a connection that was opened, but not by the address and port that were admitted.
var errTranslated = errors.New("the node's NAT has given it another source port, so that it does not arrive as what was allowed")

// take notes how far a connection has come.
func (c *connection) take(d kernel.DirectConnection) {
	for _, t := range []*telemetry.Conn{c.source, c.destination} {
		t.Total(d.Sent, d.Received)
	}
	c.source.Network(d.RTT, d.Retransmits)
}

func (p *Paths) failed(d kernel.DirectConnection) {
	source, destination := attempts(p.now(), d)
	err := d.Err
	if err == nil {
		err = errors.New("given up")
	}
	err = fmt.Errorf("connect to %s: %w", d.To, err)
	p.cfg.Telemetry.Refuse(source, telemetry.FlagsConnect, err)
	if !d.Arrived { // somebody on the way refused it
		p.block(d)
		return
	}
	p.cfg.Telemetry.Refuse(destination, telemetry.FlagsConnect, err)
}

// adopt finds what an earlier agent left.
func (p *Paths) adopt() {
	live, err := p.cfg.Kernel.DirectConnections()
	if err != nil {
		p.cfg.Log.Error("find connections by the kernel", "error", err)
		return
	}
	for _, d := range live {
		p.opened(d, true)
	}
}

// settled is how old news of a connection must have been told by.
const settled = time.Second

// sample asks all for their bytes, and finds those whose opening or end was not told: events
// are lost when there are too many.
func (p *Paths) sample() {
	live, err := p.cfg.Kernel.DirectConnections()
	if err != nil {
		p.cfg.Log.Error("ask connections by the kernel", "error", err)
		return
	}
	for _, d := range live {
		c := p.connections[d.ID]
		if c == nil {
			if d.Now-d.Started < settled {
				continue
			}
			c = p.opened(d, false)
		}
		c.missed = -1
		c.take(d)
	}
	for id, c := range p.connections {
		if c.missed++; c.missed > 1 { // its end may be about to be told, once
			delete(p.connections, id)
			c.source.Close(telemetry.FlagsUnknown, errUntold)
			c.destination.Close(telemetry.FlagsUnknown, errUntold)
		}
	}
}

// errUntold is a connection that is gone, and nobody knows how.
var errUntold = errors.New("its end was not told: too many connections ended at once")
