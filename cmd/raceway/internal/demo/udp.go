package demo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/raceway-mesh/raceway/dataplane/admin"
	"github.com/raceway-mesh/raceway/e2e/lab/traffic"
)

const (
	// datagramPort is where db confirms orders that come as datagrams.
	datagramPort = 7000
	// orders is how many datagrams say something.
	orders = 50
)

// udpTitle is that of the step about UDP.
const udpTitle = "UDP as well"

// datagramQuestion has a client send orders to target by UDP, from a socket of its own.
type datagramQuestion struct {
	Target netip.AddrPort `json:"target"`
	Count  int            `json:"count"`
}

// serveDatagrams confirms every order until ctx ends.
func serveDatagrams(ctx context.Context, conn net.PacketConn) error {
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })() // ReadFrom returns then
	var b [1500]byte
	for {
		n, client, err := conn.ReadFrom(b[:])
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("receive: %w", err)
		}
		words := strings.Fields("nothing " + string(b[:n]))
		_, _ = fmt.Fprintf(writerTo{conn, client}, "done %s", words[len(words)-1]) // the client misses it
	}
}

// writerTo sends each write to one peer.
type writerTo struct {
	net.PacketConn
	peer net.Addr
}

func (w writerTo) Write(p []byte) (int, error) { return w.WriteTo(p, w.peer) }

// sendOrders makes requests of one datagram each, one after the other.
func sendOrders(ctx context.Context, q datagramQuestion) ([]request, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "udp", q.Target.String())
	if err != nil {
		return nil, err
	}
	requests := make([]request, 0, q.Count)
	for range q.Count {
		r := request{At: time.Now(), Nonce: newNonce()}
		if err := order(conn, r.Nonce); err != nil {
			r.Error = err.Error()
		}
		r.Took = time.Since(r.At)
		requests = append(requests, r)
	}
	return requests, conn.Close()
}

// order sends its datagram again until it is confirmed, as who uses UDP must.
func order(conn net.Conn, nonce string) error {
	confirmed := []byte("done " + nonce)
	_, err := traffic.Ask(conn, []byte(payment(nonce)), func(p []byte) bool { return bytes.Equal(p, confirmed) }, requestTimeout)
	return err
}

// datagrams has web send orders by UDP, which all are to be confirmed.
func (s *story) datagrams(ctx context.Context, count int) ([]request, error) {
	var requests []request
	if err := s.web.ask(ctx, "datagrams", datagramQuestion{s.db.pod.AddrPort(datagramPort), count}, &requests); err != nil {
		return nil, err
	}
	if failed, first := errorsOf(requests); failed > 0 {
		return requests, fmt.Errorf("%d of %d datagrams were not answered: %s", failed, len(requests), first)
	}
	return requests, nil
}

// sendWatched has web send orders by UDP, and counts those that crossed the link in clear.
func (s *story) sendWatched(ctx context.Context) (sent, clear int, err error) {
	requests, err := s.datagrams(ctx, orders)
	if err != nil {
		return 0, 0, err
	}
	for _, nonce := range nonces(requests) {
		seen, err := s.link.Contains(ctx, []byte(nonce))
		if err != nil {
			return 0, 0, err
		}
		if seen {
			clear++
		}
	}
	return len(requests), clear, nil
}

// plainUDP is the world before, for datagrams.
func (s *story) plainUDP(ctx context.Context) error {
	sent, clear, err := s.sendWatched(ctx)
	if err != nil {
		return err
	}
	if clear < sent {
		return fmt.Errorf("the capture has %d of %d datagrams in clear: it would not notice if one was", clear, sent)
	}
	s.page.good("UDP: it has the payload of all %d datagrams from web to db:%d as well", clear, datagramPort)
	return nil
}

// udp shows that datagrams go in tunnels, too.
func (s *story) udp(ctx context.Context) error {
	p := s.page
	p.say("web sends orders to db by UDP again, to port %d. The label captured that as well.", datagramPort)
	if _, err := s.awaitUDP(ctx); err != nil {
		return err
	}
	if err := s.link.Reset(ctx); err != nil {
		return err
	}
	sent, clear, err := s.sendWatched(ctx)
	if err != nil {
		return err
	}
	dropped, err := s.link.Dropped(ctx)
	if err != nil {
		return err
	}
	if clear > 0 || dropped > 0 {
		return fmt.Errorf("%d of %d datagrams crossed the link in clear; the capture dropped %d packets", clear, sent, dropped)
	}
	p.good("%d datagrams, all answered: no packet of the capture has one of their nonces", sent)
	if err := s.raceway(ctx, "connections"); err != nil {
		return err
	}
	flow, err := s.awaitUDP(ctx)
	if err != nil {
		return err
	}
	p.good("a flow of UDP names both ends as well: %s and %s", flow.Source.Identity, flow.Destination.Identity)
	return nil
}

// awaitUDP waits until what web sends to db by UDP is in a tunnel, and returns the flow.
func (s *story) awaitUDP(ctx context.Context) (flow admin.Connection, err error) {
	agent := s.lab.Agent(s.web.pod.Node)
	err = until(ctx, func(ctx context.Context) error {
		if _, err := s.datagrams(ctx, 1); err != nil {
			return err
		}
		all, err := agent.UDPFlows(ctx)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(all, func(c admin.Connection) bool { return c.Source.Workload == "web" })
		if i < 0 {
			return errors.New("the agent of node1 has no flow of UDP from web")
		}
		flow = all[i]
		if flow.Source.Identity.IsZero() || flow.Destination.Identity.IsZero() {
			return fmt.Errorf("the flow from web is between %q and %q", flow.Source.Identity, flow.Destination.Identity)
		}
		return nil
	})
	return flow, err
}
