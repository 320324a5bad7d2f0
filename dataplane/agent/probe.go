package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/raceway-mesh/raceway/certs/spiffe"
	"github.com/raceway-mesh/raceway/dataplane"
	"github.com/raceway-mesh/raceway/dataplane/admin"
)

// probeTimeout bounds the connection that a check makes to one address of a pod.
const probeTimeout = 2 * time.Second

// probe makes a connection as a peer would: to the pod's tunnel port, through the programs
// that steer it, to whoever accepts there, who has to prove the pod's identity. No stream
// is opened.
func (p *pods) probe(ctx context.Context, w *dataplane.Workload, s *servedPod) admin.Finding {
	f := admin.Finding{Check: "tunnel", OK: true}
	var errs []error
	for _, a := range w.Addrs {
		if err := p.handshake(ctx, s, netip.AddrPortFrom(a, dataplane.PortTunnel)); err != nil {
			errs = append(errs, fmt.Errorf("a tunnel from the pod to itself, %v: %w", a, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		f.OK, f.Detail = false, err.Error()
	}
	return f
}

func (p *pods) handshake(ctx context.Context, s *servedPod, to netip.AddrPort) (err error) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	config, err := p.keeper.ClientTLS(s.identity, []spiffe.ID{s.identity})
	if err != nil {
		return err
	}
	conn, err := s.DialTunnel(ctx, to)
	if err != nil {
		return err
	}
	session := tls.Client(conn, config)
	defer func() { err = errors.Join(err, session.Close()) }()
	return session.HandshakeContext(ctx)
}
