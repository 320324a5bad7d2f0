package proxy

import (
	"fmt"
	"net/netip"

	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/paths"
	"github.com/raceway-mesh/raceway/hbone"
)

// transport says how the peer w is to be asked for a stream, by QUIC unless nil is returned, and
// why. The reason is "" while the pod's namespace has no wish.
func (s *servedPod) transport(mode dataplane.TransportMode, w *dataplane.Workload, peer netip.AddrPort) (quic *quicTunnels, why string) {
	if mode == dataplane.TransportDefault {
		return nil, ""
	}
	asked := fmt.Sprintf("%s=%s", dataplane.TransportLabel, mode)
	u := s.datagrams()
	switch {
	case mode == dataplane.TransportH2:
		return nil, asked
	case u == nil || u.quic == nil:
		return nil, asked + ", but the agent does not take the UDP of this pod"
	case !w.UDP:
		return nil, fmt.Sprintf("%s, but the agent of %s does not take its UDP", asked, w.Name)
	case u.quic.isBlocked(peer):
		return nil, asked + ", but nothing answers at the peer's UDP port 15008"
	case mode == dataplane.TransportAuto:
		bad, quality := s.paths.Bad(peer.Addr())
		why = fmt.Sprintf("%s: %v", asked, quality)
		if !bad {
			return nil, why
		}
		return u.quic, why
	}
	return u.quic, asked
}

// hearPath has a tunnel that our side opened tell of the way to the peer.
func (s *servedPod) hearPath(t *hbone.Tunnel) {
	peer := t.Conn.Remote.Addr()
	if tcp := tcpOf(t.Conn); tcp != nil {
		s.paths.Watch(peer, tcp)
	}
	if quality, err := paths.Parse(t.Response.Path); err == nil {
		s.paths.Hear(peer, quality)
	}
}

// tellPath is what to tell the peer of the way of conn, which it opened, if it has a choice.
func (s *servedPod) tellPath(conn *hbone.Conn) string {
	tcp := tcpOf(conn)
	if tcp == nil || !s.cfg.UDP {
		return ""
	}
	s.paths.Watch(conn.Remote.Addr(), tcp)
	if quality := s.paths.Ours(conn.Remote.Addr()); quality.Bad() {
		return quality.String()
	}
	return ""
}

func (s *servedPod) transportMode(source *dataplane.Workload) dataplane.TransportMode {
	snapshot, _ := s.cfg.Store.Load()
	if snapshot == nil || source == nil {
		return dataplane.TransportDefault
	}
	ns := snapshot.Namespace(source.Name.Namespace)
	if ns == nil {
		return dataplane.TransportDefault
	}
	return ns.Transport()
}

// carriedBy is the transport of conn, with why it was chosen.
func carriedBy(conn *hbone.Conn, why string) string {
	carrier := "h2"
	if conn.Raw == nil {
		carrier = "h3"
	}
	switch {
	case why != "":
		return carrier + ": " + why
	case carrier == "h3":
		return carrier
	}
	return "" // as ever
}
