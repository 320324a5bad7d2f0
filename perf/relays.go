package perf

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/e2e/lab"
	"github.com/raceway-mesh/raceway/perf/yardstick"
)

// Ports of a yardstick: the link's is the mesh's, so that packets are told apart in one way.
const (
	entryPort = 15001
	linkPort  = dataplane.PortTunnel
)

// startRelays starts the scenario's pair, the server's side first.
func (st *site) startRelays(ctx context.Context) error {
	pair, err := st.config.pair(st.scenario.Name)
	if err != nil {
		return err
	}
	dir := filepath.Join(st.lab.Dir(), "yardstick")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("make a directory for the relays: %w", err)
	}
	if err := yardstick.WriteCredentials(dir); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, setupTimeout)
	defer cancel()
	for _, relay := range []struct {
		side   yardstick.Side
		pod    *lab.Pod
		listen netip.AddrPort
	}{
		{yardstick.ServerSide, st.server, st.path().Link},
		{yardstick.ClientSide, st.client, st.path().Entry},
	} {
		cmd, err := pair.Command(dir, relay.side, st.path())
		if err != nil {
			return err
		}
		p, err := relay.pod.Start(cmd)
		if err != nil {
			return err
		}
		st.relays = append(st.relays, p)
		if st.scenario.udp {
			continue
		}
		if err := listening(ctx, p, relay.listen); err != nil {
			return fmt.Errorf("start the %s's relay: %w%s", relay.side, err, p.LogTail())
		}
	}
	if st.scenario.udp { // nobody can see that somebody listens
		return st.awaitUDP(ctx)
	}
	return nil
}

// path is where a yardstick's relays listen.
func (st *site) path() yardstick.Path {
	loopback := netip.MustParseAddr("127.0.0.1")
	if st.config.IPv6 {
		loopback = netip.IPv6Loopback()
	}
	return yardstick.Path{
		Entry:       netip.AddrPortFrom(loopback, entryPort),
		Link:        st.server.AddrPort(linkPort),
		Application: netip.AddrPortFrom(loopback, serverPort),
	}
}

// listening waits until p accepts connections.
func listening(ctx context.Context, p *lab.Process, at netip.AddrPort) error {
	for {
		conn, err := p.Host.Dial(ctx, at)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-p.Done():
			return fmt.Errorf("it ended: %w", p.Wait(ctx))
		case <-ctx.Done():
			return err
		case <-time.After(20 * time.Millisecond):
		}
	}
}
