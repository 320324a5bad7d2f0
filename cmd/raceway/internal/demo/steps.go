package demo

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/e2e/lab"
)

// Names of connections that stay open, by when they were opened; the story tells them so.
const (
	beforeLabel  = "before the label"
	underLabel   = "under the label"
	beforePolicy = "before the policy"
)

// plain is the world before: everybody on the link reads along.
func (s *story) plain(ctx context.Context) error {
	p := s.page
	p.say("Making two nodes and three pods out of network namespaces, and starting the applications, a CA and an agent on each node …")
	if err := s.build(ctx); err != nil {
		return err
	}
	if err := s.startMesh(ctx); err != nil {
		return err
	}
	p.say("web and batch on node1 make requests to db on node2 from here to the end, each on a new connection and with a nonce of its own; web also keeps one connection open. The link between the nodes is captured, every packet of it.")
	if err := s.open(ctx, s.web, beforeLabel, s.db.pod.AddrPort(dbPort)); err != nil {
		return err
	}
	requests, err := s.watch(ctx, s.web)
	if err != nil {
		return err
	}
	found, err := s.findInClear(ctx, requests)
	if err != nil {
		return err
	}
	if len(found) < len(requests) {
		return fmt.Errorf("the capture has %d of %d requests in clear: it would not notice if one was", len(found), len(requests))
	}
	first := found[0]
	p.block(fmt.Sprintf("%s > %s\n    %s", first.Source, first.Destination, strings.TrimSpace(string(first.Payload))))
	p.good("plain TCP: the capture has the payload of all %d requests in clear", len(requests))
	if s.withUDP {
		if err := s.plainUDP(ctx); err != nil {
			return err
		}
	}
	if err := s.raceway(ctx, "workloads"); err != nil {
		return err
	}
	p.note("RACEWAY_AGENT tells the command whom to ask: the demo's two agents")
	return nil
}

// findInClear looks for the segments with the nonces of requests.
func (s *story) findInClear(ctx context.Context, requests []request) ([]lab.Segment, error) {
	segments, err := s.link.Segments(ctx)
	if err != nil {
		return nil, err
	}
	var found []lab.Segment
	for _, r := range requests {
		i := slices.IndexFunc(segments, func(g lab.Segment) bool { return strings.Contains(string(g.Payload), r.Nonce) })
		if i >= 0 {
			found = append(found, segments[i])
		}
	}
	return found, nil
}

// label is the moment that it is all about.
func (s *story) label(ctx context.Context) error {
	p := s.page
	p.say("Namespace %s gets the label %s=%s. No pod and no process is restarted.", namespace, dataplane.ModeLabel, dataplane.ModeAmbient)
	if err := s.link.Reset(ctx); err != nil {
		return err
	}
	pods := []*lab.Pod{s.web.pod, s.batch.pod, s.db.pod}
	start := time.Now()
	if err := s.lab.LabelNamespace(namespace, dataplane.ModeAmbient); err != nil {
		return err
	}
	if err := s.awaitCapture(ctx, dataplane.ProtocolHBONE, dataplane.CaptureInForce, pods...); err != nil {
		return err
	}
	p.good("in force %s later", seconds(time.Since(start)))
	if err := s.raceway(ctx, "workloads"); err != nil {
		return err
	}
	p.say("The first that the link sees of a tunnel:")
	if err := s.showHandshake(ctx); err != nil {
		return err
	}
	if err := s.link.Reset(ctx); err != nil {
		return err
	}
	requests, err := s.watch(ctx, s.web)
	if err != nil {
		return err
	}
	if err := s.proveHidden(ctx, requests); err != nil {
		return err
	}
	return s.provePatience(ctx, start)
}

func (s *story) awaitCapture(ctx context.Context, protocol dataplane.Protocol, state dataplane.CaptureState, pods ...*lab.Pod) error {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("not within %v", patience))
	defer cancel()
	if err := s.lab.WaitProtocol(ctx, protocol, pods...); err != nil {
		return err
	}
	return s.lab.WaitCapture(ctx, state, pods...)
}

// showHandshake shows the beginning of the first tunnel.
func (s *story) showHandshake(ctx context.Context) error {
	segments, err := s.link.Segments(ctx)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(segments, func(g lab.Segment) bool {
		return g.Destination.Port() == dataplane.PortTunnel && len(g.Payload) > 0
	})
	if i < 0 {
		return fmt.Errorf("no tunnel to port %d crossed the link", dataplane.PortTunnel)
	}
	hello := segments[i]
	// A record of type handshake (RFC 8446, section 5.1) with a ClientHello in it (section 4).
	if len(hello.Payload) < 16 || hello.Payload[0] != 22 || hello.Payload[1] != 3 || hello.Payload[5] != 1 {
		return fmt.Errorf("what opens a tunnel is no TLS ClientHello: % x", hello.Payload[:min(16, len(hello.Payload))])
	}
	s.page.block(fmt.Sprintf("%s > %s\n    % x …  (TLS ClientHello)", hello.Source, hello.Destination, hello.Payload[:16]))
	return nil
}

// proveHidden proves that nothing of the requests crossed the link in clear.
func (s *story) proveHidden(ctx context.Context, requests []request) error {
	if failed, first := errorsOf(requests); failed > 0 {
		return fmt.Errorf("%d of %d requests failed: %s", failed, len(requests), first)
	}
	for _, needle := range append([]string{cardNumber}, nonces(requests)...) {
		seen, err := s.link.Contains(ctx, []byte(needle))
		if err != nil {
			return err
		}
		if seen {
			return fmt.Errorf("%q crossed the link in clear", needle)
		}
	}
	tunnel, err := s.link.CountPort(ctx, dataplane.PortTunnel)
	if err != nil {
		return err
	}
	segments, err := s.link.Segments(ctx)
	if err != nil {
		return err
	}
	opened := slices.ContainsFunc(segments, func(g lab.Segment) bool {
		return g.SYN && !g.ACK && g.Destination.Port() != dataplane.PortTunnel && s.isPod(g.Destination.Addr())
	})
	if opened || tunnel == 0 {
		return fmt.Errorf("%d packets of tunnels crossed the link, new connections beside them: %v", tunnel, opened)
	}
	dropped, err := s.link.Dropped(ctx)
	if err != nil {
		return err
	}
	if dropped > 0 {
		return fmt.Errorf("the capture dropped %d packets, so it proves nothing", dropped)
	}
	s.page.good("%d new connections: no packet of the capture has one of their nonces, nor any card number; %d were of tunnels to port %d, and it dropped none",
		len(requests), tunnel, dataplane.PortTunnel)
	return nil
}

func nonces(requests []request) []string {
	all := make([]string, len(requests))
	for i, r := range requests {
		all[i] = r.Nonce
	}
	return all
}

func (s *story) isPod(addr netip.Addr) bool { return s.podOf(addr) != nil }

// podOf is whose address it is; nil for nobody's.
func (s *story) podOf(addr netip.Addr) *lab.Pod {
	for _, p := range s.lab.Pods() {
		if p.Addr() == addr {
			return p
		}
	}
	return nil
}

// provePatience proves that the connection from before the label goes on.
func (s *story) provePatience(ctx context.Context, label time.Time) error {
	now, err := s.report(ctx, s.web, label)
	if err != nil {
		return err
	}
	old := now.Lasting[beforeLabel]
	if old.Error != "" || old.Requests == 0 {
		return fmt.Errorf("the connection from before the label broke: %s", old.Error)
	}
	s.page.good("the connection from before the label goes on as it was (%d requests by now); it stays plain until it ends, and \"raceway workloads -o wide\" counts such as OLD", old.Requests)
	s.page.good("the processes are the same: web is %d, batch %d, db %d", s.web.process.Pid(), s.batch.process.Pid(), s.db.process.Pid())
	return nil
}

// identities shows who each end is, to the other and to the operator.
func (s *story) identities(ctx context.Context) error {
	p := s.page
	var counts []clientCount
	if err := s.db.ask(ctx, "served", struct{}{}, &counts); err != nil {
		return err
	}
	slices.SortFunc(counts, func(a, b clientCount) int { return a.Client.Compare(b.Client) })
	var seen []string
	for _, c := range counts {
		pod := s.podOf(c.Client)
		if pod == nil || pod == s.db.pod {
			return fmt.Errorf("db sees %s, which is no client's address", c.Client)
		}
		seen = append(seen, fmt.Sprintf("%s (%s), %d requests", c.Client, pod.Name.Name, c.Requests))
	}
	p.good("db sees its clients' real addresses: %s; and nobody else", strings.Join(seen, "; "))
	p.say("web opens one more connection and keeps it, this time to the service: db:%d, which is %s.", dbPort, s.vip)
	if err := s.open(ctx, s.web, underLabel, s.vip); err != nil {
		return err
	}
	if err := sleep(ctx, time.Second/2); err != nil { // for some bytes to show
		return err
	}
	first, at, err := s.look(ctx)
	if err != nil {
		return err
	}
	if err := s.raceway(ctx, "connections"); err != nil {
		return err
	}
	if err := sleep(ctx, time.Second); err != nil {
		return err
	}
	second, later, err := s.look(ctx)
	if err != nil {
		return err
	}
	if second.Sent <= first.Sent || second.Received <= first.Received {
		return fmt.Errorf("no byte moved on web's connection: %d sent and %d received, then %d and %d", first.Sent, first.Received, second.Sent, second.Received)
	}
	p.good("%s later it has moved %d bytes to db and %d back", seconds(later.Sub(at)), second.Sent-first.Sent, second.Received-first.Received)
	p.good("both ends proved who they are: %s and %s", second.Source.Identity, second.Destination.Identity)
	return nil
}

// look finds web's lasting connection to the service, as its agent sees it.
func (s *story) look(ctx context.Context) (found admin.Connection, at time.Time, err error) {
	client := s.lab.Agent(s.web.pod.Node).Client()
	defer client.Close()
	err = until(ctx, func(ctx context.Context) error {
		all, err := client.Connections(ctx)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(all, func(c admin.Connection) bool {
			return strings.HasPrefix(c.Service, "db."+namespace+".") && c.Source.Workload == "web" && c.Direction == "outbound" && c.Sent > 0
		})
		if i < 0 {
			return errors.New("the agent of node1 does not know web's connection to the service db")
		}
		found, at = all[i], time.Now()
		if found.Source.Identity.IsZero() || found.Destination.Identity.IsZero() || found.Protocol != dataplane.ProtocolHBONE {
			return fmt.Errorf("web's connection to db is %s between %q and %q", found.Protocol, found.Source.Identity, found.Destination.Identity)
		}
		return nil
	})
	return found, at, err
}

// why asks what becomes of a connection.
func (s *story) why(ctx context.Context) error {
	target := fmt.Sprintf("db:%d", dbPort)
	for _, source := range []string{"web", "batch"} {
		if err := s.raceway(ctx, "why", source, target); err != nil {
			return err
		}
	}
	return nil
}

// unlabel takes it all back, and says what it cost.
func (s *story) unlabel(ctx context.Context) (err error) {
	p := s.page
	if s.meshed, err = s.measure(ctx); err != nil {
		return err
	}
	p.say("The label is taken away. The policy stays, but there is nobody left to enforce it.")
	start := time.Now()
	if err := s.lab.LabelNamespace(namespace, ""); err != nil {
		return err
	}
	wait, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("not within %v", patience))
	defer cancel()
	if err := s.lab.WaitProtocol(wait, dataplane.ProtocolTCP, s.lab.Pods()...); err != nil {
		return err
	}
	if err := s.awaitPlain(ctx); err != nil {
		return err
	}
	p.good("traffic is plain again %s later: the capture finds payloads as in step 1", seconds(time.Since(start)))
	if err := s.proveLasting(ctx); err != nil {
		return err
	}
	if err := s.lab.WaitCapture(wait, dataplane.CaptureNone, s.lab.Pods()...); err != nil {
		return err
	}
	if err := s.raceway(ctx, "workloads"); err != nil {
		return err
	}
	if s.plainly, err = s.measure(ctx); err != nil {
		return err
	}
	s.showCost()
	return nil
}

// awaitPlain waits until new requests of both clients are in the capture again, and succeed.
func (s *story) awaitPlain(ctx context.Context) error {
	return until(ctx, func(ctx context.Context) error {
		if err := s.link.Reset(ctx); err != nil {
			return err
		}
		for _, a := range []*app{s.web, s.batch} {
			var r request
			if err := a.ask(ctx, "request", connectionQuestion{Target: s.db.pod.AddrPort(dbPort)}, &r); err != nil {
				return err
			}
			if r.Error != "" {
				return fmt.Errorf("a request of %s fails: %s", a.name, r.Error)
			}
			seen, err := s.link.Contains(ctx, []byte(r.Nonce))
			if err != nil {
				return err
			}
			if !seen {
				return fmt.Errorf("the requests of %s are not in clear yet", a.name)
			}
		}
		return nil
	})
}

// proveLasting proves that both of web's open connections outlived everything, and closes
// them, so that the agents need not wait for them.
func (s *story) proveLasting(ctx context.Context) error {
	r, err := s.report(ctx, s.web, time.Now())
	if err != nil {
		return err
	}
	for _, name := range []string{beforeLabel, underLabel} {
		if l := r.Lasting[name]; l.Error != "" || l.Requests == 0 {
			return fmt.Errorf("the connection from %s broke: %s", name, l.Error)
		}
	}
	s.page.good("both connections that web kept go on: the plain one from before the label (%d requests), and the one from under it (%d), whose tunnel stays until it ends",
		r.Lasting[beforeLabel].Requests, r.Lasting[underLabel].Requests)
	return errors.Join(s.closeConnection(ctx, s.web, beforeLabel), s.closeConnection(ctx, s.web, underLabel))
}
