package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
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
		if err := p.handshake(ctx, s, netip.AddrPortFrom(a, dataplane.PortTunnel), s.identity); err != nil {
			errs = append(errs, fmt.Errorf("a tunnel from the pod to itself, %v: %w", a, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		f.OK, f.Detail = false, err.Error()
	}
	return f
}

// maxPeers bounds how many nodes a check tries to reach.
const maxPeers = 4

// probePeers makes a connection from a pod of this node to one of each of the nodes that come
// next by name: so the agents together try every one, and what is between the nodes too.
func (p *pods) probePeers(ctx context.Context, s *dataplane.Snapshot, node string, from *servedPod) []admin.Finding {
	peers := nextPeers(s, node, maxPeers)
	findings := make([]admin.Finding, len(peers))
	var probes sync.WaitGroup
	for i, w := range peers {
		probes.Go(func() {
			err := p.handshake(ctx, from, netip.AddrPortFrom(w.Addrs[0], dataplane.PortTunnel), w.Identity)
			if err != nil {
				err = fmt.Errorf("a tunnel from this node to pod %s, %v: %w: a NetworkPolicy or a firewall may be blocking TCP port %d between the nodes",
					w.Name, w.Addrs[0], err, dataplane.PortTunnel)
			}
			findings[i] = finding("tunnel to "+w.Node, err)
		})
	}
	probes.Wait()
	return findings
}

// nextPeers are captured pods, one of each of the nodes after node in the ring of names.
func nextPeers(s *dataplane.Snapshot, node string, most int) []*dataplane.Workload {
	first := make(map[string]*dataplane.Workload)
	for i := range s.Workloads() {
		w := &s.Workloads()[i]
		if w.Captured && w.Node != node && len(w.Addrs) > 0 && first[w.Node] == nil {
			first[w.Node] = w
		}
	}
	names := slices.Sorted(maps.Keys(first))
	after, _ := slices.BinarySearch(names, node)
	var peers []*dataplane.Workload
	for i := range min(most, len(names)) {
		peers = append(peers, first[names[(after+i)%len(names)]])
	}
	return peers
}

// handshake proves that peer answers at an address.
func (p *pods) handshake(ctx context.Context, s *servedPod, to netip.AddrPort, peer spiffe.ID) (err error) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	config, err := p.keeper.ClientTLS(s.identity, []spiffe.ID{peer})
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
