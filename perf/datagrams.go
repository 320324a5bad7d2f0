package perf

import (
	"context"
	"fmt"
	"net"
	"time"

	"github.com/raceway-mesh/raceway/e2e/lab/traffic"
)

// exchangedSize is of requests of UDP.
const exchangedSize = 64

// datagrams sends datagrams of size bytes on some flows.
func datagrams(size int) func(context.Context, task) (outcome, error) {
	return func(ctx context.Context, t task) (outcome, error) {
		return counted(traffic.Datagrams(ctx, t.To, traffic.DatagramOptions{Flows: 4, Size: size, Duration: t.Duration}))
	}
}

func datagramExchange(flows int) func(context.Context, task) (outcome, error) {
	return func(ctx context.Context, t task) (outcome, error) {
		return counted(traffic.ExchangeDatagrams(ctx, t.To, traffic.DatagramOptions{
			Flows: flows, Size: exchangedSize, Duration: t.Duration, Rate: t.Rate,
		}))
	}
}

func counted(r traffic.DatagramResult, err error) (outcome, error) {
	return outcome{Sent: r.Sent, Arrived: r.Arrived, Elapsed: r.Elapsed, Latency: r.Latency}, err
}

// recordDatagrams adds what a client found of UDP. CPU time is of each datagram that arrived, and
// of each request that was answered.
func recordDatagrams(add func(metric, unit string, value float64), got outcome, used usage) {
	arrived := float64(got.Arrived)
	add("rate", "1/s", arrived/got.Elapsed.Seconds())
	add("lost", "%", 100*(1-arrived/float64(got.Sent)))
	add("p50", "µs", micros(got.Latency.P50))
	add("p90", "µs", micros(got.Latency.P90))
	add("p99", "µs", micros(got.Latency.P99))
	add("p99.9", "µs", micros(got.Latency.P999))
	used.each(func(kind string, t time.Duration) { add("CPU "+kind, "s/million", t.Seconds()/arrived*1e6) })
}

// awaitUDP waits until the client's datagrams go the scenario's way, and come back.
func (st *site) awaitUDP(ctx context.Context) error {
	const pause = 100 * time.Millisecond
	for {
		err := st.askUDP(ctx)
		if err == nil && st.scenario.Mesh {
			err = st.tunnelsUDP(ctx)
		}
		if err == nil {
			return nil
		}
		for _, p := range st.relays {
			if !p.Running() {
				return fmt.Errorf("a relay ended: %w%s", p.Wait(ctx), p.LogTail())
			}
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return fmt.Errorf("wait for UDP: %w", err)
		}
	}
}

// askUDP has one datagram go there and back, by a socket of its own: those that are older than
// capture stay in clear.
func (st *site) askUDP(ctx context.Context) error {
	var conn net.Conn
	err := st.client.Do(func() (err error) {
		conn, err = new(net.Dialer).DialContext(ctx, "udp", st.target().String())
		return err
	})
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // all is said
	return traffic.AskDatagram(conn)
}

// tunnelsUDP is nil when both agents carry a flow.
func (st *site) tunnelsUDP(ctx context.Context) error {
	for _, n := range st.lab.Nodes() {
		flows, err := st.lab.Agent(n).UDPFlows(ctx)
		if err != nil {
			return err
		}
		if len(flows) == 0 {
			return fmt.Errorf("the agent of %s carries no UDP", n.Name)
		}
	}
	return nil
}
